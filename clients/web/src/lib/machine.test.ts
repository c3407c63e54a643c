import { describe, expect, it, vi } from 'vitest'

vi.stubGlobal('sessionStorage', { getItem: () => null })
const { perSecond } = await import('./machine.svelte')

describe('what passes each second', () => {
  it('is the difference of two looks at a counter, and not known where the counter began anew', () => {
    expect(perSecond({ at: 10, value: 100 }, { at: 12, value: 150 })).toBe(25)
    expect(perSecond({ at: 10, value: 100 }, { at: 12, value: 7 })).toBeNull()
    expect(perSecond({ at: 10, value: 100 }, { at: 10, value: 100 })).toBeNull()
  })
})
