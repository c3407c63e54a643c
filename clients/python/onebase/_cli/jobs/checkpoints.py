"""`onebase jobs checkpoints`: the places that a job could go on from."""

from __future__ import annotations

from ..._client import Client
from ..._job_view import in_words
from ...training_types import TrainingCheckpoint
from ..actions import perform, print_json
from ..exits import OK
from ..tables import Column, print_table, when
from ..terminal import note
from .common import find, job_parser, loss, short

_DESCRIPTION = """\
List the checkpoints of a job, the newest first. `resume` goes on from the newest one; a job that has
succeeded needs none any more.
"""


def run(action: str, argv: list[str]) -> int:
    """Run the action; gives its exit status."""
    made = job_parser(action, _DESCRIPTION)
    args = made.parse_args(argv)
    return perform(made, args, lambda client: _checkpoints(client, args.job, args.json))


def _checkpoints(client: Client, wanted: str, as_json: bool) -> int:
    job = find(client, wanted)
    found = job.checkpoints()
    if as_json:
        print_json(found)
    elif found:
        print_table(_COLUMNS, found)
    else:
        note(f"Job {short(job.id)} has no checkpoints (it is {in_words(job.info)}).")
    return OK


_COLUMNS: tuple[Column[TrainingCheckpoint], ...] = (
    Column("step", lambda item: str(item.step), right=True),
    Column("training loss", lambda item: loss(item.metrics.get("train_loss")), right=True),
    Column("held-out loss", lambda item: loss(item.metrics.get("valid_loss")), right=True),
    Column("saved", lambda item: when(item.created_at)),
    Column("id", lambda item: item.id, style=lambda _: "dim", shrink=True),
)
