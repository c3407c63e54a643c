// What the server is, what it takes, how fast it is, and what was done on it.
import { ApiError, api, data, type Schemas } from '../api/client'
import { keys, type Key } from './keys.svelte'
import { loadChanges } from './load.svelte'
import { marksOf, type Mark } from './marks'
import { server } from './server.svelte'
import { keep, load } from './storage'
import { ago, when } from './units'

export type Status = Schemas['StatusAnswer']
export type Entry = Schemas['AuditAnswer']
export type Tenant = Schemas['TenantAnswer']
export type History = Schemas['LoadHistory']
export type Used = Schemas['UsageRowAnswer']
export type NewGate = Schemas['GateRequest']

/** Quotas by the server's names. */
export const KEY_QUOTAS = [
  { name: 'requests', title: 'Requests a minute', short: 'Requests/min' },
  { name: 'tokens', title: 'Tokens a minute', short: 'Tokens/min' },
  { name: 'sequences', title: 'Sequences at once', short: 'At once' },
]
export const TENANT_QUOTAS = [
  ...KEY_QUOTAS,
  { name: 'adapters', title: 'Adapters', short: 'Adapters' },
  { name: 'bytes', title: 'Stored, in bytes', short: 'Stored' },
  { name: 'jobs', title: 'Jobs that have not ended', short: 'Jobs' },
  { name: 'training_seconds', title: 'Seconds of training a month', short: 'Trained' },
  { name: 'log_days', title: 'Days in the log of requests (0: nothing is kept)', short: 'Log, days' },
]

/** Of a million tokens, in whatever money. */
export interface Price {
  prompt: number | null
  generated: number | null
}

/** `12.40`: what tokens cost at these prices. */
export function cost(used: Pick<Used, 'prompt_tokens' | 'completion_tokens'> | undefined, { prompt, generated }: Price): string {
  const sum = ((used?.prompt_tokens ?? 0) * (prompt ?? 0) + (used?.completion_tokens ?? 0) * (generated ?? 0)) / 1e6
  return sum > 0 && sum < 0.01 ? '<0.01' : sum.toFixed(2)
}

/** `valid`, `until 1 Dec 2026, 12:34`, `revoked 5 min ago`. */
export const keyState = (key: Key): string =>
  key.revoked_at ? `revoked ${ago(key.revoked_at)}` : key.expires_at ? (key.expires_at < Date.now() / 1000 ? 'expired' : `until ${when(key.expires_at)}`) : 'valid'

const PRICES = 'onebase.price'
const isPrice = (one: unknown): one is Price => typeof one === 'object' && one !== null && 'prompt' in one && 'generated' in one

const SECONDS = 2
/** Five minutes. */
const MOST_POINTS = 150
const PAGE = 100
/** As many as one answer has. */
const MOST_ENTRIES = 1000

/** What the server looks for. What else is written is looked for in what came. */
export interface Filter {
  action: string
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
  /** Rules of what a version must pass before it answers; null until they are known. */
  gates = $state.raw<Schemas['GateRule'][] | null>(null)
  problem = $state.raw<ApiError | null>(null)
  /** Of the last minutes: seconds by a clock that is never set, tokens a second, rows. */
  times = $state.raw<number[]>([])
  generated = $state.raw<(number | null)[]>([])
  prompts = $state.raw<(number | null)[]>([])
  rows = $state.raw<(number | null)[]>([])
  entries = $state.raw<Entry[] | null>(null)
  more = $state(false)
  history = $state.raw<History | null>(null)
  /** This month's, by tenant. */
  usage = $state.raw<Record<string, Used>>({})
  price = $state.raw<Price>(load(PRICES, isPrice)[0] ?? { prompt: null, generated: null })
  auditProblem = $state.raw<ApiError | null>(null)
  #last: { at: number; generated: number; prompts: number } | null = null
  #asked = 0
  #changes = $state.raw<Entry[]>([])

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
        this.rows = [...this.rows, stats.sequences_running].slice(-MOST_POINTS)
      }
      this.status = status
      this.problem = null
    } catch (error) {
      this.problem = noted(error)
    }
    return SECONDS * 1000
  }

  get priced(): boolean {
    return Boolean(this.price.prompt || this.price.generated)
  }

  /** Prices stay in this browser. */
  setPrice(price: Partial<Price>): void {
    this.price = { ...this.price, ...price }
    keep(PRICES, [this.price])
  }

  /** Learn what was before this view was opened. Returns when to look again, in milliseconds. */
  async loadHistory(): Promise<number> {
    this.history = await data(api.GET('/status/history'))
    return 10_000
  }

  /** Learn what was changed in these hours, of all tenants. Returns when to look again, in milliseconds. */
  async loadChanges(): Promise<number> {
    this.#changes = await loadChanges({})
    return 10_000
  }

  /** Activations, rollbacks and rollouts among them. */
  get marks(): Mark[] {
    return marksOf(this.#changes, keys.nameOf)
  }

  /** The waits of a tenant in the queue in the last hour; undefined if it had no requests. */
  waitOf(tenant: string): Schemas['QueueWait'] | undefined {
    return this.history?.tenants?.find((one) => one.tenant === tenant)
  }

  /** Learn who is on it. Returns when to look again, in milliseconds. */
  async loadPeople(): Promise<number> {
    const query = { group_by: 'tenant', start: `${new Date().toISOString().slice(0, 7)}-01` }
    const [tenants, usage] = await Promise.all([data(api.GET('/v1/tenants')), data<unknown>(api.GET('/v1/usage', { params: { query } })), keys.load()])
    this.tenants = tenants.data
    this.usage = Object.fromEntries((usage as Schemas['UsageAnswer']).data.map((row) => [row.tenant ?? '', row]))
    return 10_000
  }

  /** Make a key; its text, which nobody can read again. Throws ApiError. */
  async makeKey(body: Schemas['CreateKeyRequest']): Promise<string> {
    const { key } = await data(api.POST('/v1/keys', { body }))
    await this.loadPeople()
    return key
  }

  /** Throws ApiError. */
  async changeKey(key_id: string, quotas: Record<string, number | null>): Promise<void> {
    await data(api.POST('/v1/keys/{key_id}', { params: { path: { key_id } }, body: { quotas } }))
    await this.loadPeople()
  }

  /** Throws ApiError. */
  async revoke(key_id: string): Promise<void> {
    await data(api.DELETE('/v1/keys/{key_id}', { params: { path: { key_id } } }))
    await this.loadPeople()
  }

  /** Throws ApiError. */
  async setQuotas(tenant: string, quotas: Record<string, number | null>): Promise<void> {
    await data(api.POST('/v1/tenants/{tenant}', { params: { path: { tenant } }, body: { quotas } }))
    await this.loadPeople()
  }

  /** Learn the rules of activations. Returns when to look again, in milliseconds. */
  async loadGates(): Promise<number> {
    this.gates = (await data(api.GET('/v1/gates'))).data
    return 10_000
  }

  /** Set a rule, in place of the one with the same patterns. Throws ApiError. */
  async setGate(body: NewGate): Promise<void> {
    await data(api.POST('/v1/gates', { body }))
    await this.loadGates().catch(() => {}) // it is set; the list is looked at again soon
  }

  /** Throws ApiError. */
  async deleteGate(gate_id: string): Promise<void> {
    await data(api.DELETE('/v1/gates/{gate_id}', { params: { path: { gate_id } } }))
    await this.loadGates().catch(() => {})
  }

  /** Learn what was done, newest first: `further` is the page after what is shown, `again` as much as is shown. */
  async loadAudit(filter: Filter, how: 'anew' | 'again' | 'further'): Promise<void> {
    const further = how === 'further'
    const limit = how === 'again' ? Math.min(MOST_ENTRIES, Math.max(PAGE, this.entries?.length ?? 0)) : PAGE
    const asked = ++this.#asked
    const given = Object.fromEntries(Object.entries(filter).filter(([, value]) => value.trim() !== ''))
    const last = further ? this.entries?.at(-1)?.id : undefined
    try {
      const page = await data(api.GET('/v1/audit', { params: { query: { ...given, limit, ...(last ? { after: last } : {}) } } }))
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
