// A small file to try training with: orders in words, and what they are as JSON.

const THINGS = ['hats', 'cups', 'pens', 'bags'] as const
const COLOURS = ['red', 'blue', 'green'] as const

export function sampleFile(): File {
  const rows = THINGS.flatMap((item, at) =>
    COLOURS.flatMap((color, other) =>
      [1 + ((at + other) % 4), 5 + ((2 * at + other) % 5)].map((count) => ({
        messages: [
          { role: 'user', content: `I want ${count} ${color} ${item} please` },
          { role: 'assistant', content: JSON.stringify({ count, color, item }) },
        ],
      })),
    ),
  )
  return new File([rows.map((row) => `${JSON.stringify(row)}\n`).join('')], 'sample-orders.jsonl', { type: 'application/jsonl' })
}
