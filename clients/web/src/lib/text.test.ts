import { describe, expect, it } from 'vitest'
import { leavesAt, parts, plain } from './text'

describe('hidden characters', () => {
  it('are shown by their names, each as a part of its own', () => {
    expect(parts('a\u202eb\u0007')).toEqual([
      { text: 'a', hidden: false },
      { text: 'U+202E', hidden: true },
      { text: 'b', hidden: false },
      { text: 'U+0007', hidden: true },
    ])
    expect(plain('x\u{e0041}\ufeff')).toBe('x⟨U+E0041⟩⟨U+FEFF⟩')
  })

  it('are not line ends, tabs, markup, emoji or other scripts', () => {
    const text = 'one\n\ttwo <b>three</b> 👩‍🚀❤️ שלום 北京'
    expect(parts(text)).toEqual([{ text, hidden: false }])
    expect(plain(text)).toBe(text)
  })

  it('are half of a pair as well', () => {
    expect(plain('\ud83d')).toBe('⟨U+D83D⟩')
    expect(plain('😀')).toBe('😀')
  })

  it('of an empty text are none', () => {
    expect(parts('')).toEqual([{ text: '', hidden: false }])
  })
})

describe('the place where a text leaves the base’s', () => {
  it('is the beginning of the word that differs', () => {
    expect(leavesAt('Go to the market', 'Go to the mall')).toBe(10)
    expect(leavesAt('Yes', 'No')).toBe(0)
  })

  it('is nowhere while one begins with the other', () => {
    expect(leavesAt('Go to', 'Go to the mall')).toBeNull()
    expect(leavesAt('Go to the mall', 'Go to')).toBeNull()
    expect(leavesAt('', 'Go')).toBeNull()
  })
})
