// Batches, and the files that batches and jobs read or leave.
import { ApiError, ROOT, api, authorized, credentials, data, errorOf, refuse, type Schemas } from '../api/client'
import { upload } from '../api/upload'
import { server } from './server.svelte'
import { session } from './session.svelte'
import { download } from './storage'
import type { TrainingFile } from './training.svelte'

export type Batch = Omit<Schemas['BatchAnswer'], 'model'>
export type StoredFile = TrainingFile
export type Endpoint = Schemas['CreateBatchRequest']['endpoint']

export const ENDPOINTS: Endpoint[] = ['/v1/chat/completions', '/v1/completions', '/v1/responses', '/v1/embeddings', '/classify', '/v1/rerank', '/score', '/v1/decide']

const PAGE = 100
const SOON = 1500
const LATER = 8000

const ENDED = ['completed', 'failed', 'expired', 'cancelled']
export const ended = ({ status }: Pick<Batch, 'status'>): boolean => ENDED.includes(status)

const WORDS: Record<string, string> = { validating: 'Checking', in_progress: 'Running', finalizing: 'Finishing', cancelling: 'Stopping', completed: 'Done', failed: 'Failed', expired: 'Expired', cancelled: 'Cancelled' }
export const stateOf = ({ status }: Pick<Batch, 'status'>): string => WORDS[status] ?? status

/** The endpoint that the first line of a batch's file names. Throws nothing: '' where it names none that is known. */
export async function endpointOf(file: Blob): Promise<Endpoint | ''> {
  const [first = ''] = (await file.slice(0, 256 * 1024).text()).split('\n')
  try {
    const { url } = JSON.parse(first) as { url?: unknown }
    return ENDPOINTS.find((one) => one === url) ?? ''
  } catch {
    return ''
  }
}

class Batches {
  all = $state.raw<Batch[] | null>(null)
  more = $state(false)
  files = $state.raw<StoredFile[] | null>(null)
  problem = $state.raw<ApiError | null>(null)

  /** Learn them all. Returns when to look again, in milliseconds. */
  async load(): Promise<number> {
    try {
      const [batches, files] = await Promise.all([
        session.may('generate') ? data(api.GET('/v1/batches', { params: { query: { limit: PAGE } } })) : null,
        data(api.GET('/v1/files', { params: { query: { limit: 10 * PAGE } } })),
      ])
      this.all = batches?.data ?? []
      this.more = batches?.has_more ?? false
      this.files = files.data
      this.problem = null
    } catch (error) {
      server.noteError(error)
      this.problem = error instanceof ApiError ? error : new ApiError(500, null, String(error))
    }
    return this.all?.some((batch) => !ended(batch)) ? SOON : LATER
  }

  /** Send a file of requests and have it answered. Throws ApiError. */
  async create(file: File, endpoint: Endpoint, window: string, sent: (part: number) => void, signal: AbortSignal): Promise<void> {
    const form = new FormData()
    form.append('purpose', 'batch')
    form.append('file', file, file.name)
    const { id } = await upload<StoredFile>('v1/files', form, sent, signal)
    await data(api.POST('/v1/batches', { body: { input_file_id: id, endpoint, completion_window: window } }))
    await this.load()
  }

  /** Throws ApiError. */
  async cancel(batch_id: string): Promise<void> {
    await data(api.POST('/v1/batches/{batch_id}/cancel', { params: { path: { batch_id } } }))
    await this.load()
  }

  /** Throws ApiError. */
  async remove(file_id: string): Promise<void> {
    await data(api.DELETE('/v1/files/{file_id}', { params: { path: { file_id } } }))
    await this.load()
  }

  /** Save a file's content. Throws ApiError. */
  async save(id: string): Promise<void> {
    const used = credentials.key()
    const answer = await fetch(`${ROOT}v1/files/${encodeURIComponent(id)}/content`, { headers: authorized() })
    if (!answer.ok) refuse(errorOf(answer.status, await answer.json().catch(() => null)), used)
    const name = this.files?.find((file) => file.id === id)?.filename ?? `${id}.jsonl`
    download(name, await answer.blob(), 'application/octet-stream')
  }
}

export const batches = new Batches()
