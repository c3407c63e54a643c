import { expect, test } from 'vitest'
import type { VersionGates } from './adapters.svelte'
import { closedOf, conditions, evaluated, linesOf, type GateRule } from './gates'

const rule = (some: Partial<GateRule>): GateRule => ({
  object: 'gate', id: 'gate-1', tenant: '*', name: '*', signature: [], proof: 'none', evaluation: null, weights: null, approvals: 0, approvers: [], created_at: 0, created_by: '', ...some,
})

test('a rule says each of its gates', () => {
  const evaluation = { margin: 0.05, confidence: 0.95, rows: 80, evaluators: ['jobs'], metric: 'exact_match', slices: ['en', 'de'], total: 1200, data: 'ab'.repeat(32) }
  const full = rule({ signature: ['acme', 'releases'], proof: 'exact', evaluation, weights: 1.2, approvals: 2, approvers: ['ob-1', 'ob-2'] })
  expect(conditions(full)).toEqual([
    'signed by acme or releases',
    'proved, bit for bit',
    'evaluated (margin 0.05, 95% sure, slices of 80 rows or more, 1,200 rows in all, by exact_match, of en, de, file abababababab, by jobs)',
    'weights at most 1.2',
    'approved by 2 of ob-1, ob-2',
  ])
  expect(conditions(rule({ weights: 0 }))).toEqual(['weights at most 0'])
})

test('closed gates are named once though two rules have them', () => {
  const state = (gate: VersionGates['gates'][number]['gate'], passed: boolean) => ({ gate, passed, rule: 'gate-1', reason: '' })
  const found = { gates: [state('approval', false), state('proof', true), state('approval', false), state('signature', false)] } as VersionGates
  expect(closedOf(found)).toBe('approval, signature')
  expect(closedOf(undefined)).toBe('')
})

test('an evaluation says its rows and what it was compared with', () => {
  const one = { metric: 'exact_match', against: null, slices: [{ slice: 'a', rows: 5, sum: 0, squares: 0 }, { slice: 'b', rows: 7, sum: 0, squares: 0 }], key: '', job: null, data: null, at: 0 }
  expect(evaluated(one)).toBe('exact_match on 12 rows, beside the base')
  expect(evaluated({ ...one, against: 'd123a6d54255ffff' })).toBe('exact_match on 12 rows, beside d123a6d54255')
})

test('lists are written a line each', () => {
  expect(linesOf(' acme\n\n releases, inc \n')).toEqual(['acme', 'releases, inc'])
})
