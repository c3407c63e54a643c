"""Norms that an adapter brings of its own (`modules_to_save`)."""

from __future__ import annotations

import torch

from onebase_engine.lora.module import Replacement, SlotModule, saved_twin
from onebase_engine.lora.weights import ModuleWeights, SavedModule


class SlotNorm(SlotModule):
    """A norm over the hidden size; rows whose adapter saved it get that one's weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        if not self.filled:
            return y
        flat, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for start, stop, terms in self.rows.parts(self.stack_terms):
            some = out[start:stop]
            self.replace(flat[start:stop], some, some, terms)
        return y

    def replacement(self, weights: ModuleWeights) -> Replacement:
        if not isinstance(weights, SavedModule):
            raise self.unfit(weights)
        twin = saved_twin(self.base, weights)
        return lambda x, bare: twin(x)
