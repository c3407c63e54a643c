// One render a frame, however many tokens come: streams collect, and are shown together.

const HIDDEN_MS = 500
const watchers = new Set<() => void>()
let waiting = false

/** Call `show` once a frame (less often while nobody looks) until the returned function is called. */
export function onFrame(show: () => void): () => void {
  watchers.add(show)
  next()
  return () => watchers.delete(show)
}

function next(): void {
  if (waiting || !watchers.size) return
  waiting = true
  if (document.hidden) setTimeout(frame, HIDDEN_MS)
  else requestAnimationFrame(frame)
}

function frame(): void {
  waiting = false
  for (const show of watchers) show()
  next()
}
