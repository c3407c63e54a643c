// Server-sent events of answers that come piece by piece.
import { ApiError, AWAY, ROOT, authorized, credentials, errorOf, refuse, type Schemas } from './client'

export type GenerateRequest = Schemas['GenerateRequest']
export type FinishReason = 'stop' | 'tool_calls' | 'length' | 'cancelled' | 'error'

/** The last event: what the answer took. */
export type Summary = Schemas['GenerationEnd']

export type GenerateEvent =
  | (Schemas['TextEvent'] & { finish_reason?: FinishReason; done?: undefined })
  | Summary

/** The events of a stream's bytes, one after the other; without the [DONE] at the end. */
export async function* eventsOf(bytes: ReadableStream<Uint8Array>): AsyncGenerator<unknown> {
  const decoder = new TextDecoder()
  const reader = bytes.getReader()
  let rest = ''
  try {
    for (;;) {
      const { done, value } = await reader.read()
      rest += decoder.decode(value, { stream: !done })
      const blocks = rest.split('\n\n')
      rest = done ? '' : (blocks.pop() ?? '')
      for (const block of blocks) {
        const data = block.replace(/^data: ?/, '')
        if (!block.startsWith('data:') || data === '[DONE]') continue
        yield JSON.parse(data)
      }
      if (done) return
    }
  } finally {
    reader.cancel().catch(() => {})
  }
}

/** POST /generate, streamed. Ends with the event that is `done`. Throws ApiError; what `signal` aborts just ends. */
export async function* generate(body: GenerateRequest, signal: AbortSignal): AsyncGenerator<GenerateEvent> {
  const used = credentials.key()
  const headers = authorized(new Headers({ 'Content-Type': 'application/json' }))
  let whole = false
  try {
    const init = { method: 'POST', headers, body: JSON.stringify({ ...body, stream: true }), signal }
    const answer = await fetch(`${ROOT}generate`, init)
    if (!answer.ok || !answer.body) refuse(errorOf(answer.status, await answer.json().catch(() => null)), used)
    for await (const event of eventsOf(answer.body)) {
      if ((event as { error?: unknown }).error) throw errorOf(answer.status, event)
      const said = event as GenerateEvent
      whole ||= said.done === true
      yield said
    }
  } catch (error) {
    if (signal.aborted) return
    if (error instanceof ApiError) throw error
    throw new ApiError(0, null, AWAY)
  }
  if (!whole && !signal.aborted) throw new ApiError(0, null, 'The connection ended before the answer did.')
}
