// Dark, light, or as the system has it.

const STORED = 'onebase.theme'
const THEMES = ['system', 'light', 'dark'] as const
export type Theme = (typeof THEMES)[number]

class ThemeChoice {
  value = $state<Theme>('system')

  start(): void {
    const stored = localStorage.getItem(STORED)
    this.set(THEMES.find((theme) => theme === stored) ?? 'system')
  }

  set(theme: Theme): void {
    this.value = theme
    localStorage.setItem(STORED, theme)
    if (theme === 'system') delete document.documentElement.dataset.theme
    else document.documentElement.dataset.theme = theme
  }

  /** To the next one. */
  turn(): void {
    this.set(THEMES[(THEMES.indexOf(this.value) + 1) % THEMES.length] ?? 'system')
  }
}

export const theme = new ThemeChoice()
