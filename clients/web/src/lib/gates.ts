// Gates of activations, in words.
import type { Schemas } from '../api/client'
import type { VersionGates } from './adapters.svelte'
import { many } from './units'

export type GateRule = Schemas['GateRule']

/** What a version must be, a part for each gate of a rule: `signed by acme`, `approved by 2`. */
export function conditions({ signature, proof, evaluation, weights, approvals, approvers }: GateRule): string[] {
  const said = signature.length ? [`signed by ${signature.join(' or ')}`] : []
  if (proof !== 'none') said.push(proof === 'exact' ? 'proved, bit for bit' : 'proved')
  if (evaluation) {
    const { margin, confidence, rows, total, metric, slices, data, evaluators } = evaluation
    const parts = [`margin ${margin}`, `${Number((confidence * 100).toFixed(2))}% sure`, `slices of ${many(rows, 'row')} or more`]
    if (total) parts.push(`${many(total, 'row')} in all`)
    if (metric) parts.push(`by ${metric}`)
    if (slices.length) parts.push(`of ${slices.join(', ')}`)
    if (data) parts.push(`file ${data.slice(0, 12)}`)
    if (evaluators.length) parts.push(`by ${evaluators.join(', ')}`)
    said.push(`evaluated (${parts.join(', ')})`)
  }
  if (weights !== null) said.push(`weights at most ${weights}`)
  if (approvals) said.push(`approved by ${approvals}${approvers.length ? ` of ${approvers.join(', ')}` : ''}`)
  return said
}

/** Names of the closed gates, each once: `approval, signature`; '' if none is. */
export const closedOf = (found: VersionGates | undefined): string =>
  [...new Set((found?.gates ?? []).filter(({ passed }) => !passed).map(({ gate }) => gate))].join(', ')

/** `exact_match on 12 rows, beside d123a6d54255`. */
export function evaluated({ metric, slices, against }: Schemas['VersionEvaluation']): string {
  const rows = slices.reduce((sum, one) => sum + one.rows, 0)
  return `${metric} on ${many(rows, 'row')}, beside ${against ? against.slice(0, 12) : 'the base'}`
}

/** Lines that are not empty, each without the space around it. */
export const linesOf = (text: string): string[] => text.split('\n').map((line) => line.trim()).filter(Boolean)
