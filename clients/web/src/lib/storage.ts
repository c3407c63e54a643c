// What stays in this browser: lists of plain objects. Nothing of it is a secret; the key is elsewhere.

/** The list under a name, without what is none of `fits`. */
export function load<T>(name: string, fits: (one: unknown) => one is T): T[] {
  try {
    const found: unknown = JSON.parse(localStorage.getItem(name) ?? '[]')
    return Array.isArray(found) ? found.filter(fits) : []
  } catch {
    return []
  }
}

/** Whether there was room. */
export function keep(name: string, list: unknown[]): boolean {
  try {
    localStorage.setItem(name, JSON.stringify(list))
    return true
  } catch {
    return false
  }
}

/** Call `changed` when another tab has changed the list. */
export function onOtherTab(name: string, changed: () => void): void {
  window.addEventListener('storage', ({ key }) => (key === name || key === null) && changed())
}

/** Have the browser save a text, or what is in memory already, as a file. */
export function download(name: string, text: string | Blob, type: string): void {
  const address = URL.createObjectURL(new Blob([text], { type }))
  const link = document.createElement('a')
  link.href = address
  link.download = name
  link.click()
  setTimeout(() => URL.revokeObjectURL(address), 10_000)
}
