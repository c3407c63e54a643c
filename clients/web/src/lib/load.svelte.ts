// Requests of one tenant, or with one of its adapters, over the last hours, and what was changed meanwhile.
import { ApiError, api, data, type Schemas } from '../api/client'
import { keys } from './keys.svelte'
import { MARKED, type Mark, marksOf } from './marks'
import { session } from './session.svelte'

export type TenantLoad = Schemas['TenantLoad']
/** The server remembers six hours. */
const SECONDS = 6 * 3600
const LOOK_MS = 10_000
/** Of each kind of changes, the newest. */
const MOST = 200

/** Changes of adapters and rollouts in the last hours; none for a key that may not see them. Throws ApiError. */
export async function loadChanges(which: { tenant?: string; target?: string }): Promise<Schemas['AuditAnswer'][]> {
  if (!session.may('adapters')) return []
  const since = Math.floor(Date.now() / 1000 - SECONDS)
  const pages = await Promise.all(MARKED.map((action) => data(api.GET('/v1/audit', { params: { query: { ...which, action, since, limit: MOST } } }))))
  return pages.flatMap((page) => page.data)
}

export class Load {
  load = $state.raw<TenantLoad | null>(null)
  problem = $state.raw<ApiError | null>(null)

  #changes = $state.raw<Schemas['AuditAnswer'][]>([])

  /** adapter: null is all of the tenant's. */
  constructor(
    readonly tenant: string,
    readonly adapter: string | null,
  ) {}

  get marks(): Mark[] {
    return marksOf(this.#changes, keys.nameOf)
  }

  /** Look at it. Returns when to look again, in milliseconds. */
  async look(): Promise<number> {
    const query = { tenant: this.tenant, ...(this.adapter === null ? {} : { adapter: this.adapter }) }
    const which = { tenant: this.tenant, ...(this.adapter === null ? {} : { target: this.adapter }) }
    try {
      const [load, changes] = await Promise.all([data(api.GET('/v1/load', { params: { query } })), loadChanges(which)])
      this.load = load
      this.#changes = changes
      this.problem = null
    } catch (error) {
      this.problem = error instanceof ApiError ? error : new ApiError(0, null, String(error))
    }
    return LOOK_MS
  }
}
