// Judges of one conversation: adapters that are asked about it at once, each by an instruction of its own.
import type { GenerateRequest } from '../api/stream'
import { announcer } from './announce.svelte'
import { models } from './models.svelte'
import { Reply, answer } from './reply.svelte'
import { keep, load } from './storage'
import { many } from './units'

type Messages = NonNullable<GenerateRequest['messages']>

/** As many as POST /generate/many takes. */
export const MOST_JUDGES = 64
/** Of a verdict, its thought included. */
export const MOST_TOKENS = 64
/** Of how many adapters the defaults are looked at, to find those that are judges. */
const LOOKED_AT = 12
const USED = 'onebase.judges'

type Used = [name: string, instruction: string]
const isUsed = (one: unknown): one is Used => Array.isArray(one) && one.length === 2 && one.every((part) => typeof part === 'string')

export class Judge {
  instruction = $state('')
  verdict = $state.raw<Reply | null>(null)

  constructor(
    readonly name: string,
    instruction: string,
  ) {
    this.instruction = instruction
  }
}

class Judges {
  all = $state<Judge[]>([])

  get running(): boolean {
    return this.all.some(({ verdict }) => verdict?.running)
  }

  get names(): string[] {
    return models.adapters.map(({ id }) => id).filter((name) => !this.all.some((judge) => judge.name === name))
  }

  /** Begin with those that were asked last, else with adapters that say themselves what they are asked. */
  async open(): Promise<void> {
    this.all = this.all.filter(({ name }) => models.has(name))
    for (const judge of this.all) judge.verdict = null
    if (this.all.length) return
    const used = load(USED, isUsed).filter(([name]) => models.has(name))
    this.all = used.map(([name, instruction]) => new Judge(name, instruction))
    if (used.length) return
    const names = models.adapters.slice(0, LOOKED_AT).map(({ id }) => id)
    const found = await Promise.all(names.map(async (name): Promise<Used> => [name, await instructionOf(name)]))
    if (!this.all.length) this.all = found.filter(([, instruction]) => instruction).map(([name, instruction]) => new Judge(name, instruction))
  }

  async add(name: string): Promise<void> {
    if (!this.names.includes(name) || this.all.length >= MOST_JUDGES) return
    this.all = [...this.all, new Judge(name, await instructionOf(name))]
  }

  remove(judge: Judge): void {
    judge.verdict?.stop()
    this.all = this.all.filter((one) => one !== judge)
  }

  /** Ask all of them about a conversation. */
  async ask(messages: Messages): Promise<void> {
    if (this.running) return
    keep(USED, this.all.map(({ name, instruction }): Used => [name, instruction]))
    const asks = this.all.map((judge) => {
      const { name: adapter, instruction } = judge
      const reply = (judge.verdict = new Reply(instruction, 0))
      return { reply, body: { messages, adapter, instruction, temperature: 0, max_tokens: MOST_TOKENS } }
    })
    announcer.say(`${many(asks.length, 'judge')} asked.`)
    await answer(asks)
    const failed = asks.filter(({ reply }) => reply.state === 'failed').length
    announcer.say(`${many(asks.length - failed, 'verdict')} complete${failed ? `, ${failed} failed` : ''}.`)
  }

  stop(): void {
    for (const { verdict } of this.all) verdict?.stop()
  }
}

/** What the active version of an adapter is asked by default; '' if nothing, or if the key may not know. */
async function instructionOf(name: string): Promise<string> {
  if (!models.versions[name]) await models.loadVersions(name).catch(() => {})
  const active = models.versions[name]?.find((version) => version.active)
  return active?.report?.defaults?.instruction ?? ''
}

export const judges = new Judges()
