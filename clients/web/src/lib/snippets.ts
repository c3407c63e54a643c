// One column's request, to be pasted elsewhere. A key is named there, never written.
import type { GenerateRequest } from '../api/stream'

// What a terminal or an editor would hide or turn around.
const UNSEEN = /[\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\u{e0000}-\u{e0fff}]/gu

/** JSON in which nothing is unseen. */
export function asJson(body: unknown): string {
  const units = (character: string) => character.split('').map((unit) => unit.charCodeAt(0))
  const escaped = (character: string) => units(character).map((unit) => `\\u${hex(unit, 4)}`).join('')
  return JSON.stringify(body, null, 2).replace(UNSEEN, escaped)
}

const hex = (value: number, digits: number) => value.toString(16).padStart(digits, '0')

export function asCurl(body: GenerateRequest, root: string, withKey: boolean): string {
  const key = withKey ? ` \\\n  -H "Authorization: Bearer $ONEBASE_API_KEY"` : ''
  // Within quotes of the shell's there is no other way to write one than to leave them.
  const json = asJson(body).replaceAll("'", '\\u0027')
  return `curl ${root}generate -H 'Content-Type: application/json'${key} -d '${json}'`
}

export function asPython(body: GenerateRequest, root: string, withKey: boolean): string {
  const { messages, adapter, ...rest } = body
  const given = { messages, ...(adapter == null ? {} : { adapter }), ...rest }
  const lines = Object.entries(given).filter(([, value]) => value != null)
  const key = withKey ? ', api_key=os.environ["ONEBASE_API_KEY"]' : ''
  return [
    ...(withKey ? ['import os', ''] : []),
    'from onebase import Client',
    '',
    `client = Client("${root.replace(/\/$/, '')}"${key})`,
    'answer = client.generate(',
    ...lines.map(([name, value]) => `    ${name}=${literal(value)},`),
    ')',
    'print(answer.text)',
    '',
  ].join('\n')
}

/** Python's spelling of a JSON value: the same but for three words, which stand alone here. */
function literal(value: unknown): string {
  if (value === true) return 'True'
  if (value === false) return 'False'
  if (value === null) return 'None'
  if (Array.isArray(value)) return `[${value.map(literal).join(', ')}]`
  if (typeof value === 'object') {
    return `{${Object.entries(value as object).map(([name, one]) => `${literal(name)}: ${literal(one)}`).join(', ')}}`
  }
  const escaped = (character: string) => `\\U${hex(character.codePointAt(0) ?? 0, 8)}`
  return JSON.stringify(value).replace(UNSEEN, escaped)
}
