// Adapters with all that is known of them: the list, and the one that is looked at with its versions and its history.
import { ApiError, api, data, type Schemas } from '../api/client'
import type { paths } from '../api/schema'
import { upload } from '../api/upload'
import { models } from './models.svelte'
import { server } from './server.svelte'
import { session } from './session.svelte'

export type Adapter = Schemas['AdapterAnswer']
export type Version = Schemas['VersionAnswer']
export type Event = Schemas['HistoryAnswer']
type Pull = paths['/v1/adapters']['post']['requestBody']['content']['application/json']
export type Usage = Schemas['UsageRowAnswer']

const FILES = [
  'adapter_config.json', 'adapter_model.safetensors', 'config.json',
  'tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja', 'generation_config.json',
]
const SOON = 800
const LATER = 5000

/** What is on its way to be ready. */
export const underWay = ({ state }: { state: string | null }): boolean => ['pulling', 'validating', 'proving'].includes(state ?? '')

/** The first digits of a version's digest, by which people know it. */
export const short = (version: string): string => (version.startsWith('pull-') ? version : version.slice(0, 12))

class Adapters {
  all = $state.raw<Adapter[] | null>(null)
  /** The one that is looked at; '' for none. */
  name = $state('')
  adapter = $state.raw<Adapter | null>(null)
  versions = $state.raw<Version[]>([])
  history = $state.raw<Event[]>([])
  usage = $state.raw<Usage | null>(null)
  /** Why the list, or the adapter, cannot be shown. */
  listProblem = $state.raw<ApiError | null>(null)
  problem = $state.raw<ApiError | null>(null)

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

  /** Look at another one. */
  open(name: string): void {
    if (name === this.name) return
    this.name = name
    this.adapter = null
    this.versions = []
    this.history = []
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
      if (name !== this.name) return LATER
      this.adapter = adapter
      this.versions = versions.data
      this.history = history.data
      this.problem = null
      if (!this.usage) void this.#loadUsage(name)
    } catch (error) {
      if (name !== this.name) return LATER
      this.problem = this.#noted(error)
      if (this.problem.status === 404) this.adapter = null // deleted meanwhile
    }
    return this.versions.some(underWay) ? SOON : LATER
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
    const query = force ? { force } : {}
    const { path } = this.#params
    if (version === null) await data(api.DELETE('/v1/adapters/{name}', { params: { path, query } }))
    else await data(api.DELETE('/v1/adapters/{name}/versions/{version}', { params: { path: { ...path, version }, query } }))
    if (version === null || this.versions.length === 1) this.open('') // it is gone
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
    await Promise.all([this.loadAll(), this.name ? this.loadOne() : null, models.load().catch(() => {})])
  }

  async #loadUsage(name: string): Promise<void> {
    const none: Usage = { requests: 0, prompt_tokens: 0, cached_tokens: 0, completion_tokens: 0, training_seconds: 0, training_tokens: 0 }
    const params = { query: { group_by: 'adapter' } }
    // JSON, since nothing else was asked for.
    const answer = (await data<unknown>(api.GET('/v1/usage', { params })).catch(() => null)) as Schemas['UsageAnswer'] | null
    if (answer && name === this.name) this.usage = answer.data.find((row) => row.adapter === name) ?? none
  }

  #noted(error: unknown): ApiError {
    server.noteError(error)
    return error instanceof ApiError ? error : new ApiError(500, null, String(error))
  }
}

export const adapters = new Adapters()

/** Of what was dropped or chosen the files of an adapter, and what is missing or not one; '' if nothing is. */
export function filesOf(given: File[]): { files: File[]; problem: string } {
  const files = FILES.flatMap((name) => given.filter((file) => file.name === name).slice(0, 1))
  const missing = FILES.slice(0, 2).filter((name) => !files.some((file) => file.name === name))
  if (!missing.length) return { files, problem: '' }
  const had = given.length ? `, which is not among ${given.slice(0, 3).map((file) => file.name).join(', ')}${given.length > 3 ? ' …' : ''}` : ''
  return { files, problem: `An adapter is two files, ${FILES[0]} and ${FILES[1]}: add ${missing.join(' and ')}${had}.` }
}
