// One message to several columns at once, and what they answer.
import { ApiError } from '../api/client'
import { generate, type FinishReason, type GenerateRequest, type Summary } from '../api/stream'
import { announcer } from './announce.svelte'
import { onFrame } from './frames'
import { models } from './models.svelte'
import { server } from './server.svelte'
import { BASE, adapterField, decodeTarget, encodeTarget, titleOf, type Target } from './target'

/** A browser keeps 6 connections to one server, and each column that streams takes one. */
export const MOST_COLUMNS = 6
export const MOST_TOKENS = 4096

export interface Settings {
  temperature: number
  maxTokens: number
  /** null: another one each time. */
  seed: number | null
  system: string
}

const DEFAULTS: Settings = { temperature: 0, maxTokens: 128, seed: null, system: '' }

export type ColumnState = 'empty' | 'waiting' | 'streaming' | 'done' | 'stopped' | 'failed'

let made = 0

/** One column: who answers, and the answer to the last message. */
export class Column {
  readonly id = (made += 1)
  target = $state<Target>(BASE)
  state = $state<ColumnState>('empty')
  text = $state('')
  finish = $state<FinishReason | null>(null)
  summary = $state.raw<Summary | null>(null)
  error = $state.raw<ApiError | null>(null)
  /** Pieces a second while it streams: about as many as tokens. */
  speed = $state<number | null>(null)
  #abort: AbortController | null = null
  #pending = ''
  #pieces = 0
  #firstAt = 0

  constructor(target: Target) {
    this.target = target
  }

  get title(): string {
    return titleOf(this.target, models.base)
  }

  get running(): boolean {
    return this.state === 'waiting' || this.state === 'streaming'
  }

  /** Tokens a second after the first one, by the server's clock; while it streams by this page's. */
  get tokensPerSecond(): number | null {
    const { usage, timing } = this.summary ?? {}
    if (!usage || !timing?.decode_s || usage.completion_tokens < 2) return this.summary ? null : this.speed
    return (usage.completion_tokens - 1) / timing.decode_s
  }

  clear(): void {
    this.stop()
    this.state = 'empty'
    this.#begin()
  }

  stop(): void {
    this.#abort?.abort()
    this.#abort = null
    if (this.running) {
      this.#show()
      this.state = 'stopped'
    }
  }

  async run(body: GenerateRequest): Promise<void> {
    this.stop()
    this.#begin()
    this.state = 'waiting'
    const abort = (this.#abort = new AbortController())
    server.streams += 1
    const ended = onFrame(() => this.#show())
    try {
      for await (const event of generate(body, abort.signal)) {
        if (this.#abort !== abort) return
        if (event.done) this.summary = event
        else this.#take(event.text, event.finish_reason)
      }
      if (this.#abort === abort) {
        this.#show()
        this.state = 'done'
      }
    } catch (error) {
      if (this.#abort !== abort) return
      this.#show()
      this.state = 'failed'
      this.error = error instanceof ApiError ? error : new ApiError(0, null, String(error))
    } finally {
      ended()
      server.streams -= 1
      server.noteError(this.error)
    }
  }

  #begin(): void {
    this.text = this.#pending = ''
    this.finish = this.summary = this.error = this.speed = null
    this.#pieces = 0
  }

  #take(text: string, finish: FinishReason | undefined): void {
    if (text) {
      this.#pieces += 1
      if (this.#pieces === 1) this.#firstAt = performance.now()
    }
    this.#pending += text
    this.finish = finish ?? this.finish
  }

  /** Once a frame: what came since the last one. */
  #show(): void {
    if (!this.#pending) return
    this.text += this.#pending
    this.#pending = ''
    this.state = 'streaming'
    const seconds = (performance.now() - this.#firstAt) / 1000
    if (seconds > 0.25) this.speed = (this.#pieces - 1) / seconds
  }
}

/** What the Compare view shows. */
export class Compare {
  columns = $state<Column[]>([])
  message = $state('')
  settings = $state<Settings>({ ...DEFAULTS })
  #shown: URLSearchParams | null = null

  get running(): boolean {
    return this.columns.some((column) => column.running)
  }

  /** The column that the others are compared with: the first of the base. */
  get reference(): Column | null {
    return this.columns.find((column) => column.target.kind === 'base') ?? null
  }

  get full(): boolean {
    return this.columns.length >= MOST_COLUMNS
  }

  add(target: Target): void {
    if (!this.full) this.columns.push(new Column(target))
  }

  remove(column: Column): void {
    column.stop()
    this.columns = this.columns.filter((one) => one.id !== column.id)
  }

  /** The request of a column. */
  bodyOf(column: Column): GenerateRequest {
    const { system, temperature, maxTokens, seed } = this.settings
    const messages = [{ role: 'user' as const, content: this.message }]
    const adapter = adapterField(column.target)
    return {
      messages: system.trim() ? [{ role: 'system' as const, content: system }, ...messages] : messages,
      ...(adapter === null ? {} : { adapter }),
      temperature,
      max_tokens: maxTokens,
      ...(seed === null ? {} : { seed }),
    }
  }

  async run(): Promise<void> {
    if (!this.message.trim() || !this.columns.length) return
    const columns = [...this.columns]
    announcer.say(`${count(columns.length, 'answer')} on the way.`)
    await Promise.all(columns.map((column) => column.run(this.bodyOf(column))))
    const failed = columns.filter((column) => column.state === 'failed').length
    const whole = columns.filter((column) => column.state === 'done').length
    announcer.say(`${count(whole, 'answer')} complete${failed ? `, ${failed} failed` : ''}.`)
  }

  stop(): void {
    for (const column of this.columns) column.stop()
  }

  /** For a link: who answers, the message and the settings; never an answer. */
  toParams(): URLSearchParams {
    const { temperature, maxTokens, seed, system } = this.settings
    const params = new URLSearchParams()
    for (const column of this.columns) params.append('c', encodeTarget(column.target))
    if (this.message) params.set('m', this.message)
    if (system) params.set('s', system)
    if (temperature !== DEFAULTS.temperature) params.set('t', String(temperature))
    if (maxTokens !== DEFAULTS.maxTokens) params.set('n', String(maxTokens))
    if (seed !== null) params.set('seed', String(seed))
    return params
  }

  /** Show what a link says, as far as it can be read. Nothing is sent. */
  fromParams(params: URLSearchParams): void {
    // The view may come and go, and keeps what it had; so does one without a link.
    if (params === this.#shown || !params.size) return
    this.#shown = params
    this.stop()
    const number = (name: string, low: number, high: number, whole: boolean) => {
      const text = params.get(name)
      const value = text ? Number(text) : NaN
      return value >= low && value <= high && (!whole || Number.isSafeInteger(value)) ? value : null
    }
    const targets = params.getAll('c').slice(0, MOST_COLUMNS).map(decodeTarget)
    this.columns = targets.filter((target) => target !== null).map((target) => new Column(target))
    this.message = params.get('m') ?? ''
    this.settings = {
      temperature: number('t', 0, 2, false) ?? DEFAULTS.temperature,
      maxTokens: number('n', 1, MOST_TOKENS, true) ?? DEFAULTS.maxTokens,
      seed: number('seed', 0, Number.MAX_SAFE_INTEGER, true),
      system: params.get('s') ?? '',
    }
  }

  /** What is shown first: the base and the first adapters. */
  fill(): void {
    if (this.columns.length) return
    this.add(BASE)
    for (const { id } of models.adapters.slice(0, 2)) this.add({ kind: 'adapter', name: id, version: null })
  }
}

function count(number: number, what: string): string {
  return `${number} ${what}${number === 1 ? '' : 's'}`
}

export const compare = new Compare()
