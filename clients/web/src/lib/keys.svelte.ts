// Keys, and the names by which every page says who did something.
import { api, data, type Schemas } from '../api/client'
import { byOf, whoOf, type Doer } from './audit'
import { session } from './session.svelte'

export type Key = Schemas['KeyAnswer']

const LOOK_MS = 30_000

class Keys {
  /** Those that the page's key may see: an admin's sees all, others without the scope `adapters` none. */
  all = $state.raw<Key[]>([])

  /** Look at them. Returns when to look again, in milliseconds. */
  async load(): Promise<number> {
    if (session.may('adapters')) this.all = (await data(api.GET('/v1/keys'))).data
    return LOOK_MS
  }

  /** A key by its name, where it has one that is known. */
  nameOf = (id: string): string => this.all.find((key) => key.id === id)?.name || id

  /** `web through training`; '' if nobody is known. */
  who = (doer: Doer): string => whoOf(doer, this.nameOf)

  /** `by web through training`; '' if nobody is known. */
  by = (doer: Doer): string => byOf(doer, this.nameOf)
}

export const keys = new Keys()
