"""Layers, adapters and contexts for the tests of kernels, and attention in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from onebase_engine.base.layers import plain_absmax
from onebase_engine.base.load import import_bitsandbytes
from onebase_engine.kernels.interface import Contexts, Kernels
from onebase_engine.lora.weights import LoraWeights

IN, OUT = 192, 144
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""q [heads, T, d], k and v [kv_heads, T, d]."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nf4(size_in: int, size_out: int, *, blocksize: int = 64, bias: bool = False, seed: int = 0) -> Any:
    """A 4-bit layer as the base has them."""
    import_bitsandbytes()
    import bitsandbytes as bnb

    layer: Any = bnb.nn.Linear4bit(
        size_in, size_out, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    weight = bnb.nn.Params4bit(
        random(size_out, size_in, seed=seed) * 0.05,
        requires_grad=False,
        quant_type="nf4",
        blocksize=blocksize,
        compress_statistics=True,
    )
    layer.weight = weight._quantize("cpu")
    layer.support_avx512bf16_for_cpu = False
    if bias:
        layer.bias = nn.Parameter(random(size_out, seed=seed + 1).to(torch.bfloat16), requires_grad=False)
    return layer


def plain(layer: Any) -> torch.Tensor:
    """The layer's weight as bitsandbytes unpacks it, [out, in] bf16."""
    if type(layer) is nn.Linear:
        return layer.weight
    state = layer.weight.quant_state
    unpacked: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        layer.weight, plain_absmax(state), state.blocksize, "nf4", state.shape, torch.bfloat16
    )
    return unpacked


def lora(rank: int, seed: int, scale: float = 2.0) -> LoraWeights:
    return LoraWeights(random(rank, IN, seed=seed) * 0.1, random(OUT, rank, seed=seed + 50) * 0.1, scale)


def eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attention in fp64 of the last rows of a context: q [heads, T, d], k, v [kv_heads, length, d]."""
    groups, length, count = len(q) // len(k), k.shape[1], q.shape[1]
    scores = q.double() @ k.repeat_interleave(groups, 0).double().transpose(1, 2) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    at, keys = torch.arange(length - count, length)[:, None], torch.arange(length)
    hidden = keys > at
    if window is not None:
        hidden |= keys <= at - window
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v.repeat_interleave(groups, 0).double()


class Cache:
    """A KV cache of one layer, and contexts in blocks that lie anywhere in it."""

    def __init__(
        self, kernels: Kernels, kv_heads: int, groups: int, dim: int, block: int, **options: Any
    ) -> None:
        self.block, self.kv_heads, self.heads, self.dim = block, kv_heads, kv_heads * groups, dim
        self.blocks = 4096 // block
        keys, values = (
            torch.zeros(kv_heads, self.blocks * block, dim, dtype=torch.bfloat16) for _ in range(2)
        )
        self.tensors = keys, values
        self.options = {"scaling": dim**-0.5, "softcap": None, "window": None} | options
        self.attention = kernels.attention(keys, values, block, **self.options)
        self.order = torch.randperm(self.blocks - 2, generator=torch.Generator().manual_seed(1)) + 2
        self.taken = 0

    def context(self, length: int) -> list[int]:
        count = -(-length // self.block)
        self.taken += count
        return [int(block) for block in self.order[self.taken - count : self.taken]]

    def run(self, segments: list[tuple[list[int], int, int]], q: Any, k: Any, v: Any) -> torch.Tensor:
        """Segments (blocks, start, stop), and their rows' q [heads, T, d], k, v [kv_heads, T, d]."""
        width = max(len(blocks) for blocks, _, _ in segments)
        table = torch.zeros(len(segments), width, dtype=torch.int32)
        rows: list[tuple[int, int, int]] = []
        for number, (blocks, start, stop) in enumerate(segments):
            table[number, : len(blocks)] = torch.tensor(blocks)
            for p in range(start, stop):
                rows.append((p, number, blocks[p // self.block] * self.block + p % self.block))
        columns = torch.tensor(rows, dtype=torch.int32).T.contiguous().numpy()
        return self.attention(q, k, v, Contexts(columns[0], columns[1], columns[2], table.numpy()))

    def run_in_pieces(self, inputs: Sequence[Inputs], ends: Sequence[int]) -> list[torch.Tensor]:
        """Contexts side by side, all up to the first of `ends`, then to the next: [T, heads, d] of each."""
        lengths = [q.shape[1] for q, _, _ in inputs]
        blocks = [self.context(length) for length in lengths]
        got: list[list[torch.Tensor]] = [[] for _ in inputs]
        for start, stop in pairwise([0, *ends]):
            some = [i for i, length in enumerate(lengths) if start < length]
            parts = [(blocks[i], start, min(stop, lengths[i])) for i in some]
            q, k, v = (
                torch.cat(
                    [inputs[i][n][:, first:last] for i, (_, first, last) in zip(some, parts, strict=True)], 1
                )
                for n in range(3)
            )
            out = self.run(parts, q, k, v)
            for i, rows in zip(some, out.split([last - first for _, first, last in parts]), strict=True):
                got[i].append(rows)
        return [torch.cat(pieces) for pieces in got]


def projected(cache: Cache, rows: int, seed: int) -> Inputs:
    sizes = ((cache.heads, 0), (cache.kv_heads, 1), (cache.kv_heads, 2))
    return tuple(random(n, rows, cache.dim, seed=seed * 10 + i).to(torch.bfloat16) for n, i in sizes)  # type: ignore[return-value]
