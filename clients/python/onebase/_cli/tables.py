"""Tables: aligned and no wider than the terminal, or tab-separated lines through a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from .terminal import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

T = TypeVar("T")

_GAP: Final = 2
"""Blanks between columns."""
WIDE: Final = 100
ROOMY: Final = 120
"""Widths of a terminal, in characters, from which there is room for what is nice to know."""


@dataclass(frozen=True)
class Column(Generic[T]):
    """One column: its title, and what stands there for an item."""

    title: str
    cell: Callable[[T], str]
    right: bool = False
    """Whether it is aligned to the right, as numbers are."""
    at: int = 0
    """A narrower terminal than this goes without it."""
    style: Callable[[T], str] = lambda _: ""
    """A colour for the cell, in rich's words."""
    shrink: bool = False
    """Whether it is the one to be cut where the terminal is too narrow."""


def print_table(columns: Sequence[Column[T]], items: Sequence[T]) -> None:
    """Print one line for each item; through a pipe every column, in full."""
    if sys.stdout.isatty():
        out = console()
        out.print(table(columns, items, out.width))
        return
    print("\t".join(column.title for column in columns))
    for item in items:
        print("\t".join(printable(column.cell(item)).replace("\t", " ") for column in columns))


def table(columns: Iterable[Column[T]], items: Sequence[T], width: int) -> Table:
    """The columns that `width` has room for, as rich draws them."""
    from rich.table import Table

    chosen = [column for column in columns if width >= column.at]
    made = Table(box=None, header_style="dim", padding=(0, _GAP, 0, 0), pad_edge=False)
    for column, room in zip(chosen, _widths(chosen, items, width), strict=True):
        made.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=True,
            overflow="ellipsis",
            min_width=room,
            max_width=room,
        )
    for item in items:
        made.add_row(*(line(column.cell(item), column.style(item)) for column in chosen))
    return made


def _widths(columns: Sequence[Column[T]], items: Sequence[T], width: int) -> list[int]:
    """As wide as the longest cell; those that shrink share what the others leave, the short ones first."""
    widths = [max(len(one.title), *(len(one.cell(item)) for item in items), 0) for one in columns]
    left = width - sum(widest for one, widest in zip(columns, widths, strict=True) if not one.shrink)
    left -= _GAP * (len(columns) - 1)
    shrinking = sorted((place for place, one in enumerate(columns) if one.shrink), key=widths.__getitem__)
    for number, place in enumerate(shrinking):
        share = max(len(columns[place].title), left // (len(shrinking) - number))
        widths[place] = min(widths[place], share)
        left -= widths[place]
    return widths


def line(text: str, style: str = "") -> Text:
    """A line of text that may come from anywhere: it can neither steer the terminal nor style itself."""
    from rich.text import Text

    return Text(printable(text), style)


def console(*, stderr: bool = False) -> Console:
    """The terminal, as rich sees it; nothing is coloured just because it looks like a number."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def size(count: float) -> str:
    """Bytes for people: `4.9 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def when(moment: float, now: float | None = None) -> str:
    """A Unix time for people: `5 min ago`, or the date when it is older than two days."""
    passed = (time.time() if now is None else now) - moment
    if passed < 60:
        return "just now"
    for limit, unit, name in ((3600, 60, "min"), (86400, 3600, "h"), (172800, 86400, "day")):
        if passed < limit:
            return f"{passed / unit:.0f} {name} ago"
    return datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M")


def duration(seconds: float) -> str:
    """Seconds for people: `12 s`, `2 min 03 s`, `1 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
