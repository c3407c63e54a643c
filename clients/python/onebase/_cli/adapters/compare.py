"""What tells two versions apart: pure, from their reports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...adapter_types import AdapterVersion, ModuleReport, VersionReport
from ..tables import size
from .common import number, short, targets
from .layers import in_order, layer_norms, place, ranges, total_norm
from .report import came_from


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
    """The norm of what each adds in one layer, or to one module outside of the layers; None: nothing."""

    layer: str
    a: float | None
    b: float | None


@dataclass(frozen=True)
class RankPair:
    """A module that both change, with another rank or alpha."""

    module: str
    a: tuple[int, float]
    b: tuple[int, float]


@dataclass(frozen=True)
class Comparison:
    """Two versions side by side."""

    a: str
    b: str
    facts: tuple[Fact, ...]
    layers: tuple[LayerPair, ...]
    ranks: tuple[RankPair, ...]
    only_a: tuple[str, ...]
    """Modules that only this one changes."""
    only_b: tuple[str, ...]

    @property
    def largest(self) -> float:
        """The largest norm of a layer, of either."""
        return max((norm or 0.0 for pair in self.layers for norm in (pair.a, pair.b)), default=0.0)


def compare(a: AdapterVersion, b: AdapterVersion) -> Comparison:
    """Put two versions side by side.

    Raises:
        ValueError: one of them has no report, since it is not ready.
    """
    left, right = _report(a), _report(b)
    mine = {module.name: module for module in left.modules}
    yours = {module.name: module for module in right.modules}
    return Comparison(
        label(a),
        label(b),
        tuple(_facts(a, left, b, right)),
        tuple(_layers(left, right)),
        tuple(_ranks(mine, yours)),
        tuple(name for name in mine if name not in yours),
        tuple(name for name in yours if name not in mine),
    )


def label(version: AdapterVersion) -> str:
    """`acme-support@3f2a9c41b7d0`."""
    return f"{version.name}@{short(version.version)}"


def grouped(modules: Iterable[str]) -> list[str]:
    """Module names for people: `q_proj v_proj in layers 0-29`, `lm_head`."""
    layers: dict[str, list[int]] = {}
    for name in modules:
        where = place(name)
        found = layers.setdefault(where.target, [])
        if where.layer is not None:
            found.append(where.layer)
    lines: dict[str, list[str]] = {}
    for target in in_order(layers):
        lines.setdefault(ranges(layers[target]), []).append(target)
    return [_in_layers(" ".join(names), where) for where, names in lines.items()]


def _in_layers(names: str, where: str) -> str:
    if not where:
        return names
    return f"{names} in layer {where}" if where.isdigit() else f"{names} in layers {where}"


def _report(version: AdapterVersion) -> VersionReport:
    if version.report is None:
        raise ValueError(f"{label(version)} is {version.state}: only versions that are ready can be compared")
    return version.report


def _facts(a: AdapterVersion, left: VersionReport, b: AdapterVersion, right: VersionReport) -> Iterable[Fact]:
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
