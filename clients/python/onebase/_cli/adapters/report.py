"""A version in words: what it is, where it is from, how it was proven."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...adapter_types import AdapterVersion, ProofReport, VersionReport
from ..tables import line, size
from .common import number, origin, short, state_style, targets

if TYPE_CHECKING:
    from rich.text import Text


def summary(version: AdapterVersion) -> list[Text]:
    """A few lines, the first with its name and state."""
    lines = [headline(version)]
    if version.report is not None:
        lines.append(line(f"  {makeup(version.report)}"))
        lines.append(line(f"  {proof(version.report.proof)}"))
    return lines


def headline(version: AdapterVersion) -> Text:
    """`acme-support@3f2a9c41b7d0  ready, active`."""
    state = version.state + (", active" if version.active else "")
    style = state_style("active" if version.active else version.state)
    return line(f"{version.name}@{short(version.version)}", "bold") + line("  ") + line(state, style)


def makeup(report: VersionReport) -> str:
    """`lora, rank 8, alpha 16 on q k v o; 1,234,567 parameters, 4.9 MB`."""
    parts = [" + ".join(report.kinds)]
    if report.rank:
        parts += [f"rank {report.rank}", f"alpha {number(report.alpha)}{' (rsLoRA)' * report.rslora}"]
    what = f"{', '.join(parts)} on {targets(report.targets)}"
    return f"{what}; {report.parameters:,} parameters, {size(report.bytes)}"


def proof(proof: ProofReport) -> str:
    """One sentence about the proof."""
    how = "bit for bit" if proof.exact else f"within {number(proof.largest_difference)}"
    equal = f"{proof.modules_compared} modules equal PEFT's {how}, {proof.modules_changed} of them changed"
    said = f"proven in {proof.seconds:.1f} s: {equal}"
    if proof.texts:
        said += f"; {proof.texts_changed} of {proof.texts} texts differ from the base's"
    return said


def came_from(version: AdapterVersion) -> str:
    """`hub acme/support@a1b2c3d`."""
    return f"hub {origin(version.source)}" if version.source.kind == "hub" else origin(version.source)
