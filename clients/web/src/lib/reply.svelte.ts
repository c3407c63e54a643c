// One answer to one message, as it comes.
import { ApiError } from '../api/client'
import { cancel, generate, generateMany, type FinishReason, type GenerateEvent, type GenerateRequest, type Summary } from '../api/stream'
import { onFrame } from './frames'
import { server } from './server.svelte'
import { joined, tokensOf, type RawTokens, type Token } from './tokens'

export type ReplyState = 'waiting' | 'streaming' | 'done' | 'stopped' | 'failed'

/** A call of a tool; `arguments` is JSON once it is whole. */
export interface Call {
  id: string
  name: string
  arguments: string
}

let made = 0

export class Reply {
  readonly id = (made += 1)
  state = $state<ReplyState>('waiting')
  text = $state('')
  /** What it thought before the text. */
  thought = $state('')
  calls = $state<Call[]>([])
  finish = $state<FinishReason | null>(null)
  summary = $state.raw<Summary | null>(null)
  error = $state.raw<ApiError | null>(null)
  /** Of the text, once it has ended; if they were asked for. */
  tokens = $state.raw<Token[]>([])
  /** What should have been said, if somebody has written it. */
  corrected = $state<string | null>(null)
  /** Pieces a second while it streams: about as many as tokens. */
  speed = $state<number | null>(null)
  /** With which text it began: what was there when another token was chosen. */
  begun = $state('')
  #kept: Token[] = []
  #raw: RawTokens[] = []
  #pending = ''
  #pendingThought = ''
  #pieces = 0
  #firstAt = 0
  #left = () => {}

  /** message: what it answers. round: which of the view's messages that is, for all columns. */
  constructor(
    readonly message: string,
    readonly round: number,
  ) {}

  get running(): boolean {
    return this.state === 'waiting' || this.state === 'streaming'
  }

  /** What it says, in what is asked next. */
  get said(): string {
    return this.corrected ?? this.text
  }

  /** Tokens a second after the first one, by the server's clock; while it streams by this page's. */
  get tokensPerSecond(): number | null {
    const { usage, timing } = this.summary ?? {}
    if (!usage || !timing?.decode_s || usage.completion_tokens < 2) return this.summary ? null : this.speed
    return (usage.completion_tokens - 1) / timing.decode_s
  }

  /** Go on from here with another text: what stands, and these tokens of it. */
  restart(begun: string, tokens: Token[]): void {
    this.stop()
    this.begun = this.text = begun
    this.#kept = tokens
    this.tokens = []
    this.calls = []
    this.thought = ''
    this.corrected = null
  }

  /** left: called when nobody wants the rest of it. */
  begin(left: () => void): void {
    this.state = 'waiting'
    this.finish = this.summary = this.error = this.speed = null
    this.#left = left
    this.#raw = []
    this.#pending = this.#pendingThought = ''
    this.#pieces = 0
  }

  take(event: GenerateEvent | ApiError): void {
    if (!this.running) return
    if (event instanceof ApiError) {
      this.fail(event)
    } else if (event.done) {
      this.summary = event
      this.#end('done')
    } else {
      if (event.text || event.reasoning) {
        this.#pieces += 1
        if (this.#pieces === 1) this.#firstAt = performance.now()
      }
      this.#pending += event.text
      this.#pendingThought += event.reasoning ?? ''
      if (event.logprobs) this.#raw.push(event.logprobs)
      for (const { index, id, function: part } of event.tool_calls ?? []) {
        const call = (this.calls[index] ??= { id: id ?? '', name: part.name ?? '', arguments: '' })
        call.arguments += part.arguments
      }
      this.finish = event.finish_reason ?? this.finish
    }
  }

  fail(error: ApiError): void {
    if (!this.running) return
    this.error = error
    this.#end('failed')
    server.noteError(error)
  }

  stop(): void {
    if (!this.running) return
    this.#end('stopped')
    this.#left()
  }

  /** Once a frame: what came since the last one. Returns the length of a text that has changed. */
  show(): number {
    if (!this.#pending && !this.#pendingThought) return 0
    this.text += this.#pending
    this.thought += this.#pendingThought
    this.#pending = this.#pendingThought = ''
    if (this.running) this.state = 'streaming'
    const seconds = (performance.now() - this.#firstAt) / 1000
    if (seconds > 0.25) this.speed = (this.#pieces - 1) / seconds
    return this.text.length
  }

  #end(state: ReplyState): void {
    this.show()
    this.state = state
    if (this.#raw.length) this.tokens = [...this.#kept, ...tokensOf(joined(this.#raw), this.text, this.begun.length)]
  }
}

/** Over how many connections replies are answered: a browser opens 6 to one server, for all of its tabs. */
const STREAMS = 4

type Ask = { reply: Reply; body: GenerateRequest }

/** Have replies answered. Throws nothing: each reply says what became of it. */
export async function answer(asks: Ask[]): Promise<void> {
  const shares = asks.slice(0, STREAMS).map((_, first) => asks.filter((_, at) => at % STREAMS === first))
  server.streams += 1
  await Promise.all(shares.map(answerTogether))
  server.streams -= 1
}

/**
 * Have replies answered over one connection, which ends once nobody wants the rest of any. Of several, the server is
 * asked to end one that is stopped alone, once its first event has told the id of its text.
 */
async function answerTogether(asks: Ask[]): Promise<void> {
  const replies = asks.map(({ reply }) => reply)
  const bodies = asks.map(({ body }) => body)
  const abort = new AbortController()
  const ids = replies.map(() => '')
  const leave = (at: number) => queueMicrotask(() => {  // once all are stopped that are stopped together
    if (!replies.some((one) => one.running)) abort.abort()
    else if (ids[at]) void cancel(ids[at])
  })
  replies.forEach((reply, at) => reply.begin(() => leave(at)))
  const ended = replies.map((reply) => onFrame(() => reply.show()))
  try {
    const [alone, ...others] = bodies
    if (alone && !others.length) {
      for await (const event of generate(alone, abort.signal)) replies[0]?.take(event)
    } else {
      for await (const [at, event] of generateMany(bodies, abort.signal)) {
        if (!(event instanceof ApiError) && !ids[at]) {
          ids[at] = event.id
          if (!replies[at]?.running && !event.done) leave(at)
        }
        replies[at]?.take(event)
      }
    }
  } catch (error) {
    const said = error instanceof ApiError ? error : new ApiError(0, null, String(error))
    for (const reply of replies) reply.fail(said)
  } finally {
    for (const end of ended) end()
  }
}
