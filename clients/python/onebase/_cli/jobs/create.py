"""`onebase jobs create`: send examples and begin to train."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..._client import Client
from ..actions import perform, print_json
from ..adapters.journey import Journey
from ..exits import OK, USAGE
from ..terminal import note
from .common import parser, short
from .settings import names, parse_labels, parse_settings
from .watch import follow

_DESCRIPTION = f"""\
Send a file of examples (.jsonl, .json, .csv or .parquet) and begin to train an adapter on them. The server
checks every line first. With --watch, stay and see how it goes.

settings for --set; what is left out has the server's default:
{names()}
"""
_EXAMPLES = """\
  onebase jobs create train.jsonl --name acme-support --watch
  onebase jobs create train.jsonl --validation eval.jsonl --name acme --set r=8 --set targets=q_proj,v_proj
  onebase jobs create pairs.jsonl --name acme --method dpo --set beta=0.2 --activate never
"""


def run(action: str, argv: list[str]) -> int:
    """Run the action; gives its exit status."""
    made = _parser(action)
    args = made.parse_args(argv)
    try:
        args.settings, args.labels = parse_settings(args.set), parse_labels(args.metadata)
    except ValueError as error:
        made.error(str(error))
    return perform(made, args, lambda client: _create(client, args))


def _parser(action: str) -> argparse.ArgumentParser:
    made = parser(action, _DESCRIPTION, _EXAMPLES)
    made.add_argument("file", metavar="FILE", help="examples, or the id of a file that was sent (file-...)")
    made.add_argument("--name", help="the adapter's name (default: the server makes one up)")
    made.add_argument("--validation", metavar="FILE", help="rows to measure on (default: some are held out)")
    made.add_argument(
        "--activate",
        choices=("always", "if_better", "never"),
        default="if_better",
        help="let it answer to its name when it is proven (default: if it is better on held-out rows)",
    )
    made.add_argument("--method", choices=("supervised", "dpo"), default="supervised")
    made.add_argument("--seed", type=int, metavar="N", help="of everything random (default: 0)")
    made.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, such as r=8; repeatable"
    )
    made.add_argument(
        "--metadata", action="append", default=[], metavar="KEY=VALUE", help="a label of the job; repeatable"
    )
    made.add_argument("--watch", action="store_true", help="stay until the job ends, and show how it goes")
    return made


def _create(client: Client, args: argparse.Namespace) -> int:
    try:
        with Journey() as journey:
            job = client.training.create(
                args.file,
                name=args.name,
                validation_file=args.validation,
                activate=args.activate,
                method=args.method,
                seed=args.seed,
                metadata=args.labels,
                progress=journey,
                **args.settings,
            )
    except OSError as error:
        note(f"onebase: {error}")
        return USAGE
    if args.watch:
        return follow(client, job, args.json)
    if args.json:
        print_json(job.info)
        return OK
    print(f"{job.id}  {job.name}: {Path(args.file).name} is being checked.")
    note(f"See how it goes: onebase jobs watch {short(job.id)}")
    return OK
