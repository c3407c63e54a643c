// What was just done, at the edge of the page, with a way to take it back.

const SHOWN_MS = 15_000

class Toast {
  text = $state('')
  undo = $state.raw<(() => Promise<void>) | null>(null)
  #timer: ReturnType<typeof setTimeout> | undefined

  /** `undo` throws where it cannot be done; the page it belongs to says why. */
  show(text: string, undo: (() => Promise<void>) | null = null): void {
    this.text = text
    this.undo = undo
    this.leave()
  }

  /** It stays while somebody looks at it. */
  stay(): void {
    clearTimeout(this.#timer)
  }

  leave(): void {
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => this.close(), SHOWN_MS)
  }

  close(): void {
    clearTimeout(this.#timer)
    this.text = ''
    this.undo = null
  }
}

export const toast = new Toast()
