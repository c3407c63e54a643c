"""Mixtures of experts in the served view, in which no row depends on its neighbours.

The modelling code of experts stays as it is: for each expert that a row has chosen, it multiplies the
expert's rows by its matrices and adds up what they give, in the order of the experts. Here its matrices stand
for the kernels' products. Back-ends that compute all experts at once do it in the same order. Routers are
computed over TILE rows at a time on the CPU, where PyTorch's products depend on their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from onebase_engine.base.experts import (
    ExpertStack,
    expert_modules,
    is_transposed,
    layer_of,
    matrix_names,
    own_code,
)
from onebase_engine.base.layers import is_linear
from onebase_engine.kernels.interface import TILE, Kernels, LinearKernel, RowMap

_NO_ROWS = RowMap()
_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class UnsupportedExpertsError(Exception):
    """A mixture asks for something that the kernels do not compute."""


def attach_experts(view: nn.Module, kernels: Kernels) -> list[bool]:
    """Let the kernels compute the experts of a view, and its routers by rows.

    Returns:
        Of each module of experts whether its products have PyTorch's bits, according to trials.
    """
    exact: list[bool] = []
    for _, module in expert_modules(view):
        if next(module.parameters()).is_meta:  # which experts are chosen is no number there
            module.forward = _shaped
            exact.append(False)
            continue
        kernel = kernels.experts(module)
        if kernel is not None:
            module.forward = kernel
            exact.append(kernel.exact)
            continue
        matrices = {
            name: _Matrices(getattr(module, name), kernels, is_transposed(module))
            for name in matrix_names(module)
        }
        for name, one in matrices.items():
            module._parameters.pop(name, None)
            module._modules.pop(name, None)
            module.__dict__[name] = one
        exact.append(all(one.exact for one in matrices.values()))
        module.forward = partial(own_code(module), module)
    if kernels.tiled:
        for module in view.modules():
            if _routes(module):
                module.forward = partial(_by_tiles, module.forward)
    return exact


def _shaped(hidden: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
    return torch.empty_like(hidden)


class _Matrices:
    """Matrices of all experts, by number, as modelling code takes them from a parameter."""

    def __init__(self, held: ExpertStack | torch.Tensor, kernels: Kernels, transposed: bool) -> None:
        count = held.count if isinstance(held, ExpertStack) else len(held)
        layers = [kernels.linear(layer_of(held, number, transposed), 0) for number in range(count)]
        self._all = [_Matrix(layer, transposed) for layer in layers]
        self.exact = all(layer.exact(0) for layer in layers)

    def __getitem__(self, number: int | torch.Tensor) -> _Matrix:
        return self._all[int(number)]


class _Matrix:
    """Stands for an expert's matrix in a product, which its kernel computes."""

    def __init__(self, kernel: LinearKernel, transposed: bool) -> None:
        self._kernel = kernel
        self._transposed = transposed

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> torch.Tensor:
        x, matrix = args if len(args) == 2 and not kwargs else (None, None)
        if isinstance(matrix, _Matrix) and isinstance(x, torch.Tensor) and x.dim() == 2:
            expected = func in _PRODUCTS if matrix._transposed else func is functional.linear
            if expected:
                return matrix._kernel(x, _NO_ROWS)
        raise UnsupportedExpertsError(f"its experts compute {getattr(func, '__name__', func)} of a matrix")


def _routes(module: nn.Module) -> bool:
    """Return True for a router that multiplies its rows by a parameter of its own, or of its classifier."""
    own = list(module.parameters(recurse=False))
    wide = any(parameter.dim() == 2 for parameter in own) or hasattr(module, "classifier")
    return wide and "router" in type(module).__name__.lower() and not is_linear(module)


def _by_tiles(whole: Any, x: torch.Tensor, *args: Any, **named: Any) -> Any:
    """Compute a router over TILE rows at a time: x [..., rows, hidden] -> tensors [rows, ...]."""
    flat = x.reshape(-1, x.shape[-1])
    padded = functional.pad(flat, (0, 0, 0, -len(flat) % TILE))
    lead = [1] * (x.dim() - 2)
    parts = [whole(tile.view(*lead, *tile.shape), *args, **named) for tile in torch.split(padded, TILE)]
    if not isinstance(parts[0], tuple):
        raise UnsupportedExpertsError("its router gives no weights and numbers of experts")
    if any(one.shape[0] != TILE for one in parts[0]):
        raise UnsupportedExpertsError("its router's results are not row by row")
    return tuple(torch.cat(some)[: len(flat)] for some in zip(*parts, strict=True))
