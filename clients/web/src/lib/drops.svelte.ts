// Files that are dropped where nothing waits for them: rows go to Training, an adapter to its upload.
import { purposeOf } from './dropped'
import { session } from './session.svelte'
import { toast } from './toast.svelte'

class Drops {
  /** What the view that takes it has not taken yet. */
  rows = $state.raw<File | null>(null)
  adapter = $state.raw<{ files: File[]; folder: string } | null>(null)

  /** Bring files to the view that takes them, or say why not. */
  bring(files: File[], folder: string): void {
    const names = files.map(({ name }) => name)
    const purpose = purposeOf(names)
    if (!purpose) {
      if (names.length) toast.show(`Nothing here takes ${names[0]}. Drop rows (JSONL, JSON, CSV, Parquet) to train, or an adapter’s two files, their folder or a ZIP of it.`)
    } else if (purpose === 'rows') {
      if (!session.may('train')) return toast.show('To train with it, a key needs the scope train.')
      this.rows = files.find(({ name }) => purposeOf([name]) === 'rows') ?? null
      location.hash = '#/training'
    } else {
      if (!session.may('adapters')) return toast.show('To upload it, a key needs the scope adapters.')
      this.adapter = { files, folder }
      if (!location.hash.startsWith('#/adapters')) location.hash = '#/adapters'
    }
  }
}

export const drops = new Drops()
