"""Adapters and versions: how a person names them, what they are in words, what they change in which layer."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from ..._sync.client import Client
from ..._terminal.ui import line, size, sparklines
from ...adapter_types import READY, AdapterVersion, ModuleReport, ProofReport, VersionReport

if TYPE_CHECKING:
    from rich.text import Text

SHORT: Final = 12
"""Digits of a digest that people see."""

_LAYER: Final = re.compile(r"\.(\d+)\.")
_BLOCK: Final = (
    "embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip

# ---- names -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reference:
    """`NAME` or `NAME@VERSION`."""

    name: str
    version: str | None = None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


def reference(text: str) -> Reference:
    """Return the reference that a person wrote. A Hub name may have an @ of its own:
    `hub:org/repo@main@3f2a9c41`.

    Raises:
        ValueError: a part is empty.
    """
    name, at, version = text.rpartition("@")
    if not at or (text.startswith("hub:") and "@" not in name):
        name, version = text, ""
    if not name or (at and not text.rpartition("@")[2]):
        raise ValueError(f"write NAME or NAME@VERSION, not {text!r}")
    return Reference(name, version or None)


def resolve(client: Client, wanted: Reference) -> AdapterVersion:
    """Return the version that a reference names, else the active one, else the newest that is ready.

    Raises:
        NotFoundError: there is no such adapter or version.
        ValueError: no version is ready.
    """
    digest = wanted.version or client.adapters.retrieve(wanted.name).version
    if digest is not None:
        return client.adapters.version(wanted.name, digest)
    ready = [version for version in client.adapters.versions(wanted.name) if version.state == READY]
    if not ready:
        raise ValueError(f"no version of {wanted.name} is ready: see `onebase adapters show {wanted.name}`")
    return ready[0]


def short(digest: str | None) -> str:
    """Return the first digits of a digest, nothing for None. The id of a pull stays whole."""
    if digest is None:
        return ""
    return digest if digest.startswith("pull-") else digest[:SHORT]


def label(version: AdapterVersion) -> str:
    """`acme-support@3f2a9c41b7d0`."""
    return f"{version.name}@{short(version.version)}"


# ---- words --------------------------------------------------------------------------------------------


def summary(version: AdapterVersion) -> list[Text]:
    """Return a version in a few lines: name and state, what it is made of, its proof, what stands out."""
    lines = [headline(version)]
    if version.report is not None:
        lines.append(line(f"  {makeup(version.report)}"))
        lines.append(line(f"  {proof(version.report.proof)}"))
        lines += [line(f"  look at this: {warning}", "yellow") for warning in version.report.warnings]
    return lines


def headline(version: AdapterVersion) -> Text:
    """`acme-support@3f2a9c41b7d0  ready, active`."""
    state = version.state + (", active" if version.active else "")
    style = state_style("active" if version.active else version.state)
    return line(label(version), "bold") + line("  ") + line(state, style)


def makeup(report: VersionReport) -> str:
    """`lora, rank 8, alpha 16 on q k v o; 1,234,567 parameters, 4.9 MB`, with an activated LoRA's tokens."""
    parts = [" + ".join(report.kinds)]
    if report.rank:
        parts += [f"rank {report.rank}", f"alpha {number(report.alpha)}{' (rsLoRA)' * report.rslora}"]
    what = f"{', '.join(parts)} on {targets(report.targets)}"
    if report.invocation_tokens:
        what += f", from the tokens {' '.join(map(str, report.invocation_tokens))} on"
    return f"{what}; {report.parameters:,} parameters, {size(report.bytes)}"


def proof(proof: ProofReport) -> str:
    """Return one sentence about the proof."""
    how = "bit for bit" if proof.exact else f"within {number(proof.largest_difference)}"
    if not proof.exact:
        how += f", {proof.modules_exact} of them bit for bit"
    how += "" if proof.kernels == "torch" else f" ({proof.kernels} kernels)"
    equal = f"{proof.modules_compared} modules equal PEFT's {how}, {proof.modules_changed} of them changed"
    text = f"proven in {proof.seconds:.1f} s: {equal}"
    if proof.texts:
        text += f"; {proof.texts_changed} of {proof.texts} texts differ from the base's"
    return text


def came_from(version: AdapterVersion) -> str:
    """`hub acme/support@a1b2c3d`, or `cat of 0.7*support@3f2a9c41b7d0 + 0.3*legal@5d0c2f7a9b31`."""
    source = version.source
    if source.parent is not None:
        name, _, digest = source.parent.rpartition("@")
        return f"{source.kind}, from {name}@{short(digest)}"
    if source.parents:
        terms = (f"{parent.weight:g}*{parent.name}@{short(parent.version)}" for parent in source.parents)
        return f"{source.method} of {' + '.join(terms)}"
    if source.kind != "hub":
        return source.kind
    place = f"{source.repo or ''}" + (f"/{source.subfolder}" if source.subfolder else "")
    at = source.commit[:7] if source.commit else source.revision
    return f"hub {place}@{at}" if at else f"hub {place}"


def targets(names: Iterable[str]) -> str:
    """Target modules in short: `q k v o gate up down`."""
    return " ".join(name.removesuffix("_proj") for name in in_order(set(names)))


def number(value: float) -> str:
    """Return a number in few digits: `16`, `0.25`, `1.3e-05`."""
    return f"{value:.4g}"


def state_style(state: str) -> str:
    """Return the style of a state, in rich's words."""
    return {"active": "bold green", "ready": "green", "failed": "red"}.get(state, "yellow")


def span(values: Iterable[object]) -> str:
    """`8` if all values are equal, else the smallest and the largest: `8-64`."""
    numbers = sorted({float(str(value)) for value in values})
    if not numbers:
        return ""
    return f"{numbers[0]:.4g}" if len(numbers) == 1 else f"{numbers[0]:.4g}-{numbers[-1]:.4g}"


# ---- layers -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ModulePlace:
    """Place of a module: its layer, None outside of the layers, and its target name."""

    layer: int | None
    target: str


def place(name: str) -> ModulePlace:
    """`model.layers.3.self_attn.q_proj` is `q_proj` in layer 3; `lm_head` is in none."""
    found = _LAYER.search(name)
    return ModulePlace(int(found[1]) if found else None, name.rpartition(".")[2])


def layer_norms(modules: Iterable[ModuleReport]) -> dict[str, float]:
    """Return the Frobenius norm of what is added in each layer, and to each module outside of the layers.

    The layers come first, in order; a key is a layer's number or a module's name.
    """
    squares: dict[tuple[int, int, str], float] = {}
    for module in modules:
        where = place(module.name)
        key = (0, where.layer, "") if where.layer is not None else (1, 0, where.target)
        squares[key] = squares.get(key, 0.0) + module.norm**2
    return {str(key[1]) if key[0] == 0 else key[2]: math.sqrt(squares[key]) for key in sorted(squares)}


def total_norm(modules: Iterable[ModuleReport]) -> float:
    """Return the Frobenius norm of everything that is added."""
    return math.sqrt(sum(module.norm**2 for module in modules))


def by_target(modules: Iterable[ModuleReport]) -> dict[str, list[ModuleReport]]:
    """Return the modules of each target, in the order of the layers. The targets are in the order of a
    block."""
    groups: dict[str, list[ModuleReport]] = {}
    for module in sorted(modules, key=lambda module: place(module.name).layer or 0):
        groups.setdefault(place(module.name).target, []).append(module)
    return {target: groups[target] for target in in_order(groups)}


def in_order(names: Iterable[str]) -> list[str]:
    """Return the targets in the order of a block, then others, `lm_head` last."""
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


def norm_charts(
    groups: Mapping[str, Sequence[ModuleReport]], width: int, *, ascii_only: bool = False
) -> dict[str, str]:
    """Return a chart for each target: the norm by layer, all on one scale. It is empty outside of the
    layers."""
    return sparklines(
        {name: _norms_by_layer(group) for name, group in groups.items()}, width, ascii_only=ascii_only
    )


def _norms_by_layer(modules: Iterable[ModuleReport]) -> dict[int, float]:
    norms = {place(module.name).layer: module.norm for module in modules}
    return {layer: norm for layer, norm in norms.items() if layer is not None}


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
