"""Tables on the screen and in Markdown, and the files that a benchmark leaves."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench import machine


def percentile(values: Iterable[float], share: float) -> float:
    """Return, by nearest rank, the smallest value that at least `share` (0 to 1) of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", left: int = 1) -> Table:
    """Return a table for the terminal. left: columns of words, the others are numbers."""
    made = Table(title=title or None, box=SIMPLE_HEAD)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < left else "right")
    for row in rows:
        made.add_row(*row)
    return made


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return the like in Markdown."""
    rule = ["---" if index < left else "---:" for index in range(len(columns))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, rule, *rows))


def write(
    name: str,
    options: argparse.Namespace,
    described: dict[str, Any],
    content: Mapping[str, Any],
    text: str = "",
    console: Console | None = None,
) -> None:
    """Write NAME.json, and NAME.md where there is a text, to the folder of `--output`.

    described: the machine, from before the measurement. content: what came of it.
    """
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    asked = {option: str(value) for option, value in vars(options).items()}
    files = {f"{name}.json": json.dumps({"machine": described, "options": asked, **content}, indent=1)}
    if text:
        files[f"{name}.md"] = f"{machine.sentence(described)}\n\n{text}"
    for file, written in files.items():
        (folder / file).write_text(written)
    if console is not None:
        console.print(f"Written: {', '.join(str(folder / file) for file in files)}", soft_wrap=True)
