import { afterEach, beforeEach, expect, it, vi } from 'vitest'

vi.stubGlobal('sessionStorage', { getItem: () => null, setItem: () => {}, removeItem: () => {} })
vi.stubGlobal('document', { hidden: false, addEventListener: () => {}, baseURI: 'http://localhost/' })
vi.stubGlobal('fetch', () => {
  asked += 1
  return answer()
})
const { keys } = await import('./keys.svelte')
const { session } = await import('./session.svelte')

let asked = 0
let answer: () => Promise<Response>
const list = (...names: string[]) => () => Promise.resolve(Response.json({ data: names.map((name, at) => ({ id: `ob-${at + 1}`, name })) }))
const use = (key: string, scope: 'adapters' | 'generate' = 'adapters') => (session.caller = { object: 'caller', key, tenant: 'acme', scopes: [scope] })
const passed = () => new Promise((done) => setTimeout(done))

beforeEach(() => {
  asked = 0
  answer = list('web')
})

afterEach(() => session.forget())

it('looks for keys once an id is met that is not known, once for all of them', async () => {
  use('ob-a')
  expect([keys.nameOf('ob-1'), keys.nameOf('ob-9'), keys.nameOf('training')]).toEqual(['ob-1', 'ob-9', 'training'])
  await passed()
  expect([keys.nameOf('ob-1'), keys.nameOf('ob-9')]).toEqual(['web', 'ob-9'])
  await passed()
  expect(asked).toBe(1)
  answer = list('web', 'shop')
  expect(keys.nameOf('ob-2')).toBe('ob-2')
  await passed()
  expect([keys.nameOf('ob-2'), asked]).toEqual(['shop', 2])
})

it('looks again for what the server could not say', async () => {
  use('ob-b')
  answer = () => Promise.resolve(Response.json({ error: { message: 'It starts.', code: 'engine_starting' } }, { status: 503 }))
  keys.nameOf('ob-1')
  await passed()
  answer = list('web')
  keys.nameOf('ob-1')
  await passed()
  expect(keys.nameOf('ob-1')).toBe('web')
})

it('tells keys of one name apart', async () => {
  use('ob-c')
  answer = list('web', 'shop', 'web', '')
  await keys.load()
  expect(['ob-1', 'ob-2', 'ob-3', 'ob-4'].map(keys.nameOf)).toEqual(['web (ob-1)', 'shop', 'web (ob-3)', 'ob-4'])
})

it('forgets names with the key that could read them, also those that come late', async () => {
  use('ob-d')
  await keys.load()
  expect(keys.nameOf('ob-1')).toBe('web')
  session.forget()
  expect([keys.nameOf('ob-1'), keys.all]).toEqual(['ob-1', []])
  use('ob-e', 'generate')
  expect(keys.nameOf('ob-1')).toBe('ob-1')
  use('ob-f')
  const late = keys.load()
  use('ob-g', 'generate')
  await late
  expect([keys.nameOf('ob-1'), keys.all]).toEqual(['ob-1', []])
})
