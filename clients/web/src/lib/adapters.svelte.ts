// Adapters with all that is known of them: the list, and the one that is looked at with its versions and its history.
import { ApiError, ROOT, api, authorized, credentials, data, errorOf, refuse, type Schemas } from '../api/client'
import type { paths } from '../api/schema'
import { upload } from '../api/upload'
import { models } from './models.svelte'
import { server } from './server.svelte'
import { session } from './session.svelte'
import { download } from './storage'
import { tar } from './tar'

export type Adapter = Schemas['AdapterAnswer']
export type Version = Schemas['VersionAnswer']
export type Event = Schemas['HistoryAnswer']
type Pull = paths['/v1/adapters']['post']['requestBody']['content']['application/json']
export type Rollout = Schemas['Rollout']
export type VersionGates = Schemas['VersionGates']
type RolloutBody = paths['/v1/adapters/{name}/rollout']['post']['requestBody']['content']['application/json']
/** What is asked for here; the rest is as the server has it. */
type NewRollout = Pick<RolloutBody, 'version' | 'percent' | 'shadow' | 'promote'> & { judge: { adapter: string; percent: number } | null }
export type Usage = Schemas['UsageRowAnswer']

const SIGNATURE = 'model.sig'
/** Names of files with defaults of requests, of which the server reads the first that is there. */
const DEFAULTS = ['onebase.json', 'io.yaml', 'Modelfile']
/** Names of the files of a version: the two that it has, and what may be among them. */
export const FILES = [
  'adapter_config.json', 'adapter_model.safetensors', 'config.json', SIGNATURE,
  'tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja', 'generation_config.json', ...DEFAULTS,
]
const SOON = 800
const LATER = 5000
const ROLLOUT_MS = 2000
const MOST_SEEN = 400
/** Of an adapter with very many versions, the newest. */
const MOST_JOBS = 20
/** Of an adapter with very many versions, the newest have their gates looked at. */
const MOST_GATED = 20
const USAGE_MS = 60_000
const DAYS = 7

/** What is on its way to be ready. */
export const underWay = ({ state }: { state: string | null }): boolean => ['pulling', 'validating', 'proving'].includes(state ?? '')

/** The first digits of a version's digest, by which people know it. */
export const short = (version: string): string => (version.startsWith('pull-') ? version : version.slice(0, 12))

/** What an adapter was asked in the last seven days. */
export interface Week {
  requests: number
  prompt: number
  generated: number
  /** Requests by day, the oldest first; today is the last. */
  days: number[]
  /** Days since the last request: 0 is today, in UTC. */
  last: number
}

/** The job that made a version; what live training made has none. */
export const jobOf = ({ source }: Pick<Version, 'source'>): string | undefined => (['training', 'checkpoint'].includes(source.kind) ? (source.job ?? undefined) : undefined)

/** What the server signed about a version that it trained: each fact by its name, such as `data training sha256`. */
export function statementFacts(statement: Record<string, unknown>, of = ''): [string, string][] {
  return Object.entries(statement).flatMap(([name, value]): [string, string][] => {
    const whole = of ? `${of} ${name}` : name
    if (value === null || value === '') return []
    if (typeof value === 'object' && !Array.isArray(value)) return statementFacts(value as Record<string, unknown>, whole)
    return [[whole.replaceAll('_', ' '), typeof value === 'string' ? value : JSON.stringify(value)]]
  })
}

/** The version that a rollback makes active, as far as the history tells; null if there is none. */
export function before(history: Event[], versions: Version[]): string | null {
  const stack: string[] = []
  for (const { action, version, previous } of history.toReversed()) {
    if (action !== 'rollback') {
      if (previous) stack.push(previous)
    } else if (version && stack.includes(version)) stack.length = stack.lastIndexOf(version)
  }
  const fits = (digest: string) => versions.some(({ version, state, active }) => version === digest && state === 'ready' && !active)
  return stack.findLast(fits) ?? null
}

/** When the active version became that; null if none is, or the history does not go back so far. */
export function activeSince(history: Event[], version: string | null): number | null {
  const [last] = history
  return last && last.version === version ? last.at : null
}

/** How a rollout looked each time that requests had ended since, the oldest first; never so many that drawing them takes long. */
export function seenOf(before: Rollout[], now: Rollout | null): Rollout[] {
  if (!now) return []
  const same = before[0]?.id === now.id ? before : []
  const last = same.at(-1)
  if (last && requestsOf(last) >= requestsOf(now)) return [...same.slice(0, -1), now]
  return [...(same.length < MOST_SEEN ? same : same.filter((_, at) => at % 2 === 0)), now]
}

/** Requests that both versions have answered. */
export const requestsOf = ({ sides }: Rollout) => sides.reduce((sum, { side, requests }) => sum + (side === 'shadow' ? 0 : requests), 0)

class Adapters {
  all = $state.raw<Adapter[] | null>(null)
  /** The one that is looked at; '' for none. */
  name = $state('')
  adapter = $state.raw<Adapter | null>(null)
  versions = $state.raw<Version[]>([])
  history = $state.raw<Event[]>([])
  /** The rollout that runs, or else the latest; null if it never had one. */
  rollout = $state.raw<Rollout | null>(null)
  /** That rollout as it was at each look since the adapter was opened. */
  seen = $state.raw<Rollout[]>([])
  /** Gates of its versions by digest, of those that have any. */
  gates = $state.raw<Record<string, VersionGates>>({})
  usage = $state.raw<Usage | null>(null)
  /** By name, of those that were asked in the last seven days; null until that is known. */
  weeks = $state.raw<Map<string, Week> | null>(null)
  /** Jobs that trained the versions that are looked at, where the key may know: null is gone. */
  jobs = $state.raw<Record<string, Schemas['JobAnswer'] | null>>({})
  /** Why the list, or the adapter, cannot be shown. */
  listProblem = $state.raw<ApiError | null>(null)
  problem = $state.raw<ApiError | null>(null)
  /** Of which versions gates were asked for last, and when. */
  #gated = { of: '', at: 0 }

  /** Learn the list. Returns when to look again, in milliseconds. */
  async loadAll(): Promise<number> {
    const begun = performance.now()
    try {
      this.all = (await data(api.GET('/v1/adapters'))).data
      this.listProblem = null
    } catch (error) {
      this.listProblem = this.#noted(error)
    }
    const took = performance.now() - begun
    return Math.max(this.all?.some(underWay) ? SOON : LATER, took * 20)
  }

  /** Learn who was asked in the last days. Returns when to look again, in milliseconds. */
  async loadWeeks(): Promise<number> {
    const today = Date.now()
    const days = Array.from({ length: DAYS }, (_, ago) => new Date(today - (DAYS - 1 - ago) * 86_400_000).toISOString().slice(0, 10))
    const tenant = session.caller?.tenant
    const query = { start: days[0] ?? '', group_by: 'day,adapter', ...(tenant ? { tenant } : {}) }
    // JSON, since nothing else was asked for.
    const { data: rows } = (await data<unknown>(api.GET('/v1/usage', { params: { query } }))) as Schemas['UsageAnswer']
    const weeks = new Map<string, Week>()
    for (const row of rows) {
      if (!row.requests) continue
      const at = days.indexOf(row.day ?? '')
      for (const name of (row.adapter ?? '').split('+')) {
        const week = weeks.get(name) ?? { requests: 0, prompt: 0, generated: 0, days: days.map(() => 0), last: DAYS }
        week.requests += row.requests
        week.prompt += row.prompt_tokens
        week.generated += row.completion_tokens
        if (at >= 0) week.days[at] = (week.days[at] ?? 0) + row.requests
        week.last = Math.min(week.last, DAYS - 1 - at)
        weeks.set(name, week)
      }
    }
    this.weeks = weeks
    return USAGE_MS
  }

  /** Learn the jobs behind the versions, once each. */
  async loadJobs(): Promise<void> {
    if (!session.may('train')) return
    const wanted = this.versions.flatMap((version) => jobOf(version) ?? []).filter((job) => !(job in this.jobs))
    await Promise.all(
      [...new Set(wanted)].slice(0, MOST_JOBS).map(async (job_id) => {
        const job = await data(api.GET('/v1/fine_tuning/jobs/{job_id}', { params: { path: { job_id } } })).catch(() => null)
        this.jobs = { ...this.jobs, [job_id]: job }
      }),
    )
  }

  /** Save the two files of a version, and its signature, as an archive with a folder that PEFT reads. Throws ApiError. */
  async download(version: Version): Promise<void> {
    const folder = `${version.name.replace(/[^A-Za-z0-9._-]+/g, '-').slice(0, 64)}-${version.version.slice(0, 12)}`
    const path = { name: version.name, version: version.version }
    const { signature } = await data(api.GET('/v1/adapters/{name}/versions/{version}/files', { params: { path } }))
    const files = await Promise.all(
      FILES.slice(0, 2).map(async (file) => {
        const used = credentials.key()
        const address = `${ROOT}v1/adapters/${encodeURIComponent(version.name)}/versions/${version.version}/files/${file}`
        const answer = await fetch(address, { headers: authorized() })
        if (!answer.ok) refuse(errorOf(answer.status, await answer.json().catch(() => null)), used)
        return { name: `${folder}/${file}`, content: await answer.blob() }
      }),
    )
    if (signature) files.push({ name: `${folder}/${SIGNATURE}`, content: new Blob([signature]) })
    download(`${folder}.tar`, tar(files, version.created_at), 'application/x-tar')
  }

  /** Look at another one. */
  open(name: string): void {
    if (name === this.name) return
    this.name = name
    this.adapter = null
    this.versions = []
    this.history = []
    this.rollout = null
    this.seen = []
    this.gates = {}
    this.#gated = { of: '', at: 0 }
    this.usage = null
    this.problem = null
  }

  /** Learn the adapter that is looked at. Returns when to look again, in milliseconds. */
  async loadOne(): Promise<number> {
    const name = this.name
    const params = { path: { name } }
    try {
      const [adapter, versions, history] = await Promise.all([
        data(api.GET('/v1/adapters/{name}', { params })),
        data(api.GET('/v1/adapters/{name}/versions', { params })),
        // A name of which there are only pulls has none yet.
        data(api.GET('/v1/adapters/{name}/history', { params })).catch(() => ({ data: [] })),
      ])
      // Of what another tenant shares, and of a name of which there are only pulls, there are none.
      const has = adapter.versions > 0 && adapter.tenant === session.caller?.tenant
      const rollouts = has ? (await data(api.GET('/v1/adapters/{name}/rollouts', { params }))).data : []
      if (name !== this.name) return LATER
      const gates = has ? await this.#gatesOf(versions.data) : {}
      if (name !== this.name) return LATER
      this.adapter = adapter
      this.gates = gates
      this.versions = versions.data
      this.history = history.data
      this.rollout = rollouts[0] ?? null
      this.seen = seenOf(this.seen, this.rollout)
      this.problem = null
      if (!this.usage) void this.#loadUsage(name)
      void this.loadJobs()
    } catch (error) {
      if (name !== this.name) return LATER
      this.problem = this.#noted(error)
      if (this.problem.status === 404) this.adapter = null // deleted meanwhile
    }
    return this.versions.some(underWay) ? SOON : this.rollout?.state === 'running' ? ROLLOUT_MS : LATER
  }

  /** Whether the key may change it: what other tenants share may only be used. */
  get own(): boolean {
    return this.adapter !== null && this.adapter.tenant === session.caller?.tenant
  }

  async activate(version: string): Promise<void> {
    const expected = this.adapter?.version ?? null
    await this.#change(api.POST('/v1/adapters/{name}/activate', { params: this.#params, body: { version, expected } }))
  }

  async rollBack(): Promise<void> {
    const expected = this.adapter?.version ?? null
    await this.#change(api.POST('/v1/adapters/{name}/rollback', { params: this.#params, body: { expected } }))
  }

  /** Let a version answer a share of the requests beside the active one. */
  async startRollout(wanted: NewRollout): Promise<void> {
    const body = wanted as RolloutBody
    await this.#change(api.POST('/v1/adapters/{name}/rollout', { params: this.#params, body }))
  }

  async shareRollout(percent: number): Promise<void> {
    await this.#change(api.POST('/v1/adapters/{name}/rollout/share', { params: this.#params, body: { percent } }))
  }

  /** End the rollout: the candidate becomes active, or answers nothing more. */
  async endRollout(promote: boolean): Promise<void> {
    await this.#change(promote ? api.POST('/v1/adapters/{name}/rollout/promote', { params: this.#params }) : api.POST('/v1/adapters/{name}/rollout/rollback', { params: this.#params }))
  }

  /** Approve a version for its next activation, or do so no longer. Throws ApiError. */
  async approve(version: string, approved: boolean): Promise<void> {
    const params = { path: { ...this.#params.path, version } }
    const route = '/v1/adapters/{name}/versions/{version}/approval'
    await this.#change(approved ? api.POST(route, { params }) : api.DELETE(route, { params }))
  }

  async deactivate(): Promise<void> {
    await this.#change(api.POST('/v1/adapters/{name}/deactivate', { params: this.#params }))
  }

  async pin(pinned: boolean): Promise<void> {
    await this.#change(api.POST('/v1/adapters/{name}/pin', { params: this.#params, body: { pinned } }))
  }

  async share(shared: boolean): Promise<void> {
    await this.#change(api.POST('/v1/adapters/{name}/share', { params: this.#params, body: { shared } }))
  }

  /** Delete a version, or all of it. Throws ApiError with the code `adapter_in_use`, unless forced. */
  async remove(version: string | null, force: boolean): Promise<void> {
    const last = version === null || this.versions.length === 1 // a look in between may find one less
    const query = force ? { force } : {}
    const { path } = this.#params
    if (version === null) await data(api.DELETE('/v1/adapters/{name}', { params: { path, query } }))
    else await data(api.DELETE('/v1/adapters/{name}/versions/{version}', { params: { path: { ...path, version }, query } }))
    if (last) this.open('') // it is gone
    await this.#changed()
  }

  /** Send a version's files. Throws ApiError. */
  async add(name: string, files: File[], options: Record<string, boolean>, sent: (part: number) => void, signal: AbortSignal): Promise<Version> {
    const form = new FormData()
    form.append('name', name)
    for (const [option, value] of Object.entries(options)) if (value) form.append(option, 'true')
    for (const file of files) form.append('files', file, file.name)
    const version = await upload<Version>('v1/adapters', form, sent, signal)
    await this.#changed()
    return version
  }

  /** Have a version fetched from the Hub. Throws ApiError. */
  async pull(body: Pull): Promise<Version> {
    const version = await data(api.POST('/v1/adapters', { body }))
    await this.#changed()
    return version
  }

  get #params(): { path: { name: string } } {
    return { path: { name: this.name } }
  }

  async #change(call: Promise<{ data?: unknown; error?: unknown; response: Response }>): Promise<void> {
    try {
      await data(call)
    } finally {
      await this.#changed()
    }
  }

  /** Show here and in the other views what is different now. */
  async #changed(): Promise<void> {
    this.#gated = { of: '', at: 0 }
    await Promise.all([this.loadAll(), this.name ? this.loadOne() : null, models.load().catch(() => {})])
  }

  async #loadUsage(name: string): Promise<void> {
    const none: Usage = { requests: 0, prompt_tokens: 0, cached_tokens: 0, completion_tokens: 0, training_seconds: 0, training_tokens: 0 }
    const params = { query: { group_by: 'adapter' } }
    // JSON, since nothing else was asked for.
    const answer = (await data<unknown>(api.GET('/v1/usage', { params })).catch(() => null)) as Schemas['UsageAnswer'] | null
    if (!answer || name !== this.name) return
    // A sum of adapters counts for each, as in the weeks.
    const rows = answer.data.filter((row) => (row.adapter ?? '').split('+').includes(name))
    this.usage = rows.reduce((sum, row) => ({ ...sum, requests: sum.requests + row.requests, prompt_tokens: sum.prompt_tokens + row.prompt_tokens, completion_tokens: sum.completion_tokens + row.completion_tokens }), none)
  }

  /**
   * The same rules hold for all versions of a name: where the newest has no gate, none has. What the server does not
   * tell stays as it was known last; the same is asked again after LATER.
   */
  async #gatesOf(versions: Version[]): Promise<Record<string, VersionGates>> {
    const known = this.gates
    const [first, ...others] = versions.filter(({ state }) => state === 'ready').slice(0, MOST_GATED)
    if (!first) return {}
    const of = [first, ...others].map(({ version, active }) => `${version} ${active}`).join()
    if (of === this.#gated.of && performance.now() - this.#gated.at < LATER) return known
    this.#gated = { of, at: performance.now() }
    const ask = ({ name, version }: Version) => data(api.GET('/v1/adapters/{name}/versions/{version}/gates', { params: { path: { name, version } } }))
    const newest = await ask(first).catch(() => null)
    if (!newest) return known
    if (!newest.gates.length) return {}
    const found = await Promise.all(others.map(async (one) => [one.version, await ask(one).catch(() => known[one.version])] as const))
    return Object.fromEntries([[first.version, newest] as const, ...found].filter((one): one is [string, VersionGates] => one[1] !== undefined))
  }

  #noted(error: unknown): ApiError {
    server.noteError(error)
    return error instanceof ApiError ? error : new ApiError(500, null, String(error))
  }
}

export const adapters = new Adapters()

/** Of what was dropped or chosen the files of an adapter, and what is missing or not one; '' if nothing is. */
export function filesOf(given: File[]): { files: File[]; problem: string } {
  const found = FILES.flatMap((name) => given.filter((file) => file.name === name).slice(0, 1))
  const [first] = found.filter((file) => DEFAULTS.includes(file.name))
  const files = found.filter((file) => file === first || !DEFAULTS.includes(file.name))
  const missing = FILES.slice(0, 2).filter((name) => !files.some((file) => file.name === name))
  if (!missing.length) return { files, problem: '' }
  const had = given.length ? `, which is not among ${given.slice(0, 3).map((file) => file.name).join(', ')}${given.length > 3 ? ' …' : ''}` : ''
  return { files, problem: `An adapter is two files, ${FILES[0]} and ${FILES[1]}: add ${missing.join(' and ')}${had}.` }
}
