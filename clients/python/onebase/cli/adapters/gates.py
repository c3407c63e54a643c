"""`onebase adapters bom | gates | approve | evaluate`: what a version is made of, and what it must pass."""

from __future__ import annotations

import argparse
import json
from typing import Final

from ..._sync.client import Client
from ..._terminal.ui import ProgressDisplay, console, line
from ...adapter_types import READY, Progress, VersionGates
from ..command import FAILED, OK, action_parser, count, perform, print_json
from .versions import Reference, label, reference, resolve, short

_DESCRIPTIONS: Final = {
    "bom": "Print a version's bill of materials as CycloneDX 1.6 JSON: files, base, data, recipe, proof,\n"
    "signature and evaluations. NAME alone is its active version.",
    "gates": "Show what a version must pass before it answers under its name, and which gates are open for\n"
    "your key. NAME alone is the newest version that is ready and not active. The rules: onebase gates.",
    "approve": "Approve a version for its next activation. Whoever made it cannot, and whoever activates it\n"
    "needs another person's approval. A new evaluation of the version ends it.",
    "evaluate": "Ask a version and the active one each prompt of a file, at temperature 0, and send how\n"
    "often each gave the reply that is wanted, by the rows' field `slice`. Whoever made the version\n"
    "cannot.",
}
_EXAMPLES: Final = {
    "bom": "  onebase adapters bom acme-support > bom.json\n",
    "gates": "  onebase adapters gates acme-support@3f2a9c41\n",
    "approve": "  onebase adapters approve acme-support@3f2a9c41\n"
    "  onebase adapters approve acme-support@3f2a9c41 --withdraw\n",
    "evaluate": "  onebase adapters evaluate acme-support@3f2a9c41 --data heldout.jsonl\n",
}

_ANY: Final = ("bom", "gates")
"""Actions for which no version has to be named."""


def run(action: str, argv: list[str]) -> int:
    """Run the action. Gives its exit status."""
    made = action_parser(f"adapters {action}", _DESCRIPTIONS[action], _EXAMPLES[action])
    made.add_argument("adapter", metavar="NAME[@VERSION]" if action in _ANY else "NAME@VERSION")
    if action == "approve":
        made.add_argument("--withdraw", action="store_true", help="take your approval back")
    if action == "evaluate":
        made.add_argument(
            "--data", required=True, metavar="FILE", help="JSONL: messages, or prompt and completion"
        )
        made.add_argument(
            "--against", metavar="VERSION", help="the other version (default: the active one, or the base)"
        )
        made.add_argument("--limit", type=count, metavar="N", help="the first N rows (default: all)")
        made.add_argument(
            "--max-tokens", type=count, default=256, metavar="N", help="longest answer (default: 256)"
        )
    args = made.parse_args(argv)
    try:
        wanted = reference(args.adapter)
        if wanted.version is None and action not in _ANY:
            raise ValueError(f"give a version too; `onebase adapters show {wanted.name}` lists them")
    except ValueError as error:
        made.error(str(error))
    return perform(made, args, lambda client: _perform(action, client, wanted, args))


def _perform(action: str, client: Client, wanted: Reference, args: argparse.Namespace) -> int:
    adapters, name = client.adapters, wanted.name
    if action == "bom":
        print(json.dumps(adapters.bom(name, resolve(client, wanted).version), indent=2, ensure_ascii=False))
        return OK
    digest = wanted.version or _newest(client, wanted)
    if action == "approve":
        found = adapters.approve(name, digest, not args.withdraw)
    elif action == "evaluate":
        found = _evaluate(client, name, digest, args)
    else:
        found = adapters.gates(name, digest)
    if args.json:
        print_json(found)
    else:
        print_gates(name, found)
    return OK if found.passed or action != "gates" else FAILED


def _newest(client: Client, wanted: Reference) -> str:
    """Return the digest of the version that is likely to be activated next."""
    ready = [one for one in client.adapters.versions(wanted.name) if one.state == READY]
    waiting = [one for one in ready if not one.active]
    return (waiting or [resolve(client, wanted)])[0].version


def _evaluate(client: Client, name: str, digest: str, args: argparse.Namespace) -> VersionGates:
    version = client.adapters.version(name, digest)
    try:
        with ProgressDisplay() as display:
            found = client.adapters.evaluate(
                name,
                version.version,
                args.data,
                against=args.against and client.adapters.version(name, args.against).version,
                limit=args.limit,
                max_tokens=args.max_tokens,
                progress=lambda share: display(Progress(f"asking {label(version)}", share)),
            )
            display(Progress(READY))
    except OSError as error:
        raise ValueError(f"--data: {args.data} cannot be read: {error.strerror or error}") from error
    return found


def print_gates(name: str, found: VersionGates) -> None:
    """Print each gate with its reason, the approvals and the evaluations."""
    out = console()
    head = "no gate" if not found.gates else "all gates are open" if found.passed else "closed"
    style = "green" if found.passed else "red"
    out.print(line(f"{name}@{short(found.version)}  ", "bold") + line(head, style), soft_wrap=True)
    for gate in found.gates:
        mark = line("open  ", "green") if gate.passed else line("closed", "red")
        out.print(line("  ") + mark + line(f"  {gate.gate}: {gate.reason}"), soft_wrap=True)
    for one in found.approvals:
        counts = "" if one.counts else ", which does not count any more"
        out.print(line(f"  approved by {one.key}{counts}", "dim"), soft_wrap=True)
    for evaluation in found.evaluations[:1]:
        rows = sum(one.rows for one in evaluation.slices)
        by = evaluation.job or evaluation.key or "a request"
        against = short(evaluation.against) or "the base"
        out.print(
            line(f"  evaluated by {by}: {evaluation.metric} on {rows} rows, beside {against}", "dim"),
            soft_wrap=True,
        )
