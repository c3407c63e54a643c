import { describe, expect, it } from 'vitest'
import { BASE, adapterField, decodeTarget, encodeTarget, titleOf, type Target } from './target'

const targets: Target[] = [
  BASE,
  { kind: 'adapter', name: 'orders', version: null },
  { kind: 'adapter', name: 'hub:acme/x+y*z@main', version: '5d0c2f7a9b31' },
  { kind: 'mix', terms: [{ name: 'a+b*c', weight: -0.5 }, { name: 'pirate', weight: 1 }] },
]

describe('who answers', () => {
  it.each(targets)('comes back from the address as it was: %j', (target) => {
    const params = new URLSearchParams({ c: encodeTarget(target) })
    expect(decodeTarget(new URLSearchParams(params.toString()).get('c') ?? '')).toEqual(target)
  })

  it.each(['', 'x', 'a:', 'a:orders@main', 'a:%', 'm:', 'm:a', 'm:a*', 'm:a*NaN', 'm:a*1e9', 'm:*1', 'm:' + 'a*1+'.repeat(17)])(
    'is nobody where the address says %j',
    (text) => {
      expect(decodeTarget(text)).toBeNull()
    },
  )

  it('is told to the server and to people', () => {
    expect(targets.map(adapterField)).toEqual([
      null,
      'orders',
      'hub:acme/x+y*z@main@5d0c2f7a9b31',
      [{ name: 'a+b*c', weight: -0.5 }, { name: 'pirate', weight: 1 }],
    ])
    expect(titleOf(targets[3] as Target, 'base')).toBe('a+b*c × -0.5 + pirate × 1')
  })
})
