// Keys, and the names by which every page says who did something.
import { api, data, type Schemas } from '../api/client'
import { byOf, isKey, whoOf, type Doer } from './audit'
import { session } from './session.svelte'

export type Key = Schemas['KeyAnswer']

class Keys {
  #all = $state.raw<Key[]>([])
  /** The key that saw them: another one may see others, and who has none sees nothing. */
  #seenBy = $state.raw<string | null>(null)
  /** Ids that were met without being known, each with whom it was shown to: they are looked for once. */
  #met = new Set<string>()
  #looks = false

  /** Those that the page's key may see: an admin's sees all, others without the scope `adapters` none. */
  get all(): Key[] {
    return session.caller?.key === this.#seenBy ? this.#all : []
  }

  /** Names by id, those that several keys have together with the id. */
  #names = $derived.by(() => {
    const uses = new Map<string, number>()
    for (const { name } of this.all) uses.set(name, (uses.get(name) ?? 0) + 1)
    return new Map(this.all.map(({ id, name }) => [id, !name ? id : uses.get(name) === 1 ? name : `${name} (${id})`]))
  })

  /** Look at them. */
  async load(): Promise<void> {
    const caller = session.caller?.key
    if (caller === undefined || !session.may('adapters')) return
    const found = (await data(api.GET('/v1/keys'))).data
    if (session.caller?.key !== caller) return
    this.#all = found
    this.#seenBy = caller
  }

  /** A key by its name, where it has one that is known. One that is not known is looked for. */
  nameOf = (id: string): string => {
    const name = this.#names.get(id)
    if (name === undefined) this.#meet(id)
    return name ?? id
  }

  /** `web through training`; '' if nobody is known. */
  who = (doer: Doer): string => whoOf(doer, this.nameOf)

  /** `by web through training`; '' if nobody is known. */
  by = (doer: Doer): string => byOf(doer, this.nameOf)

  /** Look for an id, together with all that are met at the same time; again if the server could not say. */
  #meet(id: string): void {
    if (!isKey(id) || !session.may('adapters')) return
    const met = `${session.caller?.key} ${id}`
    if (this.#met.has(met)) return
    this.#met.add(met)
    if (this.#looks) return
    this.#looks = true
    queueMicrotask(() => {
      this.#looks = false
      this.load().catch(() => this.#met.clear())
    })
  }
}

export const keys = new Keys()
