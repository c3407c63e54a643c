"""Terminal output of the commands: text, tables, charts, progress bars, sizes and durations."""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from ..adapter_types import FAILED, READY, Progress
from ..types import AdapterWeight, Generation, Piece

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID
    from rich.table import Table
    from rich.text import Text

T = TypeVar("T")

_GAP: Final = 2
"""Blanks between columns."""
_LEAST: Final = 24
"""Characters that a column keeps at least where it shrinks so that others are not left out."""
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"
_HEIGHTS: Final = "▁▂▃▄▅▆▇█"
_ASCII_HEIGHTS: Final = "_.-=*#%@"

# ---- text --------------------------------------------------------------------------------------------


def show(text: str) -> None:
    """Write to stdout at once. A terminal gets no control characters: a model must not steer it."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def show_pieces(pieces: Iterable[Piece]) -> None:
    """Write an answer to stdout as it comes. A terminal shows the thought in grey; a pipe gets none."""
    thinking = False
    for piece in pieces:
        if piece.reasoning and sys.stdout.isatty():
            sys.stdout.write(f"\033[2m{printable(piece.reasoning)}\033[0m")
            sys.stdout.flush()
            thinking = True
        if piece.text and thinking:
            show("\n\n")
            thinking = False
        show(piece.text)


def printable(text: str) -> str:
    """`text` without control characters other than tab and newline."""
    return _CONTROL.sub("", text)


def note(text: str) -> None:
    """Print to stderr what is not part of the result."""
    print(printable(text), file=sys.stderr, flush=True)


def speed(result: Generation) -> str:
    """Return one line about an answer: its length, its speed, and which adapter gave it."""
    rate = result.tokens_per_second
    parts = [
        f"{result.usage.completion_tokens} tokens",
        f"first after {result.timing.ttft_s:.2f} s",
        "" if rate is None else f"{rate:.1f} tokens/s",
        "cut off by max-tokens" if result.choices[0].finish_reason == "length" else "",
        describe(result.adapter),
    ]
    return ", ".join(part for part in parts if part)


def describe(adapter: str | tuple[AdapterWeight, ...] | None) -> str:
    """Return an adapter, or a weighted sum, or the base, in words."""
    if adapter is None:
        return "base"
    if isinstance(adapter, str):
        return adapter
    return " + ".join(f"{term.weight:g}*{term.name}" for term in adapter)


def line(text: str, style: str = "") -> Text:
    """Return text from anywhere, made harmless: it can neither steer the terminal nor style itself."""
    from rich.text import Text

    return Text(printable(text), style)


def beginning(text: str, most: int = 160) -> str:
    """Return a text in one line, cut at `most` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


def console(*, stderr: bool = False) -> Console:
    """Return the terminal. Nothing is coloured for looking like a number."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def size(count: float) -> str:
    """Return bytes for people: `4.9 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def when(moment: float, now: float | None = None) -> str:
    """Return a Unix time for people: `5 min ago`, or the date when it is older than two days."""
    passed = (time.time() if now is None else now) - moment
    if passed < 60:
        return "just now"
    for limit, unit, name in ((3600, 60, "min"), (86400, 3600, "h"), (172800, 86400, "day")):
        if passed < limit:
            return f"{passed / unit:.0f} {name} ago"
    return datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M")


def duration(seconds: float) -> str:
    """Return seconds for people: `12 s`, `2 min 03 s`, `1 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


# ---- tables -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column(Generic[T]):
    """One column: its title, and the text of its cell for an item."""

    title: str
    cell: Callable[[T], str]
    right: bool = False
    """Whether it is aligned to the right, as numbers are."""
    spare: int = 0
    """Columns with the highest number are left out first where there is no room for all; 0 always stays."""
    style: Callable[[T], str] = lambda _: ""
    """The style of the cell, in rich's words."""
    shrink: bool = False
    """Whether its cells are cut if the terminal is too narrow."""


def print_table(columns: Sequence[Column[T]], items: Sequence[T]) -> None:
    """Print one line for each item. A pipe gets every column in full, separated by tabs."""
    if sys.stdout.isatty():
        out = console()
        out.print(table(columns, items, out.width))
        return
    print("\t".join(column.title for column in columns))
    for item in items:
        print("\t".join(printable(column.cell(item)).replace("\t", " ") for column in columns))


def table(columns: Iterable[Column[T]], items: Sequence[T], width: int) -> Table:
    """Return a table of the columns that `width` has room for."""
    from rich.table import Table

    chosen = _fitting(list(columns), items, width)
    made = Table(box=None, header_style="dim", padding=(0, _GAP, 0, 0), pad_edge=False)
    for column, room in zip(chosen, _widths(chosen, items, width), strict=True):
        made.add_column(
            line(column.title),
            justify="right" if column.right else "left",
            no_wrap=True,
            overflow="ellipsis",
            min_width=room,
            max_width=room,
        )
    for item in items:
        made.add_row(*(line(column.cell(item), column.style(item)) for column in chosen))
    return made


def _fitting(columns: list[Column[T]], items: Sequence[T], width: int) -> list[Column[T]]:
    """Return the columns without those that must be spared."""
    needed = {
        one.title: min(widest, max(_LEAST, len(one.title))) if one.shrink else widest
        for one, widest in zip(columns, _longest(columns, items), strict=True)
    }
    while sum(needed[one.title] + _GAP for one in columns) - _GAP > width:
        last = max(columns, key=lambda one: one.spare)
        if not last.spare:
            break
        columns = [one for one in columns if one is not last]
    return columns


def _longest(columns: Sequence[Column[T]], items: Sequence[T]) -> list[int]:
    return [max(len(one.title), *(len(one.cell(item)) for item in items), 0) for one in columns]


def _widths(columns: Sequence[Column[T]], items: Sequence[T], width: int) -> list[int]:
    """Return each column's width, that of its longest cell. Columns that shrink share the space that the
    others leave, the narrowest first."""
    widths = _longest(columns, items)
    left = width - sum(widest for one, widest in zip(columns, widths, strict=True) if not one.shrink)
    left -= _GAP * (len(columns) - 1)
    shrinking = sorted((place for place, one in enumerate(columns) if one.shrink), key=widths.__getitem__)
    for number, place in enumerate(shrinking):
        share = max(len(columns[place].title), left // (len(shrinking) - number))
        widths[place] = min(widths[place], share)
        left -= widths[place]
    return widths


# ---- charts -------------------------------------------------------------------------------------------


def bar(value: float, largest: float, width: int, *, ascii_only: bool = False) -> str:
    """Return a bar for `value`. `largest` fills `width` characters; anything above 0 shows at least a
    little."""
    if value <= 0 or largest <= 0:
        return ""
    if ascii_only:
        return "#" * max(1, round(value / largest * width))
    eighths = max(1, round(value / largest * width * 8))
    full, rest = divmod(eighths, 8)
    return _EIGHTHS[8] * full + (_EIGHTHS[rest] if rest else "")


def sparkline(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """Return a chart of at most `width` characters, from the smallest value (lowest) to the largest
    (highest).

    If there are more values than characters, each character is the mean of its share.
    """
    heights = _ASCII_HEIGHTS if ascii_only else _HEIGHTS
    count = min(width, len(values))
    edges = [round(place * len(values) / count) for place in range(count + 1)] if count else [0]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    if high <= low:
        return heights[0] * len(means)
    return "".join(heights[min(7, int((mean - low) / (high - low) * 8))] for mean in means)


def sparklines(
    groups: Mapping[str, Mapping[int, float]], width: int, *, ascii_only: bool = False
) -> dict[str, str]:
    """Return a chart for each group of values by place, all on one scale that begins at 0.

    If there are more places than `width`, several share a character, which shows the largest value. A place
    without a value is blank.
    """
    heights = _ASCII_HEIGHTS if ascii_only else _HEIGHTS
    count = 1 + max((place for values in groups.values() for place in values), default=0)
    largest = max((value for values in groups.values() for value in values.values()), default=0.0)
    return {name: _placed(values, count, largest, width, heights) for name, values in groups.items()}


def _placed(values: Mapping[int, float], count: int, largest: float, width: int, heights: str) -> str:
    edges = [round(step * count / min(width, count)) for step in range(min(width, count) + 1)]
    drawn = ""
    for first, end in itertools.pairwise(edges):
        inside = [values[place] for place in range(first, end) if place in values]
        share = max(inside) / largest if inside and largest > 0 else 0.0
        drawn += heights[min(7, int(share * 8))] if inside else " "
    return drawn.rstrip()


# ---- progress -----------------------------------------------------------------------------------------


_PHASES: Final[Mapping[str, str]] = {
    "uploading": "sending",
    "pulling": "pulling",
    "validating": "proving",
    "proving": "proving",
}
"""Bar that a stage moves. The server counts validating and proving as one piece of work."""


def can_move(out: Console) -> bool:
    """Return True if a bar can move there: on a terminal that can go back in a line."""
    return out.is_terminal and not out.is_dumb_terminal


def bars(out: Console, *, transient: bool = False) -> Bars:
    """Return bars: each has a description, plain text, and a field `figures`, which may have rich's markup.

    Args:
        transient: Whether they vanish in the end.
    """
    from rich.progress import BarColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bars

    return Bars(
        SpinnerColumn(finished_text="[green]✓[/]" if not out.options.ascii_only else "*"),
        TextColumn("{task.description:<8}", markup=False),
        BarColumn(28, complete_style="cyan", finished_style="green", pulse_style="cyan"),
        TextColumn("{task.fields[figures]}", style="dim"),
        console=out,
        transient=transient,
    )


class ProgressDisplay:
    """A progress callback, for a `with` block: a bar for each phase, or lines where there is no terminal."""

    def __init__(self, out: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        chosen = out or console(stderr=True)
        self._bars = _PhaseBars(chosen, clock) if can_move(chosen) else None
        self._stage: str | None = None
        self._file: str | None = None

    def __enter__(self) -> ProgressDisplay:
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
        """Return True if the server has everything, so that it continues even if this command ends."""
        return self._stage not in (None, "uploading")

    def __call__(self, step: Progress) -> None:
        new = (step.stage, step.file) != (self._stage, self._file)
        self._stage, self._file = step.stage, step.file
        if self._bars is not None:
            self._bars.move(step)
        elif new and step.stage not in (READY, FAILED):
            amount = size(step.bytes_total) if step.bytes_total else ""
            note(" ".join(part for part in (step.stage, step.file, amount) if part))


class _PhaseBars:
    """One bar for each phase, and for each file that is sent, in the order in which they come."""

    def __init__(self, out: Console, clock: Callable[[], float]) -> None:
        self._drawn = bars(out)
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
        phase = printable(" ".join(filter(None, (_PHASES.get(step.stage, step.stage), step.file))))
        if phase not in self._tasks:
            self._end(READY)
            self._began = self._clock()
            self._tasks[phase] = self._drawn.add_task(phase, total=None, figures="")
        self._amount = size(step.bytes_total) if step.bytes_total else ""
        figures = self._sent(step) if step.bytes_total else self._share(step)
        total = None if step.fraction is None else 1.0
        self._drawn.update(self._tasks[phase], total=total, completed=step.fraction or 0.0, figures=figures)

    def _end(self, state: str) -> None:
        """End the newest phase: fill its bar and say how long it took."""
        if not self._tasks:
            return
        last = list(self._tasks.values())[-1]
        if state == READY:
            figures = f"{self._amount}  {self._clock() - self._began:.1f} s".strip()
            self._drawn.update(last, total=1.0, completed=1.0, figures=figures)
        else:
            self._drawn.update(last, figures="[red]failed[/]")

    def _sent(self, step: Progress) -> str:
        done, passed = step.bytes_done or 0, self._clock() - self._began
        if step.bytes_total == done:
            return self._amount
        rate = f"  {size(done / passed)}/s" if passed > 0 else ""
        return f"{size(done)} of {self._amount}{rate}"

    def _share(self, step: Progress) -> str:
        return "" if step.fraction is None else f"{step.fraction:.0%}"
