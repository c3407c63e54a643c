"""The tables of the training benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench.training import TrainFigures

COLUMNS = (
    "target",
    "tokens/s",
    "ratio",
    "tokens/CPU second",
    "peak memory, GB",
    "held-out loss",
    "last step's loss",
)


def rows_of(figures: Mapping[str, TrainFigures], first: str) -> list[list[str]]:
    """Cells of COLUMNS by target. ratio: tokens/s of the first target over this one's."""
    rows = []
    for target, one in figures.items():
        ratio = "" if target == first else _ratio(figures.get(first), one)
        rows.append(
            [
                target,
                f"{one.tokens_per_second:.0f}",
                ratio,
                f"{one.tokens_per_cpu_second:.0f}",
                f"{one.peak / 1e9:.2f}",
                f"{one.held_out:.4f}",
                f"{one.last_loss:.4f}",
            ]
        )
    return rows


def _ratio(first: TrainFigures | None, one: TrainFigures) -> str:
    return "" if first is None else f"{first.tokens_per_second / one.tokens_per_second:.2f}x"


def rich_table(rows: Sequence[Sequence[str]], title: str) -> Table:
    """Return the table for the terminal."""
    table = Table(title=title, box=SIMPLE_HEAD)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == COLUMNS[0] else "right")
    for row in rows:
        table.add_row(*row)
    return table


def training_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return the table for train.md."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
