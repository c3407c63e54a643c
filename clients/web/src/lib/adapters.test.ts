import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest'

vi.stubGlobal('sessionStorage', { getItem: () => null })
vi.stubGlobal('localStorage', { getItem: () => null })
vi.stubGlobal('document', { hidden: false, addEventListener: () => {}, baseURI: 'http://localhost/' })
vi.stubGlobal('fetch', (request: Request) => Promise.resolve(answer(request.url)))
const { adapters, filesOf, jobOf, seenOf, statementFacts } = await import('./adapters.svelte')
type Rollout = Parameters<typeof seenOf>[0][number]
const { session } = await import('./session.svelte')

const DIGEST = 'd'.repeat(64)
const closed = { gates: [{ gate: 'approval', passed: false, rule: 'gate-1', reason: 'nobody has.' }], approvals: [], evaluations: [] }
/** How the server answers when it is asked for gates. */
let gates: () => Response
let asked = 0

function answer(url: string): Response {
  const { pathname } = new URL(url)
  if (pathname.endsWith('/gates')) {
    asked += 1
    return gates()
  }
  if (pathname.endsWith('/v1/adapters/orders')) return Response.json({ name: 'orders', tenant: 'acme', versions: 1, version: null })
  const versions = [{ name: 'orders', version: DIGEST, state: 'ready', active: false, source: { kind: 'upload' } }]
  return Response.json({ data: pathname.endsWith('/versions') ? versions : [] })
}

beforeEach(() => {
  vi.useFakeTimers({ toFake: ['performance'] })
  session.caller = { object: 'caller', key: 'ob-1', tenant: 'acme', scopes: ['adapters'] }
  asked = 0
  gates = () => Response.json(closed)
  adapters.open('orders')
})
afterEach(() => {
  adapters.open('')
  vi.useRealTimers()
})

describe('gates of the versions that are looked at', () => {
  it.each([403, 429, 503])('stay as they were known where the server answers %i', async (status) => {
    await adapters.loadOne()
    expect(adapters.gates).toEqual({ [DIGEST]: closed })
    gates = () => Response.json({ error: { message: 'not now' } }, { status })
    vi.advanceTimersByTime(5000)
    await adapters.loadOne()
    expect([asked, adapters.gates]).toEqual([2, { [DIGEST]: closed }])
  })

  it('are asked for every five seconds, however often one looks, and at once after a change', async () => {
    for (const pause of [0, 800, 4100]) {
      vi.advanceTimersByTime(pause)
      await adapters.loadOne()
    }
    expect([asked, adapters.gates]).toEqual([1, { [DIGEST]: closed }])
    vi.advanceTimersByTime(100)
    await adapters.loadOne()
    expect(asked).toBe(2)
    await adapters.approve(DIGEST, true)
    expect(asked).toBe(3)
  })

  it('are none once the server says so', async () => {
    await adapters.loadOne()
    gates = () => Response.json({ ...closed, gates: [] })
    vi.advanceTimersByTime(5000)
    await adapters.loadOne()
    expect(adapters.gates).toEqual({})
  })
})

it('only versions of training jobs have a job: the id of live training is none', () => {
  const made = ['training', 'checkpoint', 'live', 'upload'].map((kind) => jobOf({ source: { kind, ...(kind !== 'upload' && { job: 'one' }) } as Parameters<typeof jobOf>[0]['source'] }))
  expect(made).toEqual(['one', 'one', undefined, undefined])
})

describe('what a rollout was like at each look', () => {
  const rollout = (id: string, active: number, candidate: number) =>
    ({ id, sides: [['active', active], ['candidate', candidate], ['shadow', 99]].map(([side, requests]) => ({ side, requests })) }) as Rollout

  it('is noted once for each number of requests, as it was last, and anew for another rollout', () => {
    const [first, second, later] = [rollout('a', 3, 1), rollout('a', 3, 2), rollout('a', 3, 2)]
    expect(seenOf([], null)).toEqual([])
    expect(seenOf([first], second)).toEqual([first, second])
    expect(seenOf([first, second], later)[1]).toBe(later)
    expect(seenOf([first, second], rollout('b', 0, 0))).toHaveLength(1)
  })

  it('is thinned out before it is too much to draw, and keeps both ends', () => {
    let seen: Rollout[] = []
    for (let number = 0; number < 2000; number++) seen = seenOf(seen, rollout('a', number, 0))
    expect(seen.length).toBeLessThanOrEqual(401)
    expect([seen[0], seen.at(-1)].map((one) => one?.sides[0]?.requests)).toEqual([0, 1999])
  })
})

describe('the files of an adapter', () => {
  const given = (...names: string[]) => filesOf(names.map((name) => new File([name], name)))

  it('are sent with the signature, and with the first file of defaults', () => {
    const { files, problem } = given('Modelfile', 'model.sig', 'README.md', 'adapter_model.safetensors', 'io.yaml', 'adapter_config.json')
    expect(files.map(({ name }) => name)).toEqual(['adapter_config.json', 'adapter_model.safetensors', 'model.sig', 'io.yaml'])
    expect(problem).toBe('')
  })

  it('are asked for where one is missing', () => {
    expect(given('adapter_config.json', 'model.sig').problem).toContain('add adapter_model.safetensors')
  })
})

it('what was signed is a list of facts, without those that are not known', () => {
  const statement = { base: { name: 'base', repo: null }, data: { training: { sha256: 'ab', bytes: 3 } }, seed: 7, parent: null, proof: { exact: true, kernels: 'c' }, activation_decision: { rule: 'never' } }
  expect(statementFacts(statement)).toEqual([
    ['base name', 'base'], ['data training sha256', 'ab'], ['data training bytes', '3'], ['seed', '7'], ['proof exact', 'true'], ['proof kernels', 'c'], ['activation decision rule', 'never'],
  ])
})
