"""`onebase models | version`: what the server is, and what it has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

from .._core.config import sdk_version
from .._sync.client import Client
from .._terminal.ui import Column, print_table, size
from ..adapter_types import Adapter
from ..types import Model
from .adapters.versions import targets
from .command import OK, parser, perform, print_json

_DESCRIPTIONS: Final = {
    "models": "List the server's base and adapters. Each name can be given to --adapter.",
    "version": "Show the version of this command and of the server.",
}
_TITLES: Final = ("name", "kind", "version", "rank", "parameters", "size", "changes")
_NUMBERS: Final = ("rank", "parameters", "size")
_SPARE: Final = {"size": 1, "version": 2, "changes": 3, "parameters": 4}
"""Columns in the order in which they stay: the last is dropped first where there is no room for all."""


def run(command: str, argv: list[str]) -> int:
    """Run the command. Gives its exit status."""
    made = parser(command, _DESCRIPTIONS[command])
    made.add_argument("--json", action="store_true", help="print the result as JSON")
    args = made.parse_args(argv)
    work = _models if command == "models" else _version
    return perform(made, args, lambda client: work(client.with_options(max_retries=0), args.json))


def _version(client: Client, as_json: bool) -> int:
    if as_json:
        server = client.version().version
        print(json.dumps({"client": sdk_version(), "server": server, "url": client.url}))
        return OK
    print(f"client {sdk_version()}", flush=True)
    print(f"server {client.version().version} at {client.url}")
    return OK


def _models(client: Client, as_json: bool) -> int:
    models = client.models.list()
    if as_json:
        print_json(tuple(models))
        return OK
    rows = table_rows(models, client.adapters.list())
    print_table(COLUMNS, rows)
    return OK


def _column(place: int, title: str) -> Column[tuple[str, ...]]:
    return Column(
        title,
        lambda row: row[place],
        right=title in _NUMBERS,
        spare=_SPARE.get(title, 0),
        shrink=title in ("name", "changes"),
    )


COLUMNS: Final = tuple(_column(place, title) for place, title in enumerate(_TITLES))


def table_rows(models: Sequence[Model], adapters: Sequence[Adapter]) -> list[tuple[str, ...]]:
    """Return one row per model, the base first, in the order of the columns."""
    by_name = {adapter.name: adapter for adapter in adapters}
    bases = [(model.id, "base", "", "", "", "", "") for model in models if model.id not in by_name]
    return bases + [_adapter_row(adapter) for adapter in adapters]


def _adapter_row(adapter: Adapter) -> tuple[str, ...]:
    return (
        adapter.name,
        "adapter" if adapter.active else "adapter, not active",
        (adapter.version or "")[:12],
        "" if adapter.rank is None else str(adapter.rank),
        "" if adapter.parameters is None else f"{adapter.parameters:,}",
        "" if adapter.bytes is None else size(adapter.bytes),
        targets(adapter.targets),
    )
