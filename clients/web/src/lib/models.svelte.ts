// The base, the adapters that answer, and their versions.
import { api, data, type Schemas } from '../api/client'
import { session } from './session.svelte'

type Model = Schemas['ModelAnswer']
export type Version = Schemas['VersionAnswer']

class Models {
  /** The base's name; '' until it is known. */
  base = $state('')
  /** What else answers, by name. */
  adapters = $state.raw<Model[]>([])
  /** Of adapters that were asked about, the newest first. */
  versions = $state.raw<Record<string, Version[]>>({})

  /** Learn it all again, versions that were asked about too. Throws ApiError. */
  async load(): Promise<void> {
    const { data: all } = await data(api.GET('/v1/models'))
    this.base = all[0]?.id ?? ''
    this.adapters = all.slice(1)
    // Of an adapter that is gone the old ones stay: its column says by itself that nobody is called so.
    await Promise.all(Object.keys(this.versions).map((name) => this.loadVersions(name).catch(() => {})))
  }

  has(name: string): boolean {
    return this.adapters.some((model) => model.id === name)
  }

  /** Learn the versions of an adapter, where the key may. Throws ApiError. */
  async loadVersions(name: string): Promise<void> {
    if (!session.may('adapters')) return
    const path = { name }
    const { data: found } = await data(api.GET('/v1/adapters/{name}/versions', { params: { path } }))
    this.versions = { ...this.versions, [name]: found.filter((version) => version.state === 'ready') }
  }
}

export const models = new Models()
