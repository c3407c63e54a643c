"""`onebase adapters push | pull | merge`: get an adapter to the server, or make it there; it is proven."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Final, get_args

from onebase_protocol.adapters import AdapterDefaults

from ..._sync.client import Client
from ..._terminal.ui import ProgressDisplay, console, note
from ...adapter_types import AdapterVersion, MergeMethod, MergeSign, ProgressCallback
from ...errors import AdapterRejectedError
from ...types import AdapterWeight
from ..command import OK, action_parser, perform, print_json, report
from .versions import SHORT, short, summary

_DESCRIPTIONS: Final = {
    "push": """\
Send a folder that PEFT saved (adapter_config.json and adapter_model.safetensors; of mlx-lm
adapters.safetensors), and wait until the server has proven it. The same content is the same
version, so sending it again does no harm.
""",
    "pull": """\
Let the server fetch an adapter from the Hugging Face Hub, and wait until it is proven. The version
records the commit. For gated repositories the server needs HF_TOKEN in its environment.
""",
    "merge": """\
Let the server make one adapter of several, by PEFT's add_weighted_adapter, and wait until it is
proven.

  linear       needs the same rank in all; a rough approximation of the weighted sum
  cat          the exact weighted sum; its rank is the sum of the ranks
  ties         as linear, of the largest part of each (--density), where signs agree
  dare_linear  as linear, of a random part of each (--density, --seed)
  dare_ties    of a random part of each, where signs agree
""",
}
_EXAMPLES: Final = {
    "push": "  onebase adapters push ./outputs/acme-support --activate\n"
    "  onebase adapters push ./outputs/checkpoint-300 --name acme-support --set temperature=0\n",
    "merge": "  onebase adapters merge support:0.7 legal:0.3 --name both --activate\n"
    "  onebase adapters merge support@3f2a9c41:1 legal:0.5 --name both --method ties --density 0.5\n",
    "pull": "  onebase adapters pull acme/support-lora --activate\n"
    "  onebase adapters pull acme/loras@v2 --subfolder support --name acme-support\n",
}

Begin = Callable[[Client, ProgressCallback], AdapterVersion]


def run(action: str, argv: list[str]) -> int:
    """Run the action. Gives its exit status."""
    made = _parser(action)
    args = made.parse_args(argv)
    try:
        begin = {"push": _push, "pull": _pull, "merge": _merge}[action](args)
    except ValueError as error:
        made.error(str(error))
    return perform(made, args, lambda client: _send(client, begin, args))


def _parser(action: str) -> argparse.ArgumentParser:
    made = action_parser(f"adapters {action}", _DESCRIPTIONS[action], _EXAMPLES[action])
    if action == "push":
        made.add_argument("folder", metavar="FOLDER", type=Path)
        made.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="a default of requests, such as temperature=0, system=TEXT or guided_json=@FILE, in place "
            "of that in onebase.json; null removes it; may be repeated",
        )
    elif action == "merge":
        _add_merge_options(made)
    else:
        made.add_argument("repo", metavar="ORG/REPO[@REVISION]")
        made.add_argument("--subfolder", metavar="PATH", help="the adapter's folder there (default: the top)")
    if action != "merge":
        made.add_argument("--name", help="what requests ask for (default: the folder's or repository's name)")
    made.add_argument("--activate", action="store_true", help="activate it as soon as it is ready")
    made.add_argument("--no-wait", action="store_true", help="do not wait until it is proven")
    made.add_argument("--allow-noop", action="store_true", help="accept an adapter that changes nothing")
    if action != "merge":
        made.add_argument("--any-base", action="store_true", help="accept one that names another base")
    return made


def _add_merge_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("adapters", metavar="NAME[@VERSION]:WEIGHT", nargs="+", help="two or more")
    made.add_argument("--name", required=True, help="what requests ask for")
    made.add_argument("--method", choices=get_args(MergeMethod), default="linear", help="(default: linear)")
    made.add_argument("--density", type=float, metavar="D", help="the part of each matrix to keep, up to 1")
    made.add_argument(
        "--sign",
        choices=get_args(MergeSign),
        help="how ties and dare_ties find the sign of most (default: total)",
    )
    made.add_argument("--seed", type=int, metavar="N", help="of what dare_... drop (default: 0)")


def _push(args: argparse.Namespace) -> Begin:
    name = args.name or args.folder.expanduser().resolve().name
    defaults = dict(_default(given) for given in args.set)
    return lambda client, progress: client.adapters.upload(
        args.folder,
        name=name,
        activate=args.activate,
        wait=not args.no_wait,
        allow_noop=args.allow_noop,
        any_base=args.any_base,
        progress=progress,
        defaults=defaults,
    )


def _default(given: str) -> tuple[str, object]:
    """Return a default as `NAME=VALUE`. The value of a text field is text, of others JSON. Raises
    ValueError."""
    name, equals, value = given.partition("=")
    known = AdapterDefaults.__struct_fields__
    if not equals or name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"--set {name}: write NAME=VALUE with the name of a default; {hint}")
    if value.startswith("@@"):
        value = value[1:]
    elif value.startswith("@"):
        try:
            value = Path(value[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--set {name}: {value[1:]} cannot be read: {error}") from error
    if value == "null":
        return name, None
    if name in _TEXTS:
        return name, value
    try:
        return name, json.loads(value)
    except ValueError as error:
        if name in ("stop", "guided_choice"):
            return name, [value]
        raise ValueError(f"--set {name}: {value!r} is not JSON: {error}") from error


_TEXTS: Final = frozenset(
    {
        "description",
        "system",
        "instruction",
        "invocation",
        "prompt_prefix",
        "chat_template",
        "guided_regex",
        "guided_grammar",
    }
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


def _merge(args: argparse.Namespace) -> Begin:
    terms = [_weighted(term) for term in args.adapters]
    return lambda client, progress: client.adapters.merge(
        terms,
        name=args.name,
        method=args.method,
        density=args.density,
        sign=args.sign,
        seed=args.seed,
        activate=args.activate,
        wait=not args.no_wait,
        allow_noop=args.allow_noop,
        progress=progress,
    )


def _weighted(term: str) -> AdapterWeight:
    """`NAME:0.7`. A name of the Hub has colons of its own. Raises ValueError."""
    name, _, weight = term.rpartition(":")
    try:
        if name:
            return AdapterWeight(name, float(weight))
    except ValueError:
        pass
    raise ValueError(f"write NAME:WEIGHT, such as support:0.7, not {term!r}")


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
