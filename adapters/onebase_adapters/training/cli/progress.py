"""A run on the terminal: one live bar, evaluations as lines above it, and a table at the end."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table

from onebase_adapters.training import events
from onebase_adapters.training.cli.common import print_error
from onebase_adapters.training.cli.printable import shown
from onebase_adapters.training.result import Report, sparkline

_PHASES = {
    "validating_files": "reading the data",
    "training": "training",
    "measuring": "measuring",
    "saving": "saving",
}
_WORTH_KNOWING = {
    "truncated": "rows cut at max_length",
    "dropped": "rows dropped as too long",
    "duplicates": "rows that say what another one says",
    "leakage": "rows that are also held out: the held-out loss will look too good",
}


class Display:
    """Shows events. `quiet`: for processes beside the first, which show nothing."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = Console(quiet=True) if quiet else console
        self._failures = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID = self._progress.add_task("starting", total=None, facts="")
        self._losses: list[float] = []

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def loading(self, message: str, part: float) -> None:
        """Before the run: what is being fetched or loaded."""
        self._update(message, None, None)

    def show(self, event: events.Event) -> None:
        """Show one event."""
        handlers: dict[type[events.Event], Any] = {
            events.Phase: self._phase,
            events.Progress: self._progressed,
            events.DataChecked: self._data_checked,
            events.Planned: self._planned,
            events.StepDone: self._step_done,
            events.Evaluated: self._evaluated,
            events.Sampled: self._sampled,
            events.Measured: self._measured,
            events.Notice: self._notice,
        }
        if handler := handlers.get(type(event)):
            handler(event)

    def failed(self, message: str) -> None:
        self._progress.stop()
        print_error(self._failures, message)

    def finished(self, report: Report, folder: Path) -> None:
        """The table of what came of it, and what to do next."""
        self._progress.stop()
        self._console.print(
            f"\n{shown(report.name)}: base against adapter, on held-out rows", highlight=False, style="bold"
        )
        self._console.print(_results(report))
        self._console.print(_figures(report), highlight=False)
        if self._losses:
            self._console.print(f"loss {sparkline(self._losses, 48)} {self._losses[-1]:.4f}", highlight=False)
        path, name = shown(str(folder / "adapter")), shown(report.name)
        self._console.print(
            f"\nThe adapter is in [bold]{path}[/]. Serve it:\n"
            f"  onebase serve --adapter {name}={path}\n"
            "or bring it to a server that runs:\n"
            f"  onebase adapters push {path} --name {name} --activate\n",
            highlight=False,
            soft_wrap=True,
        )

    def _phase(self, event: events.Phase) -> None:
        text = _PHASES.get(event.name, event.name)
        self._update(f"{text} {event.message}".strip(), None, None)

    def _progressed(self, event: events.Progress) -> None:
        self._update(_PHASES.get(event.name, event.name), round(100 * event.part), 100)

    def _data_checked(self, event: events.DataChecked) -> None:
        for part, found in (("to train on", event.report), ("held out", event.report.get("evaluation"))):
            if found:
                self._say(f"{part}: {found['rows']:,} rows, {found['tokens']:,} tokens")
                self._warn_of(found["counts"])

    def _warn_of(self, counts: dict[str, int]) -> None:
        told = [f"{counts[name]:,} {words}" for name, words in _WORTH_KNOWING.items() if counts.get(name)]
        if told:
            self._say(f"[yellow]{'; '.join(told)}[/] (`onebase data check` shows which)")

    def _planned(self, event: events.Planned) -> None:
        estimate, recipe = event.estimate, event.recipe
        self._say(
            f"adapter: {estimate['parameters']:,} parameters, r={recipe['r']} on "
            f"{', '.join(recipe['targets'])}; {event.steps} steps of {recipe['batch_size']} rows, "
            f"learning rate {recipe['learning_rate']:g}"
        )
        if event.first_step:
            self._say(f"going on after step {event.first_step}")

    def _step_done(self, event: events.StepDone) -> None:
        self._losses.append(event.loss)
        facts = (
            f"loss {event.loss:.4f}  {event.tokens_per_second:,.0f} tok/s  "
            f"{_duration(event.seconds_left)} left"
        )
        if not self._console.is_terminal:
            if event.step == 1 or event.step % max(1, event.steps // 20) == 0 or event.step == event.steps:
                self._say(f"step {event.step}/{event.steps}  {facts}")
            return
        self._update("training", event.step, event.steps, facts)

    def _evaluated(self, event: events.Evaluated) -> None:
        who = f"step {event.step}" if event.step else "base"
        rewards = "".join(f"  {name} {value:.3f}" for name, value in event.rewards.items())
        best = "  [green]best[/]" if event.best else ""
        self._say(f"{who}: held-out loss {event.loss:.4f}{rewards}{best}")

    def _sampled(self, event: events.Sampled) -> None:
        who = f"step {event.step}" if event.step else "base"
        self._say(f"{who}: {shown(event.prompt)} [dim]->[/] [italic]{shown(event.text)}[/]")

    def _measured(self, event: events.Measured) -> None:
        found = "  ".join(f"{shown(name)} {value:.1%}" for name, value in event.metrics.items())
        self._say(f"{event.subject}, {event.rows} held-out rows: {found}")

    def _notice(self, event: events.Notice) -> None:
        text = shown(event.message)
        self._say(f"[yellow]{text}[/]" if event.level == "warn" else text)

    def _say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False)

    def _update(self, text: str, done: int | None, total: int | None, facts: str = "") -> None:
        self._progress.update(
            self._task, description=shown(text), completed=done or 0, total=total, facts=facts
        )


def _results(report: Report) -> Table:
    table = Table()
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("adapter", justify="right")
    if report.loss_before is not None and report.loss_after is not None:
        table.add_row("loss", f"{report.loss_before:.4f}", f"{report.loss_after:.4f}")
    for name, value in report.metrics_after.items():
        before = report.metrics_before.get(name)
        table.add_row(shown(name), "" if before is None else f"{before:.1%}", f"{value:.1%}")
    if not table.row_count:
        table.add_row("nothing was held out", "", "")
    return table


def _figures(report: Report) -> str:
    speed = report.tokens / report.seconds if report.seconds else 0.0
    return (
        f"{report.steps} steps, best after {report.best_step}; {report.tokens:,} tokens in "
        f"{_duration(report.seconds)} ({speed:,.0f} tok/s); {report.adapter_bytes / 1e6:.1f} MB; "
        f"at most {report.peak_memory_bytes / 1e9:.1f} GB of memory"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    )
