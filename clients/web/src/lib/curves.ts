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

  /** The mean of all; 0 where there is none. */
  get mean(): number {
    return this.values.reduce((sum, value) => sum + value, 0) / Math.max(1, this.values.length)
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
  const steps: number[] = []
  const columns: (number | null)[][] = curves.map(() => [])
  const at = curves.map(() => 0)
  // Each curve's steps are in order: one walk through all, since a run may have very many.
  for (;;) {
    let next = Infinity
    curves.forEach((curve, one) => (next = Math.min(next, curve.steps[at[one] ?? 0] ?? Infinity)))
    if (next === Infinity) return [steps, ...columns]
    steps.push(next)
    curves.forEach((curve, one) => {
      const index = at[one] ?? 0
      const here = curve.steps[index] === next
      columns[one]?.push(here ? (curve.values[index] ?? null) : null)
      if (here) at[one] = index + 1
    })
  }
}
