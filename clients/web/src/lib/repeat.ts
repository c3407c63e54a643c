// Looking again and again at what changes without being told.
import { untrack } from 'svelte'
import { server } from './server.svelte'

/** `look` at once, and again after as many milliseconds as it says, while the page is seen and the server is there. */
export function repeat(look: () => Promise<number>): () => void {
  let timer: ReturnType<typeof setTimeout> | undefined
  let ended = false
  const again = async () => {
    const pause = document.hidden || server.state === 'away' ? 1000 : await look().catch(() => 5000)
    if (!ended) timer = setTimeout(() => void again(), pause)
  }
  untrack(() => void again()) // in an effect, each change of what the first look reads would begin anew, without a pause
  return () => {
    ended = true
    clearTimeout(timer)
  }
}
