// What a screen reader is told: whole sentences, now and then, never token by token.

class Announcer {
  text = $state('')

  say(text: string): void {
    this.text = text
  }
}

export const announcer = new Announcer()
