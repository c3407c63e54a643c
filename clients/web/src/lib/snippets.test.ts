import { describe, expect, it } from 'vitest'
import { asCurl, asJson, asPython } from './snippets'

const root = 'http://127.0.0.1:8000/'
const body = {
  messages: [{ role: 'user' as const, content: "It's \u202e $(reboot) `id` \"x\" \\" }],
  adapter: [{ name: 'orders', weight: 0.5 }],
  temperature: 0,
}

describe('a request to paste', () => {
  it('as JSON hides nothing and means the same', () => {
    const text = asJson(body)
    expect(text).toContain('\\u202e')
    expect(text).not.toContain('\u202e')
    expect(JSON.parse(text)).toEqual(body)
    expect(asJson('😀')).toBe('"😀"')
  })

  it('for a shell stays within one pair of quotes', () => {
    const text = asCurl(body, root, false)
    const quoted = text.split("'")
    expect(quoted).toHaveLength(5)
    expect(JSON.parse(quoted[3] ?? '')).toEqual(body)
  })

  it('names the key and does not have it', () => {
    expect(asCurl(body, root, true)).toContain('Bearer $ONEBASE_API_KEY')
    expect(asPython(body, root, true)).toContain('os.environ["ONEBASE_API_KEY"]')
  })

  it('as Python leaves out what is not given', () => {
    const text = asPython({ messages: [], adapter: null, seed: null, echo: false }, root, false)
    expect(text).toContain('echo=False')
    expect(text).not.toContain('adapter')
    expect(text).not.toContain('seed')
  })
})
