"""`onebase requests | replay`: a server's log of requests, and the same requests again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from .._sync.client import Client
from .._terminal.ui import Column, note, print_table, show
from ..errors import APIStatusError
from ..types import LoggedAdapter, LoggedRequest, Replay
from .command import FAILED, OK, count, moment, parser, perform, print_json

_REQUESTS: Final = """\
List the requests in the server's log, the last first; with an id show one, with what was sent and
answered if the server keeps texts. The server keeps a log if it was started with --request-log.
With --erase all that --user asked, or all that there is (--everything), is erased, on every server
of the registry.
"""
_REQUESTS_EXAMPLES: Final = """\
  onebase requests --since 12h --adapter support
  onebase requests chatcmpl-9f2c41d0b7a3e65d80c1f4aa
  onebase requests --erase --user alice
"""
_REPLAY: Final = """\
Have a logged request answered again, with the version that answered it, and say whether the text
is the same; with --version, compare it with what another version answers. Without an id, all
requests since a time that were answered are replayed, and a table compares the answers; replays,
samples, and what a rollout's shadow and judge were asked are left out.

The exit status is 1 if an answer differs, a request cannot be replayed, or nothing was compared.
"""
_REPLAY_EXAMPLES: Final = """\
  onebase replay chatcmpl-9f2c41d0b7a3e65d80c1f4aa
  onebase replay chatcmpl-9f2c41d0b7a3e65d80c1f4aa --body request.json
  onebase replay --since 1d --adapter support --version 3f2a9c41
"""


def run(command: str, argv: list[str]) -> int:
    """Run the command. Gives its exit status."""
    return _requests(argv) if command == "requests" else _replays(argv)


def _add_filters(made: argparse.ArgumentParser, limit: int | None) -> None:
    made.add_argument(
        "--since", type=moment, metavar="TIME", help="as in 90m, 12h, 7d, or 2026-11-01 (default: all)"
    )
    made.add_argument("--adapter", metavar="NAME", help="only those that it answered (default: all)")
    made.add_argument(
        "--user", metavar="NAME", help="only those of this user, as they name it (default: all)"
    )
    made.add_argument("--tenant", metavar="NAME", help="another tenant's, for admins (default: your own)")
    made.add_argument(
        "--limit", type=count, default=limit, metavar="N", help=f"the last N (default: {limit or 'all'})"
    )
    made.add_argument("--json", action="store_true", help="print the result as JSON")


# ---- requests ----------------------------------------------------------------------------------------


def _requests(argv: list[str]) -> int:
    made = parser("requests", _REQUESTS, _REQUESTS_EXAMPLES)
    made.add_argument("request", nargs="?", metavar="REQUEST", help="the id of an answer (default: a list)")
    _add_filters(made, limit=50)
    made.add_argument("--erase", action="store_true", help="erase what --user asked, or --everything")
    made.add_argument("--everything", action="store_true", help="with --erase: all of the tenant's requests")
    args = made.parse_args(argv)
    if args.erase == (args.user is None and not args.everything):
        made.error("--erase goes with --user NAME or with --everything")
    if args.everything and not args.erase:
        made.error("--everything goes with --erase")

    def work(client: Client) -> int:
        if args.erase:
            done = client.requests.erase(user=args.user, everything=args.everything, tenant=args.tenant)
            if args.json:
                print_json(done)
            else:
                note(f"{done.erased} requests were erased on this server; others follow within seconds.")
        elif args.request is not None:
            _show(client.requests.retrieve(args.request, tenant=args.tenant), args.json)
        else:
            found = _found(client, args, args.limit)
            if args.json:
                print_json(found)
            else:
                print_table(_LISTED, found)
        return OK

    return perform(made, args, work)


def _found(
    client: Client, args: argparse.Namespace, limit: int | None, *, replayable: bool = False
) -> tuple[LoggedRequest, ...]:
    return client.requests.list(
        since=args.since,
        adapter=args.adapter,
        user=args.user,
        tenant=args.tenant,
        replayable=replayable,
        limit=limit,
    )


def _show(one: LoggedRequest, as_json: bool) -> None:
    if as_json:
        print_json(one)
        return
    for name, value in (
        ("request", one.id),
        ("state", one.state if one.error is None else f"{one.state} ({one.error})"),
        ("began", _time(one)),
        ("route", one.route),
        ("by", f"{one.tenant}, key {one.key}" if one.key else one.tenant),
        ("answered by", _versions(one.adapters) or one.base),
        ("seed", str(one.seed)),
        ("tokens", f"{one.prompt_tokens:,} in, {one.completion_tokens:,} out"),
        ("prompt", ", ".join(one.prompts)),
        *((f"answer {index}", answer.hash) for index, answer in enumerate(one.answers)),
    ):
        show(f"{name:<12} {value}\n")
    if one.body is not None:
        show(json.dumps(one.body, ensure_ascii=False, indent=2) + "\n")
    for answer in one.answers:
        if answer.text is not None:
            show((answer.reasoning or "") + answer.text + "\n")


def _time(one: LoggedRequest) -> str:
    return datetime.fromtimestamp(one.at).strftime("%Y-%m-%d %H:%M:%S")


def _versions(adapters: Sequence[LoggedAdapter]) -> str:
    return " + ".join(f"{one.name}@{one.version[:12]}" for one in adapters)


_LISTED: Final[Sequence[Column[LoggedRequest]]] = (
    Column("request", lambda one: one.id),
    Column("began", _time),
    Column("state", lambda one: one.state),
    Column("answered by", lambda one: _versions(one.adapters) or one.base, shrink=True),
    Column("route", lambda one: one.route, spare=2, shrink=True),
    Column("key", lambda one: one.key, spare=3),
    Column("in", lambda one: f"{one.prompt_tokens:,}", right=True, spare=1),
    Column("out", lambda one: f"{one.completion_tokens:,}", right=True, spare=1),
)


# ---- replay ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outcome:
    """Outcome of one replay, or the error for which there is none."""

    request: str
    replay: Replay | None = None
    error: APIStatusError | None = None

    @property
    def is_equal(self) -> bool:
        return self.replay is not None and self.replay.equal

    @property
    def result(self) -> str:
        if self.replay is None:
            return f"cannot be replayed: {self.error}"
        return "equal" if self.is_equal else "different"

    @property
    def difference(self) -> str:
        """The first difference."""
        for choice in self.replay.choices if self.replay is not None else ():
            if not choice.equal:
                where = f"choice {choice.index}" if len(self.replay.choices) > 1 else ""  # type: ignore[union-attr]
                if choice.first_difference is not None:
                    place = f"{where} at character {choice.first_difference}".strip()
                    return f"{place}: {choice.logged!r} became {choice.replayed!r}"
                return f"{where} the hashes differ".strip()
        return ""


def _replays(argv: list[str]) -> int:
    made = parser("replay", _REPLAY, _REPLAY_EXAMPLES)
    made.add_argument("request", nargs="?", metavar="REQUEST", help="the id of an answer (default: --since)")
    made.add_argument(
        "--version", metavar="DIGEST", help="the version that answers (default: the one that did)"
    )
    made.add_argument(
        "--body", type=Path, metavar="FILE", help="JSON of the request (default: as the server has it)"
    )
    _add_filters(made, limit=None)
    args = made.parse_args(argv)
    if (args.request is None) == (args.since is None):
        made.error("give either the id of a request, or --since TIME")
    if args.body is not None and args.request is None:
        made.error("--body is of one request: give its id")
    try:
        body = None if args.body is None else json.loads(args.body.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        made.error(f"--body: {args.body} cannot be read: {error}")

    def work(client: Client) -> int:
        if args.request is not None:
            return _one(client, args, body)
        return _many(client, args)

    return perform(made, args, work)


def _one(client: Client, args: argparse.Namespace, body: Mapping[str, Any] | None) -> int:
    told = client.requests.replay(args.request, version=args.version, body=body, tenant=args.tenant)
    outcome = _Outcome(args.request, told)
    if args.json:
        print_json(told)
    else:
        show(f"{outcome.result}\n")
        if outcome.difference:
            show(f"{outcome.difference}\n")
    return OK if outcome.is_equal else FAILED


def _many(client: Client, args: argparse.Namespace) -> int:
    found = _found(client, args, args.limit and args.limit + 1, replayable=True)
    outcomes = []
    for one in found[: args.limit]:
        try:
            told = client.requests.replay(one.id, version=args.version, tenant=args.tenant)
            outcomes.append(_Outcome(one.id, told))
        except APIStatusError as error:
            outcomes.append(_Outcome(one.id, error=error))
    equal = sum(one.is_equal for one in outcomes)
    if args.json:
        print_json(tuple(_as_json(one) for one in outcomes))
    elif outcomes:
        print_table(_COMPARED, outcomes)
        failed = sum(one.replay is None for one in outcomes)
        different = len(outcomes) - equal - failed
        note(f"{len(outcomes)} requests: {equal} equal, {different} different, {failed} not replayed")
    if not outcomes:
        note("Nothing was compared: the log has no such requests.")
    if len(found) > len(outcomes):
        note(f"There are more: only the last {len(outcomes)} were replayed (--limit).")
    return OK if outcomes and equal == len(outcomes) else FAILED


def _as_json(one: _Outcome) -> dict[str, Any]:
    if one.replay is None:
        return {"request": one.request, "error": str(one.error)}
    return {"request": one.request, "replay": one.replay}


_COMPARED: Final[Sequence[Column[_Outcome]]] = (
    Column("request", lambda one: one.request),
    Column("version", lambda one: "" if one.replay is None else _versions(one.replay.adapters), spare=1),
    Column("result", lambda one: one.result, shrink=True),
    Column("first difference", lambda one: one.difference, shrink=True),
)
