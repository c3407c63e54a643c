"""Activated LoRA in training: on which tokens of a packed sequence the adapter acts.

PEFT knows one invocation for each row of a padded batch. Here a sequence has several rows, so that PEFT's
layers get a mask of tokens instead of offsets. What they compute with it is PEFT's own
(`ALoraLinearVariant`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from onebase_training.batches import Packed


class ActivatedTokens:
    """Tokens on which the adapter acts, which all of its layers read; they are set before each pass.

    They must stay set until the backward pass is done, because gradient checkpointing computes it again.
    """

    def __init__(self) -> None:
        self._tokens = torch.ones(0, dtype=torch.bool)
        self._kept = self._tokens

    def attach(self, model: Any, adapter: str) -> None:
        """Make the adapter's layers act on these tokens alone."""
        from peft.tuners.lora import LoraLayer

        head = model.get_base_model().get_output_embeddings()
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and adapter in layer.lora_variant:
                layer.lora_variant[adapter] = _ActivatedVariant(self, is_head=layer is head)

    def set_tokens(self, packed: Packed) -> None:
        """Set the tokens of the next pass."""
        if packed.activated is not None:
            self._tokens, self._kept = packed.activated, packed.activated[packed.keep]

    def of(self, *, is_head: bool) -> torch.Tensor:
        """Return True for each row of a layer's input on which the adapter acts; the output head gets only
        those whose logits are needed."""
        return self._kept if is_head else self._tokens


class _ActivatedVariant:
    """Replaces PEFT's `ALoraLinearVariant` in one layer."""

    def __init__(self, activation: ActivatedTokens, *, is_head: bool) -> None:
        self._activation = activation
        self._is_head = is_head

    def forward(
        self, module: nn.Module, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """Add the adapter's part to the rows of `result` [1, rows, out] on which it acts."""
        layer: Any = module
        a, b = layer.lora_A[active_adapter], layer.lora_B[active_adapter]
        acts = self._activation.of(is_head=self._is_head)
        rows = layer.lora_dropout[active_adapter](x.to(a.weight.dtype).view(-1, x.shape[-1])[acts])
        result.view(-1, result.shape[-1])[acts] += b(a(rows)) * layer.scaling[active_adapter]
        return result
