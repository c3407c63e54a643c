// The figures of a run by step, as its events tell them, and as charts take them.

export interface Point {
  step: number
  value: number
}

/** Figures by step. A run that goes on from a checkpoint does steps again: then the new ones count. */
export class Curve {
  readonly steps: number[] = []
  readonly values: number[] = []

  add(step: number, value: number): void {
    while (this.steps.length && (this.steps.at(-1) ?? 0) >= step) {
      this.steps.pop()
      this.values.pop()
    }
    this.steps.push(step)
    this.values.push(value)
  }

  get last(): Point | null {
    const step = this.steps.at(-1)
    return step === undefined ? null : { step, value: this.values.at(-1) ?? NaN }
  }

  get best(): Point | null {
    let best: Point | null = null
    this.values.forEach((value, at) => {
      if (!best || value < best.value) best = { step: this.steps[at] ?? 0, value }
    })
    return best
  }
}

/** Curves on the same steps: `[steps, values of the first, ...]`, null where one has none. */
export function aligned(curves: Pick<Curve, 'steps' | 'values'>[]): [number[], ...(number | null)[][]] {
  const steps = [...new Set(curves.flatMap((curve) => curve.steps))].sort((one, two) => one - two)
  const at = new Map(steps.map((step, index) => [step, index]))
  const columns = curves.map((curve) => {
    const column = new Array<number | null>(steps.length).fill(null)
    curve.steps.forEach((step, index) => (column[at.get(step) ?? 0] = curve.values[index] ?? null))
    return column
  })
  return [steps, ...columns]
}
