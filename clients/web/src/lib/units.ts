// Figures for people. All take what the server sends: bytes, seconds, Unix seconds.

const BYTES = ['B', 'kB', 'MB', 'GB', 'TB', 'PB']

/** `7.4 MB`, in thousands as the server's options are. */
export function bytes(value: number): string {
  // What would be shown as 1000 is 1.0 of the next.
  const step = Math.min(BYTES.length - 1, value < 999.5 ? 0 : Math.floor(Math.log10(value * (1000 / 999.5)) / 3))
  const shown = value / 1000 ** step
  return `${shown < 9.95 && step ? shown.toFixed(1) : Math.round(shown)} ${BYTES[step]}`
}

/** `1,843,200`. */
export const count = (value: number): string => value.toLocaleString('en')

/** `1 version`, `2 versions`. */
export const many = (value: number, one: string, more = `${one}s`): string => `${count(value)} ${value === 1 ? one : more}`

/** `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`. */
export function duration(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds))
  if (whole < 60) return seconds > 0 && seconds < 10 ? `${seconds.toFixed(1)} s` : `${whole} s`
  const units: [number, string][] = [[86400, 'd'], [3600, 'h'], [60, 'min'], [1, 's']]
  const at = units.findIndex(([size]) => whole >= size)
  return units
    .slice(at, at + 2)
    .map(([size, name], index) => [Math.floor((index ? whole % (units[at]?.[0] ?? 1) : whole) / size), name] as const)
    .filter(([value]) => value)
    .map(([value, name]) => `${value} ${name}`)
    .join(' ')
}

/** `28 Nov 2026, 12:34`, where the reader is. */
export const when = (at: number): string => new Date(at * 1000).toLocaleString('en-GB', { dateStyle: 'medium', timeStyle: 'short' })

/** `just now`, `5 min ago`, `3 d 4 h ago`. */
export function ago(at: number, now = Date.now() / 1000): string {
  const passed = now - at
  return passed < 45 ? 'just now' : `${duration(passed < 3600 ? Math.round(passed / 60) * 60 : passed)} ago`
}

/** `12 ms`, `1.5 s`, `–`. */
export const milliseconds = (seconds: number | null | undefined): string =>
  seconds === null || seconds === undefined ? '–' : seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${figure(seconds)} s`

/** Three digits that count: `0.0314`, `3.14`, `0.000012`. */
export function figure(value: number): string {
  if (value === 0) return '0'
  const size = Math.abs(value)
  if (size >= 1e6 || size < 1e-4) return value.toExponential(1)
  return String(Number(value.toPrecision(3)))
}

/** `3.1%`. */
export const percent = (part: number): string => `${figure(part * 100)}%`

/** `3.1%`, `<0.1%`. */
export const share = (part: number): string => (part > 0 && part < 0.001 ? '<0.1%' : `${Number((part * 100).toFixed(1))}%`)
