"""Who sees a job while it is waited for: a display, a function of the caller's, or nobody."""

from __future__ import annotations

from types import TracebackType

from .training_types import TrainingCallback, TrainingEvent, TrainingJobInfo


class Watcher:
    """Sees a job that is waited for, in a `with` block. This one does nothing; a display draws."""

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, job: TrainingJobInfo) -> None:
        """The job as it is now."""

    def tell(self, event: TrainingEvent) -> None:
        """What it told just before."""


class _Callback(Watcher):
    def __init__(self, callback: TrainingCallback) -> None:
        self._callback = callback

    def show(self, job: TrainingJobInfo) -> None:
        self._callback(job)


def watcher(progress: bool | TrainingCallback) -> Watcher:
    """What `progress` of `wait` asks for."""
    if progress is True:
        from ._job_display import JobDisplay

        return JobDisplay()
    return Watcher() if progress is False else _Callback(progress)
