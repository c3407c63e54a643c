// Who answers in a column: the base, an adapter or one of its versions, or a weighted mix.
import type { Schemas } from '../api/client'

export interface Term {
  name: string
  weight: number
}

export type Target =
  | { kind: 'base' }
  | { kind: 'adapter'; name: string; version: string | null }
  | { kind: 'mix'; terms: Term[] }

export const MOST_TERMS = 16
/** Of sliders; the server takes up to 1000. */
export const MOST_WEIGHT = 2
const SHORT = 12

export const BASE: Target = { kind: 'base' }

/** The request's field `adapter`. */
export function adapterField(target: Target): NonNullable<Schemas['GenerateRequest']['adapter']> | null {
  if (target.kind === 'base') return null
  if (target.kind === 'mix') return target.terms.map(({ name, weight }) => ({ name, weight }))
  return target.version === null ? target.name : `${target.name}@${target.version}`
}

/** For people. */
export function titleOf(target: Target, base: string): string {
  if (target.kind === 'base') return base || 'base'
  if (target.kind === 'mix') return target.terms.map(({ name, weight }) => `${name} × ${weight}`).join(' + ')
  return target.version === null ? target.name : `${target.name}@${target.version.slice(0, SHORT)}`
}

/** For the address: `b`, `a:orders`, `a:orders@5d0c...`, `m:orders*0.7+pirate*0.3`. */
export function encodeTarget(target: Target): string {
  if (target.kind === 'base') return 'b'
  if (target.kind === 'mix') return `m:${target.terms.map(({ name, weight }) => `${quoted(name)}*${weight}`).join('+')}`
  const version = target.version === null ? '' : `@${target.version}`
  return `a:${quoted(target.name)}${version}`
}

const quoted = (name: string) => encodeURIComponent(name).replaceAll('*', '%2A')

/** What `encodeTarget` made; null where it is nothing of the kind. */
export function decodeTarget(text: string): Target | null {
  try {
    if (text === 'b') return BASE
    const [kind, rest] = [text.slice(0, 2), text.slice(2)]
    if (!rest || rest.length > 10_000) return null
    if (kind === 'a:') {
      const [name = '', version] = rest.split('@')
      if (!name || (version !== undefined && !/^[0-9a-f]{8,64}$/.test(version))) return null
      return { kind: 'adapter', name: decodeURIComponent(name), version: version ?? null }
    }
    if (kind !== 'm:') return null
    const terms = rest.split('+').map((term) => {
      const [name = '', weight = ''] = term.split('*')
      return { name: decodeURIComponent(name), weight: weight ? Number(weight) : NaN }
    })
    const fits = ({ name, weight }: Term) => name !== '' && Math.abs(weight) <= 1000
    return terms.length <= MOST_TERMS && terms.every(fits) ? { kind: 'mix', terms } : null
  } catch {
    return null // a % that begins nothing
  }
}
