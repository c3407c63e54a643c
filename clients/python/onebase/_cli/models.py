"""`onebase models`: what the server has."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..errors import OneBaseError
from ..types import Adapter, Model
from . import options
from .exits import OK, report
from .terminal import printable

_DESCRIPTION = "List the base and the adapters that the server has; any of the names goes with --adapter."
_COLUMNS = ("name", "kind", "version", "rank", "parameters", "size", "changes")


def run(argv: list[str]) -> int:
    """Run the command; gives its exit status."""
    parser = options.parser("models", _DESCRIPTION)
    args = parser.parse_args(argv)
    try:
        client = options.client(args)
    except ValueError as error:
        parser.error(str(error))
    with client:
        try:
            once = client.with_options(max_retries=0)
            _print(table_rows(once.models.list(), once.adapters.list()))
        except OneBaseError as error:
            return report(error, client.url)
    return OK


def table_rows(models: Sequence[Model], adapters: Sequence[Adapter]) -> list[tuple[str, ...]]:
    """One row per model, the base first, in the order of the columns."""
    by_name = {adapter.name: adapter for adapter in adapters}
    bases = [(model.id, "base", "", "", "", "", "") for model in models if model.id not in by_name]
    return bases + [_adapter_row(adapter) for adapter in adapters]


def _adapter_row(adapter: Adapter) -> tuple[str, ...]:
    return (
        adapter.name,
        "adapter" if adapter.active else "adapter, not loaded",
        adapter.version[:12],
        "" if adapter.rank is None else str(adapter.rank),
        "" if adapter.parameters is None else f"{adapter.parameters:,}",
        "" if adapter.bytes is None else size(adapter.bytes),
        " ".join(adapter.targets),
    )


def size(count: float) -> str:
    """Bytes for people: `4.9 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _print(rows: Sequence[tuple[str, ...]]) -> None:
    """A table that fits a terminal; through a pipe, tab-separated lines that lose nothing."""
    if not sys.stdout.isatty():
        for row in (_COLUMNS, *rows):
            print("\t".join(row))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in ("rank", "parameters", "size") else "left")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(table)
