// Tokens of an answer, each with how likely it was and what else was.
import type { Schemas } from '../api/client'

export type RawTokens = Schemas['FlatLogprobs']

export interface Alternative {
  text: string
  /** 0 to 1. */
  probability: number
}

export interface Token extends Alternative {
  /** Where it stands in the text of its answer: [start, end), in UTF-16 as JavaScript counts. */
  start: number
  end: number
  /** The likeliest first, the token itself among them. */
  alternatives: Alternative[]
}

/** Tokens whose offsets count the characters of `text` from its index `from` on. Those that show nothing are left out. */
export function tokensOf(raw: RawTokens, text: string, from = 0): Token[] {
  const starts: number[] = []
  for (let at = from; at < text.length; at += (text.codePointAt(at) ?? 0) > 0xffff ? 2 : 1) starts.push(at)
  const place = (offset: number | undefined) => starts[offset ?? Infinity] ?? text.length
  const found = raw.tokens.map((name, at) => {
    const top = Object.entries(raw.top_logprobs[at] ?? {})
    const alternatives = top.map(([other, logprob]) => ({ text: other, probability: Math.exp(logprob) }))
    return {
      text: name,
      probability: Math.exp(raw.token_logprobs[at] ?? 0),
      start: place(raw.text_offset[at]),
      end: place(raw.text_offset[at + 1]),
      alternatives: alternatives.sort((one, other) => other.probability - one.probability),
    }
  })
  return found.filter(({ start, end }) => end > start)
}

/** Of a stream's pieces one. */
export function joined(pieces: RawTokens[]): RawTokens {
  return {
    tokens: pieces.flatMap((piece) => piece.tokens),
    token_ids: pieces.flatMap((piece) => piece.token_ids),
    token_logprobs: pieces.flatMap((piece) => piece.token_logprobs),
    top_logprobs: pieces.flatMap((piece) => piece.top_logprobs),
    text_offset: pieces.flatMap((piece) => piece.text_offset),
  }
}

/** Whether an answer may go on after it: a part of a character is no text, and a control token ends the answer. */
export function isText(name: string): boolean {
  return !name.startsWith('bytes:\\x') && !/^<\|[^<>|]+\|>$|^<\/?(s|eos|pad|bos|end_of_turn|start_of_turn)>$/.test(name)
}

/** For people: `63%`, `<0.1%`. */
export function percent(probability: number): string {
  if (probability < 0.001) return '<0.1%'
  return `${(100 * probability).toFixed(probability < 0.1 ? 1 : 0)}%`
}
