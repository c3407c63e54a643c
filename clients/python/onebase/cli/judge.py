"""`onebase judge`: ask several adapters about one conversation, in one request."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

from .._sync.client import Client
from .._terminal.ui import Column, print_table
from ..judging_types import Judge, Judgement
from ..types import Message
from .command import FAILED, OK, add_sampling_options, parser, perform, plain, print_json, sampling_of

_DESCRIPTION: Final = """\
Ask several adapters about one conversation, in one request, and print a table with the answer of
each. The exit status is 1 if one of them has none.

The conversation is a JSON file with a list of messages, or with an object that has them as
`messages`; any other file is one message of the user.
"""
_EXAMPLES: Final = """\
  onebase judge talk.json --judge polite="Is the last answer polite?" --choice yes --choice no
  onebase judge talk.json --judges judges.json
  onebase judge --judge base="Is this a complaint?" --judge tickets < mail.txt
"""
_BASE: Final = "base"


def run(command: str, argv: list[str]) -> int:
    """Run the command. Gives its exit status."""
    made = _parser(command)
    args = made.parse_args(argv)
    try:
        messages, judges = _messages(args.conversation), _judges(args)
    except ValueError as error:
        made.error(str(error))

    def work(client: Client) -> int:
        judgements = client.judge(judges, messages=messages)
        if args.json:
            print_json([_as_json(one) for one in judgements])
        else:
            print_table(_COLUMNS, judgements)
        return FAILED if any(one.answer is None for one in judgements) else OK

    return perform(made, args, work)


def _parser(command: str) -> argparse.ArgumentParser:
    made = parser(command, _DESCRIPTION, _EXAMPLES)
    made.add_argument(
        "conversation",
        nargs="?",
        type=Path,
        metavar="FILE",
        help="the conversation (default: read from stdin)",
    )
    made.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help=f"an adapter, or `{_BASE}`, and what it is asked; without a text what the adapter itself asks",
    )
    made.add_argument(
        "--judges",
        type=Path,
        metavar="FILE",
        help="a JSON list of judges: objects with `adapter`, `instruction`, `name`, and sampling fields as "
        "`temperature`, `max_tokens`, `choices` and `schema`",
    )
    made.add_argument("--json", action="store_true", help="print the result as JSON")
    add_sampling_options(
        made.add_argument_group("answer of each judge that does not say otherwise"), forms=True
    )
    return made


def _messages(file: Path | None) -> list[Message | dict[str, Any]]:
    text = _text_of(file)
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    if isinstance(found, dict) and "messages" in found:
        found = found["messages"]
    if isinstance(found, list) and found and all(isinstance(one, dict) for one in found):
        return found
    if not text.strip():
        raise ValueError("the conversation is empty")
    return [Message("user", text)]


def _text_of(file: Path | None) -> str:
    if file is None:
        if sys.stdin.isatty():
            raise ValueError("give a file with the conversation, or pipe it into the command")
        return sys.stdin.read()
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _judges(args: argparse.Namespace) -> list[Judge]:
    sampling = sampling_of(args)
    judges: list[Any] = [_named(one) for one in args.judge]
    if args.judges is not None:
        try:
            listed = json.loads(_text_of(args.judges))
        except json.JSONDecodeError as error:
            raise ValueError(f"--judges: {args.judges} is not JSON: {error}") from error
        if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
            raise ValueError(f"--judges: {args.judges} must hold a list of objects")
        judges += listed
    if not judges:
        raise ValueError("give at least one --judge NAME=TEXT, or --judges FILE")
    for unknown in sorted({name for one in judges for name in one} - _FIELDS):
        near = difflib.get_close_matches(unknown, _FIELDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(_FIELDS))}"
        raise ValueError(f"--judges: unknown field {unknown!r}; {hint}")
    return [cast(Judge, {**_defaults_for(one, sampling), **one}) for one in judges]


_FIELDS: Final = Judge.__required_keys__ | Judge.__optional_keys__
_FORMS: Final = frozenset({"schema", "regex", "choices", "grammar"})
"""Fields that say what an answer must be, of which a judge has one."""


def _defaults_for(judge: Mapping[str, object], sampling: Mapping[str, object]) -> dict[str, object]:
    """Return the fields of the options that a judge leaves open."""
    left_out = _FORMS if _FORMS & judge.keys() else frozenset()
    return {name: value for name, value in sampling.items() if name not in left_out}


def _named(given: str) -> dict[str, str | None]:
    name, separator, text = given.partition("=")
    judge: dict[str, str | None] = {"adapter": None if name == _BASE else name}
    return {**judge, "instruction": text} if separator else judge


def _as_json(one: Judgement) -> dict[str, Any]:
    made: dict[str, Any] = {"name": one.name, "index": one.index}
    if one.answer is not None:
        answer = plain(one.answer)
        del answer["schema"]
        return {**made, "answer": answer}
    error = one.error
    return {**made, "error": {"message": error and error.message, "status": error and error.status}}


def _shown(one: Judgement) -> str:
    return f"error: {one.error}" if one.answer is None else " ".join(one.answer.text.split())


_COLUMNS: Final[tuple[Column[Judgement], ...]] = (
    Column("judge", lambda one: one.name, shrink=True),
    Column("answer", _shown, shrink=True),
    Column(
        "prompt", lambda one: "" if one.answer is None else f"{one.answer.usage.prompt_tokens:,}", right=True
    ),
    Column(
        "cached", lambda one: "" if one.answer is None else f"{one.answer.usage.cached_tokens:,}", right=True
    ),
    Column(
        "tokens",
        lambda one: "" if one.answer is None else f"{one.answer.usage.completion_tokens:,}",
        right=True,
    ),
)
