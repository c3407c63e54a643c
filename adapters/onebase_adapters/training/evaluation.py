"""The loss on held-out rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from onebase_adapters.training.batches import pack, weight_of
from onebase_adapters.training.errors import TrainingDivergedError
from onebase_adapters.training.objectives import Objective
from onebase_adapters.training.ranks import Ranks
from onebase_adapters.training.recipe import Recipe, decided
from onebase_adapters.training.samples import Dataset
from onebase_adapters.training.trainable import Trainable

_NAMES = ("accuracy", "margin")


@dataclass
class Scores:
    """Sums over micro-batches, then means. sums: [3] fp64: loss, DPO's accuracy and margin."""

    sums: torch.Tensor
    loss: float = 0.0
    rewards: dict[str, float] = field(default_factory=dict)
    _named: bool = False

    @classmethod
    def empty(cls, device: torch.device) -> Scores:
        return cls(torch.zeros(1 + len(_NAMES), dtype=torch.float64, device=device))

    def add(self, loss: torch.Tensor, rewards: dict[str, torch.Tensor]) -> None:
        self.sums[0] += loss
        for place, name in enumerate(_NAMES, start=1):
            if name in rewards:
                self.sums[place] += rewards[name]
                self._named = True

    def sum_over(self, ranks: Ranks, step: int, what: str, bad: list[int]) -> None:
        """Add up what all processes have. `bad`: lines of rows whose loss was not finite in this one.

        Raises TrainingDivergedError in all processes if there are any in one.
        """
        count = self.sums.new_full((1,), len(bad))
        ranks.add([self.sums, count])
        if count:
            raise TrainingDivergedError(step, what, sorted(ranks.all_of(bad)))

    def over(self, weight: int) -> Scores:
        """Means over what the rows weigh."""
        loss, *rewards = (self.sums / weight).tolist()
        self.loss = loss
        self.rewards = dict(zip(_NAMES, rewards, strict=True)) if self._named else {}
        return self


def held_out_scores(
    trainable: Trainable, objective: Objective, recipe: Recipe, data: Dataset, ranks: Ranks, step: int
) -> Scores:
    """The mean loss of all rows, nats a supervised token (DPO: a pair). Raises TrainingDivergedError."""
    scores = Scores.empty(trainable.device)
    batches = pack(data.rows, range(len(data)), decided(recipe.micro_tokens), packing=recipe.packing)
    bad: list[int] = []
    with trainable.evaluating():
        for batch in ranks.share(batches):
            loss, rewards = objective.loss(batch)
            if torch.isfinite(loss):
                scores.add(loss, rewards)
            else:
                bad += [data.rows[row].line for row in batch.rows]
    scores.sum_over(ranks, step, "the held-out loss", bad)
    return scores.over(sum(map(weight_of, data.rows)))
