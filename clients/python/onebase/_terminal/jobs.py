"""A job while it is waited for, on stderr: a bar and lines above it, or lines alone without a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from .._core.jobs import JobObserver
from ..training_types import TrainingCallback, TrainingEvent, TrainingJobInfo
from .ui import bars, can_move, console, duration, line, printable

if TYPE_CHECKING:
    from rich.console import Console

STEP_LINES: Final = 20
"""Lines about steps in all, if there is no bar."""

_STATUSES: Final = {
    "validating_files": "checking the files",
    "queued": "waiting for its turn",
    "running": "starting",
    "paused": "paused",
}
_ANNOUNCED: Final = frozenset({"queued", "paused"})
"""Statuses that an event tells of as well."""
_PHASES: Final = {
    "estimating": "planning",
    "baseline": "measuring the base",
    "samples": "answering the sample prompts",
}
_MOST_UNGRADED: Final = 0.5
"""Part of a step's replies that could not be graded, above which the log says so."""
_SILENT: Final = frozenset({"phase", "progress", "saved"})
"""Kinds of messages that the bar shows anyway, or that say too little."""


class JobDisplay(JobObserver):
    """Draws until the end of its `with` block."""

    def __init__(self, out: Console | None = None) -> None:
        self._out = out or console(stderr=True)
        self._bar = _Bar(self._out) if can_move(self._out) else None
        self._doing: str | None = None
        self._step = 0
        self._log = EventLines()

    def __enter__(self) -> JobDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, job: TrainingJobInfo) -> None:
        if self._bar is not None:
            self._bar.move(job)
            return
        now = doing(job)
        announced = self._doing is not None and job.status in _ANNOUNCED
        if now != self._doing and not job.ended and not announced:
            self._print(now)
        self._doing = now
        self._step_line(job)

    def note(self, event: TrainingEvent) -> None:
        if event.data.get("problems") or event.data.get("code"):
            return  # the error in which the wait ends tells why, with the bad lines
        for text, style in self._log.of(event):
            self._print(text, style)

    def _step_line(self, job: TrainingJobInfo) -> None:
        progress = job.progress
        if job.status != "running" or progress is None or not progress.steps or progress.loss is None:
            return
        every = max(1, progress.steps // STEP_LINES)
        new, self._step = progress.step != self._step, progress.step
        if new and (progress.step % every == 0 or progress.step in (1, progress.steps)):
            self._print(f"step {progress.step}/{progress.steps}  {figures(job)}")

    def _print(self, text: str, style: str = "") -> None:
        self._out.print(line(text, style), soft_wrap=True)


class _Bar:
    """One bar. It vanishes in the end; the lines above it stay."""

    def __init__(self, out: Console) -> None:
        self._drawn = bars(out, transient=True)
        self._task = self._drawn.add_task("", total=None, figures="")

    def stop(self) -> None:
        self._drawn.stop()

    def move(self, job: TrainingJobInfo) -> None:
        progress = job.progress
        total = progress.steps if progress and job.status == "running" else None
        self._drawn.update(
            self._task,
            description=printable(f"{job.name}  {doing(job)}"),
            total=total,
            completed=progress.step if progress and total else 0,
            figures=f"{progress.step}/{total}  {figures(job)}" if progress and total else "",
        )
        self._drawn.start()  # not before: an empty bar says nothing


def doing(job: TrainingJobInfo) -> str:
    """Return the job's present work, in words."""
    phase = job.progress.phase if job.progress else None
    if job.status != "running" or phase in (None, "validating_files"):  # a check's phase is over by then
        return _STATUSES.get(job.status, job.status)
    return _PHASES.get(phase, phase)


def figures(job: TrainingJobInfo) -> str:
    """`loss 1.2345  1,234 tokens/s  2 min 03 s left`, as far as it is known."""
    progress = job.progress
    if progress is None:
        return ""
    parts = []
    if progress.loss is not None:
        rewarded = job.method == "reinforcement"
        parts.append(f"reward {-progress.loss:.4f}" if rewarded else f"loss {progress.loss:.4f}")
    if progress.tokens_per_second:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if progress.seconds_left is not None:
        parts.append(f"{duration(progress.seconds_left)} left")
    return "  ".join(parts)


class EventLines:
    """The lines that the events of one job add to a log, which are given in their order."""

    def __init__(self) -> None:
        self._ungraded = 0.0
        """Part of the last step's replies that could not be graded."""

    def of(self, event: TrainingEvent) -> Iterator[tuple[str, str]]:
        """Yield the lines of an event, each with its style in rich's words."""
        data = event.data
        if event.type == "metrics":
            yield from self._failing(data)
            yield from _measured(data)
        elif data.get("kind") == "sampled":
            yield f"{_who(data)}: {data.get('prompt', '')} -> {data.get('text', '')}", "italic"
        elif data.get("kind") not in _SILENT:
            text = event.message
            if data.get("code") == "invalid_file":
                text = text.partition("\n")[0]  # the events before it have the lines
            yield text, {"warn": "yellow", "error": "red"}.get(event.level, "")
            for problem in data.get("problems") or ():
                yield f"  {_problem(problem)}", "red"

    def _failing(self, data: Any) -> Iterator[tuple[str, str]]:
        """Say that most replies cannot be graded, once until fewer of them cannot."""
        ungraded = data.get("rewards_failed")
        if ungraded is None:  # no step's
            return
        before, self._ungraded = self._ungraded, ungraded
        if before <= _MOST_UNGRADED < ungraded:
            share = f"{ungraded:.0%} of the replies could not be graded"
            yield f"{_who(data)}: {share}, and got the lowest reward", "yellow"


def _measured(data: Any) -> Iterator[tuple[str, str]]:
    """Held-out losses and metrics. Steps move the bar instead."""
    if (reward := data.get("rewards_mean")) is not None and data.get("valid_loss") is not None:
        best = "  best" if data.get("best") else ""
        yield f"{_who(data)}: held-out reward {reward:.4f}{best}", "green" if best else ""
    elif data.get("valid_loss") is not None:
        best = "  best" if data.get("best") else ""
        yield f"{_who(data)}: held-out loss {data['valid_loss']:.4f}{best}", "green" if best else ""
    elif data.get("parent_loss") is not None:
        yield f"what it goes on from: held-out loss {data['parent_loss']:.4f}", ""
    elif data.get("active_loss") is not None:
        yield f"{data.get('active')}, which is active: held-out loss {data['active_loss']:.4f}", ""
    elif isinstance(data.get("metrics"), dict):
        shown = "  ".join(f"{name} {value:.1%}" for name, value in data["metrics"].items())
        yield f"{data.get('subject')}, {data.get('rows')} held-out rows: {shown}", ""


def _who(data: Any) -> str:
    return f"step {data['step']}" if data.get("step") else "base"


def _problem(problem: Any) -> str:
    place = f"line {problem.get('line')}" + (f", {problem['field']}" if problem.get("field") else "")
    return f"{place}: {problem.get('reason')}"


class _Callback(JobObserver):
    def __init__(self, callback: TrainingCallback) -> None:
        self._callback = callback

    def show(self, job: TrainingJobInfo) -> None:
        self._callback(job)


def observer(progress: bool | TrainingCallback) -> JobObserver:
    """Return the observer that `progress` of `wait` asks for: a display, the caller's function, or none."""
    if progress is True:
        return JobDisplay()
    return JobObserver() if progress is False else _Callback(progress)
