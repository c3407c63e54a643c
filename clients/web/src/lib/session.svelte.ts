// Who looks: the key, kept for this tab alone, and what it may do.
import { api, credentials, data, type ApiError, type Schemas, type Scope } from '../api/client'

const STORED = 'onebase.key'

class Session {
  #key = sessionStorage.getItem(STORED) ?? ''
  /** Whom the server takes this page for; null until it has said so. */
  caller = $state<Schemas['CallerAnswer'] | null>(null)
  /** Why the server wants a key, in its words; null while it does not ask for one. */
  asked = $state<string | null>(null)

  constructor() {
    credentials.key = () => this.#key
    credentials.wanted = (error, used) => this.#wanted(error, used)
  }

  get hasKey(): boolean {
    return (this.caller?.key ?? '') !== ''
  }

  may(scope: Scope): boolean {
    const scopes = this.caller?.scopes ?? []
    return scopes.includes(scope) || scopes.includes('admin')
  }

  /** Learn whom the server takes this page for. Throws ApiError. */
  async look(): Promise<void> {
    this.caller = await data(api.GET('/v1/key'))
    this.asked = null
  }

  /** Go on with another key. Throws ApiError, after which the page asks again. */
  async use(key: string): Promise<void> {
    this.#store(key)
    await this.look()
  }

  /** Forget the key; the page asks for another one. */
  forget(): void {
    this.#store('')
    this.caller = null
    this.asked = ''
  }

  /** A key that was replaced meanwhile may be refused: that says nothing about the new one. */
  #wanted(error: ApiError, used: string): void {
    if (used !== this.#key) return
    this.asked = used ? error.message : ''
  }

  #store(key: string): void {
    this.#key = key
    if (key) sessionStorage.setItem(STORED, key)
    else sessionStorage.removeItem(STORED)
  }
}

export const session = new Session()
