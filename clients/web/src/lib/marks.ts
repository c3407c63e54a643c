// Changes of what answers: activations, rollbacks and rollouts, as marks on a chart over time.
import type { Schemas } from '../api/client'
import { byOf } from './audit'
import { when } from './units'

type Entry = Schemas['AuditAnswer']

export interface Mark {
  /** Unix time in seconds. */
  at: number
  /** `orders: 9039de12ab34 activated by web, 1 Dec 2026, 12:34`. */
  text: string
}

const DONE: Record<string, string> = {
  'adapter.activated': 'activated',
  'adapter.rolled_back': 'rolled back to',
  'adapter.deactivated': 'deactivated',
  'rollout.started': 'rollout begun',
  'rollout.changed': 'rollout changed',
  'rollout.promoted': 'rollout promoted',
  'rollout.rolled_back': 'rollout rolled back',
  'rollout.stopped': 'rollout stopped',
}
/** Kinds of entries of the audit log among which there are some. */
export const MARKED = ['adapter', 'rollout'] as const

/** The marks among entries of the audit log, the oldest first. nameOf: a key's name by its id. */
export function marksOf(entries: Entry[], nameOf: (key: string) => string): Mark[] {
  return entries
    .flatMap((entry): Mark[] => {
      const done = DONE[entry.action]
      if (!done) return []
      const version = entry.version?.slice(0, 12) ?? ''
      const share = entry.action.startsWith('rollout.') && typeof entry.details === 'object' && entry.details !== null && 'percent' in entry.details ? ` at ${String(entry.details.percent)}%` : ''
      const what = done.endsWith(' to') ? `${done} ${version}` : [version, done].filter(Boolean).join(' ')
      const by = byOf(entry, nameOf)
      return [{ at: entry.at, text: `${entry.target}: ${what}${share}${by && ` ${by}`}, ${when(entry.at)}` }]
    })
    .sort((one, two) => one.at - two.at)
}

export interface Group {
  /** Where it is drawn, in pixels from the left of the plot. */
  left: number
  marks: Mark[]
}

/** Pixels between two marks: a finger's target is 24 wide, and none may cover a part of another. */
const APART = 25

/** Marks that would cover each other become one, at the place of the first. `place`: pixels from the left, of a mark's time. */
export function grouped(marks: Mark[], place: (at: number) => number, width: number): Group[] {
  const groups: Group[] = []
  for (const mark of marks) {
    const left = place(mark.at)
    if (left < 0 || left > width) continue
    const last = groups.at(-1)
    if (last && left - last.left < APART) last.marks.push(mark)
    else groups.push({ left, marks: [mark] })
  }
  return groups
}
