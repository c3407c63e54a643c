import { expect, test } from 'vitest'
import { stateLine } from './states'

const job = (status: string, progress: object = {}, more: object = {}) => ({ status, hold: false, stopped: null, progress, ...more }) as unknown as Parameters<typeof stateLine>[0]

test('a line says the state, the step and how long it takes', () => {
  expect(stateLine(job('running', { phase: 'training', step: 3, steps: 24, seconds_left: 660 }))).toBe('Training, step 3 of 24, 11 min left')
  expect(stateLine(job('running', { phase: 'measuring', step: 3, steps: 24 }))).toBe('Measuring on held-out rows, step 3 of 24')
  expect(stateLine(job('running', { phase: 'validating_files', step: 3, steps: 24 }))).toBe('Training, step 3 of 24')
  expect(stateLine(job('paused', { step: 3, steps: 24, seconds_left: 660 }))).toBe('Paused, step 3 of 24')
  expect(stateLine(job('validating_files', { phase: 'validating_files', part: 0.5 }))).toBe('Checking: reading rows, 50% …')
  expect(stateLine(job('paused', { part: 1 }, { hold: true }))).toBe('Ready to train')
  expect(stateLine(job('succeeded', { step: 24, steps: 24 }))).toBe('Done')
})
