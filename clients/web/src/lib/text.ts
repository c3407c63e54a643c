// Texts from the server are data. What a reader would not see, or what turns a line around, is made visible.

/** A stretch of text to be shown as it is, or one character that is shown by its name. */
export interface Part {
  text: string
  hidden: boolean
}

// Controls but line ends and tabs; what changes the direction; what has no width; tags; variation of emoji is left.
const HIDDEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b\u200c\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\u{e0000}-\u{e0fff}\ud800-\udfff]/gu

/** The text, in parts: each hidden character is a part of its own, named `U+202E`. */
export function parts(text: string): Part[] {
  const found: Part[] = []
  let at = 0
  for (const match of text.matchAll(HIDDEN)) {
    if (match.index > at) found.push({ text: text.slice(at, match.index), hidden: false })
    found.push({ text: nameOf(match[0]), hidden: true })
    at = match.index + match[0].length
  }
  if (at < text.length || !found.length) found.push({ text: text.slice(at), hidden: false })
  return found
}

/** For places that take a text alone, such as a title or an option. */
export function plain(text: string): string {
  return text.replace(HIDDEN, (character) => `⟨${nameOf(character)}⟩`)
}

function nameOf(character: string): string {
  return `U+${(character.codePointAt(0) ?? 0).toString(16).toUpperCase().padStart(4, '0')}`
}

/** Where `text` leaves `base`: the index of the word in which it does, or null while one begins with the other. */
export function leavesAt(text: string, base: string): number | null {
  const most = Math.min(text.length, base.length)
  let at = 0
  while (at < most && text[at] === base[at]) at += 1
  if (at === most) return null
  while (at > 0 && !/\s/.test(text[at - 1] ?? '')) at -= 1
  return at
}
