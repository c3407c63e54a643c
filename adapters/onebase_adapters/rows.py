"""Which adapters act on which packed rows of a step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from onebase_adapters.weights import LoraWeights as LoraWeights

TILE = 32
"""Rows of every product on the CPU. oneDNN's bf16 kernels agree for any count up to 32 (not from 33),
MKL's fp32 kernels only for equal counts."""


@dataclass(frozen=True)
class Term:
    """One slot acting on the rows of a tile. None stands for "every row" and "weight 1"."""

    slot: int
    mask: torch.Tensor | None = None
    """[rows, 1] bool"""
    weight: torch.Tensor | None = None
    """[rows, 1] fp32"""


@dataclass
class Stack:
    """Packed rows `start:stop` against all slots at once: `weight` [rows, slots] fp32, 0 where idle."""

    start: int
    stop: int
    weight: torch.Tensor
    plain: bool = False
    """All weights are 0 or 1."""
    _expanded: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def expanded(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask and weight, [rows, slots * rank], made once a step for each bank width."""
        if rank not in self._expanded:
            weight = self.weight.repeat_interleave(rank, dim=1)
            self._expanded[rank] = (weight != 0, weight)
        return self._expanded[rank]


@dataclass(frozen=True)
class Tile:
    """Packed rows `start:stop` and the slots acting on them, in an order that no neighbour changes."""

    start: int
    stop: int
    terms: tuple[Term, ...]
    stack: Stack | None = None
    """The same terms as one stack, where each row has at most one of them, with weight 1."""


@dataclass(frozen=True)
class RowMap:
    """Which slots act on which packed rows of one forward pass."""

    tiles: tuple[Tile, ...] = ()
    stack: Stack | None = None


@dataclass
class StepRows:
    """The row map of the running step; every wrapped layer of a view holds the same object.

    `tokens` is for layers that see all packed rows, `logits` for the output head, which sees only
    the rows whose logits are wanted.
    """

    tokens: RowMap = RowMap()
    logits: RowMap = RowMap()
    exact_banks: dict[tuple[int, ...], bool] = field(default_factory=dict)
    """Shapes of banks, and whether their products are bit-equal to each slot's own on this machine."""
