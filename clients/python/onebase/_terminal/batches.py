"""A batch while it is waited for, on stderr: a bar, or lines without a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Final

from .._core.batches import BatchObserver
from ..batch_types import Batch, BatchCallback
from .ui import bars, can_move, console, line, printable

if TYPE_CHECKING:
    from rich.console import Console

LINES: Final = 20
"""Lines about rows in all, if there is no bar."""
_STATUSES: Final = {
    "validating": "checking the file",
    "in_progress": "answering",
    "finalizing": "keeping the answers",
    "cancelling": "ending",
}


class BatchDisplay(BatchObserver):
    """Draws until the end of its `with` block."""

    def __init__(self, out: Console | None = None) -> None:
        self._out = out or console(stderr=True)
        self._bar = bars(self._out, transient=True) if can_move(self._out) else None
        self._task = None if self._bar is None else self._bar.add_task("", total=None, figures="")
        self._doing = ""
        self._told = 0

    def __enter__(self) -> BatchDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, batch: Batch) -> None:
        if self._bar is None or self._task is None:
            self._print(batch)
            return
        self._bar.update(
            self._task,
            description=printable(doing(batch)),
            total=batch.total or None,
            completed=batch.done,
            figures=printable(figures(batch)),
        )
        self._bar.start()  # not before: an empty bar says nothing

    def _print(self, batch: Batch) -> None:
        now = doing(batch)
        step = batch.done * LINES // batch.total if batch.total else 0
        if not batch.ended and (now != self._doing or step > self._told):
            self._out.print(line(f"{now}  {figures(batch)}".rstrip()), soft_wrap=True)
        self._doing, self._told = now, step


def doing(batch: Batch) -> str:
    """Return the batch's present work, in words."""
    return _STATUSES.get(batch.status, batch.status)


def figures(batch: Batch) -> str:
    """`120/400 rows, 2 failed`, and why it waits."""
    if not batch.total:
        return batch.waiting or ""
    failed = f", {batch.failed:,} failed" if batch.failed else ""
    waiting = f"  waiting: {batch.waiting}" if batch.waiting else ""
    return f"{batch.done:,}/{batch.total:,} rows{failed}{waiting}"


class _Callback(BatchObserver):
    def __init__(self, callback: BatchCallback) -> None:
        self._callback = callback

    def show(self, batch: Batch) -> None:
        self._callback(batch)


def observer(progress: bool | BatchCallback) -> BatchObserver:
    """Return the observer that `progress` of `wait` asks for: a display, the caller's function, or none."""
    if progress is True:
        return BatchDisplay()
    return BatchObserver() if progress is False else _Callback(progress)
