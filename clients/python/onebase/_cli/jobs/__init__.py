"""`onebase jobs`: let a server train adapters, and see how they come along. One module an action."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ..actions import dispatch

HELP: Final = """\
usage: onebase jobs ACTION [options]

Let a server train adapters on the base that it has in memory already, beside
serving. A job goes on without this command; what comes out is a version of an
adapter, proven, and active if that was wished.

Begin
  create FILE           send examples and begin to train: --name acme --set r=8

Look
  list                  all jobs, the newest first
  show ID               one job: its losses, and base against adapter
  watch ID              a live bar until the job ends
  events ID             what a job told; --follow goes on telling
  checkpoints ID        the places that a job could go on from

Change
  pause ID              let go of the machine; the job keeps its place
  resume ID             go on from the last checkpoint
  cancel ID             end it for good

ID is a job's id as `list` prints it, or the beginning of it.
`onebase jobs ACTION --help` explains an action. All of them take --json.
"""

ACTIONS: Final[Mapping[str, str]] = {
    "create": "create",
    "list": "listing",
    "show": "show",
    "watch": "watch",
    "events": "events",
    "checkpoints": "checkpoints",
    "pause": "change",
    "resume": "change",
    "cancel": "change",
}


def run(argv: list[str]) -> int:
    """Run the command; gives its exit status."""
    return dispatch("jobs", HELP, ACTIONS, argv)
