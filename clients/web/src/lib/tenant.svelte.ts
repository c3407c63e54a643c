// One tenant: what it has, uses and may, as far as the key may know. Another tenant's is an admin's alone, which the server holds too.
import { ApiError, api, data, type Schemas } from '../api/client'
import type { Adapter } from './adapters.svelte'
import { keys, type Key } from './keys.svelte'
import type { Entry, Tenant, Used } from './machine.svelte'
import { session } from './session.svelte'
import type { Job } from '../api/follow'

const LOOK_MS = 10_000
const DAYS = 30
const MOST_JOBS = 10
const MOST_ENTRIES = 10

export const NONE: Used = { requests: 0, prompt_tokens: 0, cached_tokens: 0, completion_tokens: 0, training_seconds: 0, training_tokens: 0 }

/** The last days in UTC, the oldest first; today is the last. */
export const lastDays = (days: number, now = Date.now()): string[] => Array.from({ length: days }, (_, ago) => new Date(now - (days - 1 - ago) * 86_400_000).toISOString().slice(0, 10))

export class TenantPage {
  tenant = $state.raw<Tenant | null>(null)
  /** Every name, for an admin. */
  names = $state.raw<string[]>([])
  /** This month's. */
  month = $state.raw<Used | null>(null)
  /** By day, the oldest first. */
  days = $state.raw<Used[]>([])
  adapters = $state.raw<Adapter[] | null>(null)
  keys = $state.raw<Key[] | null>(null)
  jobs = $state.raw<Job[] | null>(null)
  entries = $state.raw<Entry[] | null>(null)
  problem = $state.raw<ApiError | null>(null)

  constructor(readonly name: string) {}

  /** Look at it. Returns when to look again, in milliseconds. */
  async look(): Promise<number> {
    const { name: tenant } = this
    const query = session.may('admin') ? { tenant } : {}
    const allowed = async <T>(may: boolean, call: () => Promise<T>): Promise<T | null> => (may ? call() : null)
    try {
      const [tenants, usage, adapters, jobs, entries] = await Promise.all([
        data(api.GET('/v1/tenants')),
        this.#usage(),
        allowed(session.may('adapters'), () => data(api.GET('/v1/adapters', { params: { query } }))),
        allowed(session.may('train'), () => data(api.GET('/v1/fine_tuning/jobs', { params: { query: { ...query, limit: MOST_JOBS } } }))),
        allowed(session.may('adapters'), () => data(api.GET('/v1/audit', { params: { query: { ...query, limit: MOST_ENTRIES } } }))),
        keys.load(),
      ])
      const found = tenants.data.find((one) => one.tenant === tenant)
      this.tenant = found ?? null
      this.names = tenants.data.map((one) => one.tenant)
      this.#count(usage)
      // What another tenant shares is that tenant's.
      this.adapters = adapters?.data.filter((one) => one.tenant === tenant) ?? null
      this.keys = session.may('adapters') ? keys.all.filter((one) => one.tenant === tenant) : null
      this.jobs = jobs?.data ?? null
      this.entries = entries?.data ?? null
      this.problem = found ? null : new ApiError(404, null, `There is no tenant ${tenant}.`)
    } catch (error) {
      this.problem = error instanceof ApiError ? error : new ApiError(0, null, String(error))
    }
    return LOOK_MS
  }

  async #usage(): Promise<Used[]> {
    const [today = ''] = lastDays(1)
    const start = [lastDays(DAYS)[0] ?? '', `${today.slice(0, 7)}-01`].sort()[0] ?? ''
    const query = { group_by: 'day', start, tenant: this.name }
    // JSON, since nothing else was asked for.
    return ((await data<unknown>(api.GET('/v1/usage', { params: { query } }))) as Schemas['UsageAnswer']).data
  }

  #count(usage: Used[]): void {
    const days = lastDays(DAYS)
    this.days = days.map((day) => usage.find((row) => row.day === day) ?? NONE)
    const month = days.at(-1)?.slice(0, 7) ?? ''
    this.month = usage.filter((row) => row.day?.startsWith(month)).reduce((sum, row) => ({ ...NONE, requests: sum.requests + row.requests, prompt_tokens: sum.prompt_tokens + row.prompt_tokens, completion_tokens: sum.completion_tokens + row.completion_tokens, training_seconds: sum.training_seconds + row.training_seconds }), NONE)
  }
}
