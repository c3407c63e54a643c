"""`onebase adapters diff`: two versions side by side."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..._core.rows import AnswerComparison
from ..._sync.client import Client
from ..._terminal.ui import ProgressDisplay, bar, beginning, console, line, printable, size
from ...adapter_types import READY, AdapterVersion, ModuleReport, Progress, VersionReport
from ..command import OK, action_parser, count, perform, print_json
from .versions import (
    Reference,
    came_from,
    grouped,
    label,
    layer_norms,
    number,
    reference,
    resolve,
    targets,
    total_norm,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_DESCRIPTION = """\
Put two adapters, or two versions of one, side by side: kind, ranks, targets, and how much each
changes in which layer (the Frobenius norm of what is added to the weights). NAME alone is its
active version. With --data, their answers instead: both are asked each prompt of a file, at
temperature 0, and the answers that differ are shown.
"""
_EXAMPLES = """\
  onebase adapters diff acme-support legal
  onebase adapters diff acme-support@3f2a9c41 acme-support --data heldout.jsonl --limit 50
  onebase adapters diff acme-support@3f2a9c41 acme-support@77aa01c2
"""
_A: Final = "cyan"
_B: Final = "magenta"


def run(action: str, argv: list[str]) -> int:
    """Run the action. Gives its exit status."""
    made = action_parser(f"adapters {action}", _DESCRIPTION, _EXAMPLES)
    made.add_argument("a", metavar="A", help="NAME or NAME@VERSION")
    made.add_argument("b", metavar="B", help="NAME or NAME@VERSION")
    made.add_argument(
        "--data",
        metavar="FILE",
        help="compare answers to the prompts of this JSONL file: messages, or prompt and completion "
        "(default: compare weights)",
    )
    made.add_argument("--limit", type=count, metavar="N", help="with --data: the first N rows (default: all)")
    made.add_argument(
        "--max-tokens", type=count, default=256, metavar="N", help="longest answer (default: 256)"
    )
    args = made.parse_args(argv)
    if args.limit and not args.data:
        made.error("--limit: it is for the rows of --data")
    try:
        pair = (reference(args.a), reference(args.b))
    except ValueError as error:
        made.error(str(error))
    work = _compare if args.data else _diff
    return perform(made, args, lambda client: work(client, pair, args))


def _compare(client: Client, pair: tuple[Reference, Reference], args: argparse.Namespace) -> int:
    versions = [label(resolve(client, one)) for one in pair]
    try:
        with ProgressDisplay() as display:
            found = client.adapters.compare_answers(
                versions[0],
                versions[1],
                args.data,
                limit=args.limit,
                max_tokens=args.max_tokens,
                progress=lambda share: display(Progress("asking", share)),
            )
            display(Progress(READY))
    except OSError as error:
        raise ValueError(f"--data: {args.data} cannot be read: {error.strerror or error}") from error
    if args.json:
        print_json(found)
    else:
        print_answers(console(), found)
    return OK


def print_answers(out: Console, found: AnswerComparison) -> None:
    """Print the answers that differ, and how often both are the same or right."""
    for row in found.differing:
        out.print(line(f"line {row.line}: ", "bold") + line(beginning(row.prompt)), soft_wrap=True)
        for name, text, style in (("wanted", row.reference, "dim"), ("A", row.a, _A), ("B", row.b, _B)):
            if text is not None:
                right = (
                    row.reference is not None and name != "wanted" and text.strip() == row.reference.strip()
                )
                mark = line("  right", "green") if right else line("")
                out.print(line(f"  {name:6} ", "dim") + line(beginning(text), style) + mark, soft_wrap=True)
    same = len(found.rows) - len(found.differing)
    out.print(line(f"A  {found.a}", _A), soft_wrap=True)
    out.print(line(f"B  {found.b}", _B), soft_wrap=True)
    out.print(line(f"same answer  {same} of {len(found.rows)} ({found.agreement:.1%})"), soft_wrap=True)
    for name, a, b in (
        ("exact match", found.exact_match_a, found.exact_match_b),
        ("valid JSON", found.json_valid_a, found.json_valid_b),
    ):
        if a is not None and b is not None:
            out.print(line(f"{name:11}  A {a:.1%}, B {b:.1%}"), soft_wrap=True)


def _diff(client: Client, pair: tuple[Reference, Reference], args: argparse.Namespace) -> int:
    found = diff(resolve(client, pair[0]), resolve(client, pair[1]))
    if args.json:
        print_json(found)
    else:
        print_diff(console(), found)
    return OK


# ---- compared ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """One property of both, in words."""

    title: str
    a: str
    b: str

    @property
    def differs(self) -> bool:
        return self.a != self.b


@dataclass(frozen=True)
class LayerPair:
    """The norm of what each adds in one layer, or to one module outside of the layers. None adds nothing."""

    layer: str
    a: float | None
    b: float | None


@dataclass(frozen=True)
class RankPair:
    """A module that both change, but with different ranks or alphas."""

    module: str
    a: tuple[int, float]
    b: tuple[int, float]


@dataclass(frozen=True)
class Diff:
    """Two versions side by side."""

    a: str
    b: str
    facts: tuple[Fact, ...]
    layers: tuple[LayerPair, ...]
    ranks: tuple[RankPair, ...]
    only_a: tuple[str, ...]
    """Modules that only `a` changes."""
    only_b: tuple[str, ...]

    @property
    def largest(self) -> float:
        """The largest norm of any layer."""
        return max((norm or 0.0 for pair in self.layers for norm in (pair.a, pair.b)), default=0.0)


def diff(a: AdapterVersion, b: AdapterVersion) -> Diff:
    """Compare two versions by their reports.

    Raises:
        ValueError: one of them has no report, because it is not ready.
    """
    left, right = _report(a), _report(b)
    mine = {module.name: module for module in left.modules}
    yours = {module.name: module for module in right.modules}
    return Diff(
        label(a),
        label(b),
        tuple(_compared(a, left, b, right)),
        tuple(_layers(left, right)),
        tuple(_ranks(mine, yours)),
        tuple(name for name in mine if name not in yours),
        tuple(name for name in yours if name not in mine),
    )


def _report(version: AdapterVersion) -> VersionReport:
    if version.report is None:
        raise ValueError(f"{label(version)} is {version.state}: only versions that are ready can be compared")
    return version.report


def _compared(
    a: AdapterVersion, left: VersionReport, b: AdapterVersion, right: VersionReport
) -> Iterable[Fact]:
    yield Fact("kind", " + ".join(left.kinds), " + ".join(right.kinds))
    yield Fact("rank", str(left.rank), str(right.rank))
    yield Fact("alpha", _alpha(left), _alpha(right))
    yield Fact("targets", targets(left.targets), targets(right.targets))
    yield Fact("modules", str(len(left.modules)), str(len(right.modules)))
    yield Fact("parameters", f"{left.parameters:,}", f"{right.parameters:,}")
    yield Fact("size", size(left.bytes), size(right.bytes))
    yield Fact("norm", f"{total_norm(left.modules):.3g}", f"{total_norm(right.modules):.3g}")
    yield Fact("from", came_from(a), came_from(b))


def _alpha(report: VersionReport) -> str:
    return number(report.alpha) + (" (rsLoRA)" if report.rslora else "")


def _layers(left: VersionReport, right: VersionReport) -> Iterable[LayerPair]:
    mine, yours = layer_norms(left.modules), layer_norms(right.modules)
    for layer in sorted(mine.keys() | yours.keys(), key=_order):
        yield LayerPair(layer, mine.get(layer), yours.get(layer))


def _order(layer: str) -> tuple[int, int, str]:
    return (0, int(layer), "") if layer.isdigit() else (1, 0, layer)


def _ranks(mine: dict[str, ModuleReport], yours: dict[str, ModuleReport]) -> Iterable[RankPair]:
    for name in (name for name in mine if name in yours):
        a, b = (mine[name].rank, mine[name].alpha), (yours[name].rank, yours[name].alpha)
        if a != b:
            yield RankPair(name, a, b)


# ---- printed -----------------------------------------------------------------------------------------


def print_diff(out: Console, found: Diff) -> None:
    """Print the facts, then the layers with their bars, then what only one of them changes.

    A pipe gets the columns separated by tabs, and no bars.
    """
    if out.is_terminal:
        out.print(_facts(found))
        out.print()
        out.print(_chart(out, found))
    else:
        _print_lines(out, found)
    _print_ranks(out, found.ranks)
    for name, style, modules in ((found.a, _A, found.only_a), (found.b, _B, found.only_b)):
        if modules:
            _print_list(out, f"only in {name}", style, grouped(modules))


def _print_lines(out: Console, found: Diff) -> None:
    rows = [("", found.a, found.b, "")]
    rows += [(fact.title, fact.a, fact.b, "differs" * fact.differs) for fact in found.facts]
    layers = [(pair.layer, *_norms(found.largest, pair)) for pair in found.layers]
    for row in (*rows, ("",), ("layer", found.a, found.b), *layers):
        print(*map(printable, row), sep="\t", file=out.file)  # rich would expand the tabs


def _facts(found: Diff) -> Table:
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, 2))
    made.add_row(Text(""), Text(printable(found.a), f"bold {_A}"), Text(printable(found.b), f"bold {_B}"))
    for fact in found.facts:
        style = "bold yellow" if fact.differs else ""
        made.add_row(
            Text(f" {fact.title}", "dim"),
            Text(printable(fact.a), style),
            Text(printable(fact.b), style),
            Text("differs" if fact.differs else "", "yellow"),
        )
    return made


def _chart(out: Console, found: Diff) -> Table:
    """Return a row for each layer with two bars, all on one scale."""
    from rich.table import Table
    from rich.text import Text

    norms = [_norms(found.largest, pair) for pair in found.layers]
    names = max((len(pair.layer) for pair in found.layers), default=0)
    digits = max((len(norm) for pair in norms for norm in pair), default=0)
    room = max(8, min(40, (out.width - max(names, 5) - 2 * max(digits, 4) - 7) // 2))
    made = Table(box=None, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    made.add_column("layer", justify="right")
    for name, style in ((found.a, _A), (found.b, _B)):
        made.add_column("norm", justify="right")
        title = Text(printable(name), style)
        made.add_column(title, no_wrap=True, overflow="ellipsis", min_width=room + 1, max_width=room + 1)
    for pair, (a, b) in zip(found.layers, norms, strict=True):
        bars = [
            bar(norm or 0.0, found.largest, room, ascii_only=out.options.ascii_only)
            for norm in (pair.a, pair.b)
        ]
        made.add_row(Text(printable(pair.layer), "dim"), a, Text(bars[0], _A), b, Text(bars[1], _B))
    return made


def _norms(largest: float, pair: LayerPair) -> tuple[str, str]:
    """Return both with as many decimals as the largest one needs; a dash for nothing."""
    decimals = min(9, max(0, 2 - math.floor(math.log10(largest)))) if largest > 0 else 0
    a, b = ("-" if norm is None else f"{norm:.{decimals}f}" for norm in (pair.a, pair.b))
    return a, b


def _print_ranks(out: Console, pairs: Sequence[RankPair]) -> None:
    """Print the modules that both change with different ranks or alphas. Equal differences share a line."""
    changes: dict[tuple[tuple[int, float], tuple[int, float]], list[str]] = {}
    for pair in pairs:
        changes.setdefault((pair.a, pair.b), []).append(pair.module)
    lines = [
        f"rank {a[0]} and {b[0]}, alpha {a[1]:g} and {b[1]:g}: {'; '.join(grouped(modules))}"
        for (a, b), modules in sorted(changes.items())
    ]
    if lines:
        _print_list(out, "different rank or alpha", "yellow", lines)


def _print_list(out: Console, title: str, style: str, lines: Sequence[str]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    out.print()
    out.print(Text(printable(title), style))
    for text in lines:
        out.print(Padding(Text(printable(text)), (0, 0, 0, 2)))
