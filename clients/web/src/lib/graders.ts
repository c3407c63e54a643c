// Graders of replies: what the form asks of each kind, the JSON that the server reads, and what it said of one reply.
import { ApiError, type Schemas } from '../api/client'

export type GraderKind = 'string_check' | 'text_similarity' | 'score_model' | 'python' | 'multi'
export type Grader = Schemas['RunGraderRequest']['grader']

/** Fields of all kinds, so that what was typed for one is there again when it is chosen again. */
export interface GraderDraft {
  kind: GraderKind
  input: string
  reference: string
  operation: string
  metric: string
  /** The base or an adapter; '' is the base. */
  judge: string
  question: string
  low: number | null
  high: number | null
  source: string
  json: string
}

export const KINDS: Record<GraderKind, string> = {
  string_check: 'Equals or contains a text (string_check)',
  text_similarity: 'Similarity to a text (text_similarity)',
  score_model: 'A number that a judge gives (score_model)',
  python: 'A function in Python (python)',
  multi: 'Several graders and a formula, as JSON (multi)',
}
export const OPERATIONS: Record<string, string> = { eq: 'equals', ne: 'does not equal', like: 'contains', ilike: 'contains, in any case' }
export const METRICS = ['fuzzy_match', 'bleu', 'gleu', 'rouge_1', 'rouge_2', 'rouge_3', 'rouge_4', 'rouge_5', 'rouge_l']

const NAME = 'reward'
/** Of a file, to find its first row in. */
const FIRST_BYTES = 1 << 16
const TEXT = '{{sample.output_text}}'
const SOURCE = 'def grade(sample, item):\n    return 1.0 if sample["output_text"].strip() == item["answer"] else 0.0\n'

export const newGrader = (): GraderDraft => ({
  kind: 'string_check',
  input: TEXT,
  reference: '{{item.answer}}',
  operation: 'ilike',
  metric: 'fuzzy_match',
  judge: '',
  question: `How good is this reply, from 0 to 1?\n\n${TEXT}`,
  low: 0,
  high: 1,
  source: SOURCE,
  json: '',
})

/** The grader of a draft, as the server reads it. Throws ApiError where its JSON is none, or a number is missing. */
export function graderOf(draft: GraderDraft, base: string): Grader {
  const { kind, input, reference } = draft
  if (kind === 'string_check') return { type: kind, name: NAME, input, reference, operation: draft.operation }
  if (kind === 'text_similarity') return { type: kind, name: NAME, input, reference, evaluation_metric: draft.metric }
  if (kind === 'python') return { type: kind, name: NAME, source: draft.source }
  if (kind === 'score_model') return { type: kind, name: NAME, model: draft.judge.trim() || base, input: [{ role: 'user', content: draft.question }], range: [numberOf(draft.low, 'Lowest number'), numberOf(draft.high, 'Highest number')] }
  return objectOf(draft.json, 'Grader', '{"type": "multi", …}')
}

function numberOf(value: number | null, field: string): number {
  if (typeof value !== 'number') throw new ApiError(0, null, `${field}: write a number.`)
  return value
}

/** A grader of several, as JSON, with the one that was written so far in it; a range that has a number missing is seen there. */
export function severalOf(draft: GraderDraft, base: string): string {
  const one = { ...graderOf({ ...draft, low: draft.low ?? 0, high: draft.high ?? 1 }, base), name: 'first' }
  return JSON.stringify({ type: 'multi', name: NAME, graders: { first: one }, calculate_output: 'first' }, null, 2)
}

/** The object that a text is as JSON. Throws ApiError, which names the field and says what to write. */
export function objectOf(text: string, field: string, example: string): Record<string, unknown> {
  let given: unknown
  try {
    given = JSON.parse(text)
  } catch (error) {
    throw new ApiError(0, null, `${field}: this is no JSON (${error instanceof Error ? error.message : ''}). Write an object such as ${example}.`)
  }
  if (typeof given !== 'object' || given === null || Array.isArray(given)) throw new ApiError(0, null, `${field}: write an object such as ${example}.`)
  return given as Record<string, unknown>
}

/** The first row of a file with a row a line; '' of any other file. */
export async function firstRow(file: Blob): Promise<string> {
  const [line = ''] = (await file.slice(0, FIRST_BYTES).text()).split('\n')
  try {
    objectOf(line, '', '')
    return line.trim()
  } catch {
    return ''
  }
}

const FAILED: Record<string, string> = {
  invalid_variable_error: 'A template names what the reply or the row does not have.',
  sample_parse_error: 'The reply is no JSON.',
  formula_parse_error: 'The formula has no finite value.',
  python_grader_runtime_error: 'The function failed.',
  python_grader_server_error: 'The function could not be run.',
  model_grader_server_error: 'The judge could not be asked.',
  model_grader_refusal_error: 'The judge gave no number.',
  model_grader_parse_error: 'The judge gave no number of its range.',
}

/** Why a reply could not be graded, in sentences; '' if it was. */
export function failureOf({ metadata: { errors } }: Schemas['GraderRun']): string {
  const said = Object.entries(errors).flatMap(([name, value]) => (value === true ? [FAILED[name] ?? `The grader failed: ${name}.`] : typeof value === 'string' ? [value] : []))
  return said.join(' ')
}
