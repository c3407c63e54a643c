// Blind comparison: two of the columns answer, nobody knows which, and one key says which is better.
import { announcer } from './announce.svelte'
import { Column, type Compare } from './compare.svelte'
import { keep, load, onOtherTab } from './storage'
import { answer, Reply } from './reply.svelte'
import { encodeTarget } from './target'
import { isVerdict, judged, tally, type Verdict } from './verdicts'

const STORED = 'onebase.verdicts'
const MOST = 2000

class Blind {
  on = $state(false)
  /** Who answers on the left and on the right. */
  pair = $state.raw<[Column, Column] | null>(null)
  /** What was said of this pair; null while it is hidden. */
  verdict = $state<0 | 1 | 2 | null>(null)
  verdicts = $state.raw<Verdict[]>(load(STORED, isVerdict))

  constructor() {
    onOtherTab(STORED, () => (this.verdicts = load(STORED, isVerdict)))
  }

  get running(): boolean {
    return this.pair?.some((column) => column.running) ?? false
  }

  /** Whether both have answered and nothing is said of it yet. */
  get waits(): boolean {
    return this.verdict === null && this.#replies?.every((reply) => reply?.state === 'done') === true
  }

  get #replies() {
    return this.pair?.map((column) => column.last)
  }

  /** Two that differ, or none: of the pairs that were judged least one by chance, in an order by chance. */
  draw(columns: readonly Column[]): [Column, Column] | null {
    const different = [...new Map(columns.map((column) => [encodeTarget(column.target), column])).values()]
    const pairs = different.flatMap((one, at) => different.slice(at + 1).map((other): [Column, Column] => [one, other]))
    const lines = new Map(tally(this.verdicts).map((line) => [JSON.stringify(line.titles), judged(line)]))
    const times = ([one, other]: [Column, Column]) => lines.get(JSON.stringify([one.title, other.title].sort())) ?? 0
    const least = Math.min(...pairs.map(times))
    const rarest = pairs.filter((pair) => times(pair) === least)
    const pair = rarest[by(rarest.length)]
    if (!pair) return null
    const [one, other] = by(2) ? pair : [pair[1], pair[0]]
    return [new Column(one.target), new Column(other.target)]
  }

  async ask(compare: Compare): Promise<void> {
    const { message } = compare
    const pair = this.draw(compare.columns)
    if (!pair || !message.trim() || compare.toolsProblem) return
    this.stop()
    this.pair = pair
    this.verdict = null
    compare.message = ''
    const asks = pair.map((column) => {
      column.replies.push(new Reply(message, 0))
      const body = compare.request(column.target, [{ role: 'user', content: message }])
      return { reply: column.last as Reply, body }
    })
    announcer.say('2 answers on the way.')
    await answer(asks)
    if (this.pair !== pair) return
    if (!this.waits && !compare.message) compare.message = message
    announcer.say(this.waits ? '2 answers complete. Press 1 or 2 for the better one, 0 for a tie.' : 'They did not both answer. Ask again.')
  }

  judge(winner: 0 | 1 | 2): void {
    if (!this.waits || !this.pair) return
    const [one, other] = this.pair
    this.verdict = winner
    const verdict: Verdict = {
      at: new Date().toISOString(),
      message: one.last?.message ?? '',
      titles: [one.title, other.title],
      answered: [one.last?.summary?.adapter ?? null, other.last?.summary?.adapter ?? null],
      texts: [one.last?.text ?? '', other.last?.text ?? ''],
      winner,
    }
    this.#store([...this.verdicts, verdict].slice(-MOST))
    announcer.say(`Noted. 1 is ${one.title}, 2 is ${other.title}.`)
  }

  stop(): void {
    this.pair?.forEach((column) => column.stop())
  }

  leave(): void {
    this.stop()
    this.on = false
    this.pair = this.verdict = null
  }

  forget(): void {
    this.#store([])
  }

  asJson(): string {
    return JSON.stringify({ tally: tally(this.verdicts), verdicts: this.verdicts }, null, 2)
  }

  #store(verdicts: Verdict[]): void {
    this.verdicts = verdicts
    keep(STORED, verdicts)
  }
}

/** A number below `most`, by chance. */
function by(most: number): number {
  return Math.floor(((crypto.getRandomValues(new Uint32Array(1))[0] ?? 0) / 2 ** 32) * most)
}

export const blind = new Blind()
