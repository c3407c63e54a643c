"""`onebase jobs watch`: a live bar until the job ends."""

from __future__ import annotations

from ..._client import Client
from ..._jobs import TrainingJob
from ...errors import TrainingFailedError, TrainingStoppedError
from ..actions import perform, print_json
from ..exits import OK, report
from ..tables import console
from ..terminal import note
from .common import find, job_parser, short
from .results import print_job

_DESCRIPTION = """\
Show a job while it runs: a bar with loss, tokens per second and time left, and above it what it measures.
Ctrl-C stops watching, not the job. The exit status is 0 when it has succeeded, 1 when it failed, was
cancelled or is paused.
"""


def run(action: str, argv: list[str]) -> int:
    """Run the action; gives its exit status."""
    made = job_parser(action, _DESCRIPTION, "  onebase jobs watch ftjob-3f2a9c41\n")
    args = made.parse_args(argv)
    return perform(made, args, lambda client: follow(client, find(client, args.job), args.json))


def follow(client: Client, job: TrainingJob, as_json: bool) -> int:
    """Watch a job to its end, then show what came of it; gives the exit status."""
    try:
        job.wait()
    except KeyboardInterrupt:
        note(f"\nThe job goes on. To see it again: onebase jobs watch {short(job.id)}")
        note(f"To end it: onebase jobs cancel {short(job.id)}")
        raise
    except TrainingStoppedError as error:
        if as_json:
            print_json(error.job)
        failed = report(error, client.url)
        _next_step(job, error)
        return failed
    if as_json:
        print_json(job.info)
        return OK
    print_job(console(), job.info, job.curve())
    _use(job)
    return OK


def _next_step(job: TrainingJob, error: TrainingStoppedError) -> None:
    if not isinstance(error, TrainingFailedError) and job.status != "paused":
        return
    if job.resumable:
        note(f"To go on from its last checkpoint: onebase jobs resume {short(job.id)}")


def _use(job: TrainingJob) -> None:
    if job.activated:
        note(f'Ask it: onebase generate --adapter {job.name} "..."')
    elif job.fine_tuned_model is not None:
        note(f'Try it: onebase generate --adapter {job.fine_tuned_model} "..."')
        version = job.fine_tuned_model.rpartition("@")[2]
        note(f"Let it answer to its name: onebase adapters activate {job.name} {version}")
