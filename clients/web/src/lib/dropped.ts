// What was dropped on the page: files, and those right in a folder.

const MOST_FILES = 200

export async function droppedFiles(transfer: DataTransfer): Promise<{ files: File[]; folder: string }> {
  // Both lists are empty after the first wait.
  const plain = [...transfer.files]
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter((entry) => entry !== null && entry !== undefined)
  const folder = entries.find((entry) => entry.isDirectory) as FileSystemDirectoryEntry | undefined
  if (!folder) return { files: plain, folder: '' }
  const inside = await new Promise<FileSystemEntry[]>((resolve) => folder.createReader().readEntries(resolve, () => resolve([])))
  const files = inside.filter((entry) => entry.isFile).slice(0, MOST_FILES) as FileSystemFileEntry[]
  const read = (entry: FileSystemFileEntry) => new Promise<File | null>((resolve) => entry.file(resolve, () => resolve(null)))
  return { files: (await Promise.all(files.map(read))).filter((file) => file !== null), folder: folder.name }
}

/** What files are for, by their names; null if nothing here takes them. */
export function purposeOf(names: string[]): 'rows' | 'adapter' | null {
  if (names.some((name) => /\.(safetensors|zip)$/i.test(name) || name === 'adapter_config.json')) return 'adapter'
  return names.some((name) => /\.(jsonl|json|csv|parquet)$/i.test(name)) ? 'rows' : null
}
