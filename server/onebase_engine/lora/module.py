"""What all wrapped modules share: the base's module, what sits in its slots, and how rows are told apart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from onebase_engine.lora.rows import RowMap, Stack, StepRows, Term
from onebase_engine.lora.weights import LoraWeights, ModuleWeights, SavedModule

Replacement = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From the module's input rows and the base's output rows [rows, out] to a slot's own output rows."""


class SlotModule(nn.Module):
    """A module of the base with the weights of one adapter per slot.

    Plain LoRAs add to what the base gives, and several may add to one row. Every other kind gives a row's
    whole output (`replacement`), taken over by `where`, so that nothing of it reaches another row.
    """

    def __init__(
        self, base: nn.Module, step: StepRows, *, slots: int, tiled: bool, head: bool = False
    ) -> None:
        super().__init__()
        self.base: Any = base
        self.step = step
        self.tiled = tiled
        self.head = head
        self.slots = slots
        self.filled: set[int] = set()
        """Slots that have weights for this module."""
        self.replacements: dict[int, Replacement] = {}

    @property
    def rows(self) -> RowMap:
        return self.step.logits if self.head else self.step.tokens

    @property
    def weight(self) -> torch.Tensor:
        """The base's own, for modelling code that asks a layer for its dtype or device."""
        weight: torch.Tensor = self.base.weight
        return weight

    def put(self, slot: int, weights: ModuleWeights | None) -> None:
        """Place weights in a slot, or empty it with None.

        Raises:
            TypeError: this kind of weights has no meaning for this kind of module.
        """
        replacement = None if weights is None else self.replacement(weights)
        self.filled.discard(slot)
        self.replacements.pop(slot, None)
        if replacement is not None:
            self.replacements[slot] = replacement
        self.put_plain(slot, weights if isinstance(weights, LoraWeights) and replacement is None else None)
        if weights is not None:
            self.filled.add(slot)

    def replacement(self, weights: ModuleWeights) -> Replacement | None:
        """How rows with these weights come about; None for a plain LoRA."""
        raise NotImplementedError

    def put_plain(self, slot: int, weights: LoraWeights | None) -> None:
        """Place a plain LoRA in a slot, or empty it with None; modules that have none do nothing."""

    def replace(self, x: torch.Tensor, bare: torch.Tensor, y: torch.Tensor, terms: tuple[Term, ...]) -> None:
        """Write the replaced rows into `y`; `bare` [rows, out] is what the base gave for the rows `x`."""
        for term in terms:
            if term.slot in self.replacements:
                own = self.replacements[term.slot](x, bare)
                y.copy_(own if term.mask is None else torch.where(term.mask, own, y))

    def on_groups(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        acting: Collection[int],
        act: Callable[[torch.Tensor, torch.Tensor, tuple[Term, ...]], None],
    ) -> None:
        """Let `act` change rows of `y`, tile by tile of the groups that have any of the slots `acting`."""
        for group in self.rows.groups:
            if any(slot in acting for slot, _ in group.terms):
                for rows, count, terms in group.tiles():
                    part = y[rows]
                    act(x[rows], part, terms)
                    y[rows[:count]] = part[:count]

    def replaces(self, terms: tuple[Term, ...]) -> bool:
        return any(term.slot in self.replacements for term in terms)

    def stack_terms(self, stack: Stack) -> tuple[Term, ...]:
        """A term for each slot of the stack whose rows are replaced."""
        return tuple(stack.term(slot) for slot in self.replacements if stack.uses(slot))

    def unfit(self, weights: ModuleWeights) -> TypeError:
        return TypeError(f"{type(weights).__name__} cannot act on {type(self.base).__name__}")


def saved_twin(base: nn.Module, saved: SavedModule) -> nn.Module:
    """The base's module, shallowly copied, with the saved weights in place of its own."""
    twin = copy.copy(base)
    own = {"weight": saved.weight} | ({} if saved.bias is None else {"bias": saved.bias})
    parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in own.items()}
    twin._parameters = {**base._parameters, **parameters}
    return twin
