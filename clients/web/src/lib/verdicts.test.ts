import { describe, expect, it } from 'vitest'
import { groupsOf } from './groups'
import { isVerdict, tally, type Verdict } from './verdicts'

const verdict = (one: string, other: string, winner: 0 | 1 | 2): Verdict => ({
  at: '', message: '', titles: [one, other], answered: [null, null], texts: ['', ''], winner,
})

describe('verdicts', () => {
  it('count by pair, whoever stood on the left', () => {
    const said = [verdict('a', 'b', 1), verdict('b', 'a', 1), verdict('b', 'a', 2), verdict('a', 'b', 0), verdict('c', 'a', 1)]
    expect(tally(said)).toEqual([
      { titles: ['a', 'b'], wins: [2, 1], ties: 1 },
      { titles: ['a', 'c'], wins: [0, 1], ties: 0 },
    ])
  })

  it('are read back only where they are some', () => {
    expect([verdict('a', 'b', 2), null, 3, { titles: ['a'], winner: 1 }, { titles: [1, 2], winner: 1 }].map(isVerdict)).toEqual([
      true, false, false, false, false,
    ])
  })
})

describe('samples', () => {
  it('that say the same are counted together, the most frequent first', () => {
    expect(groupsOf(['x', ' y', 'y\n', 'z', 'x', 'y'])).toEqual([
      { text: 'y', count: 3 }, { text: 'x', count: 2 }, { text: 'z', count: 1 },
    ])
  })
})
