"""Stages of a version before it is proven, and the words for what its proof has shown."""

from __future__ import annotations

from typing import Literal

Stage = Literal["validating", "proving"]
"""Stage of a version before its report."""


class ProofError(Exception):
    """A served module, or a text, differs from PEFT's.

    `name` is that of the module or text; `difference` the largest of its outputs, relative to PEFT's largest.
    """

    def __init__(self, name: str, difference: float, message: str) -> None:
        super().__init__(message)
        self.name = name
        self.difference = difference


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
        found += (
            f"; {summed} round or sum in another order, with at most {error_ratio:.3f} times the error of "
            "PEFT's"
        )
    if tolerated:
        found += f"; {tolerated} were within a hundredth of PEFT's largest output"
    found += ", for rows alone, next to another adapter's rows and next to rows without one."
    if texts:
        found += f" {texts} greedy texts of {tokens // texts} tokens were PEFT's, but for ties."
    if classified:
        found += f" The classes of {classified} texts were PEFT's, but for rounding."
    return found
