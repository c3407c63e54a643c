"""Which adapters act on which packed rows of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.nn import functional

from onebase_engine.kernels.cpu import RowTerms

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
    used: frozenset[int] | None = None
    """Slots that act on any of the rows; None where nobody counted."""
    _expanded: dict[tuple[int, tuple[int | None, ...]], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict
    )
    _terms: dict[int, Term] = field(default_factory=dict)

    def uses(self, slot: int) -> bool:
        return self.used is None or slot in self.used

    def expanded(self, rank: int, places: tuple[int | None, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask and weight, [rows, places * rank], of the slots at `places`; made once a step."""
        key = (rank, places)
        if key not in self._expanded:
            idle = self.weight.shape[1]
            columns = [idle if slot is None else slot for slot in places]
            weight = functional.pad(self.weight, (0, 1))[:, columns].repeat_interleave(rank, dim=1)
            self._expanded[key] = (weight != 0, weight)
        return self._expanded[key]

    def term(self, slot: int) -> Term:
        """One slot's part of the stack."""
        if slot not in self._terms:
            weight = self.weight[:, slot, None]
            self._terms[slot] = Term(slot, mask=weight != 0, weight=None if self.plain else weight)
        return self._terms[slot]


@dataclass(frozen=True)
class Tile:
    """Packed rows `start:stop` and the slots acting on them, in an order that no neighbour changes."""

    start: int
    stop: int
    terms: tuple[Term, ...]
    stack: Stack | None = None
    """The same terms as one stack, where each row has at most one of them, with weight 1."""


@dataclass(frozen=True)
class RowGroup:
    """Packed rows, one next to the other or not, that have the same slots and weights."""

    rows: tuple[int, ...]
    terms: tuple[tuple[int, float], ...]
    """(slot, weight), in the order in which they are summed."""

    def tiles(self) -> Iterator[tuple[torch.Tensor, int, tuple[Term, ...]]]:
        """TILE rows each, the last of them repeated to fill the last tile; how many are real; the terms."""
        terms = tuple(
            Term(slot, weight=None if weight == 1.0 else torch.full((TILE, 1), weight))
            for slot, weight in self.terms
        )
        for first in range(0, len(self.rows), TILE):
            some = self.rows[first : first + TILE]
            yield torch.tensor(some + some[-1:] * (TILE - len(some))), len(some), terms


@dataclass(frozen=True)
class RowMap:
    """Which slots act on which packed rows of one forward pass: by groups for the kernels in C, else by tiles
    and a stack."""

    tiles: tuple[Tile, ...] = ()
    stack: Stack | None = None
    groups: tuple[RowGroup, ...] = ()

    @cached_property
    def row_terms(self) -> RowTerms:
        """The groups as the kernels in C read them."""
        return RowTerms([(group.rows, group.terms) for group in self.groups])

    def parts(
        self, of_stack: Callable[[Stack], tuple[Term, ...]]
    ) -> Iterator[tuple[int, int, tuple[Term, ...]]]:
        """Packed rows and the terms that act on them, those of the stack as `of_stack` lists them."""
        for tile in self.tiles:
            if tile.terms:
                yield tile.start, tile.stop, tile.terms
        if self.stack is not None and (terms := of_stack(self.stack)):
            yield self.stack.start, self.stack.stop, terms


@dataclass
class StepRows:
    """The row map of the running step; every wrapped layer of a view holds the same object.

    `tokens` is for layers that see all packed rows, `logits` for the output head, which sees only
    the rows whose logits are wanted.
    """

    tokens: RowMap = RowMap()
    logits: RowMap = RowMap()
    exact_stacks: dict[tuple[int, ...], bool] = field(default_factory=dict)
    """Shapes of products tried on this machine, and whether they are bit-equal to those they stand for."""
