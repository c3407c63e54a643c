// One render a frame, however many tokens come: streams collect, and are shown together.

const HIDDEN_MS = 500
/** Characters that one frame lays out anew: so many that it stays a frame. Streams beyond it have their turn in the next one. */
export const A_FRAME = 6000
type Watcher = () => number
let watchers: Watcher[] = []
let waiting = false

/** Call `show` once a frame (less often while nobody looks) until the returned function is called.
 *
 * It returns how many characters it changed; while these are many, each has its turn every few frames.
 */
export function onFrame(show: Watcher): () => void {
  watchers.push(show)
  next()
  return () => void (watchers = watchers.filter((one) => one !== show))
}

function next(): void {
  if (waiting || !watchers.length) return
  waiting = true
  if (document.hidden) setTimeout(frame, HIDDEN_MS)
  else requestAnimationFrame(frame)
}

function frame(): void {
  waiting = false
  const turns = watchers
  let [shown, characters] = [0, 0]
  while (shown < turns.length && characters < A_FRAME) {
    characters += turns[shown]?.() ?? 0
    shown += 1
  }
  // Those that came to nothing are the first ones of the next frame.
  if (turns === watchers) watchers = [...turns.slice(shown), ...turns.slice(0, shown)]
  next()
}
