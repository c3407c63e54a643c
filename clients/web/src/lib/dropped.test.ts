import { expect, test } from 'vitest'
import { purposeOf } from './dropped'

test.each([
  [['rows.jsonl'], 'rows'],
  [['ROWS.CSV'], 'rows'],
  [['adapter_config.json', 'adapter_model.safetensors'], 'adapter'],
  [['adapter_config.json'], 'adapter'],
  [['orders.zip'], 'adapter'],
  [['cat.png'], null],
  [[], null],
])('%j is for %s', (names, purpose) => {
  expect(purposeOf(names)).toBe(purpose)
})
