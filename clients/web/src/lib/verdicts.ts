// Verdicts of blind comparisons, counted by pair.

/** 0: a tie; 1 and 2: the first or the second of `titles` was better. */
export interface Verdict {
  at: string
  message: string
  /** Who answered, as the columns are called. */
  titles: [string, string]
  /** Which versions did, as the server says it. */
  answered: [unknown, unknown]
  texts: [string, string]
  winner: 0 | 1 | 2
}

export interface Tally {
  titles: [string, string]
  wins: [number, number]
  ties: number
}

export function isVerdict(one: unknown): one is Verdict {
  const { titles, winner } = (one ?? {}) as Partial<Verdict>
  const named = Array.isArray(titles) && titles.length === 2 && titles.every((title) => typeof title === 'string')
  return named && (winner === 0 || winner === 1 || winner === 2)
}

/** One line a pair, in whichever order it was shown; the most often judged first. */
export function tally(verdicts: readonly Verdict[]): Tally[] {
  const found = new Map<string, Tally>()
  for (const { titles, winner } of verdicts) {
    const turned = titles[0] > titles[1]
    const [first, second] = turned ? [titles[1], titles[0]] : titles
    const key = JSON.stringify([first, second])
    const line = found.get(key) ?? { titles: [first, second], wins: [0, 0], ties: 0 }
    if (winner === 0) line.ties += 1
    else line.wins[(winner === 1) === turned ? 1 : 0] += 1
    found.set(key, line)
  }
  return [...found.values()].sort((one, other) => judged(other) - judged(one))
}

export const judged = ({ wins, ties }: Tally) => wins[0] + wins[1] + ties
