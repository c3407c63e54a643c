"""Rows of a packed sequence in groups of about one length, each of which attention computes at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

STEP = 32
"""Rows of one group differ by less than this many tokens in length; they are padded to the longest."""


class Group:
    """Rows that lie one after the other in the packed sequence, from token `start` on.

    length: L, tokens that each of the n rows is padded to.
    """

    def __init__(self, start: int, lengths: Sequence[int], device: torch.device) -> None:
        self.start, self.tokens = start, sum(lengths)
        self.count, self.length = len(lengths), max(lengths)
        self._full = all(length == self.length for length in lengths)
        starts = [sum(lengths[:number]) for number in range(len(lengths))]
        # What stands in the padding is the row's last token: a number that is never looked at.
        taken = [
            begin + min(place, length - 1)
            for begin, length in zip(starts, lengths, strict=True)
            for place in range(self.length)
        ]
        kept = [
            number * self.length + place for number, length in enumerate(lengths) for place in range(length)
        ]
        self._taken = torch.tensor(taken, device=device)
        self._kept = torch.tensor(kept, device=device)

    def padded(self, states: torch.Tensor) -> torch.Tensor:
        """[heads, T, d] of the whole sequence -> [n, heads, L, d]."""
        part = states[:, self.start : self.start + self.tokens].transpose(0, 1)
        if not self._full:
            part = _Rows.apply(part, self._taken, self._kept)  # type: ignore[no-untyped-call]
        return part.reshape(self.count, self.length, *part.shape[1:]).transpose(1, 2)

    def packed(self, states: torch.Tensor) -> torch.Tensor:
        """[n, heads, L, d] -> [tokens of the group, heads, d]."""
        rows = states.transpose(1, 2).flatten(0, 1)
        if self._full:
            return rows
        kept: torch.Tensor = _Rows.apply(rows, self._kept, None)  # type: ignore[no-untyped-call]
        return kept


def grouped(lengths: Sequence[int], device: torch.device) -> tuple[Group, ...]:
    """Neighbours of about one length as one group; few and full where the rows are in order of length."""
    groups: list[Group] = []
    start, rows = 0, list[int]()
    for length in lengths:
        if rows and math.ceil(length / STEP) != math.ceil(rows[0] / STEP):
            groups.append(Group(start, rows, device))
            start, rows = start + sum(rows), []
        rows.append(length)
    return (*groups, Group(start, rows, device))


class _Rows(torch.autograd.Function):
    """Picks rows by number. Backwards each row gets the gradient of its own place, padding gets none.

    torch's own indexing adds gradients up one by one, which on the CPU takes longer than attention does.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, taken: torch.Tensor, kept: torch.Tensor | None
    ) -> torch.Tensor:
        """states [m, ...] -> [len(taken), ...]. kept: where each row of `states` is in the result; None where
        `taken` has every row once at most, the rest is padding."""
        ctx.taken, ctx.kept, ctx.count = taken, kept, len(states)
        return states.index_select(0, taken)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.kept is not None:
            return gradient.index_select(0, ctx.kept), None, None
        whole = gradient.new_zeros(ctx.count, *gradient.shape[1:])
        return whole.index_copy_(0, ctx.taken, gradient), None, None
