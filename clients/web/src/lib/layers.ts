// Where an adapter acts: its modules by layer and by what they are called in one, with the norm of what they add.
import type { Schemas } from '../api/client'

export type Report = NonNullable<Schemas['VersionAnswer']['report']>
/** `relative`: by the norm of the base's weight. */
export type Measure = 'relative' | 'norm'

export interface Place {
  norm: number
  relative: number | null
  /** The largest, where several modules (experts) are one place; 0 for what has none. */
  rank: number
}

export interface Picture {
  layers: number
  /** What the modules are called within a layer. */
  rows: string[]
  /** By row and layer. */
  places: Map<string, Place>
  /** What is in no layer, by its whole name: the embedding, the head. */
  outside: Map<string, Place>
}

const IN_LAYER = /\.(\d+)\.(.+)$/

export const key = (row: string, layer: number): string => `${layer}.${row}`

/** The picture of a version by its report. */
export function pictureOf(report: Pick<Report, 'modules'> & Partial<Pick<Report, 'base_layers' | 'base_linears'>>): Picture {
  const rows = new Set(report.base_linears ?? [])
  const inside = new Map<string, Report['modules']>()
  const outside = new Map<string, Report['modules']>()
  let layers = report.base_layers ?? 0
  for (const module of report.modules) {
    const found = IN_LAYER.exec(firstNumber(module.name))
    if (!found) {
      outside.set(module.name, [module])
      continue
    }
    const row = (found[2] ?? '').split('.').filter((part) => !/^\d+$/.test(part)).join('.')
    const layer = Number(found[1])
    rows.add(row)
    layers = Math.max(layers, layer + 1)
    const at = key(row, layer)
    inside.set(at, [...(inside.get(at) ?? []), module])
  }
  const placed = (of: Map<string, Report['modules']>) => new Map([...of].map(([at, modules]) => [at, placeOf(modules)]))
  return { layers, rows: [...rows], places: placed(inside), outside: placed(outside) }
}

/** The name from the number of the layer on, which is the first number in it. */
function firstNumber(name: string): string {
  const at = name.search(/\.\d+\./)
  return at < 0 ? '' : name.slice(at)
}

/** Modules taken as one: their matrices next to each other. */
function placeOf(modules: Report['modules']): Place {
  const sum = (values: number[]) => Math.sqrt(values.reduce((all, value) => all + value * value, 0))
  const norm = sum(modules.map((module) => module.norm))
  const known = modules.filter((module) => module.relative_norm)
  const base = sum(known.map((module) => module.norm / (module.relative_norm ?? 1)))
  const unknown = known.length < modules.length && modules.some((module) => module.relative_norm === null)
  return { norm, relative: unknown ? null : base ? norm / base : 0, rank: Math.max(...modules.map((module) => module.rank)) }
}

/** 0 for what is not adapted; null where it is, and the figure is not known. */
export const valueOf = (place: Place | undefined, measure: Measure): number | null => (place ? place[measure] : 0)

/** The largest value, of places in layers. */
export function largest(picture: Picture, measure: Measure): number {
  let most = 0
  for (const place of picture.places.values()) most = Math.max(most, place[measure] ?? 0)
  return most
}

/** Two pictures on the same layers and rows. */
export function together(one: Picture, other: Picture): [Picture, Picture] {
  const same = { layers: Math.max(one.layers, other.layers), rows: [...new Set([...one.rows, ...other.rows])] }
  return [{ ...one, ...same }, { ...other, ...same }]
}

/** What the picture shows, in a sentence or two. */
export function inWords(picture: Picture, measure: Measure): string {
  const acting = [...picture.places].filter(([, place]) => place.norm > 0)
  if (!acting.length) return picture.outside.size ? 'It changes no layer.' : 'It changes nothing.'
  const layers = new Set(acting.map(([at]) => at.split('.', 1)[0]))
  const rows = new Set(acting.map(([at]) => at.slice(at.indexOf('.') + 1)))
  const [most, place] = acting.reduce((best, each) => ((each[1][measure] ?? 0) > (best[1][measure] ?? 0) ? each : best))
  const dot = most.indexOf('.')
  const where = `${most.slice(dot + 1)} of layer ${most.slice(0, dot)}`
  return `It acts in ${layers.size} of ${picture.layers} layers, on ${rows.size} of ${picture.rows.length} modules of a layer; most on ${where} (${shown(place[measure], measure)}).`
}

/** A value for people. */
export function shown(value: number | null, measure: Measure): string {
  if (value === null) return 'not known'
  if (measure === 'norm') return `norm ${Number(value.toPrecision(3))}`
  return `${Number((value * 100).toPrecision(2))}% of the base’s weight`
}
