"""`onebase jobs`: train adapters on a server, and watch the jobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

HELP: Final = """\
usage: onebase jobs ACTION [options]

Train adapters on the base that a server has in memory, while it serves. A job
goes on without this command. Its result is a version of an adapter: proven,
and active if --activate says so.

Begin
  create FILE           send examples and begin to train: --name acme --set r=8; with
                        --hold it says first what they are and what it will take

Look
  list                  all jobs, the newest first
  show ID               one job: its losses, and base against adapter
  watch ID              a live bar until the job ends
  events ID             the events of a job; --follow waits for new ones
  checkpoints ID        the checkpoints that a job could continue from

Change
  pause ID              stop the job and free the machine; it keeps its place
  resume ID             continue from the last checkpoint; begin, after --hold
  stop ID               end at the next step, keep the best, prove and activate it
  cancel ID             end it for good

ID is a job's id as `list` prints it, or the beginning of it.
`onebase jobs ACTION --help` explains an action. All of them take --json.
"""

ACTIONS: Final[Mapping[str, str]] = {
    "create": "create",
    "list": "show",
    "show": "show",
    "watch": "watch",
    "events": "show",
    "checkpoints": "show",
    "pause": "watch",
    "resume": "watch",
    "stop": "watch",
    "cancel": "watch",
}
"""The module of each action."""
