import { describe, expect, it } from 'vitest'
import { newsOf } from '../api/follow'
import { Curve, aligned } from './curves'

describe('curves of a run', () => {
  it('have the steps that are done again once, as they were done last', () => {
    const curve = new Curve()
    for (const [step, value] of [[1, 5], [2, 4], [3, 3], [2, 3.5], [3, 2]] as const) curve.add(step, value)
    expect([curve.steps, curve.values]).toEqual([[1, 2, 3], [5, 3.5, 2]])
    expect([curve.last, curve.best]).toEqual([{ step: 3, value: 2 }, { step: 3, value: 2 }])
    expect(new Curve().last).toBeNull()
    expect([curve.mean, new Curve().mean]).toEqual([3.5, 0])
  })

  it('stand on the same steps in a chart', () => {
    expect(aligned([{ steps: [1, 2, 4], values: [9, 8, 7] }, { steps: [0, 4], values: [3, 2] }])).toEqual([
      [0, 1, 2, 4],
      [null, 9, 8, 7],
      [3, null, null, 2],
    ])
  })
})

describe('a block of a job’s stream', () => {
  it('is an event, the job at its end, or a comment', () => {
    expect(newsOf('id: ftevent-1\ndata: {"id": "ftevent-1"}')).toEqual({ event: { id: 'ftevent-1' } })
    expect(newsOf('event: done\ndata: {"id": "ftjob-1"}')).toEqual({ job: { id: 'ftjob-1' } })
    expect(newsOf(': nothing new')).toBeNull()
  })
})
