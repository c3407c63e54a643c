"""Losses over the supervised tokens only, summed, in nats."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CHUNK = 256
"""Rows of logits that are held in fp32 at once."""


class _CrossEntropy(torch.autograd.Function):
    """Negative log-likelihood of each target; keeps no fp32 copy of the logits.

    The gradient takes the memory of the logits, which nobody reads afterwards. In fp32 the numbers are those
    of torch's own cross_entropy up to rounding.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """logits [n, vocabulary], targets [n] -> [n] fp32."""
        losses = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        sums = torch.empty_like(losses)
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            chunk = logits[part].float()
            sums[part] = torch.logsumexp(chunk, dim=-1)
            losses[part] = sums[part] - chunk.gather(1, targets[part, None])[:, 0]
        ctx.save_for_backward(logits, targets, sums)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, sums = ctx.saved_tensors
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            chunk = torch.exp(logits[part].float() - sums[part, None])
            chunk.scatter_add_(1, targets[part, None], chunk.new_full((len(chunk), 1), -1.0))
            logits[part] = (chunk * gradient[part, None]).to(logits.dtype)
        return logits, None


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row, [n] fp32. The backward pass uses the logits [n, vocabulary] up."""
    if len(logits) != len(targets):
        raise ValueError(
            f"{len(logits)} rows of logits for {len(targets)} targets: the base ignores logits_to_keep"
        )
    if not logits.requires_grad:
        parts = zip(torch.split(logits, CHUNK), torch.split(targets, CHUNK), strict=True)
        return torch.cat(
            [nn.functional.cross_entropy(chunk.float(), part, reduction="none") for chunk, part in parts]
        )
    losses: torch.Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return losses


def dpo_losses(
    chosen: torch.Tensor, rejected: torch.Tensor, reference: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """DPO's loss and margin of each pair (Rafailov et al. 2023, equation 7), both [pairs].

    chosen, rejected: log-likelihoods of the replies, [pairs]. reference: the base's log-likelihood of the
    chosen one minus that of the rejected one, [pairs].
    """
    margin = beta * ((chosen - rejected) - reference)
    return -nn.functional.logsigmoid(margin), margin
