"""`onebase jobs show`: one job, with its losses and base against adapter."""

from __future__ import annotations

from dataclasses import asdict

from ..._client import Client
from ..actions import perform, print_json
from ..exits import OK
from ..tables import console
from .common import find, job_parser
from .results import print_job

_DESCRIPTION = """\
Show one job: how far it is or how it ended, its losses, and on held-out rows the base against the adapter.
"""


def run(action: str, argv: list[str]) -> int:
    """Run the action; gives its exit status."""
    made = job_parser(action, _DESCRIPTION, "  onebase jobs show ftjob-3f2a9c41\n")
    args = made.parse_args(argv)
    return perform(made, args, lambda client: _show(client, args.job, args.json))


def _show(client: Client, wanted: str, as_json: bool) -> int:
    job = find(client, wanted)
    curve = job.curve()
    if as_json:
        print_json(asdict(job.info) | {"curve": [asdict(point) for point in curve]})
    else:
        print_job(console(), job.info, curve)
    return OK
