// What the server is, what it takes, how fast it is, and what was done on it.
import { ApiError, api, data, type Schemas } from '../api/client'
import { server } from './server.svelte'

export type Status = Schemas['StatusAnswer']
export type Entry = Schemas['AuditAnswer']
export type Tenant = Schemas['TenantAnswer']
export type Key = Schemas['KeyAnswer']

const SECONDS = 2
/** Five minutes. */
const MOST_POINTS = 150
const PAGE = 100

export interface Filter {
  action: string
  target: string
  tenant: string
}

/** What passed between two looks, each second; null where the counters began anew between them. */
export function perSecond(before: { at: number; value: number }, now: { at: number; value: number }): number | null {
  const seconds = now.at - before.at
  return seconds > 0 && now.value >= before.value ? (now.value - before.value) / seconds : null
}

class Machine {
  status = $state.raw<Status | null>(null)
  tenants = $state.raw<Tenant[]>([])
  keys = $state.raw<Key[]>([])
  problem = $state.raw<ApiError | null>(null)
  /** Of the last minutes: seconds by a clock that is never set, tokens a second, rows. */
  times = $state.raw<number[]>([])
  generated = $state.raw<(number | null)[]>([])
  prompts = $state.raw<(number | null)[]>([])
  rows = $state.raw<(number | null)[]>([])
  entries = $state.raw<Entry[] | null>(null)
  more = $state(false)
  auditProblem = $state.raw<ApiError | null>(null)
  #last: { at: number; generated: number; prompts: number } | null = null
  #asked = 0

  /** Look at it. Returns when to look again, in milliseconds. */
  async load(): Promise<number> {
    try {
      const status = await data(api.GET('/status'))
      const at = performance.now() / 1000
      const stats = status.stats
      if (stats) {
        const now = { at, generated: stats.generated_tokens, prompts: stats.prompt_tokens }
        const before = this.#last
        const speed = (of: 'generated' | 'prompts') => (before ? perSecond({ at: before.at, value: before[of] }, { at, value: now[of] }) : null)
        this.#last = now
        this.times = [...this.times, at].slice(-MOST_POINTS)
        this.generated = [...this.generated, speed('generated')].slice(-MOST_POINTS)
        this.prompts = [...this.prompts, speed('prompts')].slice(-MOST_POINTS)
        this.rows = [...this.rows, stats.rows_running].slice(-MOST_POINTS)
      }
      this.status = status
      this.problem = null
    } catch (error) {
      this.problem = noted(error)
    }
    return SECONDS * 1000
  }

  /** Learn who is on it. Returns when to look again, in milliseconds. */
  async loadPeople(): Promise<number> {
    const [tenants, keys] = await Promise.all([data(api.GET('/v1/tenants')), data(api.GET('/v1/keys'))])
    this.tenants = tenants.data
    this.keys = keys.data
    return 10_000
  }

  /** Learn what was done, newest first; with `further` the page after what is shown. */
  async loadAudit(filter: Filter, further = false): Promise<void> {
    const asked = ++this.#asked
    const given = Object.fromEntries(Object.entries(filter).filter(([, value]) => value.trim() !== ''))
    const last = further ? this.entries?.at(-1)?.id : undefined
    try {
      const page = await data(api.GET('/v1/audit', { params: { query: { ...given, limit: PAGE, ...(last ? { after: last } : {}) } } }))
      if (asked !== this.#asked) return
      this.entries = further ? [...(this.entries ?? []), ...page.data] : page.data
      this.more = page.has_more
      this.auditProblem = null
    } catch (error) {
      if (asked === this.#asked) this.auditProblem = noted(error)
    }
  }
}

export const machine = new Machine()

function noted(error: unknown): ApiError {
  server.noteError(error)
  return error instanceof ApiError ? error : new ApiError(500, null, String(error))
}
