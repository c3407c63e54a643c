"""The reference: what `PeftModel.from_pretrained` with eager attention gives for one row alone."""

from __future__ import annotations

from onebase_adapters.proof.verify import greedy

__all__ = ["greedy"]
