"""`onebase adapters list | show`: all adapters, one with its versions, or one version with its proof."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ..._sync.client import Client
from ..._terminal.ui import Column, console, line, note, print_table, size, table, when
from ...adapter_types import (
    READY,
    Activation,
    Adapter,
    AdapterDefaults,
    AdapterVersion,
    ModuleReport,
    SignatureReport,
)
from ..command import OK, action_parser, perform, plain, print_json
from .versions import (
    Reference,
    by_target,
    came_from,
    headline,
    makeup,
    norm_charts,
    number,
    place,
    proof,
    ranges,
    reference,
    short,
    span,
    state_style,
    targets,
)

if TYPE_CHECKING:
    from rich.console import Console

_DESCRIPTIONS: Final = {
    "list": """\
List the adapters of a server. An adapter answers while one of its versions is active. Column "in"
says where that version is: slot (on the accelerator), host (in memory) or disk.
""",
    "show": """\
NAME: its active version, all versions (the newest first), and its history.
NAME@VERSION: what that version is, where it is from, how it was proven, and what it changes in
which modules.
""",
}
_EXAMPLES: Final = {
    "list": "",
    "show": "  onebase adapters show acme-support\n  onebase adapters show acme-support@3f2a9c41\n",
}


def run(action: str, argv: list[str]) -> int:
    """Run the action. Gives its exit status."""
    made = action_parser(f"adapters {action}", _DESCRIPTIONS[action], _EXAMPLES[action])
    if action == "list":
        args = made.parse_args(argv)
        return perform(made, args, lambda client: _list(client, args.json))
    made.add_argument("adapter", metavar="NAME[@VERSION]")
    args = made.parse_args(argv)
    try:
        wanted = reference(args.adapter)
    except ValueError as error:
        made.error(str(error))
    show = _show_adapter if wanted.version is None else _show_version
    return perform(made, args, lambda client: show(client, wanted, args.json))


# ---- all adapters ------------------------------------------------------------------------------------


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
    """`active`, else the state of the newest version."""
    return "active" if adapter.active else adapter.state or ""


def _known(value: object) -> str:
    return "" if value is None else str(value)


COLUMNS: tuple[Column[Adapter], ...] = (
    Column("name", lambda item: item.name, style=lambda _: "bold", shrink=True),
    Column("state", state, style=lambda item: state_style(state(item))),
    Column("version", lambda item: short(item.version)),
    Column("kind", lambda item: " ".join(item.kinds)),
    Column("rank", lambda item: _known(item.rank), right=True),
    Column("alpha", lambda item: "" if item.alpha is None else number(item.alpha), right=True, spare=4),
    Column("parameters", lambda item: f"{item.parameters:,}" if item.parameters else "", right=True, spare=4),
    Column("size", lambda item: size(item.bytes) if item.bytes else "", right=True),
    Column("in", lambda item: " ".join(filter(None, (item.tier, "pinned" * item.pinned)))),
    Column("versions", lambda item: str(item.versions), right=True, spare=1),
    Column("changed", lambda item: when(item.updated_at), spare=3),
    Column("changes", lambda item: targets(item.targets), spare=2, shrink=True),
)


# ---- one adapter, one version ------------------------------------------------------------------------


def _show_adapter(client: Client, wanted: Reference, as_json: bool) -> int:
    adapter = client.adapters.retrieve(wanted.name)
    versions, history = client.adapters.versions(wanted.name), client.adapters.history(wanted.name)
    if as_json:
        print_json(plain(adapter) | {"versions": versions, "history": history})
    else:
        print_adapter(console(), adapter, versions, history)
    return OK


def _show_version(client: Client, wanted: Reference, as_json: bool) -> int:
    version = client.adapters.version(wanted.name, wanted.version or "")
    if as_json:
        print_json(version)
    else:
        print_version(console(), version)
    return OK


def print_adapter(
    out: Console, adapter: Adapter, versions: Sequence[AdapterVersion], history: Sequence[Activation]
) -> None:
    """Print the adapter, then its versions, then its history."""
    known = state(adapter)
    note = ", not active" * (known == READY)
    shown = line(adapter.name, "bold") + line("  ") + line(known + note, state_style(known))
    out.print(shown + line("  pinned" if adapter.pinned else "", "cyan"))
    out.print(line(f"  on {adapter.base}" + _where(adapter), "dim"))
    out.print()
    out.print(table(_VERSION_COLUMNS, versions, out.width))
    for version in versions:
        if version.error is not None:
            out.print()
            out.print(line(f"{short(version.version)}: {version.error.message}", "red"))
    if history:
        out.print()
        out.print(table(_HISTORY_COLUMNS, history, out.width))


def _where(adapter: Adapter) -> str:
    places = {"slot": "in a slot", "host": "in host memory", "disk": "on disk"}
    return "" if adapter.tier is None else f", {places.get(adapter.tier, adapter.tier)}"


_HISTORY_COLUMNS: tuple[Column[Activation], ...] = (
    Column("version", lambda entry: short(entry.version) or "none", style=lambda _: "bold"),
    Column("history", lambda entry: entry.action),
    Column("before", lambda entry: short(entry.previous) or "none"),
    Column("when", lambda entry: when(entry.at)),
    Column("by", lambda entry: entry.actor, shrink=True),
)


def _shown_state(version: AdapterVersion) -> str:
    if version.active:
        return "active"
    if version.progress is None or version.progress.fraction is None:
        return version.state
    return f"{version.state} {version.progress.fraction:.0%}"


_VERSION_COLUMNS: tuple[Column[AdapterVersion], ...] = (
    Column("version", lambda version: short(version.version), style=lambda _: "bold"),
    Column(
        "state",
        _shown_state,
        style=lambda version: state_style("active" if version.active else version.state),
    ),
    Column("kind", lambda item: " ".join(item.report.kinds) if item.report else "", spare=1),
    Column("rank", lambda item: str(item.report.rank) if item.report else "", right=True),
    Column("alpha", lambda item: number(item.report.alpha) if item.report else "", right=True, spare=2),
    Column("size", lambda item: size(item.report.bytes) if item.report else "", right=True),
    Column("changes", lambda item: targets(item.report.targets) if item.report else "", spare=2),
    Column("from", came_from, shrink=True),
    Column("when", lambda item: when(item.created_at)),
    Column("by", lambda item: item.created_by, spare=2),
)


def print_version(out: Console, version: AdapterVersion) -> None:
    """Print the version, its proof, and the modules that it changes."""
    out.print(headline(version))
    by = f" by {version.created_by}" if version.created_by else ""
    out.print(line(f"  from {came_from(version)}, {when(version.created_at)}{by}", "dim"))
    out.print(line(f"  sha256 {version.version}", "dim"), soft_wrap=True)
    if version.signature is not None:
        style = "green" if version.signature.status == "verified" else "yellow"
        out.print(line(f"  {_signed(version.signature)}", style), soft_wrap=True)
    if version.error is not None:
        out.print()
        out.print(line(f"{version.error.message} ({version.error.code})", "red"))
    if version.report is None:
        return
    report = version.report
    named = f", trained on {report.base_name}" if report.base_name else ""
    out.print(line(f"  on {version.base}{named}", "dim"))
    out.print()
    out.print(line(makeup(report)))
    out.print(line(proof(report.proof)))
    if report.dropped:
        dropped = ", ".join(report.dropped)
        out.print(line(f"left out, as they are the base's own: {dropped}", "dim"))
    if report.weight_score is not None:
        out.print(line(f"score of its weights {report.weight_score:.3g}", "dim"))
    for text in _defaults(report.defaults):
        out.print(line(text))
    for warning in report.warnings:
        out.print(line(f"look at this: {warning}", "yellow"))
    out.print()
    _print_modules(out, report.modules)


def _signed(found: SignatureReport) -> str:
    """Return a sentence on a signature."""
    if found.status != "verified":
        return f"signature {found.status} ({found.code}): {found.message}"
    names = ", ".join(one for one in (found.identity, found.issuer) if one)
    said = f"signed by {found.signer}" + (f" ({names})" if names else "")
    made = found.statement or {}
    if made.get("job"):
        said += f": trained by {made['job']} on {made.get('base', {}).get('name')}"
        data = made.get("data", {}).get("training", {}).get("sha256")
        said += f", data {short(data)}" if data else ""
        said += f", seed {made['seed']}" if made.get("seed") is not None else ""
    return said


def _defaults(defaults: AdapterDefaults | None) -> list[str]:
    """Return a line for each default of requests, cut where it is long."""
    if defaults is None:
        return []
    given = {name: value for name in defaults.__struct_fields__ if (value := getattr(defaults, name))}
    given |= {name: 0 for name in ("temperature",) if getattr(defaults, name) == 0}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
    return [
        f"default {name}: {textwrap.shorten(text, _LONGEST_DEFAULT, placeholder=' ...')}"
        for name, text in texts.items()
        if name != "notes"
    ]


_LONGEST_DEFAULT: Final = 80


def _print_modules(out: Console, modules: Sequence[ModuleReport]) -> None:
    """Print a line for each target, with the norms of what is added from the first layer to the last."""
    groups = by_target(modules)
    charts = norm_charts(groups, 32 if out.width < 100 else 48, ascii_only=out.options.ascii_only)
    columns: tuple[Column[tuple[str, list[ModuleReport]]], ...] = (
        Column("target", lambda item: item[0], style=lambda _: "bold"),
        Column("layers", lambda item: _layers(item[1])),
        Column("kind", lambda item: " ".join(sorted({module.kind for module in item[1]})), spare=1),
        Column("rank", lambda item: span(module.rank for module in item[1]), right=True),
        Column("alpha", lambda item: span(module.alpha for module in item[1]), right=True),
        Column(
            "parameters",
            lambda item: _parameters(item[1]),
            right=True,
            spare=1,
        ),
        Column("norm", lambda item: span(float(f"{module.norm:.2g}") for module in item[1]), right=True),
        Column("by layer", lambda item: charts[item[0]], style=lambda _: "cyan"),
    )
    out.print(table(columns, list(groups.items()), out.width))


def _parameters(modules: Sequence[ModuleReport]) -> str:
    return f"{sum(module.parameters for module in modules):,}"


def _layers(modules: Sequence[ModuleReport]) -> str:
    found = [where.layer for where in (place(module.name) for module in modules) if where.layer is not None]
    return ranges(found)
