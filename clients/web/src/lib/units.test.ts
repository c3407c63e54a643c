import { describe, expect, it } from 'vitest'
import { ago, bytes, count, duration, figure, many, percent } from './units'

describe('figures for people', () => {
  it('are bytes in thousands', () => {
    expect([0, 999, 1000, 7_372_800, 99_900_000, 6.3e9].map(bytes)).toEqual(['0 B', '999 B', '1.0 kB', '7.4 MB', '100 MB', '6.3 GB'])
  })

  it('are times in two units at most', () => {
    expect([0, 0.25, 12.4, 60, 200, 7500, 273_600].map(duration)).toEqual(['0 s', '0.3 s', '12 s', '1 min', '3 min 20 s', '2 h 5 min', '3 d 4 h'])
    expect(ago(100, 110)).toBe('just now')
    expect(ago(100, 100 + 329)).toBe('5 min ago')
  })

  it('have the digits that count', () => {
    expect([0, 0.031415, 3.14159, -120.4, 0.0000123, 2.5e7].map(figure)).toEqual(['0', '0.0314', '3.14', '-120', '1.2e-5', '2.5e+7'])
    expect(percent(0.0314)).toBe('3.14%')
  })

  it('say one and many', () => {
    expect([count(1_843_200), many(1, 'version'), many(0, 'version')]).toEqual(['1,843,200', '1 version', '0 versions'])
  })
})
