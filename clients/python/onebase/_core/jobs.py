"""A job as the server reported it last, what its status means, and who observes a wait for it."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final

from msgspec.structs import replace

from ..errors import TrainingFailedError, TrainingStoppedError
from ..training_types import (
    SUCCEEDED,
    TrainingEvent,
    TrainingFailure,
    TrainingJobInfo,
    TrainingProgress,
    TrainingReport,
    TrainingStop,
)
from .training import progressed

CURVE_EVENTS: Final = 5000
"""The number of newest events that a curve is made of while there is no result file."""

_GOES_ON: Final = frozenset({"validating_files", "queued", "running"})


class JobView:
    """A job as the server reported it last. `refresh` asks again."""

    def __init__(self, info: TrainingJobInfo) -> None:
        self._info = info

    @property
    def info(self) -> TrainingJobInfo:
        """All that is known about the job."""
        return self._info

    @property
    def id(self) -> str:
        """`ftjob-...`: `client.training.get` finds the job by it."""
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
        """Progress of the job. None before it begins."""
        return self._info.progress

    @property
    def report(self) -> TrainingReport | None:
        """The base before and the adapter after. None until the adapter is trained."""
        return self._info.report

    @property
    def error(self) -> TrainingFailure | None:
        """Failure of the job. None if it did not fail."""
        return self._info.error

    @property
    def fine_tuned_model(self) -> str | None:
        """`name@version`, for `adapter=` in a request. None until the job has succeeded."""
        return self._info.fine_tuned_model

    @property
    def activated(self) -> bool | None:
        """Return True if requests for the name alone get this version. None until the job has succeeded."""
        return self._info.activated

    @property
    def estimate(self) -> Mapping[str, Any] | None:
        """Estimate of its training: `seconds`, `total` bytes of memory and its parts. None until it is
        checked."""
        return self._info.estimate

    @property
    def stopped(self) -> TrainingStop | None:
        """Record of who ended it early, and where. None if nobody did."""
        return self._info.stopped

    @property
    def resumable(self) -> bool:
        """Return True if `resume` would continue from the last checkpoint."""
        return self._info.resumable

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.name!r}: {in_words(self._info)}>"

    def _take(self, event: TrainingEvent) -> bool:
        """Learn from an event. Gives whether the server must be asked for the status."""
        if event.type != "metrics":
            return True
        progress = progressed(self._info.progress, event)
        self._info = replace(self._info, progress=progress)
        return False


def settled(info: TrainingJobInfo) -> bool:
    """Return True if there is nothing to wait for: it has ended, or is paused."""
    return info.status not in _GOES_ON


def check_outcome(info: TrainingJobInfo) -> None:
    """Raise unless a settled job has succeeded, or is held as it was asked to.

    Raises:
        TrainingFailedError, TrainingStoppedError.
    """
    if info.status == SUCCEEDED or info.held:
        return
    what = f"job {info.id} ({info.name})"
    if info.status == "failed":
        error = info.error or TrainingFailure("unknown", "the server does not say why")
        raise TrainingFailedError(
            f"{what} failed ({error.code}): {error.message}", code=error.code, param=error.param, job=info
        )
    hint = ": resume it to continue" if info.status == "paused" else ""
    raise TrainingStoppedError(f"{what} is {info.status}{hint}", code=info.status, job=info)


def curve_is_in_file(info: TrainingJobInfo) -> bool:
    return info.status == SUCCEEDED and bool(info.result_files)


def in_words(info: TrainingJobInfo) -> str:
    """`running, step 12 of 100`."""
    progress = info.progress
    if info.held:
        return "paused, checked and not begun"
    if progress is None or not progress.steps:
        return info.status
    return f"{info.status}, step {progress.step} of {progress.steps}"


class JobObserver:
    """Follows a wait for a job, in a `with` block. This one does nothing."""

    def __enter__(self) -> JobObserver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, job: TrainingJobInfo) -> None:
        """Record the job as it is now."""

    def note(self, event: TrainingEvent) -> None:
        """Record an event of the job."""
