import { expect, it, vi } from 'vitest'

it('shows few long texts a frame, and each in its turn', async () => {
  const frames: (() => void)[] = []
  vi.stubGlobal('document', { hidden: false })
  vi.stubGlobal('requestAnimationFrame', (frame: () => void) => frames.push(frame))
  const { onFrame } = await import('./frames')
  const shown: string[] = []
  const show = (name: string, characters: number) => () => shown.push(name) && characters
  const ends = [onFrame(show('a', 5000)), onFrame(show('b', 5000)), onFrame(show('c', 10))]
  frames.shift()?.()
  expect(shown.splice(0)).toEqual(['a', 'b'])
  frames.shift()?.()
  expect(shown.splice(0)).toEqual(['c', 'a', 'b'])
  ends[0]?.()
  frames.shift()?.()
  expect(shown.sort()).toEqual(['b', 'c'])
  for (const end of ends) end()
  frames.shift()?.()
  expect(frames).toEqual([])
  vi.unstubAllGlobals()
})
