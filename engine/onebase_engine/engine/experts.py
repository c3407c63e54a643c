"""Mixtures of experts in the served view, in which no row depends on its neighbours.

The modelling code of experts stays as it is: for each expert that a row has chosen, it multiplies the
expert's rows by its matrices and adds up what they give, in the order of the experts. Here its matrices stand
for the kernels' products. Back-ends that compute all experts at once do it in the same order. Routers are
computed over TILE rows at a time on the CPU, where PyTorch's products depend on their number; where a kernel
has the bits of a router's product, it makes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
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
    rows_of_expert,
)
from onebase_engine.base.layers import is_linear
from onebase_engine.kernels.interface import TILE, ExpertsKernel, Kernels, LinearKernel, RowMap
from onebase_engine.kernels.reference import rows_among
from onebase_engine.kernels.weights import ExpertLora, ModuleWeights
from onebase_engine.lora.module import StepRows

logger = logging.getLogger(__name__)

_NO_ROWS = RowMap()
_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class UnsupportedExpertsError(Exception):
    """A mixture asks for something that the kernels do not compute."""


def attach_experts(
    view: nn.Module, kernels: Kernels, step: StepRows | None = None, slots: int = 0
) -> dict[str, SlotExperts]:
    """Let the kernels compute the experts of a view, and its routers by rows.

    Args:
        step: the row map of the running step.
        slots: number of adapters.

    Returns:
        The slots of each parameter of experts, by its full name.
    """
    step = step if step is not None else StepRows()
    found: dict[str, SlotExperts] = {}
    for path, module in expert_modules(view):
        if next(module.parameters()).is_meta:  # which experts are chosen is no number there
            module.forward = _shaped
            continue
        experts = kernels.experts(module, slots) or _OneByOne(module, kernels, slots)
        module.forward = partial(_on_rows, experts, step)
        found |= {f"{path}.{name}": SlotExperts(experts, name) for name in matrix_names(module)}
    if kernels.tiled:
        for module in view.modules():
            if _routes(module):
                padded = not _use_kernel(module, kernels)
                module.forward = partial(_route, kernels, module.forward, padded)
    return found


class SlotExperts:
    """The slots of one parameter of a mixture's experts."""

    def __init__(self, kernel: ExpertsKernel, name: str) -> None:
        self._kernel = kernel
        self._name = name
        self.filled: set[int] = set()
        """Slots that have matrices for this parameter."""

    @property
    def uncaptured(self) -> set[int]:
        """Slots whose effect a CUDA graph does not include."""
        return set() if self.captures else self.filled

    @property
    def captures(self) -> bool:
        """Whether a CUDA graph computes the experts, whichever are chosen."""
        return self._kernel.captures

    def put(self, slot: int, weights: ModuleWeights | None) -> None:
        """Place matrices in a slot, or empty it with None.

        Raises:
            TypeError: this kind of weights has no meaning for experts.
        """
        if weights is not None and not isinstance(weights, ExpertLora):
            raise TypeError(f"{type(weights).__name__} cannot act on a mixture's experts")
        self.filled.discard(slot)
        self._kernel.put(self._name, slot, weights)
        if weights is not None:
            self.filled.add(slot)

    def exact(self, slot: int) -> bool:
        """Return True if rows of this slot have PyTorch's bits, according to trials on this machine."""
        return self._kernel.exact(slot)


def _on_rows(
    experts: ExpertsKernel, step: StepRows, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    return experts(x, chosen, weights, step.tokens)


def _shaped(hidden: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
    return torch.empty_like(hidden)


class _OneByOne:
    """Experts computed by their modelling code, one after the other, with a kernel for each matrix."""

    captures = False

    def __init__(self, module: Any, kernels: Kernels, slots: int) -> None:
        self._chosen: torch.Tensor | None = None
        self._rows = _NO_ROWS
        self._by_expert: dict[int, RowMap] = {}
        self._matrices = {
            name: _Matrices(getattr(module, name), kernels, slots, is_transposed(module), self.rows_of)
            for name in matrix_names(module)
        }
        for name, one in self._matrices.items():
            module._parameters.pop(name, None)
            module._modules.pop(name, None)
            module.__dict__[name] = one
        self._own_code = partial(own_code(module), module)

    def __call__(
        self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, rows: RowMap
    ) -> torch.Tensor:
        self._chosen, self._rows = chosen, rows
        try:
            result: torch.Tensor = self._own_code(x, chosen, weights)
            return result
        finally:
            self._chosen, self._rows = None, _NO_ROWS
            self._by_expert.clear()

    def put(self, name: str, slot: int, weights: ExpertLora | None) -> None:
        self._matrices[name].put(slot, weights)

    def exact(self, slot: int) -> bool:
        return all(one.exact(slot) for one in self._matrices.values())

    def rows_of(self, number: int) -> RowMap:
        """Return the groups among the rows of one expert in the running step."""
        if not self._rows.groups or self._chosen is None:
            return _NO_ROWS
        if number not in self._by_expert:
            rows = rows_of_expert(self._chosen, number).tolist()
            self._by_expert[number] = rows_among(self._rows, rows)
        return self._by_expert[number]


class _Matrices:
    """Matrices of all experts, by number, as modelling code takes them from a parameter."""

    def __init__(
        self,
        held: ExpertStack | torch.Tensor,
        kernels: Kernels,
        slots: int,
        transposed: bool,
        rows_of: Callable[[int], RowMap],
    ) -> None:
        """Make a kernel of each. `rows_of`: returns the groups among the rows of an expert in this step."""
        count = held.count if isinstance(held, ExpertStack) else len(held)
        self._layers = [kernels.linear(layer_of(held, number, transposed), slots) for number in range(count)]
        self._transposed = transposed
        self._rows_of = rows_of
        self._filled: set[int] = set()

    def __getitem__(self, number: int | torch.Tensor) -> _Matrix:
        number = int(number)
        rows = self._rows_of(number) if self._filled else _NO_ROWS
        return _Matrix(self._layers[number], self._transposed, rows)

    def put(self, slot: int, weights: ExpertLora | None) -> None:
        self._filled.discard(slot)
        for number, layer in enumerate(self._layers):
            layer.put(slot, None if weights is None else weights.of_expert(number))
        if weights is not None:
            self._filled.add(slot)

    def exact(self, slot: int) -> bool:
        return all(layer.exact(slot) for layer in self._layers)


class _Matrix:
    """Stands for an expert's matrix, or a router's, in a product, which its kernel computes."""

    def __init__(
        self, kernel: Callable[[torch.Tensor, RowMap], torch.Tensor], transposed: bool, rows: RowMap
    ) -> None:
        self._kernel = kernel
        self._transposed = transposed
        self._rows = rows

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> torch.Tensor:
        x, matrix = args if len(args) == 2 and not kwargs else (None, None)
        if isinstance(matrix, _Matrix) and isinstance(x, torch.Tensor) and x.dim() == 2:
            expected = func in _PRODUCTS if matrix._transposed else func is functional.linear
            if expected:
                return matrix._kernel(x, matrix._rows)
        raise UnsupportedExpertsError(f"its experts compute {getattr(func, '__name__', func)} of a matrix")


def _routes(module: nn.Module) -> bool:
    """Return True for a router that multiplies its rows by a parameter of its own, or of its classifier."""
    own = list(module.parameters(recurse=False))
    wide = any(parameter.dim() == 2 for parameter in own) or hasattr(module, "classifier")
    return wide and "router" in type(module).__name__.lower() and not is_linear(module)


@torch.inference_mode()
def _use_kernel(router: Any, kernels: Kernels) -> bool:
    """Let a kernel compute a router's logits, of any number of rows, if a trial gives PyTorch's bits.

    A router that is given more than rows, as MiniMax-M2's is, stays PyTorch's.
    """
    weight = router._parameters.get("weight")
    if kernels.row_multiple > 1 or len(router._parameters) != 1 or weight is None or weight.dim() != 2:
        return False
    if weight.device.type != "cpu":
        return False
    x = torch.randn(TILE, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    kernel = kernels.linear(layer_of(weight[None], 0), 0)
    if not kernel.exact(0):
        return False
    whole = router.forward
    try:
        expected = whole(x)
        del router._parameters["weight"]
        router.__dict__["weight"] = _Matrix(partial(_multiply_tile, kernel), False, _NO_ROWS)
        trials = [(rows, whole(x[:rows])) for rows in (1, TILE)]
        if all(
            torch.equal(one[:rows], other[:rows])
            for rows, found in trials
            for one, other in zip(found, expected, strict=True)
        ):
            return True
    except Exception:  # it is given more than rows, or does something else with its weight
        logger.debug("kernels: %s is computed by PyTorch", type(router).__name__, exc_info=True)
    router.__dict__.pop("weight", None)
    router._parameters["weight"] = weight
    return False


def _multiply_tile(kernel: LinearKernel, x: torch.Tensor, rows: RowMap) -> torch.Tensor:
    """Return the products of up to TILE rows, and zeros for the others of a tile.

    What follows is computed by PyTorch, for TILE rows each time.
    """
    return functional.pad(kernel(x, rows), (0, 0, 0, TILE - len(x)))


def _route(
    kernels: Kernels, whole: Any, padded: bool, x: torch.Tensor, *args: Any, **named: Any
) -> tuple[torch.Tensor, ...]:
    return kernels.route(lambda rows: _by_tiles(whole, padded, rows, *args, **named), x)


def _by_tiles(
    whole: Any, padded: bool, x: torch.Tensor, *args: Any, **named: Any
) -> tuple[torch.Tensor, ...]:
    """Compute a router over TILE rows at a time: x [..., rows, hidden] -> tensors [rows, ...].

    padded: whether it is given rows of zeros where there are fewer, which else it adds by itself.
    """
    flat = x.reshape(-1, x.shape[-1])
    more = -len(flat) % TILE if padded else 0
    tiles = torch.split(functional.pad(flat, (0, 0, 0, more)) if more else flat, TILE)
    lead = [1] * (x.dim() - 2)
    parts = [whole(tile.view(*lead, *tile.shape), *args, **named) for tile in tiles]
    if not isinstance(parts[0], tuple):
        raise UnsupportedExpertsError("its router gives no weights and numbers of experts")
    if any(one.shape[0] != TILE for one in parts[0]):
        raise UnsupportedExpertsError("its router's results are not row by row")
    whole_parts = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    return tuple(one[: len(flat)] for one in whole_parts)
