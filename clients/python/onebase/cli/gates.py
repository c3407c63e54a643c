"""`onebase gates`: rules of what a version must pass before it answers under a name."""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final

from .._core.adapters import was_active
from .._sync.client import Client
from .._terminal.ui import Column, note, print_table
from ..adapter_types import READY, EvaluationGate, GateRule
from .command import FAILED, OK, USAGE, action_parser, perform, print_json

HELP: Final = """\
usage: onebase gates ACTION [options]

Say what a version must pass before it answers under its name, on all servers of a
registry. All rules apply whose patterns match the tenant and the name.

  list        the rules that apply to your tenant; for an admin all of them
  set         set a rule, in place of the one with the same patterns; for admins
  rm ID       delete a rule; for admins
  calibrate   find the score for `set --weights` that few of your good versions exceed

`onebase gates ACTION --help` explains an action. All of them take --json.
"""
ACTIONS: Final = ("list", "set", "rm", "calibrate")
_SET: Final = """\
Set a rule, in place of the one with the same patterns. Rollbacks pass no gate.
"""
_CALIBRATE: Final = """\
Read the scores of the weights of your tenant's versions that are or were active, and print the
least score that the next version exceeds with no more than a probability, if it is like these. So
name adapters whose versions you know to be good. What a poisoned version scores nobody can know
beforehand.
"""
_EXAMPLES_CALIBRATE: Final = """\
  onebase gates calibrate --name 'support-*'
  onebase gates calibrate --false-alarms 0.01
"""
_EXAMPLES: Final = """\
  onebase gates set --name 'support-*' --signature acme --proof proved
  onebase gates set --tenant acme --approvals 1 --approver ob-0123456789abcdef
  onebase gates set --evaluation margin=0.05 --evaluation rows=50
"""
_FIELDS: Final[Mapping[str, Callable[[str], float | str]]] = {
    "margin": float, "confidence": float, "rows": int, "total": int, "metric": str, "slice": str, "data": str
}  # fmt: skip


def run(command: str, argv: list[str]) -> int:
    """Run the command. Gives its exit status."""
    action = argv[0] if argv else ""
    if action in ("-h", "--help", "help"):
        print(HELP, end="")
        return OK
    if action not in ACTIONS:
        sys.stderr.write(HELP if not action else f"onebase gates: there is no action {action!r}.\n")
        return USAGE
    texts = {"set": (_SET, _EXAMPLES), "calibrate": (_CALIBRATE, _EXAMPLES_CALIBRATE)}.get(action, ("", ""))
    made = action_parser(f"gates {action}", *texts)
    if action == "set":
        _add_options(made)
    elif action == "rm":
        made.add_argument("id", metavar="ID")
    elif action == "calibrate":
        made.add_argument(
            "--name", default="*", metavar="PATTERN", help="adapters whose versions are read (default: *)"
        )
        made.add_argument(
            "--false-alarms",
            type=_probability,
            default=0.05,
            metavar="P",
            help="largest probability that a good version is refused, above 0 and below 1 (default: 0.05)",
        )
    args = made.parse_args(argv[1:])
    return perform(made, args, lambda client: _perform(action, client, args))


def _add_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--tenant", default="*", metavar="PATTERN", help="tenants that it is for (default: *)")
    made.add_argument("--name", default="*", metavar="PATTERN", help="adapters that it is for (default: *)")
    made.add_argument(
        "--signature",
        action="append",
        default=[],
        metavar="SIGNER",
        help="pattern of a signer of the server's --signatures; may be repeated (default: no signature)",
    )
    made.add_argument(
        "--proof",
        choices=("none", "proved", "exact"),
        default="none",
        help="proved: nothing of the proof was waived; exact: with PEFT's own bits (default: none)",
    )
    made.add_argument(
        "--evaluation",
        action="append",
        default=[],
        type=_field,
        metavar="FIELD=VALUE",
        help="not worse than the version let in last: margin, confidence, rows, total, metric, slice or "
        "data (default: no evaluation)",
    )
    made.add_argument(
        "--evaluator",
        action="append",
        default=[],
        metavar="KEY",
        help="key whose evaluations count; jobs: the server's own (default: any)",
    )
    made.add_argument(
        "--weights", type=float, metavar="SCORE", help="largest score of its weights (default: any)"
    )
    made.add_argument(
        "--approvals", type=int, default=0, metavar="N", help="people who must approve it (default: 0)"
    )
    made.add_argument(
        "--approver", action="append", default=[], metavar="KEY", help="key that may approve (default: any)"
    )


def _field(text: str) -> tuple[str, float | str]:
    name, _, value = text.partition("=")
    if name not in _FIELDS:
        raise argparse.ArgumentTypeError(f"{name!r} is no field: use {', '.join(_FIELDS)}")
    try:
        return name, _FIELDS[name](value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write {name}=NUMBER") from None


def _probability(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and below 1")
    return value


def _perform(action: str, client: Client, args: argparse.Namespace) -> int:
    if action == "calibrate":
        return _calibrate(client, args)
    if action == "rm":
        client.gates.delete(args.id)
        print_json({"id": args.id, "deleted": True}) if args.json else print(f"Deleted {args.id}.")
        return OK
    rules: Sequence[GateRule] = [_set(client, args)] if action == "set" else client.gates.list()
    if args.json:
        print_json(rules[0] if action == "set" else rules)
    elif rules:
        print_table(_COLUMNS, rules)
    else:
        note("No rule: every version that is ready can be activated.")
    return OK


def _set(client: Client, args: argparse.Namespace) -> GateRule:
    evaluation = None
    if args.evaluation or args.evaluator:
        fields: dict[str, Any] = {name: value for name, value in args.evaluation if name != "slice"}
        slices = tuple(value for name, value in args.evaluation if name == "slice")
        evaluation = EvaluationGate(**fields, slices=slices, evaluators=tuple(args.evaluator))
    return client.gates.set(
        tenant=args.tenant,
        name=args.name,
        signature=args.signature,
        proof=args.proof,
        evaluation=evaluation,
        weights=args.weights,
        approvals=args.approvals,
        approvers=args.approver,
    )


def _calibrate(client: Client, args: argparse.Namespace) -> int:
    found = _scores(client, args.name)
    scores = sorted(score for by_version in found.values() for score in by_version.values())
    if not scores:
        note(f"onebase: no version of {args.name!r} that is or was active has a score of its weights")
        return FAILED
    threshold, alarms = weights_threshold(scores, args.false_alarms)
    least, median, largest = scores[0], statistics.median(scores), scores[-1]
    if args.json:
        figures = {"versions": len(scores), "least": least, "median": median, "largest": largest}
        adapters = {name: len(by_version) for name, by_version in found.items()}
        print_json({**figures, "threshold": threshold, "false_alarms": alarms, "adapters": adapters})
        return OK
    named = ", ".join(f"{name} ({len(by_version)})" for name, by_version in found.items())
    half = f"half of them {median:.4g} or less"
    print(f"Versions that are or were active, by adapter: {named}.")
    print(f"All {len(scores)} score {least:.4g} to {largest:.4g}, {half}.")
    print(f"Threshold {threshold:g}: one more like these is above it with probability {alarms:.2g} at most.")
    if alarms > args.false_alarms:
        needed = math.ceil(1 / args.false_alarms) - 1
        note(f"These are too few for {args.false_alarms:g}, which needs {needed} or more.")
    print(f"Set it: onebase gates set --name {shlex.quote(args.name)} --weights {threshold:g}")
    return OK


def _scores(client: Client, pattern: str) -> dict[str, dict[str, float]]:
    """Return the scores by adapter and version, each content once, of the adapters that a pattern names.

    Another tenant's shared adapters, checkpoints of jobs, which pass no gate, and versions that were never
    active, since a gate may have refused them, do not count as good.
    """
    tenant, seen = client.keys.own().tenant, set[str]()
    found: dict[str, dict[str, float]] = {}
    for adapter in client.adapters.list():
        if adapter.tenant != tenant or not fnmatchcase(adapter.name, pattern):
            continue
        history = client.adapters.history(adapter.name)
        for version in client.adapters.versions(adapter.name):
            score = None if version.report is None else version.report.weight_score
            is_good = was_active(version, history) and version.source.kind != "checkpoint"
            if is_good and version.state == READY and score is not None and version.version not in seen:
                seen.add(version.version)
                found.setdefault(adapter.name, {})[version.version] = score
    return found


def weights_threshold(scores: Sequence[float], share: float) -> tuple[float, float]:
    """Return a threshold, and the largest probability that the next score is above it, if that one comes from
    where these do: a conformal prediction (Vovk, Gammerman and Shafer, 2005), which assumes nothing else.

    share: the largest probability that is wanted. With too few scores the threshold is the largest of them.
    """
    ordered = sorted(scores, reverse=True)
    place = max(1, math.floor(share * (len(ordered) + 1) + 1e-9))
    threshold = math.ceil(ordered[place - 1] * 1e4) / 1e4
    return threshold, place / (len(ordered) + 1)


def conditions(rule: GateRule) -> str:
    """Return a rule's gates in one line."""
    parts = [f"signed by {' or '.join(rule.signature)}"] if rule.signature else []
    parts += [rule.proof] if rule.proof != "none" else []
    if rule.evaluation is not None:
        one = rule.evaluation
        text = f"evaluated: margin {one.margin:g}, {one.confidence:.4g} sure, {one.rows} rows"
        text += f", by {one.metric}" if one.metric else ""
        text += f", of {', '.join(one.slices)}" if one.slices else ""
        text += f", {one.total} in all" if one.total else ""
        text += f", file {one.data[:12]}" if one.data else ""
        text += f", by {', '.join(one.evaluators)}" if one.evaluators else ""
        parts.append(text)
    parts += [f"weights at most {rule.weights:g}"] if rule.weights is not None else []
    if rule.approvals:
        whose = f" of {', '.join(rule.approvers)}" if rule.approvers else ""
        parts.append(f"approved by {rule.approvals}{whose}")
    return "; ".join(parts)


_COLUMNS: tuple[Column[GateRule], ...] = (
    Column("id", lambda rule: rule.id),
    Column("tenant", lambda rule: rule.tenant),
    Column("name", lambda rule: rule.name),
    Column("a version must be", conditions),
)
