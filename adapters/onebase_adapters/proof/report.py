"""What a proven version turned out to be, as it goes into the registry."""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import torch
from torch import nn

from onebase_adapters.proof.loader import LoadedAdapter
from onebase_adapters.proof.texts import TextProof
from onebase_adapters.proof.verify import ModuleProof
from onebase_engine.lora.weights import AdapterWeights, LoraWeights, ModuleWeights, TokenRows, weights_bytes


class ModuleReport(msgspec.Struct, frozen=True, kw_only=True):
    """One adapted module of a version."""

    name: str
    kind: Literal["lora", "dora", "saved", "tokens"]
    rank: int
    """0 unless the kind is lora or dora."""
    alpha: float
    parameters: int
    norm: float
    """Frobenius norm of what the module adds to its weight: scale * B @ A, or the change of what it
    replaces."""


class ProofReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was compared with PEFT, and how far it was off."""

    modules_compared: int
    modules_changed: int
    """Modules that the adapter makes compute something else."""
    rows: int
    """Input rows of each module, alone and in each mix, taken together."""
    exact: bool
    """Bit-equal was asked for, and was found (the CPU)."""
    largest_difference: float
    """Of any module, relative to the largest output of PEFT's; 0 when exact."""
    texts: int
    """Greedy texts compared."""
    tokens_compared: int
    texts_changed: int
    """Texts that differ from the bare base's."""
    base_unchanged: bool
    seconds: float


class VersionReport(msgspec.Struct, frozen=True, kw_only=True):
    """A proven version. Stored as JSON in the registry, and given out over HTTP as it is."""

    kinds: list[str]
    rank: int
    """The largest of any module, as is `alpha`."""
    alpha: float
    rslora: bool
    targets: list[str]
    parameters: int
    bytes: int
    """In memory, once loaded."""
    base_name: str | None
    """Of the base that the adapter's config names."""
    dropped: list[str]
    """Tensors of the file that were the base's own, bit for bit, and were left out."""
    modules: list[ModuleReport]
    proof: ProofReport


def version_report(
    base: nn.Module,
    adapter: LoadedAdapter,
    weights: AdapterWeights,
    modules: ModuleProof,
    texts: TextProof,
    seconds: float,
) -> VersionReport:
    spec = adapter.spec
    return VersionReport(
        kinds=spec.kinds,
        rank=spec.rank,
        alpha=spec.alpha,
        rslora=spec.rslora,
        targets=spec.targets,
        parameters=spec.parameters,
        bytes=weights_bytes(weights),
        base_name=spec.base_name,
        dropped=list(spec.dropped),
        modules=[
            ModuleReport(
                name=module.name,
                kind=module.kind,
                rank=module.rank,
                alpha=module.alpha,
                parameters=module.parameters,
                norm=change_norm(weights[module.name], base.get_submodule(module.name)),
            )
            for module in spec.modules
        ],
        proof=ProofReport(
            modules_compared=modules.compared,
            modules_changed=adapter.changed,
            rows=modules.rows,
            exact=modules.exact,
            largest_difference=modules.largest_difference,
            texts=texts.texts,
            tokens_compared=texts.tokens,
            texts_changed=texts.changed,
            base_unchanged=True,
            seconds=seconds,
        ),
    )


@torch.inference_mode()
def change_norm(weights: ModuleWeights, base: nn.Module) -> float:
    """Frobenius norm of scale * B @ A, or of the difference from the base's weight.

    Without the product itself, which may be large: |BA|² is the trace of (BᵀB)(AAᵀ), [rank, rank].
    """
    if isinstance(weights, LoraWeights):
        a, b = weights.a.double(), weights.b.double()
        a = a if a.shape[0] == weights.rank else a.T
        squared = float(((b.T @ b) * (a @ a.T)).sum())
        return abs(weights.scale) * math.sqrt(max(squared, 0.0))
    own = base.weight.detach().cpu()  # type: ignore[operator]
    if isinstance(weights, TokenRows):
        return float((weights.rows.double() - own[weights.indices].double()).norm())
    return float((weights.weight.double() - own.double()).norm())
