import { afterEach, describe, expect, it, vi } from 'vitest'

vi.stubGlobal('sessionStorage', { getItem: () => null })
vi.stubGlobal('localStorage', { getItem: () => null })
const page = { hidden: false, addEventListener: () => {}, baseURI: 'http://localhost/' }
vi.stubGlobal('document', page)
const { Run } = await import('./training.svelte')

afterEach(() => vi.useRealTimers())

describe('a job', () => {
  it('is followed again after a server did not know it once', async () => {
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] })
    const job = { id: 'ftjob-1', status: 'succeeded' }
    let looks = 0
    vi.stubGlobal('fetch', (asked: string | Request) => {
      const url = typeof asked === 'string' ? asked : asked.url
      if (!url.endsWith('/ftjob-1/events')) return Promise.resolve(Response.json({ data: [], has_more: false }))
      looks += 1
      if (looks === 1) return Promise.resolve(Response.json({ error: { message: 'no such job' } }, { status: 404 }))
      return Promise.resolve(new Response(`event: done\ndata: ${JSON.stringify(job)}\n\n`))
    })
    const run = new Run('ftjob-1')
    const stop = run.start()
    await vi.waitFor(() => expect(run.problem?.status).toBe(404))
    expect(looks).toBe(1)
    await vi.advanceTimersByTimeAsync(15_000)
    await vi.waitFor(() => expect(run.job?.status).toBe('succeeded'))
    expect([looks, run.problem]).toEqual([2, null])
    stop()
  })
})
