"""Settings as options of a command line, and how a command says that it cannot serve."""

from __future__ import annotations

import argparse
from typing import Any, Literal, get_args, get_origin

from rich.console import Console

from onebase_edge.settings import (
    Settings,
    SettingsError,
    option_name,
    parse_adapter,
    parse_size,
    setting_fields,
)

_GROUPS = {
    "base": "the base model",
    "adapters": "adapters",
    "server": "server",
    "connections": "connections",
    "engine": "engine (tokens, memory, threads)",
    "training": "training jobs",
    "limits": "limits",
}


def add_settings(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add an option for each of these fields of Settings."""
    fields = {item.name: (item, kind) for item, kind in setting_fields()}
    for name in names:
        parser.add_argument(option_name(name), **_argument(*fields[name]))


def add_all_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of Settings, in groups."""
    groups = {name: parser.add_argument_group(title) for name, title in _GROUPS.items()}
    for item, kind in setting_fields():
        groups[item.metadata["group"]].add_argument(option_name(item.name), **_argument(item, kind))


def _argument(item: Any, kind: Any) -> dict[str, Any]:
    text = item.metadata["help"].replace("%", "%%")
    argument: dict[str, Any] = {"dest": item.name, "default": None, "help": f"{text}{_default(item)}"}
    if item.name == "adapter":
        return argument | {"action": "append", "type": checked(parse_adapter), "metavar": "NAME=FOLDER"}
    if get_origin(kind) is tuple:
        return argument | {
            "action": "extend",
            "type": checked(item.metadata["parse"]),
            "metavar": item.metadata["metavar"],
        }
    if kind is bool:
        return argument | {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return argument | {"choices": get_args(kind)}
    parse = item.metadata["parse"] or {int: int, float: float}.get(kind, str)
    metavar = item.metadata["metavar"] or {int: "N", float: "SECONDS"}.get(kind, item.name.upper())
    return argument | {"type": checked(parse), "metavar": metavar}


def _default(item: Any) -> str:
    if isinstance(item.default, bool):
        return f" (default: {'on' if item.default else 'off'})"
    if item.metadata["parse"] is parse_size and item.default:
        units = (("GB", 10**9), ("MB", 10**6), ("KiB", 1024), ("", 1))
        unit, size = next(one for one in units if item.default % one[1] == 0)
        return f" (default: {item.default // size}{unit})"
    if isinstance(item.default, int | float):
        return f" (default: {item.default:g})"
    if "by default" in item.metadata["help"]:
        return ""
    return f" (default: {item.default or 'none'})"


def checked(parse: Any) -> Any:
    """Return `parse` as the `type` of an option: argparse reports its SettingsError as a wrong value."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except SettingsError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    convert.__name__ = getattr(parse, "__name__", "value")
    return convert


def print_failure(console: Console, message: str) -> None:
    console.print(
        f"onebase: {message}", style="red", highlight=False, markup=False, emoji=False, soft_wrap=True
    )


def address_error(settings: Settings, error: OSError) -> str:
    """Return a sentence that says why the server cannot listen, and the way out."""
    return (
        f"cannot listen on {settings.host}:{settings.port}: {error.strerror}. "
        "Choose another address with --host and --port."
    )
