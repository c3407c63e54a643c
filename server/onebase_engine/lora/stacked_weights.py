"""All plain LoRAs of one layer as a few pairs of matrices, so that a mixed batch costs few products.

Adapters lie together by rank: those whose ranks round up to the same power of two share a `RankGroup`, so
that one of rank 256 costs the others nothing, and rows without it nothing either.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence

import torch
from torch.nn import functional

from onebase_engine.lora.rows import TILE, Stack
from onebase_engine.lora.weights import AdapterWeights, LoraWeights, weights_bytes

MAX_TILED_COLUMNS = 1024
"""Columns up to which the stack beats each slot's own products on the CPU."""
SMALLEST_BUCKET = 8


def bucket(rank: int) -> int:
    """The rank that an adapter of `rank` is padded to: a power of two, at least SMALLEST_BUCKET."""
    return max(SMALLEST_BUCKET, 1 << (rank - 1).bit_length())


def stacked_bytes(weights: AdapterWeights) -> int:
    """Bytes of a version whose plain LoRAs lie in groups: with their ranks rounded up."""
    lora = (module for module in weights.values() if isinstance(module, LoraWeights) and module.plain)
    padding = sum(
        (bucket(m.rank) - m.rank) * (m.a.numel() // m.rank + m.b.shape[0]) * m.a.itemsize for m in lora
    )
    return weights_bytes(weights) + padding


class RankGroup:
    """The adapters of one bucket: `a` [places * rank, in] and `b` [out, places * rank], with the scale in b.

    Places double when all are taken and halve when fewer than half are, so that at most half are empty.
    `b` holds finite numbers only (`load_adapter` refuses others): a row's idle places give 0 * b there.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.places: tuple[int | None, ...] = (None,)
        """The slot at each place."""
        self._matrices: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def width(self) -> int:
        return len(self.places) * self.rank

    @property
    def slots(self) -> list[int]:
        return [slot for slot in self.places if slot is not None]

    @property
    def built(self) -> bool:
        return self._matrices is not None

    @property
    def growth(self) -> int:
        """Columns that the next slot adds."""
        return 0 if None in self.places else self.width

    def drop(self) -> None:
        """Free the matrices, to be made again when wanted."""
        self._matrices = None

    def add(self, slot: int, weights: LoraWeights, *, build: bool = False) -> None:
        """Take a slot in that is not here yet; with `build` the matrices are made at once."""
        if None not in self.places:
            self._resize(2 * len(self.places))
        if build and self._matrices is None:
            self._allocate(weights)
        place = self.places.index(None)
        self._write(place, weights)
        self.places = (*self.places[:place], slot, *self.places[place + 1 :])

    def remove(self, slot: int) -> None:
        """Empty the slot's place."""
        place = self.places.index(slot)
        self._write(place, None)
        self.places = (*self.places[:place], None, *self.places[place + 1 :])
        if 2 * len(self.slots) < len(self.places):
            self._resize(len(self.places) // 2)

    @torch.inference_mode()
    def build(self, slots: Sequence[LoraWeights | None]) -> tuple[torch.Tensor, torch.Tensor]:
        """The two matrices, from the weights of all slots of the layer; made when first wanted."""
        if self._matrices is not None:
            return self._matrices
        matrices = self._allocate(next(w for slot in self.slots if (w := slots[slot]) is not None))
        for place, slot in enumerate(self.places):
            if slot is not None:
                self._write(place, slots[slot])
        return matrices

    def own(self, slot: int, rank: int) -> LoraWeights:
        """The slot's part of the built matrices, without a copy."""
        if self._matrices is None:
            raise RuntimeError("the group's matrices have not been made")
        a, b = self._matrices
        start = self.places.index(slot) * self.rank
        return LoraWeights(a[start : start + rank], b[:, start : start + rank], 1.0)

    @torch.inference_mode()
    def _allocate(self, like: LoraWeights) -> tuple[torch.Tensor, torch.Tensor]:
        a = like.a.new_zeros(self.width, like.a.shape[1])
        b = like.b.new_zeros(like.b.shape[0], self.width)
        self._matrices = (a, b)
        return self._matrices

    def delta(self, x: torch.Tensor, stack: Stack, slots: Sequence[LoraWeights | None]) -> torch.Tensor:
        """The sum of each row's terms, [rows, out] fp32, for rows `x` [rows, in] fp32."""
        a, b = self.build(slots)
        mask, weight = stack.expanded(self.rank, self.places)
        # `where`, not a product: 0 * inf of one adapter would poison its neighbours.
        hidden = torch.where(mask, functional.linear(x, a), 0.0)
        return functional.linear(hidden if stack.plain else hidden * weight, b)

    @torch.inference_mode()
    def _write(self, place: int, weights: LoraWeights | None) -> None:
        if self._matrices is None:
            return
        a, b = self._matrices
        columns = slice(place * self.rank, (place + 1) * self.rank)
        a[columns].zero_()
        b[:, columns].zero_()
        if weights is not None:
            a[columns.start : columns.start + weights.rank] = weights.a
            b[:, columns.start : columns.start + weights.rank] = weights.b * weights.scale

    @torch.inference_mode()
    def _resize(self, count: int) -> None:
        """Move the slots that are here to `count` places, the first ones."""
        kept = [place for place, slot in enumerate(self.places) if slot is not None]
        if self._matrices is not None:
            a, b = self._matrices
            new = a.new_zeros(count * self.rank, a.shape[1]), b.new_zeros(b.shape[0], count * self.rank)
            for target, place in enumerate(kept):
                to, source = (slice(p * self.rank, (p + 1) * self.rank) for p in (target, place))
                new[0][to], new[1][:, to] = a[source], b[:, source]
            self._matrices = new
        slots = self.slots
        self.places = (*slots, *[None] * (count - len(slots)))


class StackedWeights:
    """The groups of one layer, by bucket.

    With `keep` (the CPU) each slot's own matrices are kept as they came, and those of a group are made when
    first wanted. Without (accelerators) the groups are the only copy, and a slot's own are parts of them.
    """

    def __init__(self, slots: int, *, keep: bool = True) -> None:
        self._slots: list[LoraWeights | None] = [None] * slots
        self._keep = keep
        self.by_rank: dict[int, RankGroup] = {}

    def own(self, slot: int) -> LoraWeights | None:
        """The slot's own matrices."""
        return self._slots[slot]

    def put(self, slot: int, weights: LoraWeights | None) -> None:
        """Take a slot's plain LoRA in, or forget it with None."""
        old, self._slots[slot] = self._slots[slot], None
        if old is not None:
            group = self.by_rank[bucket(old.rank)]
            group.remove(slot)
            if not group.slots:
                del self.by_rank[group.rank]
        if weights is not None:
            rank = bucket(weights.rank)
            group = self.by_rank.setdefault(rank, RankGroup(rank))
            if self._keep and self.width + group.growth > MAX_TILED_COLUMNS:
                # Too wide to be used, and they would take several times the base's memory.
                for other_group in self.by_rank.values():
                    other_group.drop()
            group.add(slot, weights, build=not self._keep)
            self._slots[slot] = weights
        if not self._keep:
            # A group that grew or shrank lies elsewhere now.
            for group in self.by_rank.values():
                for other in group.slots:
                    self._slots[other] = group.own(other, self._rank(other))

    def _rank(self, slot: int) -> int:
        weights = self._slots[slot]
        return 0 if weights is None else weights.rank

    @property
    def width(self) -> int:
        """Columns of all groups."""
        return sum(group.width for group in self.by_rank.values())

    def used(self, stack: Stack) -> Iterator[RankGroup]:
        """The groups that any row of the stack needs."""
        for group in self.by_rank.values():
            if stack.used is None or not stack.used.isdisjoint(group.places):
                yield group

    def delta(self, x: torch.Tensor, stack: Stack) -> torch.Tensor | None:
        """The sum of each row's terms, [rows, out] fp32, for rows `x` [rows, in] fp32; None without any."""
        total: torch.Tensor | None = None
        for group in self.used(stack):
            delta = group.delta(x, stack, self._slots)
            total = delta if total is None else total + delta
        return total

    def exact(self, known: MutableMapping[tuple[int, ...], bool]) -> bool:
        """Whether, for TILE rows, the groups give the very bits of each slot's own products.

        Not where a scale needs a multiplication of its own, nor where the library sums in another order: it
        chooses its order by shape, so that is tried once per shape and remembered in `known`.
        """
        present = [weights for weights in self._slots if weights is not None]
        if self.width > MAX_TILED_COLUMNS or any(weights.scale != 1.0 for weights in present):
            return False
        return all(self._is_exact(weights, known) for weights in present)

    def _is_exact(self, weights: LoraWeights, known: MutableMapping[tuple[int, ...], bool]) -> bool:
        places = len(self.by_rank[bucket(weights.rank)].places)
        key = (places, weights.a.shape[1], weights.b.shape[0], weights.rank)
        if key not in known:
            known[key] = _try_places(*key)
        return known[key]


def _try_places(places: int, size_in: int, size_out: int, rank: int) -> bool:
    """Whether a group of `places` adapters of `rank`, with random numbers, gives each one's own bits."""
    draw = torch.Generator().manual_seed(rank)
    x = torch.randn(TILE, size_in, generator=draw)
    own: list[LoraWeights | None] = []
    group = RankGroup(bucket(rank))
    for slot in range(places):
        a, b = torch.randn(rank, size_in, generator=draw), torch.randn(size_out, rank, generator=draw)
        own.append(LoraWeights(a, b, 1.0))
        group.add(slot, LoraWeights(a, b, 1.0))
    for slot, weights in enumerate(own):
        weight = torch.zeros(TILE, places)
        weight[:, slot] = 1.0
        expected = functional.linear(functional.linear(x, weights.a), weights.b)  # type: ignore[union-attr]
        if not torch.equal(group.delta(x, Stack(0, TILE, weight, plain=True), own), expected):
            return False
    return True
