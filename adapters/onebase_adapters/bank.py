"""All slots of one layer as two matrices, so that a mixed batch costs two products whatever is in it."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch.nn import functional

from onebase_adapters.rows import TILE, LoraWeights, Stack

MAX_TILED_BANK = 1024
"""Columns up to which the stack beats each slot's own products on the CPU."""


class Bank:
    """`a` [slots * rank, in] and `b` [out, slots * rank], the latter with the scale.

    Its rank is that of the largest adapter at its making, rounded up to a multiple of 8; smaller ones are
    padded by zeros. Its `b` holds finite numbers only (`load_adapter` refuses others): a row's idle slots
    give 0 * b there.
    """

    def __init__(self, slots: Sequence[LoraWeights | None]) -> None:
        """`slots` holds at least one adapter."""
        present = [weights for weights in slots if weights is not None]
        self.rank = -(-max(weights.rank for weights in present) // 8) * 8
        self.width = len(slots) * self.rank
        self.a = present[0].a.new_zeros(self.width, present[0].a.shape[1])
        self.b = present[0].b.new_zeros(present[0].b.shape[0], self.width)
        for slot, weights in enumerate(slots):
            self.put(slot, weights)

    def put(self, slot: int, weights: LoraWeights | None) -> None:
        """Overwrite one slot's part; None empties it."""
        start = slot * self.rank
        self.a[start : start + self.rank].zero_()
        self.b[:, start : start + self.rank].zero_()
        if weights is not None:
            self.a[start : start + weights.rank] = weights.a
            self.b[:, start : start + weights.rank] = weights.b * weights.scale

    def delta(self, x: torch.Tensor, stack: Stack) -> torch.Tensor:
        """The sum of each row's terms, [rows, out] fp32, for rows `x` [rows, in] fp32."""
        mask, weight = stack.expanded(self.rank)
        # `where`, not a product: 0 * inf of one adapter would poison its neighbours.
        hidden = torch.where(mask, functional.linear(x, self.a), 0.0)
        return functional.linear(hidden if stack.plain else hidden * weight, self.b)

    def is_exact(self, rank: int, known: MutableMapping[tuple[int, ...], bool]) -> bool:
        """Whether, for TILE rows and adapters of `rank`, the stack gives the bits of a slot's own products.

        The library chooses its order of summation by shape, so this is tried once per shape, with random
        numbers in every slot, and remembered in `known`.
        """
        key = (*self.a.shape, self.b.shape[0], self.rank, rank)
        if key not in known:
            known[key] = self._try_slots(rank)
        return known[key]

    def _try_slots(self, rank: int) -> bool:
        generator = torch.Generator().manual_seed(rank)
        size_in, size_out, slots = self.a.shape[1], self.b.shape[0], self.width // self.rank
        x = torch.randn(TILE, size_in, generator=generator)
        own = [
            LoraWeights(
                torch.randn(rank, size_in, generator=generator),
                torch.randn(size_out, rank, generator=generator),
                1.0,
            )
            for _ in range(slots)
        ]
        bank = Bank(own) if self.rank == -(-rank // 8) * 8 else _padded(own, self.rank)
        for slot, weights in enumerate(own):
            weight = torch.zeros(TILE, slots)
            weight[:, slot] = 1.0
            expected = functional.linear(functional.linear(x, weights.a), weights.b)
            if not torch.equal(bank.delta(x, Stack(0, TILE, weight, plain=True)), expected):
                return False
        return True


def _padded(slots: Sequence[LoraWeights], rank: int) -> Bank:
    """A bank of a larger rank than its adapters have."""
    first = slots[0]
    wide = LoraWeights(
        first.a.new_zeros(rank, first.a.shape[1]), first.b.new_zeros(first.b.shape[0], rank), 1.0
    )
    bank = Bank([wide] * len(slots))
    for slot, weights in enumerate(slots):
        bank.put(slot, weights)
    return bank
