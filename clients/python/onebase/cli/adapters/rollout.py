"""`onebase adapters rollout`: let a version answer a share of the requests beside the active one."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from msgspec.structs import fields as fields_of

from ..._sync.client import Client
from ..._terminal.ui import Column, can_move, console, line, note, table, when
from ...adapter_types import Rollout, RolloutComparison, RolloutRules, SideFigure
from ..command import OK, action_parser, perform, print_json
from .versions import Reference, reference, short

if TYPE_CHECKING:
    from rich.console import Console

_DESCRIPTION = """\
NAME@VERSION: start a rollout of that version, the candidate: it answers a share of the name's
requests, the active version answers the rest, and both are compared. It is rolled back by itself
when it is worse by a margin.
NAME: show the rollout that runs, or else the latest; with --percent or --shadow change its shares,
with --promote or --rollback end it.
"""
_EXAMPLES = """\
  onebase adapters rollout acme-support@3f2a9c41 --percent 10
  onebase adapters rollout acme-support@3f2a9c41 --shadow 20 --judge polite
  onebase adapters rollout acme-support@3f2a9c41 --percent 10 --auto --rule requests=500
  onebase adapters rollout acme-support --watch
  onebase adapters rollout acme-support --percent 50
  onebase adapters rollout acme-support --rollback
"""
_RULES: Final = tuple(field.name for field in fields_of(RolloutRules))
_STYLES: Final = {"worse": "red", "better": "green", "not_worse": "green", "undecided": "yellow"}
_WORDS: Final = {
    "errors": "failed",
    "first_token": "first token",
    "per_token": "each token",
    "tokens": "tokens",
    "refusals": "refusals",
    "feedback": "feedback",
    "judge": "judge",
}
_RATIOS: Final = ("first_token", "per_token", "tokens")
_SECONDS: Final = ("first_token", "per_token")
_WATCH_SECONDS: Final = 2.0


def run(action: str, argv: list[str]) -> int:
    """Run the action. Gives its exit status."""
    made = _parser(action)
    args = made.parse_args(argv)
    try:
        wanted = reference(args.adapter)
        _check(wanted, args)
    except ValueError as error:
        made.error(str(error))
    return perform(made, args, lambda client: _perform(client, wanted, args))


def _parser(action: str) -> argparse.ArgumentParser:
    made = action_parser(f"adapters {action}", _DESCRIPTION, _EXAMPLES)
    made.add_argument("adapter", metavar="NAME[@VERSION]")
    made.add_argument(
        "--percent", type=_percent, metavar="P", help="percent of the requests (default at the start: 0)"
    )
    made.add_argument(
        "--shadow",
        type=_percent,
        metavar="P",
        help="percent of the active version's requests of which the candidate gets a copy that nobody sees "
        "(default at the start: 0)",
    )
    start = made.add_argument_group("at the start")
    start.add_argument(
        "--by",
        choices=("caller", "request"),
        help="divide users, sessions and keys, or each request anew (default: caller)",
    )
    start.add_argument("--auto", action="store_true", help="promote it by itself once the rules allow it")
    start.add_argument(
        "--rule",
        action="append",
        default=[],
        type=_rule,
        metavar="NAME=VALUE",
        help=f"one of {', '.join(_RULES)}; `none`: it decides nothing (default: as the server has them)",
    )
    start.add_argument(
        "--judge", metavar="ADAPTER", help="adapter that judges a part of the answers (default: none)"
    )
    start.add_argument(
        "--approves", metavar="WORD", help="beginning of its answer where it approves (default: yes)"
    )
    start.add_argument(
        "--judged", type=_percent, metavar="P", help="percent of the answers that it judges (default: 10)"
    )
    end = made.add_mutually_exclusive_group()
    end.add_argument("--promote", action="store_true", help="activate the candidate now")
    end.add_argument("--rollback", action="store_true", help="end the rollout now")
    end.add_argument("--watch", action="store_true", help="show it until it ends")
    return made


def _percent(text: str) -> float:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if 0 <= value <= 100:
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 100")


def _rule(text: str) -> tuple[str, float | None]:
    name, _, value = text.partition("=")
    if name not in _RULES:
        raise argparse.ArgumentTypeError(f"{name!r} is no rule: use {', '.join(_RULES)}")
    if value == "none":
        return name, None
    try:
        return name, int(value) if name == "requests" else float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write {name}=NUMBER, or {name}=none") from None


def _check(wanted: Reference, args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together."""
    starts = wanted.version is not None
    of_start = {"--by": args.by, "--auto": args.auto, "--rule": args.rule, "--judge": args.judge,
                "--approves": args.approves, "--judged": args.judged}  # fmt: skip
    for option, value in of_start.items():
        if value and not starts:
            raise ValueError(f"{option}: it is for the start of a rollout, which names NAME@VERSION")
    shares = args.percent is not None or args.shadow is not None
    ends = args.promote or args.rollback
    if ends and (starts or shares):
        raise ValueError("--promote, --rollback: they end the rollout of NAME; give nothing else")
    if starts and not (args.percent or args.shadow):
        raise ValueError("give --percent or --shadow, or both: else nothing would be compared")
    for option, value in (("--approves", args.approves), ("--judged", args.judged)):
        if value is not None and not args.judge:
            raise ValueError(f"{option}: it is for a judge (--judge)")


def _perform(client: Client, wanted: Reference, args: argparse.Namespace) -> int:
    found = _change(client, wanted, args)()
    if args.watch:
        found = _watch(client, found, quiet=args.json)
    if args.json:
        print_json(found)
        return OK
    if not args.watch:
        print_rollout(console(), found)
    if found.state == "running":
        note(f"To go back: onebase adapters rollout {found.name} --rollback")
    return OK


def _change(client: Client, wanted: Reference, args: argparse.Namespace) -> Callable[[], Rollout]:
    """Return the call that the options ask for."""
    adapters, name = client.adapters, wanted.name
    if wanted.version is not None:
        return lambda: _start(client, name, wanted.version or "", args)
    if args.promote:
        return lambda: adapters.promote_rollout(name)
    if args.rollback:
        return lambda: adapters.rollback_rollout(name)
    if args.percent is not None or args.shadow is not None:
        return lambda: adapters.change_rollout(name, percent=args.percent, shadow=args.shadow)
    return lambda: adapters.rollout(name)


def _start(client: Client, name: str, version: str, args: argparse.Namespace) -> Rollout:
    given = {"adapter": args.judge, "approves": args.approves, "percent": args.judged}
    judge = {name: value for name, value in given.items() if value is not None} if args.judge else None
    return client.adapters.start_rollout(
        name,
        version,
        percent=args.percent or 0.0,
        shadow=args.shadow or 0.0,
        by=args.by or "caller",
        promote=args.auto,
        rules=dict(args.rule) or None,
        judge=judge,
    )


def _watch(client: Client, rollout: Rollout, *, quiet: bool) -> Rollout:
    """Show a rollout until it ends: on a terminal in place, elsewhere whenever its figures change."""
    out = console()
    moves, last = can_move(out), None
    while True:
        if not quiet and rollout != last:
            if moves:
                out.clear()
            print_rollout(out, rollout)
        last = rollout
        if rollout.state != "running":
            return rollout
        time.sleep(_WATCH_SECONDS)
        rollout = client.adapters.rollout(rollout.name)


# ---- shown -------------------------------------------------------------------------------------------


def print_rollout(out: Console, rollout: Rollout) -> None:
    """Print a rollout: its state, its shares, and the comparison."""
    ended = "" if rollout.ended_at is None else f", {when(rollout.ended_at)}: {rollout.reason}"
    style = {"running": "yellow", "promoted": "green"}.get(rollout.state, "red")
    out.print(
        line(f"{rollout.name}  ", "bold") + line(rollout.state.replace("_", " "), style) + line(ended),
        soft_wrap=True,
    )
    shares = f"{rollout.percent:g}% of requests"
    if rollout.shadow:
        shares += f", copies of {rollout.shadow:g}%"
    for side in rollout.sides:
        share = {"active": "", "candidate": f", {shares}", "shadow": ", copies"}[side.side]
        counts = f"{side.requests:,} requests, {side.errors:,} failed, {side.completion_tokens:,} tokens"
        counts += f", {side.aborted:,} left" if side.aborted else ""
        out.print(
            line(f"  {side.side:10}", "dim") + line(f"{short(side.version)}{share}: {counts}"), soft_wrap=True
        )
    shown = [one for one in rollout.comparisons if one.verdict != "no_data"]
    if shown:
        out.print(table(COLUMNS, shown, out.width))
    if rollout.state == "running" and rollout.waits_for:
        note("Before a promotion: " + "; ".join(rollout.waits_for))


def _name(one: RolloutComparison) -> str:
    return _WORDS.get(one.metric, one.metric) + (", copies" if one.side == "shadow" else "")


def _figure(metric: str, figure: SideFigure) -> str:
    if figure.mean is None:
        return ""
    if metric in _SECONDS:
        return f"{1000 * figure.mean:.3g} ms"
    return f"{figure.mean:.3g}" if metric in ("tokens", "feedback") else f"{figure.mean:.1%}"


def _worse(one: RolloutComparison) -> str:
    if one.worse_by is None:
        return ""
    unit = "%" if one.metric in _RATIOS else " pt"
    interval = "" if one.low is None or one.high is None else f" ({_signed(one.low)} to {_signed(one.high)})"
    return f"{_signed(one.worse_by)}{unit}{interval}"


def _signed(value: float) -> str:
    """Return a part in percent, to about two digits."""
    return f"{100 * value:+.0f}" if abs(value) >= 0.1 else f"{100 * value:+.1f}"


def _margin(one: RolloutComparison) -> str:
    if one.margin is None:
        return "none"
    return f"{100 * one.margin:g}" + ("%" if one.metric in _RATIOS else " pt")


COLUMNS: tuple[Column[RolloutComparison], ...] = (
    Column("metric", _name),
    Column("active", lambda one: _figure(one.metric, one.active), right=True),
    Column("candidate", lambda one: _figure(one.metric, one.candidate), right=True),
    Column("worse by", _worse, right=True),
    Column("margin", _margin, right=True, spare=1),
    Column(
        "verdict",
        lambda one: one.verdict.replace("_", " "),
        style=lambda one: _STYLES.get(one.verdict, ""),
    ),
)
