// Files of a ZIP archive, read where they lie: of a large one only what is wanted comes into memory.

const END = 0x06054b50
const ENTRY = 0x02014b50
const END_BYTES = 22
const ENTRY_BYTES = 46
const LOCAL_BYTES = 30
const MOST_COMMENT = 0xffff
const ZIP64 = 0xffffffff
const MOST_ENTRIES = 10_000

interface Entry {
  folder: string
  name: string
  method: number
  packed: number
  size: number
  at: number
}

export const isZip = (file: File): boolean => /\.zip$/i.test(file.name)

/** The files with these names in the first folder that has one called `first`. Throws Error, in words for people. */
export async function unzip(archive: File, names: string[], first: string): Promise<{ files: File[]; folder: string }> {
  const entries = await entriesOf(archive)
  const folder = entries.find(({ name }) => name === first)?.folder
  if (folder === undefined) throw new Error(`There is no ${first} in ${archive.name}.`)
  const wanted = entries.filter((entry) => entry.folder === folder && names.includes(entry.name))
  return { files: await Promise.all(wanted.map((entry) => read(archive, entry))), folder: folder.split('/').filter(Boolean).at(-1) ?? archive.name.replace(/\.zip$/i, '') }
}

async function view(archive: File, from: number, bytes: number): Promise<DataView> {
  return new DataView(await archive.slice(from, from + bytes).arrayBuffer())
}

async function entriesOf(archive: File): Promise<Entry[]> {
  const from = Math.max(0, archive.size - END_BYTES - MOST_COMMENT)
  const tail = await view(archive, from, archive.size - from)
  let at = tail.byteLength - END_BYTES
  while (at >= 0 && tail.getUint32(at, true) !== END) at--
  if (at < 0) throw new Error(`${archive.name} is no ZIP archive, or is cut off.`)
  const [count, size, start] = [tail.getUint16(at + 10, true), tail.getUint32(at + 12, true), tail.getUint32(at + 16, true)]
  if (start === ZIP64 || count > MOST_ENTRIES) throw new Error(`${archive.name} is too large to be unpacked here: unpack it, and drop the folder.`)
  const table = await view(archive, start, size)
  const entries: Entry[] = []
  for (let place = 0; place + ENTRY_BYTES <= table.byteLength && table.getUint32(place, true) === ENTRY; ) {
    const [named, extra, comment] = [28, 30, 32].map((offset) => table.getUint16(place + offset, true)) as [number, number, number]
    const path = new TextDecoder().decode(table.buffer.slice(place + ENTRY_BYTES, place + ENTRY_BYTES + named))
    const slash = path.lastIndexOf('/') + 1
    entries.push({ folder: path.slice(0, slash), name: path.slice(slash), method: table.getUint16(place + 10, true), packed: table.getUint32(place + 20, true), size: table.getUint32(place + 24, true), at: table.getUint32(place + 42, true) })
    place += ENTRY_BYTES + named + extra + comment
  }
  return entries
}

async function read(archive: File, { name, method, packed, size, at }: Entry): Promise<File> {
  if (packed === ZIP64 || size === ZIP64 || at === ZIP64 || (method !== 0 && method !== 8)) throw new Error(`${name} in ${archive.name} is too large, or packed in a way that cannot be read here: unpack it, and drop the folder.`)
  const head = await view(archive, at, LOCAL_BYTES)
  const start = at + LOCAL_BYTES + head.getUint16(26, true) + head.getUint16(28, true)
  const content = archive.slice(start, start + packed)
  const blob = method === 0 ? content : await new Response(content.stream().pipeThrough(new DecompressionStream('deflate-raw'))).blob().catch(() => null)
  if (blob?.size !== size) throw new Error(`${name} in ${archive.name} is damaged.`)
  return new File([blob], name)
}
