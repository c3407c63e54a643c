// Entries of the audit log, for people.
import type { Schemas, Scope } from '../api/client'
import { bytes } from './units'

type Entry = Schemas['AuditAnswer']
/** Who did something: the id of a key, and what acted for it. */
export type Doer = Pick<Entry, 'key' | 'actor'>

/** Digests, and ids of what the server made: as much of them is shown as messages and commands show. */
const LONG = [/\b([0-9a-f]{12})[0-9a-f]{52}\b/g, /\b((?:ftjob-|file-|batch_)[0-9a-f]{8})[0-9a-f]{16}\b/g]
const KEY = /^ob-/
const AGENTS: Record<string, string> = { startup: 'the server’s start', batch: 'a batch', job: 'training' }
/** The detail that has the name of what an entry is about, where its target is an id. */
const NAMED: Record<string, string> = { job: 'adapter', file: 'filename' }

/** Where targets of this kind are seen, by which scopes, and whether they are ids that the server made. */
const LINKS: Record<string, { page: string; scopes: Scope[]; id: boolean }> = {
  adapter: { page: 'adapters?name=', scopes: ['adapters'], id: false },
  job: { page: 'training?job=', scopes: ['train'], id: true },
  batch: { page: 'batches?q=', scopes: ['generate', 'train'], id: true },
  file: { page: 'batches?q=', scopes: ['generate', 'train'], id: true },
}

const short = (text: string): string => LONG.reduce((found, long) => found.replace(long, '$1'), text)
const kindOf = ({ action }: Pick<Entry, 'action'>): string => action.split('.')[0] ?? ''
const detailsOf = ({ details }: Pick<Entry, 'details'>) => (details ?? {}) as Record<string, unknown>

/** Whether it is the id of a key, and not what acted. */
export const isKey = (id: string): boolean => KEY.test(id)

/** A version or an adapter's history has one name for both: that of a key, or of what acted. */
export const doerOf = (actor: string): Doer => (isKey(actor) ? { key: actor, actor: '' } : { key: '', actor })

/** Who did it: a key by its name, and what acted for it; '' if nobody is known. */
export function whoOf({ key, actor }: Doer, nameOf: (key: string) => string): string {
  const agent = actor && (AGENTS[actor.split(' ')[0] ?? ''] ?? actor)
  return key ? [nameOf(key), agent].filter(Boolean).join(' through ') : agent
}

/** `by web`, `by web through training`, `at the server’s start`; '' if nobody is known. */
export function byOf(doer: Doer, nameOf: (key: string) => string): string {
  const who = whoOf(doer, nameOf)
  return doer.actor === 'startup' && !doer.key ? `at ${who}` : who && `by ${who}`
}

/** What an entry is about, by the name that people know it by: a job by its adapter's, a file by its own. */
export function targetOf(entry: Pick<Entry, 'action' | 'target' | 'details'>): string {
  const name = detailsOf(entry)[NAMED[kindOf(entry)] ?? '']
  if (typeof name === 'string' && name) return name
  return LINKS[kindOf(entry)]?.id ? short(entry.target) : entry.target
}

/** Where the target of an entry is seen; '' if nowhere, or by others only. */
export function linkOf(entry: Pick<Entry, 'action' | 'target'>, caller: { may: (scope: Scope) => boolean }): string {
  const link = LINKS[kindOf(entry)]
  if (!link || entry.action.endsWith('.deleted') || !link.scopes.some((scope) => caller.may(scope))) return ''
  return `#/${link.page}${encodeURIComponent(entry.target)}`
}

/** Details of an entry in one line: `bytes 7.4 MB, scopes ["train"]`; '' if there are none. */
export function saidOf(entry: Pick<Entry, 'action' | 'details'>): string {
  return Object.entries(detailsOf(entry))
    .filter(([name, value]) => value !== null && name !== NAMED[kindOf(entry)])
    .map(([name, value]) => `${name} ${typeof value === 'string' ? short(value) : name === 'bytes' ? bytes(Number(value)) : short(JSON.stringify(value))}`)
    .join(', ')
}
