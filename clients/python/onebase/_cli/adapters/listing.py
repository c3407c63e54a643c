"""`onebase adapters list`: what the server has."""

from __future__ import annotations

from ..._client import Client
from ...adapter_types import Adapter
from ..actions import perform, print_json
from ..exits import OK
from ..tables import ROOMY, WIDE, Column, print_table, size, when
from ..terminal import note
from .common import number, parser, short, state_style, targets

_DESCRIPTION = """\
List the adapters of a server. An adapter answers while one of its versions is active; "in" says where
that version is: slot (on the accelerator), host (in memory) or disk.
"""


def run(action: str, argv: list[str]) -> int:
    """Run the action; gives its exit status."""
    made = parser(action, _DESCRIPTION)
    args = made.parse_args(argv)
    return perform(made, args, lambda client: _list(client, args.json))


def _list(client: Client, as_json: bool) -> int:
    adapters = client.adapters.list()
    if as_json:
        print_json(adapters)
    elif adapters:
        print_table(COLUMNS, adapters)
    else:
        note("The server has no adapters. Send it one: onebase adapters push FOLDER --activate")
    return OK


def state(adapter: Adapter) -> str:
    """`active`, or how the newest version is."""
    return "active" if adapter.active else adapter.state


def _known(value: object) -> str:
    return "" if value is None else str(value)


COLUMNS: tuple[Column[Adapter], ...] = (
    Column("name", lambda item: item.name, style=lambda _: "bold", shrink=True),
    Column("state", state, style=lambda item: state_style(state(item))),
    Column("version", lambda item: short(item.version)),
    Column("kind", lambda item: " ".join(item.kinds)),
    Column("rank", lambda item: _known(item.rank), right=True),
    Column("alpha", lambda item: "" if item.alpha is None else number(item.alpha), right=True, at=160),
    Column("parameters", lambda item: f"{item.parameters:,}" if item.parameters else "", right=True, at=160),
    Column("size", lambda item: size(item.bytes) if item.bytes else "", right=True),
    Column("in", lambda item: " ".join(filter(None, (item.tier, "pinned" * item.pinned)))),
    Column("versions", lambda item: str(item.versions), right=True, at=WIDE),
    Column("changed", lambda item: when(item.updated_at), at=130),
    Column("changes", lambda item: targets(item.targets), at=ROOMY, shrink=True),
)
