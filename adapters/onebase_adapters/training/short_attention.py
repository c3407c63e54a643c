"""Causal attention of short rows by plain products, in the order of transformers' eager attention."""

from __future__ import annotations

from typing import Any

import torch

from onebase_engine.engine.attention import attention_weights


class ShortAttention(torch.autograd.Function):
    """Scores in the model's dtype, softmax in fp32, weights rounded back; grouped heads share their keys."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """q [n, heads, L, d], k [n, kv heads, L, d], v [n, kv heads, L, e] -> [n, heads, L, e]."""
        n, heads, length, size = q.shape
        shared = k.shape[1]
        groups = heads // shared
        q = q.reshape(n * shared, groups * length, size)
        k, v = k.reshape(n * shared, length, size), v.reshape(n * shared, length, -1)
        raw = torch.bmm(q, k.transpose(1, 2)).view(-1, groups, length, length)
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
        weights = attention_weights(raw, hidden, scale).view(n * shared, groups * length, length)
        ctx.save_for_backward(q, k, v, weights)
        ctx.shape, ctx.scale = (n, heads, length), scale
        return torch.bmm(weights, v).view(n, heads, length, -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        n, heads, length = ctx.shape
        shared = len(k) // n
        gradient = gradient.reshape(n * shared, -1, v.shape[-1])
        v_gradient = torch.bmm(weights.transpose(1, 2), gradient)
        inner = torch.bmm(gradient, v.transpose(1, 2)).float()
        weights32 = weights.float()
        inner = (inner - (inner * weights32).sum(-1, keepdim=True)).mul_(weights32)
        scores = inner.mul_(ctx.scale).to(q.dtype)
        q_gradient = torch.bmm(scores, k).view(n, heads, length, -1)
        k_gradient = torch.bmm(scores.transpose(1, 2), q).view(n, shared, length, -1)
        return q_gradient, k_gradient, v_gradient.view(n, shared, length, -1), None
