"""`onebase generate`: answer one prompt, streamed to the terminal."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from .._client import Client
from .._streaming import Stream
from ..errors import OneBaseError
from ..types import Message
from . import options
from .exits import OK, report
from .terminal import note, show, speed

_DESCRIPTION = """\
Answer one prompt. The answer goes to stdout as it is written, a line about its speed to stderr.

The prompt is put to the model as a message from you, laid out by the base's chat template;
with --raw the model just continues the text.
"""
_EXAMPLES = """\
  onebase generate "What is the capital of France?"
  onebase generate --adapter acme-support "My parcel is late"
  onebase generate --raw --max-tokens 40 "Once upon a time"
  git diff | onebase generate --system "Summarize this change"
"""


def run(argv: list[str]) -> int:
    """Run the command; gives its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    prompt = _prompt(args, parser)
    try:
        client = options.client(args)
        stream = _open(client, args, prompt)
    except ValueError as error:
        parser.error(str(error))
    with client:
        try:
            return _print_json(stream) if args.json else _print_stream(stream)
        except OneBaseError as error:
            if stream.text:
                show("\n")
            return report(error, client.url)


def _parser() -> argparse.ArgumentParser:
    parser = options.parser("generate", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("prompt", nargs="?", help="what to ask (default: read from stdin)")
    parser.add_argument("--raw", action="store_true", help="continue the text, without the chat template")
    parser.add_argument(
        "--json", action="store_true", help="print the whole result as JSON when it is complete"
    )
    options.add_answer_options(parser)
    return parser


def _prompt(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    if args.raw and args.system is not None:
        parser.error("--system has no place in --raw text: put it into the prompt")
    if args.prompt is not None:
        return str(args.prompt)
    if sys.stdin.isatty():
        parser.error('give a prompt, such as: onebase generate "Tell me a joke"')
    return sys.stdin.read()


def _open(client: Client, args: argparse.Namespace, prompt: str) -> Stream:
    adapter, sampling = options.adapter(args.adapter), options.sampling(args)
    if args.raw:
        return client.stream(prompt, adapter=adapter, **sampling)
    system = [Message("system", args.system)] if args.system is not None else []
    return client.stream(messages=[*system, Message("user", prompt)], adapter=adapter, **sampling)


def _print_stream(stream: Stream) -> int:
    with stream:
        for piece in stream:
            show(piece.text)
    if not stream.text.endswith("\n"):
        show("\n")
    note(speed(stream.result))
    return OK


def _print_json(stream: Stream) -> int:
    with stream:
        print(json.dumps(dataclasses.asdict(stream.read()), ensure_ascii=False))
    return OK
