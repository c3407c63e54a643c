"""Commands that other packages bring, found by name: the SDK itself imports neither server nor torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from .exits import FAILED, OK

GROUP: Final = "onebase.commands"
"""Entry points of this group are callables `command(argv: list[str]) -> int | None`."""

EXTRAS: Final[Mapping[str, str]] = {
    "serve": "server",
    "base": "server",
    "train": "train",
    "data": "train",
    "estimate": "train",
    "sweep": "train",
}
"""The extra of this distribution that brings what a command needs."""

_OWN_PACKAGES: Final = frozenset({"onebase", "onebase_server", "onebase_adapters"})


def install_hint(command: str) -> str:
    """How to get what a command needs; what others bring is taken to need the server."""
    if EXTRAS.get(command) == "train":
        return "Training is an extra of this package. Install it with: pip install 'onebase[train]'"
    return "The server is an extra of this package. Install it with: pip install 'onebase[server]'"


def find(command: str) -> EntryPoint | None:
    """The entry point of a command, or None."""
    return next(iter(entry_points(group=GROUP, name=command)), None)


def run(plugin: EntryPoint, argv: list[str]) -> int:
    """Run a command with its arguments untouched; gives its exit status."""
    try:
        command: Callable[[list[str]], int | None] = plugin.load()
        status = command(argv)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if not missing or missing in _OWN_PACKAGES:
            raise
        print(f"onebase: `onebase {plugin.name}` needs the package {missing!r}.", file=sys.stderr)
        print(install_hint(plugin.name), file=sys.stderr)
        return FAILED
    return OK if status is None else status
