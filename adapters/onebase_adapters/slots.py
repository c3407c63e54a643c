"""Different adapters for different rows of one forward pass.

Every linear layer of the served view is wrapped in a `SlotLinear`, the input embedding in a
`SlotEmbedding`, every norm of hidden size in a `SlotNorm`. Which slot acts on which packed row is a fact of
the step: a `RowMap`, set on the shared `StepRows` before the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from onebase_adapters.rows import StepRows
from onebase_adapters.slot_embedding import SlotEmbedding
from onebase_adapters.slot_linear import SlotLinear
from onebase_adapters.slot_module import SlotModule
from onebase_adapters.slot_norm import SlotNorm
from onebase_adapters.weights import AdapterWeights, moved

__all__ = [
    "SlotBank",
    "SlotEmbedding",
    "SlotLinear",
    "SlotModule",
    "SlotNorm",
    "hidden_norms",
    "input_embedding",
    "output_head",
    "wrap_layers",
]


def input_embedding(model: Any) -> nn.Embedding:
    embedding: nn.Embedding = model.get_input_embeddings()
    return embedding


def output_head(model: Any) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings()
    return head


def hidden_norms(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The norms over the hidden size: those that an adapter may bring of its own."""
    hidden = model.config.get_text_config().hidden_size
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        named = (
            "norm" in type(module).__name__.lower() and "weight" in own and own.keys() <= {"weight", "bias"}
        )
        if named and all(parameter.shape == (hidden,) for parameter in own.values()):
            yield name, module


def wrap_layers(model: nn.Module, step: StepRows, *, slots: int, tiled: bool) -> dict[str, SlotModule]:
    """Replace a view's linear layers, input embedding and norms by slot modules; returns them by name.

    The view's own base layers stay inside the wrappers: the loaded base is untouched.
    """
    head, embedding = output_head(model), input_embedding(model)
    norms = {id(module) for _, module in hidden_norms(model)}
    wrapped: dict[str, SlotModule] = {}
    for name, module in list(model.named_modules()):
        if module is embedding:
            slot_module: SlotModule = SlotEmbedding(module, step, slots=slots, tiled=tiled)
        elif isinstance(module, nn.Linear):
            slot_module = SlotLinear(module, step, slots=slots, tiled=tiled, head=module is head)
        elif id(module) in norms:
            slot_module = SlotNorm(module, step, slots=slots, tiled=tiled)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, slot_module)
        wrapped[name] = slot_module
    return wrapped


class SlotBank:
    """Which adapter version sits in which slot, over all wrapped modules of a view."""

    def __init__(self, modules: Mapping[str, SlotModule], slots: int, device: torch.device) -> None:
        self._modules = modules
        self._device = device
        self._touched: list[tuple[str, ...]] = [()] * slots

    @torch.inference_mode()
    def load(self, slot: int, weights: AdapterWeights) -> None:
        """Put a version's weights into an empty slot."""
        self._touched[slot] = tuple(weights)
        copies: dict[int, torch.Tensor] = {}
        for name, module in weights.items():
            self._modules[name].put(slot, moved(module, self._device, copies))

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Empty a slot. No running row may still point at it."""
        for name in self._touched[slot]:
            self._modules[name].put(slot, None)
        self._touched[slot] = ()
