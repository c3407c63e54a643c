"""`onebase chat`: a conversation in the terminal, or through a pipe."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Callable, Iterator
from typing import Final

from .._sync.client import Client
from .._terminal.ui import describe, note, show, show_pieces, speed
from ..errors import OneBaseError
from ..types import AdapterWeight, Message, SamplingFields
from .command import (
    FAILED,
    OK,
    adapter_of,
    add_answer_options,
    client_of,
    explain,
    parser,
    report,
    sampling_of,
)

HELP: Final = """\
  /adapter NAME   change the adapter; several NAME=WEIGHT make a weighted sum
  /adapter base   change to the base itself
  /adapter        show which adapter answers
  /adapters       list the server's adapters
  /system TEXT    set the instructions before the conversation; without TEXT, remove them
  /temperature T  choose words more boldly or less, from 0 to 2; without T, show how
  /reset          forget the conversation, keep the adapter and the instructions
  /help           show this
  /quit           leave
  //TEXT          send a message that begins with a slash"""

BASE_WORDS: Final = ("base", "none")
TEMPERATURE: Final = 0.7
"""Unless it is given: at 1 a small base loses its thread in a conversation."""
HOTTEST: Final = 2.0
_MOST_NAMES: Final = 10
"""Names of adapters in the greeting."""

_DESCRIPTION = f"""\
Have a conversation with the base or with an adapter on it. The adapter can be changed at any
time; the conversation continues. The temperature is {TEMPERATURE} unless --temperature says otherwise.

inside the conversation:
{HELP}

A line that ends with a backslash goes on in the next. Ctrl-C stops an answer, Ctrl-D leaves.
Through a pipe, each line of stdin is one message, and stdout gets only the answers.
"""
_EXAMPLES = """\
  onebase chat
  onebase chat --adapter acme-support --system "Be brief"
  printf 'Hello\\n/adapter pirate\\nAgain, please\\n' | onebase chat --temperature 0
"""


def run(command: str, argv: list[str]) -> int:
    """Run the command. Gives its exit status."""
    made = parser(command, _DESCRIPTION, _EXAMPLES)
    add_answer_options(made)
    args = made.parse_args(argv)
    try:
        client, adapter, sampling = client_of(args), adapter_of(args.adapter), sampling_of(args)
    except ValueError as error:
        made.error(str(error))
    with client:
        conversation = Conversation(client, adapter, args.system, sampling)
        return _interactive(client, conversation) if sys.stdin.isatty() else _piped(client, conversation)


def _interactive(client: Client, conversation: Conversation) -> int:
    """Answer until the person leaves. A failed message is reported, and the conversation continues."""
    try:
        _greet(client)
    except OneBaseError as error:
        return report(error, client.url)
    for line in _lines(conversation):
        try:
            if not conversation.handle_line(line):
                break
        except OneBaseError as error:
            note(explain(error, client.url)[0])
        except ValueError as error:
            note(str(error))
    return OK


def _piped(client: Client, conversation: Conversation) -> int:
    """Answer each line of stdin. The first failure ends it, so that a script notices."""
    for line in sys.stdin:
        try:
            if not conversation.handle_line(line.rstrip("\r\n"), interruptible=False):
                break
        except OneBaseError as error:
            return report(error, client.url)
        except ValueError as error:
            note(f"onebase: {error}")
            return FAILED
    return OK


def _greet(client: Client) -> None:
    once = client.with_options(max_retries=0)
    names = [adapter.name for adapter in once.adapters.list()]
    base = next((model.id for model in once.models.list() if model.id not in names), "the base")
    more = f" and {len(names) - _MOST_NAMES} more (/adapters)" if len(names) > _MOST_NAMES else ""
    note(f"Talking to {base} at {client.url}. Adapters: {', '.join(names[:_MOST_NAMES]) or 'none'}{more}.")
    note("/adapter NAME changes the adapter, /help shows more, Ctrl-D leaves.")


def _lines(conversation: Conversation) -> Iterator[str]:
    """Yield the person's input until Ctrl-D. Lines that end with a backslash are joined with the next."""
    with contextlib.suppress(ImportError):  # not on every platform
        import readline  # noqa: F401  (gives input() its line editing and history)
    while True:
        try:
            text = input(f"{conversation.answering}> ")
            while text.endswith("\\"):
                text = f"{text[:-1]}\n{input('... ')}"
            yield text
        except KeyboardInterrupt:
            note("\n(Ctrl-D or /quit leaves)")
        except EOFError:
            note("")
            return


class Conversation:
    """The turns so far, the adapter that answers next, and the commands that change either."""

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
        self._sampling: SamplingFields = {"temperature": TEMPERATURE, **sampling}
        self._turns: list[Message] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/adapter": self._switch,
            "/adapters": self._list,
            "/system": self._instruct,
            "/temperature": self._heat,
            "/reset": self._reset,
            "/help": lambda _: note(HELP),
        }

    @property
    def answering(self) -> str:
        """The adapter that answers the next message, or `base`."""
        return describe(self._adapter)

    def handle_line(self, line: str, *, interruptible: bool = True) -> bool:
        """Answer a message, or carry out a command.

        Args:
            interruptible: Whether Ctrl-C ends only the answer.

        Returns:
            Whether the conversation continues.

        Raises:
            OneBaseError: the message was not answered. The conversation is as it was before.
            ValueError: a command or an option is wrong.
        """
        line = line.strip()
        if not line:
            return True
        if line.startswith("//") or not line.startswith("/"):
            self._answer(line.removeprefix("/"), interruptible)
            return True
        word, *rest = line.split(maxsplit=1)
        if word in ("/quit", "/exit"):
            return False
        command = self._commands.get(word)
        if command is None:
            raise ValueError(
                f"There is no command {word}: /help lists them, //TEXT sends /TEXT as a message."
            )
        command("".join(rest))
        return True

    def _answer(self, text: str, interruptible: bool) -> None:
        question = Message("user", text)
        system = [Message("system", self._system)] if self._system else []
        stream = self._client.stream(
            messages=[*system, *self._turns, question], adapter=self._adapter, **self._sampling
        )
        try:
            with stream:
                show_pieces(stream)
            show("\n")
            if interruptible:
                note(f"({speed(stream.result)})")
        except KeyboardInterrupt:
            if not interruptible:
                raise
            note("\n(stopped)")
        except OneBaseError:
            if stream.text:
                note("")  # what went wrong begins a line
            raise
        if stream.text:
            self._turns += [question, Message("assistant", stream.text)]

    def _switch(self, names: str) -> None:
        if not names:
            note(f"answering: {self.answering}")
            return
        chosen = None if names in BASE_WORDS else adapter_of(names.split())
        if chosen is not None:
            self._check_known(chosen)
        self._adapter = chosen
        note(f"answering from now on: {self.answering}")

    def _check_known(self, chosen: str | tuple[AdapterWeight, ...]) -> None:
        """Raise ValueError for a name that would fail at the next message."""
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
            note("The server has no adapters. Send it one: onebase adapters push FOLDER --activate")
        for adapter in adapters:
            version = adapter.version
            state = f"rank {adapter.rank}, version {version[:12]}" if version else "not active"
            note(f"  {adapter.name}  ({state})")

    def _instruct(self, text: str) -> None:
        self._system = text or None
        note("instructions set" if text else "instructions removed")

    def _heat(self, text: str) -> None:
        if text:
            try:
                temperature = float(text)
            except ValueError:
                temperature = -1.0
            if not 0 <= temperature <= HOTTEST:
                raise ValueError(f"{text!r} is no temperature: give a number from 0 to {HOTTEST:g}")
            self._sampling["temperature"] = temperature
        note(f"temperature: {self._sampling['temperature']:g}")

    def _reset(self, _: str) -> None:
        self._turns.clear()
        note("conversation forgotten")
