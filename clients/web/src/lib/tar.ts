// An archive of files that are in memory: a tar needs no look at their content, so that none of it takes time.

const BLOCK = 512

/** The header of one file, as POSIX ustar has it. `name` is ASCII of at most 100 characters. */
export function header(name: string, size: number, seconds: number): Uint8Array<ArrayBuffer> {
  const block = new Uint8Array(BLOCK)
  const put = (at: number, text: string) => block.set(new TextEncoder().encode(text), at)
  const octal = (value: number, digits: number) => value.toString(8).padStart(digits, '0')
  put(0, name)
  put(100, '0000644\0')
  put(108, '0000000\0')
  put(116, '0000000\0')
  put(124, octal(size, 11))
  put(136, octal(Math.floor(seconds), 11))
  put(148, ' '.repeat(8))
  put(156, '0')
  put(257, 'ustar\0' + '00')
  put(148, `${octal(block.reduce((sum, byte) => sum + byte, 0), 6)}\0 `)
  return block
}

export function tar(files: { name: string; content: Blob }[], seconds: number): Blob {
  const parts = files.flatMap(({ name, content }) => [header(name, content.size, seconds), content, new Uint8Array((BLOCK - (content.size % BLOCK)) % BLOCK)])
  return new Blob([...parts, new Uint8Array(2 * BLOCK)], { type: 'application/x-tar' })
}
