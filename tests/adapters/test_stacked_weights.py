"""The stack of all slots is used on the CPU only where it gives each slot's own bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from onebase_engine.lora.rows import TILE, RowMap, Stack, StepRows, Term, Tile
from onebase_engine.lora.slots import SlotLinear
from onebase_engine.lora.stacked_weights import MAX_TILED_COLUMNS, StackedWeights, bucket, stacked_bytes
from onebase_engine.lora.weights import LoraWeights

SLOTS = 8


def lora(rank: int, seed: int, size_in: int, size_out: int, scale: float = 1.0) -> LoraWeights:
    draw = torch.Generator().manual_seed(seed)
    return LoraWeights(
        torch.randn(rank, size_in, generator=draw), torch.randn(size_out, rank, generator=draw), scale
    )


def mixed_tile(slots: int) -> Tile:
    """TILE rows over the slots in turn, every fifth row without an adapter; with the stack that equals it."""
    weight = torch.zeros(TILE, slots)
    for row in range(TILE):
        if row % 5:
            weight[row, row % slots] = 1.0
    terms = tuple(Term(slot, mask=weight[:, slot, None] != 0) for slot in range(slots))
    return Tile(0, TILE, terms, Stack(0, TILE, weight, plain=True))


@pytest.mark.parametrize(
    ("size_in", "size_out"), [(576, 576), (576, 192), (1536, 576), (576, 1536), (64, 64)]
)
@pytest.mark.parametrize("rank", [4, 8, 16, 64])
def test_a_mixed_tile_has_the_bits_of_each_slots_own_products(rank: int, size_in: int, size_out: int) -> None:
    layer = SlotLinear(nn.Linear(size_in, size_out, bias=False), StepRows(), slots=SLOTS, tiled=True)
    for slot in range(SLOTS):
        layer.put(slot, lora(rank, slot, size_in, size_out))
    x = torch.randn(TILE, size_in, generator=torch.Generator().manual_seed(9))
    tile = mixed_tile(SLOTS)
    with torch.inference_mode():
        layer.step.tokens = RowMap((tile,))
        stacked = layer(x)
        layer.step.tokens = RowMap((Tile(0, TILE, tile.terms),))
        own = layer(x)
    assert torch.equal(stacked, own)
    assert layer.step.exact_stacks, "the stack was tried"


def test_a_scale_that_is_no_power_of_two_keeps_each_slots_own_products() -> None:
    layer = SlotLinear(nn.Linear(64, 64, bias=False), StepRows(), slots=2, tiled=True)
    layer.put(0, lora(8, 0, 64, 64, scale=1.5).folded())
    layer.put(1, lora(8, 1, 64, 64, scale=4.0).folded())
    assert not layer._may_stack()
    layer.put(0, lora(8, 0, 64, 64, scale=0.25).folded())
    own = layer.stacked.own(0)
    assert own is not None
    assert own.scale == 1.0


def test_folding_the_scale_changes_no_bit() -> None:
    weights = lora(8, 0, 64, 64, scale=2.0)
    x = torch.randn(TILE, 64)
    before = (x @ weights.a.T @ weights.b.T) * weights.scale
    folded = weights.folded()
    assert torch.equal(x @ folded.a.T @ folded.b.T, before)
    assert lora(8, 0, 64, 64, scale=1.5).folded().scale == 1.5
    huge = LoraWeights(weights.a, weights.b * 1e38, 2.0**4)
    assert huge.folded().scale == 16.0, "B must stay finite"


def test_adapters_lie_together_by_powers_of_two_of_their_rank() -> None:
    assert [bucket(rank) for rank in (1, 8, 9, 16, 17, 64, 65, 256)] == [8, 8, 16, 16, 32, 64, 128, 256]


def stack(weights: dict[int, float], slots: int = SLOTS, used: frozenset[int] | None = None) -> Stack:
    """A stack whose row i belongs to the i-th of `weights`."""
    weight = torch.zeros(len(weights), slots)
    for row, (slot, value) in enumerate(weights.items()):
        weight[row, slot] = value
    return Stack(0, len(weights), weight, used=used)


def test_a_group_holds_only_the_slots_of_its_ranks_and_grows_with_them() -> None:
    stacked, widths = StackedWeights(SLOTS), []
    for slot, rank in enumerate((8, 4, 256, 7, 8, 2)):
        stacked.put(slot, lora(rank, slot, 64, 32))
        widths.append(stacked.width)
    assert widths == [8, 16, 16 + 256, 32 + 256, 32 + 256, 64 + 256]
    stacked.put(2, None)
    assert sorted(stacked.by_rank) == [8], "a rank that nobody has any more costs nothing"
    stacked.put(0, None)
    assert stacked.width == 64, "a slot that comes back does not move the others"
    stacked.put(1, None)
    assert stacked.width == 32, "places halve once fewer than half are taken"
    stacked.put(3, None)
    stacked.put(4, lora(16, 4, 64, 32))
    assert stacked.width == 16 + 16


@pytest.mark.parametrize(
    ("keep", "built"), [(True, True), (True, False), (False, True)], ids=["as it grows", "last", "only copy"]
)
def test_slots_keep_their_products_while_others_come_and_go(keep: bool, built: bool) -> None:
    draw = torch.Generator().manual_seed(4)
    stacked, present = StackedWeights(SLOTS, keep=keep), {0: lora(5, 100, 64, 32)}
    stacked.put(0, present[0])
    x = torch.randn(SLOTS, 64, generator=draw)
    for step in range(60):
        slot = int(torch.randint(0, SLOTS, (1,), generator=draw))
        if present.pop(slot, None) is not None:
            stacked.put(slot, None)
        elif step % 3:
            present[slot] = lora((1, 8, 20, 64)[step % 4], step, 64, 32)
            stacked.put(slot, present[slot])
        if not present or (not built and step < 59):
            continue
        of_rows = dict.fromkeys(sorted(present), 0.5)
        got = stacked.delta(x[: len(of_rows)], stack(of_rows))
        expected = [0.5 * (x[i] @ present[s].a.T @ present[s].b.T) for i, s in enumerate(of_rows)]
        assert got is not None
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-4)
        for slot, weights in present.items():
            own = stacked.own(slot)
            assert own is not None
            assert torch.equal(own.a, weights.a)
            assert torch.equal(own.b, weights.b)


def test_matrices_too_wide_to_be_used_take_no_memory() -> None:
    layer = SlotLinear(nn.Linear(64, 32, bias=False), StepRows(), slots=SLOTS, tiled=True)
    tile = mixed_tile(SLOTS)
    layer.step.tokens = RowMap((Tile(0, TILE, tile.terms[:4], tile.stack),))
    for slot in range(SLOTS):
        layer.put(slot, lora(256, slot, 64, 32))
        layer(torch.ones(TILE, 64))
        (group,) = layer.stacked.by_rank.values()
        assert group.built == (group.width <= MAX_TILED_COLUMNS)


@pytest.mark.parametrize("keep", [True, False])
def test_a_slot_that_cannot_be_filled_stays_empty_and_harms_no_other(keep: bool) -> None:
    stacked = StackedWeights(SLOTS, keep=keep)
    stacked.put(0, lora(8, 0, 64, 32))
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(4))
    before = stacked.delta(x, stack({0: 1.0}))
    with pytest.raises(RuntimeError):
        stacked.put(1, lora(8, 1, 65, 32))
    stacked.put(1, None)
    assert stacked.own(1) is None
    after = stacked.delta(x, stack({0: 1.0}))
    assert before is not None
    assert after is not None
    torch.testing.assert_close(after, before)


def test_stacks_take_at_most_twice_the_memory_that_their_versions_are_counted_with() -> None:
    draw = torch.Generator().manual_seed(7)
    stacked, present = StackedWeights(SLOTS, keep=False), dict[int, int]()
    for step in range(200):
        slot = int(torch.randint(0, SLOTS, (1,), generator=draw))
        if present.pop(slot, None) is not None:
            stacked.put(slot, None)
        elif step % 50 < 25:
            weights = lora((1, 5, 33, 9)[step % 4], step, 64, 32)
            present[slot] = stacked_bytes({"layer": weights})
            stacked.put(slot, weights)
        assert sum(present.values()) <= stacked.width * (64 + 32) * 4 <= 2 * sum(present.values())


def test_on_an_accelerator_the_groups_are_the_only_copy() -> None:
    stacked = StackedWeights(SLOTS, keep=False)
    for slot, rank in enumerate((8, 8, 8, 100)):
        stacked.put(slot, lora(rank, slot, 64, 32, scale=3.0))
    owned = [own for slot in range(4) if (own := stacked.own(slot)) is not None]
    assert [own.rank for own in owned] == [8, 8, 8, 100]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for o in owned for t in (o.a, o.b)
    }
    assert sum(storages.values()) == 4 * (64 + 32) * (4 * 8 + 128)
    torch.testing.assert_close(owned[3].b, lora(100, 3, 64, 32).b * 3.0)
    assert owned[3].scale == 1.0


def test_rows_without_the_large_adapter_do_not_touch_its_matrices() -> None:
    stacked = StackedWeights(SLOTS)
    stacked.put(0, lora(8, 0, 64, 32))
    stacked.put(1, lora(256, 1, 64, 32))
    x = torch.randn(1, 64)
    only_small = stack({0: 1.0}, used=frozenset({0}))
    assert [group.rank for group in stacked.used(only_small)] == [8]
    got = stacked.delta(x, only_small)
    assert got is not None
    assert torch.equal(got, stacked.by_rank[8].delta(x, only_small, stacked._slots))
    assert not stacked.by_rank[256].built
    assert stacked.delta(x, stack({5: 1.0}, used=frozenset({5}))) is None


@pytest.mark.parametrize("ranks", [(8, 16, 64, 256), (4, 12, 20, 100), (8, 8, 8, 256)], ids=str)
def test_a_tile_over_several_groups_has_the_bits_of_each_slots_own_products(ranks: tuple[int, ...]) -> None:
    layer = SlotLinear(nn.Linear(576, 192, bias=False), StepRows(), slots=SLOTS, tiled=True)
    for slot, rank in enumerate(ranks):
        layer.put(slot, lora(rank, slot, 576, 192))
    x = torch.randn(TILE, 576, generator=torch.Generator().manual_seed(9))
    tile = mixed_tile(SLOTS)
    with torch.inference_mode():
        layer.step.tokens = RowMap((tile,))
        stacked = layer(x)
        layer.step.tokens = RowMap((Tile(0, TILE, tile.terms),))
        assert torch.equal(stacked, layer(x))
    assert layer.step.exact_stacks, "the stack was tried"
