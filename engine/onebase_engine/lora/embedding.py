"""The input embedding with one adapter per slot."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from onebase_engine.kernels.interface import Kernels
from onebase_engine.kernels.reference import scaled
from onebase_engine.kernels.weights import LoraWeights, ModuleWeights, SavedModule, TokenRows
from onebase_engine.lora.module import Replacement, SlotModule, StepRows, Terms, saved_twin


class SlotEmbedding(SlotModule):
    """An embedding whose rows may have a LoRA (each token's row of `a`, times `b`) or be replaced."""

    def __init__(self, base: nn.Module, step: StepRows, kernels: Kernels) -> None:
        super().__init__(base, step, kernels)
        self._plain: dict[int, LoraWeights] = {}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        # Tokens that an adapter added are not the base's: their rows are replaced below.
        y: torch.Tensor = self.base(ids.clamp(max=len(self.base.weight) - 1) if self.words else ids)
        self.on_groups(ids.reshape(-1), y.view(-1, y.shape[-1]), self.by_groups, self._act_on)
        return y

    def _act_on(self, ids: torch.Tensor, y: torch.Tensor, terms: Terms) -> None:
        bare = y.clone() if self.replaces(terms) else y
        delta = self._delta(ids, terms)
        if delta is not None:
            y.copy_(y.float() + delta)
        self.replace(ids, bare, y, terms)

    def replacement(self, weights: ModuleWeights) -> Replacement | None:
        if isinstance(weights, SavedModule):
            twin, last = saved_twin(self.base, weights), len(weights.weight) - 1
            return lambda ids, bare: twin(ids.clamp(max=last))
        if isinstance(weights, TokenRows):
            rows = weights.rows.to(self.base.weight.dtype)
            scale = self._scale(rows.dtype)
            return partial(_own_rows, weights.indices, rows if scale is None else rows * scale)
        if not isinstance(weights, LoraWeights) or weights.bias is not None:
            raise self.unfit(weights)
        return None if weights.gain is None else partial(self._dora, weights)

    def put_plain(self, slot: int, weights: LoraWeights | None) -> None:
        self._plain.pop(slot, None)
        if weights is not None:
            self._plain[slot] = weights

    def _delta(self, ids: torch.Tensor, terms: Terms) -> torch.Tensor | None:
        """Return the sum of the plain LoRAs' parts, [rows, dim] fp32; None if there is none."""
        total: torch.Tensor | None = None
        for slot, weight in terms:
            weights = self._plain.get(slot)
            if weights is None:
                continue
            delta = scaled(functional.linear(weights.a[ids], weights.b), weights.scale)
            delta = scaled(delta, weight)
            total = delta if total is None else total + delta
        scale = self._scale(torch.float32)
        return total if total is None or scale is None else total * scale

    def _dora(self, weights: LoraWeights, ids: torch.Tensor, bare: torch.Tensor) -> torch.Tensor:
        """Compute PEFT's `DoraEmbeddingVariant`: gain * base + gain * delta, in fp32."""
        if weights.gain is None:
            raise self.unfit(weights)
        delta = scaled(weights.gain * functional.linear(weights.a[ids], weights.b), weights.scale)
        scale = self._scale(torch.float32)
        return (weights.gain * bare + (delta if scale is None else delta * scale)).to(bare.dtype)

    def _scale(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the factor of scaled embeddings (Gemma 3), which applies to adapters too, as in PEFT."""
        scale = getattr(self.base, "embed_scale", None)
        if scale is None:
            return None
        weight = self.base.weight
        own = scale if isinstance(scale, torch.Tensor) else weight.new_tensor(scale)
        return own.to(dtype)


def _own_rows(
    indices: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, bare: torch.Tensor
) -> torch.Tensor:
    """Return `rows` [n, dim] where a token is among the ascending `indices` [n], else the base's output."""
    if not len(indices):  # an adapter with fewer tokens than the base, and the same rows
        return bare
    places = torch.searchsorted(indices, ids).clamp_(max=len(indices) - 1)
    return torch.where((indices[places] == ids)[:, None], rows[places], bare)
