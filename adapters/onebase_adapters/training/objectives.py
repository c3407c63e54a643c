"""What a run makes smaller: the loss of the replies, or DPO's."""

from __future__ import annotations

from typing import Protocol

import torch

from onebase_adapters.training.batches import MicroBatch
from onebase_adapters.training.loss import dpo_losses
from onebase_adapters.training.recipe import Recipe
from onebase_adapters.training.trainable import Trainable


class Objective(Protocol):
    """Gives a micro-batch's summed loss, and sums of what else is of interest by name."""

    def loss(self, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...


def make_objective(trainable: Trainable, recipe: Recipe) -> Objective:
    """The objective of the recipe's method."""
    if recipe.method == "supervised":
        return Supervised(trainable)
    if recipe.beta == "auto":
        raise ValueError("the recipe is not resolved")
    return Preferences(trainable, recipe.beta)


class Supervised:
    """Cross-entropy of the supervised tokens, and how many of them the model would have chosen."""

    def __init__(self, trainable: Trainable) -> None:
        self._trainable = trainable

    def loss(self, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        losses, _ = self._trainable.losses(batch)
        return losses.sum(), {}


class Preferences:
    """DPO (Rafailov et al. 2023): the reference is the same base with the adapter off, so it costs no memory.

    A pair's reference never changes and is computed once.
    """

    def __init__(self, trainable: Trainable, beta: float) -> None:
        self._trainable = trainable
        self._beta = beta
        self._references: dict[int, torch.Tensor] = {}

    def loss(self, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        reference = self._reference(batch)
        likelihoods = self._likelihoods(batch)
        losses, margins = dpo_losses(likelihoods[0::2], likelihoods[1::2], reference, self._beta)
        rewards = {"accuracy": (margins > 0).sum().detach(), "margin": margins.sum().detach()}
        return losses.sum(), rewards

    def _likelihoods(self, batch: MicroBatch) -> torch.Tensor:
        """Of each sample's reply given its prompt, [samples] nats."""
        losses, owner = self._trainable.losses(batch)
        return losses.new_zeros(len(batch.samples)).index_add(0, owner, -losses)

    def _reference(self, batch: MicroBatch) -> torch.Tensor:
        keys = [id(sample) for sample in batch.samples[0::2]]
        if any(key not in self._references for key in keys):
            with self._trainable.evaluating(), self._trainable.without_adapter():
                found = self._likelihoods(batch)
            self._references.update(zip(keys, found[0::2] - found[1::2], strict=True))
        return torch.stack([self._references[key] for key in keys])
