"""What a person sees while an adapter is on its way: bars at a terminal, a line for each stage in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Final

from ...adapter_types import FAILED, READY, Progress
from ..tables import console, size
from ..terminal import note

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

PHASES: Final[Mapping[str, str]] = {
    "uploading": "sending",
    "pulling": "pulling",
    "validating": "proving",
    "proving": "proving",
}
"""Which bar a stage moves: the server validates and proves in one go, and counts it as one."""


class Journey:
    """A progress callback, for a `with` block. At a terminal each phase has a bar."""

    def __init__(self, out: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        chosen = out or console(stderr=True)
        moves = chosen.is_terminal and not chosen.is_dumb_terminal
        self._bars = _Bars(chosen, clock) if moves else None
        self._stage: str | None = None

    def __enter__(self) -> Journey:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    @property
    def is_at_server(self) -> bool:
        """Whether the server has all that it needs to go on alone."""
        return self._stage not in (None, "uploading")

    def __call__(self, step: Progress) -> None:
        new, self._stage = step.stage != self._stage, step.stage
        if self._bars is not None:
            self._bars.move(step)
        elif new and step.stage not in (READY, FAILED):
            note(f"{step.stage} {size(step.bytes_total)}" if step.bytes_total else step.stage)


class _Bars:
    """One bar a phase, in the order in which they come."""

    def __init__(self, out: Console, clock: Callable[[], float]) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self._drawn = Progress(
            SpinnerColumn(finished_text="[green]✓[/]" if not out.options.ascii_only else "*"),
            TextColumn("{task.description:<8}"),
            BarColumn(28, complete_style="cyan", finished_style="green", pulse_style="cyan"),
            TextColumn("{task.fields[told]}", style="dim"),
            console=out,
        )
        self._clock = clock
        self._tasks: dict[str, TaskID] = {}
        self._began = 0.0
        self._amount = ""

    def start(self) -> None:
        self._drawn.start()

    def stop(self) -> None:
        self._drawn.stop()

    def move(self, step: Progress) -> None:
        if step.stage in (READY, FAILED):
            self._end(step.stage)
            return
        phase = PHASES.get(step.stage, step.stage)
        if phase not in self._tasks:
            self._end(READY)
            self._began = self._clock()
            self._tasks[phase] = self._drawn.add_task(phase, total=None, told="")
        self._amount = size(step.bytes_total) if step.bytes_total else ""
        told = self._sent(step) if step.bytes_total else self._share(step)
        total = None if step.fraction is None else 1.0
        self._drawn.update(self._tasks[phase], total=total, completed=step.fraction or 0.0, told=told)

    def _end(self, state: str) -> None:
        """The phase so far is over: fill its bar and say how long it took."""
        if not self._tasks:
            return
        last = list(self._tasks.values())[-1]
        if state == READY:
            told = f"{self._amount}  {self._clock() - self._began:.1f} s".strip()
            self._drawn.update(last, total=1.0, completed=1.0, told=told)
        else:
            self._drawn.update(last, told="[red]failed[/]")

    def _sent(self, step: Progress) -> str:
        done, passed = step.bytes_done or 0, self._clock() - self._began
        if step.bytes_total == done:
            return self._amount
        rate = f"  {size(done / passed)}/s" if passed > 0 else ""
        return f"{size(done)} of {self._amount}{rate}"

    def _share(self, step: Progress) -> str:
        return "" if step.fraction is None else f"{step.fraction:.0%}"
