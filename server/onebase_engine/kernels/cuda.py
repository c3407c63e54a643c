"""The engine's products, attention and norms on a GPU, by kernels in Triton.

Libraries for GPUs choose by the number of rows how they compute, and bitsandbytes even which weights a 4-bit
layer has: a row's bits would depend on its neighbours. Here a sum has one order, whatever else is in the
step: a product's terms are added in pieces of PIECE, the pieces one after the other, and attention's keys in
pieces of SPLIT. Weights are the numbers of `dequantize_4bit`, adapters those of their files, in fp32.

Nothing here waits for the device. With TRITON_INTERPRET=1 Triton runs all of it on the CPU, for the tests.
"""

# ruff: noqa: N803 (what Triton compiles into a kernel is written in capitals)
from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
import torch
import triton
import triton.language as tl
from torch import nn
from triton.language.extra import libdevice

from onebase_engine.base.layers import is_nf4, plain_absmax
from onebase_engine.base.load import import_bitsandbytes
from onebase_engine.kernels.interface import (
    LEAST_SCALE,
    Contexts,
    Drawing,
    Draws,
    LayerCache,
    LinearKernel,
    Rotation,
    RowGroup,
    RowMap,
)
from onebase_engine.kernels.reference import ReferenceKernels, ReferenceLinear, sent
from onebase_engine.lora.weights import LoraWeights
from onebase_engine.machine import is_out_of_memory

logger = logging.getLogger(__name__)
Captured = TypeVar("Captured")


class CaptureError(Exception):
    """A pass that cannot be a graph of CUDA, nor can others of the same model."""


PIECE = tl.constexpr(1024)
"""Terms of a product whose sum is one number, before it is added to the others'."""
STEP = tl.constexpr(64)
"""Terms that a loop takes at a time; `in_features` is a multiple of it."""
OUTPUTS = tl.constexpr(64)
RANKS = tl.constexpr(16)
SPLIT = tl.constexpr(512)
"""Keys of a context that one program attends to."""
KEYS = tl.constexpr(64)
QUERIES = tl.constexpr(64)
"""Queries of a program: rows of one context, with all heads that share its keys."""
HIDDEN = 1 << 23
"""Numbers between A and B that are kept piece by piece; of more of them each program adds the pieces up."""
SCRATCH = 1 << 28
"""Bytes of what splits give that attention holds at once, about: of more rows in longer contexts it holds
that of some after the other."""
PLAIN: dict[str, Any] = {"enable_fp_fusion": False}
"""How all are compiled: a product that is added is rounded first, as in PyTorch's operators one by one."""
ALIGNMENT = 16
"""Bytes on which weights and matrices begin."""
FEW_ROWS, MANY_ROWS, MOST_ROWS = 16, 64, 128
"""Rows of a program. With more than MANY_ROWS a 4-bit weight is unpacked once for all."""
WIDE = 2 * OUTPUTS.value
"""Outputs of a program where so many rows, PROMPT_ROWS, leave enough programs for a whole device."""
PROMPT_ROWS = 512

WEIGHT, ABSMAX, CODE, BIAS = (tl.constexpr(number) for number in range(4))
SLOTS, SIZE_OUT, BLOCKSIZE, FACTS = (tl.constexpr(number) for number in range(4, 8))
"""What the kernels are told of a layer, int64: addresses, sizes; and how many of these there are."""
A, B, RANK, SCALE, NARROW, SLOT_FACTS = (tl.constexpr(number) for number in range(6))
"""And of a slot: addresses of A and B, the rank (0: empty), the bits of the scale in fp32, and whether A and
B are in bf16 instead of fp32."""

FIXED = "cuda"
"""In `held` of a step at fixed places."""
SMALLEST = tl.constexpr(LEAST_SCALE)
TO_INTEGER = tl.constexpr(12582912.0)
"""1.5 * 2^23: added and taken away again, it leaves the nearest integer, ties to even."""

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_WAITS = "called a synchronizing CUDA operation"
"""What PyTorch says where the host waits for the device and it is asked to say so."""


# ---- products ----------------------------------------------------------------------------------


@triton.jit
def _layer_of(block, second, third):
    """Which of up to three layers a block of outputs belongs to, and that layer's first block."""
    layer = (block >= second).to(tl.int32) + (block >= third).to(tl.int32)
    return layer, tl.where(layer == 0, 0, tl.where(layer == 1, second, third))


@triton.jit
def _unpacked(weight, absmax, code, out, first, there, size_in, blocksize):
    """Weights [OUTPUTS, STEP] of the outputs `out` and the terms from `first` on, bf16. `code` [16] is in
    registers: looked up in memory, each weight would be a copy of four bytes."""
    # Triton loads 16 bytes at a time where it is told that they lie so.
    half = tl.multiple_of(first // 2, STEP // 2) + tl.arange(0, STEP // 2)
    own = out[:, None] * tl.multiple_of(size_in // 2, STEP // 2)
    both = tl.load(weight + own + half[None, :], mask=there[:, None], other=0)
    index = tl.interleave(both >> 4, both & 15).to(tl.int32)
    scale = tl.load(absmax + (out * size_in + first) // blocksize, mask=there, other=0.0)
    found = tl.reshape(tl.gather(code, tl.reshape(index, [OUTPUTS * STEP]), 0), [OUTPUTS, STEP])
    return (found * scale[:, None]).to(tl.bfloat16)


@triton.jit
def _products(
    x, layers, sums, rows, size_in, width, second, third, pieces, NF4: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """sums[part, row, outputs of all layers] = x @ weight.T over the `pieces` pieces of each part.

    The weights are the left factor, which may come from registers: there they are unpacked. Programs for all
    rows follow each other, so that a block of weights comes from memory once. SIZE: outputs of a block, in
    which `second` and `third` count too.
    """
    block, part = tl.program_id(1), tl.program_id(2)
    layer, begin = _layer_of(block, second, third)
    facts = layers + layer * FACTS
    out = ((block - begin) * SIZE + tl.arange(0, SIZE)).to(tl.int64)
    there = out < tl.load(facts + SIZE_OUT)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    wanted = row < rows
    code = tl.zeros((16,), dtype=tl.float32)
    if NF4:
        code = tl.load(tl.load(facts + CODE).to(tl.pointer_type(tl.float32)) + tl.arange(0, 16))
    total = tl.zeros((SIZE, ROWS), dtype=tl.float32)
    for piece in range(part * pieces, (part + 1) * pieces):
        some = tl.zeros((SIZE, ROWS), dtype=tl.float32)
        for first in range(piece * PIECE, tl.minimum((piece + 1) * PIECE, size_in), STEP):
            term = first + tl.arange(0, STEP)
            if NF4:
                weight = tl.multiple_of(tl.load(facts + WEIGHT).to(tl.pointer_type(tl.uint8)), 16)
                absmax = tl.load(facts + ABSMAX).to(tl.pointer_type(tl.float32))
                w = _unpacked(weight, absmax, code, out, first, there, size_in, tl.load(facts + BLOCKSIZE))
            else:
                plain = tl.multiple_of(tl.load(facts + WEIGHT).to(tl.pointer_type(tl.bfloat16)), 16)
                w = tl.load(plain + out[:, None] * size_in + term[None, :], mask=there[:, None], other=0.0)
            xs = tl.load(x + row[None, :] * size_in + term[:, None], mask=wanted[None, :], other=0.0)
            some = tl.dot(w, xs, some)
        # Not 0 + some, which makes a zero of another sign.
        total = tl.where(piece == part * pieces, some, total + some)
    place = (part.to(tl.int64) * rows + row[None, :]) * width + block * SIZE + tl.arange(0, SIZE)[:, None]
    tl.store(sums + place, total, mask=wanted[None, :] & there[:, None])


@triton.jit
def _unpack(weight, absmax, code, plain, size_in, blocksize, size_out):
    """plain[out, in] = the numbers of a 4-bit weight, bf16."""
    out = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    first, there = tl.program_id(1) * STEP, out < size_out
    some = tl.load(code + tl.arange(0, 16))
    w = _unpacked(weight, absmax, some, out, first, there, size_in, blocksize)
    place = out[:, None] * size_in + first + tl.arange(0, STEP)[None, :]
    tl.store(plain + place, w, mask=there[:, None])


@triton.jit
def _matrix(address, place, mask, narrow):
    """Numbers of A or B, fp32."""
    if narrow != 0:
        narrow_ones = tl.multiple_of(address.to(tl.pointer_type(tl.bfloat16)), 16)
        found = tl.load(narrow_ones + place, mask=mask, other=0.0).to(tl.float32)
    else:
        found = tl.load(
            tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16) + place, mask=mask, other=0.0
        )
    return found


@triton.jit
def _shrink(x, layers, row_of, slot_of, hidden, terms, size_in, pieces, most_rank):
    """hidden[layer, part, term, rank] = x32 @ A.T over the `pieces` pieces of each part: one row and one slot
    a program."""
    term, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    blocks = tl.cdiv(most_rank, RANKS)
    layer, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    slots = tl.load(layers + layer * FACTS + SLOTS).to(tl.pointer_type(tl.int64))
    own = slots + tl.load(slot_of + term) * SLOT_FACTS
    size = tl.load(own + RANK)
    if block * RANKS < size:
        rank = (block * RANKS + tl.arange(0, RANKS)).to(tl.int64)
        inside = rank < size
        a, narrow = tl.load(own + A), tl.load(own + NARROW)
        row = tl.load(row_of + term).to(tl.int64)
        total = tl.zeros((RANKS,), dtype=tl.float32)
        for piece in range(part * pieces, (part + 1) * pieces):
            sums = tl.zeros((RANKS, STEP), dtype=tl.float32)
            for first in range(piece * PIECE, tl.minimum((piece + 1) * PIECE, size_in), STEP):
                some = first + tl.arange(0, STEP)
                xs = tl.load(x + row * size_in + some).to(tl.float32)
                w = _matrix(a, rank[:, None] * size_in + some[None, :], inside[:, None], narrow)
                sums += w * xs[None, :]
            one = tl.sum(sums, axis=1)
            total = tl.where(piece == part * pieces, one, total + one)
        place = ((layer * tl.num_programs(2) + part).to(tl.int64) * terms + term) * most_rank + rank
        tl.store(hidden + place, total, mask=inside)


@triton.jit
def _added(hidden, own, out, there, terms, term, first_part, parts, most_rank):
    """What one slot adds to a row's outputs, before the row's own weight, fp32."""
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
    """As PyTorch computes it; `tl.exp` is the device's approximation."""
    if INTERPRETED:
        return tl.exp(x)
    return libdevice.exp(x)


@triton.jit
def _output(
    sums, layers, hidden, starts, slot_of, weight_of, rows, width, parts, terms, hidden_parts, most_rank,
    layer, begin, block, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """What one layer gives for a row, a block of its outputs, rounded in PEFT's order to bf16."""
    row = tl.program_id(0).to(tl.int64)
    facts = layers + layer * FACTS
    out = (block * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    there = out < tl.load(facts + SIZE_OUT)
    place = row * width + begin * OUTPUTS + out
    total = tl.load(sums + place, mask=there, other=0.0)
    for part in range(1, parts):
        total += tl.load(sums + part * rows * tl.cast(width, tl.int64) + place, mask=there, other=0.0)
    bias = tl.load(facts + BIAS)
    if bias != 0:
        total += tl.load(bias.to(tl.pointer_type(tl.bfloat16)) + out, mask=there, other=0.0).to(tl.float32)
    y = total.to(tl.bfloat16)
    slots = tl.load(facts + SLOTS).to(tl.pointer_type(tl.int64))
    delta = tl.zeros((OUTPUTS,), dtype=tl.float32)
    acting = 0
    for term in range(tl.load(starts + row), tl.load(starts + row + 1)):
        own = slots + tl.load(slot_of + term) * SLOT_FACTS
        if tl.load(own + RANK) > 0:
            first_part = tl.cast(layer, tl.int64) * hidden_parts
            some = _added(hidden, own, out, there, terms, term, first_part, hidden_parts, most_rank)
            delta += some * tl.load(weight_of + term)
            acting += 1
    if acting > 0:
        if QUANTIZED:
            delta = delta.to(tl.bfloat16).to(tl.float32)
        y = (y.to(tl.float32) + delta).to(tl.bfloat16)
    return y


@triton.jit
def _finish(
    sums, layers, hidden, starts, slot_of, weight_of, onto, y_1, y_2, y_3, rows, width, parts, terms,
    hidden_parts, most_rank, second, third, QUANTIZED: tl.constexpr, GATED: tl.constexpr, ONTO: tl.constexpr,
):  # fmt: skip
    """Each layer's outputs: the parts' sum, and what the row's adapters add; of a single layer, added to
    what is in `onto`."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    layer, begin = _layer_of(block, second, third)
    y = _output(
        sums, layers, hidden, starts, slot_of, weight_of, rows, width, parts, terms, hidden_parts, most_rank,
        layer, begin, block - begin, QUANTIZED,
    )  # fmt: skip
    if GATED:
        up = _output(
            sums, layers, hidden, starts, slot_of, weight_of, rows, width, parts, terms, hidden_parts,
            most_rank, 1, second, block, QUANTIZED,
        )  # fmt: skip
        gate = y.to(tl.float32)
        y = tl.div_rn(gate, 1.0 + _exp(-gate)).to(tl.bfloat16)
        y = (y.to(tl.float32) * up.to(tl.float32)).to(tl.bfloat16)
    size_out = tl.load(layers + layer * FACTS + SIZE_OUT)
    out = (block - begin) * OUTPUTS + tl.arange(0, OUTPUTS)
    if ONTO:
        before = tl.load(onto + row * size_out + out, mask=out < size_out, other=0.0)
        y = (before.to(tl.float32) + y.to(tl.float32)).to(tl.bfloat16)
    to = tl.where(layer == 0, y_1, tl.where(layer == 1, y_2, y_3))
    tl.store(to + row * size_out + out, y, mask=out < size_out)


@dataclass(frozen=True)
class _Terms:
    """Which slots act on which rows of a step, on the device. `starts` [rows + 1]: a row's first."""

    count: int
    starts: torch.Tensor
    row: torch.Tensor
    slot: torch.Tensor
    weight: torch.Tensor
    most_rank: int = 0
    """No slot's rank is larger; 0: it is up to the layer."""


def _terms_of(rows: RowMap, count: int, device: torch.device) -> _Terms:
    """Made once a step and device."""
    key = FIXED if FIXED in rows.held else f"cuda {count} {device}"
    if key not in rows.held:
        starts, columns = _acting(rows, count)
        there = sent(np.concatenate([starts, columns.reshape(-1)]), device)
        row, slot, weight = there[count + 1 :].view(columns.shape)
        rows.held[key] = _Terms(len(row), there[: count + 1], row, slot, weight.view(torch.float32))
    made: _Terms = rows.held[key]
    return made


def _acting(rows: RowMap, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A step's `_Terms` as int32: starts [count + 1]; and rows, slots and the bits of weights, [3, terms]."""
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


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device, which is to be that of the tensors."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same where the kernels may load 16 bytes at a time: a copy of what begins within them."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


class CudaLinear:
    """One linear layer, 4-bit or bf16, and what plain LoRAs in its slots add."""

    captures = True
    adds = True

    def __init__(self, kernels: CudaKernels, base: Any, slots: int, reference: ReferenceLinear) -> None:
        """`reference`: the same layer by PyTorch."""
        self._reference = reference
        self.size_in, self.size_out = base.in_features, base.out_features
        self.nf4 = _is_nf4(base)
        self.weight: torch.Tensor = base.weight.data
        self.absmax = self.code = None
        self.blocksize = 1
        if self.nf4:
            state = base.weight.quant_state
            self.absmax, self.code = plain_absmax(state).float().contiguous(), state.code.float().contiguous()
            self.blocksize = state.blocksize
        self.bias = None if base.bias is None else base.bias.to(torch.bfloat16).contiguous()
        # The last one stays empty: padding's.
        self._slots = torch.zeros(slots + 1, SLOT_FACTS.value, dtype=torch.int64, device=self.weight.device)
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.most_rank = 0
        tensors = (self.weight, self.absmax, self.code, self.bias)
        addresses = [0 if one is None else one.data_ptr() for one in tensors]
        self.facts = [*addresses, self._slots.data_ptr(), self.size_out, self.blocksize]
        """As the kernels are told them."""
        self._layers = CudaLayers(kernels, [self])

    def __call__(self, x: torch.Tensor, rows: RowMap, onto: torch.Tensor | None = None) -> torch.Tensor:
        if x.dtype != torch.bfloat16:
            if FIXED in rows.held:
                raise CaptureError(f"a layer multiplies {x.dtype}, for which a graph has no adapters")
            return self._reference(x, rows, onto)
        return self._layers(x.contiguous(), rows, onto)[0]

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
            facts = [a.data_ptr(), b.data_ptr(), weights.rank, bits, int(a.dtype == torch.bfloat16)]
        self._slots[slot] = sent(np.array(facts), self._slots.device)
        self.most_rank = max((len(a) for a, _ in self._held.values()), default=0)


class CudaLayers:
    """Up to three linear layers that multiply the same rows, in three launches.

    `gated`: two of them, a gate and what it lets through; the one result is silu(gate) * up.
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
        self._wide: tuple[list[int], torch.Tensor] = [], self._facts
        """The same with weights in bf16, and where these lie."""

    def __call__(self, x: torch.Tensor, rows: RowMap, onto: torch.Tensor | None = None) -> list[torch.Tensor]:
        """x [rows, in] bf16, contiguous -> [rows, out] bf16 of each; of a single layer, added to `onto`."""
        with on_device(x.device):
            return self._multiplied(x, rows, onto)

    def _multiplied(self, x: torch.Tensor, rows: RowMap, onto: torch.Tensor | None) -> list[torch.Tensor]:
        count, size_in, nf4 = len(x), self._layers[0].size_in, self._layers[0].nf4
        many = count > MANY_ROWS
        ys = [x.new_empty(count, one.size_out) for one in self._layers[: 1 if self._gated else None]]
        told = self._wide_facts() if many and nf4 else self._facts
        # Few rows are spread over the device by pieces; of many, a program adds the pieces up by itself.
        parts = 1 if many else self._pieces
        width = self._blocks * OUTPUTS.value
        sums = torch.empty(parts, count, width, dtype=torch.float32, device=x.device)
        size = FEW_ROWS if count <= FEW_ROWS else MANY_ROWS if count <= MOST_ROWS else MOST_ROWS
        wide = WIDE // OUTPUTS.value if many and count >= PROMPT_ROWS else 1
        blocks, *starts = (number // wide for number in (self._blocks, *self._starts))
        _products[(triton.cdiv(count, size), blocks, parts)](
            x, told, sums, count, size_in, width, *starts, self._pieces // parts,
            NF4=nf4 and not many, ROWS=size, SIZE=OUTPUTS.value * wide, num_warps=4 * wide, **PLAIN,
        )  # fmt: skip
        terms = _terms_of(rows, count, x.device)
        most = terms.most_rank or (max(layer.most_rank for layer in self._layers) if terms.count else 0)
        numbers = len(self._layers) * terms.count * most
        own_parts = self._pieces if numbers * self._pieces <= HIDDEN else 1
        hidden = torch.empty(numbers * own_parts, dtype=torch.float32, device=x.device)
        if numbers:
            grid = terms.count, len(self._layers) * triton.cdiv(most, RANKS.value), own_parts
            _shrink[grid](
                x, told, terms.row, terms.slot, hidden, terms.count, size_in, self._pieces // own_parts, most,
                **PLAIN,
            )  # fmt: skip
        _finish[(count, self._finished)](
            sums, told, hidden, terms.starts, terms.slot, terms.weight, ys[0] if onto is None else onto,
            *(*ys, *ys, *ys)[:3], count, width, parts, terms.count, own_parts, most, *self._starts,
            QUANTIZED=nf4, GATED=self._gated, ONTO=onto is not None, **PLAIN,
        )  # fmt: skip
        return ys

    def _wide_facts(self) -> torch.Tensor:
        """The layers' facts [layers, FACTS], with weights in bf16, which stay until the next call."""
        addresses = [self._kernels.unpack(layer, n).data_ptr() for n, layer in enumerate(self._layers)]
        if self._wide[0] != addresses:
            facts = np.array([layer.facts for layer in self._layers])
            facts[:, WEIGHT.value] = addresses
            self._wide = addresses, sent(facts, self._facts.device)
        return self._wide[1]


def _is_nf4(base: Any) -> bool:
    return is_nf4(base) and base.weight.quant_state.blocksize % STEP.value == 0


# ---- attention ---------------------------------------------------------------------------------


@triton.jit
def _turned(x, at, cosines, sines, row, dim, wanted, SIZE: tl.constexpr, TURN: tl.constexpr):
    """Rows x[at + 0..dim] of queries or keys, turned by their positions as transformers rounds it."""
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
    """Numbers x[dim] into their slot of the cache: as they are, or as `LayerCache` says of int8."""
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


@triton.jit
def _write(
    k, v, keys, values, key_scales, value_scales, write, cosines, sines, k_row, k_head, v_row, v_head, slots,
    key_dim, value_dim, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, TURN: tl.constexpr,
    EIGHT: tl.constexpr,
):  # fmt: skip
    """A row's key and value of one head, into the cache."""
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
    """Numbers of the cache as bf16, which holds an int8 exactly."""
    if EIGHT:
        found = tl.load(pointers, mask=mask, other=0).to(tl.float32).to(tl.bfloat16)
    else:
        found = tl.load(pointers, mask=mask, other=0.0)
    return found


@triton.jit(do_not_specialize=["first_tile", "first_row"])
def _attend(
    q, keys, values, key_scales, value_scales, part, stats, out, tiles, position, table, cosines, sines,
    q_row, q_head, first_tile, first_row, rows, heads, slots, table_width, block_size, key_dim, value_dim,
    scaling, softcap, window, GROUPS: tl.constexpr, PADDED: tl.constexpr, KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr, TURN: tl.constexpr, EIGHT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What a tile's queries get from SPLIT keys: part[split, row, head, dim], before it is divided by the
    sum of the weights; and that sum, and the largest score, in stats[split, row, head, 2]. Both have `rows`
    rows, from `first_row` on.

    WHOLE: no context has more keys, so that it is divided at once, to out[row, head, dim].
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
            block = tl.load(table + context * table_width + key // block_size, mask=known, other=0)
            slot = kv_head.to(tl.int64) * slots + block * block_size + key % block_size
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
        # The first row of a tile without any is padding.
        wanted = (query // PADDED < tl.maximum(count, 1)) & (query % PADDED < GROUPS)
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
def _divided(mixed, weight, there):
    """By the sum of the weights, also where that is no number, as of an adapter that overflows; zeros for
    padding, which is not `there`."""
    return tl.where(there, mixed / tl.where(there, weight, 1.0), 0.0)


@triton.jit(do_not_specialize=["first_row"])
def _merge(part, stats, position, out, first_row, rows, heads, value_dim, VALUE_SIZE: tl.constexpr):
    """One query's output from the splits that it sees, the first first; zeros for padding."""
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
    given = _divided(mixed, weight, place >= 0).to(tl.bfloat16)
    tl.store(out + (row * heads + head) * value_dim + dim, given, mask=dim < value_dim)


@dataclass(frozen=True)
class _Step:
    """A step's contexts on the device."""

    position: torch.Tensor
    write: torch.Tensor
    table: torch.Tensor
    tiles: torch.Tensor
    """[tiles, 3]: first packed row, rows, context."""
    first_rows: list[int]
    """Of each tile; and of each how many splits its rows see at most."""
    splits: list[int]
    rows: int
    whole: bool
    """Whether one SPLIT of keys is all that any row has, and each row is in a tile."""
    held: dict[int, list[_Chunk]] = field(default_factory=dict)

    def chunks(self, most: int) -> list[_Chunk]:
        """All tiles and rows; a chunk's rows times its splits are `most`, or it has one tile. Made once."""
        if most not in self.held:
            edges, found, begin, wide = [0, *self.first_rows[1:], self.rows], list[_Chunk](), 0, 0
            widest, tile_rows = max(self.splits, default=0), max(b - a for a, b in pairwise(edges))
            parts = max(triton.cdiv(self.rows * widest, most), 1)
            # About even ones: a few rows at the end would take as long as many do.
            most_even = min(most, triton.cdiv(self.rows * widest, parts) + tile_rows * widest)
            for tile, own in enumerate(self.splits):
                if tile > begin and (edges[tile + 1] - edges[begin]) * max(wide, own) > most_even:
                    found.append(_Chunk(begin, tile - begin, edges[begin], edges[tile] - edges[begin], wide))
                    begin, wide = tile, 0
                wide = max(wide, own)
            tiles, rows = len(self.splits) - begin, self.rows - edges[begin]
            self.held[most] = [*found, _Chunk(begin, tiles, edges[begin], rows, wide)]
        return self.held[most]


@dataclass(frozen=True)
class _Chunk:
    """Tiles that attend at once, and their rows, those of padding behind them too."""

    first_tile: int
    tiles: int
    first_row: int
    rows: int
    splits: int


def _step_of(contexts: Contexts, rows: int, device: torch.device) -> _Step:
    """Made once a step and device; `rows`: of one context that a tile has at most."""
    key = FIXED if FIXED in contexts.held else f"cuda {rows} {device}"
    if key not in contexts.held:
        tiles = np.array(list(_tiles(contexts, rows)), dtype=np.int32).reshape(-1, 3)
        arrays = contexts.position, contexts.write, contexts.table, tiles
        there = sent(np.concatenate([array.reshape(-1) for array in arrays]), device)
        own = torch.split(there, [array.size for array in arrays])
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
    """Rows of one context next to each other, in pieces."""
    owner = np.where(contexts.position >= 0, contexts.table_row, -1)
    edges = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), len(owner)]
    for start, stop in pairwise(edges):
        if stop > start and owner[start] >= 0:
            for first in range(start, stop, most):
                yield first, min(most, stop - first), int(owner[start])


@dataclass(frozen=True)
class StepSize:
    """How large a step may be to be read at the places of a `FixedStep`."""

    rows: int
    splits: int
    """SPLITs of keys that its longest context has."""
    terms: int
    """(row, slot) pairs."""
    most_rank: int


class FixedStep:
    """What a pass reads of a step, at places of the device that stay: what was captured of a pass reads the
    next step there. Smaller steps are padded; one copy takes a step there."""

    def __init__(
        self, size: StepSize, slots: int, block_size: int, padding_slot: int, device: torch.device
    ) -> None:
        """`padding_slot`: the KV slot that padding writes to, which nobody reads."""
        rows, terms = size.rows, size.terms
        width = -(-size.splits * SPLIT.value // block_size)
        sizes = [rows, rows, rows, rows, 3 * rows, rows * width, rows + 1, terms, terms, terms]
        self._no_slot, self._padding_slot = slots, padding_slot
        self._here = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._there = self._here.to(device)
        self._copied: Any = torch.cuda.Event() if device.type == "cuda" else None
        self._parts = [part.numpy() for part in torch.split(self._here, sizes)]
        ids, places, position, write, tiles, table, starts, *acting = torch.split(self._there, sizes)
        self.ids, self.positions = ids, places
        self.every_row = torch.arange(rows, device=device)
        none = np.zeros(rows, dtype=np.int32)
        splits = [size.splits] * rows
        step = _Step(position, write, table, tiles, list(range(rows)), splits, rows, size.splits == 1)
        self.contexts = Contexts(none, none, none, np.zeros((rows, width), dtype=np.int32), {FIXED: step})
        row, slot, weight = acting
        held = _Terms(terms, starts, row, slot, weight.view(torch.float32), size.most_rank)
        self.rows = RowMap(held={FIXED: held})

    def clear(self) -> None:
        """Have a step of nothing but padding."""
        none = np.zeros(0, dtype=np.int32)
        self.take(none, Contexts(none, none, none, none.reshape(0, 0)), RowMap())

    def take(self, ids: np.ndarray, contexts: Contexts, rows: RowMap) -> None:
        """Have another step: the tokens of its packed rows, int, where they stand and what acts on them."""
        self.prepare(contexts, rows)
        self.send(ids)

    def prepare(self, contexts: Contexts, rows: RowMap) -> None:
        """Write another step, but for its tokens, while the device may compute one."""
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
        write[:count] = contexts.write
        write[count:] = self._padding_slot
        tile = tiles.reshape(-1, 3)
        tile[:, 0] = np.arange(len(tile))
        tile[:count, 1] = contexts.position >= 0
        tile[:count, 2] = contexts.table_row
        wide = table.reshape(len(tile), -1)
        some = contexts.table[:, : wide.shape[1]]
        wide[: some.shape[0], : some.shape[1]] = some
        slots[:] = self._no_slot
        own_starts, columns = _acting(rows, count)
        starts[: count + 1] = own_starts
        starts[count + 1 :] = own_starts[-1]
        for own, new in zip((term_rows, slots, weights), columns, strict=True):
            own[: len(new)] = new

    def send(self, ids: np.ndarray) -> None:
        """Have the step that was prepared last."""
        self._parts[0][: len(ids)] = ids
        self._there.copy_(self._here, non_blocking=True)
        if self._copied is not None:
            self._copied.record()


class CudaAttention:
    """Attention of one layer over its KV cache."""

    def __init__(self, cache: LayerCache, scaling: float, softcap: float | None, window: int | None) -> None:
        self._cache = cache.keys, cache.values, *(cache.scales or (cache.keys, cache.values))
        self._block_size = cache.block_size
        self._settings = scaling, softcap or 0.0, window or 0
        self._sizes = {
            "KEY_SIZE": max(16, triton.next_power_of_2(cache.keys.shape[2])),
            "VALUE_SIZE": max(16, triton.next_power_of_2(cache.values.shape[2])),
        }
        self._eight = cache.scales is not None

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
        with on_device(q.device):
            return self._attend(q, k, v, contexts, rotation)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        contexts: Contexts,
        rotation: Rotation | None,
    ) -> torch.Tensor:
        q, k, v = (one if one.stride(2) == 1 else one.contiguous() for one in (q, k, v))
        heads, count, key_dim = q.shape
        kv_heads, slots, value_dim = self._cache[1].shape
        groups = heads // kv_heads
        padded = triton.next_power_of_2(groups)
        step = _step_of(contexts, QUERIES.value // padded, q.device)
        cosines, sines = rotation if rotation is not None else (q, q)
        sizes = {**self._sizes, "TURN": rotation is not None, "EIGHT": self._eight}
        _write[(count, kv_heads)](
            k, v, *self._cache, step.write, cosines, sines, k.stride(1), k.stride(0), v.stride(1),
            v.stride(0), slots, key_dim, value_dim, **sizes, **PLAIN,
        )  # fmt: skip
        if step.whole:
            chunks, held = [_Chunk(0, len(step.splits), 0, count, 1)], 0
        else:
            chunks = step.chunks(SCRATCH // (heads * (value_dim + 2) * 4))
            held = max(one.splits * one.rows for one in chunks)
        part = q.new_empty(held, heads, value_dim, dtype=torch.float32)
        stats = q.new_empty(held, heads, 2, dtype=torch.float32)
        out = q.new_empty(count, heads, value_dim)
        for one in chunks:
            if one.splits:
                _attend[(one.tiles, kv_heads, one.splits)](
                    q, *self._cache, part, stats, out, step.tiles, step.position, step.table, cosines, sines,
                    q.stride(1), q.stride(0), one.first_tile, one.first_row, one.rows, heads, slots,
                    contexts.table.shape[1], self._block_size, key_dim, value_dim, *self._settings,
                    GROUPS=groups, PADDED=padded, WHOLE=step.whole, **sizes, **PLAIN,
                )  # fmt: skip
            if not step.whole:
                _merge[(one.rows, heads)](
                    part, stats, step.position, out, one.first_row, one.rows, heads, value_dim,
                    VALUE_SIZE=sizes["VALUE_SIZE"], **PLAIN,
                )  # fmt: skip
        return out


# ---- norms, and the back-end -------------------------------------------------------------------


@triton.jit
def _norm(x, weight, y, size, eps, SIZE: tl.constexpr, AROUND_ONE: tl.constexpr):
    """A root mean square norm of one row, rounded before the weight, or (Gemma) after a weight around 1."""
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
    """given: x, the weight, and what else the kernel takes, contiguous."""
    x, size = given[0], given[1].numel()
    y = torch.empty_like(x)
    padded = triton.next_power_of_2(size)
    with on_device(x.device):
        kernel[(x.numel() // size,)](*given, y, size, eps, SIZE=padded, AROUND_ONE=around_one, **PLAIN)
    return y


def _capturing(graph: Any, pool: Any) -> Any:
    """In another thread a version may be on its way: only this one's calls are held to the rules."""
    return torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")


class CudaKernels:
    """Triton's kernels."""

    name = "triton"
    tiled = False
    row_multiple = 1
    joins = True
    drafts = True
    narrows = True
    captures = (
        not INTERPRETED.value
        # Private, and the only way to end a capture that failed (`_abandon`).
        and hasattr(torch._C, "_cuda_endAllocateToPool")
        and hasattr(torch._C, "_cuda_releasePool")
    )
    asynchronous = True

    def __init__(self) -> None:
        self._reference = ReferenceKernels(tiled=False)
        self._scratch: dict[tuple[int, torch.device], torch.Tensor] = {}
        self._pool: Any = None
        """Memory that all graphs share: only one runs at a time. It ends with the last of them."""
        self._captured: WeakSet[Any] = WeakSet()
        self._abandoned: list[Any] = []

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

    def join(self, layers: Sequence[LinearKernel], *, gated: bool = False) -> CudaLayers | None:
        own = [layer for layer in layers if isinstance(layer, CudaLinear)]
        if len(own) < len(layers) or len({(layer.nf4, layer.size_in) for layer in own}) != 1:
            return None
        return CudaLayers(self, own, gated=gated)

    def unpack(self, layer: CudaLinear, number: int) -> torch.Tensor:
        """The layer's weights in bf16, until the next layer of this number among those of a call."""
        size = layer.size_in * layer.size_out
        key = number, layer.weight.device
        held = self._scratch.get(key)
        if held is None or held.numel() < size:
            held = self._scratch[key] = layer.weight.new_empty(size, dtype=torch.bfloat16)
        grid = triton.cdiv(layer.size_out, OUTPUTS.value), layer.size_in // STEP.value
        _unpack[grid](
            layer.weight, layer.absmax, layer.code, held, layer.size_in, layer.blocksize, layer.size_out,
            **PLAIN,
        )  # fmt: skip
        return held

    def norm(self, base: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        """By Triton if it is a root mean square norm, which a trial shows."""
        own: Callable[[torch.Tensor], torch.Tensor] = base
        found = norm_of(base)
        if found is None:
            return own
        weight, eps, around_one = found

        def norm(x: torch.Tensor) -> torch.Tensor:
            if x.dtype != torch.bfloat16:
                return own(x)
            return normed((x.contiguous(), weight), eps, around_one)

        return norm

    def attention(
        self, cache: LayerCache, scaling: float, softcap: float | None, window: int | None
    ) -> CudaAttention:
        return CudaAttention(cache, scaling, softcap, window)

    def unawaited(self, run: Callable[[], Captured], device: torch.device) -> Captured:
        """What it gives. Compiles and loads what it is still to be captured with, which no capture can.

        Raises:
            CaptureError: the host waits for the device. A capture would fail of it, but not cleanly.
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
        """Capture what has run before as a graph of CUDA. What makes it run again, and the places to which
        that writes what it gives.

        Raises:
            CaptureError: it cannot be captured; or what PyTorch raises where memory runs out. It computes on
                after either.
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
        """Where a capture does not end cleanly, PyTorch's allocator still takes it for one: it would keep
        for good what other streams have used, and fail at the next lack of memory."""
        self._abandoned.append(graph)  # whose address the allocator keeps
        number = torch.cuda.current_device() if device.index is None else device.index
        with suppress(RuntimeError, TypeError):  # it has ended cleanly, or PyTorch wants other arguments
            torch._C._cuda_endAllocateToPool(number, pool)
            torch._C._cuda_releasePool(number, pool)
        graph.reset()

    def draw(
        self, logits: Sequence[torch.Tensor], draws: Draws, allowed: Sequence[np.ndarray | None]
    ) -> Drawing:
        return self._reference.draw(logits, draws, allowed)


@cache
def load_kernels(device: torch.device) -> CudaKernels | None:
    """The kernels for this device; None, with the reason in the log, where PyTorch computes."""
    try:
        kernels = CudaKernels()
        wrong = _differing(kernels, device)
    except Exception as error:
        # Whatever a compiler or a driver may say: without these kernels the server runs all the same.
        logger.warning("kernels: PyTorch, since Triton's fail: %s", error, exc_info=True)
        return None
    if wrong is not None:
        logger.warning("kernels: PyTorch, since Triton's give something else for %s", wrong)
        return None
    return kernels


@torch.inference_mode()
def _differing(kernels: CudaKernels, device: torch.device) -> str | None:
    """What of a trial the kernels compute otherwise than PyTorch does in fp64, or with other bits for a row
    alone; None if all is well."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(device, torch.bfloat16)

    size_in, size_out = PIECE.value + STEP.value, OUTPUTS.value + 1
    lora = LoraWeights(
        random(RANKS.value + 1, size_in).float(), random(size_out, RANKS.value + 1).float(), 0.5
    )
    sizes = FEW_ROWS, MANY_ROWS + 1, MOST_ROWS + 1, PROMPT_ROWS
    for name, layer, weight in _trial_layers(size_in, size_out, device):
        linear = CudaLinear(kernels, layer, 1, ReferenceLinear(layer, tiled=False))
        linear.put(0, lora)
        for rows in sizes[:3] if INTERPRETED.value else sizes:
            x = random(rows, size_in)
            mine = tuple(range(0, rows, 2))
            got = linear(x, RowMap((RowGroup(mine, ((0, 1.0),)),)))
            exact = x.double() @ weight.double().T + layer.bias.double()
            exact[::2] += 0.5 * (x[::2].double() @ lora.a.double().T @ lora.b.double().T)
            if not bool(((got.double() - exact).abs() <= exact.abs() * 2.0**-7 + 1e-2).all()):
                return f"a product of {rows} rows, {name}"
            alone = linear(x[:1], RowMap((RowGroup((0,), ((0, 1.0),)),)))
            if not torch.equal(alone, got[:1]):
                return f"a row without its {rows - 1} neighbours, {name}"
    return None


def _trial_layers(
    size_in: int, size_out: int, device: torch.device
) -> Iterator[tuple[str, Any, torch.Tensor]]:
    """A layer in bf16 and one in NF4, each with its weight [out, in] bf16."""
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
    """Weight, epsilon, and whether the weight is around 1, of a root mean square norm in bf16; else None."""
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
    """Whether nearly all have the same bits, and the others are neighbours in bf16."""
    near = (got.float() - wanted.float()).abs() <= wanted.float().abs() * 2.0**-7
    return bool(near.all()) and float((got == wanted).float().mean()) > 0.95
