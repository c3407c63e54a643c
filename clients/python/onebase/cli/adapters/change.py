"""`onebase adapters activate | rollback | deactivate | pin | unpin | share | unshare | rm`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Final

from ..._core.config import UNSET, Unset
from ..._sync.client import Client
from ..._terminal.ui import note
from ...adapter_types import Adapter
from ..command import FAILED, OK, action_parser, perform, print_json
from .versions import Reference, reference, short

_DESCRIPTIONS: Final = {
    "activate": "Make a version the active one. Requests that have begun end on the version before.",
    "rollback": "Activate the version that was active before the present one.",
    "deactivate": "Leave the name without an active version. NAME@VERSION still reaches its versions.",
    "pin": "Keep an adapter in memory even if others are used more recently.",
    "unpin": "No longer keep an adapter in memory when others are used more recently.",
    "share": "Let all tenants use an adapter and look at it. Their own adapters of that name come first.",
    "unshare": "Keep an adapter to its own tenant again. Requests that have begun end on it.",
    "rm": """\
Delete one version, or an adapter with all its versions. It cannot be undone. An active version, an
adapter that has one, and what requests run on are kept; --force deletes them anyway, and those
requests end with an error.
""",
}
_EXAMPLES: Final = {
    "activate": "  onebase adapters activate acme-support 3f2a9c41\n"
    "  onebase adapters activate acme-support 3f2a9c41 --expected none\n",
    "rollback": "  onebase adapters rollback acme-support\n",
    "rm": "  onebase adapters rm acme-support@3f2a9c41\n  onebase adapters rm acme-support\n",
}


def run(action: str, argv: list[str]) -> int:
    """Run the action. Gives its exit status."""
    made = _parser(action)
    args = made.parse_args(argv)
    try:
        if action == "rm":
            args.wanted = reference(args.adapter)
        elif action == "activate" and args.version is None:
            args.name, args.version = _split(args.name)
    except ValueError as error:
        made.error(str(error))
    if action == "rm":
        return perform(made, args, lambda client: _remove(client, args.wanted, args.force, args.json))
    return perform(made, args, lambda client: _change(action, client, args))


def _parser(action: str) -> argparse.ArgumentParser:
    made = action_parser(f"adapters {action}", _DESCRIPTIONS[action], _EXAMPLES.get(action, ""))
    if action == "rm":
        made.add_argument("adapter", metavar="NAME[@VERSION]")
        made.add_argument("--force", action="store_true", help="even if it is the active one, or in use")
        return made
    made.add_argument("name", metavar="NAME")
    if action == "activate":
        made.add_argument("version", metavar="VERSION", nargs="?", help="its first 8 digits are enough")
    if action in ("activate", "rollback"):
        made.add_argument(
            "--expected",
            metavar="VERSION",
            help="only if this version is active now; `none`: only if no version is (default: in any case)",
        )
    return made


def _split(name: str) -> tuple[str, str]:
    wanted = reference(name)
    if wanted.version is None:
        raise ValueError(f"give a version too; `onebase adapters show {name}` lists them")
    return wanted.name, wanted.version


def _change(action: str, client: Client, args: argparse.Namespace) -> int:
    actions: dict[str, Callable[[], Adapter]] = {
        "activate": lambda: client.adapters.activate(
            args.name, args.version, expected=_expected(client, args)
        ),
        "rollback": lambda: client.adapters.rollback(args.name, expected=_expected(client, args)),
        "deactivate": lambda: client.adapters.deactivate(args.name),
        "pin": lambda: client.adapters.pin(args.name),
        "unpin": lambda: client.adapters.pin(args.name, False),
        "share": lambda: client.adapters.share(args.name),
        "unshare": lambda: client.adapters.share(args.name, False),
    }
    adapter = actions[action]()
    if args.json:
        print_json(adapter)
    else:
        print(_sentence(action, adapter))
        if action == "activate":
            note(f"To go back: onebase adapters rollback {adapter.name}")
    return OK


def _expected(client: Client, args: argparse.Namespace) -> str | Unset | None:
    """Return the whole digest: the server compares it with the active one."""
    if args.expected is None:
        return UNSET
    if args.expected == "none":
        return None
    return client.adapters.version(args.name, args.expected).version


def _sentence(action: str, adapter: Adapter) -> str:
    if action in ("pin", "unpin"):
        return f"{adapter.name} {'stays' if adapter.pinned else 'no longer stays'} in memory."
    if action in ("share", "unshare"):
        return f"{adapter.name} is {'shared with all tenants' if adapter.shared else 'no longer shared'}."
    if adapter.version is None:
        return f"{adapter.name} has no active version now. Its versions are kept."
    return f"The active version of {adapter.name} is {short(adapter.version)} now."


def _remove(client: Client, wanted: Reference, force: bool, as_json: bool) -> int:
    if wanted.version is None and not force:
        found = client.adapters.retrieve(wanted.name)
        if found.version is not None:
            print(
                f"onebase: {wanted.name} answers requests with {short(found.version)}; nothing is deleted.\n"
                "To delete it with all its versions: --force",
                file=sys.stderr,
            )
            return FAILED
    client.adapters.delete(wanted.name, wanted.version, force=force)
    if as_json:
        print_json({"name": wanted.name, "version": wanted.version, "deleted": True})
    else:
        print(f"Deleted {wanted}" + ("." if wanted.version else ", with all its versions."))
    return OK
