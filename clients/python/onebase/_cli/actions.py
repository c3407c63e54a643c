"""Commands that have actions, as `onebase adapters push`: how one is found, and how one runs."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import json
import sys
from collections.abc import Callable, Mapping

from .._client import Client
from ..errors import OneBaseError
from . import options
from .exits import OK, USAGE, report


def dispatch(command: str, help: str, actions: Mapping[str, str], argv: list[str]) -> int:
    """Run the action that the arguments begin with; gives its exit status.

    Args:
        actions: For each its module in the package of the command.
    """
    if not argv:
        sys.stderr.write(help)
        return USAGE
    action, *rest = argv
    if action in ("-h", "--help", "help"):
        sys.stdout.write(help)
        return OK
    if action not in actions:
        return _unknown(command, action, actions)
    module = importlib.import_module(f".{command}.{actions[action]}", __package__)
    status: int = module.run(action, rest)
    return status


def _unknown(command: str, action: str, actions: Mapping[str, str]) -> int:
    print(f"onebase {command}: there is no action {action!r}.", file=sys.stderr)
    near = difflib.get_close_matches(action, actions, n=1)
    hint = (
        f"Did you mean `onebase {command} {near[0]}`?" if near else f"`onebase {command} --help` lists them."
    )
    print(hint, file=sys.stderr)
    return USAGE


def parser(command: str, description: str, examples: str = "") -> argparse.ArgumentParser:
    """A parser for one action, such as `adapters push`."""
    made = options.parser(command, description, examples)
    made.add_argument("--json", action="store_true", help="print the result as JSON")
    return made


def perform(made: argparse.ArgumentParser, args: argparse.Namespace, work: Callable[[Client], int]) -> int:
    """Run `work` with a client for the server that the options name; gives the exit status."""
    try:
        client = options.client(args)
    except ValueError as error:
        made.error(str(error))
    with client:
        try:
            return work(client)
        except OneBaseError as error:
            return report(error, client.url)
        except ValueError as error:
            print(f"onebase: {error}", file=sys.stderr)
            return USAGE


def print_json(value: object) -> None:
    """One result, or a sequence of them."""
    print(json.dumps(_plain(value), ensure_ascii=False))


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
