import { crc32, deflateRawSync } from 'node:zlib'
import { expect, test } from 'vitest'
import { unzip } from './zip'

/** An archive as other programs make it: the first file stored, the others packed. */
function zip(files: Record<string, string>): File {
  const parts: Buffer[] = []
  const table: Buffer[] = []
  let at = 0
  Object.entries(files).forEach(([path, text], index) => {
    const [name, content] = [Buffer.from(path), Buffer.from(text)]
    const packed = index ? deflateRawSync(content) : content
    const head = Buffer.alloc(30)
    head.writeUInt32LE(0x04034b50, 0)
    head.writeUInt16LE(name.length, 26)
    const entry = Buffer.alloc(46)
    entry.writeUInt32LE(0x02014b50, 0)
    entry.writeUInt16LE(index ? 8 : 0, 10)
    entry.writeUInt32LE(crc32(content), 16)
    entry.writeUInt32LE(packed.length, 20)
    entry.writeUInt32LE(content.length, 24)
    entry.writeUInt16LE(name.length, 28)
    entry.writeUInt32LE(at, 42)
    table.push(entry, name)
    parts.push(head, name, packed)
    at += 30 + name.length + packed.length
  })
  const end = Buffer.alloc(22)
  end.writeUInt32LE(0x06054b50, 0)
  end.writeUInt16LE(Object.keys(files).length, 10)
  end.writeUInt32LE(Buffer.concat(table).length, 12)
  end.writeUInt32LE(at, 16)
  return new File([new Uint8Array(Buffer.concat([...parts, ...table, end]))], 'shop.zip')
}

test('the wanted files of the folder with the config are unpacked, whether packed or not', async () => {
  const archive = zip({ 'readme.md': 'x', 'out/shop/adapter_config.json': '{}', 'out/shop/adapter_model.safetensors': 'w'.repeat(1000), 'other/adapter_model.safetensors': 'no' })
  const { files, folder } = await unzip(archive, ['adapter_config.json', 'adapter_model.safetensors'], 'adapter_config.json')
  expect(folder).toBe('shop')
  expect(await Promise.all(files.map(async (file) => [file.name, await file.text()]))).toEqual([['adapter_config.json', '{}'], ['adapter_model.safetensors', 'w'.repeat(1000)]])
})

test('what is no archive, has no config or is damaged is said', async () => {
  await expect(unzip(new File(['nothing'], 'a.zip'), [], 'x')).rejects.toThrow('a.zip is no ZIP archive')
  await expect(unzip(zip({ a: 'b' }), [], 'x')).rejects.toThrow('There is no x in shop.zip.')
  const whole = zip({ a: 'b', x: 'long enough to be packed' })
  const bytes = new Uint8Array(await whole.arrayBuffer())
  bytes.fill(255, 62, 70)
  await expect(unzip(new File([bytes], 'shop.zip'), ['x'], 'x')).rejects.toThrow('x in shop.zip is damaged.')
})
