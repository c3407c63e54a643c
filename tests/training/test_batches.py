"""Which rows make a step, and how they are packed."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.training.runs import preferences, samples

from onebase_training.batches import pack, step_rows


@given(count=st.integers(1, 60), batch=st.integers(1, 20), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_every_epoch_has_each_row_once(count: int, batch: int, seed: int, epoch: int) -> None:
    steps = math.ceil(count / batch)
    rows = [row for step in range(steps) for row in step_rows(count, batch, epoch * steps + step, seed)]
    assert sorted(rows) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(step_rows(50, 50, epoch, seed)) for epoch in range(3) for seed in range(3)}
    assert len(orders) == 9


@given(count=st.integers(1, 30), limit=st.integers(8, 200), packing=st.booleans(), seed=st.integers(0, 9))
def test_a_step_is_packed_whole_and_within_the_limit(
    count: int, limit: int, packing: bool, seed: int
) -> None:
    rows = samples(count, seed).rows
    batches = pack(rows, range(count), limit, packing=packing)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(count))
    for batch in batches:
        assert batch.tokens <= limit or len(batch.rows) == 1
        assert packing or len(batch.rows) == 1


@given(count=st.integers(1, 60), limit=st.integers(20, 200), seed=st.integers(0, 99))
def test_each_row_goes_to_the_first_micro_batch_that_has_room(count: int, limit: int, seed: int) -> None:
    rows = samples(count, seed).rows
    bins: list[list[int]] = []
    for number in sorted(range(count), key=lambda number: (-len(rows[number]), number)):
        free = (one for one in bins if sum(len(rows[held]) for held in one) + len(rows[number]) <= limit)
        if (place := next(free, None)) is None:
            bins.append(place := [])
        place.append(number)
    assert [list(batch.rows) for batch in pack(rows, range(count), limit, packing=True)] == bins


def test_very_many_rows_are_packed() -> None:
    # A look at every micro-batch for every row would be ten thousand million looks.
    (row,) = samples(1).rows
    assert len(pack([row] * 150_000, range(150_000), len(row), packing=True)) == 150_000


def test_a_pair_stays_together() -> None:
    rows = preferences(12).rows
    for batch in pack(rows, range(12), 100, packing=True):
        for number, row in enumerate(batch.rows):
            assert batch.samples[2 * number] is rows[row].chosen  # type: ignore[union-attr]
            assert batch.samples[2 * number + 1] is rows[row].rejected  # type: ignore[union-attr]


def test_places_targets_and_owners_are_those_of_each_row_alone() -> None:
    rows = samples(5).rows
    batch = pack(rows, range(5), 10_000, packing=True)[0]
    packed = batch.tensors(torch.device("cpu"))
    start, at = 0, 0
    for number, one in enumerate(batch.samples):
        places = np.flatnonzero(one.supervised)
        part = slice(at, at + len(places))
        assert (packed.keep[part].numpy() == start + places - 1).all()
        assert (packed.targets[part].numpy() == one.ids[places]).all()
        assert (packed.owner[part] == number).all()
        assert packed.positions[0, start : start + len(one)].tolist() == list(range(len(one)))
        start, at = start + len(one), at + len(places)
    assert at == len(packed.targets)
