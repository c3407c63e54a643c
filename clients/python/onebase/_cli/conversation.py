"""The state of a chat: the turns so far, who answers, and the commands that change either."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Final

from .._client import Client
from ..types import AdapterWeight, Message, SamplingFields
from . import options
from .terminal import describe, note, show, speed

HELP: Final = """\
  /adapter NAME   let another adapter answer from here on; several NAME=WEIGHT mix them
  /adapter        say which one answers;  /adapter base: none, the base itself
  /adapters       list the adapters that the server has
  /system TEXT    set the instructions before the conversation; without TEXT, remove them
  /reset          forget the conversation, keep the adapter and the instructions
  /help           show this
  /quit           leave
  //TEXT          send a message that begins with a slash"""

BASE_WORDS: Final = ("base", "none")


class Conversation:
    """Turns a line that a person wrote into an answer on stdout, or into a change of what comes next."""

    def __init__(
        self,
        client: Client,
        adapter: str | tuple[AdapterWeight, ...] | None,
        system: str | None,
        sampling: SamplingFields,
    ) -> None:
        self._client = client
        self._adapter = adapter
        self._system = system
        self._sampling = sampling
        self._turns: list[Message] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/adapter": self._switch,
            "/adapters": self._list,
            "/system": self._instruct,
            "/reset": self._reset,
            "/help": lambda _: note(HELP),
        }

    @property
    def answering(self) -> str:
        """Who answers the next message."""
        return describe(self._adapter)

    def take(self, line: str, *, interruptible: bool = True) -> bool:
        """Answer one line, or obey it.

        Args:
            interruptible: Whether Ctrl-C ends only the answer.

        Returns:
            Whether to go on.

        Raises:
            OneBaseError: the message was not answered; the conversation is as it was before.
            ValueError: a command or an option is wrong.
        """
        line = line.strip()
        if not line:
            return True
        if line.startswith("//") or not line.startswith("/"):
            self._answer(line.removeprefix("/"), interruptible)
            return True
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            return False
        command = self._commands.get(word)
        if command is None:
            raise ValueError(
                f"There is no command {word}: /help lists them, //TEXT sends /TEXT as a message."
            )
        command(rest.strip())
        return True

    def _answer(self, text: str, interruptible: bool) -> None:
        question = Message("user", text)
        system = [Message("system", self._system)] if self._system else []
        stream = self._client.stream(
            messages=[*system, *self._turns, question], adapter=self._adapter, **self._sampling
        )
        try:
            with stream:
                for piece in stream:
                    show(piece.text)
            show("\n")
            if interruptible:
                note(f"({speed(stream.result)})")
        except KeyboardInterrupt:
            if not interruptible:
                raise
            note("\n(stopped)")
        if stream.text:
            self._turns += [question, Message("assistant", stream.text)]

    def _switch(self, names: str) -> None:
        if not names:
            note(f"answering: {self.answering}")
            return
        chosen = None if names in BASE_WORDS else options.adapter(names.split())
        if chosen is not None:
            self._check_known(chosen)
        self._adapter = chosen
        note(f"answering from here on: {self.answering}")

    def _check_known(self, chosen: str | tuple[AdapterWeight, ...]) -> None:
        """Raise ValueError now for a name that would fail at the next message."""
        known = [adapter.name for adapter in self._client.adapters.list()]
        wanted = [chosen] if isinstance(chosen, str) else [term.name for term in chosen]
        for name in wanted:
            if name.startswith("hub:"):
                continue  # the server may pull it on first use
            if name.partition("@")[0] not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else "/adapters lists them"
                raise ValueError(f"The server has no adapter {name!r}: {hint}")

    def _list(self, _: str) -> None:
        adapters = self._client.adapters.list()
        if not adapters:
            note("The server has no adapters. Give it some: onebase adapters push FOLDER --activate")
        for adapter in adapters:
            version = adapter.version
            state = f"rank {adapter.rank}, version {version[:12]}" if version else "not active"
            note(f"  {adapter.name}  ({state})")

    def _instruct(self, text: str) -> None:
        self._system = text or None
        note("instructions set" if text else "instructions removed")

    def _reset(self, _: str) -> None:
        self._turns.clear()
        note("conversation forgotten")
