// One message to several columns at once, and their conversations.
import type { GenerateRequest } from '../api/stream'
import { announcer } from './announce.svelte'
import { models } from './models.svelte'
import { keep, load } from './storage'
import { answer, Reply } from './reply.svelte'
import { BASE, adapterField, decodeTarget, encodeTarget, titleOf, type Target } from './target'
import type { Alternative, Token } from './tokens'

/** As many as POST /generate/many takes. */
export const MOST_COLUMNS = 64
export const MOST_TOKENS = 4096
/** Of each token, where probabilities are asked for. */
const ALTERNATIVES = 8
/** As many as a request may have. */
const MOST_STOPS = 16
const USED = 'onebase.columns'
const MOST_REMEMBERED = 4

export interface Settings {
  temperature: number
  /** 1: all tokens may come. */
  topP: number
  /** Texts that end an answer, one a line. */
  stop: string
  maxTokens: number
  /** null: another one each time. */
  seed: number | null
  system: string
  /** A JSON schema and a list of tools, as they are written; '' for none. */
  schema: string
  tools: string
  /** Whether each token tells how likely it was, and what else was. */
  probabilities: boolean
}

const DEFAULTS: Settings = { temperature: 0, topP: 1, stop: '', maxTokens: 128, seed: null, system: '', schema: '', tools: '', probabilities: false }

const stopsOf = ({ stop }: Settings): string[] => stop.split('\n').filter(Boolean).slice(0, MOST_STOPS)

type Messages = NonNullable<GenerateRequest['messages']>

let made = 0

/** One column: who answers, and what was said so far. */
export class Column {
  readonly id = (made += 1)
  target = $state<Target>(BASE)
  replies = $state<Reply[]>([])

  constructor(target: Target) {
    this.target = target
  }

  get title(): string {
    return titleOf(this.target, models.base)
  }

  get last(): Reply | null {
    return this.replies.at(-1) ?? null
  }

  get running(): boolean {
    return this.last?.running ?? false
  }

  /** The answer to a message of the view. */
  replyTo(round: number): Reply | null {
    return this.replies.find((reply) => reply.round === round) ?? null
  }

  clear(): void {
    this.stop()
    this.replies = []
  }

  stop(): void {
    for (const reply of this.replies) reply.stop()
  }

  /** Forget what was said from a message of the view on. */
  cut(round: number): void {
    this.stop()
    this.replies = this.replies.filter((reply) => reply.round < round)
  }

  /** What was said before a reply; without one all that was. What failed was never said. */
  before(reply: Reply | null): Messages {
    const end = reply ? this.replies.indexOf(reply) : this.replies.length
    return this.replies.slice(0, end).flatMap((one): Messages => {
      if (!one.said && !one.calls.length) return []
      const calls = one.calls.map(({ id, name, arguments: given }) => ({
        id, type: 'function' as const, function: { name, arguments: given },
      }))
      return [
        { role: 'user', content: one.message },
        { role: 'assistant', content: one.said, ...(calls.length ? { tool_calls: calls } : {}) },
      ]
    })
  }
}

/** What the Compare view shows. */
export class Compare {
  columns = $state<Column[]>([])
  message = $state('')
  /** Which of the messages is being written anew. */
  editing = $state<number | null>(null)
  settings = $state<Settings>({ ...DEFAULTS })
  #round = 0
  /** The message that nobody answered, and that is in hand again. */
  #failed: number | null = null
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

  get begun(): boolean {
    return this.columns.some((column) => column.replies.length)
  }

  /** Why the tools cannot be sent; '' where they can. */
  get toolsProblem(): string {
    try {
      if (this.settings.tools.trim()) JSON.parse(this.settings.tools)
      return ''
    } catch (error) {
      return `This is not JSON yet: ${(error as Error).message}.`
    }
  }

  add(target: Target): void {
    if (!this.full) this.columns.push(new Column(target))
  }

  remove(column: Column): void {
    column.stop()
    this.columns = this.columns.filter((one) => one.id !== column.id)
  }

  /** A request to a column: these messages after the system prompt. */
  request(target: Target, messages: Messages): GenerateRequest {
    const { system, temperature, topP, maxTokens, seed, schema, tools, probabilities } = this.settings
    const stop = stopsOf(this.settings)
    const adapter = adapterField(target)
    return {
      messages: system.trim() ? [{ role: 'system' as const, content: system }, ...messages] : messages,
      ...(adapter === null ? {} : { adapter }),
      temperature,
      ...(topP === 1 ? {} : { top_p: topP }),
      max_tokens: maxTokens,
      ...(stop.length ? { stop } : {}),
      ...(seed === null ? {} : { seed }),
      ...(schema.trim() ? { guided_json: schema } : {}),
      ...(tools.trim() && !this.toolsProblem ? { tools: JSON.parse(tools) as NonNullable<GenerateRequest['tools']> } : {}),
      ...(probabilities ? { logprobs: ALTERNATIVES } : {}),
    }
  }

  /** What was said up to an answer, and the answer. */
  judged(column: Column, reply: Reply): Messages {
    const said: Messages = [...column.before(reply), { role: 'user', content: reply.message }, { role: 'assistant', content: reply.said }]
    const { messages } = this.request(column.target, said)
    return messages ?? said
  }

  /** What a column is asked next, or was asked last. */
  bodyOf(column: Column): GenerateRequest {
    const { last } = column
    if (last && !this.message.trim()) return this.#bodyFor(column, last)
    return this.request(column.target, [...column.before(null), { role: 'user', content: this.message }])
  }

  #bodyFor(column: Column, reply: Reply): GenerateRequest {
    const asked: Messages = [...column.before(reply), { role: 'user', content: reply.message }]
    if (!reply.begun) return this.request(column.target, asked)
    const goesOn = this.request(column.target, [...asked, { role: 'assistant', content: reply.begun }])
    return { ...goesOn, continue_final_message: true }
  }

  /** Send what is written to all columns; what is written anew takes the place of what was said from there on. */
  async run(): Promise<void> {
    if (!this.message.trim() || !this.columns.length || this.toolsProblem || this.running) return
    const from = this.editing ?? this.#failed
    if (from !== null) for (const column of this.columns) column.cut(from)
    this.editing = this.#failed = null
    this.#round += 1
    const { message } = this
    const asks = this.columns.map((column) => {
      column.replies.push(new Reply(message, this.#round))
      return { column, reply: column.last as Reply }
    })
    this.message = ''
    await this.#answer(asks)
    if (asks.every(({ reply }) => reply.state === 'failed') && !this.message) {
      this.message = message
      this.#failed = asks[0]?.reply.round ?? null
    }
  }

  /** Go on in one column as if another token had come. */
  async goOn(column: Column, reply: Reply, token: Token, other: Alternative): Promise<void> {
    if (this.running) return
    column.cut(reply.round + 1)
    const kept = reply.tokens.filter(({ start }) => start < token.start)
    const begun = reply.text.slice(0, token.start) + other.text
    reply.restart(begun, [...kept, { ...token, ...other, end: begun.length }])
    await this.#answer([{ column, reply }])
  }

  /** Ask a column again what it could not answer. */
  async retry(column: Column, reply: Reply): Promise<void> {
    if (column.running) return
    if (this.#failed === reply.round && this.message === reply.message) this.message = ''
    this.#failed = null
    reply.restart('', [])
    await this.#answer([{ column, reply }])
  }

  async #answer(asks: { column: Column; reply: Reply }[]): Promise<void> {
    announcer.say(`${count(asks.length, 'answer')} on the way.`)
    await answer(asks.map(({ column, reply }) => ({ reply, body: this.#bodyFor(column, reply) })))
    const failed = asks.filter(({ reply }) => reply.state === 'failed').length
    const whole = asks.filter(({ reply }) => reply.state === 'done').length
    announcer.say(`${count(whole, 'answer')} complete${failed ? `, ${failed} failed` : ''}.`)
  }

  /** Have a message that was sent in hand again. */
  edit(reply: Reply): void {
    this.editing = reply.round
    this.message = reply.message
  }

  stopEditing(): void {
    this.editing = null
    this.message = ''
  }

  startOver(): void {
    this.editing = this.#failed = null
    for (const column of this.columns) column.clear()
  }

  stop(): void {
    for (const column of this.columns) column.stop()
  }

  /** For a link: who answers, the first message and the settings; never an answer. */
  toParams(): URLSearchParams {
    const { temperature, topP, maxTokens, seed, system, schema, tools, probabilities } = this.settings
    const message = this.message || (this.columns.find((column) => column.last)?.replies[0]?.message ?? '')
    const params = new URLSearchParams()
    for (const column of this.columns) params.append('c', encodeTarget(column.target))
    if (message) params.set('m', message)
    if (system) params.set('s', system)
    if (temperature !== DEFAULTS.temperature) params.set('t', String(temperature))
    if (topP !== DEFAULTS.topP) params.set('tp', String(topP))
    for (const stop of stopsOf(this.settings)) params.append('stop', stop)
    if (maxTokens !== DEFAULTS.maxTokens) params.set('n', String(maxTokens))
    if (seed !== null) params.set('seed', String(seed))
    if (schema) params.set('schema', schema)
    if (tools) params.set('tools', tools)
    if (probabilities) params.set('p', '1')
    return params
  }

  /** Show what a link says, as far as it can be read. Nothing is sent. */
  fromParams(params: URLSearchParams): boolean {
    // The view may come and go, and keeps what it had; so does one without a link.
    if (params === this.#shown || !params.size) return false
    this.#shown = params
    this.stop()
    const number = (name: string, low: number, high: number, whole: boolean) => {
      const text = params.get(name)
      const value = text ? Number(text) : NaN
      return value >= low && value <= high && (!whole || Number.isSafeInteger(value)) ? value : null
    }
    const targets = params.getAll('c').slice(0, MOST_COLUMNS).map(decodeTarget)
    this.columns = targets.filter((target) => target !== null).map((target) => new Column(target))
    this.editing = this.#failed = null
    this.message = params.get('m') ?? ''
    this.settings = {
      temperature: number('t', 0, 2, false) ?? DEFAULTS.temperature,
      topP: number('tp', 0.01, 1, false) ?? DEFAULTS.topP,
      stop: params.getAll('stop').slice(0, MOST_STOPS).join('\n'),
      maxTokens: number('n', 1, MOST_TOKENS, true) ?? DEFAULTS.maxTokens,
      seed: number('seed', 0, Number.MAX_SAFE_INTEGER, true),
      system: params.get('s') ?? '',
      schema: params.get('schema') ?? '',
      tools: params.get('tools') ?? '',
      probabilities: params.get('p') === '1',
    }
    return true
  }

  /** What is shown first: what was used last, as far as it is there, else the base. */
  fill(): void {
    if (this.columns.length) return
    const isThere = (target: Target | null): target is Target =>
      target?.kind === 'base' || (target?.kind === 'adapter' && models.has(target.name)) || (target?.kind === 'mix' && target.terms.every(({ name }) => models.has(name)))
    const last = load(USED, (one): one is string => typeof one === 'string').map(decodeTarget).filter(isThere)
    for (const target of last.length ? last : [BASE]) this.add(target)
  }

  /** Begin with these columns the next time. */
  remember(): void {
    if (this.columns.length) keep(USED, this.columns.slice(0, MOST_REMEMBERED).map(({ target }) => encodeTarget(target)))
  }
}

export function count(number: number, what: string): string {
  return `${number} ${what}${number === 1 ? '' : 's'}`
}

export const compare = new Compare()
