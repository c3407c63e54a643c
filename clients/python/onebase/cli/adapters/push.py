"""`onebase adapters push | pull`: get an adapter to the server and have it proven."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ..._sync.client import Client
from ...adapter_types import AdapterVersion, ProgressCallback
from ...errors import AdapterRejectedError
from ..command import OK, USAGE, action_parser, perform, print_json, report
from ..ui import ProgressDisplay, console, note
from .versions import SHORT, short, summary

_DESCRIPTIONS: Final = {
    "push": """\
Send a folder that PEFT saved (adapter_config.json and adapter_model.safetensors), and wait until
the server has proven it. The same content is the same version, so sending it again does no harm.
""",
    "pull": """\
Let the server fetch an adapter from the Hugging Face Hub, and wait until it is proven. The version
records the commit. For gated repositories the server needs HF_TOKEN in its environment.
""",
}
_EXAMPLES: Final = {
    "push": "  onebase adapters push ./outputs/acme-support --activate\n"
    "  onebase adapters push ./outputs/checkpoint-300 --name acme-support\n",
    "pull": "  onebase adapters pull acme/support-lora --activate\n"
    "  onebase adapters pull acme/loras@v2 --subfolder support --name acme-support\n",
}

Begin = Callable[[Client, ProgressCallback], AdapterVersion]


def run(action: str, argv: list[str]) -> int:
    """Run the action. Gives its exit status."""
    made = _parser(action)
    args = made.parse_args(argv)
    begin = (_push if action == "push" else _pull)(args)
    return perform(made, args, lambda client: _send(client, begin, args))


def _parser(action: str) -> argparse.ArgumentParser:
    made = action_parser(f"adapters {action}", _DESCRIPTIONS[action], _EXAMPLES[action])
    if action == "push":
        made.add_argument("folder", metavar="FOLDER", type=Path)
    else:
        made.add_argument("repo", metavar="ORG/REPO[@REVISION]")
        made.add_argument("--subfolder", metavar="PATH", help="the adapter's folder there (default: the top)")
    made.add_argument("--name", help="what requests ask for (default: the folder's or repository's name)")
    made.add_argument("--activate", action="store_true", help="activate it as soon as it is ready")
    made.add_argument("--no-wait", action="store_true", help="do not wait until it is proven")
    made.add_argument("--allow-noop", action="store_true", help="accept an adapter that changes nothing")
    made.add_argument("--any-base", action="store_true", help="accept one that names another base")
    return made


def _push(args: argparse.Namespace) -> Begin:
    name = args.name or args.folder.expanduser().resolve().name
    return lambda client, progress: client.adapters.upload(
        args.folder,
        name=name,
        activate=args.activate,
        wait=not args.no_wait,
        allow_noop=args.allow_noop,
        any_base=args.any_base,
        progress=progress,
    )


def _pull(args: argparse.Namespace) -> Begin:
    repo, _, revision = args.repo.removeprefix("hub:").partition("@")
    return lambda client, progress: client.adapters.pull(
        repo,
        revision=revision or None,
        subfolder=args.subfolder,
        name=args.name,
        activate=args.activate,
        wait=not args.no_wait,
        allow_noop=args.allow_noop,
        any_base=args.any_base,
        progress=progress,
    )


def _send(client: Client, begin: Begin, args: argparse.Namespace) -> int:
    display = ProgressDisplay()
    try:
        with display:
            version = begin(client, display)
    except KeyboardInterrupt:
        if display.is_at_server:
            note("\nThe server continues: `onebase adapters list` shows the state.")
        raise
    except AdapterRejectedError as error:
        if args.json and error.version is not None:
            print_json(error.version)
        return report(error, client.url)
    except OSError as error:
        note(f"onebase: {error}")
        return USAGE
    _show(version, args)
    return OK


def _show(version: AdapterVersion, args: argparse.Namespace) -> None:
    if args.json:
        print_json(version)
        return
    out = console()
    for line in summary(version):
        out.print(line, soft_wrap=True)
    _next_step(version, args)


def _next_step(version: AdapterVersion, args: argparse.Namespace) -> None:
    name, digest = version.name, short(version.version)
    if not version.finished:
        note(f"See its state: onebase adapters show {name}@{digest}")
    elif version.active:
        note(f'Ask it: onebase generate --adapter {name} "..."')
    elif not args.activate:
        note(f'Try it: onebase generate --adapter {name}@{digest[:SHORT]} "..."')
        note(f"Activate it: onebase adapters activate {name} {digest[:SHORT]}")
