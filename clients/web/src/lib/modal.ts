// A dialog over the page, open while the state of who shows it says so, however it is closed.
import { untrack } from 'svelte'
import type { Attachment } from 'svelte/attachments'

export interface Modal {
  /** Whether it is wanted: its only truth, read anew whenever that state changes. */
  open: () => boolean
  /** Change that state: Escape was pressed, or it was clicked beside. */
  close: () => void
  /** What is done before it shows. */
  opens?: () => void
  /** What is done once it is closed, or gone together with its view. */
  closed?: () => void
  /** A click beside it closes it. */
  beside?: boolean
}

export function modal({ open, close, opens, closed, beside = false }: Modal): Attachment<HTMLDialogElement> {
  return (dialog) => {
    if (!open()) return
    untrack(() => opens?.())
    dialog.showModal()
    // At once, and not when `close` is told: by then it may be wanted again. The `cancel` of a file field comes here too.
    const direct = (event: Event) => {
      if (event.target !== dialog) return
      event.preventDefault()
      close()
    }
    // A browser may close it without asking; and an opening before this one may be told to be closed only now.
    const told = () => {
      if (!dialog.open) close()
    }
    dialog.addEventListener('cancel', direct)
    dialog.addEventListener('close', told)
    if (beside) dialog.addEventListener('click', direct)
    return () => {
      dialog.removeEventListener('cancel', direct)
      dialog.removeEventListener('close', told)
      dialog.removeEventListener('click', direct)
      dialog.close()
      closed?.()
    }
  }
}
