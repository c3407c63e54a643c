// What the address says behind `#`: a view, and what it shows. `#/compare?m=Hello`.

class Route {
  view = $state('')
  params = $state.raw(new URLSearchParams())
  /** What was read or written last. Where the address is another, a link was followed that is about to be read. */
  #known = ''

  start(): void {
    window.addEventListener('hashchange', () => location.hash === this.#known || this.#read())
    this.#read()
  }

  /** Say in the address what the view shows, without a step in the history. */
  replace(params: URLSearchParams): void {
    if (location.hash !== this.#known) return
    const query = params.toString()
    history.replaceState(null, '', `#/${this.view}${query ? `?${query}` : ''}`)
    this.#known = location.hash
  }

  go(view: string): void {
    if (view !== this.view) location.hash = `#/${view}`
  }

  #read(): void {
    this.#known = location.hash
    const [path = '', query = ''] = location.hash.replace(/^#\/?/, '').split(/\?(.*)/s)
    this.view = path
    this.params = new URLSearchParams(query)
  }
}

export const route = new Route()
