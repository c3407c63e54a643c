"""Different adapters for different rows of one forward pass.

Every linear layer of the served view is wrapped in a `SlotLinear`, the input embedding in a
`SlotEmbedding`, every norm of hidden size in a `SlotNorm`. Which slot acts on which packed row is a fact of
the step: a `RowMap`, set on the shared `StepRows` before the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from onebase_engine.base.layers import hidden_norms, input_embedding, is_linear, output_head, takes_rows_alone
from onebase_engine.kernels.interface import Kernels
from onebase_engine.kernels.weights import AdapterWeights, ModuleWeights, SavedModule, copied, narrowed
from onebase_engine.lora.embedding import SlotEmbedding
from onebase_engine.lora.linear import SlotLinear
from onebase_engine.lora.module import Replacement, SlotModule, StepRows, Terms, saved_twin

__all__ = [
    "AdapterSlots",
    "SlotEmbedding",
    "SlotLinear",
    "SlotModule",
    "SlotNorm",
    "wrap_layers",
]


class SlotNorm(SlotModule):
    """A norm over the hidden size; rows whose adapter saved it (`modules_to_save`) get that weight."""

    def __init__(self, base: nn.Module, step: StepRows, kernels: Kernels) -> None:
        super().__init__(base, step, kernels)
        self._kernel = kernels.norm(base)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._kernel(x)
        flat, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        self.on_groups(flat, out, self.by_groups, self._act_on)
        return y

    def _act_on(self, x: torch.Tensor, y: torch.Tensor, terms: Terms) -> None:
        self.replace(x, y, y, terms)

    def replacement(self, weights: ModuleWeights) -> Replacement:
        if not isinstance(weights, SavedModule):
            raise self.unfit(weights)
        twin = saved_twin(self.base, weights)
        return lambda x, bare: twin(x)


class HeadNorm(nn.Module):
    """A norm of queries' or keys' heads by a kernel. On a GPU libraries sum one row in another order than
    many; on the CPU a decoder layer is recorded only if it calls kernels alone."""

    def __init__(self, base: nn.Module, kernel: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.base = base
        self._kernel = kernel

    def forward(self, x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        kernel = self.base if more or named else self._kernel
        y: torch.Tensor = kernel(x, *more, **named)
        return y


def wrap_layers(
    model: nn.Module, step: StepRows, kernels: Kernels, *, slots: int, unpacked: bool = False
) -> dict[str, SlotModule]:
    """Replace a view's linear layers, input embedding and norms by slot modules and return these by name.

    The view's own base layers stay inside the wrappers: the loaded base is untouched. `unpacked`: 4-bit
    weights are also stored in the form that the product uses.
    """
    head, embedding = output_head(model), input_embedding(model)
    norms = {id(module) for _, module in hidden_norms(model)}
    wrapped: dict[str, SlotModule] = {}
    for name, module in list(model.named_modules()):
        if module is embedding:
            slot_module: SlotModule = SlotEmbedding(module, step, kernels)
        elif is_linear(module):
            slot_module = SlotLinear(
                module, step, kernels, slots=slots, head=module is head, unpacked=unpacked
            )
        elif id(module) in norms:
            slot_module = SlotNorm(module, step, kernels)
        else:
            if "norm" in type(module).__name__.lower() and takes_rows_alone(module):
                kernel = kernels.norm(module)
                if kernel is not module:
                    _replace(model, name, HeadNorm(module, kernel))
            continue
        _replace(model, name, slot_module)
        wrapped[name] = slot_module
    return wrapped


def _replace(model: nn.Module, name: str, by: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, by)


class Slotted(Protocol):
    """Holder of the weights of one module of the base, by slot."""

    def put(self, slot: int, weights: ModuleWeights | None) -> None: ...


class AdapterSlots:
    """Adapter versions by slot, over all wrapped modules of a view."""

    def __init__(self, modules: Mapping[str, Slotted], slots: int, device: torch.device) -> None:
        self._modules = modules
        self._device = device
        self._touched: list[tuple[str, ...]] = [()] * slots
        self._narrow = frozenset(
            name for name, module in modules.items() if isinstance(module, SlotLinear) and module.narrows
        )

    def narrowed(self, weights: AdapterWeights) -> AdapterWeights:
        """Return a version's weights in the form of slots: in half the bytes if that is exact."""
        return narrowed(weights, self._narrow)

    @torch.inference_mode()
    def load(self, slot: int, weights: AdapterWeights) -> None:
        """Load a version's weights into an empty slot."""
        self._touched[slot] = tuple(weights)
        for name, module in copied(self.narrowed(weights), self._device).items():
            self._modules[name].put(slot, module)

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Empty a slot, which no running sequence may use any more."""
        for name in self._touched[slot]:
            self._modules[name].put(slot, None)
        self._touched[slot] = ()
