// Entries of the audit log, for people.
import type { Schemas } from '../api/client'
import { bytes } from './units'

const DIGEST = /^[0-9a-f]{64}$/

/** Details of an entry in one line: `bytes 7.4 MB, scopes ["train"]`; '' if there are none. */
export function saidOf({ details }: Pick<Schemas['AuditAnswer'], 'details'>): string {
  return Object.entries((details ?? {}) as Record<string, unknown>)
    .filter(([, value]) => value !== null)
    .map(([name, value]) => `${name} ${typeof value === 'string' ? (DIGEST.test(value) ? value.slice(0, 12) : value) : name === 'bytes' ? bytes(Number(value)) : JSON.stringify(value)}`)
    .join(', ')
}
