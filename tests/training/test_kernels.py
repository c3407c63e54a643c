"""Cross-entropy without a copy of the logits, and DPO's loss."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from onebase_adapters.training.kernels import CHUNK, dpo_losses, token_losses


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
def test_losses_and_gradients_are_those_of_torch(count: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(count)
    logits = (torch.randn(count, 97) * 5).to(dtype)
    targets, scale = torch.randint(0, 97, (count,)), torch.rand(count)
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    # `* 1`: as in a model, the logits are no leaf, and their memory may be used up.
    ours, theirs = (
        token_losses(one * 1, targets),
        cross_entropy((other * 1).float(), targets, reduction="none"),
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-6)
    (ours * scale).sum().backward()
    (theirs * scale).sum().backward()
    torch.testing.assert_close(one.grad, other.grad, atol=tolerance, rtol=tolerance)


def test_without_gradients_the_losses_are_the_same() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(CHUNK + 5, 50), torch.randint(0, 50, (CHUNK + 5,))
    torch.testing.assert_close(
        token_losses(logits, targets), token_losses(logits.clone().requires_grad_() * 1, targets)
    )


def test_dpo_is_the_papers_formula() -> None:
    chosen, rejected = torch.tensor([-10.0, -3.0]), torch.tensor([-12.0, -2.0])
    reference = torch.tensor([1.0, -4.0])
    losses, margins = dpo_losses(chosen, rejected, reference, 0.5)
    assert margins.tolist() == [0.5, 1.5]
    torch.testing.assert_close(losses, torch.log1p(torch.exp(-margins)))
