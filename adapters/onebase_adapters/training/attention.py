"""Attention of several rows in one packed sequence: each row sees itself only.

Plugged into transformers' `AttentionInterface`, so that every decoder keeps its own modelling code. A packed
sequence of rows costs what the rows cost: no padding is computed, and no mask over all pairs of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from onebase_adapters.training.gate import Gate

NAME = "onebase_packed"


class UnsupportedTrainingError(Exception):
    """The base's attention asks for something that training does not do."""


class PackedAttention:
    """Shared by all attention modules of a view; `lengths` of the packed rows are set before each pass.

    They must stay set until the backward pass is done: with gradient checkpointing it computes again.
    """

    def __init__(self, gate: Gate) -> None:
        self.lengths: Sequence[int] = ()
        self._gate = gate

    def attach(self, model: nn.Module) -> None:
        """Make the attention modules of a view call this object."""
        register()
        model.set_attn_implementation(NAME)  # type: ignore[operator]
        for module in model.modules():
            if getattr(module, "layer_idx", None) is not None:
                module.packed = self  # type: ignore[assignment]

    def forward(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        """q [1, heads, T, d], k and v [1, kv heads, T, d] -> [1, T, heads, d of v]."""
        self._gate.wait()
        if q.requires_grad:
            q.register_hook(self._wait_backwards)  # type: ignore[no-untyped-call]
        if not getattr(module, "is_causal", True) or options.get("s_aux") is not None:
            raise UnsupportedTrainingError("the base's attention looks ahead, or has sinks")
        groups = q.shape[1] // k.shape[1]
        window, softcap = options.get("sliding_window"), options.get("softcap")
        lengths = list(self.lengths)
        rows = zip(*(torch.split(part, lengths, dim=2) for part in (q, k, v)), strict=True)
        outputs = []
        for q_row, k_row, v_row in rows:
            plain = softcap is None and (window is None or window >= q_row.shape[2])
            attend = _flash if plain else _explicit
            outputs.append(attend(q_row, _repeated(k_row, groups), _repeated(v_row, groups), options))
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def _wait_backwards(self, gradient: torch.Tensor) -> None:
        self._gate.wait()


def packed_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """What transformers calls; the mask is None, as registered."""
    packed: PackedAttention = module.packed  # type: ignore[assignment]
    return packed.forward(module, query, key, value, options), None


def register() -> None:
    """Make NAME known to transformers; again is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def _repeated(states: torch.Tensor, groups: int) -> torch.Tensor:
    """[1, kv heads, t, d] -> [1, heads, t, d], as grouped queries want it."""
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    return nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, dropout_p=options.get("dropout") or 0.0, scale=options["scaling"]
    )


def _explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """As transformers' eager attention: softcap and sliding windows."""
    scores = q @ k.transpose(2, 3) * options["scaling"]
    if (softcap := options.get("softcap")) is not None:
        scores = torch.tanh(scores / softcap) * softcap
    place = torch.arange(q.shape[2], device=q.device)
    hidden = place > place[:, None]
    if (window := options.get("sliding_window")) is not None:
        hidden |= place <= place[:, None] - window
    scores = scores.masked_fill(hidden, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    if dropout := options.get("dropout"):
        weights = nn.functional.dropout(weights, dropout)
    return weights @ v
