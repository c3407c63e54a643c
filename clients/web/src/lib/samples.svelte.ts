// What a column usually says: many answers to one message, counted by what they say.
import { ApiError } from '../api/client'
import { generate, type GenerateRequest } from '../api/stream'
import { announcer } from './announce.svelte'
import { groupsOf } from './groups'
import { server } from './server.svelte'

export const MOST_SAMPLES = 64

export class Samples {
  /** Those that have ended. */
  texts = $state.raw<string[]>([])
  asked = $state(0)
  running = $state(false)
  error = $state.raw<ApiError | null>(null)
  #abort: AbortController | null = null

  get groups() {
    return groupsOf(this.texts)
  }

  stop(): void {
    this.#abort?.abort()
    this.running = false
  }

  async ask(body: GenerateRequest, samples: number, temperature: number): Promise<void> {
    this.stop()
    const abort = (this.#abort = new AbortController())
    this.texts = []
    this.asked = samples
    this.error = null
    this.running = true
    server.streams += 1
    const coming = new Array<string>(samples).fill('')
    const { logprobs: _, ...plain } = body
    try {
      for await (const event of generate({ ...plain, n: samples, temperature }, abort.signal)) {
        if (event.done) continue
        for (const { function: part } of event.tool_calls ?? []) coming[event.index] += `${part.name ?? ''}${part.arguments}`
        coming[event.index] += event.text
        if (event.finish_reason) this.texts = [...this.texts, coming[event.index] ?? '']
      }
      announcer.say(`${this.texts.length} samples complete: ${this.groups.length} different.`)
    } catch (error) {
      this.error = error instanceof ApiError ? error : new ApiError(0, null, String(error))
      server.noteError(error)
    } finally {
      server.streams -= 1
      if (this.#abort === abort) this.running = false
    }
  }
}
