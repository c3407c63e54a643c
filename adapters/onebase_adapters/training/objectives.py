"""What a run makes smaller: the loss of the replies, or DPO's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from onebase_adapters.training.batches import MicroBatch, pack
from onebase_adapters.training.data.dataset import Row
from onebase_adapters.training.recipe import Recipe, decided
from onebase_adapters.training.trainable import Trainable


class Objective(Protocol):
    """Computes a micro-batch's summed loss, and sums of other figures by name."""

    def prepare(self, rows: Sequence[Row], recipe: Recipe) -> None:
        """Compute what is needed of the rows before the first step, in their order."""

    def loss(self, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...


def make_objective(trainable: Trainable, recipe: Recipe) -> Objective:
    """The objective of the recipe's method."""
    if recipe.method == "supervised":
        return Supervised(trainable)
    return Preferences(trainable, decided(recipe.beta))


class Supervised:
    """Cross-entropy of the supervised tokens."""

    def __init__(self, trainable: Trainable) -> None:
        self._trainable = trainable

    def prepare(self, rows: Sequence[Row], recipe: Recipe) -> None:
        """Nothing is needed."""

    def loss(self, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        losses, _ = self._trainable.losses(batch)
        return losses.sum(), {}


class Preferences:
    """DPO (Rafailov et al. 2023): the reference is the same base with the adapter off, so it costs no memory.

    All pairs' references are computed before the first step, packed in the order of the rows: how a pair is
    packed may move its last bits, and a resumed run must find the same ones.
    """

    def __init__(self, trainable: Trainable, beta: float) -> None:
        self._trainable = trainable
        self._beta = beta
        self._references: dict[int, float] = {}

    def loss(self, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        reference = self._reference(batch)
        likelihoods = self._likelihoods(batch)
        losses, margins = dpo_losses(likelihoods[0::2], likelihoods[1::2], reference, self._beta)
        rewards = {"accuracy": (margins > 0).sum().detach(), "margin": margins.sum().detach()}
        return losses.sum(), rewards

    def _likelihoods(self, batch: MicroBatch) -> torch.Tensor:
        """The log-likelihood of each sample's reply given its prompt, [samples] nats."""
        losses, owner = self._trainable.losses(batch)
        return losses.new_zeros(len(batch.samples)).index_add(0, owner, -losses)

    def prepare(self, rows: Sequence[Row], recipe: Recipe) -> None:
        micro_tokens = decided(recipe.micro_tokens)
        with self._trainable.evaluating(), self._trainable.without_adapter():
            for batch in pack(rows, range(len(rows)), micro_tokens, packing=recipe.packing):
                found = self._likelihoods(batch)
                differences = (found[0::2] - found[1::2]).tolist()
                self._references.update(zip(map(id, batch.samples[0::2]), differences, strict=True))

    def _reference(self, batch: MicroBatch) -> torch.Tensor:
        held = [self._references[id(sample)] for sample in batch.samples[0::2]]
        return torch.tensor(held, device=self._trainable.device)


def dpo_losses(
    chosen: torch.Tensor, rejected: torch.Tensor, reference: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """DPO's loss and margin of each pair (Rafailov et al. 2023, equation 7), both [pairs].

    chosen, rejected: log-likelihoods of the replies, [pairs]. reference: the base's log-likelihood of the
    chosen one minus that of the rejected one, [pairs].
    """
    margin = beta * ((chosen - rejected) - reference)
    return -nn.functional.logsigmoid(margin), margin
