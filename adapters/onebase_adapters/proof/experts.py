"""Adapters of PEFT on the parameters of experts (`target_parameters`), over quantized matrices.

PEFT wraps a module once for each of its parameters, and for a pass puts the whole parameter plus a low-rank
difference in its place. Here the parameters are stacks of quantized matrices, which modelling code takes one
by one: so PEFT reads, names and scales an adapter's tensors, and each matrix is changed when it is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from onebase_engine.base.experts import AdaptedStack, ExpertStack, expert_matrices
from onebase_engine.kernels.weights import ExpertLora


class ExpertParameter(NamedTuple):
    """A parameter of experts that has a place for PEFT, and what the view holds there."""

    module: Any
    name: str
    held: ExpertStack | nn.Parameter
    transposed: bool


Taken = Callable[[int, torch.Tensor], Any]
"""Function from an expert's number and its matrix to what modelling code multiplies with."""


def give_places(tree: nn.Module) -> list[ExpertParameter]:
    """Put parameters without memory where a view has stacks of matrices, for PEFT to wrap; return these.

    PEFT reads shape, dtype and device of a parameter, and wraps the first one of a module first.
    """
    found = []
    for place in list(expert_matrices(tree)):
        held = getattr(place.module, place.name)
        device = (held.weight if isinstance(held, ExpertStack) else held).device
        found.append(ExpertParameter(place.module, place.name, held, place.transposed))
        place.module._modules.pop(place.name, None)
        place.module._parameters.pop(place.name, None)
        empty = torch.zeros((), dtype=held.dtype, device=device).expand(held.shape)
        place.module.register_parameter(place.name, nn.Parameter(empty, requires_grad=False))
    return found


def take_places(
    tree: nn.Module, places: Sequence[ExpertParameter], adapter: str, taken: Callable[[Any, str], Taken]
) -> None:
    """Put the stacks back, those that PEFT has wrapped with matrices as `taken` gives them.

    Args:
        tree: the view that `places` are of, with PEFT's wrappers in it.
        taken: returns the function that changes matrices, by PEFT's wrapper and the adapter's name:
            `merged` or `apart`.
    """
    wrappers = {(id(one.get_base_layer()), one.parameter_name): one for one in parameter_wrappers(tree)}
    changed = {key: taken(one, adapter) for key, one in wrappers.items() if adapter in one.scaling}
    for key, wrapper in wrappers.items():
        wrapper.forward = partial(_inside, wrapper, changed.get(key))
    for module, name, held, transposed in places:
        del module._parameters[name]
        own = changed.get((id(module), name))
        stack = held if own is None else AdaptedStack(held, own, transposed=transposed)
        setattr(module, name, stack)


def parameter_wrappers(tree: nn.Module) -> list[Any]:
    """Return PEFT's wrappers of parameters."""
    from peft.tuners.lora.layer import ParamWrapper

    return [module for module in tree.modules() if isinstance(module, ParamWrapper)]


def _inside(wrapper: Any, taken: Taken | None, *args: Any, **named: Any) -> Any:
    """Compute what is inside a wrapper, which PEFT's own forward would give a whole parameter first."""
    with taken.passing() if isinstance(taken, _Apart) else nullcontext():
        return wrapper.base_layer(*args, **named)


def merged(wrapper: Any, adapter: str) -> Taken:
    """Return the function that gives a matrix plus its difference as PEFT's forward computes it.

    PEFT rounds A and B to the matrix's dtype, and their product with the matrix's number once.
    """
    left, right, scale = wrapper.get_delta_factors(adapter)

    def taken(number: int, matrix: torch.Tensor) -> torch.Tensor:
        if wrapper.disable_adapters:
            return matrix
        return torch.baddbmm(matrix[None], left[number, None], right[number, None], alpha=scale)[0]

    return taken


def apart(wrapper: Any, adapter: str) -> Taken:
    """Return the function that gives what is multiplied as it is served: matrix and difference by
    themselves."""
    return _Apart(wrapper, adapter)


class _Apart:
    """Gives what stands for a matrix and an adapter's, each with a product of its own."""

    def __init__(self, wrapper: Any, adapter: str) -> None:
        self._wrapper, self._adapter = wrapper, adapter
        self._parts: tuple[Sequence[torch.Tensor], ...] | None = None

    def __call__(self, number: int, matrix: torch.Tensor) -> Any:
        if self._wrapper.disable_adapters:
            return matrix
        a, b = self._parts if self._parts is not None else matrices_of(self._wrapper, self._adapter)
        return _TwoProducts(matrix, a[number], b[number], self._wrapper.scaling[self._adapter])

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Split the matrices once for a pass: else each expert's gradient is as large as all of them."""
        before = self._parts
        self._parts = tuple(one.unbind() for one in matrices_of(self._wrapper, self._adapter))
        try:
            yield
        finally:
            self._parts = before


class _TwoProducts:
    """Stands for an expert's matrix in a product, to which it adds that with an adapter's matrices."""

    def __init__(self, matrix: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        self._matrix, self._a, self._b, self._scale = matrix, a, b, scale

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> torch.Tensor:
        x, own = args
        product: torch.Tensor = func(x, own._matrix)
        # As PEFT adds a LoRA to a quantized linear layer.
        part = functional.linear(functional.linear(x.float(), own._a), own._b) * own._scale
        result: torch.Tensor = product + part.to(product.dtype)
        return result


def matrices_of(wrapper: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [experts, rank, in] and B [experts, out, rank] of PEFT's wrapper, over its own memory."""
    a, b, count = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight, wrapper.num_experts
    return a.view(count, -1, a.shape[1]), b.view(len(b), -1, count).permute(2, 0, 1)


def weights_of(wrapper: Any, adapter: str) -> ExpertLora:
    """Return the matrices of PEFT's wrapper, in host memory."""
    a, b = (one.detach().float().cpu().contiguous() for one in matrices_of(wrapper, adapter))
    return ExpertLora(a, b, float(wrapper.scaling[adapter]))


def layout_of(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of `matrices_of` in PEFT's layout: [experts * rank, in] and [out, rank * experts]."""
    return a.reshape(-1, a.shape[2]), b.permute(1, 2, 0).reshape(b.shape[1], -1)
