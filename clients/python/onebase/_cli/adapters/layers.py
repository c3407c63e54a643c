"""From a report's modules to layers and targets: pure, for the charts."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ...adapter_types import ModuleReport

_LAYER: Final = re.compile(r"\.(\d+)\.")

_BLOCK: Final = (
    "embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
EIGHTHS: Final = " ▏▎▍▌▋▊▉█"
HEIGHTS: Final = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Place:
    """Where a module is: in which layer, None outside of them, and what it is there."""

    layer: int | None
    target: str


def place(name: str) -> Place:
    """`model.layers.3.self_attn.q_proj` is `q_proj` in layer 3; `lm_head` is in none."""
    found = _LAYER.search(name)
    return Place(int(found[1]) if found else None, name.rpartition(".")[2])


def layer_norms(modules: Iterable[ModuleReport]) -> dict[str, float]:
    """For each layer, and each module outside of them, the Frobenius norm of all that is added there.

    The layers come first, in order; a key is a layer's number or a module's name.
    """
    squares: dict[tuple[int, int, str], float] = {}
    for module in modules:
        where = place(module.name)
        key = (0, where.layer, "") if where.layer is not None else (1, 0, where.target)
        squares[key] = squares.get(key, 0.0) + module.norm**2
    return {str(key[1]) if key[0] == 0 else key[2]: math.sqrt(squares[key]) for key in sorted(squares)}


def total_norm(modules: Iterable[ModuleReport]) -> float:
    """The Frobenius norm of everything that is added."""
    return math.sqrt(sum(module.norm**2 for module in modules))


def by_target(modules: Iterable[ModuleReport]) -> dict[str, list[ModuleReport]]:
    """The modules of each target, in the order of the layers; the targets as a block has them."""
    groups: dict[str, list[ModuleReport]] = {}
    for module in sorted(modules, key=lambda module: place(module.name).layer or 0):
        groups.setdefault(place(module.name).target, []).append(module)
    return {target: groups[target] for target in in_order(groups)}


def in_order(names: Iterable[str]) -> list[str]:
    """Targets in the order in which a block has them, others after them, `lm_head` last."""
    known = {name: number for number, name in enumerate(_BLOCK)}
    return sorted(names, key=lambda name: (name == "lm_head", known.get(name, len(known)), name))


def ranges(layers: Iterable[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def bar(value: float, largest: float, width: int, *, ascii_only: bool = False) -> str:
    """A bar of at most `width` characters for `value`, where `largest` fills it; never empty above 0."""
    if value <= 0 or largest <= 0:
        return ""
    if ascii_only:
        return "#" * max(1, round(value / largest * width))
    eighths = max(1, round(value / largest * width * 8))
    full, rest = divmod(eighths, 8)
    return EIGHTHS[8] * full + (EIGHTHS[rest] if rest else "")


def sparklines(
    groups: Mapping[str, Sequence[ModuleReport]], width: int, *, ascii_only: bool = False
) -> dict[str, str]:
    """A small chart for each target: one character a layer, its height the norm there, all on one scale.

    Where a model has more layers than `width`, several share a character. A layer that is left alone is
    blank, and so is the chart of a target outside of the layers.
    """
    heights = "_.-=*#%@" if ascii_only else HEIGHTS
    placed = {name: _by_layer(group) for name, group in groups.items()}
    count = 1 + max((layer for norms in placed.values() for layer in norms), default=0)
    largest = max((norm for norms in placed.values() for norm in norms.values()), default=0.0)
    return {name: _sparkline(norms, count, largest, width, heights) for name, norms in placed.items()}


def _by_layer(modules: Iterable[ModuleReport]) -> dict[int, float]:
    norms = {place(module.name).layer: module.norm for module in modules}
    return {layer: norm for layer, norm in norms.items() if layer is not None}


def _sparkline(norms: Mapping[int, float], count: int, largest: float, width: int, heights: str) -> str:
    edges = [round(step * count / min(width, count)) for step in range(min(width, count) + 1)]
    drawn = ""
    for first, end in itertools.pairwise(edges):
        inside = [norms[layer] for layer in range(first, end) if layer in norms]
        share = max(inside) / largest if inside and largest > 0 else 0.0
        drawn += heights[min(7, int(share * 8))] if inside else " "
    return drawn.rstrip()


def span(values: Iterable[object]) -> str:
    """One value if all are equal, else the smallest and the largest: `8` or `8-64`."""
    numbers = sorted({float(str(value)) for value in values})
    if not numbers:
        return ""
    return f"{numbers[0]:.4g}" if len(numbers) == 1 else f"{numbers[0]:.4g}-{numbers[-1]:.4g}"
