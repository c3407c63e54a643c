"""Parts that the commands share: options and the client made of them, actions, failures, exit statuses."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from onebase_protocol.command_line import OptionParser

from .._core.config import Timeout
from .._sync.client import Client
from ..errors import (
    APIConnectionError,
    APITimeoutError,
    AuthenticationError,
    ConflictError,
    NotFoundError,
    OneBaseError,
)
from ..types import AdapterWeight, SamplingFields

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
NO_SERVER: Final = 3
INTERRUPTED: Final = 130

# ---- options -----------------------------------------------------------------------------------------

_SAMPLING: tuple[tuple[str, type, str, str], ...] = (
    ("temperature", float, "T", "0 always takes the likeliest word; higher is more varied (default: 1)"),
    (
        "top-p",
        float,
        "P",
        "choose among the likeliest tokens of this total probability (default: 1, all)",
    ),
    ("top-k", int, "K", "choose among the K likeliest tokens only (default: 0, all)"),
    (
        "min-p",
        float,
        "P",
        "drop tokens below this fraction of the likeliest one (default: 0, none)",
    ),
    ("repetition-penalty", float, "X", "above 1 discourages repetition (default: 1)"),
    ("max-tokens", int, "N", "stop after N tokens (default: 256)"),
    ("seed", int, "N", "the same seed gives the same answer (default: a new seed for each answer)"),
)


def parser(command: str, description: str, examples: str = "") -> argparse.ArgumentParser:
    """Return a parser for one command, with the options that name the server."""
    made = OptionParser(
        prog=f"onebase {command}",
        description=description,
        epilog=f"examples:\n{examples}" if examples else None,
    )
    add_server_options(made)
    return made


def add_server_options(made: argparse.ArgumentParser) -> None:
    """Add the options that say where the server is, who asks it, and for how long it is waited for."""
    group = made.add_argument_group("server")
    group.add_argument("--url", help="where the server is (default: $ONEBASE_URL, or http://127.0.0.1:8000)")
    group.add_argument(
        "--key",
        help="the API key that is sent (default: $ONEBASE_API_KEY, which others on this machine do not see)",
    )
    group.add_argument(
        "--timeout", type=seconds, metavar="SECONDS", help="how long the server may be silent (default: 600)"
    )


def seconds(text: str) -> float:
    """Return the value of an option that takes a time: a number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")


def count(text: str) -> int:
    """Return the value of an option that takes a whole number above 0."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")


_UNITS: Final = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def moment(text: str) -> float:
    """Return the Unix seconds of an option that takes a time: a date, or how long ago."""
    number, unit = text[:-1], text[-1:]
    if unit in _UNITS and number.isdecimal():
        return max(0.0, time.time() - int(number) * _UNITS[unit])
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no time: say 12h, 7d or 2026-11-01") from None


def price(text: str) -> tuple[float, float]:
    """Return the value of an option that takes dollars for a million tokens, sent and answered."""
    try:
        sent, answered = (float(part) for part in text.split("/"))
    except ValueError:
        sent = answered = -1.0
    if not (0 <= sent < float("inf") and 0 <= answered < float("inf")):
        raise argparse.ArgumentTypeError(f"{text!r} is not IN/OUT, two prices in dollars such as 3.75/15")
    return sent, answered


def dollars(price: tuple[float, float], sent: int, answered: int) -> float:
    """Return what so many tokens cost."""
    return (price[0] * sent + price[1] * answered) / 1e6


def money(amount: float) -> str:
    """Return dollars as text: `$1,234.50`, and `<$0.01` of what would look like nothing."""
    return "<$0.01" if 0 < amount < 0.01 else f"${amount:,.2f}"


def add_answer_options(made: argparse.ArgumentParser, *, forms: bool = False) -> None:
    """Add the options that say which adapter answers, and how; with `forms`, also what the text must be."""
    group = made.add_argument_group("answer")
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME",
        help="the adapter that answers: NAME or NAME@VERSION; NAME=WEIGHT several times for a weighted sum "
        "(default: none, the base itself)",
    )
    group.add_argument("--system", metavar="TEXT", help="instructions before the conversation")
    add_sampling_options(group, forms=forms)


def add_sampling_options(group: argparse._ArgumentGroup, *, forms: bool = False) -> None:
    """Add the options of how an answer is sampled; with `forms`, also what the text must be."""
    for name, kind, metavar, text in _SAMPLING:
        group.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the answer before this text; may be repeated"
    )
    if not forms:
        return
    form = group.add_mutually_exclusive_group()
    form.add_argument("--schema", metavar="FILE", help="the answer is JSON that keeps to this JSON schema")
    form.add_argument("--regex", metavar="REGEX", help="matches the whole answer")
    form.add_argument(
        "--choice", action="append", metavar="TEXT", help="the answer is one of these; to be repeated"
    )
    form.add_argument("--grammar", metavar="FILE", help="a grammar of the answer, in Lark's notation or GBNF")


def sampling_of(args: argparse.Namespace) -> SamplingFields:
    """Return the sampling fields that were given.

    Raises:
        ValueError: a file cannot be read, or is no JSON.
    """
    names = [name.replace("-", "_") for name, *_ in _SAMPLING] + ["stop"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if not hasattr(args, "schema"):
        return cast(SamplingFields, given)
    if args.regex is not None:
        given["regex"] = args.regex
    if args.choice:
        given["choices"] = args.choice
    if args.grammar is not None:
        given["grammar"] = _text_of("grammar", args.grammar)
    if args.schema is not None:
        try:
            given["schema"] = json.loads(_text_of("schema", args.schema))
        except json.JSONDecodeError as error:
            raise ValueError(f"schema: {args.schema} is not JSON: {error}") from error
    return cast(SamplingFields, given)


def _text_of(option: str, file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}: {file} cannot be read: {error}") from error


def adapter_of(terms: Sequence[str]) -> str | tuple[AdapterWeight, ...] | None:
    """Return the value of `--adapter`: nothing, one name, or names with weights.

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


def client_of(args: argparse.Namespace) -> Client:
    """Return a client for the server that the options name.

    Raises:
        ValueError: the URL or the timeout is wrong.
    """
    timeout = Timeout() if args.timeout is None else args.timeout
    return Client(args.url, api_key=args.key, timeout=timeout)


# ---- actions -----------------------------------------------------------------------------------------


def run_action(command: str, help: str, actions: Mapping[str, str], argv: list[str]) -> int:
    """Run the action that the arguments begin with. Gives its exit status.

    Args:
        actions: Its module in the package of the command, for each action.
    """
    if not argv:
        sys.stderr.write(help)
        return USAGE
    action, *rest = argv
    if action in ("-h", "--help", "help"):
        sys.stdout.write(help)
        return OK
    if action not in actions:
        return _unknown(command, action, actions)
    module = importlib.import_module(f".{command}.{actions[action]}", __package__)
    status: int = module.run(action, rest)
    return status


def _unknown(command: str, action: str, actions: Mapping[str, str]) -> int:
    print(f"onebase {command}: there is no action {action!r}.", file=sys.stderr)
    near = difflib.get_close_matches(action, actions, n=1)
    hint = (
        f"Did you mean `onebase {command} {near[0]}`?" if near else f"`onebase {command} --help` lists them."
    )
    print(hint, file=sys.stderr)
    return USAGE


def action_parser(action: str, description: str, examples: str = "") -> argparse.ArgumentParser:
    """Return a parser for one action, such as `adapters push`."""
    made = parser(action, description, examples)
    made.add_argument("--json", action="store_true", help="print the result as JSON")
    return made


@contextlib.contextmanager
def notices() -> Iterator[None]:
    """Show on stderr what the SDK notes meanwhile: that it waits, and why."""
    log, shown = logging.getLogger("onebase"), logging.StreamHandler(sys.stderr)
    shown.setFormatter(logging.Formatter("onebase: %(message)s"))
    before = log.level
    log.addHandler(shown)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(shown)
        log.setLevel(before)


def perform(made: argparse.ArgumentParser, args: argparse.Namespace, work: Callable[[Client], int]) -> int:
    """Run `work` with a client of the server that the options name. Gives the exit status."""
    try:
        client = client_of(args)
    except ValueError as error:
        made.error(str(error))
    with client, notices():
        try:
            return work(client)
        except OneBaseError as error:
            return report(error, client.url)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            print(f"onebase: {error}", file=sys.stderr)
            return USAGE


_LEAST_DIGITS, _WHOLE_ID, _SHORT_ID = 4, 24, 8
"""Digits of an id: that are enough if only one begins with them, of a whole one, that are shown."""


def whole_id(wanted: str, prefix: str, nouns: str, known: Callable[[], Iterable[str]]) -> str:
    """Return the id that begins with some digits. nouns: what has such ids, such as `jobs`.

    Raises:
        ValueError: several begin with them, or there are too few digits.
    """
    digits = wanted.removeprefix(prefix)
    if len(digits) < _LEAST_DIGITS:
        raise ValueError(f"give at least {_LEAST_DIGITS} digits of the id, not {wanted!r}")
    found = []
    if len(digits) < _WHOLE_ID:
        found = [one for one in known() if one.removeprefix(prefix).startswith(digits)]
    if len(found) > 1:
        raise ValueError(f"the ids of several {nouns} begin like this: {', '.join(found)}")
    return found[0] if found else f"{prefix}{digits}"


def short_id(whole: str, prefix: str) -> str:
    """Return the part of an id that is shown."""
    return whole[: len(prefix) + _SHORT_ID]


def print_json(value: object) -> None:
    """Print one result, or a tuple of them, as one line of JSON."""
    print(json.dumps(plain(value), ensure_ascii=False))


def plain(value: Any) -> Any:
    """Return a result as dicts, lists, texts and numbers, under the names that the SDK has for its fields."""
    if isinstance(value, msgspec.Struct):
        kind = type(value)
        derived = [name for name in dir(kind) if isinstance(getattr(kind, name), property)]
        sent = zip(kind.__struct_fields__, kind.__struct_encode_fields__, strict=True)
        names = [name for name, sent_as in sent if sent_as not in derived] + derived
        return {name: plain(getattr(value, name)) for name in names}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


# ---- failures ----------------------------------------------------------------------------------------


def explain(error: OneBaseError, url: str) -> tuple[str, int]:
    """Return the text of a failure, with the next step, and the exit status."""
    if isinstance(error, APIConnectionError) and not error.sent:
        return (
            f"No server answers at {url}.\n"
            "Start one in another terminal: onebase serve\n"
            "Or name one that runs elsewhere with --url or ONEBASE_URL.",
            NO_SERVER,
        )
    hint = _hint(error)
    return f"{error}\n{hint}" if hint else str(error), FAILED


_HINTS: Final[Mapping[str, str]] = {
    "adapter_not_found": "`onebase adapters list` lists the adapters that the server has.",
    "version_not_found": "`onebase adapters show NAME` lists the versions.",
    "job_not_found": "`onebase jobs list` lists the jobs that the server has.",
    "batch_not_found": "`onebase batches list` lists the batches that the server has.",
    "file_not_found": "`onebase files list` lists the files. A path is uploaded.",
    "model_not_found": "`onebase models` lists what the server has.",
    "base_mismatch": "If you are sure that it fits this base: --any-base",
    "version_not_ready": "See its state, or why it failed: onebase adapters show NAME",
    "adapter_in_use": "To delete it anyway: --force",
    "insufficient_scope": "Ask the server's operator for a key with this scope.",
    "no_effect": "If that is intended: --allow-noop",
}
"""The next step, by the code of an error."""


def _hint(error: OneBaseError) -> str | None:
    code = str(getattr(error, "code", ""))
    if isinstance(error, ConflictError) and code == "stale_activation":
        active = error.current[:12] if error.current else "none"
        return f"The active version is {active}. If that is what you expect: --expected {active}"
    if code in _HINTS:
        return _HINTS[code]
    return next((hint for kind, hint in _HINTS_BY_KIND if isinstance(error, kind)), None)


_HINTS_BY_KIND: Final[tuple[tuple[type[OneBaseError], str], ...]] = (
    (APITimeoutError, "Allow more time with --timeout SECONDS."),
    (AuthenticationError, "Set your API key in the environment: export ONEBASE_API_KEY=ob-..."),
    (NotFoundError, "Is this a OneBase server? Check --url or ONEBASE_URL."),
)


def report(error: OneBaseError, url: str) -> int:
    """Print a failure to stderr. Gives the exit status."""
    text, status = explain(error, url)
    print(f"onebase: {text}", file=sys.stderr)
    return status
