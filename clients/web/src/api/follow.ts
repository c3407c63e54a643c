// A job's events, live, with their ids, so that nothing is missed or read twice after a break.
import { ApiError, AWAY, ROOT, authorized, credentials, errorOf, refuse, type Schemas } from './client'

export type JobEvent = Schemas['JobEventAnswer']
export type Job = Schemas['JobAnswer']
export type News = { event: JobEvent; job?: undefined } | { job: Job; event?: undefined }

/** What one block of a stream's lines says; null for a comment. */
export function newsOf(block: string): News | null {
  const fields: Record<string, string> = {}
  for (const line of block.split('\n')) {
    const colon = line.indexOf(':')
    if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 1).replace(/^ /, '')
  }
  if (fields.data === undefined) return null
  const data: unknown = JSON.parse(fields.data)
  return fields.event === 'done' ? { job: data as Job } : { event: data as JobEvent }
}

/** What has come after the event `after`, chunk by chunk as it comes; the last has the job once that is over. Throws ApiError. */
export async function* follow(job: string, after: string, signal: AbortSignal): AsyncGenerator<News[]> {
  const used = credentials.key()
  const headers = authorized(new Headers({ Accept: 'text/event-stream' }))
  if (after) headers.set('Last-Event-ID', after)
  try {
    const answer = await fetch(`${ROOT}v1/fine_tuning/jobs/${encodeURIComponent(job)}/events`, { headers, signal })
    if (!answer.ok || !answer.body) refuse(errorOf(answer.status, await answer.json().catch(() => null)), used)
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader()
    let rest = ''
    for (;;) {
      const { done, value } = await reader.read()
      if (done) return
      const blocks = (rest + value).split('\n\n')
      rest = blocks.pop() ?? ''
      yield blocks.map(newsOf).filter((one) => one !== null)
    }
  } catch (error) {
    if (signal.aborted) return
    if (error instanceof ApiError) throw error
    throw new ApiError(0, null, AWAY)
  }
}
