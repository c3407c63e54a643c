// Answers that were corrected: rows of a training file, kept in this browser until they are used.
import { api, data } from '../api/client'
import type { GenerateRequest } from '../api/stream'
import { keep, load, onOtherTab } from './storage'

const STORED = 'onebase.lessons'
export const FILE = 'corrections.jsonl'

/** A row as training takes it: a conversation whose last message is what should be said. */
export interface Lesson {
  messages: NonNullable<GenerateRequest['messages']>
}

const isLesson = (one: unknown): one is Lesson => Array.isArray((one as Lesson | null)?.messages)

class Lessons {
  rows = $state.raw<Lesson[]>(load(STORED, isLesson))
  /** Whether this browser keeps them once the page is closed. */
  kept = $state(true)

  constructor() {
    onOtherTab(STORED, () => (this.rows = load(STORED, isLesson)))
  }

  /** Add a row; one that asks the same takes the place of the former one. */
  add(row: Lesson): void {
    const asked = (one: Lesson) => JSON.stringify(one.messages.slice(0, -1))
    this.#store([...this.rows.filter((one) => asked(one) !== asked(row)), row])
  }

  remove(row: Lesson): void {
    this.#store(this.rows.filter((one) => one !== row))
  }

  clear(): void {
    this.#store([])
  }

  asJsonl(): string {
    return this.rows.map((row) => `${JSON.stringify(row)}\n`).join('')
  }

  /** Upload them as a training file; its id. Throws ApiError. */
  async upload(): Promise<string> {
    const form = new FormData()
    form.set('purpose', 'fine-tune')
    form.set('file', new Blob([this.asJsonl()], { type: 'application/jsonl' }), FILE)
    const made = await data(api.POST('/v1/files', { body: form as never, bodySerializer: (body: unknown) => body as FormData }))
    return made.id
  }

  #store(rows: Lesson[]): void {
    this.rows = rows
    this.kept = keep(STORED, rows)
  }
}

export const lessons = new Lessons()
