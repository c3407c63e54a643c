"""The engine's products, attention and norms on a GPU, by kernels in Triton.

Libraries for GPUs choose by the number of rows how they compute, and bitsandbytes even which weights a 4-bit
layer has: a row's bits would depend on its neighbours. Here a sum has one order, whatever else is in the
step. A product of the base has one fp32 accumulator, to which its terms are added in ascending order; an
adapter's terms are added in pieces of PIECE, the pieces one after the other, and attention's keys in pieces
of SPLIT. Weights are the numbers of `dequantize_4bit`, adapters those of their files, in fp32. Where a trial
at the start finds that cuBLAS gives the same bits, it multiplies the rows of steps with more than
UNPACKED_ROWS.

A kernel is compiled for the types of its arguments and for facts of the base. Numbers that differ from step
to step are never compiled in, nor where an index array begins, so that all forms are known at the start.

Nothing here waits for the device. With TRITON_INTERPRET=1 Triton runs all of it on the CPU, for the tests.
"""

# ruff: noqa: N803 (what Triton compiles into a kernel is written in capitals)
from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
import torch
import triton
import triton.language as tl
from torch import nn
from torch.nn import functional
from triton.language.extra import libdevice
from triton.runtime.errors import OutOfResources

from onebase_engine.base.experts import ExpertStack, is_usual, layer_of, matrix_names
from onebase_engine.base.layers import is_nf4, plain_absmax
from onebase_engine.base.load import import_bitsandbytes
from onebase_engine.kernels.interface import (
    LEAST_SCALE,
    AttentionSettings,
    Contexts,
    Drawing,
    Draws,
    LayerCache,
    LinearKernel,
    Rotation,
    Router,
    RowGroup,
    RowMap,
    StateRuns,
)
from onebase_engine.kernels.reference import ReferenceKernels, ReferenceLinear, sent, whole_factor
from onebase_engine.kernels.weights import ExpertLora, LoraWeights
from onebase_engine.machine import is_out_of_memory

logger = logging.getLogger(__name__)
Captured = TypeVar("Captured")


class CaptureError(Exception):
    """Raised if a pass cannot be a CUDA graph; then other passes of the same model cannot either."""


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels, on the CPU."""
PIECE = tl.constexpr(1024)
"""Number of terms of a LoRA's product with A that are summed before they are added to the others."""
STEP = tl.constexpr(64)
"""Number of terms that a loop processes at a time; `in_features` is a multiple of it."""
SHRUNK = tl.constexpr(256)
"""Number of terms of a LoRA's product with A that a loop processes at a time, since loads wait."""
OUTPUTS = tl.constexpr(64)
RANKS = tl.constexpr(16)
SPLIT = tl.constexpr(256)
"""Number of a context's keys that one program attends to, one tile after the other: few enough for a single
decode to occupy many multiprocessors."""
ATTENTION = (
    (128, {"KEYS": 64, "num_warps": 4, "num_stages": 3}),
    (256, {"KEYS": 32, "num_warps": 8, "num_stages": 1}),
    (1 << 16, {"KEYS": 16, "num_warps": 8, "num_stages": 1}),
)
"""Keys that a program attends to at a time, and its warps and stages, for heads up to a size: so that it fits
into the shared memory of every card, 99 KB of some. Where another Triton needs more of it, the next entry is
used."""
QUERIES = tl.constexpr(64)
"""Number of a program's queries: rows of one context, with all heads that share its keys."""
CHANNELS = 256
"""Number of a convolution's channels in one program."""
VALUES = 32
"""Number of a head's values, of those in a delta rule's state, in one program."""
NUMBERS = 4096
"""Numbers of a state space's state in one program."""
HIDDEN = 1 << 23
"""Largest LoRA intermediate, in elements, that is kept as partial sums by piece; above it each program adds
up its pieces."""
SCRATCH = 1 << 28
"""Approximate bytes of attention's partial results; with more rows in longer contexts, chunks are computed
one after the other."""
PLAIN: dict[str, Any] = {"enable_fp_fusion": False}
"""Compiler options of all kernels: a product that is added is rounded first, as in PyTorch's separate
operators."""
ALIGNMENT = 16
"""Alignment of weights and matrices, in bytes."""
FEW_ROWS, MANY_ROWS, MOST_ROWS = 16, 64, 128
"""Numbers of rows of a program."""
UNPACKED_ROWS = 256
"""Number of rows above which a 4-bit weight is unpacked once for all programs."""
LIBRARY_ROWS = 512
"""Number of rows of a product by the device's library, which may sum another number in another order."""
LIBRARY_OUTPUTS = 1 << 16
"""Largest number of outputs of these: a head's sums take much memory, and few steps want many logits."""
WHOLE_SUMS = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}
"""Settings of cuBLAS that leave it hardly any memory to sum terms in parts, so that the trial should pass."""
LIBRARY_CAPABILITY = 9
"""Smallest compute capability with which the library is tried."""
LIBRARY_ALIGNMENT = 256
"""Alignment in bytes of what the library multiplies, which its choice of an algorithm depends on: that of
PyTorch's allocator."""
STAGES = {FEW_ROWS: 6, MANY_ROWS: 4, MOST_ROWS: 3}
"""Number of loads in flight of a program, by its rows. Few rows have few programs, and need more of them."""
WIDE = 2 * OUTPUTS.value
"""Number of outputs of a program from PROMPT_ROWS rows on, which leave enough programs for a whole device."""
PROMPT_ROWS = 512
ROWS_IN_TURN = 8
"""Number of rows whose LoRAs a program computes, one after the other, from PROMPT_ROWS rows on. Neighbours of
a prompt have the same A and B, which come from the multiprocessor's own cache then."""
GATHERED, PERMUTED = tl.constexpr(1), tl.constexpr(2)
"""Ways to unpack 4-bit weights, with the same bits: from shared memory, and from registers. `NF4` of a kernel
is one of them, or 0 if weights are bf16."""
FORM_ROWS = (1, FEW_ROWS + 1, MANY_ROWS + 1, UNPACKED_ROWS + 1, PROMPT_ROWS)
"""Number of rows of a step for each set of forms."""
LAYERS = tl.constexpr(256)
"""Number of layers whose facts of one slot lie next to each other, so that one copy fills the slot."""
TRIAL_ROWS, TRIAL_OUTPUTS = (
    ((1, 16, 17, 65), 64)
    if INTERPRETED.value
    else (
        (1, 16, 17, 64, 65, 128, 129, 256, 257, 512),
        4096,
    )
)
"""Rows and outputs of the products of a trial at a start: each form, on both sides of where it ends."""
SAMPLED, SAMPLING_WARPS = 4096, 16
"""Numbers of a vocabulary that a program looks at at a time, and its warps."""
EXPERT_TRIAL_ROWS = (3, 70, 300)
"""Rows of the trial of a mixture's products, one for each number of rows of a program."""
SUMMED_BYTES = 1 << 18
"""Bytes of the base in one program of a check."""

WEIGHT, ABSMAX, CODE, BIAS = (tl.constexpr(number) for number in range(4))
SLOTS, SIZE_OUT, SHIFT, FACTS = (tl.constexpr(number) for number in range(4, 8))
"""Indices of a layer's facts for the kernels, int64: addresses, the number of outputs, the binary logarithm
of the block size of a 4-bit weight; and the number of facts."""
A, B, RANK, SCALE, NARROW, ADDS_WIDE, SLOT_FACTS = (tl.constexpr(number) for number in range(7))
"""Indices of a slot's facts: addresses of A and B, the rank (0: empty), the bits of the scale in fp32,
whether A and B are in bf16 instead of fp32, and whether the part is never rounded before it is added; and the
number of facts."""

FIXED = "cuda"
"""Key in `held` of a step at fixed places."""
SMALLEST = tl.constexpr(LEAST_SCALE)
TO_INTEGER = tl.constexpr(12582912.0)
"""Constant 1.5 * 2^23: added and subtracted again, it leaves the nearest integer, ties to even."""

_WAITS = "called a synchronizing CUDA operation"
"""Part of PyTorch's error, in its debug mode, when the host waits for the device."""


# ---- products ----------------------------------------------------------------------------------


@triton.jit
def _layer_of(block, second, third):
    """Return the layer, of up to three, to which a block of outputs belongs, and that layer's first block."""
    layer = (block >= second).to(tl.int32) + (block >= third).to(tl.int32)
    return layer, tl.where(layer == 0, 0, tl.where(layer == 1, second, third))


_PLANES = tl.constexpr(
    "{\n.reg .b32 p<8>;\n"
    + "".join(f"cvt.rn.bf16x2.f32 p{n}, ${9 + 2 * n}, ${8 + 2 * n};\n" for n in range(8))
    + "".join(f"prmt.b32 ${n}, p{2 * n}, p{2 * n + 1}, 0x6420;\n" for n in range(4))
    + "".join(f"prmt.b32 ${n + 4}, p{2 * n}, p{2 * n + 1}, 0x7531;\n" for n in range(4))
    + "}"
)
"""PTX: 16 numbers, rounded to bf16, become four words of their low bytes and four of their high bytes."""
_LOOKED_UP = tl.constexpr(
    "{\n.reg .b32 s, t, a, b, l, h, x<4>;\n"
    # Three bits of each of the word's eight numbers, and from which half of the table each takes its byte.
    "and.b32 s, $8, 0x77777777;\nand.b32 t, $8, 0x88888888;\nshr.u32 t, t, 1;\nor.b32 t, t, 0x32103210;\n"
    + "shr.u32 s, s, 16;\nshr.u32 t, t, 16;\n".join(
        "prmt.b32 a, $9, $10, s;\nprmt.b32 b, $11, $12, s;\nprmt.b32 l, a, b, t;\n"
        "prmt.b32 a, $13, $14, s;\nprmt.b32 b, $15, $16, s;\nprmt.b32 h, a, b, t;\n"
        # The upper half of a byte is the first of its two weights.
        f"prmt.b32 x{n}, l, h, 0x4051;\nprmt.b32 x{n + 1}, l, h, 0x6273;\n"
        for n in (0, 2)
    )
    + "".join(f"mov.b32 {{${2 * n}, ${2 * n + 1}}}, x{n};\n" for n in range(4))
    + "}"
)
"""PTX: eight weights of a word, looked up in the planes of their block's table."""
_OF_PLANES = tl.constexpr(",".join(["=&r"] * 8 + ["f"] * 16))
_OF_LOOKED_UP = tl.constexpr(",".join(["=&h"] * 8 + ["r"] * 9))


@triton.jit
def _permuted(weight, scale, code, out, first, there, size_in):
    """Return the weights as `_unpacked` does, by a table of 16 numbers for each block in registers.

    PRMT picks bytes of a table by the packed numbers themselves: neither shared memory nor a product for each
    weight.
    """
    c = scale
    planes = tl.inline_asm_elementwise(
        _PLANES, _OF_PLANES,
        [
            tl.load(code) * c, tl.load(code + 1) * c, tl.load(code + 2) * c, tl.load(code + 3) * c,
            tl.load(code + 4) * c, tl.load(code + 5) * c, tl.load(code + 6) * c, tl.load(code + 7) * c,
            tl.load(code + 8) * c, tl.load(code + 9) * c, tl.load(code + 10) * c, tl.load(code + 11) * c,
            tl.load(code + 12) * c, tl.load(code + 13) * c, tl.load(code + 14) * c, tl.load(code + 15) * c,
        ],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True, pack=1,
    )  # fmt: skip
    eighth = tl.multiple_of(first // 8, STEP // 8) + tl.arange(0, STEP // 8)
    own = out[:, None] * tl.multiple_of(size_in // 8, STEP // 8)
    packed = tl.multiple_of(weight.to(tl.pointer_type(tl.int32)), 16)
    words = tl.load(packed + own + eighth[None, :], mask=there[:, None], other=0)
    w = tl.inline_asm_elementwise(
        _LOOKED_UP, _OF_LOOKED_UP,
        [
            words, planes[0][:, None], planes[1][:, None], planes[2][:, None], planes[3][:, None],
            planes[4][:, None], planes[5][:, None], planes[6][:, None], planes[7][:, None],
        ],
        dtype=(
            tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
            tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
        ),
        is_pure=True, pack=1,
    )  # fmt: skip
    even = tl.join(tl.join(w[0], w[4]), tl.join(w[2], w[6]))
    odd = tl.join(tl.join(w[1], w[5]), tl.join(w[3], w[7]))
    return tl.reshape(tl.join(even, odd), [OUTPUTS, STEP])


@triton.jit
def _unpacked(weight, absmax, code, numbers, out, first, there, size_in, shift, NF4: tl.constexpr):
    """Unpack the weights [OUTPUTS, STEP] of the outputs `out` and the terms from `first` on, bf16.

    `numbers` [16] are those of `code`, in registers: looked up in memory, each weight would be a copy of four
    bytes.
    """
    scale = tl.load(absmax + ((out * size_in + first) >> shift), mask=there, other=0.0)
    if NF4 == PERMUTED:
        w = _permuted(weight, scale, code, out, first, there, size_in)
    else:
        # Triton loads 16 bytes at a time where it is told that they lie so.
        half = tl.multiple_of(first // 2, STEP // 2) + tl.arange(0, STEP // 2)
        own = out[:, None] * tl.multiple_of(size_in // 2, STEP // 2)
        both = tl.load(weight + own + half[None, :], mask=there[:, None], other=0)
        index = tl.interleave(both >> 4, both & 15).to(tl.int32)
        found = tl.reshape(tl.gather(numbers, tl.reshape(index, [OUTPUTS * STEP]), 0), [OUTPUTS, STEP])
        w = (found * scale[:, None]).to(tl.bfloat16)
    return w


@triton.jit
def _summed(
    x, facts, row, wanted, out, there, size_in, NF4: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """Return the products of rows of x with one layer's weights, fp32 [SIZE, ROWS]."""
    numbers = tl.zeros((16,), dtype=tl.float32)
    if NF4:
        numbers = tl.load(tl.load(facts + CODE).to(tl.pointer_type(tl.float32)) + tl.arange(0, 16))
    total = tl.zeros((SIZE, ROWS), dtype=tl.float32)
    for first in range(0, size_in, STEP):
        term = first + tl.arange(0, STEP)
        if NF4:
            weight = tl.multiple_of(tl.load(facts + WEIGHT).to(tl.pointer_type(tl.uint8)), 16)
            absmax = tl.load(facts + ABSMAX).to(tl.pointer_type(tl.float32))
            code = tl.load(facts + CODE).to(tl.pointer_type(tl.float32))
            shift = tl.load(facts + SHIFT)
            w = _unpacked(weight, absmax, code, numbers, out, first, there, size_in, shift, NF4)
        else:
            plain = tl.multiple_of(tl.load(facts + WEIGHT).to(tl.pointer_type(tl.bfloat16)), 16)
            w = tl.load(plain + out[:, None] * size_in + term[None, :], mask=there[:, None], other=0.0)
        xs = tl.load(x + row[None, :] * size_in + term[:, None], mask=wanted[None, :], other=0.0)
        total = tl.dot(w, xs, total)
    return total


@triton.jit(do_not_specialize=["rows", "second", "third"])
def _products(
    x, layers, sums, rows, size_in, width, second, third, NF4: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Compute sums[row, outputs of all layers] = x @ weight.T, each in one accumulator over ascending terms.

    The weights are the left factor, which may come from registers: there they are unpacked. Programs for all
    rows follow each other, so that a block of weights comes from memory once. SIZE: outputs of a block, in
    which `second` and `third` count too.
    """
    block = tl.program_id(1)
    layer, begin = _layer_of(block, second, third)
    facts = layers + layer * FACTS
    out = ((block - begin) * SIZE + tl.arange(0, SIZE)).to(tl.int64)
    there = out < tl.load(facts + SIZE_OUT)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    wanted = row < rows
    total = _summed(x, facts, row, wanted, out, there, size_in, NF4, ROWS, SIZE)
    place = row[None, :] * width + block * SIZE + tl.arange(0, SIZE)[:, None]
    tl.store(sums + place, total, mask=wanted[None, :] & there[:, None])


@triton.jit(do_not_specialize=["shift", "size_out"])
def _unpack(weight, absmax, code, plain, size_in, shift, size_out, NF4: tl.constexpr):
    """Unpack a 4-bit weight into plain[out, in], bf16."""
    out = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    first, there = tl.program_id(1) * STEP, out < size_out
    numbers = tl.load(code + tl.arange(0, 16))
    w = _unpacked(weight, absmax, code, numbers, out, first, there, size_in, shift, NF4)
    place = out[:, None] * size_in + first + tl.arange(0, STEP)[None, :]
    tl.store(plain + place, w, mask=there[:, None])


@triton.jit
def _matrix(address, place, mask, narrow):
    """Load numbers of A or B, fp32."""
    if narrow != 0:
        narrow_ones = tl.multiple_of(address.to(tl.pointer_type(tl.bfloat16)), 16)
        found = tl.load(narrow_ones + place, mask=mask, other=0.0).to(tl.float32)
    else:
        found = tl.load(
            tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16) + place, mask=mask, other=0.0
        )
    return found


@triton.jit
def _shrunk(x, own, row, rank, inside, size_in, part, pieces):
    """Return the products of a row with one slot's A, summed over the pieces of a part, fp32 [RANKS]."""
    a, narrow = tl.load(own + A), tl.load(own + NARROW)
    total = tl.zeros((RANKS,), dtype=tl.float32)
    for piece in range(part * pieces, (part + 1) * pieces):
        sums = tl.zeros((RANKS, SHRUNK), dtype=tl.float32)
        end = tl.minimum((piece + 1) * PIECE, size_in)
        for first in range(piece * PIECE, end, SHRUNK):
            some = first + tl.arange(0, SHRUNK)
            known = some < end
            xs = tl.load(x + row * size_in + some, mask=known, other=0.0).to(tl.float32)
            w = _matrix(a, rank[:, None] * size_in + some[None, :], inside[:, None] & known[None, :], narrow)
            sums += w * xs[None, :]
        one = tl.sum(sums, axis=1)
        total = tl.where(piece == part * pieces, one, total + one)
    return total


@triton.jit(
    do_not_specialize=["terms", "pieces", "most_rank", "each"],
    do_not_specialize_on_alignment=["row_of", "slot_of"],
)
def _shrink(x, layers, row_of, slot_of, hidden, terms, size_in, pieces, most_rank, each):
    """Compute hidden[layer, part, term, rank] = x32 @ A.T over the `pieces` pieces of each part.

    A program computes `each` terms, a row and a slot each, one after the other: those of a prompt have one
    slot, whose matrix is read once.
    """
    first, part = tl.program_id(0) * each, tl.program_id(2)
    blocks = tl.cdiv(most_rank, RANKS)
    layer, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    slots = tl.load(layers + layer * FACTS + SLOTS).to(tl.pointer_type(tl.int64))
    for term in range(first, tl.minimum(first + each, terms)):
        own = slots + tl.load(slot_of + term).to(tl.int64) * (LAYERS * SLOT_FACTS)
        size = tl.load(own + RANK)
        if block * RANKS < size:
            rank = (block * RANKS + tl.arange(0, RANKS)).to(tl.int64)
            inside = rank < size
            row = tl.load(row_of + term).to(tl.int64)
            total = _shrunk(x, own, row, rank, inside, size_in, part, pieces)
            place = ((layer * tl.num_programs(2) + part).to(tl.int64) * terms + term) * most_rank + rank
            tl.store(hidden + place, total, mask=inside)


@triton.jit
def _added(hidden, own, out, there, terms, term, first_part, parts, most_rank):
    """Return the product of one slot's B for a row, scaled but without the row's own weight, fp32."""
    size = tl.load(own + RANK)
    b, narrow = tl.load(own + B), tl.load(own + NARROW)
    sums = tl.zeros((OUTPUTS, RANKS), dtype=tl.float32)
    for first in range(0, size, RANKS):
        rank = first + tl.arange(0, RANKS)
        inside = rank < size
        place = (first_part * terms + term) * most_rank + rank
        low = tl.load(hidden + place, mask=inside, other=0.0)
        for part in range(1, parts):
            place = ((first_part + part) * terms + term) * most_rank + rank
            low += tl.load(hidden + place, mask=inside, other=0.0)
        some = there[:, None] & inside[None, :]
        sums += _matrix(b, out[:, None] * size + rank[None, :], some, narrow) * low[None, :]
    return tl.sum(sums, axis=1) * tl.load(own + SCALE).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _exp(x):
    """Compute exp like PyTorch; `tl.exp` is the device's approximation."""
    if INTERPRETED:
        return tl.exp(x)
    return libdevice.exp(x)


@triton.jit
def _output(
    sums, facts, hidden, starts, slot_of, weight_of, row, width, terms, first_part, hidden_parts, most_rank,
    begin, block, each, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Return a block of one layer's outputs for a row, rounded in PEFT's order to bf16.

    `each` rows of sums belong to one of the step, and so do as many of `hidden` to one of its terms.
    """
    out = (block * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    there = out < tl.load(facts + SIZE_OUT)
    place = row * width + begin * OUTPUTS + out
    total = tl.load(sums + place, mask=there, other=0.0)
    bias = tl.load(facts + BIAS)
    if bias != 0:
        total += tl.load(bias.to(tl.pointer_type(tl.bfloat16)) + out, mask=there, other=0.0).to(tl.float32)
    y = total.to(tl.bfloat16)
    slots = tl.load(facts + SLOTS).to(tl.pointer_type(tl.int64))
    delta = tl.zeros((OUTPUTS,), dtype=tl.float32)
    acting, wide = 0, tl.cast(0, tl.int64)
    source = row // each
    for term in range(tl.load(starts + source), tl.load(starts + source + 1)):
        own = slots + tl.load(slot_of + term).to(tl.int64) * (LAYERS * SLOT_FACTS)
        if tl.load(own + RANK) > 0:
            number = tl.cast(term, tl.int64) * each + row % each
            some = _added(hidden, own, out, there, terms * each, number, first_part, hidden_parts, most_rank)
            delta += some * tl.load(weight_of + term)
            acting += 1
            wide += tl.load(own + ADDS_WIDE)
    if acting > 0:
        if QUANTIZED:
            delta = tl.where(wide > 0, delta, delta.to(tl.bfloat16).to(tl.float32))
        y = (y.to(tl.float32) + delta).to(tl.bfloat16)
    return y


@triton.jit(
    do_not_specialize=["rows", "terms", "hidden_parts", "most_rank", "second", "third", "each"],
    do_not_specialize_on_alignment=["starts", "slot_of", "weight_of"],
)
def _finish(
    sums, layers, hidden, starts, slot_of, weight_of, onto, y_1, y_2, y_3, rows, width, terms, hidden_parts,
    most_rank, second, third, each, QUANTIZED: tl.constexpr, GATED: tl.constexpr, ONTO: tl.constexpr,
):  # fmt: skip
    """Store each layer's outputs: the base's sum plus the row's adapters.

    The result of a single layer is added to `onto`. A program has `each` rows, as in `_shrink`.
    """
    begin_row, block = tl.program_id(0).to(tl.int64) * each, tl.program_id(1)
    layer, begin = _layer_of(block, second, third)
    size_out = tl.load(layers + layer * FACTS + SIZE_OUT)
    out = (block - begin) * OUTPUTS + tl.arange(0, OUTPUTS)
    to = tl.where(layer == 0, y_1, tl.where(layer == 1, y_2, y_3))
    for row in range(begin_row, tl.minimum(begin_row + each, rows)):
        y = _output(
            sums, layers + layer * FACTS, hidden, starts, slot_of, weight_of, row, width, terms,
            tl.cast(layer, tl.int64) * hidden_parts, hidden_parts, most_rank, begin, block - begin, 1,
            QUANTIZED,
        )  # fmt: skip
        if GATED:
            up = _output(
                sums, layers + FACTS, hidden, starts, slot_of, weight_of, row, width, terms,
                tl.cast(hidden_parts, tl.int64), hidden_parts, most_rank, second, block, 1, QUANTIZED,
            )  # fmt: skip
            y = _gated(y, up)
        if ONTO:
            before = tl.load(onto + row * size_out + out, mask=out < size_out, other=0.0)
            y = (before.to(tl.float32) + y.to(tl.float32)).to(tl.bfloat16)
        tl.store(to + row * size_out + out, y, mask=out < size_out)


@triton.jit
def _bare(sums, facts, row, out, there, width, begin):
    """Return a block of one layer's outputs without adapters [rows, OUTPUTS], rounded to bf16."""
    place = row[:, None] * width + begin * OUTPUTS + out[None, :]
    total = tl.load(sums + place, mask=there, other=0.0)
    bias = tl.load(facts + BIAS)
    if bias != 0:
        inside = out < tl.load(facts + SIZE_OUT)
        own = tl.load(bias.to(tl.pointer_type(tl.bfloat16)) + out, mask=inside, other=0.0)
        total += own.to(tl.float32)[None, :]
    return total.to(tl.bfloat16)


@triton.jit
def _gated(gate, up):
    """Return silu(gate) * up, each rounded where PyTorch's operators round."""
    gate = gate.to(tl.float32)
    y = tl.div_rn(gate, 1.0 + _exp(-gate)).to(tl.bfloat16)
    return (y.to(tl.float32) * up.to(tl.float32)).to(tl.bfloat16)


@triton.jit(do_not_specialize=["rows", "second", "third"])
def _finish_bare(
    sums, layers, onto, y_1, y_2, y_3, rows, width, second, third, ROWS: tl.constexpr, GATED: tl.constexpr,
    ONTO: tl.constexpr,
):  # fmt: skip
    """Store the outputs of ROWS rows as `_finish` does, in a step in which no adapter acts."""
    block = tl.program_id(1)
    layer, begin = _layer_of(block, second, third)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    size_out = tl.load(layers + layer * FACTS + SIZE_OUT)
    out = (block - begin) * OUTPUTS + tl.arange(0, OUTPUTS)
    there = (row < rows)[:, None] & (out < size_out)[None, :]
    y = _bare(sums, layers + layer * FACTS, row, out, there, width, begin)
    if GATED:
        y = _gated(y, _bare(sums, layers + FACTS, row, out, there, width, second))
    place = row[:, None] * size_out + out[None, :]
    if ONTO:
        before = tl.load(onto + place, mask=there, other=0.0)
        y = (before.to(tl.float32) + y.to(tl.float32)).to(tl.bfloat16)
    to = tl.where(layer == 0, y_1, tl.where(layer == 1, y_2, y_3))
    tl.store(to + place, y, mask=there)


@dataclass(frozen=True)
class _Terms:
    """Slots that act on the rows of a step, on the device. `starts` [rows + 1]: index of each row's first."""

    count: int
    starts: torch.Tensor
    row: torch.Tensor
    slot: torch.Tensor
    weight: torch.Tensor
    most_rank: int = 0
    """Upper bound of the slots' ranks; 0: the layer's own bound holds."""


def _terms_of(rows: RowMap, count: int, device: torch.device) -> _Terms:
    """Return the step's terms, computed once."""
    key = FIXED if FIXED in rows.held else f"cuda {count}"
    if key not in rows.held:
        starts, columns = _acting(rows, count)
        there = sent(np.concatenate([starts, columns.reshape(-1)]), device)
        row, slot, weight = there[count + 1 :].view(columns.shape)
        rows.held[key] = _Terms(len(row), there[: count + 1], row, slot, weight.view(torch.float32))
    made: _Terms = rows.held[key]
    return made


def _acting(rows: RowMap, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a step's `_Terms` as int32: starts [count + 1]; rows, slots and weights' bits [3, terms]."""
    of_row: list[tuple[tuple[int, float], ...]] = [()] * count
    for group in rows.groups:
        for row in group.rows:
            of_row[row] = group.terms
    flat = [(row, *term) for row, terms in enumerate(of_row) for term in terms]
    columns = np.zeros((3, len(flat)), dtype=np.int32)
    if flat:
        numbers, slots, weights = zip(*flat, strict=True)
        columns[:] = numbers, slots, np.array(weights, dtype=np.float32).view(np.int32)
    return np.array([0, *accumulate(map(len, of_row))], dtype=np.int32), columns


# ---- experts -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["each"], do_not_specialize_on_alignment=["order", "bounds", "owners", "ends"])
def _expert_products(
    x, layers, order, bounds, owners, ends, sums, size_in, width, count, each, NF4: tl.constexpr,
    ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Compute sums[pair, outputs] = x[pair // each] @ weight of the pair's expert, as `_products` does.

    A program has up to ROWS pairs of one expert, its tile's owner. `order`: numbers of the pairs, sorted by
    expert. `bounds` [count + 1]: each expert's first place there; `ends` [count]: the end of its tiles.
    """
    tile, block = tl.program_id(0), tl.program_id(1)
    expert = tl.load(owners + tile)
    if expert < count:
        first, stop = tl.load(bounds + expert), tl.load(bounds + expert + 1)
        begin = tl.load(ends + expert) - (stop - first + ROWS - 1) // ROWS
        place = first + (tile - begin) * ROWS + tl.arange(0, ROWS)
        wanted = place < stop
        pair = tl.load(order + place, mask=wanted, other=0).to(tl.int64)
        facts = layers + expert * FACTS
        out = (block * SIZE + tl.arange(0, SIZE)).to(tl.int64)
        there = out < tl.load(facts + SIZE_OUT)
        total = _summed(x, facts, pair // each, wanted, out, there, size_in, NF4, ROWS, SIZE)
        tl.store(sums + pair[None, :] * width + out[:, None], total, mask=wanted[None, :] & there[:, None])


@triton.jit(
    do_not_specialize=["terms", "pieces", "most_rank", "each", "shared"],
    do_not_specialize_on_alignment=["chosen", "row_of", "slot_of"],
)
def _expert_shrink(
    x, layers, chosen, row_of, slot_of, hidden, terms, size_in, pieces, most_rank, each, shared
):  # fmt: skip
    """Compute hidden[part, term * each + number, rank] as `_shrink` does, for each expert of a term's row.

    shared: number of pairs that have one row of x.
    """
    term, part, block = tl.program_id(0).to(tl.int64), tl.program_id(2), tl.program_id(1)
    pair = tl.load(row_of + term // each).to(tl.int64) * each + term % each
    facts = layers + tl.load(chosen + pair) * FACTS
    slots = tl.load(facts + SLOTS).to(tl.pointer_type(tl.int64))
    own = slots + tl.load(slot_of + term // each).to(tl.int64) * (LAYERS * SLOT_FACTS)
    size = tl.load(own + RANK)
    if block * RANKS < size:
        rank = (block * RANKS + tl.arange(0, RANKS)).to(tl.int64)
        inside = rank < size
        total = _shrunk(x, own, pair // shared, rank, inside, size_in, part, pieces)
        place = (part.to(tl.int64) * terms * each + term) * most_rank + rank
        tl.store(hidden + place, total, mask=inside)


@triton.jit(
    do_not_specialize=["terms", "hidden_parts", "most_rank", "each"],
    do_not_specialize_on_alignment=["chosen", "starts", "slot_of", "weight_of"],
)
def _expert_finish(
    sums, layers, chosen, hidden, starts, slot_of, weight_of, y, width, size_out, terms, hidden_parts,
    most_rank, each, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Store a pair's outputs: the expert's sum plus the row's adapters."""
    pair, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    facts = layers + tl.load(chosen + pair) * FACTS
    given = _output(
        sums, facts, hidden, starts, slot_of, weight_of, pair, width, terms, tl.cast(0, tl.int64),
        hidden_parts, most_rank, 0, block, each, QUANTIZED,
    )  # fmt: skip
    out = block * OUTPUTS + tl.arange(0, OUTPUTS)
    tl.store(y + pair * size_out + out, given, mask=out < size_out)


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a row and an expert that it has chosen, in tiles of one expert each, on the device."""

    chosen: torch.Tensor
    """Numbers of the experts, [pairs] int64."""
    each: int
    """Number of experts of a row."""
    order: torch.Tensor
    bounds: torch.Tensor
    owners: torch.Tensor
    """Expert of each tile; where there is none, the number of experts."""
    ends: torch.Tensor
    rows: int
    """Largest number of a tile's pairs."""

    @classmethod
    def of(cls, chosen: torch.Tensor, count: int) -> _Pairs:
        """Sort the pairs by expert, without waiting for the device. chosen: [rows, each] int64."""
        few = len(chosen) <= MANY_ROWS
        rows = FEW_ROWS if few else MANY_ROWS if len(chosen) <= UNPACKED_ROWS else MOST_ROWS
        flat = chosen.reshape(-1).contiguous()
        by_expert, order = torch.sort(flat, stable=True)
        bounds = torch.searchsorted(by_expert, torch.arange(count + 1, device=flat.device))
        ends = ((bounds[1:] - bounds[:-1] + rows - 1) // rows).cumsum(0)
        tiles = min(len(flat), count) + len(flat) // rows
        owners = torch.searchsorted(ends, torch.arange(tiles, device=flat.device), right=True)
        return cls(flat, chosen.shape[1], order, bounds, owners, ends, rows)


class _ExpertMatrices:
    """The matrices of all experts for one parameter, plus the LoRAs in their slots."""

    def __init__(self, layers: Sequence[CudaLinear]) -> None:
        self.layers = tuple(layers)
        self._facts = sent(np.array([layer.facts for layer in layers]), layers[0].weight.device)
        self._tables = tuple({layer.table for layer in layers})
        self._filled: set[int] = set()

    def put(self, slot: int, weights: ExpertLora | None) -> None:
        if weights is None and slot not in self._filled:
            return
        self._filled.add(slot)  # even if loading fails halfway: it has to be emptied then
        for number, layer in enumerate(self.layers):
            layer.put(slot, None if weights is None else weights.of_expert(number))
        if weights is None:
            self._filled.discard(slot)

    def sums(self, x: torch.Tensor, pairs: _Pairs) -> torch.Tensor:
        """Return each pair's product with its expert's weights as it is summed, fp32 [pairs, width].

        x: a row for each pair, or for each row of the step; bf16, contiguous.
        """
        one, count = self.layers[0], len(pairs.chosen)
        blocks = triton.cdiv(one.size_out, OUTPUTS.value)
        width = blocks * OUTPUTS.value
        sums = torch.empty(count, width, dtype=torch.float32, device=x.device)
        _expert_products[(len(pairs.owners), blocks)](
            x, self._facts, pairs.order, pairs.bounds, pairs.owners, pairs.ends, sums, one.size_in, width,
            len(self.layers), count // len(x), NF4=one.unpacking, ROWS=pairs.rows, SIZE=OUTPUTS.value,
            num_stages=STAGES[pairs.rows], **PLAIN,
        )  # fmt: skip
        return sums

    def __call__(self, x: torch.Tensor, pairs: _Pairs, rows: RowMap) -> torch.Tensor:
        """Compute x, as for `sums` -> [pairs, out] bf16."""
        one, each, sums = self.layers[0], pairs.each, self.sums(x, pairs)
        terms = _terms_of(rows, len(pairs.chosen) // each, x.device)
        if not terms.count or (not terms.most_rank and not self._filled):
            return sums[:, : one.size_out].to(torch.bfloat16)
        for table in self._tables:
            table.commit()
        most = terms.most_rank or max(layer.most_rank for layer in self.layers)
        pieces = triton.cdiv(one.size_in, PIECE.value)
        numbers = terms.count * each * most
        parts = pieces if numbers * pieces <= HIDDEN else 1
        hidden = torch.empty(numbers * parts, dtype=torch.float32, device=x.device)
        _expert_shrink[(terms.count * each, triton.cdiv(most, RANKS.value), parts)](
            x, self._facts, pairs.chosen, terms.row, terms.slot, hidden, terms.count, one.size_in,
            pieces // parts, most, each, len(pairs.chosen) // len(x), **PLAIN,
        )  # fmt: skip
        y = x.new_empty(len(pairs.chosen), one.size_out)
        _expert_finish[(len(y), triton.cdiv(one.size_out, OUTPUTS.value))](
            sums, self._facts, pairs.chosen, hidden, terms.starts, terms.slot, terms.weight, y,
            sums.shape[1], one.size_out, terms.count, parts, most, each, QUANTIZED=one.nf4, **PLAIN,
        )  # fmt: skip
        return y


class CudaExperts:
    """Experts of a mixture: one launch computes the products of all rows with their experts' matrices.

    Which experts are chosen stays on the device, so that a CUDA graph has whatever they are.
    """

    captures = True

    def __init__(
        self, matrices: Mapping[str, Sequence[CudaLinear]], activation: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Take the layers of the matrices up, whose halves are the gate and the up projection, and down."""
        self._by_name = {name: _ExpertMatrices(layers) for name, layers in matrices.items()}
        self._up, self._down = self._by_name.values()
        self._activation = activation

    def __call__(
        self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, rows: RowMap
    ) -> torch.Tensor:
        if x.dtype != torch.bfloat16:
            raise TypeError(f"experts in bf16 got rows in {x.dtype}")
        pairs = _Pairs.of(chosen, len(self._up.layers))
        gate, up = self._up(x.contiguous(), pairs, rows).chunk(2, dim=-1)
        given = self._down((self._activation(gate) * up).contiguous(), pairs, rows)
        parts = (given.view(*chosen.shape, -1) * weights[..., None]).to(x.dtype)
        ascending = chosen.argsort(dim=-1)
        parts = parts.gather(1, ascending[..., None].expand_as(parts))
        total = torch.zeros_like(x)
        for part in parts.unbind(1):
            total = total + part
        return total

    def put(self, name: str, slot: int, weights: ExpertLora | None) -> None:
        self._by_name[name].put(slot, weights)

    def exact(self, slot: int) -> bool:
        return False

    @torch.inference_mode()
    def differs(self) -> bool:
        """Return True if a row's sums have other bits than an expert's own layer gives, few rows or many."""
        for matrices in (self._up, self._down):
            layers = matrices.layers
            draw = torch.Generator().manual_seed(0)
            for count in EXPERT_TRIAL_ROWS:
                x = torch.randn(count, layers[0].size_in, generator=draw)
                x = x.to(layers[0].weight.device, torch.bfloat16)
                number = torch.arange(count, device=x.device) % min(len(layers), 2)
                sums = matrices.sums(x, _Pairs.of(number[:, None], len(layers)))[:, : layers[0].size_out]
                for expert in range(min(len(layers), 2)):
                    own = number == expert
                    if not torch.equal(sums[own], layers[expert].sums(x[own])):
                        return True
        return False


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Make `device` the current one, on which Triton launches."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, copied if needed, so that the kernels may load 16 bytes at a time."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


class SlotFacts:
    """Facts of the slots of up to LAYERS layers, in host memory and on the device.

    Slots that have changed are copied before they are read, each with all of its layers.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        # The last slot stays empty: padding's.
        shape = slots + 1, LAYERS.value, SLOT_FACTS.value
        self._here = np.zeros(shape, dtype=np.int64)
        with torch.inference_mode(False):  # it is written to in any mode
            self._there = torch.zeros(shape, dtype=torch.int64, device=device)
        self._changed: set[int] = set()
        self.layers = 0
        """Number of layers that have a place."""

    def fits(self, slots: int, device: torch.device) -> bool:
        """Return True if one more layer of so many slots has a place."""
        same = len(self._here) == slots + 1 and self._there.device == device
        return same and self.layers < LAYERS.value

    def address(self, place: int) -> int:
        """Return the address of a layer's facts of slot 0."""
        return self._there[0, place].data_ptr()

    def put(self, slot: int, place: int, facts: Sequence[int]) -> None:
        self._here[slot, place] = facts
        self._changed.add(slot)

    def commit(self) -> None:
        """Start one copy of the slots that have changed, for what is launched next."""
        if not self._changed:
            return
        some = slice(min(self._changed), max(self._changed) + 1)
        self._changed.clear()
        source = torch.from_numpy(self._here[some].copy())
        if self._there.device.type == "cuda":
            source = source.pin_memory()
        self._there[some].copy_(source, non_blocking=True)


class CudaLinear:
    """One linear layer, 4-bit or bf16, plus the plain LoRAs in its slots."""

    captures = True
    adds = True

    def __init__(self, kernels: CudaKernels, base: Any, slots: int, reference: ReferenceLinear) -> None:
        """Describe the layer to the kernels. `reference`: the same layer by PyTorch."""
        self._reference = reference
        self.size_in, self.size_out = base.in_features, base.out_features
        self.nf4 = _is_nf4(base)
        self.unpacking: int = kernels.unpacking if self.nf4 else 0
        """Way to unpack its weights, 0 for those in bf16: `NF4` of its kernels."""
        self.weight: torch.Tensor = base.weight.data
        self.absmax = self.code = None
        self.shift = 0
        if self.nf4:
            state = base.weight.quant_state
            self.absmax, self.code = plain_absmax(state).float().contiguous(), state.code.float().contiguous()
            self.shift = int(state.blocksize).bit_length() - 1
        self.bias = None if base.bias is None else base.bias.to(torch.bfloat16).contiguous()
        self.table, self._place = kernels.place_in_slots(slots, self.weight.device)
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.most_rank = 0
        tensors = (self.weight, self.absmax, self.code, self.bias)
        addresses = [0 if one is None else one.data_ptr() for one in tensors]
        self.facts = [*addresses, self.table.address(self._place), self.size_out, self.shift]
        """Facts of the layer for the kernels, by the indices above."""
        self._layers = CudaLayers(kernels, [self])

    def __call__(self, x: torch.Tensor, rows: RowMap, onto: torch.Tensor | None = None) -> torch.Tensor:
        if x.dtype != torch.bfloat16:
            if FIXED in rows.held:
                raise CaptureError(f"a layer multiplies {x.dtype}, for which a graph has no adapters")
            return self._reference(x, rows, onto)
        return self._layers(x.contiguous(), rows, onto)[0]

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        """Return the products with the base's weights as they are summed, fp32 [rows, out]."""
        return self._layers.products(x.contiguous())[1][:, : self.size_out]

    def use_library(self, used: bool) -> bool:
        """Have the device's library multiply many rows, or the kernel. Return which of them did before."""
        before, self._layers.by_library = self._layers.by_library, used
        return before

    def exact(self, slot: int) -> bool:
        return False

    def put(self, slot: int, weights: LoraWeights | None) -> None:
        self._reference.put(slot, weights)
        self._held.pop(slot, None)
        facts = [0] * SLOT_FACTS.value
        if weights is not None:
            a, b = _aligned(weights.a), _aligned(weights.b)
            self._held[slot] = a, b
            bits = int(np.float32(weights.scale).view(np.int32))
            narrow = int(a.dtype == torch.bfloat16)
            facts = [a.data_ptr(), b.data_ptr(), weights.rank, bits, narrow, int(weights.adds_wide)]
        self.table.put(slot, self._place, facts)
        self.most_rank = max((len(a) for a, _ in self._held.values()), default=0)


class CudaLayers:
    """Up to three linear layers that multiply the same rows, in three launches.

    `gated`: two of them, a gate and an up projection; the one result is silu(gate) * up.
    """

    def __init__(self, kernels: CudaKernels, layers: Sequence[CudaLinear], *, gated: bool = False) -> None:
        self._kernels = kernels
        self._layers = tuple(layers)
        self._gated = gated
        # In whole blocks of WIDE, so that a layer's sums begin at the same column with both.
        blocks = [triton.cdiv(layer.size_out, WIDE) * WIDE // OUTPUTS.value for layer in layers]
        self._blocks = sum(blocks)
        self._starts = (*accumulate(blocks), self._blocks)[:2]
        self._finished = blocks[0] if gated else self._blocks
        self._pieces = triton.cdiv(layers[0].size_in, PIECE.value)
        self._facts = sent(np.array([layer.facts for layer in layers]), layers[0].weight.device)
        self._tables = tuple({layer.table for layer in layers})
        self._wide: tuple[list[int], torch.Tensor] = [], self._facts
        """Facts with weights in bf16, and these weights' addresses."""
        self.by_library = False
        """Whether the device's library multiplies more than UNPACKED_ROWS rows."""
        self.by_library = kernels.library_fits(self)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the numbers of inputs and of each layer's outputs: a library's algorithm depends on them."""
        return self._layers[0].size_in, *(layer.size_out for layer in self._layers)

    @property
    def aligned(self) -> bool:
        """Return True if the weights lie where those that are unpacked do, which the verdict is for."""
        return not any(one.weight.data_ptr() % LIBRARY_ALIGNMENT for one in self._layers if not one.nf4)

    @property
    def device(self) -> torch.device:
        return self._facts.device

    @torch.inference_mode()
    def library_differs(self) -> bool:
        """Return True if a sum of the library's product has other bits than the kernel's."""
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(LIBRARY_ROWS, self._layers[0].size_in, generator=draw).to(self.device, torch.bfloat16)
        _, own = self.products(x)
        theirs = torch.empty_like(own)
        self._multiply(x, theirs)
        return not all(map(torch.equal, self._outputs(own), self._outputs(theirs)))

    def _outputs(self, sums: torch.Tensor) -> list[torch.Tensor]:
        """Return each layer's columns of the sums."""
        firsts = [start * OUTPUTS.value for start in (0, *self._starts)]
        return [sums[:, first:][:, : one.size_out] for first, one in zip(firsts, self._layers, strict=False)]

    def _multiply(self, x: torch.Tensor, sums: torch.Tensor) -> None:
        """Multiply LIBRARY_ROWS rows at a time, of which x and the sums have a multiple, by the library."""
        for number, (layer, outputs) in enumerate(zip(self._layers, self._outputs(sums), strict=True)):
            size = layer.size_out, layer.size_in
            weight = layer.weight
            if layer.nf4:
                weight = self._kernels.unpack(layer, number)[: size[0] * size[1]].view(size)
            for first in range(0, len(x), LIBRARY_ROWS):
                rows = slice(first, first + LIBRARY_ROWS)
                library_product(x[rows], weight, outputs[rows])

    def __call__(self, x: torch.Tensor, rows: RowMap, onto: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Compute x [rows, in] bf16, contiguous -> [rows, out] bf16 of each; a single layer's is added to
        `onto`."""
        for table in self._tables:
            table.commit()
        count, size_in, nf4 = len(x), self._layers[0].size_in, self._layers[0].nf4
        ys = [x.new_empty(count, one.size_out) for one in self._layers[: 1 if self._gated else None]]
        told, sums = self.products(x)
        terms = _terms_of(rows, count, x.device)
        to = ys[0] if onto is None else onto, *(*ys, *ys, *ys)[:3]
        how: dict[str, Any] = {"GATED": self._gated, "ONTO": onto is not None, **PLAIN}
        if not terms.count:
            _finish_bare[(triton.cdiv(count, FEW_ROWS), self._finished)](
                sums, told, *to, count, sums.shape[1], *self._starts, ROWS=FEW_ROWS, **how
            )
            return ys
        most = terms.most_rank or max(layer.most_rank for layer in self._layers)
        numbers = len(self._layers) * terms.count * most
        own_parts = self._pieces if numbers * self._pieces <= HIDDEN else 1
        hidden = torch.empty(numbers * own_parts, dtype=torch.float32, device=x.device)
        each = ROWS_IN_TURN if count >= PROMPT_ROWS and self._kernels.switches.in_turn else 1
        if numbers:
            grid = (
                triton.cdiv(terms.count, each), len(self._layers) * triton.cdiv(most, RANKS.value), own_parts
            )  # fmt: skip
            _shrink[grid](
                x, told, terms.row, terms.slot, hidden, terms.count, size_in, self._pieces // own_parts, most,
                each, **PLAIN,
            )  # fmt: skip
        _finish[(triton.cdiv(count, each), self._finished)](
            sums, told, hidden, terms.starts, terms.slot, terms.weight, *to, count, sums.shape[1],
            terms.count, own_parts, most, *self._starts, each, QUANTIZED=nf4, **how,
        )  # fmt: skip
        return ys

    def products(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute x [rows, in] bf16, contiguous, times the base's weights.

        Returns:
            The layers' facts for further kernels; the sums, fp32 [rows, width], each layer's from its first
            block on.
        """
        count, size_in, nf4 = len(x), self._layers[0].size_in, self._layers[0].nf4
        if self.by_library and count > UNPACKED_ROWS:
            padded = triton.cdiv(count, LIBRARY_ROWS) * LIBRARY_ROWS
            if padded > count:
                x = functional.pad(x, (0, 0, 0, padded - count))
            elif x.data_ptr() % LIBRARY_ALIGNMENT:
                x = x.clone()
            sums = torch.empty(padded, self._blocks * OUTPUTS.value, dtype=torch.float32, device=x.device)
            self._multiply(x, sums)
            return self._facts, sums[:count]
        unpacked = nf4 and count > UNPACKED_ROWS
        told = self._wide_facts() if unpacked else self._facts
        width = self._blocks * OUTPUTS.value
        sums = torch.empty(count, width, dtype=torch.float32, device=x.device)
        size = FEW_ROWS if count <= FEW_ROWS else MANY_ROWS if count <= MANY_ROWS else MOST_ROWS
        wide = WIDE // OUTPUTS.value if count >= PROMPT_ROWS and self._kernels.switches.wide else 1
        blocks, *starts = (number // wide for number in (self._blocks, *self._starts))
        _products[(triton.cdiv(count, size), blocks)](
            x, told, sums, count, size_in, width, *starts,
            NF4=0 if unpacked else self._layers[0].unpacking, ROWS=size, SIZE=OUTPUTS.value * wide,
            num_warps=4 * wide, num_stages=STAGES[size], **PLAIN,
        )  # fmt: skip
        return told, sums

    def _wide_facts(self) -> torch.Tensor:
        """Return the layers' facts [layers, FACTS] with weights in bf16, valid until the next call."""
        addresses = [self._kernels.unpack(layer, n).data_ptr() for n, layer in enumerate(self._layers)]
        if self._wide[0] != addresses:
            facts = np.array([layer.facts for layer in self._layers])
            facts[:, WEIGHT.value] = addresses
            self._wide = addresses, sent(facts, self._facts.device)
        return self._wide[1]


def library_product(x: torch.Tensor, weight: torch.Tensor, sums: torch.Tensor) -> None:
    """Compute sums = x @ weight.T, fp32, by the device's library."""
    torch.mm(x, weight.T, out_dtype=torch.float32, out=sums)


def _is_nf4(base: Any) -> bool:
    return is_nf4(base) and base.weight.quant_state.blocksize % STEP.value == 0


# ---- attention ---------------------------------------------------------------------------------


@triton.jit
def _turned(x, at, cosines, sines, row, dim, wanted, SIZE: tl.constexpr, TURN: tl.constexpr):
    """Load rows x[at + 0..dim] of queries or keys, rotated by their positions and rounded like
    transformers'."""
    place = tl.arange(0, SIZE)
    mask = wanted[:, None] & (place < dim)[None, :]
    own = tl.load(x + at[:, None] + place[None, :], mask=mask, other=0.0)
    if TURN:
        other = tl.where(place < dim // 2, place + dim // 2, place - dim // 2)
        rotated = tl.load(x + at[:, None] + other[None, :], mask=mask, other=0.0).to(tl.float32)
        rotated = tl.where((place < dim // 2)[None, :], -rotated, rotated)
        angle = row[:, None] * dim + place[None, :]
        cosine = tl.load(cosines + angle, mask=mask, other=0.0).to(tl.float32)
        sine = tl.load(sines + angle, mask=mask, other=0.0).to(tl.float32)
        first = (own.to(tl.float32) * cosine).to(tl.bfloat16).to(tl.float32)
        second = (rotated * sine).to(tl.bfloat16).to(tl.float32)
        own = (first + second).to(tl.bfloat16)
    return own


@triton.jit
def _keep(x, numbers, scales, slot, dim, SIZE: tl.constexpr, EIGHT: tl.constexpr):
    """Store numbers x[dim] in their slot of the cache: as they are, or as `LayerCache` describes for int8."""
    place = tl.arange(0, SIZE)
    to = numbers + slot * dim + place
    if EIGHT:
        wide = x.to(tl.float32)
        finite = tl.min((tl.abs(wide) < float("inf")).to(tl.int32), axis=0) > 0
        wide = tl.where(finite, wide, 0.0)
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(wide), axis=0), 127.0), SMALLEST).to(tl.bfloat16)
        number = tl.div_rn(wide, tl.zeros_like(wide) + scale.to(tl.float32))
        tl.store(to, ((number + TO_INTEGER) - TO_INTEGER).to(tl.int8), mask=place < dim)
        tl.store(scales + slot, tl.where(finite, scale.to(tl.float32), float("nan")).to(tl.bfloat16))
    else:
        tl.store(to, x, mask=place < dim)


@triton.jit(do_not_specialize_on_alignment=["write"])
def _write(
    k, v, keys, values, key_scales, value_scales, write, cosines, sines, k_row, k_head, v_row, v_head, slots,
    key_dim, value_dim, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, TURN: tl.constexpr,
    EIGHT: tl.constexpr,
):  # fmt: skip
    """Write a row's key and value of one head into the cache."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = head.to(tl.int64) * slots + tl.load(write + row)
    rows = tl.zeros((1,), dtype=tl.int64) + row
    key = _turned(k, rows * k_row + head * k_head, cosines, sines, rows, key_dim, rows >= 0, KEY_SIZE, TURN)
    _keep(tl.reshape(key, [KEY_SIZE]), keys, key_scales, slot, key_dim, KEY_SIZE, EIGHT)
    place = tl.arange(0, VALUE_SIZE)
    value = tl.load(v + row * v_row + head * v_head + place, mask=place < value_dim, other=0.0)
    _keep(value, values, value_scales, slot, value_dim, VALUE_SIZE, EIGHT)


@triton.jit
def _cached(pointers, mask, EIGHT: tl.constexpr):
    """Load numbers of the cache as bf16, which holds an int8 exactly."""
    if EIGHT:
        found = tl.load(pointers, mask=mask, other=0).to(tl.float32).to(tl.bfloat16)
    else:
        found = tl.load(pointers, mask=mask, other=0.0)
    return found


@triton.jit(
    do_not_specialize=["first_tile", "first_row", "rows", "table_width"],
    do_not_specialize_on_alignment=["tiles", "position", "table"],
)
def _attend(
    q, keys, values, key_scales, value_scales, part, stats, out, tiles, position, table, cosines, sines,
    sinks, q_row, q_head, first_tile, first_row, rows, heads, slots, table_width, key_dim, value_dim, scaling,
    softcap, window, chunk, BLOCK: tl.constexpr, KEYS: tl.constexpr, GROUPS: tl.constexpr,
    PADDED: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, TURN: tl.constexpr,
    EIGHT: tl.constexpr, WHOLE: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Attend a tile's queries to SPLIT keys: part[split, row, head, dim], stats[split, row, head, 2].

    `part` is not divided yet by the sum of the weights. `stats` are that sum and the largest score. Both have
    `rows` rows, from `first_row` on.

    WHOLE: no context has more keys, so that the result is divided at once and stored in out[row, head, dim].
    """
    tile, kv_head, split = first_tile + tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, count, context = (
        tl.load(tiles + tile * 3),
        tl.load(tiles + tile * 3 + 1),
        tl.load(tiles + tile * 3 + 2),
    )
    query = tl.arange(0, QUERIES)
    row = (first + query // PADDED).to(tl.int64)
    head = kv_head * GROUPS + query % PADDED
    wanted = (query // PADDED < count) & (query % PADDED < GROUPS)
    place = tl.load(position + row, mask=wanted, other=-1)
    last = tl.max(place)
    dim, value_place = tl.arange(0, KEY_SIZE), tl.arange(0, VALUE_SIZE)
    largest = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((QUERIES,), dtype=tl.float32)
    mixed = tl.zeros((QUERIES, VALUE_SIZE), dtype=tl.float32)
    if split * SPLIT <= last:
        own = _turned(q, row * q_row + head * q_head, cosines, sines, row, key_dim, wanted, KEY_SIZE, TURN)
        for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, last + 1), KEYS):
            key = start + tl.arange(0, KEYS)
            known = key <= last
            block = tl.load(table + context * table_width + key // BLOCK, mask=known, other=0)
            slot = kv_head.to(tl.int64) * slots + block * BLOCK + key % BLOCK
            ks = _cached(
                keys + slot[None, :] * key_dim + dim[:, None],
                known[None, :] & (dim < key_dim)[:, None],
                EIGHT,
            )
            score = tl.dot(own, ks)
            if EIGHT:
                score *= tl.load(key_scales + slot, mask=known, other=0.0).to(tl.float32)[None, :]
            score *= scaling
            if softcap > 0:
                # tanh by what Triton has: 1 - 2 / (exp(2x) + 1), which is right at both ends.
                score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * (score / softcap)) + 1.0))
            seen = key[None, :] <= place[:, None]
            if window > 0:
                seen = seen & (key[None, :] > place[:, None] - window)
            if chunk > 0:
                seen = seen & (key[None, :] >= place[:, None] - place[:, None] % chunk)
            score = tl.where(seen, score, float("-inf"))
            now = tl.maximum(largest, tl.max(score, axis=1))
            base = tl.where(now == float("-inf"), 0.0, now)
            shrunk = tl.exp(largest - base)
            weights = tl.exp(score - base[:, None])
            vs = _cached(
                values + slot[:, None] * value_dim + value_place[None, :],
                known[:, None] & (value_place < value_dim)[None, :],
                EIGHT,
            )
            weight = weight * shrunk + tl.sum(weights, axis=1)
            if EIGHT:
                weights *= tl.load(value_scales + slot, mask=known, other=0.0).to(tl.float32)[None, :]
            mixed = mixed * shrunk[:, None] + tl.dot(weights.to(tl.bfloat16), vs)
            largest = now
    if WHOLE:
        if SINKS:
            sink = tl.load(sinks + head, mask=wanted, other=0.0)
            weight, shrunk = _with_sink(weight, largest, sink)
            mixed *= shrunk[:, None]
        # The first row of a tile of no rows is padding; a tile of -1 rows is none.
        wanted = (query // PADDED < tl.where(count == 0, 1, count)) & (query % PADDED < GROUPS)
        given = _divided(mixed, weight[:, None], (place >= 0)[:, None]).to(tl.bfloat16)
        place = (row * heads + head)[:, None] * value_dim + value_place[None, :]
        tl.store(out + place, given, mask=wanted[:, None] & (value_place < value_dim)[None, :])
    elif split * SPLIT <= last:
        to = (split.to(tl.int64) * rows + row - first_row) * heads + head
        tl.store(
            part + to[:, None] * value_dim + value_place[None, :],
            mixed,
            mask=wanted[:, None] & (value_place < value_dim)[None, :],
        )
        tl.store(stats + to * 2, weight, mask=wanted)
        tl.store(stats + to * 2 + 1, largest, mask=wanted)


@triton.jit
def _with_sink(weight, largest, sink):
    """Return the sum of weights that includes the sink's, and the factor of the other weights in it."""
    base = tl.maximum(largest, sink)
    shrunk = tl.exp(largest - base)
    return weight * shrunk + tl.exp(sink - base), shrunk


@triton.jit
def _divided(mixed, weight, there):
    """Divide by the sum of the weights, even by NaN, as of an adapter that overflows. Return zeros for
    padding."""
    return tl.where(there, mixed / tl.where(there, weight, 1.0), 0.0)


@triton.jit(do_not_specialize=["first_row", "rows"], do_not_specialize_on_alignment=["position"])
def _merge(
    part, stats, position, sinks, out, first_row, rows, heads, value_dim, VALUE_SIZE: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """Merge one query's output from the splits that it sees, in ascending order; zeros for padding."""
    own_row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = first_row + own_row
    dim = tl.arange(0, VALUE_SIZE)
    largest, weight = float("-inf"), 0.0
    mixed = tl.zeros((VALUE_SIZE,), dtype=tl.float32)
    place = tl.load(position + row)
    for split in range((place + SPLIT) // SPLIT):
        at = (split * rows + own_row) * heads + head
        some, own = tl.load(stats + at * 2), tl.load(stats + at * 2 + 1)
        now = tl.maximum(largest, own)
        base = tl.where(now == float("-inf"), 0.0, now)
        before, after = tl.exp(largest - base), tl.exp(own - base)
        weight = weight * before + some * after
        mixed = mixed * before + tl.load(part + at * value_dim + dim, mask=dim < value_dim, other=0.0) * after
        largest = now
    if SINKS:
        weight, shrunk = _with_sink(weight, largest, tl.load(sinks + head))
        mixed *= shrunk
    given = _divided(mixed, weight, place >= 0).to(tl.bfloat16)
    tl.store(out + (row * heads + head) * value_dim + dim, given, mask=dim < value_dim)


@dataclass(frozen=True)
class _Step:
    """A step's contexts on the device."""

    position: torch.Tensor
    write: torch.Tensor
    """KV slots, [tables, rows]."""
    tables: torch.Tensor
    """KV blocks, [tables, contexts, blocks]."""
    tiles: torch.Tensor
    """Tiles, [tiles, 3]: first packed row, number of rows, context. 0 rows: one of padding; -1: no tile."""
    first_rows: list[int]
    """First packed row of each tile; `splits` is the largest number of splits that its rows see."""
    splits: list[int]
    rows: int
    whole: bool
    """Whether no row has more keys than one SPLIT, and each row is in a tile."""
    aligned: int = 1
    """Number to a multiple of which the tiles of a chunk are cut off."""
    held: dict[int, list[_Chunk]] = field(default_factory=dict)

    def chunks(self, most: int) -> list[_Chunk]:
        """Return chunks of all tiles and rows, computed once.

        Rows times splits of a chunk are at most `most`, unless it has the fewest tiles that it may have.
        """
        if most not in self.held:
            edges, found, begin, wide = [0, *self.first_rows[1:], self.rows], list[_Chunk](), 0, 0
            widest = max(self.splits, default=0)
            tile_rows = self.aligned if self.aligned > 1 else max(b - a for a, b in pairwise(edges))
            parts = max(triton.cdiv(self.rows * widest, most), 1)
            # About even ones: a few rows at the end would take as long as many do.
            most_even = min(most, triton.cdiv(self.rows * widest, parts) + tile_rows * widest)
            for tile, own in enumerate(self.splits):
                end = edges[min(tile + self.aligned, len(self.splits))]
                ends_here = tile > begin and tile % self.aligned == 0
                if ends_here and (end - edges[begin]) * max(wide, own) > most_even:
                    found.append(_Chunk(begin, tile - begin, edges[begin], edges[tile] - edges[begin], wide))
                    begin, wide = tile, 0
                wide = max(wide, own)
            tiles, rows = len(self.splits) - begin, self.rows - edges[begin]
            self.held[most] = [*found, _Chunk(begin, tiles, edges[begin], rows, wide)]
        return self.held[most]


@dataclass(frozen=True)
class _Chunk:
    """Tiles that attend at once, and their rows, including those of padding behind them."""

    first_tile: int
    tiles: int
    first_row: int
    rows: int
    splits: int


def _step_of(contexts: Contexts, rows: int, device: torch.device) -> _Step:
    """Return the step's contexts, computed once. `rows`: largest number of a tile's rows."""
    key = FIXED if FIXED in contexts.held else f"cuda {rows}"
    if key not in contexts.held:
        tiles = np.array(list(_tiles(contexts, rows)), dtype=np.int32).reshape(-1, 3)
        arrays = contexts.position, contexts.write, contexts.tables, tiles
        there = sent(np.concatenate([array.reshape(-1) for array in arrays]), device)
        parts = torch.split(there, [array.size for array in arrays])
        own = [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
        firsts = tiles[:, 0]
        longest = np.maximum.reduceat(contexts.position, firsts) if len(tiles) else firsts
        splits = (longest // SPLIT.value + 1).tolist()
        whole = max(splits, default=0) == 1 and bool(contexts.position.min() >= 0)
        rows_of_step = len(contexts.position)
        contexts.held[key] = _Step(
            own[0], own[1], own[2], own[3], firsts.tolist(), splits, rows_of_step, whole
        )
    made: _Step = contexts.held[key]
    return made


def _tiles(contexts: Contexts, most: int) -> Iterator[tuple[int, int, int]]:
    """Yield adjacent rows of one context as first row, number (at most `most`) and context."""
    owner = np.where(contexts.position >= 0, contexts.table_row, -1)
    edges = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), len(owner)]
    for start, stop in pairwise(edges):
        if stop > start and owner[start] >= 0:
            for first in range(start, stop, most):
                yield first, min(most, stop - first), int(owner[start])


def part_bytes(heads: int, value_dim: int) -> int:
    """Return the bytes of attention's partial results of a row in one split: of each head its values, the sum
    of weights and the largest score, fp32."""
    return heads * (value_dim + 2) * 4


def tile_rows(groups: int) -> int:
    """Return the largest number of a tile's rows, if so many heads share keys."""
    rows: int = QUERIES.value // triton.next_power_of_2(groups)
    return max(rows, 1)


@dataclass(frozen=True)
class StepSize:
    """Largest size of a step that fits in a `FixedStep`."""

    rows: int
    splits: int
    """Number of SPLITs of keys in the longest context."""
    terms: int
    """Number of (row, slot) pairs."""
    most_rank: int


class FixedStep:
    """A step's inputs at fixed places of the device, where a captured pass reads each following step.

    Smaller steps are padded; one copy brings a step to the device.
    """

    def __init__(
        self,
        size: StepSize,
        slots: int,
        block_size: int,
        padding_slots: Sequence[int],
        device: torch.device,
        tile_rows: int = 1,
    ) -> None:
        """Allocate the places.

        Args:
            padding_slots: of each table the KV slot to which padding writes, and which is never read.
            tile_rows: largest number of rows of a context that attend together.
        """
        rows, terms, tables = size.rows, size.terms, len(padding_slots)
        width = -(-size.splits * SPLIT.value // block_size)
        sizes = [rows, rows, rows, tables * rows, 3 * rows, tables * rows * width, rows + 1, *[terms] * 3]
        self._tile_rows = tile_rows
        self._no_slot, self._padding_slots = slots, np.array(padding_slots, dtype=np.int32)[:, None]
        self._here = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._there = self._here.to(device)
        self._copied: Any = torch.cuda.Event() if device.type == "cuda" else None
        self._parts = [part.numpy() for part in torch.split(self._here, sizes)]
        ids, places, position, write, tiles, table, starts, *acting = torch.split(self._there, sizes)
        self.ids, self.positions = ids, places
        self.every_row = torch.arange(rows, device=device)
        none = np.zeros(rows, dtype=np.int32)
        splits = [size.splits] * rows
        write, table = write.view(tables, rows), table.view(tables, rows, width)
        whole = size.splits == 1
        step = _Step(position, write, table, tiles, list(range(rows)), splits, rows, whole, tile_rows)
        here = np.zeros((tables, rows, width), dtype=np.int32)
        self.contexts = Contexts(none, none, here[:, :, 0], here, {FIXED: step})
        row, slot, weight = acting
        held = _Terms(terms, starts, row, slot, weight.view(torch.float32), size.most_rank)
        self.rows = RowMap(held={FIXED: held})

    def clear(self) -> None:
        """Load a step of nothing but padding."""
        none, tables = np.zeros(0, dtype=np.int32), len(self._padding_slots)
        contexts = Contexts(none, none, none.reshape(tables, 0), none.reshape(tables, 0, 0))
        self.load_step(none, contexts, RowMap())

    def load_step(self, ids: np.ndarray, contexts: Contexts, rows: RowMap) -> None:
        """Load a step: the tokens of its packed rows, int, their contexts and their adapters."""
        self.prepare(contexts, rows)
        self.send(ids)

    def prepare(self, contexts: Contexts, rows: RowMap) -> None:
        """Write a step, except its tokens, to host memory while the device may compute another one."""
        _, places, position, write, tiles, table, starts, term_rows, slots, weights = self._parts
        count = len(contexts.position)
        if self._copied is not None:
            # After a step of which nothing is read, its copy may still be to come.
            self._copied.synchronize()
        for part in self._parts:
            part[:] = 0
        position[:] = -1
        position[:count] = contexts.position
        places[:] = np.maximum(position, 0)
        slots_of_rows = write.reshape(len(self._padding_slots), -1)
        slots_of_rows[:, :count] = contexts.write
        slots_of_rows[:, count:] = self._padding_slots
        self._write_tiles(tiles.reshape(-1, 3), position, contexts.table_row)
        wide = table.reshape(len(self._padding_slots), len(position), -1)
        some = contexts.tables[:, :, : wide.shape[2]]
        wide[:, : some.shape[1], : some.shape[2]] = some
        slots[:] = self._no_slot
        own_starts, columns = _acting(rows, count)
        starts[: count + 1] = own_starts
        starts[count + 1 :] = own_starts[-1]
        for own, new in zip((term_rows, slots, weights), columns, strict=True):
            own[: len(new)] = new

    def _write_tiles(self, tiles: np.ndarray, position: np.ndarray, table_row: np.ndarray) -> None:
        """Write the tiles [rows, 3]: tile i begins with row i, or is none if an earlier one has that row."""
        owner = np.full(len(tiles), -1, dtype=np.int32)
        owner[: len(table_row)] = table_row
        owner[position < 0] = -1
        number = np.arange(len(tiles))
        begins = (number % self._tile_rows == 0) | (owner < 0) | (owner != np.roll(owner, 1))
        firsts = np.flatnonzero(begins)
        tiles[:, 0], tiles[:, 1] = number, -1
        tiles[firsts, 1] = np.where(owner[firsts] < 0, 0, np.diff(firsts, append=len(tiles)))
        tiles[firsts, 2] = np.maximum(owner[firsts], 0)

    def send(self, ids: np.ndarray) -> None:
        """Copy the prepared step, with its tokens, to the device."""
        self._parts[0][: len(ids)] = ids
        self._there.copy_(self._here, non_blocking=True)
        if self._copied is not None:
            self._copied.record()


class CudaAttention:
    """Attention of one layer over its KV cache."""

    def __init__(self, cache: LayerCache, settings: AttentionSettings) -> None:
        self._cache = cache.keys, cache.values, *(cache.scales or (cache.keys, cache.values))
        self._block_size, self._head_slots, self._table = cache.block_size, cache.head_slots, cache.table
        self._numbers = settings.scaling, settings.softcap or 0.0, settings.window or 0, settings.chunk or 0
        self._sinks, self._writes = settings.sinks, settings.writes
        self._sizes = {
            "KEY_SIZE": max(16, triton.next_power_of_2(cache.keys.shape[2])),
            "VALUE_SIZE": max(16, triton.next_power_of_2(cache.values.shape[2])),
        }
        self._eight = cache.scales is not None
        largest = max(self._sizes.values())
        self._tiles = [options for size, options in ATTENTION if largest <= size]
        """Tiles of decreasing size, of which the first is used."""
        self._fits = False
        """Whether the device is known to have shared memory for the first tile."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        contexts: Contexts,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        if not q.dtype == k.dtype == v.dtype == torch.bfloat16:
            raise TypeError(f"attention in bf16 got {q.dtype}, {k.dtype} and {v.dtype}")
        q, k, v = (one if one.stride(2) == 1 else one.contiguous() for one in (q, k, v))
        heads, count, key_dim = q.shape
        kv_heads, _, value_dim = self._cache[1].shape
        groups = heads // kv_heads
        padded = triton.next_power_of_2(groups)
        step = _step_of(contexts, tile_rows(groups), q.device)
        if step.aligned > tile_rows(groups):
            raise CaptureError(f"{groups} heads share keys, for which tiles of a graph have too many rows")
        table = step.tables[self._table]
        cosines, sines = rotation if rotation is not None else (q, q)
        sinks = q if self._sinks is None else self._sinks
        sizes = {**self._sizes, "TURN": rotation is not None, "EIGHT": self._eight}
        if self._writes:
            _write[(count, kv_heads)](
                k, v, *self._cache, step.write[self._table], cosines, sines, k.stride(1), k.stride(0),
                v.stride(1), v.stride(0), self._head_slots, key_dim, value_dim, **sizes, **PLAIN,
            )  # fmt: skip
        if step.whole:
            chunks, held = [_Chunk(0, len(step.splits), 0, count, 1)], 0
        else:
            chunks = step.chunks(SCRATCH // part_bytes(heads, value_dim))
            held = max(one.splits * one.rows for one in chunks)
        part = q.new_empty(held, heads, value_dim, dtype=torch.float32)
        stats = q.new_empty(held, heads, 2, dtype=torch.float32)
        out = q.new_empty(count, heads, value_dim)
        given = (
            q, *self._cache, part, stats, out, step.tiles, step.position, table, cosines, sines, sinks,
            q.stride(1), q.stride(0),
        )  # fmt: skip
        facts = heads, self._head_slots, table.shape[1], key_dim, value_dim, *self._numbers
        how = {"BLOCK": self._block_size, "GROUPS": groups, "PADDED": padded, **sizes, **PLAIN}
        how["SINKS"] = self._sinks is not None
        tile = self._fitting_tile(*given, 0, 0, 0, *facts, **how)
        for one in chunks:
            if one.splits:
                _attend[(one.tiles, kv_heads, one.splits)](
                    *given, one.first_tile, one.first_row, one.rows, *facts, WHOLE=step.whole, **tile, **how
                )
            if not step.whole:
                _merge[(one.rows, heads)](
                    part, stats, step.position, sinks, out, one.first_row, one.rows, heads, value_dim,
                    VALUE_SIZE=sizes["VALUE_SIZE"], SINKS=self._sinks is not None, **PLAIN,
                )  # fmt: skip
        return out

    def _fitting_tile(self, *given: Any, **constants: Any) -> dict[str, Any]:
        """Return the first tile with which the device has shared memory for both forms of `_attend`.

        It is chosen before the first launch and never changes, since a row has other bits with another tile.
        """
        while not self._fits:
            asked = [
                _attend.warmup(*given, grid=(1,), WHOLE=whole, **self._tiles[0], **constants)
                for whole in (False, True)
            ]
            if None in asked:  # nothing is compiled here, by the interpreter or while forms are collected
                break
            try:
                for kernel in asked:
                    kernel.run  # noqa: B018 (a property that loads)
                self._fits = True
            except OutOfResources as error:
                if len(self._tiles) == 1:
                    raise
                logger.warning("kernels: attention takes smaller tiles, and longer: %s", error)
                self._tiles = self._tiles[1:]
        return self._tiles[0]


# ---- recurrent layers ----------------------------------------------------------------------------


@triton.jit
def _convolve(
    x, weight, bias, kept, y, run_of, starts, read, write, x_row, channels, TAPS: tl.constexpr,
    BIAS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Compute a causal convolution of one row and some channels. The last row of a run writes its state."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    there, run = channel < channels, tl.load(run_of + row)
    total = tl.zeros((SIZE,), dtype=tl.float32)
    if run >= 0:
        start, last = tl.load(starts + run), tl.load(starts + run + 1) - 1
        old = kept + tl.load(read + run).to(tl.int64) * (TAPS - 1) * channels
        target = tl.load(write + run).to(tl.int64)
        for tap in tl.static_range(TAPS):
            source = row - (TAPS - 1) + tap
            if source >= start:
                own = tl.load(x + source * x_row + channel, mask=there, other=0.0)
            else:
                place = (source - start + TAPS - 1) * channels + channel
                own = tl.load(old + place, mask=there, other=0.0)
            w = tl.load(weight + channel * TAPS + tap, mask=there, other=0.0).to(tl.float32)
            total += own.to(tl.float32) * w
            if tap > 0 and (row == last) & (target >= 0):
                to = kept + (target * (TAPS - 1) + tap - 1) * channels + channel
                tl.store(to, own, mask=there)
        if BIAS:
            total += tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    tl.store(y + row * channels + channel, total.to(y.dtype.element_ty), mask=there)


@triton.jit
def _delta(
    q, k, v, decay, beta, states, y, starts, read, write, q_row, k_row, v_row, decay_row, beta_row, heads,
    each, key_dim, value_dim, scale, eps, KEYS: tl.constexpr, SIZE: tl.constexpr, BY_KEY: tl.constexpr,
    NORMALIZED: tl.constexpr,
):  # fmt: skip
    """Compute the delta rule of one run and head, for SIZE numbers of its values."""
    run, head = tl.program_id(0), tl.program_id(1)
    key, value = tl.arange(0, KEYS), tl.program_id(2) * SIZE + tl.arange(0, SIZE)
    known, there = key < key_dim, value < value_dim
    size = key_dim * value_dim
    place = (head * key_dim + key[:, None]) * value_dim + value[None, :]
    both = known[:, None] & there[None, :]
    old = states + tl.load(read + run).to(tl.int64) * heads * size
    state = tl.load(old + place, mask=both, other=0.0)
    for row in range(tl.load(starts + run).to(tl.int64), tl.load(starts + run + 1).to(tl.int64)):
        own = head // each * key_dim + key
        query = tl.load(q + row * q_row + own, mask=known, other=0.0).to(tl.float32)
        found = tl.load(k + row * k_row + own, mask=known, other=0.0).to(tl.float32)
        if NORMALIZED:
            query *= tl.rsqrt(tl.sum(query * query) + eps)
            found *= tl.rsqrt(tl.sum(found * found) + eps)
        wanted = tl.load(v + row * v_row + head * value_dim + value, mask=there, other=0.0).to(tl.float32)
        if BY_KEY:
            rate = tl.load(decay + row * decay_row + head * key_dim + key, mask=known, other=0.0)
            state *= _exp(rate.to(tl.float32))[:, None]
        else:
            state *= _exp(tl.load(decay + row * decay_row + head).to(tl.float32))
        wrong = wanted - tl.sum(state * found[:, None], 0)
        state += found[:, None] * (tl.load(beta + row * beta_row + head).to(tl.float32) * wrong)[None, :]
        given = tl.sum(state * (query * scale)[:, None], 0).to(y.dtype.element_ty)
        tl.store(y + (row * heads + head) * value_dim + value, given, mask=there)
    target = tl.load(write + run).to(tl.int64)
    if target >= 0:
        tl.store(states + target * heads * size + place, state, mask=both)


@triton.jit
def _scan(
    x, dt, a, b, c, skip, states, y, starts, read, write, x_row, dt_row, b_row, c_row, heads, lines, dim,
    size, LINES: tl.constexpr, SIZE: tl.constexpr, BY_SIZE: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Compute a state space of one run, for LINES of the numbers of x in one group of heads.

    `lines`: numbers of x in a group. Each has `size` numbers of the state.
    """
    run, group = tl.program_id(0), tl.program_id(1)
    own, n = tl.program_id(2) * LINES + tl.arange(0, LINES), tl.arange(0, SIZE)
    there, known = own < lines, n < size
    line = group * lines + own
    head, both = line // dim, there[:, None] & known[None, :]
    place = line[:, None] * size + n[None, :]
    old = states + tl.load(read + run).to(tl.int64) * heads * dim * size
    state = tl.load(old + place, mask=both, other=0.0)
    if BY_SIZE:
        rates = tl.load(a + head[:, None] * size + n[None, :], mask=both, other=0.0)
    else:
        rates = tl.load(a + head, mask=there, other=0.0)
    for row in range(tl.load(starts + run).to(tl.int64), tl.load(starts + run + 1).to(tl.int64)):
        step = tl.load(dt + row * dt_row + head, mask=there, other=0.0).to(tl.float32)
        given = tl.load(x + row * x_row + line, mask=there, other=0.0).to(tl.float32)
        into = tl.load(b + row * b_row + group * size + n, mask=known, other=0.0).to(tl.float32)
        out = tl.load(c + row * c_row + group * size + n, mask=known, other=0.0).to(tl.float32)
        if BY_SIZE:
            state *= _exp(step[:, None] * rates)
        else:
            state *= _exp(step * rates)[:, None]
        state += (step * given)[:, None] * into[None, :]
        total = tl.sum(state * out[None, :], 1)
        if SKIP:
            total += tl.load(skip + head, mask=there, other=0.0) * given
        tl.store(y + row * heads * dim + line, total, mask=there)
    target = tl.load(write + run).to(tl.int64)
    if target >= 0:
        tl.store(states + target * heads * dim * size + place, state, mask=both)


@dataclass(frozen=True)
class _Runs:
    """Runs of rows on the device, int32."""

    run_of: torch.Tensor
    """[rows], -1 for padding."""
    starts: torch.Tensor
    read: torch.Tensor
    write: torch.Tensor
    count: int
    padded: bool

    @property
    def arrays(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.starts, self.read, self.write

    def outputs(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return memory for the outputs of rows, zeros where some rows are padding."""
        make = torch.zeros if self.padded else torch.empty
        return make(like.shape, dtype=dtype, device=like.device)


def _runs_of(runs: StateRuns, rows: int, device: torch.device) -> _Runs:
    """Return the runs of a step, copied to the device once for all layers."""
    key = f"cuda {rows}"
    if key not in runs.held:
        lengths, used = np.diff(runs.starts), int(runs.starts[-1])
        run_of = np.full(rows, -1, dtype=np.int32)
        run_of[:used] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        runs.held[key] = _Runs(
            sent(run_of, device),
            sent(runs.starts, device),
            sent(runs.read, device),
            sent(runs.write, device),
            len(lengths),
            used < rows,
        )
    found: _Runs = runs.held[key]
    return found


def _whole_rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return tensors [T, ...] with each row contiguous, copied where it is not."""
    return [x if x[0].is_contiguous() else x.contiguous() for x in tensors]


class CudaRecurrence:
    """Recurrent layers: each program computes a part of the state of one run, one token after the other."""

    def convolve(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        states: torch.Tensor,
        runs: StateRuns,
    ) -> torch.Tensor:
        (x,), weight, own = _whole_rows(x), weight.contiguous(), _runs_of(runs, len(x), x.device)
        y = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
        with on_device(x.device):
            _convolve[(len(x), triton.cdiv(x.shape[1], CHANNELS))](
                x, weight, weight if bias is None else bias.contiguous(), states, y, own.run_of, *own.arrays,
                x.stride(0), x.shape[1], TAPS=weight.shape[1], BIAS=bias is not None, SIZE=CHANNELS, **PLAIN,
            )  # fmt: skip
        return y

    def delta_rule(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
        states: torch.Tensor,
        runs: StateRuns,
        *,
        scale: float = 1.0,
        eps: float | None = None,
    ) -> torch.Tensor:
        rows, own = _whole_rows(q, k, v, decay, beta), _runs_of(runs, len(v), v.device)
        y, (heads, value_dim), key_dim = own.outputs(v, v.dtype), v.shape[1:], q.shape[2]
        with on_device(v.device):
            _delta[(own.count, heads, triton.cdiv(value_dim, VALUES))](
                *rows, states, y, *own.arrays, *(one.stride(0) for one in rows), heads, heads // q.shape[1],
                key_dim, value_dim, scale, eps or 0.0, KEYS=triton.next_power_of_2(key_dim), SIZE=VALUES,
                BY_KEY=decay.dim() == 3, NORMALIZED=eps is not None, **PLAIN,
            )  # fmt: skip
        return y

    def state_space(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        states: torch.Tensor,
        runs: StateRuns,
        *,
        skip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        (x, dt, b, c), own = _whole_rows(x, dt, b, c), _runs_of(runs, len(x), x.device)
        a, y = a.float().contiguous(), own.outputs(x, torch.float32)
        (heads, dim), (groups, size) = x.shape[1:], b.shape[1:]
        lines, padded = heads // groups * dim, triton.next_power_of_2(size)
        block = min(max(NUMBERS // padded, 1), triton.next_power_of_2(lines))
        with on_device(x.device):
            _scan[(own.count, groups, triton.cdiv(lines, block))](
                x, dt, a, b, c, a if skip is None else skip.float().contiguous(), states, y, *own.arrays,
                *(one.stride(0) for one in (x, dt, b, c)), heads, lines, dim, size, LINES=block, SIZE=padded,
                BY_SIZE=a.dim() == 2, SKIP=skip is not None, **PLAIN,
            )  # fmt: skip
        return y


# ---- draws -------------------------------------------------------------------------------------


@triton.jit
def _summed_from(weights, at, floor, vocabulary, factor, SIZE: tl.constexpr):
    """Return the sum of a row's weights from `floor` on, as whole numbers."""
    total = tl.zeros((SIZE,), dtype=tl.int64)
    for first in range(0, vocabulary, SIZE):
        place = first + tl.arange(0, SIZE)
        w = tl.load(weights + at + place, mask=place < vocabulary, other=0.0)
        total += tl.where(w >= floor, (w * factor).to(tl.int64), 0)
    return tl.sum(total, axis=0)


@triton.jit(
    do_not_specialize=["vocabulary"],
    do_not_specialize_on_alignment=["weights", "top_p", "min_p", "uniform", "tokens"],
)
def _take_sample(weights, top_p, min_p, uniform, tokens, vocabulary, factor, SIZE: tl.constexpr):
    """Draw a row's token as `ReferenceKernels.take_samples` does, without a sort.

    The nucleus ends at the largest number from which on the weights sum up to its part of all. It is found
    bit by bit: numbers that are not negative are in the order of their bits.
    """
    row = tl.program_id(0).to(tl.int64)
    at, part = row * vocabulary, tl.load(top_p + row)
    wanted = part.to(tl.float64) * _summed_from(weights, at, 0.0, vocabulary, factor, SIZE).to(tl.float64)
    low, high = tl.cast(0, tl.int32), tl.cast(0x3F800001, tl.int32)  # the bits of 0, and those after 1's
    for _ in range(tl.where(part < 1.0, 30, 0)):
        middle = (low + high) // 2
        edge = middle.to(tl.float32, bitcast=True)
        enough = _summed_from(weights, at, edge, vocabulary, factor, SIZE).to(tl.float64) >= wanted
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    floor = tl.maximum(low.to(tl.float32, bitcast=True), tl.load(min_p + row))
    total = _summed_from(weights, at, floor, vocabulary, factor, SIZE)
    target = (tl.load(uniform + row) * total.to(tl.float64)).to(tl.int64)
    before, token, last = tl.cast(0, tl.int64), -1, 0
    for first in range(0, vocabulary, SIZE):
        place = first + tl.arange(0, SIZE)
        w = tl.load(weights + at + place, mask=place < vocabulary, other=0.0)
        own = tl.where(w >= floor, (w * factor).to(tl.int64), 0)
        last = tl.maximum(last, tl.max(tl.where(own > 0, place, 0), axis=0))
        inside = tl.sum(own, axis=0)
        if (token < 0) & (before + inside > target):
            reached = before + tl.cumsum(own, axis=0) > target
            token = tl.min(tl.where(reached, place, vocabulary), axis=0)
        before += inside
    # Rounding may put the target on the very end: the last token that was kept.
    tl.store(tokens + row, tl.where(token < 0, last, token).to(tl.int64))


class SamplingKernels(ReferenceKernels):
    """Draws by PyTorch's operators, but for one launch that takes the samples of all rows."""

    def take_samples(
        self, weights: torch.Tensor, draws: Draws, rows: np.ndarray, candidates: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device, vocabulary = weights.device, weights.shape[-1]
        numbers = np.concatenate([draws.top_p[rows], draws.min_p[rows]])
        tokens = torch.empty(len(rows), dtype=torch.int64, device=device)
        there = sent(numbers, device)
        with on_device(device):
            _take_sample[(len(rows),)](
                weights.contiguous(), there, there[len(rows) :], sent(draws.uniform[rows], device), tokens,
                vocabulary, whole_factor(vocabulary), SIZE=SAMPLED, num_warps=SAMPLING_WARPS, **PLAIN,
            )  # fmt: skip
        return tokens, torch.zeros(len(rows), dtype=torch.bool, device=device)


# ---- the base's bytes --------------------------------------------------------------------------


@triton.jit(do_not_specialize_on_alignment=["sums"])
def _sum_bytes(table, sums, SIZE: tl.constexpr):
    """Sum the words of one part of the base, each times an odd number by its place, modulo 2^64."""
    part = tl.program_id(0).to(tl.int64)
    entry = table + part * 4
    address, count = tl.load(entry), tl.load(entry + 1)
    first, wide = tl.load(entry + 2), tl.load(entry + 3)
    total = tl.zeros((SIZE,), dtype=tl.int64)
    for begin in range(0, count, SIZE):
        place = begin + tl.arange(0, SIZE)
        if wide != 0:
            word = tl.load(address.to(tl.pointer_type(tl.int64)) + place, mask=place < count, other=0)
        else:
            word = tl.load(address.to(tl.pointer_type(tl.uint8)) + place, mask=place < count, other=0)
            word = word.to(tl.int64)
        total += word * (2 * (first + place) + 1)
    tl.store(sums + part, tl.sum(total, axis=0))


class ContentSum:
    """Sum over the bytes of the base's tensors, which reveals a write by any process.

    No change of one word is lost; words that change places are seen, but for a rare chance. It is begun
    between steps, a slice of the base at a time, and read once it has arrived: nobody waits for it.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], device: torch.device, slices: int = 16) -> None:
        """Describe the memory to the kernel. Tensors elsewhere are those of this process alone."""
        table, first = list[tuple[int, int, int, int]](), 0
        for tensor in tensors:
            if tensor.device.type != device.type:
                continue
            begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
            aligned = min(-(-begin // 8) * 8, end)
            words = aligned + (end - aligned) // 8 * 8
            parts = [(begin, aligned - begin, 0), (words, end - words, 0)]
            for start in range(aligned, words, SUMMED_BYTES):
                parts.append((start, (min(start + SUMMED_BYTES, words) - start) // 8, 1))
            for address, count, wide in parts:
                if count:
                    table.append((address, count, first, wide))
                    first += count
        self._device, self._count = device, len(table)
        self._table = sent(np.array(table, dtype=np.int64).reshape(-1, 4), device)
        self._each = max(triton.cdiv(self._count, slices), 1)
        self._found = torch.zeros((), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._arrived: Any = torch.cuda.Event() if device.type == "cuda" else None

    @torch.inference_mode()
    def begin(self) -> Iterator[None]:
        """Launch a sum, a slice at each step of the iterator. Behind its end, `take` returns the result."""
        sums = torch.zeros(self._count, dtype=torch.int64, device=self._device)
        for start in range(0, self._count, self._each):
            some = slice(start, min(start + self._each, self._count))
            with on_device(self._device):
                _sum_bytes[(some.stop - start,)](self._table[some], sums[some], SIZE=1024, **PLAIN)
            yield
        self._found.copy_(sums.sum(dtype=torch.int64), non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def take(self, *, wait: bool = False) -> int | None:
        """Return the sum that was begun; None if it has not arrived and `wait` is not set."""
        if self._arrived is not None:
            if wait:
                self._arrived.synchronize()
            elif not self._arrived.query():
                return None
        return int(self._found)


# ---- forms: what is compiled ----------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A kernel with the types and constants that a launch asked for, still to be compiled."""

    kernel: Any
    name: str
    key: str
    described: str
    """Types and constants in Triton's own form (JSON)."""

    def compiled(self) -> Any:
        """Compile it, or load it from Triton's cache, and return Triton's compiled kernel."""
        return self.kernel.preload(self.described)


@contextmanager
def collecting() -> Iterator[list[Form]]:
    """Collect the forms that launches ask for and that are not compiled yet. These launches compute nothing.

    Raises:
        AttributeError: this Triton has no hook that says what it is about to compile.
    """
    found: dict[tuple[str, str], Form] = {}
    forms: list[Form] = []

    def collect(*, key: str, fn: Any, compile: Any, **more: Any) -> bool:
        if (fn.name, key) not in found:
            form = Form(fn.jit_function, fn.name, key, compile["specialization_data"])
            found[fn.name, key] = form
            forms.append(form)
        return True

    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = collect
    try:
        yield forms
    finally:
        triton.knobs.runtime.jit_cache_hook = before


def compile_forms(forms: Sequence[Form], device: torch.device, threads: int) -> list[Any]:
    """Compile forms side by side, and return Triton's compiled kernels in the same order.

    Each is loaded onto the device as well: its first launch would do so while a step waits.
    """

    def enter() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)

    with ThreadPoolExecutor(threads, "compile", enter) as pool:
        kernels = list(pool.map(Form.compiled, forms))
    if device.type == "cuda":
        with on_device(device):
            for kernel in kernels:
                # What is too large for the device says so again when it is launched.
                with suppress(OutOfResources):
                    kernel.run  # noqa: B018 (a property that loads)
    return kernels


def warn_of_compiles() -> None:
    """Log each kernel that is compiled from now on, while sequences wait."""

    def warn(*, fn: Any, repr: str, **more: Any) -> None:
        logger.warning("kernels: %s was compiled while sequences waited: %s", fn.name, repr)

    triton.knobs.runtime.jit_post_compile_hook = warn


# ---- norms, and the back-end -------------------------------------------------------------------


@triton.jit
def _norm(x, weight, y, size, eps, SIZE: tl.constexpr, AROUND_ONE: tl.constexpr):
    """Compute a root mean square norm of one row.

    It is rounded before the weight, or (Gemma) after a weight around 1.
    """
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    there = place < size
    own = tl.load(x + row * size + place, mask=there, other=0.0).to(tl.float32)
    own = own * tl.rsqrt(tl.sum(own * own) / size + eps)
    w = tl.load(weight + place, mask=there, other=0.0).to(tl.float32)
    scaled = own * (1.0 + w) if AROUND_ONE else own.to(tl.bfloat16).to(tl.float32) * w
    tl.store(y + row * size + place, scaled.to(tl.bfloat16), mask=there)


def normed(
    given: tuple[torch.Tensor, ...], eps: float, around_one: bool, kernel: Any = _norm
) -> torch.Tensor:
    """Run a norm kernel. `given`: x, the weight, and the kernel's further inputs, contiguous."""
    x, size = given[0], given[1].numel()
    y = torch.empty_like(x)
    padded = triton.next_power_of_2(size)
    with on_device(x.device):
        kernel[(x.numel() // size,)](*given, y, size, eps, SIZE=padded, AROUND_ONE=around_one, **PLAIN)
    return y


def _capturing(graph: Any, pool: Any) -> Any:
    """Return a capture that checks this thread's calls only, since another one may be copying a version."""
    return torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")


@dataclass(frozen=True)
class Switches:
    """Choices of how the same bits are computed, each of which can be turned around alone.

    Where a check finds other bits, it does that with one after the other, to see on which of them they hang.
    """

    library: bool = True
    """Whether the device's library multiplies many rows, where its trial passes."""
    permuted: bool = False
    """Whether 4-bit weights are looked up in registers instead of shared memory. Which is faster only a GPU
    can tell."""
    wide: bool = True
    """Whether programs of many rows have WIDE outputs."""
    in_turn: bool = True
    """Whether one program computes the LoRAs of ROWS_IN_TURN rows of a prompt."""
    narrow: bool = True
    """Whether A and B of numbers in bf16 are read in bf16."""
    joined: bool = True
    """Whether layers of the same rows are one call."""
    gated: bool = True
    """Whether a gate and an up projection end in their product."""
    sums: bool = True
    """Whether layers are added to the residual by their own kernel."""
    turned: bool = True
    """Whether attention rotates queries and keys."""
    graphs: bool = True
    """Whether passes are captured as CUDA graphs."""
    tiles: bool = True
    """Whether rows of a prompt attend together in a captured pass."""
    samples: bool = True
    """Whether Triton's kernel takes samples instead of PyTorch's operators."""
    drafts: bool = True
    """Whether sequences have drafts."""
    ahead: bool = True
    """Whether the next step is planned while one is computed."""


def usual_switches() -> Switches:
    """Return the switches that the environment asks for."""
    return Switches(permuted=os.environ.get("ONEBASE_KERNELS_UNPACK") == "permute")


class CudaKernels(CudaRecurrence):
    """Back-end of the Triton kernels."""

    name = "triton"
    tiled = False
    row_multiple = 1
    joins = True
    draft_cost = 0.005
    draft_rows = MANY_ROWS
    compiles = not INTERPRETED.value
    may_capture = (
        not INTERPRETED.value
        # Private, and the only way to end a capture that failed (`_abandon`).
        and hasattr(torch._C, "_cuda_endAllocateToPool")
        and hasattr(torch._C, "_cuda_releasePool")
    )
    """Whether this PyTorch can capture passes, and leave a capture that failed."""

    def __init__(self, switches: Switches | None = None) -> None:
        """Choose how to compute; by default as `Switches` says."""
        self.switches = switches = switches or Switches()
        self.unpacking: int = PERMUTED.value if switches.permuted else GATHERED.value
        """Way to unpack 4-bit weights."""
        self.captures = self.may_capture and switches.graphs
        self.narrows, self.drafts, self.asynchronous = switches.narrow, switches.drafts, switches.ahead
        fusions = {
            "layers of the same rows": switches.joined,
            "positions": switches.turned,
            "gated MLPs": switches.gated,
            "sums": switches.sums,
        }
        self.unfused = frozenset(title for title, wanted in fusions.items() if not wanted)
        self.step_rows = 0
        own = SamplingKernels if switches.samples else ReferenceKernels
        self._reference: ReferenceKernels = own(tiled=False)
        self._scratch: dict[int, torch.Tensor] = {}
        self._pool: Any = None
        """Memory pool that all graphs share, since only one runs at a time. It is freed with the last one."""
        self._captured: WeakSet[Any] = WeakSet()
        self._abandoned: list[Any] = []
        self._tables: WeakSet[SlotFacts] = WeakSet()
        self._experts_differ: dict[tuple[Any, ...], bool] = {}
        """Whether experts of these shapes have other bits together than one by one."""
        self._library_differs: dict[tuple[int, ...], bool] = {}
        """Whether sums of the library's products, of these sizes, have other bits than the kernel's."""

    def place_in_slots(self, slots: int, device: torch.device) -> tuple[SlotFacts, int]:
        """Return a table of `slots` slots, and the place of one more layer in it."""
        roomy = (table for table in self._tables if table.fits(slots, device))
        table = next(roomy, None) or SlotFacts(slots, device)
        self._tables.add(table)
        table.layers += 1
        return table, table.layers - 1

    def commit_slots(self) -> None:
        """Copy what has changed in slots to the device, where a captured pass reads it."""
        for table in tuple(self._tables):
            table.commit()

    def linear(self, base: Any, slots: int, *, unpacked: bool = False) -> CudaLinear | ReferenceLinear:
        reference = ReferenceLinear(base, tiled=False, unpacked=unpacked)
        plain = type(base) is nn.Linear and base.weight.dtype == torch.bfloat16
        weight = base.weight
        fits = (
            base.in_features % STEP.value == 0
            and weight.is_contiguous()
            and not weight.data_ptr() % ALIGNMENT
        )
        return CudaLinear(self, base, slots, reference) if fits and (plain or _is_nf4(base)) else reference

    def library_fits(self, layers: CudaLayers) -> bool:
        """Return True if the device's library gives the bits of the kernel's sums, by a trial of these sizes.

        Nothing is tried where no step has so many rows: the trial takes memory.
        """
        sizes, collects = layers.sizes, triton.knobs.runtime.jit_cache_hook is not None
        few = self.step_rows <= UNPACKED_ROWS or sum(sizes[1:]) > LIBRARY_OUTPUTS
        unwanted = collects or few or not self.switches.library
        if unwanted or not layers.aligned or not library_may_fit(layers.device):
            return False
        if sizes not in self._library_differs:
            short = False
            try:
                differs = layers.library_differs()
            except Exception as error:
                # Whatever another PyTorch may say: the kernel multiplies any number of rows.
                short, differs = is_out_of_memory(error), True
                if isinstance(error, torch.AcceleratorError) and not short:
                    raise
                logger.warning(
                    "kernels: the library multiplies nothing of %s, since it fails: %s", sizes, error
                )
            self._scratch.clear()
            if layers.device.type == "cuda":
                torch.cuda.empty_cache()
            if short:
                return False
            self._library_differs[sizes] = differs
            who = (
                "the kernel, since the library has other bits"
                if differs
                else "the library, with the same bits"
            )
            logger.info("kernels: products of more than %d rows, %s: by %s", UNPACKED_ROWS, sizes, who)
        return not self._library_differs[sizes]

    def join(self, layers: Sequence[LinearKernel], *, gated: bool = False) -> CudaLayers | None:
        own = [layer for layer in layers if isinstance(layer, CudaLinear)]
        if len(own) < len(layers) or len({(layer.nf4, layer.size_in) for layer in own}) != 1:
            return None
        return CudaLayers(self, own, gated=gated)

    def experts(self, module: Any, slots: int) -> CudaExperts | None:
        """Return the experts' kernel if their code is Mixtral's and each matrix is a kernel's, else None."""
        kind: Any = type(module)
        if not is_usual(kind):
            return None
        matrices: dict[str, list[CudaLinear]] = {}
        for name in matrix_names(module):
            held = getattr(module, name)
            count = held.count if isinstance(held, ExpertStack) else len(held)
            layers = [self.linear(layer_of(held, number), slots) for number in range(count)]
            matrices[name] = [layer for layer in layers if isinstance(layer, CudaLinear)]
            if len(matrices[name]) < count:
                return None
        found = CudaExperts(matrices, module.act_fn)
        shapes = tuple((one[0].size_in, one[0].size_out, one[0].nf4) for one in matrices.values())
        if shapes not in self._experts_differ:
            try:
                self._experts_differ[shapes] = found.differs()
                reason = "which have other bits together"
            except Exception as error:
                # Whatever a compiler or a driver may say: one by one they are served all the same.
                if isinstance(error, torch.AcceleratorError) or is_out_of_memory(error):
                    raise
                self._experts_differ[shapes], reason = True, f"since together they fail: {error}"
            if self._experts_differ[shapes]:
                logger.warning("kernels: experts one by one, %s", reason)
        return None if self._experts_differ[shapes] else found

    def route(self, choose: Router, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return choose(x)

    def unpack(self, layer: CudaLinear, number: int) -> torch.Tensor:
        """Return the layer's weights in bf16, valid until the next call for a layer of this number."""
        size = layer.size_in * layer.size_out
        held = self._scratch.get(number)
        if held is None or held.numel() < size:
            held = self._scratch[number] = layer.weight.new_empty(size, dtype=torch.bfloat16)
        grid = triton.cdiv(layer.size_out, OUTPUTS.value), layer.size_in // STEP.value
        _unpack[grid](
            layer.weight, layer.absmax, layer.code, held, layer.size_in, layer.shift, layer.size_out,
            NF4=layer.unpacking, **PLAIN,
        )  # fmt: skip
        return held

    def norm(self, base: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a Triton norm if a trial shows that `base` is a root mean square norm, else `base`."""
        own: Callable[[torch.Tensor], torch.Tensor] = base
        found = norm_of(base)
        if found is None:
            return own
        weight, eps, around_one = found

        def norm(x: torch.Tensor) -> torch.Tensor:
            # A norm that ignores its weight (Falcon Mamba) may be given rows of another width.
            if x.dtype != torch.bfloat16 or x.shape[-1:] != weight.shape:
                return own(x)
            return normed((x.contiguous(), weight), eps, around_one)

        return norm

    def attention(self, cache: LayerCache, settings: AttentionSettings) -> CudaAttention:
        return CudaAttention(cache, settings)

    def unawaited(self, run: Callable[[], Captured], device: torch.device) -> Captured:
        """Run `run` before its capture, to compile and load kernels, which no capture can do.

        Raises:
            CaptureError: the host waits for the device, which would make a capture fail, and not cleanly.
        """
        if device.type != "cuda":
            return run()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run()
        except RuntimeError as error:
            if _WAITS in str(error):
                raise CaptureError(str(error)) from None
            raise
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def capture(
        self, run: Callable[[], Captured], device: torch.device
    ) -> tuple[Callable[[], None], Captured]:
        """Capture, as a CUDA graph, a pass that has run before. Return its replay function and its outputs.

        The replay writes its results to these outputs.

        Raises:
            CaptureError: it cannot be captured. If memory runs out, PyTorch's exception is raised. Computing
                can continue after either.
        """
        own = torch.cuda.current_stream(device)
        pool = self._pool if self._captured else torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(device)  # what went wrong before is no capture's error
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(device), _capturing(graph, pool):
                outputs = run()
        except Exception as error:
            self._abandon(graph, pool, device)
            if is_out_of_memory(error):
                raise
            said = error.__context__ or error  # what broke it, not that it is broken at its end
            raise CaptureError(f"{type(said).__name__}: {said}") from None
        finally:
            torch.cuda.set_stream(own)  # which PyTorch leaves as it was in a capture that failed
        self._pool = pool
        self._captured.add(graph)
        return graph.replay, outputs

    def _abandon(self, graph: Any, pool: Any, device: torch.device) -> None:
        """Clean up after a failed capture.

        Otherwise PyTorch's allocator still treats it as active: it would never release what other streams
        have used, and fail at the next lack of memory.
        """
        self._abandoned.append(graph)  # whose address the allocator keeps
        number = torch.cuda.current_device() if device.index is None else device.index
        with suppress(RuntimeError, TypeError):  # it has ended cleanly, or PyTorch wants other arguments
            torch._C._cuda_endAllocateToPool(number, pool)
            torch._C._cuda_releasePool(number, pool)
        graph.reset()

    def content_sum(self, tensors: Iterable[torch.Tensor], device: torch.device) -> ContentSum:
        return ContentSum(tensors, device)

    def draw(
        self, logits: Sequence[torch.Tensor], draws: Draws, allowed: Sequence[np.ndarray | None]
    ) -> Drawing:
        return self._reference.draw(logits, draws, allowed)


def library_may_fit(device: torch.device) -> bool:
    """Return True if the library is tried on this device, whose settings for the process are changed then."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= LIBRARY_CAPABILITY


def keep_sums_whole(device: torch.device) -> None:
    """Set WHOLE_SUMS for the process where the library is tried. It reads them at its first call."""
    if library_may_fit(device):
        for name, value in WHOLE_SUMS.items():
            os.environ.setdefault(name, value)


@cache
def load_kernels(device: torch.device) -> CudaKernels | None:
    """Return the kernels for this device, or None, with the reason logged, if PyTorch computes."""
    try:
        keep_sums_whole(device)
        switches = usual_switches()
        if switches.samples and not _draws_as_pytorch(device):
            logger.warning("kernels: PyTorch draws tokens, since Triton's kernel draws others")
            switches = replace(switches, samples=False)
        kernels = CudaKernels(switches)
        try:
            wrong = _tried(kernels, device)
        except Exception as error:
            if not switches.permuted or isinstance(error, torch.AcceleratorError):
                raise
            wrong = f"what is computed, since it fails: {error}"
        if wrong is not None and switches.permuted:
            # Triton before 3.9 gives these forms another order of terms on cards before Hopper.
            logger.warning("kernels: weights are not unpacked in registers, which changes %s", wrong)
            kernels = CudaKernels(replace(switches, permuted=False))
            wrong = _tried(kernels, device)
    except Exception as error:
        # Whatever a compiler or a driver may say: without these kernels the server runs all the same.
        logger.warning("kernels: PyTorch, since Triton's fail: %s", error, exc_info=True)
        return None
    if wrong is not None:
        logger.warning("kernels: PyTorch, since Triton's give something else for %s", wrong)
        return None
    return kernels


def _tried(kernels: CudaKernels, device: torch.device) -> str | None:
    """Compile what the trial needs, and return the part of it in which the kernels are wrong, or None."""
    if kernels.compiles:
        _compile_trial(kernels, device)
    return _differing(kernels, device)


def _compile_trial(kernels: CudaKernels, device: torch.device) -> None:
    """Compile what the trial needs side by side. Where that fails its launches compile it, one by one."""
    try:
        with collecting() as forms:
            _differing(kernels, device, dry=True)
        compile_forms(forms, device, os.cpu_count() or 1)
    except torch.AcceleratorError:
        raise
    except Exception as error:
        # Whatever another Triton's hooks or its compiler may raise.
        logger.warning("kernels: not compiled ahead of their trial: %s", error, exc_info=True)


@torch.inference_mode()
def _differing(kernels: CudaKernels, device: torch.device, *, dry: bool = False) -> str | None:
    """Return the part of a trial in which the kernels are wrong, or None if there is none. `dry`: nothing is
    compared.

    They are wrong if they differ from PyTorch in fp64, or if a row alone has other bits than among others.
    The base's products are compared as they are summed, in fp32: rounded to bf16 nearly all differences
    vanish.
    """
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(device, torch.bfloat16)

    size_in, size_out = PIECE.value + STEP.value, TRIAL_OUTPUTS + 1
    rank = RANKS.value + 1
    lora = LoraWeights(random(rank, size_in).float(), random(size_out, rank).float(), 0.5)
    for name, layer, weight in _trial_layers(size_in, size_out, device):
        linear = CudaLinear(kernels, layer, 1, ReferenceLinear(layer, tiled=False))
        linear.use_library(False)  # which has a trial of its own, against these kernels
        linear.put(0, lora)
        x = random(max(TRIAL_ROWS), size_in)
        exact = x.double() @ weight.double().T + layer.bias.double()
        adapted = exact + 0.5 * (x.double() @ lora.a.double().T @ lora.b.double().T)
        alone = {row: linear.sums(x[row : row + 1])[0] for row in {0, *(rows - 1 for rows in TRIAL_ROWS)}}
        for rows in TRIAL_ROWS:
            some = x[:rows]
            sums = linear.sums(some)
            for row in (0, rows - 1):
                if not (dry or torch.equal(sums[row], alone[row])):
                    return f"row {row} of {rows} without its neighbours, {name}"
            got = linear(some, RowMap((RowGroup(tuple(range(0, rows, 2)), ((0, 1.0),)),)))
            wanted = exact[:rows].clone()
            wanted[::2] = adapted[:rows:2]
            near = (got.double() - wanted).abs() <= wanted.abs() * 2.0**-7 + 1e-2
            if not (dry or bool(near.all())):
                return f"a product of {rows} rows, {name}"
            lone = linear(some[:1], RowMap((RowGroup((0,), ((0, 1.0),)),)))
            if not (dry or torch.equal(lone, got[:1])):
                return f"a row with an adapter without its {rows - 1} neighbours, {name}"
    return _differing_attention(device, random, dry=dry)


@torch.inference_mode()
def _draws_as_pytorch(device: torch.device) -> bool:
    """Return True if the kernel takes the samples that PyTorch takes, of rows with and without a nucleus."""
    count, vocabulary = 8, SAMPLED + 100
    draw = torch.Generator().manual_seed(0)
    weights = torch.rand(count, vocabulary, generator=draw).pow(9).to(device)
    weights /= weights.amax(dim=-1, keepdim=True)
    rows = np.arange(count)
    draws = Draws(
        np.ones(count, dtype=np.float32), np.zeros(count, dtype=np.int64),
        np.array([1.0, 0.1, 0.5, 0.9] * 2, dtype=np.float32),
        np.array([0.0] * 4 + [0.01] * 4, dtype=np.float32), np.linspace(0.0, 1 - 1e-12, count),
    )  # fmt: skip
    own, theirs = (
        one(tiled=False).take_samples(weights, draws, rows, vocabulary)[0]
        for one in (SamplingKernels, ReferenceKernels)
    )
    return torch.equal(own, theirs)


def _differing_attention(
    device: torch.device, random: Callable[..., torch.Tensor], *, dry: bool
) -> str | None:
    """Return the part of attention's trial that is wrong: contexts of one, two and three splits.

    The last rows of each are computed as a chunk, and again in steps at a fixed place, as a graph has them;
    the very last again as a decode, alone and among the others.
    """
    heads, dim, block, chunk = 4, 64, 16, 20
    lengths = [chunk + 1, SPLIT.value + 64, 2 * SPLIT.value + 1]
    widths = [-(-length // block) for length in lengths]
    firsts = list(accumulate(widths, initial=1))
    keys, values = (random(1, firsts[-1] * block, dim) for _ in "kv")
    attend = CudaAttention(LayerCache(keys, values, block), AttentionSettings(dim**-0.5))
    tables = np.zeros((1, len(lengths), max(widths)), dtype=np.int32)
    for number, (first, width) in enumerate(zip(firsts, widths, strict=False)):
        tables[0, number, :width] = np.arange(first, first + width)

    def step(*rows: tuple[int, int]) -> Contexts:
        context, place = np.array(rows, dtype=np.int32).T.copy()
        write = tables[0, context, place // block] * np.int32(block) + place % block
        return Contexts(place, context, write[None], tables)

    rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    ends: list[torch.Tensor] = []
    for number, length in enumerate(lengths):
        own = slice(firsts[number] * block, firsts[number] * block + length)
        k, v = keys[:, own].clone(), values[:, own].clone()
        given = random(heads, chunk, dim), k[:, -chunk:], v[:, -chunk:]
        own_step = step(*((number, place) for place in range(length - chunk, length)))
        got = attend(*given, own_step)
        scores = given[0][:, -1].double() @ k[0].double().T * dim**-0.5
        exact = scores.softmax(-1) @ v[0].double()
        if not (dry or bool(((got[-1].double() - exact).abs() <= 0.02).all())):
            return f"attention to {length} keys"
        for splits in (1, 4):
            if length > splits * SPLIT.value:
                continue
            fixed = FixedStep(
                StepSize(chunk + 4, splits, 0, 0), 1, block, [0], device, tile_rows=tile_rows(heads)
            )
            fixed.load_step(np.zeros(chunk, dtype=np.int32), own_step, RowMap())
            q, k, v = (functional.pad(one, (0, 0, 0, 4)) for one in given)
            if not (torch.equal(attend(q, k, v, fixed.contexts)[:chunk], got) or dry):
                return f"a chunk of {length} keys, in a step of {splits} splits that a graph has"
        q, k, v = (one[:, -1:].contiguous() for one in given)
        if not (torch.equal(attend(q, k, v, step((number, length - 1)))[0], got[-1]) or dry):
            return f"a decode behind {length - 1} tokens, which has other bits in a chunk"
        rows.append((q, k, v))
        ends.append(got[-1])
    q, k, v = (torch.cat(one, 1) for one in zip(*rows, strict=True))
    every = step(*((number, length - 1) for number, length in enumerate(lengths)))
    if not (torch.equal(attend(q, k, v, every), torch.stack(ends)) or dry):
        return "a decode without its neighbours"
    return None


def _trial_layers(
    size_in: int, size_out: int, device: torch.device
) -> Iterator[tuple[str, Any, torch.Tensor]]:
    """Yield a layer in bf16 and one in NF4, each with its weight [out, in] bf16."""
    import_bitsandbytes()
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    plain = nn.Linear(size_in, size_out, dtype=torch.bfloat16).requires_grad_(False)
    quantized: Any = Linear4bit(size_in, size_out, compute_dtype=torch.bfloat16, quant_type="nf4")
    quantized.load_state_dict(plain.state_dict())
    plain, quantized = plain.to(device), quantized.to(torch.bfloat16).to(device).requires_grad_(False)
    yield "in bf16", plain, plain.weight
    yield "in NF4", quantized, dequantize_4bit(quantized.weight.data, quantized.weight.quant_state)


def norm_of(base: Any) -> tuple[torch.Tensor, float, bool] | None:
    """Return weight, epsilon, and whether the weight is around 1, of a bf16 root mean square norm; else
    None."""
    weight, bias = getattr(base, "weight", None), getattr(base, "bias", None)
    eps = getattr(base, "variance_epsilon", getattr(base, "eps", None))
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or weight.dtype != torch.bfloat16:
        return None
    if bias is not None or not isinstance(eps, float):
        return None
    with torch.inference_mode():
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(8, weight.numel(), generator=draw).to(weight.device, torch.bfloat16)
        wanted = base(x)
        for around_one in (False, True):
            if _nearly_same(normed((x, weight), eps, around_one), wanted):
                return weight, eps, around_one
    return None


def _nearly_same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Return True if nearly all have the same bits, and the others are neighbours in bf16."""
    near = (got.float() - wanted.float()).abs() <= wanted.float().abs() * 2.0**-7
    return bool(near.all()) and float((got == wanted).float().mean()) > 0.95
