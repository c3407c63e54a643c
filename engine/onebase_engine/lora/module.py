"""Base class of wrapped modules: the base's module and what adapters have for it in slots."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from onebase_engine.kernels.interface import Kernels, RowMap
from onebase_engine.kernels.reference import parts
from onebase_engine.kernels.weights import LoraWeights, ModuleWeights, SavedModule, words_of

Replacement = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Function from the module's input rows and the base's output rows [rows, out] to a slot's own output
rows."""


Terms = Sequence[tuple[int, float]]
"""Pairs of slot and weight that act on a row, in the order of summation."""


@dataclass
class StepRows:
    """The row map of the running step; every wrapped layer of a view holds the same object.

    `tokens` is for layers that see all packed rows, `logits` for the output head, which sees only
    the rows whose logits are wanted.
    """

    tokens: RowMap = field(default_factory=RowMap)
    logits: RowMap = field(default_factory=RowMap)


class SlotModule(nn.Module):
    """A module of the base with the weights of one adapter per slot.

    Plain LoRAs are added to the base's output, and several may be added to one row. Every other kind computes
    a row's whole output (`replacement`), from that row alone.
    """

    def __init__(self, base: nn.Module, step: StepRows, kernels: Kernels, *, head: bool = False) -> None:
        super().__init__()
        self.base: Any = base
        self.step = step
        self.tiled = kernels.tiled
        self.head = head
        self.filled: set[int] = set()
        """Slots that have weights for this module."""
        self.replacements: dict[int, Replacement] = {}
        self.words: dict[int, int] = {}
        """Number of tokens that the embedding or the head of a slot has, where it is not the base's."""

    @property
    def rows(self) -> RowMap:
        return self.step.logits if self.head else self.step.tokens

    @property
    def weight(self) -> torch.Tensor:
        """The base's own weight, for modelling code that reads a layer's dtype or device."""
        weight: torch.Tensor = self.base.weight
        return weight

    @property
    def by_groups(self) -> Collection[int]:
        """Slots that are applied group by group, and not in the kernels."""
        return self.filled

    @property
    def uncaptured(self) -> Collection[int]:
        """Slots whose effect a CUDA graph does not include, since it has no groups."""
        return self.by_groups

    def put(self, slot: int, weights: ModuleWeights | None) -> None:
        """Place weights in a slot, or empty it with None.

        Raises:
            TypeError: this kind of weights has no meaning for this kind of module.
        """
        replacement = None if weights is None else self.replacement(weights)
        self.filled.discard(slot)
        self.replacements.pop(slot, None)
        self.words.pop(slot, None)
        if replacement is not None:
            self.replacements[slot] = replacement
        if weights is not None and words_of(weights) not in (0, len(self.base.weight)):
            self.words[slot] = words_of(weights)
        self.put_plain(slot, weights if isinstance(weights, LoraWeights) and replacement is None else None)
        if weights is not None:
            self.filled.add(slot)

    def replacement(self, weights: ModuleWeights) -> Replacement | None:
        """Return the function that computes rows with these weights; None for a plain LoRA."""
        raise NotImplementedError

    def exact(self, slot: int) -> bool:
        """Return True if rows of this slot have PEFT's bits, according to trials on this machine."""
        return self.tiled

    def put_plain(self, slot: int, weights: LoraWeights | None) -> None:
        """Place a plain LoRA in a slot, or empty it with None; modules that have none do nothing."""

    def replace(self, x: torch.Tensor, bare: torch.Tensor, y: torch.Tensor, terms: Terms) -> None:
        """Write the replaced rows into `y`; `bare` [rows, out] is the base's output for the rows `x`."""
        for slot, _ in terms:
            if slot in self.replacements:
                y.copy_(self.replacements[slot](x, bare))

    def on_groups(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        acting: Collection[int],
        act: Callable[[torch.Tensor, torch.Tensor, Terms], None],
    ) -> None:
        """Let `act` change rows of `y`, for the groups with any of the slots `acting`."""
        if not acting:
            return
        for index, count, group in parts(self.rows, self.tiled, y.shape[1], x.device):
            if any(slot in acting for slot, _ in group.terms):
                own = y[index]
                act(x[index], own, group.terms)
                y[index[:count]] = own[:count]

    def replaces(self, terms: Terms) -> bool:
        return any(slot in self.replacements for slot, _ in terms)

    def unfit(self, weights: ModuleWeights) -> TypeError:
        return TypeError(f"{type(weights).__name__} cannot act on {type(self.base).__name__}")


def saved_twin(base: nn.Module, saved: SavedModule) -> nn.Module:
    """Return a shallow copy of the base's module with the saved weights in place of its own."""
    twin = copy.copy(base)
    own = {"weight": saved.weight} | ({} if saved.bias is None else {"bias": saved.bias})
    parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in own.items()}
    twin._parameters = {**base._parameters, **parameters}
    return twin
