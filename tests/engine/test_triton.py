"""Triton's kernels under its interpreter, against PyTorch: the same function, and the same bits of a row
whatever else is computed with it. What they take on a GPU is for `benchmarks/` to say."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import subprocess
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import triton
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.engine import recurrent_layers, triton_on_cpu
from tests.engine.harness import Lab, LiveBytes, Request, requests, run
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
from tests.tiny import ADAPTERS, INVOCATION, load_folder, save_adapter, save_base, save_on_experts
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.errors import OutOfResources

from onebase_adapters.proof import modules
from onebase_adapters.proof.modules import ModuleProver
from onebase_adapters.proof.report import ProofError
from onebase_engine.base.experts import expert_matrices, expert_modules
from onebase_engine.base.layers import adaptable_layers, plain_absmax
from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.base.view import view
from onebase_engine.engine import experts, forms, fusion, graphs, model
from onebase_engine.engine.batch import Packer, StepBatch
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.kv_cache import RESERVED_BLOCKS
from onebase_engine.engine.memory_budget import largest_step_bytes, thin_adapter
from onebase_engine.engine.messages import Sampling
from onebase_engine.engine.model import ServedModel
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_engine.engine.sequence import AdapterMix, Segment, SequenceState, StepPlan
from onebase_engine.kernels import cuda, cuda_training
from onebase_engine.kernels.cuda import CudaExperts, CudaKernels, CudaLayers, CudaLinear, Switches
from onebase_engine.kernels.interface import Contexts, Draws, RowMap
from onebase_engine.kernels.reference import ReferenceKernels, ReferenceLinear
from onebase_engine.kernels.weights import ExpertLora, LoraWeights, narrowed, weights_bytes
from onebase_engine.lora.module import StepRows
from onebase_engine.lora.slots import wrap_layers

pytestmark = pytest.mark.skipif(
    not cuda.INTERPRETED.value, reason="with a GPU here Triton compiles for it, in this process"
)
EPS = torch.finfo(torch.bfloat16).eps
NOBODY = RowMap()
RANKS = (4, 16, 40, 256)
SLOTS = len(RANKS)
SPLIT = cuda.SPLIT
ROWS = st.sampled_from([1, 2, 16, 17, 65, 129])
MIX = st.dictionaries(st.integers(0, SLOTS - 1), st.sampled_from([1.0, 0.5, -2.0, 0.3]), max_size=3)
FEW = settings(max_examples=4)


@pytest.fixture(scope="module")
def kernels() -> CudaKernels:
    return CudaKernels()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so short that small layers and contexts have several."""
    monkeypatch.setattr(cuda, "PIECE", triton_on_cpu.constant(128))
    monkeypatch.setattr(cuda, "SPLIT", triton_on_cpu.constant(128))


def linear(kernels: CudaKernels, layer: Any) -> CudaLinear:
    found = kernels.linear(layer, SLOTS)
    assert isinstance(found, CudaLinear)
    return found


def adapted(kernels: CudaKernels, layer: Any) -> CudaLinear:
    found = linear(kernels, layer)
    for slot, rank in enumerate(RANKS):
        b = random(layer.out_features, rank, seed=slot + 50) * 0.1
        invocation = (1,) if slot == 1 else ()
        found.put(slot, LoraWeights(lora(rank, slot).a, b, 0.5 + slot, invocation=invocation))
    return found


def close(got: torch.Tensor, exact: torch.Tensor) -> None:
    """Within a rounding to bf16, and what sums in fp32 lose."""
    error = (got.double() - exact).abs()
    assert (error <= exact.abs() * EPS / 2 + 1e-4).all(), float(error.max())


@FEW
@given(
    rows=ROWS, size_in=st.sampled_from([64, 192, 320]), size_out=st.sampled_from([1, 63, 64, 130]),
    blocksize=st.sampled_from([64, 128]), bias=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_a_4_bit_product_is_that_with_the_weights_of_bitsandbytes(
    kernels: CudaKernels, rows: int, size_in: int, size_out: int, blocksize: int, bias: bool, seed: int
) -> None:
    if size_in % blocksize:
        blocksize = 64
    layer = nf4(size_in, size_out, blocksize=blocksize, bias=bias, seed=seed)
    x = random(rows, size_in, seed=seed).to(torch.bfloat16)
    exact = x.double() @ plain(layer).double().T
    close(linear(kernels, layer)(x, NOBODY), exact + (layer.bias.double() if bias else 0))


@pytest.mark.parametrize("blocksize", [64, 128])
def test_weights_looked_up_in_registers_have_the_same_bits(kernels: CudaKernels, blocksize: int) -> None:
    layer = nf4(256, 70, blocksize=blocksize, seed=3)
    x, permuting = random(3, 256, seed=4).to(torch.bfloat16), CudaKernels(Switches(permuted=True))
    found, usual = linear(permuting, layer), linear(kernels, layer)
    assert (found.unpacking, usual.unpacking) == (cuda.PERMUTED.value, cuda.GATHERED.value)
    assert torch.equal(permuting.unpack(found, 0)[: 256 * 70].view(70, 256), plain(layer))
    assert torch.equal(found.sums(x), usual.sums(x))


def test_each_weight_has_the_bits_that_bitsandbytes_gives(kernels: CudaKernels) -> None:
    layer = nf4(64, 70)
    found = linear(kernels, layer)
    assert torch.equal(found(torch.eye(64, dtype=torch.bfloat16), NOBODY).T, plain(layer))
    assert torch.equal(kernels.unpack(found, 0)[: 64 * 70].view(70, 64), plain(layer))


@pytest.mark.parametrize("bias", [False, True])
def test_a_plain_product_is_that_of_its_weights(kernels: CudaKernels, bias: bool) -> None:
    layer = nn.Linear(192, 130, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    x = random(5, 192).to(torch.bfloat16)
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    close(linear(kernels, layer)(x, NOBODY), exact)


@pytest.mark.parametrize("quantized", [True, pytest.param(False, marks=pytest.mark.full)])
@FEW
@given(mixes=st.lists(MIX, min_size=1, max_size=6), seed=st.integers(0, 9))
def test_each_row_gets_what_its_own_adapters_add_in_the_order_of_peft(
    kernels: CudaKernels, quantized: bool, mixes: list[dict[int, float]], seed: int
) -> None:
    layer = (
        nf4(IN, OUT)
        if quantized
        else nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    )
    found = adapted(kernels, layer)
    reference = ReferenceLinear(layer, tiled=True)
    for slot in range(SLOTS):
        reference.put(slot, found._reference.plain[slot])
    x = random(len(mixes), IN, seed=seed).to(torch.bfloat16)
    got, wanted = found(x, row_map(mixes)), reference(x, row_map(mixes))
    # Two orders of summation may fall to two sides of a rounding: of the base, of the adapters' sum, of both.
    largest = torch.stack([found(x, NOBODY).abs(), got.abs(), (got - found(x, NOBODY)).abs()]).amax(0)
    assert ((got - wanted).abs() <= largest * 2 * EPS + 1e-3).all()
    assert float((got == wanted).float().mean()) > 0.97


@FEW
@given(rows=ROWS, data=st.data())
def test_a_rows_bits_do_not_depend_on_its_neighbours_or_their_number(
    kernels: CudaKernels, rows: int, data: st.DataObject
) -> None:
    found = adapted(kernels, nf4(IN, OUT, bias=True))
    row = data.draw(st.integers(0, rows - 1))
    mixes: list[dict[int, float]] = [{}] * rows
    for some in {row, rows - 1, 0}:
        mixes[some] = data.draw(MIX)
    x = random(rows, IN, seed=rows).to(torch.bfloat16)
    together = found(x, row_map(mixes))
    assert torch.equal(found(x[row : row + 1], row_map(mixes[row : row + 1]))[0], together[row])
    few = slice(max(0, row - 16), row + 1)
    assert torch.equal(found(x[few], row_map(mixes[few]))[-1], together[row])


@pytest.mark.parametrize("rows", [65, 257])
@pytest.mark.parametrize("quantized", [True, pytest.param(False, marks=pytest.mark.full)])
def test_every_row_of_a_prompt_has_the_bits_that_it_has_among_a_few(
    kernels: CudaKernels, rows: int, quantized: bool
) -> None:
    """On both sides of where a tile of rows ends."""
    layer = nf4(IN, 8) if quantized else nn.Linear(IN, 8, dtype=torch.bfloat16).requires_grad_(False)
    found, x = linear(kernels, layer), random(rows, IN).to(torch.bfloat16)
    assert torch.equal(found(x, NOBODY), torch.cat([found(some, NOBODY) for some in x.split(64)]))


def test_an_adapter_that_overflows_reaches_no_other_row(kernels: CudaKernels) -> None:
    found = linear(kernels, nf4(IN, OUT))
    found.put(0, lora(8, 1))
    found.put(1, LoraWeights(torch.full((8, IN), float("inf")), torch.ones(OUT, 8), 1.0))
    x = random(6, IN).to(torch.bfloat16)
    mixes: list[dict[int, float]] = [{0: 1.0}, {1: 1.0}, {}, {0: 1.0}, {1: 1.0}, {}]
    got = found(x, row_map(mixes))
    assert torch.equal(got[[0, 3]], found(x[[0, 3]], row_map([mixes[0]] * 2)))
    assert torch.equal(got[[2, 5]], found(x[[2, 5]], NOBODY))
    assert not torch.isfinite(got[[1, 4]]).any()


def test_matrices_that_begin_anywhere_are_read_right(kernels: CudaKernels) -> None:
    found = linear(kernels, nf4(IN, OUT))
    own = lora(8, 1)
    odd = torch.cat([torch.zeros(1), own.a.flatten()])[1:].view_as(own.a)
    assert odd.data_ptr() % cuda.ALIGNMENT
    x = random(3, IN).to(torch.bfloat16)
    mixes: list[dict[int, float]] = [{0: 1.0}] * 3
    got = []
    for a in (own.a, odd):
        found.put(0, LoraWeights(a, own.b, own.scale))
        assert all(tensor.data_ptr() % cuda.ALIGNMENT == 0 for tensor in found._held[0])
        got.append(found(x, row_map(mixes)))
    assert torch.equal(*got)


@FEW
@given(rank=st.sampled_from([1, 16, 40]), rows=st.sampled_from([1, 17]), seed=st.integers(0, 9))
def test_matrices_whose_numbers_are_those_of_bf16_take_half_the_bytes_and_give_the_same_bits(
    kernels: CudaKernels, rank: int, rows: int, seed: int
) -> None:
    found = linear(kernels, nf4(IN, OUT))
    whole = lora(rank, seed)
    whole = replace(whole, a=whole.a.bfloat16().float(), b=whole.b.bfloat16().float())
    whole.a[0, :3] = torch.tensor([-0.0, 1e-39, 3e38]).bfloat16().float()
    x = random(rows, IN, seed=seed).to(torch.bfloat16)
    mixes: list[dict[int, float]] = [{0: 0.5, 1: 1.0}] * rows
    found.put(1, lora(16, 3))
    given = {"one": whole, "fp32": lora(rank, seed), "biased": replace(whole, bias=torch.ones(OUT))}
    halved = narrowed(given, given)
    assert (halved["fp32"], halved["biased"]) == (given["fp32"], given["biased"])
    own = halved["one"]
    assert isinstance(own, LoraWeights)
    assert 2 * weights_bytes({"one": own}) == weights_bytes({"one": whole})
    got = []
    for weights in (whole, own):
        found.put(0, weights)
        got.append([found(x, row_map(mixes)), found(x.float(), row_map(mixes))])
    assert all(map(torch.equal, *got))


def test_a_version_comes_into_its_slot_in_all_layers_by_one_copy(kernels: CudaKernels) -> None:
    layers = [linear(kernels, nf4(IN, OUT, seed=seed)) for seed in range(5)]
    kernels.commit_slots()
    x, mixes = random(3, IN).to(torch.bfloat16), row_map([{1: 1.0}] * 3)
    bare = [layer(x, NOBODY) for layer in layers]
    for seed, layer in enumerate(layers):
        layer.put(1, lora(8, seed))
    with Copies() as counted:
        kernels.commit_slots()
    assert counted.bytes == [cuda.LAYERS.value * cuda.SLOT_FACTS.value * 8]
    with Copies() as counted:
        kernels.commit_slots()
    assert counted.bytes == []
    for layer, before in zip(layers, bare, strict=True):
        assert not torch.equal(layer(x, mixes), before)


class Copies(TorchDispatchMode):  # type: ignore[misc, no-untyped-call]
    """Notes the bytes of copies into tensors while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.bytes.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


def test_layers_beyond_those_of_one_table_have_another(kernels: CudaKernels) -> None:
    first, _ = kernels.place_in_slots(77, torch.device("cpu"))
    first.layers = cuda.LAYERS.value
    second, place = kernels.place_in_slots(77, torch.device("cpu"))
    assert (second is not first, place) == (True, 0)
    assert kernels.place_in_slots(77, torch.device("cpu")) == (second, 1)
    assert kernels.place_in_slots(78, torch.device("cpu"))[0] is not second


def test_a_slot_that_is_emptied_acts_no_more(kernels: CudaKernels) -> None:
    found = linear(kernels, nf4(IN, OUT))
    found.put(2, lora(8, 1))
    x = random(3, IN).to(torch.bfloat16)
    mixes: list[dict[int, float]] = [{2: 1.0}] * 3
    assert not torch.equal(found(x, row_map(mixes)), found(x, NOBODY))
    found.put(2, None)
    assert torch.equal(found(x, row_map(mixes)), found(x, NOBODY))


@pytest.mark.parametrize("rows", [3, pytest.param(65, marks=pytest.mark.full)])
def test_layers_of_the_same_rows_give_the_bits_of_each_alone(kernels: CudaKernels, rows: int) -> None:
    layers = [adapted(kernels, nf4(IN, size, seed=size)) for size in (OUT, 30, 64)]
    x = random(rows, IN).to(torch.bfloat16)
    mixes: list[dict[int, float]] = [{0: 1.0}, {}, {1: 0.5, 3: 1.0}, *[{}] * (rows - 3)]
    for together, layer in zip(CudaLayers(kernels, layers)(x, row_map(mixes)), layers, strict=True):
        assert torch.equal(together, layer(x, row_map(mixes)))


def test_what_adapters_of_many_rows_hold_between_a_and_b_is_bounded_for_the_same_bits(
    kernels: CudaKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each piece of the terms where that is little, else of all of them together."""
    both = CudaLayers(kernels, [adapted(kernels, nf4(IN, OUT, seed=seed)) for seed in (1, 2)])
    x, mixes = random(5, IN).to(torch.bfloat16), row_map([{0: 1.0}, {}, {1: 0.5, 3: 1.0}, {2: 2.0}, {}])
    numbers, pieces = 2 * 4 * max(RANKS), 2
    found = []
    for most in (numbers * pieces, numbers * pieces - 1):
        monkeypatch.setattr(cuda, "HIDDEN", most)
        with LiveBytes() as meter:
            found.append((both(x, mixes), meter.most))
    (by_pieces, bytes_of_pieces), (at_once, bytes_at_once) = found
    assert all(map(torch.equal, by_pieces, at_once))
    assert bytes_of_pieces - bytes_at_once == numbers * 4


@pytest.mark.full
def test_wider_blocks_of_many_rows_give_the_same_bits(
    kernels: CudaKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [linear(kernels, nf4(IN, size, seed=size)) for size in (OUT, 30, 200)]
    x = random(130, IN).to(torch.bfloat16)
    monkeypatch.setattr(cuda, "UNPACKED_ROWS", 128)  # so many rows have their weights unpacked before
    narrow = CudaLayers(kernels, layers)(x, NOBODY)
    monkeypatch.setattr(cuda, "PROMPT_ROWS", 130)
    for got, wanted in zip(CudaLayers(kernels, layers)(x, NOBODY), narrow, strict=True):
        assert torch.equal(got, wanted)


def library_on_cpu(monkeypatch: pytest.MonkeyPatch, product: Callable[..., None], rows: int = 1000) -> Any:
    """Kernels of an engine with steps of so many rows, on a device whose library multiplies by `product`."""
    monkeypatch.setattr(cuda, "library_may_fit", lambda device: True)
    monkeypatch.setattr(cuda, "library_product", product)
    kernels = CudaKernels()
    kernels.step_rows = rows
    return kernels


def placed(weight: torch.Tensor, past: int) -> nn.Parameter:
    """A copy of the weight whose address is `past` bytes behind a multiple of 256."""
    room = torch.empty(weight.nbytes + 512, dtype=torch.uint8)
    first = -room.data_ptr() % 256 + past
    own = room[first : first + weight.nbytes].view(weight.dtype).view(weight.shape)
    return nn.Parameter(own.copy_(weight), requires_grad=False)


def in_order(x: torch.Tensor, weight: torch.Tensor, sums: torch.Tensor) -> None:
    """As a library whose sums are one accumulator over ascending terms."""
    total = torch.zeros_like(sums)
    for first in range(0, x.shape[1], 64):
        part = slice(first, first + 64)
        total = (x[:, part].double() @ weight[:, part].double().T).float() + total
    sums.copy_(total)


def in_halves(x: torch.Tensor, weight: torch.Tensor, sums: torch.Tensor) -> None:
    """As a library that splits sums."""
    half, theirs = x.shape[1] // 128 * 64, torch.empty_like(sums)
    in_order(x[:, :half], weight[:, :half], sums)
    in_order(x[:, half:], weight[:, half:], theirs)
    sums += theirs


def fails(x: torch.Tensor, weight: torch.Tensor, sums: torch.Tensor) -> None:
    raise TypeError("mm() got an unexpected keyword argument 'out_dtype'")


@pytest.mark.parametrize("library", [in_order, in_halves, fails])
@pytest.mark.parametrize("quantized", [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_library_multiplies_many_rows_where_a_trial_shows_that_its_sums_have_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, library: Callable[..., None], quantized: bool
) -> None:
    monkeypatch.setattr(cuda, "UNPACKED_ROWS", 20)
    monkeypatch.setattr(cuda, "LIBRARY_ROWS", 32)
    bases = [nf4(IN, out, seed=out, bias=out == OUT) for out in (OUT, 64)]
    if not quantized:
        bases = [nn.Linear(IN, out, dtype=torch.bfloat16).requires_grad_(False) for out in (OUT, 64)]
        for base in bases:
            base.weight = placed(base.weight, 0)
    x = random(45, IN, seed=3).bfloat16()
    mixes = [{0: 1.0} if row % 2 else {} for row in range(45)]
    mine = CudaKernels()
    wanted = CudaLayers(mine, [adapted(mine, base) for base in bases])(x, row_map(mixes))
    multiplied: list[tuple[int, ...]] = []

    def watched(x: torch.Tensor, weight: torch.Tensor, sums: torch.Tensor) -> None:
        multiplied.append((*x.shape, len(weight)))
        library(x, weight, sums)

    kernels = library_on_cpu(monkeypatch, watched)
    layers = CudaLayers(kernels, [adapted(kernels, base) for base in bases])
    assert not kernels._scratch, "a trial holds no memory"
    multiplied.clear()
    got = layers(x, row_map(mixes))
    assert all(map(torch.equal, got, wanted))
    assert multiplied == ([(32, IN, OUT)] * 2 + [(32, IN, 64)] * 2 if library is in_order else [])
    multiplied.clear()
    few = layers(x[:20], row_map(mixes[:20]))
    assert all(torch.equal(one, whole[:20]) for one, whole in zip(few, wanted, strict=True))
    assert not multiplied, "few rows are the kernel's"


@pytest.mark.parametrize(
    "why", ["collecting", "another device", "few rows", "many outputs", "alignment", "switched off"]
)
def test_a_library_is_not_tried_where_it_may_not_be_used(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    monkeypatch.setattr(cuda, "LIBRARY_ROWS", 32)
    base: Any = nn.Linear(IN, OUT, dtype=torch.bfloat16).requires_grad_(False)
    base.weight = placed(base.weight, 128 if why == "alignment" else 0)
    layers = CudaLayers(mine := CudaKernels(), [linear(mine, base)])
    may_fit = cuda.library_may_fit
    kernels = library_on_cpu(monkeypatch, in_order, cuda.UNPACKED_ROWS if why == "few rows" else 257)
    if why == "another device":
        monkeypatch.setattr(cuda, "library_may_fit", may_fit)
    if why == "switched off":
        kernels.switches = Switches(library=False)
    if why == "many outputs":
        monkeypatch.setattr(cuda, "LIBRARY_OUTPUTS", OUT - 1)
    with cuda.collecting() if why == "collecting" else nullcontext():
        assert not kernels.library_fits(layers)
    assert not kernels._library_differs
    if why == "alignment":
        base.weight = placed(base.weight, 256)
        assert kernels.library_fits(CudaLayers(mine, [linear(mine, base)]))


def test_a_library_whose_trial_has_no_memory_is_tried_again_and_a_device_at_fault_ends_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "LIBRARY_ROWS", 32)
    errors: list[Exception] = [torch.OutOfMemoryError("CUDA out of memory")]

    def short(*given: torch.Tensor) -> None:
        if errors:
            raise errors.pop()
        in_order(*given)

    kernels, mine = library_on_cpu(monkeypatch, short), CudaKernels()
    layers = CudaLayers(mine, [linear(mine, nf4(IN, OUT))])
    assert not kernels.library_fits(layers)
    assert not kernels._library_differs
    errors.append(torch.AcceleratorError("illegal access"))
    with pytest.raises(torch.AcceleratorError):
        kernels.library_fits(layers)
    assert kernels.library_fits(layers)


@pytest.mark.parametrize(("capability", "kept"), [((8, 9), False), ((9, 0), True), ((12, 0), True)])
def test_cublas_is_left_no_workspace_where_it_may_multiply_alone(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kept: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for name in cuda.WHOLE_SUMS:
        monkeypatch.setenv(name, "as before")  # so that it is restored
        monkeypatch.delenv(name)
    cuda.keep_sums_whole(torch.device("cuda"))
    assert {name: os.environ.get(name) for name in cuda.WHOLE_SUMS} == (
        cuda.WHOLE_SUMS if kept else dict.fromkeys(cuda.WHOLE_SUMS)
    )


def test_an_engine_asks_for_a_library_by_the_tokens_of_its_steps(lab: Lab) -> None:
    kernels = CudaKernels()
    ServedModel(lab.base, 1, kernels=kernels)
    assert kernels.step_rows == 0
    ModuleProver(lab.base, kernels)
    assert kernels.step_rows == 0
    for tokens in (300, 20):
        ServedModel(lab.base, 1, kernels=kernels, step_tokens=tokens)
        assert kernels.step_rows == 300


@pytest.mark.parametrize("gated", [False, True])
def test_neighbours_of_a_prompt_are_of_one_program_that_adds_an_adapter_for_the_same_bits(
    kernels: CudaKernels, monkeypatch: pytest.MonkeyPatch, gated: bool
) -> None:
    programs: dict[str, int] = {}

    def counted(name: str) -> Any:
        kernel, counts = getattr(cuda, name), MagicMock()

        def of_grid(_: Any, grid: tuple[int, ...]) -> Any:
            programs[name] = grid[0]
            return kernel[grid]

        counts.__getitem__ = of_grid
        return counts

    for name in ("_shrink", "_finish"):
        monkeypatch.setattr(cuda, name, counted(name))
    monkeypatch.setattr(cuda, "PROMPT_ROWS", 21)
    monkeypatch.setattr(cuda, "UNPACKED_ROWS", 20)
    x = random(21, IN).to(torch.bfloat16)
    rows = row_map([{0: 1.0}] * 7 + [{}] * 3 + [{3: 0.5, 1: 1.0}] * 11)

    def computed(kernels: CudaKernels) -> list[torch.Tensor]:
        own = [adapted(kernels, nf4(IN, OUT, seed=seed)) for seed in (1, 2)]
        return CudaLayers(kernels, own, gated=gated)(x, rows)

    one_by_one = computed(CudaKernels(Switches(in_turn=False, wide=False)))
    assert programs == {"_shrink": 29, "_finish": 21}
    for got, wanted in zip(computed(kernels), one_by_one, strict=True):
        assert torch.equal(got, wanted)
    assert programs == {"_shrink": 4, "_finish": 3}


@pytest.mark.parametrize("rows", [3, pytest.param(65, marks=pytest.mark.full)])
def test_what_is_added_to_other_rows_has_the_bits_of_a_sum_apart(kernels: CudaKernels, rows: int) -> None:
    layer = adapted(kernels, nf4(IN, OUT))
    x, before = (random(rows, size, seed=size).to(torch.bfloat16) for size in (IN, OUT))
    mixes: list[dict[int, float]] = [{0: 1.0}, {}, {1: 0.5, 3: 1.0}, *[{}] * (rows - 3)]
    given = before.clone()
    assert torch.equal(layer(x, row_map(mixes), given), before + layer(x, row_map(mixes)))
    assert torch.equal(given, before)


@pytest.mark.parametrize("rows", [3, pytest.param(65, marks=pytest.mark.full)])
def test_a_gated_pair_rounds_where_the_modules_round(kernels: CudaKernels, rows: int) -> None:
    layers = [adapted(kernels, nf4(IN, OUT, seed=seed)) for seed in (1, 2)]
    x = random(rows, IN).to(torch.bfloat16)
    mixes: list[dict[int, float]] = [{0: 1.0}, *[{}] * (rows - 1)]
    (got,) = CudaLayers(kernels, layers, gated=True)(x, row_map(mixes))
    gate, up = (layer(x, row_map(mixes)) for layer in layers)
    wanted = functional.silu(gate) * up
    torch.testing.assert_close(got, wanted, rtol=2 * EPS, atol=0)
    assert float((got == wanted).float().mean()) > 0.99


# ---- attention ---------------------------------------------------------------------------------


@FEW
@given(
    lengths=st.lists(st.sampled_from([1, 15, 16, 63, 66, 100]), min_size=1, max_size=2),
    heads=st.sampled_from([(1, 1), (1, 3), (2, 2)]),
    dims=st.sampled_from([(16, 16), (24, 24), (64, 64), (48, 32)]), block=st.sampled_from([1, 16]),
    seen=st.sampled_from([{}, {"window": 5}, {"window": 32}, {"chunk": 24}]),
    softcap=st.sampled_from([None, 30.0]), sinks=st.booleans(),
    cuts=st.sets(st.integers(1, 99), max_size=3),
)  # fmt: skip
@example(
    lengths=[16, 100], heads=(2, 2), dims=(24, 24), block=1,
    seen={"window": 32}, softcap=None, sinks=False, cuts=set(),
)  # fmt: skip
@example(
    lengths=[16, 100], heads=(2, 2), dims=(48, 32), block=16,
    seen={}, softcap=None, sinks=True, cuts={50},
)  # fmt: skip
@example(
    lengths=[100], heads=(1, 3), dims=(24, 24), block=16,
    seen={"chunk": 24}, softcap=None, sinks=False, cuts={50},
)  # fmt: skip
def test_attention_is_that_of_each_context_alone_in_any_chunks(
    kernels: CudaKernels, lengths: list[int], heads: tuple[int, int], dims: tuple[int, int], block: int,
    seen: dict[str, int], softcap: float | None, sinks: bool, cuts: set[int],
) -> None:  # fmt: skip
    cuda.SPLIT = triton_on_cpu.constant(64)  # as short as a tile of keys; `small` sets it back

    def empty(among: int) -> Cache:
        options = {"value_dim": dims[1], "softcap": softcap, "sinks": sinks}
        return Cache(kernels, *heads, dims[0], block, among=among, **options, **seen)

    # Together also in blocks that other layers may have, whose heads lie between.
    cache, alone = empty(1 + len(lengths) % 3), empty(1)
    inputs = [projected(cache, length, i) for i, length in enumerate(lengths)]
    # Each context's last token by itself, as a decode.
    cuts = {cut for cut in cuts if cut < max(lengths)}
    ends = sorted({*cuts, *(length - 1 for length in lengths), *lengths} - {0})
    got = cache.run_in_pieces(inputs, ends)
    for i, length in enumerate(lengths):
        mixed = got[i]
        error = (mixed.double() - eager(*inputs[i], cache.settings).transpose(0, 1)).abs().max()
        assert error < 0.05, float(error)
        alone.taken = 0
        whole = alone.run([(alone.context(length), 0, length)], *inputs[i])
        assert torch.equal(mixed, whole), "chunks and neighbours change bits"


def test_attention_takes_smaller_tiles_from_the_first_step_on_where_the_device_has_no_shared_memory(
    kernels: CudaKernels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also if only longer contexts than those of the first steps need so much."""
    launched: list[tuple[int, bool]] = []

    class Loaded:
        def __init__(self, keys: int, whole: bool) -> None:
            self._needed = 0 if whole else keys << 10

        @property
        def run(self) -> None:
            if self._needed > 16 << 10:
                raise OutOfResources(self._needed, 16 << 10, "shared memory")

    class Short:
        """Has memory for 16 keys at a time, where a context has several splits."""

        def warmup(self, *given: Any, KEYS: int, WHOLE: bool, **more: Any) -> Loaded:  # noqa: N803
            return Loaded(KEYS, WHOLE)

        def __getitem__(self, grid: Any) -> Any:
            def launch(*given: Any, KEYS: int, WHOLE: bool, **constants: Any) -> None:  # noqa: N803
                assert Loaded(KEYS, WHOLE).run is None
                launched.append((KEYS, WHOLE))
                attend[grid](*given, KEYS=KEYS, WHOLE=WHOLE, **constants)

            return launch

    attend = cuda._attend
    monkeypatch.setattr(cuda, "_attend", Short())
    cache = Cache(kernels, 2, 2, 16, 16)
    short, long = projected(cache, 100, 0), projected(cache, 200, 1)
    (before,) = cache.run_in_pieces([short], [100])
    cache.run_in_pieces([long], [200])
    (after,) = cache.run_in_pieces([short], [100])
    assert torch.equal(before, after), "bits that depend on what others asked before"
    assert set(launched) == {(16, True), (16, False)}
    assert (before.double() - eager(*short, cache.settings).transpose(0, 1)).abs().max() < 0.05
    assert "attention takes smaller tiles" in caplog.text


@pytest.mark.parametrize("most", [pytest.param(1, marks=pytest.mark.full), 24])
def test_attention_holds_what_splits_give_of_some_rows_after_the_other_for_the_same_bits(
    kernels: CudaKernels, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """A decode in a long context, one in a short one, and two prompts; `most` rows times splits at once."""
    launched: list[str] = []
    triton_on_cpu.tell(monkeypatch, launched.append)
    cache = Cache(kernels, 1, 8, 16, 16)
    stretches = [(300, 299), (20, 19), (24, 0), (140, 120)]
    q, k, v = (
        torch.cat([whole[:, start:stop] for whole, (stop, start) in zip(wholes, stretches, strict=True)], 1)
        for wholes in zip(*(projected(cache, stop, i) for i, (stop, _) in enumerate(stretches)), strict=True)
    )
    segments = [(cache.context(stop), start, stop) for stop, start in stretches]

    def attended() -> tuple[torch.Tensor, int]:
        launched.clear()
        with LiveBytes() as meter:
            out = cache.run(segments, q, k, v)
        return out, meter.most

    whole, bytes_of_all = attended()
    assert launched == ["_write", "_attend", "_merge"]
    of_row = 8 * (16 + 2) * 4
    monkeypatch.setattr(cuda, "SCRATCH", most * of_row)
    in_parts, bytes_at_once = attended()
    assert launched.count("_attend") == launched.count("_merge") > 2
    assert torch.equal(whole, in_parts)
    rows = max(most, 2 * 8)  # a tile has eight rows of eight heads, in two splits
    assert bytes_of_all - bytes_at_once == (3 * q.shape[1] - rows) * of_row


def test_a_decode_behind_500_tokens_is_spread_over_programs_of_four_tiles_of_keys_each(
    kernels: CudaKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys of one program wait for each other, whatever multiprocessors have nothing to do."""
    monkeypatch.setattr(cuda, "SPLIT", SPLIT)
    grids: list[tuple[tuple[int, ...], int]] = []

    class Watched:
        def warmup(self, *given: Any, **more: Any) -> None:
            """Compile nothing."""

        def __getitem__(self, grid: Any) -> Any:
            def launch(*given: Any, KEYS: int, **constants: Any) -> None:  # noqa: N803
                grids.append((grid, KEYS))
                attend[grid](*given, KEYS=KEYS, **constants)

            return launch

    attend = cuda._attend
    monkeypatch.setattr(cuda, "_attend", Watched())
    cache = Cache(kernels, 8, 4, 128, 16)
    q, k, v = projected(cache, 500, 0)
    blocks = cache.context(500)
    cache.run([(blocks, 499, 500)], q[:, -1:], k[:, -1:], v[:, -1:])
    ((grid, keys),) = grids
    assert math.prod(grid) == 16
    assert SPLIT.value == 4 * keys


def test_a_prompt_that_does_not_attend_at_once_does_so_in_about_even_parts() -> None:
    """2,048 rows of an 8B, 16 a tile: 8 splits are a little more than are held at once."""
    none, tiles = torch.zeros(0), list(range(0, 2048, 16))

    def rows(splits: int, most: int = 16131) -> list[int]:
        step = cuda._Step(none, none, none, none, tiles, [splits] * len(tiles), 2048, False)
        chunks = step.chunks(most)
        assert [one.first_row for one in chunks] == [16 * one.first_tile for one in chunks]
        assert sum(one.tiles for one in chunks) == len(tiles)
        assert all(one.rows * splits <= max(most, 16 * splits) for one in chunks)
        return [one.rows for one in chunks]

    assert rows(7) == [2048]
    assert rows(8) == [1040, 1008]
    assert rows(256) == [48] * 42 + [32]
    assert rows(2000) == [16] * 128


@pytest.mark.parametrize(
    ("dim", "heads", "options"),
    [
        (64, (1, 3), {}),
        pytest.param(80, (2, 1), {"window": 40, "softcap": 20.0}, marks=pytest.mark.full),
        pytest.param(128, (2, 4), {"softcap": 20.0, "sinks": True}, marks=pytest.mark.full),
    ],
)
def test_attention_over_int8_is_that_of_the_reference(
    kernels: CudaKernels, dim: int, heads: tuple[int, int], options: dict[str, Any]
) -> None:
    same_in_int8(kernels, heads, dim, [140, 9], [100, 139, 140], **options)


def test_a_layer_that_borrows_keys_and_values_attends_to_the_lenders_and_writes_nothing(
    kernels: CudaKernels,
) -> None:
    borrows(kernels)


def test_keys_and_values_become_the_same_int8s_whatever_computes(kernels: CudaKernels) -> None:
    written_alike(kernels, 24, 1)


@pytest.mark.parametrize(
    ("dim", "eight"),
    [
        (32, False),
        (80, True),
        *(pytest.param(*one, marks=pytest.mark.full) for one in ((32, True), (80, False))),
    ],
)
def test_queries_and_keys_are_turned_as_transformers_turns_them(
    kernels: CudaKernels, dim: int, eight: bool
) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    plainly, turning = (Cache(kernels, 2, 3, dim, 16, eight=eight) for _ in range(2))
    q, k, v = projected(plainly, 20, 1)
    angles = random(1, 20, dim // 2).repeat(1, 1, 2)
    rotation = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)
    turned_q, turned_k = apply_rotary_pos_emb(q[None], k[None], *rotation)
    wanted = plainly.run([(plainly.context(20), 0, 20)], turned_q[0], turned_k[0], v)
    attention = turning.attention
    turning.attention = lambda *inputs: attention(*inputs, rotation)  # type: ignore[assignment]
    got = turning.run([(turning.context(20), 0, 20)], q, k, v)
    assert torch.equal(got, wanted)
    assert torch.equal(turning.tensors[0], plainly.tensors[0])


@pytest.mark.parametrize("eight", [False, True])
def test_padding_rows_give_zeros_and_write_to_the_dump_alone(kernels: CudaKernels, eight: bool) -> None:
    cache = Cache(kernels, 2, 2, 64, 16, eight=eight)
    q, k, v = projected(cache, 3, 1)
    rows = torch.tensor([[0, 0, 32], [-1, 0, 16], [-1, 0, 16]], dtype=torch.int32).T.contiguous().numpy()
    table = np.array([[[2]]], dtype=np.int32)
    out = cache.attention(q, k, v, Contexts(rows[0], rows[1], rows[2:], table))
    assert not out[1:].any()
    own = kept(v).to(torch.bfloat16) if eight else v
    assert torch.equal(out[0], own[:, 0].repeat_interleave(2, 0))
    assert cache.tensors[0].ne(0).sum((0, 2)).nonzero().flatten().tolist() == [16, 32]


@pytest.mark.parametrize(("splits", "among"), [(1, 1), (2, 2)])
def test_padding_of_a_captured_step_gives_zeros_and_changes_no_row(
    kernels: CudaKernels, splits: int, among: int
) -> None:
    """Also of a layer whose blocks are in the second of two tables."""
    cache = Cache(kernels, 2, 2, 64, 16, among=among)
    q, k, v = projected(cache, 4, 1)
    own, block = among - 1, 2 * cache.stride
    padding = [16 * cache.stride] * among
    step = cuda.FixedStep(cuda.StepSize(4, splits, 0, 0), 1, 16, padding, torch.device("cpu"))
    none = np.zeros(1, dtype=np.int32)
    tables = np.zeros((among, 1, 1), dtype=np.int32)
    tables[own] = block
    step.load_step(np.zeros(1), Contexts(none, none, tables[:, 0] * 16, tables), NOBODY)
    out = cache.attention(q, k, v, step.contexts)
    assert not out[1:].any()
    assert torch.equal(out[0], v[:, 0].repeat_interleave(2, 0))
    written = cache.tensors[0][0].ne(0).any(-1).nonzero().flatten().tolist()
    # With other layers' blocks in the same memory, the second head's slots follow.
    heads = range(0, 16 * among, 16)
    assert written == [first + head for first in (padding[own], 16 * block) for head in heads]


@pytest.mark.parametrize(
    ("splits", "most"), [(1, 1000), pytest.param(3, 1000, marks=pytest.mark.full), (3, 30)]
)
def test_rows_of_a_prompt_attend_together_in_a_captured_step_for_the_same_bits(
    kernels: CudaKernels, monkeypatch: pytest.MonkeyPatch, splits: int, most: int
) -> None:
    """A decode, a chunk, another decode and padding; `most` rows times splits at once."""
    cache, rows, device = Cache(kernels, 1, 4, 64, 16), 24, torch.device("cpu")
    for number, tensor in enumerate(cache.tensors):
        tensor.copy_(random(*tensor.shape, seed=number))
    far = 128 * (splits - 1)
    segments = [(0, far + 90, 1), (1, far + 3, 17), (2, 5, 1)]
    tables = np.zeros((1, len(segments), -(-(far + 128) // 16)), dtype=np.int32)
    for number, start, count in segments:
        blocks = cache.context(start + count)
        tables[0, number, : len(blocks)] = blocks
    context = np.concatenate([np.full(count, number, dtype=np.int32) for number, _, count in segments])
    position = np.concatenate([np.arange(start, start + n, dtype=np.int32) for _, start, n in segments])
    write = tables[0, context, position // 16] * 16 + position % 16
    q, k, v = projected(cache, rows, 1)
    used = len(position)
    own = Contexts(position, context, write[None], tables)
    wanted = cache.attention(q[:, :used], k[:, :used], v[:, :used], own)
    step = cuda.FixedStep(cuda.StepSize(rows, splits, 0, 0), 1, 16, [16], device, tile_rows=cuda.tile_rows(4))
    step.load_step(np.zeros(used), Contexts(position, context, write[None], tables), NOBODY)
    tiles = step.contexts.held[cuda.FIXED].tiles.view(-1, 3)
    assert tiles[:, 1].tolist() == [1, 15, *[-1] * 14, 2, -1, 1, *[0] * 5]
    monkeypatch.setattr(cuda, "SCRATCH", most * cache.heads * (cache.dim + 2) * 4)
    got = cache.attention(q, k, v, step.contexts)
    assert torch.equal(got[:used], wanted)
    assert not got[used:].any()
    alone = cuda.FixedStep(cuda.StepSize(rows, splits, 0, 0), 1, 16, [16], device)
    alone.load_step(np.zeros(used), Contexts(position, context, write[None], tables), NOBODY)
    assert torch.equal(cache.attention(q, k, v, alone.contexts), got)


def test_tiles_of_a_captured_step_are_those_for_which_every_layer_has_room(kernels: CudaKernels) -> None:
    cache = Cache(kernels, 1, 4, 64, 16)
    q, k, v = projected(cache, 4, 1)
    step = cuda.FixedStep(cuda.StepSize(4, 1, 0, 0), 1, 16, [16], torch.device("cpu"), cuda.tile_rows(2))
    step.clear()
    with pytest.raises(cuda.CaptureError, match="4 heads share keys"):
        cache.attention(q, k, v, step.contexts)


def test_what_is_captured_for_short_contexts_serves_no_longer_ones(
    kernels: CudaKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are divided at once; and rows give the bits that they give without a graph, or next to a
    longer one."""
    monkeypatch.setattr(kernels, "capture", triton_on_cpu.Capture().of)
    cache = Cache(kernels, 1, 3, 24, 16)
    for number, tensor in enumerate(cache.tensors):
        tensor.copy_(random(*tensor.shape, seed=number))
    q, k, v = projected(cache, 2, 1)
    table = np.array([cache.context(140), cache.context(140)], dtype=np.int32)

    def attended(contexts: Contexts) -> torch.Tensor:
        return cache.attention(q, k, v, contexts).flatten(1)

    def step(length: int, other: int = 9) -> StepBatch:
        position, row = np.array([length - 1, other - 1], dtype=np.int32), np.arange(2, dtype=np.int32)
        write = table[row, position // 16] * 16 + position % 16
        none, ids = np.zeros(0, dtype=np.int64), row.astype(np.int64)
        contexts = Contexts(position, row, write[None], table[None])
        return StepBatch(ids, position.astype(np.int64), ids, contexts, NOBODY, NOBODY, [], [], none, [])

    found = graphs.Graphs(
        lambda fixed: (attended(fixed.contexts),) * 2, kernels, 2, 16, [16], torch.device("cpu")
    )
    replayed = []
    for length in (100, 100, 128, 129, 129, 140, 60):
        got = found.run_graph(step(length))
        replayed.append(got is not None)
        if got is not None:
            assert torch.equal(got[0], attended(step(length).contexts)), length
    assert replayed == [False, True, True, False, True, True, True]
    at_once, merged = (attended(step(128, other).contexts) for other in (9, 129))
    assert torch.equal(at_once[0], merged[0])


@pytest.mark.parametrize("length", [20, 140])
def test_scores_that_are_no_numbers_give_none_and_change_no_other_context(
    kernels: CudaKernels, length: int
) -> None:
    """Of an adapter that overflows: its row is to end with an error, not with another text. In one split of
    keys, and in two."""
    sound, whole = projected(Cache(kernels, 1, 2, 16, 16), length, 1), []
    for wrong in (0.0, torch.inf, torch.nan):
        cache = Cache(kernels, 1, 2, 16, 16)
        q, k, v = (torch.cat([one[:, -1:], one], 1) for one in sound)
        q[:, 0], k[:, 0] = 1.0, 1.0 - wrong
        out = cache.run([(cache.context(1), 0, 1), (cache.context(length), 0, length)], q, k, v)
        assert bool(out[0].isnan().all()) == (wrong != 0)
        whole.append(out[1:])
    assert torch.equal(whole[0], whole[1])
    assert torch.equal(whole[0], whole[2])


# ---- norms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [48, 576, 1024])
def test_a_norm_is_that_of_the_base_in_both_ways_of_rounding(kernels: CudaKernels, size: int) -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for base in (LlamaRMSNorm(size, 1e-5), Gemma2RMSNorm(size, 1e-5)):
        base = base.to(torch.bfloat16).requires_grad_(False)
        base.weight.data = random(size, seed=3).to(torch.bfloat16)
        norm = kernels.norm(base)
        assert norm is not base
        x = (random(7, size, seed=size) * 10).to(torch.bfloat16)
        torch.testing.assert_close(norm(x), base(x), rtol=EPS, atol=0)
        assert torch.equal(norm(x[3:4]), norm(x)[3:4])


@pytest.mark.parametrize("size", [32, 80])
def test_a_norm_that_is_trained_through_has_the_gradient_of_the_bases(
    kernels: CudaKernels, size: int
) -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for base in (LlamaRMSNorm(size, 1e-5), Gemma2RMSNorm(size, 1e-5)):
        exact = copy.deepcopy(base).requires_grad_(False)
        exact.weight.data = random(size, seed=3).to(torch.bfloat16).float()
        base = base.to(torch.bfloat16).requires_grad_(False)
        base.weight.data = exact.weight.data.to(torch.bfloat16)
        norm = cuda_training.trained_norm(base)
        assert norm is not None
        x = (random(3, 7, size, seed=size) * 10).to(torch.bfloat16).requires_grad_()
        gradient = random(3, 7, size, seed=5).to(torch.bfloat16)
        y = norm(x)
        torch.testing.assert_close(y, base(x), rtol=EPS, atol=0)
        (got,) = torch.autograd.grad(y, x, gradient)
        (wanted,) = torch.autograd.grad(exact(x.float()), x, gradient.float())
        torch.testing.assert_close(got, wanted, rtol=EPS, atol=1e-3 * float(wanted.abs().max()))
        wide = x.detach().float()
        assert torch.equal(norm(wide), base(wide))
        base.weight.requires_grad_()
        assert cuda_training.trained_norm(base) is None


def exactly(turn: Any, given: list[torch.Tensor], gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """In fp64, the results and the gradients at all of `given` of which they are wanted."""
    wide = [one.detach().double().requires_grad_(one.requires_grad) for one in given]
    results = turn(*wide)
    wanted = [one for one in wide if one.requires_grad]
    return [*results, *torch.autograd.grad(results, wanted, [one.double() for one in gradients])]


@pytest.mark.parametrize(("heads", "shared", "size", "tokens"), [(3, 1, 6, 5), (20, 2, 32, 2), (1, 1, 80, 1)])
def test_queries_and_keys_are_turned_with_gradients_as_the_base_turns_them(
    heads: int, shared: int, size: int, tokens: int
) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    turned = cuda_training.trained_rotation(apply_rotary_pos_emb, torch.device("cpu"))
    assert turned is not None
    # As a projection's outputs lie in memory; and gradients as attention gives them, or a sum.
    q, k = (
        random(1, tokens, count, size, seed=count).to(torch.bfloat16).transpose(1, 2).requires_grad_()
        for count in (heads, shared)
    )
    cos, sin = (random(1, tokens, size, seed=seed).to(torch.bfloat16) for seed in (8, 9))
    gradients = [random(1, heads, tokens, size).to(torch.bfloat16), torch.ones((), dtype=torch.bfloat16)]
    gradients[1] = gradients[1].expand(1, shared, tokens, size)
    results = turned(q, k, cos, sin)
    assert all(map(torch.equal, results, apply_rotary_pos_emb(q, k, cos, sin)))
    got = [*results, *torch.autograd.grad(results, (q, k), gradients)]
    wanted = exactly(apply_rotary_pos_emb, [q, k, cos, sin], gradients)
    for ours, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=EPS, atol=4 * EPS)
    two = torch.cat([q, q]), torch.cat([k, k])
    for other in ((*two, cos, sin), (q.float(), k.float(), cos.float(), sin.float())):
        assert all(map(torch.equal, turned(*other), apply_rotary_pos_emb(*other)))


@pytest.mark.parametrize("shape", [(1,), (3, 50, 7), (2, 1024)])
def test_a_gate_has_the_gradients_of_pytorchs(shape: tuple[int, ...]) -> None:
    def own(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(gate) * up

    gated = cuda_training.trained_gate(own, torch.device("cpu"))
    assert gated is not None
    gate, up = ((20 * random(*shape, seed=seed)).to(torch.bfloat16).requires_grad_() for seed in (1, 2))
    gradient = random(*shape, seed=3).to(torch.bfloat16)
    y = gated(gate, up)
    assert len(getattr(y.grad_fn, "saved_tensors")) == 2  # noqa: B009 (mypy does not know it)
    got = [y, *torch.autograd.grad(y, (gate, up), gradient)]
    wanted = exactly(lambda *given: [own(*given)], [gate, up], [gradient])
    for ours, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2 * EPS, atol=1e-6)
    far = torch.tensor([-1e30, 1e30, -90.0, 0.0]).to(torch.bfloat16).requires_grad_()
    (slopes,) = torch.autograd.grad(gated(far, torch.ones_like(far)), far, torch.ones_like(far))
    assert slopes.tolist() == [0.0, 1.0, 0.0, 0.5]
    wide = gate.detach().float(), up.detach().float()
    assert torch.equal(gated(*wide), own(*wide))
    turned = gate.detach().transpose(0, -1), up.detach().transpose(0, -1)
    torch.testing.assert_close(gated(*turned), own(*turned), rtol=EPS, atol=0)


def test_other_gates_and_rotations_are_left_to_pytorch() -> None:
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb

    device = torch.device("cpu")
    assert cuda_training.trained_rotation(apply_rotary_pos_emb, device) is None
    assert cuda_training.trained_gate(lambda gate, up: nn.functional.gelu(gate) * up, device) is None
    assert cuda_training.trained_gate(lambda gate, up: nn.functional.silu(up) * gate, device) is None


def test_norms_that_compute_something_else_are_left_to_pytorch(kernels: CudaKernels) -> None:
    layer = nn.LayerNorm(64, dtype=torch.bfloat16)
    assert kernels.norm(layer) is layer
    assert cuda_training.trained_norm(layer) is None


def test_rows_of_another_width_than_an_unused_weight_are_normed_by_the_base(kernels: CudaKernels) -> None:
    from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaWeightlessRMSNorm

    base = FalconMambaWeightlessRMSNorm(128, 1e-6).to(torch.bfloat16)
    trained = cuda_training.trained_norm(base)
    assert trained is not None
    for norm in (kernels.norm(base), trained):
        x = random(3, 64).to(torch.bfloat16)
        assert torch.equal(norm(x), base(x))


@pytest.mark.parametrize("architecture", ["qwen3", pytest.param("gemma3", marks=pytest.mark.full)])
def test_norms_of_heads_are_a_kernels_too(kernels: CudaKernels, tmp_path: Path, architecture: str) -> None:
    """PyTorch's on a GPU adds up a few heads in another order than many."""
    folder = save_base(architecture, tmp_path)
    base = load_base(BaseSettings(folder, quantization="none"))
    tree: Any = view(base)
    wrap_layers(tree, StepRows(), kernels, slots=1)
    for name in ("q_norm", "k_norm"):
        own, served = (getattr(one.model.layers[0].self_attn, name) for one in (base, tree))
        x = random(5, 4, 32).to(torch.bfloat16)[None]
        torch.testing.assert_close(served(x), own(x), rtol=EPS, atol=0)
        assert torch.equal(served(x[:, 2:3]), served(x)[:, 2:3])
        assert type(served).__name__ == "HeadNorm"


def test_layers_that_triton_does_not_have_are_left_to_pytorch(kernels: CudaKernels) -> None:
    for layer in (nn.Linear(64, 8), nn.Linear(48, 8, dtype=torch.bfloat16)):
        assert isinstance(kernels.linear(layer, 1), ReferenceLinear)


# ---- recurrent layers --------------------------------------------------------------------------


@settings(max_examples=25)
@given(layer=recurrent_layers.layers(small=True), step=recurrent_layers.steps())
def test_a_recurrent_layer_is_that_of_the_reference_and_writes_no_other_state(
    kernels: CudaKernels, layer: recurrent_layers.Layer, step: recurrent_layers.Step
) -> None:
    recurrent_layers.agrees(kernels, layer, step)


@pytest.mark.parametrize("bias", [False, True])
def test_recurrent_layers_of_the_sizes_of_models_are_those_of_the_reference(
    kernels: CudaKernels, bias: bool
) -> None:
    step = recurrent_layers.Step([2, 1], [True, False], [True, True], 1)
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    for layer in (
        recurrent_layers.Convolution(4, 600, 4, bias=bias, weight=torch.bfloat16, **options),
        recurrent_layers.DeltaRule(4, (1, 2), (128, 128), by_key=bias, normalized=True, **options),
        recurrent_layers.StateSpace(4, (1, 2), 64, 128, by_size=False, skip=bias, **options),
        recurrent_layers.StateSpace(4, (1, 300), 1, 16, by_size=True, skip=bias, **options),
    ):
        recurrent_layers.agrees(kernels, layer, step)


@settings(max_examples=25)
@given(layer=recurrent_layers.layers(small=True), cut=recurrent_layers.cuts())
def test_a_recurrent_layer_gives_a_row_the_same_bits_wherever_its_text_is_cut_and_beside_any_other(
    kernels: CudaKernels, layer: recurrent_layers.Layer, cut: tuple[list[list[int]], list[int]]
) -> None:
    texts, ends = cut
    pieces = recurrent_layers.in_pieces(kernels, layer, texts, ends)
    for text, (got, state) in zip(texts, pieces, strict=True):
        [(expected, behind)] = recurrent_layers.in_pieces(kernels, layer, [text], [len(text)])
        assert torch.equal(got, expected)
        assert torch.equal(state, behind)


@settings(max_examples=25)
@given(
    layer=recurrent_layers.layers(small=True),
    step=recurrent_layers.steps(),
    wrong=st.lists(st.integers(0, 8), min_size=4, max_size=4),
)
def test_wrong_rows_of_drafts_are_taken_out_of_states_to_the_bit(
    kernels: CudaKernels, layer: recurrent_layers.Layer, step: recurrent_layers.Step, wrong: list[int]
) -> None:
    assert recurrent_layers.is_rewound(kernels, layer, step, wrong)


# ---- the base's bytes --------------------------------------------------------------------------


def test_the_sum_over_the_base_sees_every_byte_and_words_that_change_places(
    kernels: CudaKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "SUMMED_BYTES", 1 << 12)
    whole = torch.arange(2000, dtype=torch.int64)
    odd = torch.arange(99, dtype=torch.uint8)[3:]  # begins and ends anywhere
    watch = kernels.content_sum([whole, odd, whole[:0]], torch.device("cpu"))

    def summed() -> int | None:
        assert len(list(watch.begin())) > 1, "it is made in slices"
        return watch.take()

    before = summed()
    assert summed() == before
    for place in (0, 511, 512, 1999):
        for bit in (0, 62):
            whole[place] ^= 1 << bit
            assert summed() != before, (place, bit)
            whole[place] ^= 1 << bit
    for place in (0, 5, 50, 95):
        odd[place] ^= 128
        assert summed() != before, place
        odd[place] ^= 128
    for first, second in ((0, 1), (3, 1900), (511, 512)):
        whole[[first, second]] = whole[[second, first]]
        assert summed() != before, (first, second)
        whole[[first, second]] = whole[[second, first]]
    assert summed() == before


# ---- the trial at a start ----------------------------------------------------------------------


def test_kernels_that_pass_their_trial_are_taken() -> None:
    cuda.load_kernels.cache_clear()
    assert isinstance(cuda.load_kernels(torch.device("cpu")), CudaKernels)


@pytest.mark.parametrize("error", [KeyError("specialization_data"), RuntimeError("out of resources")])
def test_kernels_that_cannot_be_compiled_ahead_of_their_trial_are_tried_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fails(*given: Any) -> None:
        raise error

    @contextmanager
    def collecting() -> Iterator[list[Any]]:
        yield []

    monkeypatch.setattr(CudaKernels, "compiles", True)
    monkeypatch.setattr(cuda, "collecting", collecting)
    monkeypatch.setattr(cuda, "compile_forms", fails)
    cuda.load_kernels.cache_clear()
    assert isinstance(cuda.load_kernels(torch.device("cpu")), CudaKernels)
    assert "not compiled ahead" in caplog.text
    cuda.load_kernels.cache_clear()


def test_compiled_kernels_are_loaded_onto_the_device_of_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not onto the first one, with a base on the second."""
    current, loaded = [0], list[int]()

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        before = current[0]
        current[0] = wanted.index
        yield
        current[0] = before

    class Compiled:
        @property
        def run(self) -> None:
            loaded.append(current[0])

    monkeypatch.setattr(torch.cuda, "set_device", lambda wanted: None)  # of other threads
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(cuda.Form, "compiled", lambda form: Compiled())
    form = cuda.Form(None, "one", "key", "{}")
    cuda.compile_forms([form, form], torch.device("cuda", 1), threads=2)
    assert loaded == [1, 1]
    assert current == [0]


def test_a_start_goes_on_where_forms_cannot_be_compiled_ahead(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*given: Any) -> None:
        raise KeyError("specialization_data")

    monkeypatch.setattr(forms, "wanted_forms", fails)
    forms.compile_kernels(MagicMock())
    assert "compiled while sequences run" in caplog.text


@pytest.mark.parametrize(
    "fault",
    [
        "a rank is dropped",
        "a scale is another",
        "a compiler fails",
        "sums of a form end otherwise",
        "a split is lost",
        "a captured chunk is off",
    ],
)
def test_kernels_that_fail_their_trial_are_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    if fault == "a rank is dropped":
        whole = CudaLinear.put
        monkeypatch.setattr(
            CudaLinear,
            "put",
            lambda self, slot, one: whole(
                self, slot, LoraWeights(one.a, one.b * (torch.arange(17) < 16), one.scale)
            ),
        )
    elif fault == "sums of a form end otherwise":
        products = CudaLayers.products

        def off(self: CudaLayers, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            told, sums = products(self, x)
            # Of so little, rounded to bf16, nothing is seen.
            return told, sums * (1 + 2.0**-23) if 16 < len(x) <= 64 else sums

        monkeypatch.setattr(CudaLayers, "products", off)
    elif fault == "a captured chunk is off":
        tiles = cuda.FixedStep._write_tiles

        def off_by_one(self: cuda.FixedStep, to: np.ndarray, *given: np.ndarray) -> None:
            tiles(self, to, *given)
            to[1:, 1] -= to[1:, 1] > 1  # the last row of each tile but the first

        monkeypatch.setattr(cuda.FixedStep, "_write_tiles", off_by_one)
    elif fault == "a split is lost":
        whole_step = cuda._step_of
        monkeypatch.setattr(
            cuda,
            "_step_of",
            lambda *given: replace(step := whole_step(*given), splits=[1] * len(step.splits)),
        )
    elif fault == "a scale is another":
        monkeypatch.setattr(cuda, "plain_absmax", lambda state: plain_absmax(state) * 1.1)
    else:
        monkeypatch.setattr(cuda, "_products", None)
    cuda.load_kernels.cache_clear()
    assert cuda.load_kernels(torch.device("cpu")) is None
    assert "kernels: PyTorch, since Triton's" in caplog.text


@pytest.mark.parametrize("raises", [False, True])
def test_weights_are_unpacked_the_usual_way_where_the_other_one_fails_the_trial(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, raises: bool
) -> None:
    tried = list[CudaKernels]()

    def differing(kernels: CudaKernels, *given: Any, **named: Any) -> str | None:
        if not kernels.switches.permuted:
            return None
        if raises:
            raise RuntimeError("ptxas fails")
        return "row 0 of 65"

    monkeypatch.setenv("ONEBASE_KERNELS_UNPACK", "permute")
    monkeypatch.setattr(CudaKernels, "compiles", True)
    monkeypatch.setattr(cuda, "_compile_trial", lambda kernels, device: tried.append(kernels))
    monkeypatch.setattr(cuda, "_differing", differing)
    found = cuda.load_kernels.__wrapped__(torch.device("cpu"))
    assert found is tried[-1]
    assert [one.unpacking for one in tried] == [cuda.PERMUTED.value, cuda.GATHERED.value], (
        "each with its forms"
    )
    assert CudaKernels(cuda.usual_switches()).switches.permuted, "a trial that fails is of its own kernels"
    said = "what is computed, since it fails: ptxas fails" if raises else "row 0 of 65"
    assert f"weights are not unpacked in registers, which changes {said}" in caplog.text


def test_a_trial_is_of_the_kernels_though_a_library_multiplies_many_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "TRIAL_ROWS", (1, 24))
    monkeypatch.setattr(cuda, "UNPACKED_ROWS", 20)
    monkeypatch.setattr(cuda, "LIBRARY_ROWS", 32)
    products = CudaLayers.products

    def off(self: CudaLayers, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        told, sums = products(self, x)
        return told, sums * (1 + 2.0**-23) if len(x) == 24 and not self.by_library else sums

    monkeypatch.setattr(CudaLayers, "products", off)
    wrong = cuda._differing(library_on_cpu(monkeypatch, in_order), torch.device("cpu"))
    assert wrong == "row 0 of 24 without its neighbours, in bf16"


@pytest.mark.parametrize("vocabulary", [7, 320, 4500])
def test_samples_are_those_that_pytorch_takes(kernels: CudaKernels, vocabulary: int) -> None:
    """To the token: with ties, at both ends, and where all that is left is the most likely token."""
    rows = 12
    logits = [(random(vocabulary, seed=seed) * 4).to(torch.bfloat16) for seed in range(rows)]
    draws = Draws(
        np.array([0.0, *[0.3, 1.0, 2.0] * 4][:rows], dtype=np.float32),
        np.array([0, 0, 0, 5] * 3, dtype=np.int64),
        np.array([1.0, 1e-6, 0.5, 0.9, 0.999, 1.0] * 2, dtype=np.float32),
        np.array([0.0] * 8 + [0.02] * 4, dtype=np.float32),
        np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1 - 2**-53] * 2),
    )
    allowed: list[np.ndarray | None] = [None] * rows
    allowed[5] = np.full(-(-vocabulary // 32), 0b101, dtype=np.int32)
    wanted = ReferenceKernels(tiled=False).draw(logits, draws, allowed)()
    assert kernels.draw(logits, draws, allowed)() == wanted
    assert len(set(wanted)) > 3
    alone = replace(draws, **{name: value[4:5] for name, value in vars(draws).items()})
    assert kernels.draw(logits[4:5], alone, [None])() == wanted[4:5]


def test_pytorch_draws_where_the_kernel_draws_other_tokens(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda, "whole_factor", lambda vocabulary: 4.0)
    cuda.load_kernels.cache_clear()
    found = cuda.load_kernels(torch.device("cpu"))
    assert found is not None
    assert type(found._reference) is ReferenceKernels
    assert "PyTorch draws tokens" in caplog.text


# ---- compiled for GPUs that are not here -----------------------------------------------------------


def compiling(program: str, *arguments: str) -> Any:
    """Run a program of this folder that compiles kernels, and return what it prints at its end.

    ONEBASE_TEST_TRITON may name the folder of another Triton.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.environ.get("ONEBASE_TEST_TRITON"), Path(__file__).parents[2], Path(cuda.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(program)), *arguments],
        env=environment | {"PYTHONPATH": os.pathsep.join(str(path) for path in paths if path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def triton_version() -> tuple[int, ...]:
    """The first two numbers of the version of the Triton that compiles here."""
    folder = os.environ.get("ONEBASE_TEST_TRITON")
    source = Path(folder, "triton", "__init__.py") if folder else Path(triton.__file__)
    found = re.search(r"__version__ = ['\"](\d+)\.(\d+)", source.read_text())
    assert found is not None
    return tuple(map(int, found.groups()))


@pytest.mark.parametrize(
    ("capability", "dot"),
    [
        (90, "wgmma.mma_async"),
        *(pytest.param(one, "mma.sync", marks=pytest.mark.full) for one in (80, 86, 89, 120)),
    ],
)
def test_all_of_them_compile_for_a_gpu_and_read_weights_by_sixteen_bytes(capability: int, dot: str) -> None:
    report = compiling("triton_compiled.py", str(capability))
    assert len(report) == 58
    for name, used in report.items():
        assert used["shared"] < (227 if capability == 90 else 99) << 10, name
        # Bytes of a thread: heads of 512 spill registers everywhere, a cache in int8 on 12.0.
        spills = "KEY_SIZE=512" in name or ("EIGHT=True" in name and capability == 120)
        assert used["stack"] <= (320 if spills else 128), name
        # A program waits for as many loads at once, a piece of a row in four iterations.
        assert not name.startswith("_shrink") or used["ld.global.v4.b32"] >= 12, used
        bytewise = any(word.startswith("ld.global") and word.endswith("b8") for word in used)
        assert not bytewise or name.startswith("_sum_bytes"), (name, used)
        if name.startswith(("_products", "_expert_products", "_attend")):
            assert any(word.startswith(dot) for word in used), (name, used)
            # Of large heads by plain loads, since buffers of several stages would not fit.
            large = any(f"KEY_SIZE={size}" in name for size in (256, 512))
            wide = "ld.global.v4" if large else "cp.async.cg"
            assert any(word.startswith(wide) for word in used), (name, used)
    # The order of terms within an instruction. Did it differ, so would bits of steps of few and many rows.
    # With Triton before 3.9 it does on cards before Hopper if weights are unpacked in registers, which nobody
    # has asked for: the trial at a start finds it.
    other = capability < 90 and triton_version() < (3, 9)
    orders = {
        tuple(word for word in used if word.startswith("kWidth"))
        for name, used in report.items()
        if name.startswith(("_products", "_expert_products")) and not (other and "NF4=2" in name)
    }
    assert orders == ({("kWidth = 2",)} if dot == "mma.sync" else {("kWidth = 2",), ()})


@pytest.mark.parametrize(
    ("architecture", "own"),
    [
        ("llama", {"_shrink", "_finish"}),
        ("mixtral", {"_expert_products"}),
        *(
            pytest.param(name, own, marks=pytest.mark.full)
            for name, own in (
                ("gemma3", set()),
                ("gpt_oss", set()),
                ("qwen3_5", {"_delta", "_convolve"}),
                ("granite_h", {"_scan"}),
            )
        ),
    ],
)
def test_no_step_asks_for_a_form_that_was_not_compiled_at_the_start(
    tmp_path: Path, architecture: str, own: set[str]
) -> None:
    """Of any number of rows, ranks and adapters, in short and long contexts; nothing is launched here."""
    report = compiling("triton_forms.py", str(tmp_path), architecture)
    assert not [one for one in report["asked"] if one not in report["wanted"]]
    assert {name for name, _ in report["asked"]} >= {"_products", "_attend", "_merge", *own}
    assert "_take_sample" in {name for name, _ in report["wanted"]}
    assert len(report["wanted"]) <= 32, report["count"]


# ---- in the engine -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Of one layer: under the interpreter each takes its time."""
    folder = tmp_path_factory.mktemp("lab")
    base = save_base("llama", folder / "base", layers=1)
    return Lab.create(load_base(BaseSettings(base, quantization="nf4")), folder)


@pytest.fixture
def quick_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of a model on few rows."""
    monkeypatch.setattr(model, "TILE", 4)
    monkeypatch.setattr(fusion, "_PASSES", ((0, 4), (1, 4)))  # others would be padding


class Launches(TorchDispatchMode):  # type: ignore[misc, no-untyped-call]
    """Counts what would be launched on a GPU, while a module's forward runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.counted: Counter[str] = Counter()
        """Of the last time that it ran."""
        triton_on_cpu.tell(monkeypatch, self.names.append)
        whole = module.forward

        def forward(*args: Any, **named: Any) -> Any:
            self.names.clear()
            with self:
                result = whole(*args, **named)
            self.counted = Counter(self.names)
            return result

        monkeypatch.setattr(module, "forward", forward)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.full
@pytest.mark.usefixtures("quick_trials")
def test_an_engine_serves_texts_of_peft_the_same_bits_in_any_company_and_few_launches_a_layer(
    kernels: CudaKernels, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = ServedModel(lab.base, 4, kernels=kernels)
    engine = lab.engine(model=served, slots=4)
    launches = Launches(monkeypatch, served._view.model.layers[0])
    first, second = requests(2, seed=3, longest=8, tokens=3)
    asked = [replace(first, adapter=2, at=0), replace(second, adapter=1, at=1)]
    together = run(engine, asked)
    assert not lab.disagreements(asked, together)
    assert launches.counted["_products"] == 4, "q, k and v are one call, gate and up another"
    assert launches.counted.total() <= 16, launches.counted
    assert not any("add" in name for name in launches.counted), "sums are parts of products"
    # A layer that fails leaves nothing to be added to the next one's rows.
    layer = served._view.model.layers[0]
    with pytest.raises(TypeError):
        layer(torch.zeros(1, 1, 128, dtype=torch.bfloat16), position_embeddings=None)
    assert layer.self_attn.o_proj.onto is layer.mlp.down_proj.onto is None
    alone = lab.engine(model=ServedModel(lab.base, 4, kernels=kernels), slots=4, step_tokens=5)
    assert run(alone, asked[:1]) == together[:1]
    # Numbers of bf16 are kept in it.
    bf16 = {
        name: replace(one, a=one.a.bfloat16().float(), b=one.b.bfloat16().float())
        for name, one in lab.weights[2].items()
        if isinstance(one, LoraWeights)
    }
    kept = served.kept(bf16)
    assert 2 * weights_bytes(kept) == weights_bytes(bf16)
    for number, weights in ((90, bf16), (91, kept)):
        engine.put_adapter(f"digest{number}", weights)
    whole, half = (run(engine, [replace(first, adapter=number, at=0)]) for number in (90, 91))
    assert whole == half


@pytest.mark.full
@pytest.mark.usefixtures("quick_trials")
@pytest.mark.parametrize("name", ["joined", "gated", "sums", "turned"])
def test_a_fusion_that_is_switched_off_is_left_out_and_no_other(lab: Lab, name: str) -> None:
    served = ServedModel(lab.base, 1, kernels=CudaKernels(Switches(**{name: False})))
    served.allocate_kv(RESERVED_BLOCKS + 2, 16)
    layer = served._view.model.layers[0]
    fused = {
        "joined": layer.self_attn.q_proj.shared is not None,
        "gated": "forward" in vars(layer.mlp),
        "sums": "forward" in vars(layer),
        "turned": "forward" in vars(layer.self_attn),
    }
    assert [one for one, on in fused.items() if not on] == [name]


def test_switches_of_captures_drafts_planning_and_matrices_in_bf16_are_the_back_ends() -> None:
    kernels = CudaKernels(Switches(drafts=False, ahead=False, narrow=False, tiles=False))
    assert (kernels.drafts, kernels.asynchronous, kernels.narrows) == (False, False, False)
    tiles = [
        graphs.Graphs(MagicMock(), one, 2, 16, [16], torch.device("cpu"), tile_rows=8)._tile_rows
        for one in (CudaKernels(), kernels)
    ]
    assert tiles == [8, 1]


@pytest.mark.full
@pytest.mark.usefixtures("quick_trials")
def test_an_activated_lora_uses_the_bases_blocks_and_changes_no_bit_of_them(
    kernels: CudaKernels, lab: Lab
) -> None:
    (activated,) = (n for n, one in enumerate(ADAPTERS) if "alora_invocation_tokens" in one)
    text = tuple(range(100, 117))
    prompt = (*text, *INVOCATION, 9)

    def engine(**changes: int) -> Engine:
        return lab.engine(model=ServedModel(lab.base, 4, kernels=kernels), slots=4, **changes)

    asked = Request(prompt, activated, 2), Request(prompt, None, 2)
    fresh, bare = (run(engine(), [one]) for one in asked)
    assert fresh != bare
    assert not lab.disagreements(asked, [*fresh, *bare])
    together = engine(step_tokens=7)
    assert run(together, [replace(asked[1], at=0), replace(asked[0], at=1)]) == [*bare, *fresh]
    for one, expected in ((asked[0], fresh), (asked[1], bare)):
        before = together.counters.cached_tokens
        assert run(together, [one]) == expected
        assert together.counters.cached_tokens - before == 16
    before = together.counters.cached_tokens
    assert run(together, [replace(asked[0], tenant="other")]) == fresh
    assert together.counters.cached_tokens == before, "blocks stay with their tenant"


@pytest.mark.full
@pytest.mark.usefixtures("quick_trials")
def test_adapters_act_on_an_int8_base_though_its_passes_are_captured(
    kernels: CudaKernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch computes them, of which a graph knows nothing."""
    folder = save_base("llama", tmp_path / "base", layers=1)
    lab = Lab.create(load_base(BaseSettings(folder, quantization="int8")), tmp_path)
    asked = [Request((5, 9, 7), 2, 4), Request((3, 4), None, 3), Request((8,), None, 5, at=5)]
    one_by_one = run(lab.engine(model=ServedModel(lab.base, 4, kernels=kernels), slots=4), asked)
    monkeypatch.setattr(kernels, "captures", True)
    monkeypatch.setattr(kernels, "capture", triton_on_cpu.Capture().of)
    served = ServedModel(lab.base, 4, kernels=kernels)
    engine, replayed = lab.engine(model=served, slots=4), Counter[bool]()
    whole = served._graphs.run_graph
    monkeypatch.setattr(served._graphs, "run_graph", lambda batch: _counted(whole(batch), replayed))
    assert run(engine, asked) == one_by_one
    assert replayed[True], "rows of the base are no graphs either"


@pytest.mark.full
@pytest.mark.usefixtures("quick_trials")
def test_a_captured_pass_gives_other_steps_the_bits_that_they_have_launched_one_by_one(
    kernels: CudaKernels, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other rows, adapters and contexts than those that it was captured with."""
    asked = [Request((5, 9, 7), 1, 3), Request((8,), None, 3), Request((3, 4, 6, 11), 3, 3, at=1)]
    plain = lab.engine(model=ServedModel(lab.base, 4, kernels=kernels), slots=4)
    one_by_one = run(plain, asked)
    monkeypatch.setattr(kernels, "captures", True)
    monkeypatch.setattr(kernels, "capture", triton_on_cpu.Capture().of)
    monkeypatch.setattr(graphs, "ROWS", (6,))
    served = ServedModel(lab.base, 4, kernels=kernels)
    engine, replayed = lab.engine(model=served, slots=4), Counter[bool]()
    whole = served._graphs.run_graph
    monkeypatch.setattr(served._graphs, "run_graph", lambda batch: _counted(whole(batch), replayed))
    assert run(engine, asked) == one_by_one
    assert None not in served._graphs._graphs.values()
    assert replayed[True] > len(served._graphs._graphs), replayed
    replayed.clear()
    run(engine, [Request((5,), 8, 2)])
    assert not replayed[True], "it acts outside the kernels"


@pytest.mark.full
@pytest.mark.usefixtures("quick_trials")
def test_passes_are_captured_before_the_first_request_and_none_is_by_it(
    kernels: CudaKernels, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "captures", True)
    monkeypatch.setattr(kernels, "capture", triton_on_cpu.Capture().of)
    monkeypatch.setattr(graphs, "ROWS", (1, 2))
    monkeypatch.setattr(forms, "CAPTURED_LENGTHS", 2)
    monkeypatch.setattr(cuda, "SPLIT", triton_on_cpu.constant(64))
    engine = lab.engine(model=ServedModel(lab.base, 4, kernels=kernels), slots=4)
    forms.capture_steps(engine)
    captured = dict(engine.model._graphs._graphs)
    rows = {(1, 0), (2, 0), (1, 1), (2, 2)}
    assert {(size.rows, size.terms, size.splits) for size in captured} == {
        (*one, splits) for one in rows for splits in (1, 4)
    }
    order = [(size.splits, size.terms > 0) for size in captured]
    assert list(dict.fromkeys(order)) == [(1, True), (1, False), (4, True), (4, False)]
    assert None not in captured.values()
    assert forms._ANY not in engine.versions.weights
    # Adapters of two ranks; contexts that become longer than those of a capture.
    asked = [
        Request((5, 9, 7), None, 3),
        Request((8,), 1, 3),
        Request((8,) * 62, 2, 4),
        Request((9,) * 200, 2, 2),
    ]
    run(engine, asked)
    assert engine.model._graphs._graphs == captured


def test_a_start_captures_few_rows_behind_contexts_says_how_far_it_is_and_ends_with_the_budget(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    computed: list[tuple[int, bool]] = []
    engine = MagicMock(layers={}, longest=3000)
    engine.pool.block_size, engine.scheduler.limits.step_tokens = 16, 256

    def capture(most: int) -> None:
        computed.clear()
        type(engine.model).captures = property(lambda model: len(computed) < most)
        forms.capture_steps(engine)

    monkeypatch.setattr(cuda, "SPLIT", triton_on_cpu.constant(512))
    monkeypatch.setattr(
        forms, "_compute", lambda engine, prompt, adapters: computed.append((len(prompt), bool(adapters)))
    )
    capture(1000)
    assert {length - 2048 for length, _ in computed if length > 2049} == {2, 4, 8, 16, 24, 32, 48, 64}
    assert {length for length, _ in computed if length <= 128} == set(graphs.ROWS)
    assert caplog.text.count("are captured") == 3
    assert "behind 2048 tokens" in caplog.text
    capture(30)
    assert len(computed) == 30
    assert sum(acting for _, acting in computed) == 2 * len(graphs.ROWS)


@pytest.mark.full
@pytest.mark.usefixtures("quick_trials")
def test_what_the_largest_step_takes_has_the_scratch_of_attention_at_the_longest_context(
    kernels: CudaKernels, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton_on_cpu.tell(monkeypatch, lambda name: None)
    served, layers, tokens = ServedModel(lab.base, 2, kernels=kernels), adaptable_layers(lab.base), 6

    def taken(length: int) -> int:
        limits, measure = SchedulerLimits(2, tokens, length, 1), LiveBytes.measure
        return largest_step_bytes(served, layers, limits, block_size=16, rank=4, measure=measure)

    heads, dim = 4, 32
    assert taken(16 * 128) - taken(13 * 128) == 3 * tokens * heads * (dim + 2) * 4
    served.allocate_kv(40, 16)


@pytest.mark.parametrize("waits", [lambda: bool(torch.ones(2).sum() > 1), lambda: torch.tensor([3])])
def test_a_pass_that_waits_for_the_device_is_not_captured(waits: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match="while a pass is captured"):
        triton_on_cpu.Capture().of(waits, torch.device("cpu"))


def _counted(found: Any, replayed: Counter[bool]) -> Any:
    replayed[found is not None] += 1
    return found


@pytest.mark.full
def test_the_proof_finds_modules_by_triton_as_exact_as_those_of_peft_and_a_fault_in_them(
    kernels: CudaKernels, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules, "TILE", 20)
    prover = ModuleProver(lab.base, kernels)
    found = prover.prove(lab.references[2], lab.weights[2])
    assert (found.kernels, found.tolerated) == ("triton", 0)
    assert 0 < found.error_ratio < 1.05
    whole = cuda._terms_of
    monkeypatch.setattr(
        cuda, "_terms_of", lambda *step: replace(whole(*step), weight=whole(*step).weight * 1.01)
    )
    with pytest.raises(ProofError):
        ModuleProver(lab.base, kernels).prove(lab.references[2], lab.weights[2])


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    folder = save_base("mixtral", tmp_path_factory.mktemp("mixture"), layers=1)
    return load_base(BaseSettings(folder, quantization="nf4"))


@pytest.mark.parametrize("rows", [1, 70, pytest.param(300, marks=pytest.mark.full)])
def test_experts_of_all_rows_at_once_have_the_bits_that_they_have_one_by_one(
    kernels: CudaKernels, mixture: nn.Module, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of rows with adapters, some of which act on few experts' parameters; and in few launches."""
    launched: list[str] = []
    triton_on_cpu.tell(monkeypatch, launched.append)
    ((_, module),) = expert_modules(view(mixture))
    together = kernels.experts(module, SLOTS)
    assert isinstance(together, CudaExperts)
    one_by_one = experts._OneByOne(module, kernels, SLOTS)
    for name, (count, size_in, size_out) in {one.name: one.sizes for one in expert_matrices(mixture)}.items():
        for slot, rank in enumerate((4, 20)):
            if (name, slot) != ("down_proj", 1):
                a = random(count, rank, size_in, seed=slot) * 0.1
                own = ExpertLora(a, random(count, size_out, rank, seed=slot + 5) * 0.1, 0.5)
                for kernel in (together, one_by_one):
                    kernel.put(name, slot, own)
    x = random(rows, 128, seed=1).to(torch.bfloat16)
    chosen = torch.stack([(torch.arange(rows) * 5) % 6, (torch.arange(rows) * 5 + 2) % 6], 1)
    chosen[rows // 2 :] = torch.tensor([4, 1])
    weights = random(rows, 2, seed=2).abs()
    step = row_map([{}, {0: 1.0}, {1: 0.5, 0: -1.0}] * (rows // 3) + [{0: 1.0}] * (rows % 3))
    for acting in (step, NOBODY):
        launched.clear()
        got = together(x, chosen, weights, acting)
        assert Counter(launched)["_expert_products"] == 2
        assert len(launched) == (6 if acting.groups else 2)
        assert torch.equal(got, one_by_one(x, chosen, weights, acting))


def test_experts_that_have_other_bits_together_are_computed_one_by_one(
    mixture: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = CudaKernels()
    ((_, module),) = expert_modules(view(mixture))
    whole = cuda._ExpertMatrices.sums
    monkeypatch.setattr(cuda._ExpertMatrices, "sums", lambda *given: whole(*given) * (1 + 2.0**-20))
    assert kernels.experts(module, SLOTS) is None
    assert "experts one by one" in caplog.text


def test_experts_whose_trial_fails_are_computed_one_by_one_unless_the_device_is_at_fault(
    mixture: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ((_, module),) = expert_modules(view(mixture))

    def failing(error: Exception) -> CudaKernels:
        monkeypatch.setattr(CudaExperts, "differs", MagicMock(side_effect=error))
        return CudaKernels()

    for broken in (torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("illegal access")):
        with pytest.raises(type(broken)):
            failing(broken).experts(module, SLOTS)
    kernels = failing(OutOfResources(120_000, 99_000, "shared memory"))
    assert kernels.experts(module, SLOTS) is None
    assert kernels.experts(module, SLOTS) is None, "it is not tried again"
    assert caplog.text.count("since together they fail: out of resource") == 1


@pytest.mark.full
@pytest.mark.usefixtures("quick_trials")
def test_a_captured_pass_of_a_mixture_has_the_experts_that_each_step_chooses(
    kernels: CudaKernels, mixture: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_folder(mixture, save_on_experts(mixture, tmp_path, 1))
    lab = Lab(mixture, [tmp_path], [loaded.reference], [loaded.weights])
    asked = [Request((5, 9, 7), 0, 3), Request((8,), None, 4, at=1)]
    one_by_one = run(lab.engine(model=ServedModel(mixture, 2, kernels=kernels), slots=2), asked)
    monkeypatch.setattr(kernels, "captures", True)
    monkeypatch.setattr(kernels, "capture", triton_on_cpu.Capture().of)
    monkeypatch.setattr(graphs, "ROWS", (4,))
    served = ServedModel(mixture, 2, kernels=kernels)
    engine, replayed = lab.engine(model=served, slots=2), Counter[bool]()
    whole = served._graphs.run_graph
    monkeypatch.setattr(served._graphs, "run_graph", lambda batch: _counted(whole(batch), replayed))
    assert run(engine, asked) == one_by_one
    assert None not in served._graphs._graphs.values()
    assert replayed[True] > len(served._graphs._graphs), replayed


def acting_on_experts(mixture: nn.Module, rank: int) -> dict[str, ExpertLora]:
    """An adapter on all matrices of the experts, which changes much."""
    return {
        one.path: ExpertLora(
            random(number, rank, size_in, seed=7) * 0.2, random(number, size_out, rank, seed=8) * 0.2, 1.0
        )
        for one in expert_matrices(mixture)
        for number, size_in, size_out in [one.sizes]
    }


def test_a_captured_pass_has_all_ranks_of_an_adapter_on_experts(
    kernels: CudaKernels, mixture: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger one than those for which passes are captured from the start."""
    monkeypatch.setattr(kernels, "captures", True)
    monkeypatch.setattr(kernels, "capture", triton_on_cpu.Capture().of)
    monkeypatch.setattr(graphs, "ROWS", (4,))
    served, adapters = ServedModel(mixture, 2, kernels=kernels), {"small": 8, "large": 80}
    served.allocate_kv(40, 16)
    moves = dict(enumerate(adapters))
    assert not served.move_slots(moves, lambda digest: acting_on_experts(mixture, adapters[digest]))
    for slot, digest in moves.items():
        step = decodes(served, slot, digest)
        launched = served.launch(step).logits
        for _ in range(2):
            assert torch.equal(served.forward(step).logits, launched)
    assert {size.most_rank for size in served._graphs._graphs} == {64, 128}
    assert served.graph_bytes == graphs.most_bytes(graphs.executable_bytes(1, 1), served.device)


def test_what_is_left_of_a_version_on_experts_that_failed_to_load_acts_on_no_other(
    kernels: CudaKernels, mixture: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = ServedModel(mixture, 2, kernels=kernels)
    served.allocate_kv(40, 16)
    bare, whole, placed = served.launch(decodes(served, 0, "next")).logits, cuda._aligned, list[int]()
    assert not served.move_slots({1: "other"}, lambda digest: acting_on_experts(mixture, 8))

    def short(tensor: torch.Tensor) -> torch.Tensor:
        placed.append(len(tensor))
        if len(placed) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(tensor)

    monkeypatch.setattr(cuda, "_aligned", short)
    assert set(served.move_slots({0: "first"}, lambda digest: acting_on_experts(mixture, 8))) == {0}
    thin = thin_adapter(adaptable_layers(mixture), 4)  # changes nothing, and is everywhere
    assert not served.move_slots({0: "next"}, lambda digest: thin)
    assert torch.equal(served.launch(decodes(served, 0, "next")).logits, bare)


def decodes(served: ServedModel, slot: int, digest: str) -> StepBatch:
    """Three first tokens, each of a sequence of its own, by a version in a slot."""
    segments = []
    for number in range(3):
        mix = AdapterMix(((digest, 1.0),))
        one = SequenceState("one", 0, [3 + number], Sampling(), mix, arrival=0, arrived_at=0.0)
        one.blocks = [array("i", [RESERVED_BLOCKS + number])] * len(served.groups)
        segments.append(Segment(one, 0, 1))
    return Packer(16, served.row_multiple, served.groups).pack(StepPlan(segments, []), {digest: slot})


@pytest.mark.full
@pytest.mark.parametrize("on_experts", [False, True])
@pytest.mark.usefixtures("quick_trials")
def test_a_mixture_is_pefts_and_a_row_the_same_in_any_company(
    on_experts: bool, kernels: CudaKernels, tmp_path: Path
) -> None:
    base = load_base(BaseSettings(save_base("mixtral", tmp_path / "base")))
    if on_experts:
        folder = save_on_experts(base, tmp_path, 1)
    else:
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"]}
        folder = save_adapter(base, settings, tmp_path, 1)
    loaded = load_folder(base, folder)
    mixture = Lab(base, [folder], [loaded.reference], [loaded.weights])
    asked = [
        replace(one, adapter=(0, None)[i], at=i) for i, one in enumerate(requests(2, 5, longest=8, tokens=3))
    ]
    served = ServedModel(base, 4, kernels=kernels)
    together = run(mixture.engine(model=served, slots=4), asked)
    assert not mixture.disagreements(asked, together)
    alone = mixture.engine(model=ServedModel(base, 4, kernels=kernels), slots=4, step_tokens=5)
    assert run(alone, [replace(asked[0], at=0)]) == together[:1]
