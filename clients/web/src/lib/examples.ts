// Rows of a job's file, as questions to ask: what the adapter was made for says more than any prompt of ours.
import { ROOT, authorized, type Schemas } from '../api/client'
import type { GenerateRequest } from '../api/stream'

export type Messages = NonNullable<GenerateRequest['messages']>

export interface Example {
  /** What is asked: all but the reply. */
  messages: Messages
  /** What the row says in reply. */
  reply: string
}

/** Only the beginning of a file is read. */
const MOST_BYTES = 64 * 1024

/** What a job was measured on, else what it was trained on; in the order of the file. Throws nothing: none is no error. */
export async function examplesOf(job: Pick<Schemas['JobAnswer'], 'training_file' | 'validation_file'>, most: number): Promise<Example[]> {
  const file = job.validation_file ?? job.training_file
  const headers = authorized(new Headers({ Range: `bytes=0-${MOST_BYTES - 1}` }))
  const answer = await fetch(`${ROOT}v1/files/${encodeURIComponent(file)}/content`, { headers }).catch(() => null)
  return answer?.ok ? rowsOf(await answer.text(), most) : []
}

/** Examples in lines of JSON. The last line may be cut. */
export function rowsOf(text: string, most: number): Example[] {
  const found: Example[] = []
  for (const line of text.split('\n')) {
    if (found.length >= most) break
    try {
      const example = exampleOf(JSON.parse(line) as Record<string, unknown>)
      if (example && !found.some((one) => JSON.stringify(one.messages) === JSON.stringify(example.messages))) found.push(example)
    } catch {
      // No JSON, as a table has none.
    }
  }
  return found
}

function exampleOf(row: Record<string, unknown>): Example | null {
  const isMessage = (one: unknown): one is { role: string; content: string } => typeof (one as { content?: unknown } | null)?.content === 'string'
  if (Array.isArray(row.messages) && row.messages.every(isMessage)) {
    const last = row.messages.at(-1)
    const before = row.messages.slice(0, -1)
    return last?.role === 'assistant' && before.at(-1)?.role === 'user' ? { messages: before as Messages, reply: last.content } : null
  }
  const reply = row.completion ?? row.chosen
  if (typeof row.prompt === 'string' && typeof reply === 'string') return { messages: [{ role: 'user', content: row.prompt }], reply }
  return null
}
