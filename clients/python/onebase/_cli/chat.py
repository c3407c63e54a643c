"""`onebase chat`: a conversation in the terminal, or through a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from .._client import Client
from ..errors import OneBaseError
from . import options
from .conversation import HELP, Conversation
from .exits import FAILED, OK, explain, report
from .terminal import note

_DESCRIPTION = f"""\
Have a conversation with the base, or with an adapter on it. The adapter can be changed at any time;
the conversation goes on.

inside the conversation:
{HELP}

Ctrl-C stops an answer, Ctrl-D leaves. Through a pipe, each line of stdin is one message, and only the
answers go to stdout.
"""
_EXAMPLES = """\
  onebase chat
  onebase chat --adapter acme-support --system "Be brief"
  printf 'Hello\\n/adapter pirate\\nAgain, please\\n' | onebase chat --temperature 0
"""


def run(argv: list[str]) -> int:
    """Run the command; gives its exit status."""
    parser = options.parser("chat", _DESCRIPTION, _EXAMPLES)
    options.add_answer_options(parser)
    args = parser.parse_args(argv)
    try:
        client, adapter = options.client(args), options.adapter(args.adapter)
    except ValueError as error:
        parser.error(str(error))
    with client:
        conversation = Conversation(client, adapter, args.system, options.sampling(args))
        return _interactive(client, conversation) if sys.stdin.isatty() else _piped(client, conversation)


def _interactive(client: Client, conversation: Conversation) -> int:
    """Talk until the person leaves; a failed message is reported and the conversation goes on."""
    try:
        _greet(client)
    except OneBaseError as error:
        return report(error, client.url)
    for line in _lines(conversation):
        try:
            if not conversation.take(line):
                break
        except OneBaseError as error:
            note(explain(error, client.url)[0])
        except ValueError as error:
            note(str(error))
    return OK


def _piped(client: Client, conversation: Conversation) -> int:
    """Take each line of stdin; the first failure ends it, so that a script notices."""
    for line in sys.stdin:
        try:
            if not conversation.take(line.rstrip("\r\n"), interruptible=False):
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
    note(f"Talking to {base} at {client.url}. Adapters: {', '.join(names) or 'none'}.")
    note("/adapter NAME changes the adapter, /help shows more, Ctrl-D leaves.")


def _lines(conversation: Conversation) -> Iterator[str]:
    """What the person types, until Ctrl-D."""
    with contextlib.suppress(ImportError):  # not on every platform
        import readline  # noqa: F401  (gives input() its line editing and history)
    while True:
        try:
            yield input(f"{conversation.answering}> ")
        except KeyboardInterrupt:
            note("\n(Ctrl-D or /quit leaves)")
        except EOFError:
            note("")
            return
