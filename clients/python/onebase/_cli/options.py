"""Options that the commands share, and what they mean for the SDK."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import cast

from .._client import Client
from .._config import Timeout
from ..types import AdapterWeight, SamplingFields

_SAMPLING: tuple[tuple[str, type, str, str], ...] = (
    ("temperature", float, "T", "0 always takes the likeliest word; higher is more varied (default: 1)"),
    ("top-p", float, "P", "choose among the likeliest tokens that together have this probability"),
    ("top-k", int, "K", "choose among the K likeliest tokens only"),
    ("min-p", float, "P", "drop tokens less likely than this fraction of the likeliest one"),
    ("repetition-penalty", float, "X", "above 1 discourages repetition"),
    ("max-tokens", int, "N", "stop after N tokens (default: 256)"),
    ("seed", int, "N", "the same seed gives the same answer"),
)


def parser(command: str, description: str, examples: str = "") -> argparse.ArgumentParser:
    """A parser for one command, with the options that say which server."""
    made = argparse.ArgumentParser(
        prog=f"onebase {command}",
        description=description,
        epilog=f"examples:\n{examples}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = made.add_argument_group("server")
    group.add_argument("--url", help="where the server is (default: $ONEBASE_URL, or http://127.0.0.1:8000)")
    group.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="the longest silence to bear (default: 600)"
    )
    return made


def add_answer_options(made: argparse.ArgumentParser) -> None:
    """The options that say who answers, and how."""
    group = made.add_argument_group("answer")
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME",
        help="the adapter that answers: NAME or NAME@VERSION. NAME=WEIGHT, given several times, mixes "
        "them (default: none, the base itself)",
    )
    group.add_argument("--system", metavar="TEXT", help="instructions that come before the conversation")
    for name, kind, metavar, text in _SAMPLING:
        group.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the answer before this text; may be repeated"
    )


def sampling(args: argparse.Namespace) -> SamplingFields:
    """The sampling fields that were given."""
    names = [name.replace("-", "_") for name, *_ in _SAMPLING] + ["stop"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return cast(SamplingFields, given)


def adapter(terms: Sequence[str]) -> str | tuple[AdapterWeight, ...] | None:
    """What `--adapter` says: nothing, one name, or names with weights.

    Raises:
        ValueError: a weight is not a number.
    """
    if not terms:
        return None
    if len(terms) == 1 and "=" not in terms[0]:
        return terms[0]
    return tuple(_term(term) for term in terms)


def _term(term: str) -> AdapterWeight:
    name, _, weight = term.partition("=")
    try:
        return AdapterWeight(name, float(weight or 1.0))
    except ValueError as error:
        raise ValueError(f"adapter: write NAME=WEIGHT, such as acme=0.7, not {term!r}") from error


def client(args: argparse.Namespace) -> Client:
    """A client for the server that the options name.

    Raises:
        ValueError: the URL or the timeout is wrong.
    """
    return Client(args.url, timeout=Timeout() if args.timeout is None else args.timeout)
