"""`onebase generate`: answer one prompt, streamed to the terminal."""

from __future__ import annotations

import argparse
import json
import sys

from .._sync.client import Client
from .._sync.streams import Stream
from .._terminal.ui import note, show, show_pieces, speed
from ..errors import OneBaseError
from ..types import Message
from .command import OK, adapter_of, add_answer_options, client_of, parser, plain, report, sampling_of

_DESCRIPTION = """\
Answer one prompt. The answer goes to stdout as it is written, a line about its speed to stderr.

The prompt is your message in a conversation, laid out by the base's chat template. With --raw the
model continues the text as it is.
"""
_EXAMPLES = """\
  onebase generate "What is the capital of France?"
  onebase generate --adapter acme-support "My parcel is late"
  onebase generate --raw --max-tokens 40 "Once upon a time"
  git diff | onebase generate --system "Summarize this change"
  onebase generate --choice urgent --choice "can wait" "My parcel is late"
"""


def run(command: str, argv: list[str]) -> int:
    """Run the command. Gives its exit status."""
    made = _parser(command)
    args = made.parse_args(argv)
    prompt = _prompt(args, made)
    try:
        client = client_of(args)
        stream = _open(client, args, prompt)
    except ValueError as error:
        made.error(str(error))
    with client:
        try:
            return _print_json(stream) if args.json else _print_stream(stream)
        except OneBaseError as error:
            if stream.text:
                show("\n")
            return report(error, client.url)


def _parser(command: str) -> argparse.ArgumentParser:
    made = parser(command, _DESCRIPTION, _EXAMPLES)
    made.add_argument("prompt", nargs="?", help="what to ask (default: read from stdin)")
    made.add_argument("--raw", action="store_true", help="continue the text, without the chat template")
    made.add_argument("--json", action="store_true", help="print the result as JSON")
    add_answer_options(made, forms=True)
    return made


def _prompt(args: argparse.Namespace, made: argparse.ArgumentParser) -> str:
    if args.raw and args.system is not None:
        made.error("--system does not go with --raw: put it into the prompt")
    if args.prompt is not None:
        return str(args.prompt)
    if sys.stdin.isatty():
        made.error('give a prompt, such as: onebase generate "Tell me a joke"')
    prompt = sys.stdin.read()
    if not prompt.strip():
        made.error("there is no prompt on stdin: pipe a text into it, or give it as an argument")
    return prompt


def _open(client: Client, args: argparse.Namespace, prompt: str) -> Stream:
    adapter, sampling = adapter_of(args.adapter), sampling_of(args)
    if args.raw:
        return client.stream(prompt, adapter=adapter, **sampling)
    system = [Message("system", args.system)] if args.system is not None else []
    return client.stream(messages=[*system, Message("user", prompt)], adapter=adapter, **sampling)


def _print_stream(stream: Stream) -> int:
    with stream:
        show_pieces(stream)
    if not stream.text.endswith("\n"):
        show("\n")
    note(speed(stream.result))
    return OK


def _print_json(stream: Stream) -> int:
    with stream:
        answer = plain(stream.read())
    del answer["schema"]
    print(json.dumps(answer, ensure_ascii=False))
    return OK
