import { expect, test } from 'vitest'
import { rowsOf } from './examples'

test('rows are questions with their replies, each once, and what is none is left out', () => {
  const chat = '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
  const text = [chat, chat, 'name,text', '{"prompt": "p", "completion": "c"}', '{"prompt": "d", "chosen": "e", "rejected": "f"}', '{"text": "t", "label": "l"}', '{"messages": [{"ro'].join('\n')
  expect(rowsOf(text, 9).map(({ messages, reply }) => [messages.map(({ content }) => content), reply])).toEqual([[['s', 'a'], 'b'], [['p'], 'c'], [['d'], 'e']])
  expect(rowsOf(text, 1)).toHaveLength(1)
})
