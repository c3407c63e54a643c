"""`onebase jobs watch | pause | resume | stop | cancel`: follow a job, end it, continue it."""

from __future__ import annotations

import sys
from typing import Any, Final

from ..._sync.client import Client
from ..._sync.jobs import TrainingJob
from ..._terminal.ui import console, note, printable
from ...errors import TrainingFailedError, TrainingStoppedError
from ..command import FAILED, INTERRUPTED, OK, perform, plain, print_json
from .show import find, job_parser, print_held, print_job, short

_DESCRIPTIONS: Final = {
    "watch": """\
Show a job while it runs: a bar with loss, tokens per second and time left, and above it what is
measured. Ctrl-C stops watching, not the job. The exit status is 0 if the job has succeeded, or is
checked and on hold as it was made to be; 1 if it failed, was cancelled or is paused.
""",
    "pause": "Stop a job within a step and free the machine. `resume` continues it from there.",
    "resume": """\
Continue a job from its last checkpoint: a paused one, or a failed one that is resumable. One that
was made with --hold begins to train.
""",
    "stop": """\
End a job's training at its next step and keep the best by held-out loss. It is proved and activated
as at the job's own end. A job that is paused, or failed and is resumable, goes on for that alone.
""",
    "cancel": "End a job for good. Its checkpoints are deleted. Versions of its adapter stay as they are.",
}
_DONE: Final = {
    "pause": "pauses.",
    "resume": "continues.",
    "stop": "stops at its next step, and keeps the best.",
    "cancel": "is cancelled.",
}


def run(action: str, argv: list[str]) -> int:
    """Run the action. Gives its exit status."""
    made = job_parser(action, _DESCRIPTIONS[action], f"  onebase jobs {action} ftjob-3f2a9c41\n")
    args = made.parse_args(argv)
    if action == "watch":
        return perform(made, args, lambda client: follow(client, find(client, args.job), args.json))
    return perform(made, args, lambda client: _change(action, client, args.job, args.json))


def follow(client: Client, job: TrainingJob, as_json: bool) -> int:
    """Watch a job to its end, then show its result. Gives the exit status."""
    try:
        job.wait()
    except KeyboardInterrupt:
        note(f"\nThe job continues. To watch it again: onebase jobs watch {short(job.id)}")
        note(f"To end it: onebase jobs cancel {short(job.id)}")
        return INTERRUPTED
    except TrainingStoppedError as error:
        if as_json:
            print_json(error.job)
        print(f"onebase: {printable(_stopped(job, error))}", file=sys.stderr)
        _next_step(job, error)
        return FAILED
    if as_json:
        print_json(_whole(job))
        return OK
    if job.info.held:
        print_held(console(), job.info, job.data_report())
        note(f"Train it: onebase jobs resume {short(job.id)}")
        note(f"Or not: onebase jobs cancel {short(job.id)}")
        return OK
    print_job(console(), job.info, job.curve())
    _use(job)
    return OK


def _whole(job: TrainingJob) -> Any:
    """Return the job as JSON; of one on hold with what is in its files."""
    return plain(job.info) | {"data": job.data_report()} if job.info.held else job.info


def _stopped(job: TrainingJob, error: TrainingStoppedError) -> str:
    """Return a sentence on the job's end. The SDK's own sentence names the method that continues it."""
    failed = isinstance(error, TrainingFailedError)
    return error.message if failed else f"job {job.id} ({job.name}) is {job.status}"


def _next_step(job: TrainingJob, error: TrainingStoppedError) -> None:
    if error.message.rpartition("\n")[2].startswith("  and "):
        note(f"All of them: onebase jobs events {short(job.id)} --limit 0")
    if job.status in ("failed", "paused") and job.resumable:
        note(f"To continue from its last checkpoint: onebase jobs resume {short(job.id)}")


def _use(job: TrainingJob) -> None:
    if job.activated:
        note(f'Ask it: onebase generate --adapter {job.name} "..."')
    elif job.fine_tuned_model is not None:
        note(f'Try it: onebase generate --adapter {job.fine_tuned_model} "..."')
        version = job.fine_tuned_model.rpartition("@")[2]
        note(f"Activate it: onebase adapters activate {job.name} {version}")


def _change(action: str, client: Client, wanted: str, as_json: bool) -> int:
    job = find(client, wanted)
    held = job.info.held
    {"pause": job.pause, "resume": job.resume, "stop": job.stop, "cancel": job.cancel}[action]()
    if as_json:
        print_json(job.info)
        return OK
    begins = action == "resume" and held and not job.info.hold
    print(f"{short(job.id)}  {job.name} {'begins to train.' if begins else _DONE[action]}")
    if action == "pause":
        note(f"To continue it: onebase jobs resume {short(job.id)}")
    elif action in ("resume", "stop"):
        note(f"Watch it: onebase jobs watch {short(job.id)}")
    return OK
