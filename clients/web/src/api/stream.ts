// Server-sent events of answers that come piece by piece.
import { ApiError, AWAY, ROOT, api, authorized, credentials, data, errorOf, refuse, type Schemas } from './client'

export type GenerateRequest = Schemas['GenerateRequest']
export type FinishReason = 'stop' | 'tool_calls' | 'length' | 'cancelled' | 'error'

/** The last event: what the answer took. */
export type Summary = Schemas['GenerationEnd']

export type GenerateEvent =
  | (Schemas['TextEvent'] & { finish_reason?: FinishReason; done?: undefined })
  | Summary

type Event = Record<string, unknown>

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

/** What a route streams. Throws ApiError; what `signal` aborts just ends. */
async function* streamed(path: string, body: unknown, signal: AbortSignal): AsyncGenerator<Event> {
  const used = credentials.key()
  const headers = authorized(new Headers({ 'Content-Type': 'application/json' }))
  try {
    const answer = await fetch(`${ROOT}${path}`, { method: 'POST', headers, body: JSON.stringify(body), signal })
    if (!answer.ok || !answer.body) refuse(errorOf(answer.status, await answer.json().catch(() => null)), used)
    yield* eventsOf(answer.body) as AsyncGenerator<Event>
  } catch (error) {
    if (signal.aborted) return
    throw error instanceof ApiError ? error : new ApiError(0, null, AWAY)
  }
}

const cutOff = () => new ApiError(0, null, 'The connection ended before the answer did.')

/** POST /generate, streamed. Ends with the event that is `done`. Throws ApiError; what `signal` aborts just ends. */
export async function* generate(body: GenerateRequest, signal: AbortSignal): AsyncGenerator<GenerateEvent> {
  let whole = false
  for await (const event of streamed('generate', { ...body, stream: true }, signal)) {
    if (event.error) throw errorOf(200, event)
    whole ||= event.done === true
    yield event as unknown as GenerateEvent
  }
  if (!whole && !signal.aborted) throw cutOff()
}

/**
 * POST /generate/many: each event with the number of its request, whose last one is `done` or an error of its own.
 * Throws ApiError where all failed together; what `signal` aborts just ends.
 */
export async function* generateMany(
  requests: GenerateRequest[],
  signal: AbortSignal,
): AsyncGenerator<[number, GenerateEvent | ApiError]> {
  const open = new Set(requests.keys())
  for await (const event of streamed('generate/many', { requests }, signal)) {
    const at = event.request as number
    if (event.error || event.done) open.delete(at)
    yield [at, event.error ? errorOf(event.status as number, event) : (event as unknown as GenerateEvent)]
  }
  if (!signal.aborted) for (const at of open) yield [at, cutOff()]
}

/** Have the server end a text of which nobody wants the rest. Throws nothing: it may just have ended. */
export async function cancel(id: string): Promise<void> {
  await data(api.POST('/generate/{id}/cancel', { params: { path: { id } } })).catch(() => {})
}
