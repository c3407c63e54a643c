// One set of words for what a job is doing, wherever it is named.
import type { Job } from '../api/follow'
import { count, duration } from './units'

const WORDS: Record<string, string> = {
  validating_files: 'Checking',
  queued: 'Queued',
  running: 'Training',
  paused: 'Paused',
  succeeded: 'Done',
  failed: 'Failed',
  cancelled: 'Cancelled',
}

/** What is done besides training itself. */
const PHASES: Record<string, string> = {
  validating_files: 'Reading rows',
  measuring: 'Measuring on held-out rows',
  samples: 'Answering the prompts',
  saving: 'Saving',
  proving: 'Proving the adapter',
}

type Known = Pick<Job, 'status' | 'hold' | 'stopped' | 'progress'>

/** `Training`. Ready to train is what is checked and waits for a word. */
export function stateOf(job: Known): string {
  if (job.hold && job.status === 'paused') return 'Ready to train'
  if (job.stopped && job.status === 'running') return 'Stopping'
  return WORDS[job.status] ?? job.status
}

/** `Training, step 3 of 24, 11 min left`. */
export function stateLine(job: Known): string {
  const { phase, step, steps, seconds_left: left, part } = job.progress ?? {}
  const state = stateOf(job)
  if (job.status === 'validating_files') return `${state}: ${(PHASES[phase ?? ''] ?? PHASES.validating_files ?? '').toLowerCase()}${part ? `, ${Math.floor(part * 100)}%` : ''} …`
  if (!['running', 'paused'].includes(job.status) || job.hold) return state
  // A trainer that has read its rows may not say so before its first figures.
  const doing = state === 'Training' && phase !== 'validating_files' ? (PHASES[phase ?? ''] ?? state) : state
  return [
    doing,
    ...(steps ? [`step ${count(step ?? 0)} of ${count(steps)}`] : []),
    ...(job.status === 'running' && !job.stopped && typeof left === 'number' ? [`${duration(left)} left`] : []),
  ].join(', ')
}
