import { execFileSync } from 'node:child_process'
import { mkdtempSync, readFileSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { tar } from './tar'

test('what is packed is what tar unpacks', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'tar-'))
  const long = new Uint8Array(1300).fill(7)
  const archive = tar([{ name: 'a-1/config.json', content: new Blob(['{"r": 8}']) }, { name: 'a-1/weights', content: new Blob([long]) }], 1_800_000_000)
  writeFileSync(join(folder, 'a.tar'), new Uint8Array(await archive.arrayBuffer()))
  execFileSync('tar', ['xf', 'a.tar'], { cwd: folder })
  expect(readFileSync(join(folder, 'a-1/config.json'), 'utf8')).toBe('{"r": 8}')
  expect(new Uint8Array(readFileSync(join(folder, 'a-1/weights')))).toEqual(long)
})
