"""`onebase jobs events`: what a job told."""

from __future__ import annotations

import argparse
import dataclasses
import json
from datetime import datetime

from ..._client import Client
from ..._job_display import lines_of
from ...training_types import TrainingEvent
from ..actions import perform, print_json
from ..exits import OK
from ..tables import console, line
from .common import find, job_parser

_DESCRIPTION = """\
Print what a job told, the oldest first. With --follow, all of it, and then what it tells until it ends; with
--json too, each event is a line of its own. Ctrl-C stops following, not the job.
"""


def run(action: str, argv: list[str]) -> int:
    """Run the action; gives its exit status."""
    made = job_parser(action, _DESCRIPTION, "  onebase jobs events ftjob-3f2a9c41 --follow --json\n")
    made.add_argument(
        "--limit", type=int, default=100, metavar="N", help="the newest N (default: 100); 0: all"
    )
    made.add_argument("--follow", action="store_true", help="go on until the job ends")
    args = made.parse_args(argv)
    return perform(made, args, lambda client: _events(client, args))


def _events(client: Client, args: argparse.Namespace) -> int:
    job = find(client, args.job)
    if args.follow:
        with job.stream_events() as events:
            for event in events:
                _print(event, args.json)
        return OK
    found = job.events(limit=args.limit or None)[::-1]
    if args.json:
        print_json(found)
    else:
        for event in found:
            _print(event, False)
    return OK


def _print(event: TrainingEvent, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(event), ensure_ascii=False), flush=True)
        return
    style = {"warn": "yellow", "error": "red"}.get(event.level, "")
    (first, colour), *more = list(lines_of(event)) or [(event.message, style)]
    at = datetime.fromtimestamp(event.created_at).strftime("%H:%M:%S")
    out = console()
    out.print(line(f"{at}  ", "dim") + line(first, colour), soft_wrap=True)
    for text, style in more:
        out.print(line(text, style), soft_wrap=True)
