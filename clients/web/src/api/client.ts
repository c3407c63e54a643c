// Calls of the server's routes, typed by its OpenAPI file, and what can go wrong with them.
import createClient, { type Middleware } from 'openapi-fetch'
import type { components, paths } from './schema'

export type Schemas = components['schemas']
export type Scope = 'generate' | 'adapters' | 'train' | 'admin'

/** Of the server: the folder in which the page lies, so that a proxy may put both below any path. */
export const ROOT = typeof document === 'undefined' ? 'http://localhost/' : new URL('.', document.baseURI).href

/** What an answer that is none says, in the server's own words. `status` 0: the server could not be reached. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    readonly code: string | null,
    message: string,
    readonly param: string | null = null,
  ) {
    super(message)
  }

  get away(): boolean {
    return this.status === 0
  }
}

export const AWAY = 'The server does not answer. Is it running, and does this machine reach it?'

/** Who gives the key, and what is done when the server wants one; the session says it. */
export const credentials = {
  key: () => '',
  wanted: (_error: ApiError, _used: string) => {},
}

/** The headers of a request, with the key if there is one: it never stands in an address. */
export function authorized(headers: Headers = new Headers()): Headers {
  const key = credentials.key()
  if (key) headers.set('Authorization', `Bearer ${key}`)
  return headers
}

/** The error that an answer's body is, as far as it can be read. */
export function errorOf(status: number, body: unknown): ApiError {
  const said = (body as { error?: { message?: unknown; code?: unknown; param?: unknown } } | null)?.error
  if (typeof said?.message === 'string') {
    const text = (value: unknown) => (typeof value === 'string' ? value : null)
    return new ApiError(status, text(said.code), said.message, text(said.param))
  }
  return new ApiError(status, null, `The answer had status ${status}, and nothing that says why.`)
}

/** Tells the session where the error is about the key; and throws it. */
export function refuse(error: ApiError, used: string): never {
  if (error.status === 401) credentials.wanted(error, used)
  throw error
}

const withKey: Middleware = {
  onRequest: ({ request }) => {
    authorized(request.headers)
    return request
  },
}

const api = createClient<paths>({ baseUrl: ROOT.replace(/\/$/, '') })
api.use(withKey)
export { api }

/** The data of a call. Throws ApiError. */
export async function data<T>(call: Promise<{ data?: T; error?: unknown; response: Response }>): Promise<T> {
  const used = credentials.key()
  let done
  try {
    done = await call
  } catch (error) {
    if (error instanceof ApiError) throw error
    throw new ApiError(0, null, AWAY)
  }
  if (!done.response.ok) refuse(errorOf(done.response.status, done.error), used)
  return done.data as T
}
