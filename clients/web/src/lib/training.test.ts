import { afterEach, describe, expect, it, vi } from 'vitest'

vi.stubGlobal('sessionStorage', { getItem: () => null })
vi.stubGlobal('localStorage', { getItem: () => null })
const page = { hidden: false, addEventListener: () => {}, baseURI: 'http://localhost/' }
vi.stubGlobal('document', page)
const { Run, timeTaken } = await import('./training.svelte')

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

describe('an estimate', () => {
  it('says where its time is known from, and both ends where they are far apart', () => {
    expect(timeTaken({})).toEqual({ time: '', from: '' })
    expect(timeTaken({ seconds: 240 })).toEqual({ time: 'about 4 min', from: '' })
    expect(timeTaken({ seconds: 240, seconds_low: 240, seconds_high: 250, seconds_from: 'measured' })).toEqual({ time: 'about 4 min', from: 'measured just now' })
    expect(timeTaken({ seconds: 240, seconds_low: 240, seconds_high: 540, seconds_from: 'measured' })).toEqual({ time: '4 min to 9 min', from: 'measured just now, with the machine busy' })
    expect(timeTaken({ seconds: 240, seconds_from: 'finished_jobs', finished_jobs: 3 }).from).toBe('as the last 3 jobs on this base')
  })
})
