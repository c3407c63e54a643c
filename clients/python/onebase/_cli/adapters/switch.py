"""`onebase adapters activate | rollback | deactivate | pin | unpin`: what a name answers with."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Final

from ..._client import Client
from ..._config import UNSET, Unset
from ...adapter_types import Adapter
from ..actions import perform, print_json
from ..exits import OK
from ..terminal import note
from .common import parser, reference, short

_DESCRIPTIONS: Final = {
    "activate": "Let a version answer to the name from now on. Requests that have begun end on the old one.",
    "rollback": "Let the version answer again that was active before the present one was activated.",
    "deactivate": "Let no version answer to the name. They stay, and NAME@VERSION still reaches them.",
    "pin": "Keep an adapter in memory, although others are used more recently.",
    "unpin": "Let an adapter leave memory again when others are used more recently.",
}
_EXAMPLES: Final = {
    "activate": "  onebase adapters activate acme-support 3f2a9c41\n"
    "  onebase adapters activate acme-support 3f2a9c41 --expected none\n",
    "rollback": "  onebase adapters rollback acme-support\n",
}


def run(action: str, argv: list[str]) -> int:
    """Run the action; gives its exit status."""
    made = _parser(action)
    args = made.parse_args(argv)
    if action == "activate" and args.version is None:
        try:
            args.name, args.version = _split(args.name)
        except ValueError as error:
            made.error(str(error))
    return perform(made, args, lambda client: _perform(action, client, args))


def _parser(action: str) -> argparse.ArgumentParser:
    made = parser(action, _DESCRIPTIONS[action], _EXAMPLES.get(action, ""))
    made.add_argument("name", metavar="NAME")
    if action == "activate":
        made.add_argument("version", metavar="VERSION", nargs="?", help="its first 8 digits are enough")
    if action in ("activate", "rollback"):
        made.add_argument(
            "--expected",
            metavar="VERSION",
            help="only if this version is active now; `none`: only if none is (default: in any case)",
        )
    return made


def _split(name: str) -> tuple[str, str]:
    wanted = reference(name)
    if wanted.version is None:
        raise ValueError(f"give a version too; `onebase adapters show {name}` lists them")
    return wanted.name, wanted.version


def _perform(action: str, client: Client, args: argparse.Namespace) -> int:
    actions: dict[str, Callable[[], Adapter]] = {
        "activate": lambda: client.adapters.activate(
            args.name, args.version, expected=_expected(client, args)
        ),
        "rollback": lambda: client.adapters.rollback(args.name, expected=_expected(client, args)),
        "deactivate": lambda: client.adapters.deactivate(args.name),
        "pin": lambda: client.adapters.pin(args.name),
        "unpin": lambda: client.adapters.pin(args.name, False),
    }
    adapter = actions[action]()
    if args.json:
        print_json(adapter)
    else:
        print(_said(action, adapter))
        if action == "activate":
            note(f"To go back: onebase adapters rollback {adapter.name}")
    return OK


def _expected(client: Client, args: argparse.Namespace) -> str | Unset | None:
    """The whole digest: the server compares it with the active one."""
    if args.expected is None:
        return UNSET
    if args.expected == "none":
        return None
    return client.adapters.version(args.name, args.expected).version


def _said(action: str, adapter: Adapter) -> str:
    if action in ("pin", "unpin"):
        return f"{adapter.name} {'stays' if adapter.pinned else 'no longer stays'} in memory."
    if adapter.version is None:
        return f"{adapter.name} answers no more. Its versions are kept."
    return f"{adapter.name} answers with version {short(adapter.version)} now."
