"""Cross-entropy of tokens, without a copy of the logits in fp32."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

CHUNK = 256
"""Number of rows of logits that are in fp32 at once."""


class _CrossEntropy(torch.autograd.Function):
    """Negative log-likelihood of each target; keeps no fp32 copy of the logits.

    The gradient overwrites the logits, which nobody reads afterwards. In fp32 the numbers are those of
    torch's own cross_entropy up to rounding.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Compute losses [n] fp32 of logits [n, vocabulary] and targets [n]."""
        if (own := _kernels(logits)) is not None:
            sums: torch.Tensor = own.log_sums(logits)
            ctx.save_for_backward(logits, targets, sums)
            return sums - logits.gather(1, targets[:, None])[:, 0].float()
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
        if (own := _kernels(logits)) is not None:
            own.overwrite_with_gradient(logits, targets, sums, gradient.contiguous())
            # As PyTorch does below: who needs the logits once more gets an error, not another number.
            torch.autograd.graph.increment_version(logits)
            return logits, None
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            chunk = torch.exp(logits[part].float() - sums[part, None])
            chunk.scatter_add_(1, targets[part, None], chunk.new_full((len(chunk), 1), -1.0))
            logits[part] = (chunk * gradient[part, None]).to(logits.dtype)
        return logits, None


def _kernels(logits: torch.Tensor) -> Any:
    """Return Triton's kernels for logits on a GPU; None if PyTorch computes in chunks."""
    fits = logits.device.type == "cuda" and logits.dtype == torch.bfloat16 and logits.is_contiguous()
    return _tried_kernels(logits.device) if fits and len(logits) else None


@functools.cache
def _tried_kernels(device: torch.device) -> Any:
    """Return Triton's kernels; None if they do not compile here, or differ from PyTorch."""
    try:
        from onebase_engine.kernels import cuda_training

        draw = torch.Generator().manual_seed(0)
        logits = (5 * torch.randn(3, 5000, generator=draw)).to(device, torch.bfloat16)
        targets = torch.tensor([0, 4999, 7], device=device)
        sums, wanted = cuda_training.log_sums(logits), torch.logsumexp(logits.float(), 1)
        gradient = torch.softmax(logits.float(), 1) - nn.functional.one_hot(targets, 5000)
        cuda_training.overwrite_with_gradient(logits, targets, sums, torch.ones_like(sums))
        same = torch.allclose(sums, wanted) and torch.allclose(logits.float(), gradient, 0.01, 1e-5)
    except Exception as error:
        logger.warning("PyTorch computes the loss: %s: %s", type(error).__name__, error)
        return None
    if not same:
        logger.warning("PyTorch computes the loss: the trial's losses or gradients are others")
    return cuda_training if same else None


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each row, [n] fp32. The backward pass overwrites the logits [n,
    vocabulary]."""
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
