import { expect, test } from 'vitest'
import { byOf, doerOf, linkOf, saidOf, targetOf, whoOf } from './audit'

const all = { may: () => true }
const nameOf = (id: string) => ({ 'ob-1': 'web' })[id] ?? id

test('who did it is a key by its name, and what acted for it', () => {
  expect(byOf({ key: 'ob-1', actor: '' }, nameOf)).toBe('by web')
  expect(byOf({ key: 'ob-1', actor: 'job ftjob-1' }, nameOf)).toBe('by web through training')
  expect(byOf({ key: 'ob-2', actor: '' }, nameOf)).toBe('by ob-2')
  expect(byOf({ key: '', actor: 'onebase keys of ann@host' }, nameOf)).toBe('by onebase keys of ann@host')
  expect(byOf({ key: '', actor: 'startup' }, nameOf)).toBe('at the server’s start')
  expect(byOf({ key: '', actor: '' }, nameOf)).toBe('')
  expect(byOf(doerOf('ob-1'), nameOf)).toBe('by web')
  expect(byOf(doerOf('training'), nameOf)).toBe('by training')
  expect(whoOf({ key: '', actor: 'job ftjob-1' }, nameOf)).toBe('training')
})

test('a job is known by its adapter, and a file by its name; both lead where they are seen', () => {
  const job = { action: 'job.created', target: 'ftjob-1', details: { adapter: 'orders', activate: 'never' } }
  expect([targetOf(job), linkOf(job, all), saidOf(job)]).toEqual(['orders', '#/training?job=ftjob-1', 'activate never'])
  const file = { action: 'file.added', target: 'file-1', details: { filename: 'rows.jsonl', bytes: 2000 } }
  expect([targetOf(file), linkOf(file, all), saidOf(file)]).toEqual(['rows.jsonl', '#/batches?q=file-1', 'bytes 2.0 kB'])
  expect(targetOf({ action: 'job.created', target: 'ftjob-1', details: {} })).toBe('ftjob-1')
  expect(linkOf({ action: 'adapter.deleted', target: 'orders' }, all)).toBe('')
})

test('ids and digests are as short as commands show them', () => {
  const entry = { action: 'job.created', target: `ftjob-${'9cb0c96c'.repeat(3)}`, details: { parent: `orders@${'ab'.repeat(32)}`, training_file: `file-${'1234abcd'.repeat(3)}`, versions: ['cd'.repeat(32)] } }
  expect(saidOf(entry)).toBe('parent orders@abababababab, training_file file-1234abcd, versions ["cdcdcdcdcdcd"]')
  expect(targetOf(entry)).toBe('ftjob-9cb0c96c')
  expect(targetOf({ action: 'batch.created', target: `batch_${'5678abcd'.repeat(3)}`, details: {} })).toBe('batch_5678abcd')
})

test('names are whole, though they look like ids', () => {
  const name = `file-${'1234abcd'.repeat(3)}`
  expect(targetOf({ action: 'job.created', target: 'ftjob-1', details: { adapter: name } })).toBe(name)
  expect(targetOf({ action: 'adapter.activated', target: name, details: {} })).toBe(name)
})

test('nothing leads to a view that the key may not see', () => {
  const seen = (...scopes: string[]) => ['adapter.activated', 'job.created', 'batch.created', 'file.added', 'key.created'].filter((action) => linkOf({ action, target: 'one' }, { may: (scope) => scopes.includes(scope) }))
  expect(seen('adapters')).toEqual(['adapter.activated'])
  expect(seen('generate')).toEqual(['batch.created', 'file.added'])
  expect(seen('train')).toEqual(['job.created', 'batch.created', 'file.added'])
})
