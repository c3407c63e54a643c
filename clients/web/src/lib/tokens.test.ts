import { describe, expect, it } from 'vitest'
import { isText, joined, percent, tokensOf, type RawTokens } from './tokens'

const raw = (tokens: string[], offsets: number[]): RawTokens => ({
  tokens,
  token_ids: tokens.map((_, at) => at),
  token_logprobs: tokens.map(() => Math.log(0.5)),
  top_logprobs: tokens.map((token) => ({ [token]: Math.log(0.5), other: Math.log(0.25), rare: Math.log(0.125) })),
  text_offset: offsets,
})

describe('tokens', () => {
  it('stand where they are, however many units a character has', () => {
    const text = 'a😀bc'
    const found = tokensOf(joined([raw(['a', '😀'], [0, 1]), raw(['bc'], [2])]), text)
    expect(found.map(({ start, end }) => text.slice(start, end))).toEqual(['a', '😀', 'bc'])
    expect(found[0]?.alternatives.map((other) => other.text)).toEqual(['a', 'other', 'rare'])
    expect(found[0]?.probability).toBeCloseTo(0.5)
  })

  it('begin after what stood before, and what shows nothing is left out', () => {
    const text = 'kept né'
    const found = tokensOf(raw(['n', 'bytes:\\xc3', 'bytes:\\xa9'], [0, 1, 1]), text, 5)
    expect(found.map(({ start, end }) => text.slice(start, end))).toEqual(['n', 'é'])
  })

  it('can be gone on with where they are text', () => {
    expect(['Paris', ' ', '<div>', '<|'].every(isText)).toBe(true)
    expect(['bytes:\\xf0\\x9f', '<|im_end|>', '</s>', '<eos>'].some(isText)).toBe(false)
    expect([1, 0.5, 0.031, 0.00001].map(percent)).toEqual(['100%', '50%', '3.1%', '<0.1%'])
  })
})
