"""What the actions share: how jobs are named, and how they are put in words."""

from __future__ import annotations

import argparse
from typing import Final

from ..._client import Client
from ..._jobs import TrainingJob
from .. import actions

PREFIX: Final = "ftjob-"
_LEAST: Final = 4
"""Digits of an id that are enough, if only one job has them."""
_WHOLE: Final = 24
_SHORT: Final = 8


def parser(action: str, description: str, examples: str = "") -> argparse.ArgumentParser:
    """A parser for one action."""
    return actions.parser(f"jobs {action}", description, examples)


def job_parser(action: str, description: str, examples: str = "") -> argparse.ArgumentParser:
    """A parser for an action on one job."""
    made = parser(action, description, examples)
    made.add_argument("job", metavar="ID")
    return made


def find(client: Client, wanted: str) -> TrainingJob:
    """The job whose id a person wrote, or began to write.

    Raises:
        NotFoundError: there is none.
        ValueError: there are several, or too little is given to tell.
    """
    digits = wanted.removeprefix(PREFIX)
    if len(digits) >= _WHOLE:
        return client.training.get(f"{PREFIX}{digits}")
    if len(digits) < _LEAST:
        raise ValueError(f"write at least {_LEAST} digits of a job's id, not {wanted!r}")
    found = [job for job in client.training.list() if job.id.removeprefix(PREFIX).startswith(digits)]
    if len(found) > 1:
        raise ValueError(f"several jobs begin like this: {', '.join(job.id for job in found)}")
    return found[0] if found else client.training.get(f"{PREFIX}{digits}")


def short(job_id: str) -> str:
    """As much of an id as people need."""
    return job_id[: len(PREFIX) + _SHORT]


def status_style(status: str) -> str:
    """The colour of a status."""
    return {"succeeded": "green", "failed": "red", "cancelled": "dim"}.get(status, "yellow")


def loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
