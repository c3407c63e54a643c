import { expect, test } from 'vitest'
import type { Schemas } from '../api/client'
import { failureOf, firstRow, graderOf, newGrader, objectOf, severalOf } from './graders'

test('each kind has its own fields alone, and a judge is the base unless another is named', () => {
  const draft = { ...newGrader(), reference: 'blue' }
  const text = '{{sample.output_text}}'
  expect(graderOf(draft, 'base')).toEqual({ type: 'string_check', name: 'reward', input: text, reference: 'blue', operation: 'ilike' })
  expect(graderOf({ ...draft, kind: 'text_similarity' }, 'base')).toEqual({ type: 'text_similarity', name: 'reward', input: text, reference: 'blue', evaluation_metric: 'fuzzy_match' })
  expect(graderOf({ ...draft, kind: 'python', source: 'grade = len' }, 'base')).toEqual({ type: 'python', name: 'reward', source: 'grade = len' })
  const judged = { ...draft, kind: 'score_model' as const, question: 'Good?', high: 10 }
  expect(graderOf(judged, 'base')).toEqual({ type: 'score_model', name: 'reward', model: 'base', input: [{ role: 'user', content: 'Good?' }], range: [0, 10] })
  expect(graderOf({ ...judged, judge: ' polite ' }, 'base')).toMatchObject({ model: 'polite' })
})

test('a judge without its lowest or highest number is not tried with another', () => {
  const judged = { ...newGrader(), kind: 'score_model' as const }
  expect(() => graderOf({ ...judged, low: null }, 'base')).toThrow('Lowest number: write a number.')
  expect(() => graderOf({ ...judged, high: null }, 'base')).toThrow('Highest number: write a number.')
  expect(JSON.parse(severalOf({ ...judged, high: null }, 'base')).graders.first.range).toEqual([0, 1])
})

test('several graders begin with the one that was written, and are sent as they are written then', () => {
  const draft = newGrader()
  const json = severalOf(draft, 'base')
  expect(graderOf({ ...draft, kind: 'multi', json }, 'base')).toEqual({ type: 'multi', name: 'reward', graders: { first: { ...graderOf(draft, 'base'), name: 'first' } }, calculate_output: 'first' })
})

test('what is no object names its field and what to write', () => {
  expect(() => graderOf({ ...newGrader(), kind: 'multi', json: '[1' }, 'base')).toThrow(/^Grader: this is no JSON .+ Write an object such as \{"type": "multi"/)
  expect(() => objectOf('[1]', 'Row', '{"a": 1}')).toThrow('Row: write an object such as {"a": 1}.')
})

test('the first row is that of a file with a row a line', async () => {
  expect(await firstRow(new Blob(['{"prompt": "a"} \r\n{"prompt": "b"}\n']))).toBe('{"prompt": "a"}')
  for (const other of ['', '[{"prompt": "a"}]', 'prompt,answer\na,b\n', `{"prompt": "${'a'.repeat(70_000)}"}`]) expect(await firstRow(new Blob([other]))).toBe('')
})

test('a reply that got no reward says why, by flag and by detail', () => {
  const run = (errors: Record<string, unknown>) => ({ reward: 0, sub_rewards: {}, model_grader_token_usage_per_model: {}, metadata: { name: '', type: '', errors, execution_time: 0, scores: {}, token_usage: null, sampled_model_name: null } }) satisfies Schemas['GraderRun']
  expect(failureOf(run({ other_error: false, python_grader_runtime_error_details: null }))).toBe('')
  expect(failureOf(run({ python_grader_runtime_error: true, python_grader_runtime_error_details: "KeyError: 'answer'" }))).toBe("The function failed. KeyError: 'answer'")
  expect(failureOf(run({ truncated_observation_error: true }))).toBe('The grader failed: truncated_observation_error.')
})
