"""What a proven version turned out to be, as it goes into the registry. Torch is not imported here."""

from __future__ import annotations

from typing import Literal

import msgspec

Stage = Literal["validating", "proving"]
"""How far a version is on its way to its report."""

MergeMethod = Literal["linear", "cat", "ties", "dare_linear", "dare_ties"]
"""PEFT's names of the ways to make one adapter of several."""
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
    """Frobenius norm of what the module adds to its weight: scale * B @ A, or the change of what it
    replaces."""
    spectral_norm: float | None = None
    """Its largest singular value, of lora and dora."""
    relative_norm: float | None = None
    """The norm by that of the base's weight, within some percent; None of token rows and an embedding's
    matrices."""


class ProofReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was compared with PEFT, and how far it was off."""

    modules_compared: int
    modules_changed: int
    """Modules that the adapter makes compute something else."""
    rows: int
    """Input rows of each module, alone and in each mix, taken together."""
    exact: bool
    """Every module had PEFT's bits."""
    modules_exact: int
    """Modules that had PEFT's bits."""
    error_ratio: float = 0.0
    """Of the others: the largest distance from the result in fp64, divided by that of PEFT's own output."""
    kernels: str = "torch"
    """What computed: `torch`, or the kernels in C by their set of instructions; on a GPU with its kind, as
    `triton sm_90`."""
    largest_difference: float
    """Of any module, relative to the largest output of PEFT's; 0 when exact."""
    texts: int
    """Greedy texts compared."""
    tokens_compared: int
    texts_changed: int
    """Texts that differ from the bare base's."""
    base_unchanged: bool
    seconds: float
    shown: str = ""
    """What was shown for this version on this device, in words."""


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
    task: str = "CAUSAL_LM"
    """What the adapter is for, in PEFT's words."""
    labels: int = 0
    """Classes that a classifier tells apart."""
    label_names: list[str] = []
    """Of all of them, in their order; empty if the files name none."""
    warnings: list[str] = []
    """What a person should look at before the version is activated, a sentence each; nothing is blocked."""
    base_layers: int = 0
    """Of the base."""
    base_linears: list[str] = []
    """The base's linear modules by what they are called in any of its layers, experts as one."""


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
    """What a proof has shown, in words.

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
