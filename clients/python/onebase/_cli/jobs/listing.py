"""`onebase jobs list`: the jobs of a server."""

from __future__ import annotations

from ..._client import Client
from ...training_types import TrainingJobInfo
from ..actions import perform, print_json
from ..exits import OK
from ..tables import ROOMY, WIDE, Column, duration, print_table, when
from ..terminal import note
from .common import loss, parser, short, status_style

_DESCRIPTION = "List the jobs of a server, the newest first. Losses are of held-out rows, base and adapter."


def run(action: str, argv: list[str]) -> int:
    """Run the action; gives its exit status."""
    made = parser(action, _DESCRIPTION)
    made.add_argument("--limit", type=int, default=50, metavar="N", help="not more than N (default: 50)")
    args = made.parse_args(argv)
    return perform(made, args, lambda client: _list(client, args.limit, args.json))


def _list(client: Client, limit: int, as_json: bool) -> int:
    jobs = tuple(job.info for job in client.training.list(limit=limit))
    if as_json:
        print_json(jobs)
    elif jobs:
        print_table(COLUMNS, jobs)
    else:
        note("The server has no jobs. Begin one: onebase jobs create FILE --name NAME")
    return OK


def _step(job: TrainingJobInfo) -> str:
    return f"{job.progress.step}/{job.progress.steps}" if job.progress and job.progress.steps else ""


def _left(job: TrainingJobInfo) -> str:
    left = job.progress.seconds_left if job.progress and job.status == "running" else None
    return "" if left is None else duration(left)


def _after(job: TrainingJobInfo) -> float | None:
    if job.report is not None:
        return job.report.loss_after
    return job.progress.eval_loss if job.progress else None


def _active(job: TrainingJobInfo) -> str:
    return "" if job.activated is None else "yes" if job.activated else "no"


COLUMNS: tuple[Column[TrainingJobInfo], ...] = (
    Column("id", lambda job: short(job.id), style=lambda _: "bold"),
    Column("name", lambda job: job.name, shrink=True),
    Column("status", lambda job: job.status, style=lambda job: status_style(job.status)),
    Column("step", _step, right=True),
    Column("left", _left, right=True, at=72),
    Column("base", lambda job: loss(job.report.loss_before) if job.report else "", right=True, at=WIDE),
    Column("adapter", lambda job: loss(_after(job)), right=True),
    Column("active", _active),
    Column("method", lambda job: job.method, at=ROOMY),
    Column("created", lambda job: when(job.created_at), at=WIDE),
)
