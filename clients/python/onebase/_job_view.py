"""What both kinds of job handles share: the facts as the server told them last, and what they mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from . import _training_parse
from .errors import TrainingFailedError, TrainingStoppedError
from .training_types import (
    SUCCEEDED,
    TrainingEvent,
    TrainingFailure,
    TrainingJobInfo,
    TrainingProgress,
    TrainingReport,
)

CURVE_EVENTS: Final = 5000
"""The newest events that a curve is made of while there is no result file."""

_GOES_ON: Final = frozenset({"validating_files", "queued", "running"})


class JobView:
    """A job as the server told it last; `refresh` asks again."""

    def __init__(self, info: TrainingJobInfo) -> None:
        self._info = info

    @property
    def info(self) -> TrainingJobInfo:
        """All that is known of it."""
        return self._info

    @property
    def id(self) -> str:
        """`ftjob-...`: with it `client.training.get` finds the job again."""
        return self._info.id

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self._info.name

    @property
    def status(self) -> str:
        """`validating_files`, `queued`, `running`, `paused`, `succeeded`, `failed` or `cancelled`."""
        return self._info.status

    @property
    def progress(self) -> TrainingProgress | None:
        """How far it is; None before it has begun."""
        return self._info.progress

    @property
    def report(self) -> TrainingReport | None:
        """The base before and the adapter after; None until it is trained."""
        return self._info.report

    @property
    def error(self) -> TrainingFailure | None:
        """Why it failed; None if it did not."""
        return self._info.error

    @property
    def fine_tuned_model(self) -> str | None:
        """`name@version`: what to ask for. None until it has succeeded."""
        return self._info.fine_tuned_model

    @property
    def activated(self) -> bool | None:
        """Whether requests that give just the name get it; None until it has succeeded."""
        return self._info.activated

    @property
    def resumable(self) -> bool:
        """Whether `resume` would go on from its last checkpoint."""
        return self._info.resumable

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.name!r}: {in_words(self._info)}>"

    def _take(self, event: TrainingEvent) -> bool:
        """Learn from an event; whether it may mean another status, so that the job must be asked for."""
        if event.type != "metrics":
            return True
        progress = _training_parse.progressed(self._info.progress, event)
        self._info = replace(self._info, progress=progress)
        return False


def settled(info: TrainingJobInfo) -> bool:
    """Whether there is nothing to wait for: it has ended, or is paused."""
    return info.status not in _GOES_ON


def check(info: TrainingJobInfo) -> None:
    """Raise what keeps a settled job from having brought an adapter.

    Raises:
        TrainingFailedError, TrainingStoppedError.
    """
    if info.status == SUCCEEDED:
        return
    what = f"job {info.id} ({info.name})"
    if info.status == "failed":
        error = info.error or TrainingFailure("unknown", "the server does not say why")
        raise TrainingFailedError(
            f"{what} failed ({error.code}): {error.message}", code=error.code, param=error.param, job=info
        )
    hint = ": resume() goes on with it" if info.status == "paused" else ""
    raise TrainingStoppedError(f"{what} is {info.status}{hint}", code=info.status, job=info)


def curve_is_in_file(info: TrainingJobInfo) -> bool:
    return info.status == SUCCEEDED and bool(info.result_files)


def in_words(info: TrainingJobInfo) -> str:
    """`running, step 12 of 100`."""
    progress = info.progress
    if progress is None or not progress.steps:
        return info.status
    return f"{info.status}, step {progress.step} of {progress.steps}"
