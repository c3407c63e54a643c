"""Report of a proven version, as the registry stores it. Torch is not imported here."""

from __future__ import annotations

from typing import Literal

import msgspec

Stage = Literal["validating", "proving"]
"""Stage of a version before its report."""

MergeMethod = Literal["linear", "cat", "ties", "dare_linear", "dare_ties"]
"""PEFT's names of the methods to merge adapters."""
MergeSign = Literal["total", "frequency"]


class ModuleReport(msgspec.Struct, frozen=True, kw_only=True):
    """One adapted module of a version."""

    name: str
    kind: Literal["lora", "dora", "saved", "tokens", "head"]
    rank: int
    """0 unless the kind is lora or dora."""
    alpha: float
    parameters: int
    norm: float
    """Frobenius norm of the module's change of its weight: of scale * B @ A, or of the difference from the
    replaced module."""
    spectral_norm: float | None = None
    """Largest singular value of the change, for lora and dora."""
    relative_norm: float | None = None
    """Norm divided by that of the base's weight, within some percent; None for token rows and an embedding's
    matrices."""


class ProofReport(msgspec.Struct, frozen=True, kw_only=True):
    """Result of comparing a version with PEFT."""

    modules_compared: int
    modules_changed: int
    """Number of modules that the adapter makes compute something else."""
    rows: int
    """Input rows of each module, alone and in each mix, taken together."""
    exact: bool
    """Whether every module had PEFT's bits."""
    modules_exact: int
    """Number of modules that had PEFT's bits."""
    error_ratio: float = 0.0
    """Largest ratio of the error against fp64 to that of PEFT's own output, over the other modules."""
    kernels: str = "torch"
    """Kernels that computed: `torch`, or the kernels in C by their set of instructions; on a GPU with its
    kind, as `triton sm_90`."""
    largest_difference: float
    """Largest difference of any module, relative to PEFT's largest output; 0 when exact."""
    texts: int
    """Number of greedy texts compared."""
    tokens_compared: int
    texts_changed: int
    """Number of texts that differ from the bare base's."""
    base_unchanged: bool
    seconds: float
    shown: str = ""
    """Sentences on what was proved for this version on this device."""


class VersionReport(msgspec.Struct, frozen=True, kw_only=True):
    """A proven version. The registry stores it as JSON, and HTTP returns it unchanged."""

    kinds: list[str]
    rank: int
    """Largest rank of any module; `alpha` is the largest alpha."""
    alpha: float
    rslora: bool
    targets: list[str]
    parameters: int
    bytes: int
    """Size in memory, once loaded, in bytes."""
    base_name: str | None
    """Name of the base in the adapter's config."""
    dropped: list[str]
    """Tensors of the file that were the base's own, bit for bit, and were left out."""
    modules: list[ModuleReport]
    proof: ProofReport
    task: str = "CAUSAL_LM"
    """Task of the adapter, in PEFT's words."""
    labels: int = 0
    """Number of a classifier's classes."""
    label_names: list[str] = []
    """Names of all classes, in their order; empty if the files name none."""
    warnings: list[str] = []
    """Sentences for a person to read before the version is activated; nothing is blocked."""
    base_layers: int = 0
    """Number of the base's layers."""
    base_linears: list[str] = []
    """Names of the base's linear modules within a layer, experts as one."""


def what_was_shown(
    modules: int,
    exact: int,
    tolerated: int,
    error_ratio: float,
    kernels: str,
    texts: int,
    tokens: int,
    classified: int = 0,
) -> str:
    """Return sentences on what a proof has shown.

    Args:
        tolerated: modules that were only within a hundredth of PEFT's largest output.
        classified: texts whose classes were compared.
    """
    by = f"PyTorch{kernels[5:]}" if kernels.startswith("torch") else f"the {kernels} kernels"
    found = f"{'All' if exact == modules else f'{exact} of'} {modules} modules gave PEFT's own bits by {by}"
    if summed := modules - exact - tolerated:
        found += f"; {summed} sum in another order, with at most {error_ratio:.3f} times the error of PEFT's"
    if tolerated:
        found += f"; {tolerated} were within a hundredth of PEFT's largest output"
    found += ", for rows alone, next to another adapter's rows and next to rows without one."
    if texts:
        found += f" {texts} greedy texts of {tokens // texts} tokens were PEFT's, but for ties."
    if classified:
        found += f" The classes of {classified} texts were PEFT's, but for rounding."
    return found
