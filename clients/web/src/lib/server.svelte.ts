// Whether the server is there, asked now and then; and what is done when it comes back.
import { ApiError, AWAY, ROOT } from '../api/client'

const SECONDS = 5
const SECONDS_AWAY = 1.5
const LIMIT = 8000

export type State = 'unknown' | 'ready' | 'busy' | 'away'

class Server {
  state = $state<State>('unknown')
  /** What is the matter, for people; '' when nothing is. */
  said = $state('')
  /** Streams that run: they tell by themselves whether the server is there. */
  streams = 0
  #listeners = new Set<() => void>()
  #timer: ReturnType<typeof setTimeout> | undefined

  /** Begin to look, and look whenever the page is shown again. */
  start(): void {
    document.addEventListener('visibilitychange', () => document.hidden || void this.look())
    window.addEventListener('online', () => void this.look())
    void this.look()
  }

  /** Called whenever the server is there after it was not, at the beginning as well. Returns how to stop it. */
  onBack(listener: () => void): () => void {
    this.#listeners.add(listener)
    return () => this.#listeners.delete(listener)
  }

  /** Ask now. */
  async look(): Promise<void> {
    clearTimeout(this.#timer)
    if (!document.hidden && !this.streams) await this.#ask()
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => void this.look(), 1000 * (this.state === 'ready' ? SECONDS : SECONDS_AWAY))
  }

  /** Look into it where a call could not reach the server. */
  noteError(error: unknown): void {
    if (error instanceof ApiError && error.away) void this.look()
  }

  async #ask(): Promise<void> {
    const before = this.state
    try {
      const answer = await fetch(`${ROOT}ready`, { signal: AbortSignal.timeout(LIMIT), cache: 'no-store' })
      const said = (await answer.json()) as { status?: string; engine?: string }
      this.state = answer.ok ? 'ready' : 'busy'
      this.said = answer.ok ? '' : sentence(said.status ?? '', said.engine ?? '')
    } catch {
      this.state = 'away'
      this.said = AWAY
    }
    const there = this.state === 'ready' || this.state === 'busy'
    if (there && (before === 'away' || before === 'unknown' || (before === 'busy' && this.state === 'ready'))) {
      for (const listener of this.#listeners) listener()
    }
  }
}

function sentence(status: string, engine: string): string {
  if (status === 'paused') return 'The server is paused: it takes requests again after POST /resume.'
  if (status === 'stopping') return 'The server is stopping.'
  if (engine === 'failed') return 'The engine cannot be kept running. The log of the server says why.'
  return `The server is not ready yet: its engine is ${engine || 'not there'}.`
}

export const server = new Server()
