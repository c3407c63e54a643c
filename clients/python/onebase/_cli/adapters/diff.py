"""`onebase adapters diff`: two adapters side by side, in the terminal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ..._client import Client
from ..actions import perform, print_json
from ..exits import OK
from ..tables import console
from ..terminal import printable
from .common import Reference, parser, reference, resolve
from .compare import Comparison, LayerPair, RankPair, compare, grouped
from .layers import bar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_DESCRIPTION = """\
Put two adapters, or two versions of one, side by side: kind, ranks, targets, and how much each changes in
which layer (the Frobenius norm of what is added to the weights). NAME alone is its active version.
"""
_EXAMPLES = """\
  onebase adapters diff acme-support legal
  onebase adapters diff acme-support@3f2a9c41 acme-support@77aa01c2
"""
_A: Final = "cyan"
_B: Final = "magenta"


def run(action: str, argv: list[str]) -> int:
    """Run the action; gives its exit status."""
    made = parser(action, _DESCRIPTION, _EXAMPLES)
    made.add_argument("a", metavar="A", help="NAME or NAME@VERSION")
    made.add_argument("b", metavar="B", help="NAME or NAME@VERSION")
    args = made.parse_args(argv)
    try:
        pair = (reference(args.a), reference(args.b))
    except ValueError as error:
        made.error(str(error))
    return perform(made, args, lambda client: _diff(client, pair, args.json))


def _diff(client: Client, pair: tuple[Reference, Reference], as_json: bool) -> int:
    found = compare(resolve(client, pair[0]), resolve(client, pair[1]))
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        print_comparison(console(), found)
    return OK


def print_comparison(out: Console, found: Comparison) -> None:
    """Facts, then a bar for each layer, then what is only in one of them."""
    out.print(_facts(found))
    out.print()
    out.print(_chart(out, found))
    _print_ranks(out, found.ranks)
    for name, style, modules in ((found.a, _A, found.only_a), (found.b, _B, found.only_b)):
        if modules:
            _print_list(out, f"only in {name}", style, grouped(modules))


def _facts(found: Comparison) -> Table:
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


def _chart(out: Console, found: Comparison) -> Table:
    """A row for each layer, with a bar for each of the two, on one scale."""
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
    """Both in as many decimals as the largest one needs; a dash for a layer that is left alone."""
    decimals = min(9, max(0, 2 - math.floor(math.log10(largest)))) if largest > 0 else 0
    a, b = ("-" if norm is None else f"{norm:.{decimals}f}" for norm in (pair.a, pair.b))
    return a, b


def _print_ranks(out: Console, pairs: Sequence[RankPair]) -> None:
    """Modules that both change, but not with the same rank and alpha; equal differences share a line."""
    changes: dict[tuple[tuple[int, float], tuple[int, float]], list[str]] = {}
    for pair in pairs:
        changes.setdefault((pair.a, pair.b), []).append(pair.module)
    lines = [
        f"rank {a[0]} and {b[0]}, alpha {a[1]:g} and {b[1]:g}: {'; '.join(grouped(modules))}"
        for (a, b), modules in sorted(changes.items())
    ]
    if lines:
        _print_list(out, "not the same rank or alpha", "yellow", lines)


def _print_list(out: Console, title: str, style: str, lines: Sequence[str]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    out.print()
    out.print(Text(printable(title), style))
    for line in lines:
        out.print(Padding(Text(printable(line)), (0, 0, 0, 2)))
