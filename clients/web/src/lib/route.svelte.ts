// What the address says behind `#`: a view, and what it shows. `#/compare?m=Hello`.

class Route {
  view = $state('')
  params = $state.raw(new URLSearchParams())
  /** What this page wrote itself, and need not read. */
  #written = ''

  start(): void {
    window.addEventListener('hashchange', () => location.hash === this.#written || this.#read())
    this.#read()
  }

  /** Say in the address what the view shows, without a step in the history. */
  replace(params: URLSearchParams): void {
    const query = params.toString()
    this.#written = `#/${this.view}${query ? `?${query}` : ''}`
    history.replaceState(null, '', this.#written)
  }

  go(view: string): void {
    if (view !== this.view) location.hash = `#/${view}`
  }

  #read(): void {
    this.#written = ''
    const [path = '', query = ''] = location.hash.replace(/^#\/?/, '').split(/\?(.*)/s)
    this.view = path
    this.params = new URLSearchParams(query)
  }
}

export const route = new Route()
