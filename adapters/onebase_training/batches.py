"""Choose the rows of a step and pack them into micro-batches. The seed determines both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from onebase_engine.base.chat import last_occurrence
from onebase_training.data.dataset import Row, Sample


@dataclass(frozen=True)
class MicroBatch:
    """Samples that are computed at once, one after the other in one sequence.

    A pair of a preference is always in one micro-batch, the chosen one first. rows: numbers of the rows in
    the dataset, one for each sample, or one for the two samples of a pair.
    """

    samples: tuple[Sample, ...]
    rows: tuple[int, ...]

    @property
    def lengths(self) -> list[int]:
        return [len(sample) for sample in self.samples]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def tensors(self, device: torch.device, invocation: Sequence[int] = ()) -> Packed:
        """Return the packed sequence on a device. `invocation`: tokens of an activated LoRA."""
        ids = np.concatenate([sample.ids for sample in self.samples]).astype(np.int64)
        positions = np.concatenate([np.arange(len(sample), dtype=np.int64) for sample in self.samples])
        targets, owner = [], []
        start = 0
        for number, sample in enumerate(self.samples):
            places = np.flatnonzero(sample.supervised)
            targets.append(places + start)
            owner.append(np.full(len(places), number, dtype=np.int64))
            start += len(sample)
        places = np.concatenate(targets)
        return Packed(
            ids=torch.from_numpy(ids)[None].to(device),
            positions=torch.from_numpy(positions)[None].to(device),
            keep=torch.from_numpy(places - 1).to(device),
            targets=torch.from_numpy(ids[places]).to(device),
            owner=torch.from_numpy(np.concatenate(owner)).to(device),
            lengths=self.lengths,
            activated=torch.from_numpy(self._activated(invocation)).to(device) if invocation else None,
        )

    def _activated(self, invocation: Sequence[int]) -> np.ndarray:
        """Return True for each token on which the adapter acts: from the last invocation in a prompt on."""
        found = []
        for sample in self.samples:
            first = last_occurrence(sample.ids[: sample.prompt].tolist(), invocation)
            found.append(np.arange(len(sample)) >= (len(sample) if first is None else first))
        return np.concatenate(found)


@dataclass(frozen=True)
class Packed:
    """Packed sequence. ids, positions: [1, T] int64. keep: [n] positions whose logits are computed, each of
    which predicts one of `targets` [n].

    owner: [n] number of the sample that a target belongs to. lengths: of the samples, T in all.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    keep: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    lengths: list[int]
    activated: torch.Tensor | None = None
    """Tokens on which an activated LoRA acts, [T] bool; None: the adapter acts on all."""


def step_rows(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Return the rows of step `step` (from 0): each epoch is another permutation, cut into batches.

    The last batch of an epoch may be smaller. The result depends on the arguments alone, so that a resumed
    run sees the rows that an unbroken one would have seen.
    """
    per_epoch = math.ceil(count / batch_size)
    epoch, number = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return [int(row) for row in order[number * batch_size : (number + 1) * batch_size]]


def pack(rows: Sequence[Row], numbers: Sequence[int], limit: int, *, packing: bool) -> list[MicroBatch]:
    """Pack rows into micro-batches of at most `limit` tokens: first fit, the longest rows first.

    A longer row has a micro-batch to itself; without `packing` every row has.
    """
    order = sorted(numbers, key=lambda number: (-len(rows[number]), number))
    if not packing:
        return [MicroBatch(rows[number].samples, (number,)) for number in order]
    bins = [[order[place] for place in one] for one in first_fit([len(rows[one]) for one in order], limit)]
    return [
        MicroBatch(
            samples=tuple(sample for number in one for sample in rows[number].samples), rows=tuple(one)
        )
        for one in bins
    ]


def first_fit(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Return the places of the lengths in bins of at most `limit`, each in the first that has room; a longer
    one has a bin to itself."""
    bins: list[list[int]] = []
    room = _Room(len(lengths), limit)
    for number, length in enumerate(lengths):
        place = room.first(length)
        if place is None or place >= len(bins):
            place = len(bins)
            bins.append([])
        bins[place].append(number)
        room.reserve_tokens(place, length)
    return bins


class _Room:
    """Tokens left in each of `count` micro-batches, empty at first.

    It is a segment tree: node n has the larger value of its children 2n and 2n + 1, so that both methods take
    O(log count) steps.
    """

    def __init__(self, count: int, limit: int) -> None:
        self._leaves = 1 << max(0, count - 1).bit_length()
        self._most = [limit] * (2 * self._leaves)

    def first(self, size: int) -> int | None:
        """Return the first micro-batch with room for `size` tokens, or None."""
        if self._most[1] < size:
            return None
        at = 1
        while at < self._leaves:
            at = 2 * at if self._most[2 * at] >= size else 2 * at + 1
        return at - self._leaves

    def reserve_tokens(self, place: int, size: int) -> None:
        """Put `size` tokens into a micro-batch."""
        at = place + self._leaves
        self._most[at] -= size
        while at > 1:
            at //= 2
            self._most[at] = max(self._most[2 * at], self._most[2 * at + 1])
