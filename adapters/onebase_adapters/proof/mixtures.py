"""Prove that experts with adapters compute what their tensors say, and no other row's.

PEFT adds an adapter's difference to an expert's matrix, rounds the sum to the matrix's dtype and multiplies
once. What is served are two products, of matrix and adapter, each rounded, and their rounded sum, as PEFT
computes a LoRA on a linear layer. So no bits are compared, but distances from the result in fp64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from onebase_adapters.proof.experts import (
    Taken,
    apart,
    layout_of,
    matrices_of,
    merged,
    parameter_wrappers,
)
from onebase_adapters.proof.report import ProofError
from onebase_engine.base.experts import matrix_names, own_code
from onebase_engine.kernels.interface import TILE
from onebase_engine.kernels.weights import ExpertLora

MOST_EXPERTS = 16
"""Largest number of experts of a layer that are compared. The others are the same code with another index."""
AMPLIFIED = 8.0
"""Factor between the adapter's difference and the matrix, in the root mean square, in which its tensors are
compared once more."""
MOST_RELATIVE = 2.0**-4
"""Largest error of an amplified result, relative to it. A rounding of bf16 is 2**-8, and gates enlarge it."""
ORDER_RATIO = 1.1
"""Largest ratio of the served error to that of the same products by PyTorch. By rounding alone, which other
orders of summation shift, they differ by a hundredth."""
FP32_RATIO = 16.0
"""The same in fp32, where the order of sums is the error."""
PEFT_RATIO = 2.0
"""Largest ratio of the served error to that of PEFT's output. Both round twice, in other places: measured
were 0.94 to 1.11, and only where an adapter cancels a matrix is it more."""

Serve = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class MixtureDistance(NamedTuple):
    """Distances of a layer's experts with an adapter."""

    difference: float
    """Largest difference from PEFT's outputs, relative to PEFT's largest."""
    ratio: float
    """Error against fp64 in the root mean square, by that of PEFT's own outputs."""


class Mixture:
    """One layer's experts: the base's, and PEFT's with the version."""

    def __init__(self, path: str, bare: Any, reference: nn.Module) -> None:
        """Describe the experts. `reference`: PEFT's model of the version, or a part of it that has them."""
        self.path, self._bare = path, bare
        wrapped = reference.get_submodule(path)
        self.wrappers = {one.parameter_name: one for one in parameter_wrappers(wrapped)}
        self.adapter: str = next(iter(self.wrappers.values())).active_adapters[0]

    def inputs(self, random: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Return seeded rows, the experts that they choose and the weights of these."""
        names = matrix_names(self._bare)
        held = getattr(self._bare, names[0])
        count, size = int(held.shape[0]), held.shape[1 if self._bare.is_transposed else 2]
        some = torch.randperm(count, generator=random)[:MOST_EXPERTS]
        scores = torch.rand(TILE, len(some), generator=random)
        weights, places = scores.topk(min(2, len(some)))
        x = torch.randn(TILE, size, generator=random).to(dtype)
        return Inputs(x.to(device), some[places].to(device), (weights / weights.sum(1, True)).to(device))

    def compute(self, inputs: Inputs, how: Callable[[Any, str], Taken] | None, *, wide: bool) -> torch.Tensor:
        """Compute the experts by the model's own code, [rows, hidden].

        Args:
            how: what PEFT's wrappers do to a matrix (`merged`, `apart`); None: they are left out.
            wide: in fp64.
        """
        twin = copy.copy(self._bare)
        twin._parameters, twin._modules = dict(twin._parameters), dict(twin._modules)
        for name in matrix_names(self._bare):
            held, wrapper = getattr(self._bare, name), self.wrappers.get(name)
            twin._parameters.pop(name, None)
            twin._modules.pop(name, None)
            taken = None if how is None or wrapper is None else how(wrapper, self.adapter)
            twin.__dict__[name] = _Matrices(held, taken, wide=wide)
        x, chosen, weights = inputs
        if wide:
            x, weights = x.double(), weights.double()
        result: torch.Tensor = own_code(self._bare)(twin, x, chosen, weights)
        return result.double()


class Inputs(NamedTuple):
    """Arguments of a mixture's experts."""

    x: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor


class _Matrices:
    """Matrices as modelling code takes them, by number."""

    def __init__(self, held: Any, taken: Taken | None, *, wide: bool) -> None:
        self._held, self._taken, self._wide = held, taken, wide

    def __getitem__(self, number: Any) -> Any:
        matrix = self._held[int(number)].detach()
        matrix = matrix.double() if self._wide else matrix
        return matrix if self._taken is None else self._taken(int(number), matrix)


def exact(wrapper: Any, adapter: str) -> Taken:
    """Return the function that gives a matrix in fp64 plus the difference that the tensors say."""
    own = _lora_of(wrapper, adapter)

    def taken(number: int, matrix: torch.Tensor) -> torch.Tensor:
        delta = own.scale * own.b[number].double() @ own.a[number].double()
        return matrix + (delta.T if wrapper.get_base_layer().is_transposed else delta)

    return taken


def _lora_of(wrapper: Any, adapter: str) -> ExpertLora:
    return ExpertLora(*matrices_of(wrapper, adapter), wrapper.scaling[adapter])


def compare(mixture: Mixture, inputs: Inputs, served: torch.Tensor) -> MixtureDistance:
    """Compare what is served of a version's rows with the result in fp64, and with PEFT's.

    Raises:
        ProofError: it is farther from the result than rounding brings it.
    """
    truth = mixture.compute(inputs, exact, wide=True)
    same, peft = (mixture.compute(inputs, how, wide=False) for how in (apart, merged))
    if not torch.isfinite(peft).all():
        raise ProofError(
            mixture.path, math.inf, f"{mixture.path} overflows: PEFT's own output is not finite either"
        )
    got = served.double()
    error, usual, of_peft = (_rms(one - truth) for one in (got, same, peft))
    ratio = FP32_RATIO if served.dtype == torch.float32 else ORDER_RATIO
    difference = float((got - peft).abs().max() / peft.abs().max())
    if not error <= ratio * usual:
        raise ProofError(
            mixture.path,
            difference,
            f"{mixture.path} is farther from the result in fp64 than its products by PyTorch: "
            f"{error:.2e}, not {usual:.2e}",
        )
    if served.dtype != torch.float32 and not error <= PEFT_RATIO * of_peft:
        raise ProofError(
            mixture.path,
            difference,
            f"{mixture.path} differs from PEFT's by {difference:.1e} of its largest output, and is farther "
            f"from the result in fp64: {error:.2e}, not {of_peft:.2e}",
        )
    return MixtureDistance(difference, error / of_peft if of_peft else 1.0)


def compare_amplified(
    mixture: Mixture, inputs: Inputs, serve: Callable[[Mapping[str, ExpertLora]], torch.Tensor]
) -> None:
    """Compare once more with the adapter's part so large that no rounding of the matrices hides it.

    PEFT's own output is compared as well: so its tensors are those that are served.

    Raises:
        ProofError: one of the two is not the result in fp64.
    """
    large: dict[str, ExpertLora] = {}
    for name, wrapper in mixture.wrappers.items():
        own = _lora_of(wrapper, mixture.adapter)
        factor = _amplifier(own, getattr(mixture._bare, name), inputs.chosen)
        large[name] = replace(own, b=own.b * factor)
    if not all(bool(torch.isfinite(own.b).all()) for own in large.values()):
        return
    with _amplified(mixture, large):
        truth = mixture.compute(inputs, exact, wide=True)
        peft = mixture.compute(inputs, merged, wide=False)
    size = _rms(truth)
    if not (math.isfinite(size) and size):
        return
    for title, got in (("PEFT's output", peft), ("what is served", serve(large).double())):
        error = _rms(got - truth) / size
        if not error <= MOST_RELATIVE:
            raise ProofError(
                mixture.path,
                error,
                f"{mixture.path}: {title} differs from what the tensors say, with the adapter made larger, "
                f"by {error:.1e} in the root mean square",
            )


@contextmanager
def _amplified(mixture: Mixture, large: Mapping[str, ExpertLora]) -> Iterator[None]:
    """Give PEFT's wrappers other matrices for a while."""
    layers = {name: one.lora_B[mixture.adapter] for name, one in mixture.wrappers.items()}
    own = {name: layer.weight.data for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.weight.data = layout_of(large[name].a, large[name].b)[1]
        yield
    finally:
        for name, layer in layers.items():
            layer.weight.data = own[name]


def _amplifier(own: ExpertLora, held: Any, chosen: torch.Tensor) -> float:
    """Return a power of two that makes the difference of most chosen experts larger than their matrices."""
    parts, wholes = [], []
    for number in sorted(set(chosen.flatten().tolist())):
        parts.append(_rms(own.scale * own.b[number].double() @ own.a[number].double()))
        wholes.append(_rms(held[number].double()))
    part, whole = (math.sqrt(sum(one * one for one in some)) for some in (parts, wholes))
    if not part or not math.isfinite(part):
        return 1.0
    return 2.0 ** max(0, math.ceil(math.log2(AMPLIFIED * max(whole, 1e-15) / part)))


def _rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())
