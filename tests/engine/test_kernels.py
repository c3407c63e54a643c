"""The kernels in C against PyTorch, for each set of instructions that this processor has: the same function,
and the same bits of a row whatever else is computed with it."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.engine import recurrent_layers
from tests.engine.harness import Lab, Request, requests, run, submission
from tests.engine.layers import (
    IN,
    OUT,
    Cache,
    borrows,
    eager,
    kept,
    lora,
    nf4,
    plain,
    projected,
    random,
    same_in_int8,
    written_alike,
)
from tests.rows import row_map
from tests.tiny import ARCHITECTURES, save_base, save_model
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.engine import fusion
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.model import ServedModel
from onebase_engine.kernels import cpu
from onebase_engine.kernels.cpu import CpuKernels, NativeLinear
from onebase_engine.kernels.interface import LEAST_SCALE, TILE, Contexts, Draws, RowMap
from onebase_engine.kernels.recorded_calls import Arena, Fixed, Program, Recording, UnrecordableError
from onebase_engine.kernels.reference import ReferenceKernels, ReferenceLinear, added, quantized
from onebase_engine.kernels.weights import LoraWeights

NAMES = ("amx", "avx512_bf16", "avx512", "avx2", "portable")
NOBODY = RowMap()
chosen: list[str] = []
"""By the fixture that is alive."""
EPS = torch.finfo(torch.bfloat16).eps

pytestmark = pytest.mark.skipif(cpu.load_library() is None, reason="the library in C was not built")


@pytest.fixture(scope="module", params=NAMES)
def kernels(request: pytest.FixtureRequest) -> Iterator[CpuKernels]:
    found = cpu.load_library()
    assert found is not None
    if found.library.onebase_choose(request.param.encode()) is None:
        pytest.skip(f"this processor has no {request.param}")
    one = CpuKernels(found.library, request.param)
    if request.param == "portable":
        # It may round a product before it is added, and has no sums of PyTorch's.
        one.order = lambda inner, outer: (cpu._one_block(inner, outer), False)  # type: ignore[method-assign]
    chosen.append(request.param)
    yield one
    chosen.clear()
    found.library.onebase_choose(None)


@pytest.fixture
def best() -> Iterator[CpuKernels]:
    """Those that are chosen for this processor."""
    found = cpu.load_library()
    assert found is not None
    found.library.onebase_choose(os.environ.get(cpu.CHOICE, "").encode() or None)
    yield found
    found.library.onebase_choose(chosen[0].encode() if chosen else None)


def native(kernels: CpuKernels, layer: Any, slots: int = 4) -> NativeLinear:
    """The layer without a trial: on most instructions bits are not PyTorch's, but the function is."""
    found = NativeLinear(kernels, layer, slots, ReferenceLinear(layer, tiled=True), unpacked=False)
    found.structure.block = min(512, layer.in_features) if kernels.name != "amx" else layer.in_features
    return found


def close(got: torch.Tensor, exact: torch.Tensor, terms: int) -> None:
    """Within a rounding to bf16, and what fp32 sums of so many terms may lose."""
    error = (got.double() - exact).abs()
    assert (error <= exact.abs() * EPS + terms**0.5 * 1e-5).all(), float(error.max())


SIZES = st.sampled_from([32, 64, 128, 192, 576, 1536])
ROWS = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 33, 64, 65, 130])


@settings(max_examples=25)
@given(
    size_in=SIZES.filter(lambda n: n % 64 == 0), size_out=st.integers(1, 200) | SIZES, rows=ROWS,
    blocksize=st.sampled_from([64, 128]), seed=st.integers(0, 9), bias=st.booleans(),
)  # fmt: skip
def test_a_4_bit_product_is_that_with_the_weights_of_bitsandbytes(
    kernels: CpuKernels, size_in: int, size_out: int, rows: int, blocksize: int, seed: int, bias: bool
) -> None:
    blocksize = blocksize if size_in % blocksize == 0 else 64
    layer = nf4(size_in, size_out + size_out % 2, blocksize=blocksize, bias=bias, seed=seed)
    x = random(rows, size_in, seed=seed).to(torch.bfloat16)
    exact = x.double() @ plain(layer).double().T + (layer.bias.double() if bias else 0)
    close(native(kernels, layer)(x, NOBODY), exact, size_in)


@settings(max_examples=15)
@given(size_in=SIZES, size_out=st.integers(1, 100) | SIZES, rows=ROWS, seed=st.integers(0, 9))
def test_a_plain_product_is_that_of_its_weights(
    kernels: CpuKernels, size_in: int, size_out: int, rows: int, seed: int
) -> None:
    layer = nn.Linear(size_in, size_out, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    x = random(rows, size_in, seed=seed).to(torch.bfloat16)
    close(native(kernels, layer)(x, NOBODY), x.double() @ layer.weight.double().T, size_in)


@pytest.mark.parametrize("blocksize", [64, 128, 256])
def test_each_weight_has_the_bits_that_bitsandbytes_gives(kernels: CpuKernels, blocksize: int) -> None:
    layer = nf4(256, 80, blocksize=blocksize)
    assert torch.equal(native(kernels, layer)(torch.eye(256).to(torch.bfloat16), NOBODY).T, plain(layer))


# ---- adapters ------------------------------------------------------------------------------

SLOTS = 4
MIXES = st.lists(
    st.dictionaries(st.integers(0, SLOTS - 1), st.sampled_from([1.0, 0.5, -2.0, 0.3]), max_size=3),
    min_size=1,
    max_size=70,
)


@pytest.fixture(scope="module")
def adapted(kernels: CpuKernels) -> tuple[NativeLinear, Any, list[LoraWeights]]:
    layer = nf4(IN, OUT)
    activated = replace(lora(40, 3), invocation=(5,))  # its part is not rounded before it is added
    weights = [lora(8, 1), lora(16, 2, 1.5), activated, lora(130, 4, 0.25)]
    found = native(kernels, layer, SLOTS)
    for slot, one in enumerate(weights):
        found.put(slot, one)
    assert (
        kernels.name == "portable" or all(found.exact(slot) for slot in range(SLOTS)) or not found.exact_base
    )
    return found, layer, weights


@settings(max_examples=40)
@given(mixes=MIXES, seed=st.integers(0, 9))
def test_each_row_gets_what_its_own_adapters_add_in_the_order_of_peft(
    adapted: tuple[NativeLinear, Any, list[LoraWeights]], mixes: list[dict[int, float]], seed: int
) -> None:
    found, _, weights = adapted
    x = random(len(mixes), IN, seed=seed).to(torch.bfloat16)
    bare, got = found(x, NOBODY), found(x, row_map(mixes))
    for row, mix in enumerate(mixes):
        # The products of 32 rows are those whose order is looked for.
        wide = x[row].float().expand(TILE, IN).contiguous()
        total: torch.Tensor | None = None
        for slot, weight in sorted(mix.items()):
            one = weights[slot]
            delta = functional.linear(functional.linear(wide, one.a), one.b)[0] * one.scale
            delta = delta if weight == 1.0 else delta * weight
            total = delta if total is None else total + delta
        activated = any(weights[slot].adds_wide for slot in mix)
        expected = bare[row] if total is None else added(bare[row], total, quantized=not activated)
        if found.kernels.name == "portable":
            # Sums that fall to the other side of a rounding, once for the delta and once for the whole.
            largest = torch.stack([bare[row].abs(), got[row].abs(), (got[row] - bare[row]).abs()]).amax(0)
            assert ((got[row] - expected).double().abs() <= largest.double() * 2 * EPS + 1e-4).all()
        else:
            assert torch.equal(got[row], expected), (row, mix)


@settings(max_examples=20)
@given(mixes=MIXES, data=st.data())
def test_a_rows_bits_do_not_depend_on_its_neighbours_or_on_threads(
    adapted: tuple[NativeLinear, Any, list[LoraWeights]], mixes: list[dict[int, float]], data: st.DataObject
) -> None:
    found, _, _ = adapted
    x = random(len(mixes), IN, seed=len(mixes)).to(torch.bfloat16)
    together = found(x, row_map(mixes))
    row = data.draw(st.integers(0, len(mixes) - 1))
    assert torch.equal(found(x[row : row + 1], row_map(mixes[row : row + 1]))[0], together[row])
    library = found.kernels.library
    try:
        for threads in (1, 3, 7):
            library.onebase_use_threads(threads)
            assert torch.equal(found(x, row_map(mixes)), together)
    finally:
        library.onebase_use_threads(found.kernels.threads)


def test_an_adapter_that_overflows_reaches_no_other_row(kernels: CpuKernels) -> None:
    found = native(kernels, nf4(IN, OUT), SLOTS)
    found.put(0, lora(8, 1))
    found.put(1, LoraWeights(torch.full((8, IN), float("inf")), torch.ones(OUT, 8), 1.0))
    x = random(6, IN).to(torch.bfloat16)
    mixes: list[dict[int, float]] = [{0: 1.0}, {1: 1.0}, {}, {0: 1.0}, {1: 1.0}, {}]
    got = found(x, row_map(mixes))
    assert torch.equal(got[[0, 3]], found(x[[0, 3]], row_map([mixes[0]] * 2)))
    assert torch.equal(got[[2, 5]], found(x[[2, 5]], NOBODY))
    assert not torch.isfinite(got[[1, 4]]).any()


def test_a_slot_that_is_emptied_acts_no_more(kernels: CpuKernels) -> None:
    found = native(kernels, nf4(IN, OUT), SLOTS)
    found.put(2, lora(8, 1))
    x = random(3, IN).to(torch.bfloat16)
    mixes: list[dict[int, float]] = [{2: 1.0}] * 3
    assert not torch.equal(found(x, row_map(mixes)), found(x, NOBODY))
    found.put(2, None)
    assert torch.equal(found(x, row_map(mixes)), found(x, NOBODY))


@pytest.mark.parametrize("rank", [2, 4, 7, 8, 16, 64, 300])
@pytest.mark.parametrize("inner", [64, 576, 1536, 4096])
def test_the_order_in_which_pytorch_sums_is_found(best: CpuKernels, inner: int, rank: int) -> None:
    if best.name == "portable":
        pytest.skip("it has no sums of PyTorch's")
    order, found = best.order(inner, rank)
    if not found and rank in (2, 7):
        pytest.skip("MKL sums so few outputs by where they lie in memory")
    assert found
    x, weight = random(TILE, inner, seed=5), random(rank, inner, seed=6)
    same = torch.equal(best._sums(order, x, weight), functional.linear(x, weight))
    if not same and rank < 8:
        pytest.skip("MKL sums so few outputs now in one order, now in another (seen once)")
    assert same


def test_four_strands_are_summed_each_by_itself_and_then_in_pairs(kernels: CpuKernels) -> None:
    x, weight = random(3, 22, seed=5), random(5, 22, seed=6)
    products = x[:, None] * weight
    sums = [products[..., strand] for strand in range(4)]
    for k in range(4, 22):
        sums[k % 4] = sums[k % 4] + products[..., k]
    got = kernels._sums(cpu._strands(22, 5), x, weight)
    if kernels.name == "portable":
        close(got, x.double() @ weight.double().T, 22)
    else:
        assert torch.equal(got, (sums[0] + sums[2]) + (sums[1] + sums[3]))


# ---- attention -----------------------------------------------------------------------------

SEEN = st.sampled_from([{}, {"window": 5}, {"window": 64}, {"chunk": 7}, {"chunk": 64}])
"""What a row sees of its context."""
DIMS = st.sampled_from([(16, 16), (24, 24), (64, 64), (80, 80), (128, 128), (192, 128), (96, 64), (40, 24)])
"""Sizes of a key and a value."""


@settings(max_examples=25)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 15, 16, 17, 63, 200, 301]), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (3, 3), (2, 4), (1, 8)]), dims=DIMS,
    block=st.sampled_from([1, 2, 16, 32]), seen=SEEN, softcap=st.sampled_from([None, 30.0]),
    sinks=st.booleans(), piece=st.sampled_from([1, 7, 40, 400]), eight=st.booleans(),
)  # fmt: skip
@example(
    lengths=[301, 16], heads=(2, 4), dims=(64, 64), block=16,
    seen={"window": 64}, softcap=None, sinks=True, piece=7, eight=False,
)  # fmt: skip
@example(
    lengths=[301, 16], heads=(2, 4), dims=(192, 128), block=16,
    seen={"chunk": 40}, softcap=None, sinks=False, piece=7, eight=False,
)  # fmt: skip
@example(
    lengths=[17, 200], heads=(3, 1), dims=(96, 64), block=16,
    seen={}, softcap=None, sinks=False, piece=40, eight=True,
)  # fmt: skip
def test_attention_is_that_of_each_context_alone_in_any_chunks(
    kernels: CpuKernels, lengths: list[int], heads: tuple[int, int], dims: tuple[int, int], block: int,
    seen: dict[str, int], softcap: float | None, sinks: bool, piece: int, eight: bool,
) -> None:  # fmt: skip
    def empty(among: int) -> Cache:
        options = {"eight": eight, "value_dim": dims[1], "softcap": softcap, "sinks": sinks}
        return Cache(kernels, *heads, dims[0], block, among=among, **options, **seen)

    # Together also in blocks that other layers may have, whose heads lie between.
    cache, alone = empty(1 + len(lengths) % 3), empty(1)
    inputs = [projected(cache, length, i) for i, length in enumerate(lengths)]
    ends = [*range(piece, max(lengths), piece), max(lengths)]
    got = cache.run_in_pieces(inputs, ends)
    for i, length in enumerate(lengths):
        mixed = got[i]
        q, k, v = inputs[i]
        k, v = (kept(k), kept(v)) if eight else (k, v)
        exact = eager(q, k, v, cache.settings)
        error = (mixed.double() - exact.transpose(0, 1)).abs().max()
        assert error < 0.05, float(error)
        alone.taken = 0
        whole = alone.run([(alone.context(length), 0, length)], *inputs[i])
        assert torch.equal(mixed, whole), "chunks and neighbours change bits"


@settings(max_examples=6)
@given(
    lengths=st.lists(st.sampled_from([1, 17, 130, 500]), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (2, 3), (1, 9)]), dim=st.sampled_from([24, 32, 64, 80, 128, 256]),
    seen=SEEN, softcap=st.sampled_from([None, 20.0]), sinks=st.booleans(),
    piece=st.sampled_from([1, 90, 500]),
)  # fmt: skip
@example(lengths=[1100, 5], heads=(1, 3), dim=64, seen={}, softcap=None, sinks=False, piece=1050)
def test_attention_over_int8_is_that_of_the_reference(
    kernels: CpuKernels, lengths: list[int], heads: tuple[int, int], dim: int, seen: dict[str, int],
    softcap: float | None, sinks: bool, piece: int,
) -> None:  # fmt: skip
    # By ones only towards the end: a step of one token as many a prompt.
    first = max(max(lengths) - 4, 1) if piece == 1 else piece
    ends = [*range(first, max(lengths), piece), max(lengths)]
    same_in_int8(kernels, heads, dim, lengths, ends, **seen, softcap=softcap, sinks=sinks)


def test_a_layer_that_borrows_keys_and_values_attends_to_the_lenders_and_writes_nothing(
    kernels: CpuKernels,
) -> None:
    borrows(kernels)
    borrows(ReferenceKernels())


@pytest.mark.parametrize("dim", [20, 64])
def test_keys_and_values_become_the_same_int8s_whatever_computes(kernels: CpuKernels, dim: int) -> None:
    for seed in range(3):
        written_alike(kernels, dim, seed)
        written_alike(ReferenceKernels(), dim, seed)


@settings(max_examples=30)
@given(st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=40))
def test_an_int8_is_off_by_half_a_scale_at_most_and_the_scale_is_the_least_that_holds_the_largest(
    numbers: list[float],
) -> None:
    x = torch.tensor(numbers).to(torch.bfloat16).double()
    most = float(x.abs().max())
    found, scale = (one.double() for one in quantized(x.float()))
    assert scale <= max(most / 127 * (1 + 2.0**-8), LEAST_SCALE)
    assert ((found * scale - x).abs() <= scale / 2 * (1 + 1e-6)).all()
    assert torch.equal(found.sign() * (found != 0), x.sign() * (found != 0))
    assert found.abs().max() >= 126 or scale == LEAST_SCALE


@pytest.mark.parametrize("block", [1, 2, 4])
def test_blocks_whose_ends_only_look_like_a_stretch_of_memory_are_read_one_by_one(
    kernels: CpuKernels, block: int
) -> None:
    whole, scattered = (Cache(kernels, 2, 2, 64, block) for _ in range(2))
    scattered.order = torch.arange(20, 20 + 16 // block)
    scattered.order[1:-1] += 100
    q, k, v = projected(whole, 16, 1)
    expected = whole.run([(whole.context(16), 0, 16)], q, k, v)
    assert torch.equal(scattered.run([(scattered.context(16), 0, 16)], q, k, v), expected)


@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("dim", [24, 64])
def test_a_value_that_is_not_finite_reaches_no_query_before_it(
    kernels: CpuKernels, dim: int, eight: bool
) -> None:
    clean, odd = (Cache(kernels, 1, 2, dim, 16, eight=eight) for _ in range(2))
    q, k, v = projected(clean, 21, 1)
    expected = clean.run([(clean.context(21), 0, 21)], q, k, v)
    v = v.clone()
    v[:, 13] = float("inf")
    got = odd.run([(odd.context(21), 0, 21)], q, k, v)
    assert torch.equal(got[:13], expected[:13])
    assert not torch.isfinite(got[13:]).any()


@pytest.mark.parametrize("eight", [False, True])
def test_padding_rows_give_zeros_and_write_to_the_dump_alone(kernels: CpuKernels, eight: bool) -> None:
    cache = Cache(kernels, 2, 2, 64, 16, eight=eight)
    q, k, v = projected(cache, 3, 1)
    rows = torch.tensor([[0, 0, 32], [-1, 0, 16], [-1, 0, 16]], dtype=torch.int32).T.contiguous().numpy()
    table = np.array([[[2]]], dtype=np.int32)
    out = cache.attention(q, k, v, Contexts(rows[0], rows[1], rows[2:], table))
    assert not out[1:].any()
    own = kept(v).to(torch.bfloat16) if eight else v
    assert torch.equal(out[0], own[:, 0].repeat_interleave(2, 0))
    written = cache.tensors[0].ne(0).sum((0, 2)).nonzero().flatten().tolist()
    assert written == [16, 32]


# ---- norms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 48, 576, 1024, 2048, 4112])
def test_a_norm_has_the_bits_of_the_base_s(best: CpuKernels, size: int) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    base = LlamaRMSNorm(size, 1e-5).to(torch.bfloat16)
    base.weight.data = random(size, seed=3).to(torch.bfloat16)
    norm = best.norm(base.requires_grad_(False))
    assert norm is not None
    for rows in (1, 5, 100):
        x = (random(rows, size, seed=rows) * 10).to(torch.bfloat16)
        assert torch.equal(norm(x), base(x))


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_a_norm_with_a_weight_around_one_has_the_bits_of_the_base_s(best: CpuKernels, size: int) -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    base = Gemma2RMSNorm(size).to(torch.bfloat16).requires_grad_(False)
    base.weight.copy_(random(size, seed=3))
    norm = best.norm(base)
    assert norm is not base
    for rows in (1, 5, 100):
        x = (random(rows, size, seed=rows) * 10).to(torch.bfloat16)
        assert torch.equal(norm(x), base(x))


def test_rows_of_another_width_than_an_unused_weight_get_the_bits_of_the_base_s(best: CpuKernels) -> None:
    from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaWeightlessRMSNorm

    base = FalconMambaWeightlessRMSNorm(128, 1e-6).to(torch.bfloat16)
    norm = best.norm(base)
    for rows, size in ((3, 64), (5, 128), (2, 24)):
        x = torch.cat([random(rows, size), torch.zeros(1, size), torch.full((1, size), 1e-30)])
        assert torch.equal(norm(x.to(torch.bfloat16)), base(x.to(torch.bfloat16)))


def test_norms_that_compute_something_else_are_left_to_pytorch(best: CpuKernels) -> None:
    norm = nn.LayerNorm(64, dtype=torch.bfloat16)
    assert best.norm(norm) is norm


# ---- recurrent layers ----------------------------------------------------------------------


@settings(max_examples=40)
@given(layer=recurrent_layers.layers(), step=recurrent_layers.steps())
def test_a_recurrent_layer_is_that_of_the_reference_and_writes_no_other_state(
    kernels: CpuKernels, layer: recurrent_layers.Layer, step: recurrent_layers.Step
) -> None:
    recurrent_layers.agrees(kernels, layer, step)


@settings(max_examples=40)
@given(layer=recurrent_layers.layers(), cut=recurrent_layers.cuts(), data=st.data())
def test_a_recurrent_layer_gives_a_row_the_same_bits_wherever_its_text_is_cut_and_beside_any_other(
    kernels: CpuKernels,
    layer: recurrent_layers.Layer,
    cut: tuple[list[list[int]], list[int]],
    data: st.DataObject,
) -> None:
    texts, ends = cut
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(data.draw(st.sampled_from([1, 2, 3])))
        kernels.use_threads()
        pieces = recurrent_layers.in_pieces(kernels, layer, texts, ends)
        torch.set_num_threads(1)
        kernels.use_threads()
        for text, (got, state) in zip(texts, pieces, strict=True):
            [(expected, behind)] = recurrent_layers.in_pieces(kernels, layer, [text], [len(text)])
            assert torch.equal(got, expected)
            assert torch.equal(state, behind)
    finally:
        torch.set_num_threads(before)
        kernels.use_threads()


@settings(max_examples=40)
@given(
    layer=recurrent_layers.layers(),
    step=recurrent_layers.steps(),
    wrong=st.lists(st.integers(0, 8), min_size=4, max_size=4),
)
def test_wrong_rows_of_drafts_are_taken_out_of_states_to_the_bit(
    kernels: CpuKernels, layer: recurrent_layers.Layer, step: recurrent_layers.Step, wrong: list[int]
) -> None:
    assert recurrent_layers.is_rewound(kernels, layer, step, wrong)
    assert recurrent_layers.is_rewound(ReferenceKernels(), layer, step, wrong)


@pytest.mark.parametrize("by_key", [False, True])
def test_decays_are_exponentials_of_any_size(kernels: CpuKernels, by_key: bool) -> None:
    decay = torch.tensor([-torch.inf, -200.0, -20.0, -1e-6, 0.0, 0.5, 20.0])
    shape = (len(decay), 1, 4) if by_key else (len(decay), 1)
    zeros, ones = torch.zeros(len(decay), 1, 4), torch.ones(len(decay), 1, 4)
    states = torch.ones(2 * len(decay) + 1, 1, 4, 3)
    runs = recurrent_layers.runs_of(
        [1] * len(decay), range(1, len(decay) + 1), range(len(decay) + 1, len(states))
    )
    own = decay.view(-1, 1, *([1] if by_key else [])).expand(shape)
    y = kernels.delta_rule(ones, zeros, zeros[..., :3], own, ones[..., 0], states, runs)
    torch.testing.assert_close(y[:, 0, 0], 4 * decay.exp(), rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(states[len(decay) + 1 :, 0, 0, 0], decay.exp(), rtol=1e-6, atol=1e-30)


def test_a_state_that_is_not_finite_reaches_no_other_run(kernels: CpuKernels) -> None:
    layer = recurrent_layers.DeltaRule(
        8, (2, 2), (24, 40), by_key=False, normalized=True, dtype=torch.bfloat16
    )
    clean, odd = recurrent_layers.states_of(layer, 5), recurrent_layers.states_of(layer, 5)
    odd[1] = torch.nan
    runs = recurrent_layers.runs_of([4, 4], [1, 2], [3, 4])
    expected, got = (layer.compute(kernels, layer.rows, states, runs) for states in (clean, odd))
    assert got[:4].isnan().all()
    assert torch.equal(got[4:], expected[4:])
    assert torch.equal(odd[4], clean[4])


def test_recurrent_layers_of_other_dtypes_are_left_to_pytorch(kernels: CpuKernels) -> None:
    for layer in (
        recurrent_layers.Convolution(6, 24, 4, bias=True, dtype=torch.float16, weight=torch.float16),
        recurrent_layers.DeltaRule(6, (2, 2), (8, 8), by_key=False, normalized=True, dtype=torch.float16),
        recurrent_layers.StateSpace(6, (1, 2), 8, 8, by_size=False, skip=True, dtype=torch.float16),
    ):
        runs = recurrent_layers.runs_of([6], [0], [1])
        both = [recurrent_layers.states_of(layer, 2) for _ in range(2)]
        got, expected = (
            layer.compute(one, layer.rows, states, runs)
            for one, states in zip((kernels, ReferenceKernels()), both, strict=True)
        )
        assert torch.equal(got, expected)
        assert torch.equal(both[0], both[1])


# ---- all of the interface ------------------------------------------------------------------


@settings(max_examples=12)
@given(mixes=MIXES, seed=st.integers(0, 9), lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4))
def test_every_method_does_what_the_reference_does(
    kernels: CpuKernels, mixes: list[dict[int, float]], seed: int, lengths: list[int]
) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    layer, x = nf4(IN, OUT, bias=True), random(len(mixes), IN, seed=seed).to(torch.bfloat16)
    both = [one.linear(layer, SLOTS) for one in (kernels, ReferenceKernels())]
    for linear in both:
        for slot in range(SLOTS):
            linear.put(slot, lora(4 + 5 * slot, slot))
    got, expected = (linear(x, row_map(mixes)) for linear in both)
    torch.testing.assert_close(got, expected, rtol=2 * EPS, atol=0.02)

    norm = LlamaRMSNorm(IN, 1e-5).to(torch.bfloat16).requires_grad_(False)
    got, expected = (one.norm(norm)(x) for one in (kernels, ReferenceKernels()))
    torch.testing.assert_close(got, expected, rtol=2 * EPS, atol=1e-3)

    options = {"softcap": 20.0, "window": 50, "sinks": True}
    caches = [Cache(one, 2, 3, 64, 16, **options) for one in (kernels, ReferenceKernels())]
    q, k, v = projected(caches[0], sum(lengths), seed)
    outs = [cache.run([(cache.context(n), 0, n) for n in lengths], q, k, v) for cache in caches]
    torch.testing.assert_close(outs[0], outs[1], rtol=4 * EPS, atol=0.02)
    assert torch.equal(caches[0].tensors[0], caches[1].tensors[0])

    zeros = np.zeros(3)
    greedy = Draws(zeros, zeros.astype(np.int64), zeros + 1, zeros, zeros)
    rows = [*random(2, 500, seed=seed), torch.full((500,), float("nan"))]
    drawn = [one.draw(rows, greedy, [None] * 3)() for one in (kernels, ReferenceKernels())]
    assert drawn[0] == drawn[1] == [int(rows[0].argmax()), int(rows[1].argmax()), None]


# ---- the library ---------------------------------------------------------------------------


def test_a_forked_child_computes_with_threads_of_its_own(kernels: CpuKernels) -> None:
    found = native(kernels, nf4(192, 1024))
    x = random(40, 192).to(torch.bfloat16)
    expected = found(x, NOBODY).view(torch.int16).numpy()
    child = os.fork()
    if not child:
        # By numpy: PyTorch's own threads are not there.
        os._exit(0 if (found(x, NOBODY).view(torch.int16).numpy() == expected).all() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_python_and_c_lay_structures_out_alike() -> None:
    assert ctypes.sizeof(cpu._Order) == 8 + 2 * 64 * 4
    assert ctypes.sizeof(cpu._Lora) == 48
    assert ctypes.sizeof(cpu._Linear) == 16 * 8
    assert ctypes.sizeof(cpu._Attention) == 4 * 8 + 6 * 8 + 2 * 4 + 5 * 8
    assert ctypes.sizeof(cpu.KernelCall) == 5 * 8 + 2 * 4 + 10 * 8 + 12 * 8 + 6 * 8
    assert ctypes.sizeof(cpu._Draw) == 5 * 8 + 4 * 4
    assert ctypes.sizeof(cpu._Runs) == 4 * 8
    assert ctypes.sizeof(cpu._Convolution) == 8 * 8 + 3 * 8
    assert ctypes.sizeof(cpu._DeltaRule) == 5 * 8 + 5 * 3 * 8 + 2 * 8 + 2 * 4 + 2 * 8
    assert ctypes.sizeof(cpu._StateSpace) == 5 * 8 + 4 * 3 * 8 + 5 * 8


# ---- fewer calls ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    return Lab.create(load_base(BaseSettings(save_base("llama", folder / "base"))), folder)


def parts(engine: Any) -> tuple[Any, Any]:
    """The MLP and the attention of the first layer that it serves."""
    modules = dict(engine.model._view.named_modules())
    mlp, attention = (
        next(module for name, module in modules.items() if name.endswith(end)) for end in ("mlp", "self_attn")
    )
    return mlp, attention


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_fused_calls_give_each_row_the_bits_of_single_ones(
    lab: Lab,
    kv_dtype: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = requests(12, seed=5)
    caplog.set_level("INFO", logger="onebase_engine.engine.fusion")

    def engine() -> Engine:
        return lab.engine(model=ServedModel(lab.base, 8, kv_dtype=kv_dtype))

    fused = engine()
    mlp, attention = parts(fused)
    together = run(fused, asked)
    # As where PyTorch lacks what recording takes of it.
    monkeypatch.setitem(sys.modules, "onebase_engine.engine.fusion", None)
    assert together == run(engine(), asked)
    if isinstance(attention.q_proj.kernel, NativeLinear):
        assert "forward" in vars(mlp)
        assert "forward" in vars(attention)
        assert attention.q_proj.shared is attention.v_proj.shared is not None
        assert not [one for one in caplog.records if one.name == fusion.__name__], "nothing was left apart"
        assert "layers are computed one by one, and slower: ModuleNotFoundError" in caplog.text
        assert any(program is not None for program in fused.model._recorded[1]._programs.values())


def test_no_step_records_a_layer_whatever_its_number_of_rows(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a step waits for a recording")

    engine = lab.engine(draft_tokens=8)
    calls = sum(layer.leader is None for layer in engine.model._recorded)
    if not calls or not isinstance(parts(engine)[1].q_proj.kernel, NativeLinear):
        pytest.skip("the kernels in C do not compute here")
    monkeypatch.setattr(fusion, "Recording", refuse)
    used: list[int] = []
    run_program = Program._run
    monkeypatch.setattr(
        Program, "_run", lambda *args: used.append(args[0].result.shape[1]) or run_program(*args)
    )
    asked = [Request(tuple(range(3 + n, 3 + 2 * n)), None, 1, 0) for n in range(1, fusion.MOST_ROWS + 2)]
    texts = [run(engine, [one]) for one in asked]
    assert Counter(used) == dict.fromkeys(range(1, fusion.MOST_ROWS + 1), calls)
    monkeypatch.setitem(sys.modules, "onebase_engine.engine.fusion", None)
    plain = lab.engine(draft_tokens=8)
    assert texts == [run(plain, [one]) for one in asked]


def test_layers_run_as_one_call_until_somebody_looks_between_them(lab: Lab) -> None:
    engine, asked = lab.engine(), [Request(tuple(range(3, 9)), None, 4, 0)]
    layers = engine.model._recorded
    if not layers:
        pytest.skip("the kernels in C do not compute here")
    assert [len(layer.chain) for layer in layers] == [len(layers)] + [0] * (len(layers) - 1)
    expected, seen = run(engine, asked), []
    last = layers[-1]._module
    hook = last.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    assert run(engine, asked) == expected
    hook.remove()
    plain = lab.engine()
    plain.model._recorded[0].part()
    others: list[torch.Tensor] = []
    plain.model._recorded[-1]._module.register_forward_pre_hook(
        lambda _, given: others.append(given[0].clone())
    )
    assert run(plain, asked) == expected
    assert len(seen) == len(others) > 1
    assert all(torch.equal(one, other) for one, other in zip(seen, others, strict=True))
    assert run(engine, asked) == expected


@pytest.mark.parametrize("size", [32, 128])
def test_layers_with_norms_of_heads_run_as_one_call_with_the_bits_of_single_ones(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ARCHITECTURES["qwen3"]()
    config.head_dim = size
    lab = Lab.create(load_base(BaseSettings(save_model(config, tmp_path / "base"))), tmp_path)
    engine, asked = lab.engine(), requests(12, seed=5)
    layers = engine.model._recorded
    if not layers:
        pytest.skip("the kernels in C do not compute here")
    assert [len(layer.chain) for layer in layers] == [len(layers)] + [0] * (len(layers) - 1)
    texts = run(engine, asked)
    monkeypatch.setitem(sys.modules, "onebase_engine.engine.fusion", None)
    assert run(lab.engine(), asked) == texts


def test_layers_that_are_given_something_else_than_in_the_trial_compute_one_by_one(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "_straight", lambda *_: None)
    engine, asked = lab.engine(), [Request(tuple(range(3, 9)), None, 4, 0)]
    layers = engine.model._recorded
    if not layers:
        pytest.skip("the kernels in C do not compute here")
    expected = run(engine, asked)
    module = layers[1]._module
    forward = module.forward
    module.forward = lambda hidden, **named: forward(hidden.clone(), **named)

    assert run(engine, asked) == expected
    assert not layers[0].chain


def test_steps_of_few_rows_are_one_call_until_somebody_looks_at_the_norm_or_the_head(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, asked = lab.engine(), requests(6, seed=7) * 3  # of adapters that replace no part of a layer
    layers, view = engine.model._recorded, engine.model._view
    if not layers:
        pytest.skip("the kernels in C do not compute here")
    expected = run(engine, asked)
    calls: list[int] = []
    run_all = CpuKernels.run_all
    monkeypatch.setattr(CpuKernels, "run_all", lambda *args: calls.append(args[2]) or run_all(*args))
    alone = [Request(tuple(range(3, 9)), None, 5, 0)]
    text = run(engine, alone)
    # The prompt gives logits of its last row alone: its norm and its head are calls by themselves.
    assert calls[1:3] == [1, 1]
    assert calls[3:] == [calls[0] + 2] * 4

    seen: list[torch.Tensor] = []
    hook = view.lm_head.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    assert run(engine, alone) == text
    hook.remove()
    assert len(seen) == 5
    assert run(engine, asked) == expected

    monkeypatch.setattr(fusion, "_straight", lambda *_: None)
    plain = lab.engine()
    others: list[torch.Tensor] = []
    plain.model._view.lm_head.register_forward_pre_hook(lambda _, given: others.append(given[0].clone()))
    assert run(plain, alone) == text
    assert all(torch.equal(one, other) for one, other in zip(seen, others, strict=True))
    assert run(plain, asked) == expected


class Made(TorchDispatchMode):  # type: ignore[misc, no-untyped-call]
    """Collects the names of PyTorch's operators that make numbers, and how many each makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view and "empty" not in func.name():
            self.seen.append((func.name(), result.numel()))
        return result


@pytest.mark.parametrize("count", [1, fusion.MOST_ENDED, fusion.MOST_ENDED + 2])
def test_nothing_between_the_kernels_calls_wakes_the_threads_of_pytorch(lab: Lab, count: int) -> None:
    engine = lab.engine()
    if not engine.model._recorded:
        pytest.skip("the kernels in C do not compute here")
    for number in range(count):
        engine.submit(submission(str(number), Request(tuple(range(3 + number, 9 + number)), None, 6)))
    engine.step()
    assert all(sequence.generated == 1 for sequence in engine.scheduler.running)
    with Made() as made:
        engine.step()
    if count <= fusion.MOST_ENDED:
        assert not made.seen
        return
    assert made.seen, "rows of the embedding are made by PyTorch"
    # `index` by tensors takes threads from 3,000 numbers on, most others from 32,768 on, as logits are.
    assert "aten::index.Tensor" not in dict(made.seen)
    words = engine.model._view.config.get_text_config().vocab_size
    assert max(numbers for _, numbers in made.seen) < count * words


def test_rotations_that_are_stored_are_those_of_each_position_alone(lab: Lab) -> None:
    rotary = lab.engine().model._view.model.rotary_emb
    stored, x = fusion._Rotations(rotary), torch.zeros(1, 1, 1, dtype=torch.bfloat16)
    for position in (5, 0, 77, 300, 4_000, 77, fusion.KEPT - 1, fusion.KEPT, 70_000):
        one = torch.tensor([[position]])
        own = rotary(x, one)
        assert all(torch.equal(a, b) for a, b in zip(stored(x, one), own, strict=True))
    assert stored._tables[0].shape[1] == fusion.KEPT


@pytest.mark.parametrize("fault", ["other bits", "an error"])
def test_calls_that_give_other_bits_or_fail_are_not_fused_and_others_are(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    whole = fusion._gating

    def wrong(module: Any, *layers: Any) -> Any:
        forward = (lambda x: x * 2) if fault == "other bits" else (lambda x: 1 // 0)
        return lambda: setattr(module, "forward", forward), whole(module, *layers)[1]

    monkeypatch.setattr(fusion, "_gating", wrong)
    caplog.set_level("INFO", logger="onebase_engine.engine.fusion")
    mlp, attention = parts(lab.engine())
    if not isinstance(attention.q_proj.kernel, NativeLinear):
        pytest.skip("the kernels in C do not compute here")
    assert "forward" not in vars(mlp)
    assert "forward" in vars(attention)
    assert attention.q_proj.shared is attention.v_proj.shared is not None
    told = [one.message for one in caplog.records if "not fused" in one.message]
    (reason,) = (one.removeprefix("kernels: gated MLPs are not fused: ") for one in told)
    if fault == "an error":
        assert reason.startswith("ZeroDivisionError")
    else:
        assert re.fullmatch(r"\d+ of \d+ logits have other bits, the first at \d+, \d+", reason)


class Block(nn.Module):
    """A product, and its sum with what came in."""

    def __init__(self, kernels: CpuKernels, slots: int = SLOTS) -> None:
        super().__init__()
        self.layer = native(kernels, nf4(IN, IN), slots)

    def forward(self, x: torch.Tensor, rows: RowMap) -> torch.Tensor:
        return x + self.layer(x.view(-1, IN), rows).view(x.shape)


STEP = Contexts(
    *np.zeros((2, 4), dtype=np.int32), np.zeros((1, 4), dtype=np.int32), np.zeros((1, 1, 1), dtype=np.int32)
)


@settings(max_examples=10)
@given(mixes=MIXES, seed=st.integers(1, 9))
def test_recorded_calls_compute_for_other_rows_and_adapters_what_the_module_does(
    kernels: CpuKernels, mixes: list[dict[int, float]], seed: int
) -> None:
    assert kernels.adds
    block, count = Block(kernels), len(mixes)
    fixed = Fixed(random(1, count, IN).to(torch.bfloat16))
    with torch.inference_mode():
        with Recording(kernels, Arena(), [fixed]) as recording:
            first = block(fixed.tensor, NOBODY)
        program = recording.program(first)
        for slot in range(SLOTS):
            block.layer.put(slot, LoraWeights(random(8, IN, seed=slot), random(IN, 8, seed=slot), 0.1))
        for number in range(2):
            x = random(1, count, IN, seed=seed + number).to(torch.bfloat16)
            expected = block(x, row_map(mixes))
            assert torch.equal(program.run_calls([x], row_map(mixes), STEP), expected)
            for fewer in range(1, count):
                own, some = row_map(mixes[:fewer]), x[:, :fewer].clone()
                result = program.first_rows(fewer).run_calls([some], own, STEP)
                assert torch.equal(result, block(some, own))


def test_what_the_kernels_do_not_compute_is_not_recorded(kernels: CpuKernels) -> None:
    assert kernels.adds
    block, fixed = Block(kernels), Fixed(random(1, 3, IN).to(torch.bfloat16))
    stray = random(1, 3, IN).to(torch.bfloat16)

    def record(odd: Callable[[torch.Tensor], torch.Tensor]) -> Program:
        with torch.inference_mode(), Recording(kernels, Arena(), [fixed]) as recording:
            result = odd(fixed.tensor)
        return recording.program(result)

    def other_result(x: torch.Tensor) -> torch.Tensor:
        block(x, NOBODY)
        return stray

    record(lambda x: block(x, NOBODY))
    with pytest.raises(UnrecordableError):
        record(lambda x: block(x * 2, NOBODY))
    with pytest.raises(UnrecordableError):
        record(lambda x: block(stray, NOBODY))
    with pytest.raises(UnrecordableError):
        record(lambda x: x + block(x, NOBODY)[..., :1])
    with pytest.raises(UnrecordableError):
        record(other_result)
    with pytest.raises(UnrecordableError, match="by rows"):
        record(lambda x: block(x, NOBODY).view(3, 1, IN))
    assert kernels.recorder is None, "what fails records nothing more"


def test_results_of_recorded_calls_stay_where_they_were_when_more_rows_come(kernels: CpuKernels) -> None:
    assert kernels.adds
    arena, block = Arena(), Block(kernels)
    programs: list[tuple[Program, torch.Tensor, torch.Tensor]] = []
    with torch.inference_mode():
        for count in (1, 300, 8000, 5):
            fixed = Fixed(random(1, count, IN, seed=count).to(torch.bfloat16))
            x = fixed.tensor.clone()
            with Recording(kernels, arena, [fixed]) as recording:
                result = block(fixed.tensor, NOBODY)
            programs.append((recording.program(result), x, result.clone()))
        for program, x, expected in programs:
            assert torch.equal(program.run_calls([x], NOBODY, STEP), expected)


def test_kernels_on_a_gpu_have_one_name_however_often_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(cpu.CHOICE, "torch")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cpu._on_gpu.cache_clear()
    try:
        names = {cpu.find_kernels(torch.device("cuda"), torch.bfloat16).name for _ in range(2)}
    finally:
        cpu._on_gpu.cache_clear()
    assert names == {"torch sm_90"}
