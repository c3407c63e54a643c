import { expect, test } from 'vitest'
import type { Schemas } from '../api/client'
import { grouped, marksOf } from './marks'

const entry = (action: string, at: number, more: Partial<Schemas['AuditAnswer']> = {}) =>
  ({ action, at, target: 'orders', version: 'a'.repeat(64), key: 'k1', actor: '', details: {}, ...more }) as Schemas['AuditAnswer']

test('what changes the answers is marked, the oldest first, with who did it', () => {
  const marks = marksOf([entry('rollout.started', 30, { details: { percent: 5 } }), entry('adapter.pinned', 20), entry('adapter.rolled_back', 10, { actor: 'job ftjob-1' }), entry('adapter.activated', 5)], () => 'web')
  expect(marks.map(({ at }) => at)).toEqual([5, 10, 30])
  expect(marks[0]?.text).toMatch(/^orders: aaaaaaaaaaaa activated by web, /)
  expect(marks[1]?.text).toMatch(/^orders: rolled back to aaaaaaaaaaaa by web through training, /)
  expect(marks[2]?.text).toMatch(/^orders: aaaaaaaaaaaa rollout begun at 5% by web, /)
})

test('marks that would cover each other are one, and those outside are none', () => {
  const marks = [-5, 10, 12, 40, 63, 66, 140].map((at) => ({ at, text: String(at) }))
  expect(grouped(marks, (at) => at, 100).map(({ left, marks }) => [left, marks.length])).toEqual([[10, 2], [40, 2], [66, 1]])
})
