// Equal answers, counted.

export interface Group {
  text: string
  count: number
}

/** The texts without what surrounds them, the most frequent first; of equally frequent ones the first that came. */
export function groupsOf(texts: readonly string[]): Group[] {
  const counts = new Map<string, number>()
  for (const text of texts) counts.set(text.trim(), (counts.get(text.trim()) ?? 0) + 1)
  return [...counts].map(([text, count]) => ({ text, count })).sort((one, other) => other.count - one.count)
}
