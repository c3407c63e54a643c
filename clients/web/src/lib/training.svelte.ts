// Jobs, and what each tells while it runs.
import { ApiError, api, data, type Schemas } from '../api/client'
import { follow, type Job, type JobEvent } from '../api/follow'
import { upload } from '../api/upload'
import { Curve } from './curves'
import type { Grader } from './graders'
import { models } from './models.svelte'
import { server } from './server.svelte'
import { duration, many } from './units'

export type { Job } from '../api/follow'
/** A held-out row, and who said what to its prompt. A report of an older server has none. */
export interface HeldOutReplies {
  line: number
  slice: string
  prompt: string
  reference: string
  base: string | null
  parent: string | null
  active: string | null
  adapter: string
  /** By whose reply it is: `base`, `parent`, `active`, `adapter`. Only a job that learns from rewards has them. */
  rewards?: Record<string, number> | null
}
export type Report = Schemas['TrainingReport'] & { replies?: HeldOutReplies[]; warnings?: string[] }
export type TrainingFile = Omit<Schemas['FileAnswer'], 'status_details' | 'expires_at'>

const PAGE = 100
const MOST_MESSAGES = 1000
/** Between two times that charts are drawn anew, and more of it for each point that they have. */
const DRAW_MS = 250
const DRAW_MS_A_POINT = 0.02
const AGAIN_MS = 1500
/** Between two looks at a job that the server does not know: another server may answer, or a backup come back. */
const UNKNOWN_MS = 15_000

/** Whether it learns from rewards: its losses are negated rewards, so that a page shows them as `reward(loss)`. */
export const rewarded = (job: Pick<Job, 'method'> | null): boolean => job?.method.type === 'reinforcement'

export const reward = (loss: number): number => 0 - loss

/** Whether it is checked and waits for a word to train. */
export const held = (job: Pick<Job, 'status' | 'hold'>): boolean => job.hold && job.status === 'paused'

export const ended = (job: Pick<Job, 'status'>): boolean => ['succeeded', 'failed', 'cancelled'].includes(job.status)

export interface DataReport {
  source: string
  rows: number
  samples: number
  tokens: number
  supervised_tokens: number
  shortest: number
  median: number
  longest: number
  counts: Record<string, number>
  named_by: string
  histogram: { from: number; to: number; samples: number }[]
  examples: { row: number; line: number; side: string; label?: string; segments: { text: string; supervised: boolean }[] }[]
  evaluation: DataReport | null
}

export interface Sample {
  step: number
  prompt: string
  text: string
}

interface BadLine {
  line: number
  field: string
  reason: string
}

const SHORT_DIGEST = 12

/** A version as messages call it. */
export const label = (name: string, digest: string): string => `${name}@${digest.slice(0, SHORT_DIGEST)}`

/** From this ratio of the longest to the shortest time on both are shown. */
const WIDE = 1.25

/** `about 4 min` or `4 min to 9 min`, and from where that is known; both '' if it is not. As `onebase jobs show` says it. */
export function timeTaken(estimate: Record<string, unknown>): { time: string; from: string } {
  const seconds = Number(estimate.seconds ?? 0)
  if (!seconds) return { time: '', from: '' }
  const low = Number(estimate.seconds_low) || seconds
  const high = Number(estimate.seconds_high) || seconds
  const wide = high > WIDE * low
  const jobs = Number(estimate.finished_jobs ?? 1)
  const measured = `measured just now${wide ? ', with the machine busy' : ''}`
  const from = estimate.seconds_from === 'finished_jobs' ? `as ${jobs === 1 ? 'the last job' : `the last ${jobs} jobs`} on this base` : estimate.seconds_from ? measured : ''
  return { time: wide ? `${duration(low)} to ${duration(high)}` : `about ${duration(seconds)}`, from }
}

/** Which versions the adapter was compared with on held-out rows, and what came of it, in sentences. */
export function compared(job: Job, report: Report): string {
  const better: Record<string, boolean | null> = report.better_than ?? {}
  const active = report.active ? `${label(job.name, report.active)}, which was active when training ended` : ''
  const same = job.parent?.name === job.name && job.parent.version === report.active
  const parent = same ? active : job.parent ? `${label(job.parent.name, job.parent.version)}, which it went on from` : 'what it went on from'
  const names = { base: 'the base', parent, active }
  const of = (wanted: boolean) => (['base', 'parent', 'active'] as const).filter((one) => better[one] === wanted).map((one) => names[one]).filter((one, at, all) => all.indexOf(one) === at).join(' and ')
  const said: string[] = []
  if (typeof better.base !== 'boolean') said.push('Nothing was held out to measure it on.')
  else {
    if (of(false)) said.push(`On held-out rows it is no better than ${of(false)}.`)
    if (of(true)) said.push(`On held-out rows it is better than ${of(true)}.`)
    if (active && typeof better.active !== 'boolean') said.push(`It could not be compared with ${active}: ${report.not_compared ?? ''}.`)
    if (!active) said.push('No version was active to compare it with.')
  }
  const regressed = report.slices?.regressed.length ?? 0
  if (regressed) said.push(`It is worse on ${many(regressed, 'slice')}, for which it is not activated.`)
  if (job.activated) said.push(job.replaced ? `Requests for its name get it, in place of ${label(job.name, job.replaced)}.` : 'Requests for its name get it.')
  else if (job.version) said.push('It is not active.')
  return said.join(' ')
}

/** One job, followed from its first event on. */
export class Run {
  job = $state.raw<Job | null>(null)
  problem = $state.raw<ApiError | null>(null)
  /** Grows whenever the curves below have more, a few times a second at most. */
  drawn = $state(0)
  readonly train = new Curve()
  readonly heldOut = new Curve()
  readonly rate = new Curve()
  /** Of each step that learns from rewards: the part of the replies that could not be graded. */
  readonly ungraded = new Curve()
  /** Of each step that learns from rewards: the part of the prompts whose replies all had the same reward. */
  readonly even = new Curve()
  messages = $state.raw<JobEvent[]>([])
  samples = $state.raw<Sample[]>([])
  data = $state.raw<DataReport | null>(null)
  problems = $state.raw<BadLine[]>([])
  /** Steps that it will take, as it says when it is on hold. */
  planned = $state<number | null>(null)
  #stop = new AbortController()
  #after = ''
  #timer: ReturnType<typeof setTimeout> | undefined
  #new: JobEvent[] = []
  #listened = 0

  constructor(readonly id: string) {}

  start(): () => void {
    void this.#follow()
    return () => {
      this.#stop.abort()
      clearTimeout(this.#timer)
    }
  }

  /** Learn the job. Returns when to look again, in milliseconds. */
  async load(): Promise<number> {
    try {
      const path = { job_id: this.id }
      const before = this.job?.status
      this.job = await data(api.GET('/v1/fine_tuning/jobs/{job_id}', { params: { path } }))
      this.problem = null
      if (before && before !== this.job.status) void training.load()
    } catch (error) {
      this.problem = noted(error)
    }
    return this.problem?.status === 404 || (this.job && ended(this.job)) ? UNKNOWN_MS : AGAIN_MS
  }

  async act(what: 'pause' | 'resume' | 'stop' | 'cancel'): Promise<void> {
    const params = { path: { job_id: this.id } }
    const calls = {
      pause: () => api.POST('/v1/fine_tuning/jobs/{job_id}/pause', { params }),
      resume: () => api.POST('/v1/fine_tuning/jobs/{job_id}/resume', { params }),
      stop: () => api.POST('/v1/fine_tuning/jobs/{job_id}/stop', { params }),
      cancel: () => api.POST('/v1/fine_tuning/jobs/{job_id}/cancel', { params }),
    }
    this.job = await data(calls[what]())
    // A job that goes on after its end tells more.
    if (!ended(this.job) && !this.#listened) void this.#follow()
    void training.load()
  }

  async #follow(): Promise<void> {
    const { signal } = this.#stop
    this.#listened += 1
    let pause = AGAIN_MS
    while (!signal.aborted) {
      // A page that is hidden follows nothing: a browser has 6 connections to one server, for all of its tabs.
      if (document.hidden) {
        await turned(signal)
        continue
      }
      const seen = new AbortController()
      const open = AbortSignal.any([signal, seen.signal])
      void turned(open).then(() => seen.abort())
      try {
        pause = AGAIN_MS
        for await (const news of follow(this.id, this.#after, open)) {
          if (this.problem?.status === 404) this.problem = null
          for (const { event, job } of news) {
            if (event) this.#take(event)
            else this.job = job
          }
          this.#draw()
          if (news.at(-1)?.job) {
            this.#listened -= 1
            void training.load()
            void models.load().catch(() => {})
            return
          }
        }
      } catch (error) {
        if (error instanceof ApiError && error.status === 404) {
          this.problem = error
          pause = UNKNOWN_MS
        }
        server.noteError(error)
      } finally {
        seen.abort()
      }
      if (!document.hidden) await new Promise((resolve) => setTimeout(resolve, pause))
    }
  }

  #take(event: JobEvent): void {
    this.#after = event.id
    const told = event.data ?? {}
    const step = Number(told.step ?? 0)
    if (typeof told.train_loss === 'number') this.train.add(step, told.train_loss)
    if (typeof told.learning_rate === 'number') this.rate.add(step, told.learning_rate)
    if (typeof told.train_loss === 'number' && typeof told.rewards_failed === 'number') this.ungraded.add(step, told.rewards_failed)
    if (typeof told.train_loss === 'number' && typeof told.rewards_even === 'number') this.even.add(step, told.rewards_even)
    if (typeof told.valid_loss === 'number') this.heldOut.add(step, told.valid_loss)
    if (event.type === 'metrics' && told.valid_loss === undefined && told.parent_loss === undefined && told.active_loss === undefined && told.subject === undefined) return
    this.#new.push(event)
  }

  /** Show what has come, not more often than can be seen. */
  #draw(): void {
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined
      const came = this.#new
      this.#new = []
      this.drawn += 1
      if (!came.length) return
      this.messages = [...this.messages, ...came].slice(-MOST_MESSAGES)
      const kind = (event: JobEvent) => event.data?.kind
      const sampled = came.filter((event) => kind(event) === 'sampled').map((event) => event.data as unknown as Sample)
      if (sampled.length) this.samples = [...this.samples.filter((one) => !sampled.some((two) => two.step === one.step && two.prompt === one.prompt)), ...sampled]
      const checked = came.findLast((event) => kind(event) === 'data_checked')
      const report = (checked?.data as { report: DataReport } | undefined)?.report
      if (Array.isArray(report?.examples)) this.data = report
      this.planned = Number(came.findLast((event) => kind(event) === 'held')?.data?.steps ?? 0) || this.planned
      const bad = came.flatMap((event) => (event.data?.problems as BadLine[] | undefined) ?? [])
      if (bad.length) this.problems = [...this.problems, ...bad]
    }, DRAW_MS + DRAW_MS_A_POINT * this.train.steps.length)
  }
}

class Training {
  jobs = $state.raw<Job[] | null>(null)
  more = $state(false)
  files = $state.raw<TrainingFile[]>([])
  problem = $state.raw<ApiError | null>(null)
  #wanted = PAGE

  /** Learn the jobs. Returns when to look again, in milliseconds. */
  async load(): Promise<number> {
    try {
      const found: Job[] = []
      let more = true
      while (more && found.length < this.#wanted) {
        const after = found.at(-1)?.id
        const query = { limit: PAGE, ...(after ? { after } : {}) }
        const page = await data(api.GET('/v1/fine_tuning/jobs', { params: { query } }))
        found.push(...page.data)
        more = page.has_more
      }
      this.jobs = found
      this.more = more
      this.problem = null
    } catch (error) {
      this.problem = noted(error)
    }
    return this.jobs?.some((job) => !ended(job)) ? 2000 : 6000
  }

  async showMore(): Promise<void> {
    this.#wanted += PAGE
    await this.load()
  }

  async loadFiles(): Promise<void> {
    const query = { purpose: 'fine-tune' as const, limit: PAGE }
    this.files = (await data(api.GET('/v1/files', { params: { query } }))).data
  }

  /** Send a file. Throws ApiError. */
  async send(file: File, sent: (part: number) => void, signal: AbortSignal): Promise<string> {
    const form = new FormData()
    form.append('purpose', 'fine-tune')
    form.append('file', file, file.name)
    return (await upload<TrainingFile>('v1/files', form, sent, signal)).id
  }

  /** Have a grader give one reply its reward, as a job would. item: the row that it answers. Throws ApiError. */
  async grade(grader: Grader, reply: string, item: Record<string, unknown> | null): Promise<Schemas['GraderRun']> {
    return data(api.POST('/v1/fine_tuning/alpha/graders/run', { body: { grader, model_sample: reply, item } }))
  }

  /** Throws ApiError. */
  async create(body: Schemas['CreateJobRequest']): Promise<Job> {
    const job = await data(api.POST('/v1/fine_tuning/jobs', { body }))
    void this.load()
    return job
  }
}

export const training = new Training()

/** Until the page is seen or hidden, or `signal` aborts. */
function turned(signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    document.addEventListener('visibilitychange', () => resolve(), { once: true, signal })
    signal.addEventListener('abort', () => resolve(), { once: true })
  })
}

function noted(error: unknown): ApiError {
  server.noteError(error)
  return error instanceof ApiError ? error : new ApiError(500, null, String(error))
}
