"""`onebase models`: what the server has."""

from __future__ import annotations

from collections.abc import Sequence

from ..adapter_types import Adapter
from ..errors import OneBaseError
from ..types import Model
from . import options
from .actions import print_json
from .exits import OK, report
from .tables import Column, print_table, size

_DESCRIPTION = "List the base and the adapters that the server has; any of the names goes with --adapter."
_TITLES = ("name", "kind", "version", "rank", "parameters", "size", "changes")
_NUMBERS = ("rank", "parameters", "size")


def run(argv: list[str]) -> int:
    """Run the command; gives its exit status."""
    parser = options.parser("models", _DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print the models as JSON")
    args = parser.parse_args(argv)
    try:
        client = options.client(args)
    except ValueError as error:
        parser.error(str(error))
    with client:
        try:
            once = client.with_options(max_retries=0)
            if args.json:
                print_json(tuple(once.models.list()))
                return OK
            rows = table_rows(once.models.list(), once.adapters.list())
        except OneBaseError as error:
            return report(error, client.url)
    print_table([_column(place, title) for place, title in enumerate(_TITLES)], rows)
    return OK


def _column(place: int, title: str) -> Column[tuple[str, ...]]:
    return Column(title, lambda row: row[place], right=title in _NUMBERS, shrink=title == "changes")


def table_rows(models: Sequence[Model], adapters: Sequence[Adapter]) -> list[tuple[str, ...]]:
    """One row per model, the base first, in the order of the columns."""
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
        " ".join(adapter.targets),
    )
