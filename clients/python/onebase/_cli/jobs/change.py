"""`onebase jobs pause | resume | cancel`: how a job goes on."""

from __future__ import annotations

from typing import Final

from ..._client import Client
from ..actions import perform, print_json
from ..exits import OK
from ..terminal import note
from .common import find, job_parser, short

_DESCRIPTIONS: Final = {
    "pause": "Let a job free the machine within a step. It keeps its place; `resume` goes on from there.",
    "resume": "Let a job go on from its last checkpoint: a paused one, or a failed one that is resumable.",
    "cancel": "End a job for good. Its checkpoints are deleted; what its adapter's name answers with stays.",
}
_SAID: Final = {
    "pause": "pauses.",
    "resume": "goes on.",
    "cancel": "is cancelled.",
}


def run(action: str, argv: list[str]) -> int:
    """Run the action; gives its exit status."""
    made = job_parser(action, _DESCRIPTIONS[action], f"  onebase jobs {action} ftjob-3f2a9c41\n")
    args = made.parse_args(argv)
    return perform(made, args, lambda client: _change(action, client, args.job, args.json))


def _change(action: str, client: Client, wanted: str, as_json: bool) -> int:
    job = find(client, wanted)
    {"pause": job.pause, "resume": job.resume, "cancel": job.cancel}[action]()
    if as_json:
        print_json(job.info)
        return OK
    print(f"{short(job.id)}  {job.name} {_SAID[action]}")
    if action == "pause":
        note(f"To go on with it: onebase jobs resume {short(job.id)}")
    elif action == "resume":
        note(f"See how it goes: onebase jobs watch {short(job.id)}")
    return OK
