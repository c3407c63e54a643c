"""A tied output head some of whose rows an adapter replaces (`trainable_token_indices`)."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch.nn import functional

from onebase_engine.lora.rows import TILE
from onebase_engine.lora.weights import TokenRows

COLUMNS = 256
"""Replaced rows are padded to a multiple of this many: MKL sums narrower fp32 products in another order
than those as wide as a vocabulary."""


class TokenHead:
    """Logits of `n` tokens from rows of the adapter's own, the others as the base gave them.

    PEFT copies the whole head and writes the rows into it. Here only the product with the replaced rows is
    made again, where a trial on the base's own rows shows it to be bit-equal; else, on the CPU, as PEFT does.
    """

    def __init__(
        self, base: Any, weights: TokenRows, known: MutableMapping[tuple[int, ...], bool] | None
    ) -> None:
        """`known`: what trials have shown, to be kept; None where bits are not promised (accelerators)."""
        self._base = base
        self._indices = weights.indices
        self._rows = weights.rows.to(base.weight.dtype)
        self._narrow = base.bias is None and (known is None or self._is_exact(known))
        self._padded = _padded(self._rows) if self._narrow else None

    def __call__(self, x: torch.Tensor, bare: torch.Tensor) -> torch.Tensor:
        if self._padded is None:
            return functional.linear(x, self._base.weight.index_copy(0, self._indices, self._rows))
        logits = functional.linear(x, self._padded)[:, : len(self._indices)]
        return bare.index_copy(1, self._indices, logits)

    def _is_exact(self, known: MutableMapping[tuple[int, ...], bool]) -> bool:
        weight = self._base.weight
        count = -(-len(self._indices) // COLUMNS) * COLUMNS
        key = (*weight.shape, count, weight.dtype.itemsize, 0)
        if key not in known:
            x = torch.randn(TILE, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(
                weight.dtype
            )
            whole = functional.linear(x, weight)[:, self._indices]
            narrow = functional.linear(x, _padded(weight[self._indices]))[:, : len(self._indices)]
            known[key] = torch.equal(whole, narrow)
        return known[key]


def _padded(rows: torch.Tensor) -> torch.Tensor:
    return functional.pad(rows, (0, 0, 0, -len(rows) % COLUMNS))
