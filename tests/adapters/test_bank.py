"""The stack of all slots is used on the CPU only where it gives each slot's own bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from onebase_adapters.bank import Bank
from onebase_adapters.rows import TILE, LoraWeights, RowMap, Stack, StepRows, Term, Tile
from onebase_adapters.slots import SlotLinear

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
    assert layer.step.exact_banks, "the stack was tried"


def test_a_scale_that_is_no_power_of_two_keeps_each_slots_own_products() -> None:
    layer = SlotLinear(nn.Linear(64, 64, bias=False), StepRows(), slots=2, tiled=True)
    layer.put(0, lora(8, 0, 64, 64, scale=1.5).folded())
    layer.put(1, lora(8, 1, 64, 64, scale=4.0).folded())
    assert layer._exact_bank() is None
    layer.put(0, lora(8, 0, 64, 64, scale=0.25).folded())
    assert layer.slots[0] is not None
    assert layer.slots[0].scale == 1.0


def test_folding_the_scale_changes_no_bit() -> None:
    weights = lora(8, 0, 64, 64, scale=2.0)
    x = torch.randn(TILE, 64)
    before = (x @ weights.a.T @ weights.b.T) * weights.scale
    folded = weights.folded()
    assert torch.equal(x @ folded.a.T @ folded.b.T, before)
    assert lora(8, 0, 64, 64, scale=1.5).folded().scale == 1.5
    huge = LoraWeights(weights.a, weights.b * 1e38, 2.0**4)
    assert huge.folded().scale == 16.0, "B must stay finite"


def test_a_bank_follows_its_slots() -> None:
    first, second = lora(8, 0, 64, 64), lora(24, 1, 64, 64)
    layer = SlotLinear(nn.Linear(64, 64, bias=False), StepRows(), slots=2, tiled=False)
    layer.put(0, first)
    layer.put(1, second)
    assert isinstance(layer.bank, Bank)
    assert layer.bank.rank == 24
    assert torch.equal(layer.bank.a[24:48], second.a)
    layer.put(1, None)
    assert not layer.bank.a[24:48].any()
