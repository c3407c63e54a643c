"""Layers, adapters and contexts for the tests of kernels, and attention in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from onebase_engine.base.layers import plain_absmax
from onebase_engine.base.load import import_bitsandbytes
from onebase_engine.engine.kv_cache import BlockGroup, KVCache
from onebase_engine.kernels.interface import AttentionSettings, Contexts, Kernels
from onebase_engine.kernels.reference import ReferenceKernels, quantized
from onebase_engine.kernels.weights import LoraWeights

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


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: AttentionSettings) -> torch.Tensor:
    """Attention in fp64 of the last rows of a context: q [heads, T, d], k, v [kv_heads, length, d]."""
    groups, length, count = len(q) // len(k), k.shape[1], q.shape[1]
    scores = q.double() @ k.repeat_interleave(groups, 0).double().transpose(1, 2) * settings.scaling
    if settings.softcap is not None:
        scores = torch.tanh(scores / settings.softcap) * settings.softcap
    at, keys = torch.arange(length - count, length)[:, None], torch.arange(length)
    hidden = keys > at
    if settings.window is not None:
        hidden |= keys <= at - settings.window
    if settings.chunk is not None:
        hidden |= keys // settings.chunk != at // settings.chunk
    scores = scores.masked_fill(hidden, -torch.inf)
    if settings.sinks is not None:
        sinks = settings.sinks.double()[:, None, None].expand(-1, count, 1)
        scores = torch.cat([scores, sinks], -1)
    return scores.softmax(-1)[..., :length] @ v.repeat_interleave(groups, 0).double()


def kept(x: torch.Tensor) -> torch.Tensor:
    """Keys or values as an int8 cache has them, fp64."""
    numbers, scale = quantized(x)
    return numbers.double() * scale.double().unsqueeze(-1)


class Cache:
    """A KV cache of one layer, and contexts in blocks that lie anywhere in it."""

    def __init__(
        self,
        kernels: Kernels,
        kv_heads: int,
        groups: int,
        dim: int,
        block: int,
        *,
        eight: bool = False,
        tokens: int = 4096,
        value_dim: int | None = None,
        sinks: bool = False,
        among: int = 1,
        **options: Any,
    ) -> None:
        """Make the cache. `among`: groups of layers whose blocks lie in one memory, each layer with twice the
        heads of the one before; this one is of the last. `options`: fields of `AttentionSettings`."""
        self.block, self.kv_heads, self.heads, self.dim = block, kv_heads, kv_heads * groups, dim
        self.blocks = tokens // block
        self.value_dim = dim if value_dim is None else value_dim
        dtype = torch.int8 if eight else torch.bfloat16
        shapes = {layer: (kv_heads << layer, dim, self.value_dim) for layer in range(among - 1)}
        shapes[among - 1] = (kv_heads, dim, self.value_dim)
        self.stride = max(heads for heads, _, _ in shapes.values()) if among > 1 else 1
        layers = [BlockGroup((layer,), stride=self.stride) for layer in shapes]
        whole = KVCache(shapes, self.blocks, block, dtype, torch.device("cpu"), layers)
        self.layer = whole.layers[among - 1]
        self.tensors = self.layer.keys, self.layer.values
        learned = random(self.heads, seed=7) * 2 if sinks else None
        self.settings = AttentionSettings(dim**-0.5, sinks=learned, **options)
        self.attention = kernels.attention(self.layer, self.settings)
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
                slot = blocks[p // self.block] * self.stride * self.block + p % self.block
                rows.append((p, number, slot))
        columns = torch.tensor(rows, dtype=torch.int32).T.contiguous().numpy()
        own, tables = self.layer.table, np.zeros((self.layer.table + 1, *table.shape), dtype=np.int32)
        tables[own] = table.numpy() * self.stride
        write = np.zeros((own + 1, len(rows)), dtype=np.int32)
        write[own] = columns[2]
        return self.attention(q, k, v, Contexts(columns[0], columns[1], write, tables))

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
    sizes = ((cache.heads, cache.dim), (cache.kv_heads, cache.dim), (cache.kv_heads, cache.value_dim))
    return tuple(  # type: ignore[return-value]
        random(n, rows, dim, seed=seed * 10 + i).to(torch.bfloat16) for i, (n, dim) in enumerate(sizes)
    )


def same_in_int8(
    kernels: Kernels,
    heads: tuple[int, int],
    dim: int,
    lengths: Sequence[int],
    ends: Sequence[int],
    **options: Any,
) -> None:
    """Compare attention over an int8 cache with the reference's and with fp64 over the same numbers: what is
    in the cache bit for bit, the rest up to rounding. With each context alone, in one piece: bit for bit."""
    tokens = 16 * (2 + sum(-(-length // 16) for length in lengths))
    caches = [
        Cache(one, *heads, dim, 16, eight=True, tokens=tokens, among=2, **options)
        for one in (kernels, ReferenceKernels())
    ]
    inputs = [projected(caches[0], length, number) for number, length in enumerate(lengths)]
    both = [cache.run_in_pieces(inputs, ends) for cache in caches]
    for (q, k, v), got, expected in zip(inputs, *both, strict=True):
        torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(torch.bfloat16).eps, atol=0.02)
        exact = eager(q, kept(k), kept(v), caches[0].settings).transpose(0, 1)
        assert (got.double() - exact).abs().max() < 0.05
        if not isinstance(kernels, ReferenceKernels):
            alone = Cache(kernels, *heads, dim, 16, eight=True, tokens=tokens, **options)
            whole = alone.run([(alone.context(len(got)), 0, len(got))], q, k, v)
            assert torch.equal(got, whole), "chunks and neighbours change bits"
    for got, expected in zip(caches[0].layer.scales or (), caches[1].layer.scales or (), strict=True):
        assert torch.equal(got, expected)
        assert got.any()
    assert torch.equal(caches[0].layer.keys, caches[1].layer.keys)
    assert torch.equal(caches[0].layer.values, caches[1].layer.values)


def odd_rows(dim: int, seed: int) -> torch.Tensor:
    """Rows [40, dim] bf16 of any size: zeros, subnormal numbers, the largest, and what is not finite."""
    rows = random(40, dim, seed=seed) * 10.0 ** (random(40, 1, seed=seed + 1) * 12)
    rows[0], rows[1], rows[2] = 0.0, rows[1] * 1e-42, 3.3e38
    rows[3, 0], rows[4, dim // 2], rows[5, -1] = torch.inf, -torch.inf, torch.nan
    rows[6, 1:] = 0.0
    return rows.clamp(-3.3e38, 3.3e38).where(rows.isfinite(), rows).to(torch.bfloat16)


def written_alike(kernels: Kernels, dim: int, seed: int) -> None:
    """Write such keys and values, and compare with what `quantized` says of each."""
    cache = Cache(kernels, 1, 1, dim, 8, eight=True, tokens=80)
    k, v = odd_rows(dim, seed)[None], odd_rows(dim, seed + 5)[None]
    blocks = cache.context(k.shape[1])
    cache.run([(blocks, 0, k.shape[1])], torch.zeros_like(k), k, v)
    slots = torch.tensor([block * 8 + place for block in blocks for place in range(8)])
    scales = cache.layer.scales or ()
    for given, numbers, scale in zip((k, v), cache.tensors, scales, strict=True):
        expected, by = quantized(given)
        assert torch.equal(numbers[:, slots], expected)
        assert torch.equal(scale[:, slots].nan_to_num(-1), by.nan_to_num(-1))


def borrows(kernels: Kernels) -> None:
    """Attend with other queries over the keys and values that another layer has written."""
    for eight in (False, True):
        lender, expected = (Cache(kernels, 2, 2, 64, 16, eight=eight) for _ in range(2))
        q, k, v = projected(lender, 40, 1)
        v[:, 20] = torch.inf
        other, blocks = random(*q.shape, seed=5).to(torch.bfloat16), lender.context(40)
        lender.run([(blocks, 0, 40)], q, k, v)
        before = [tensor.clone() for tensor in lender.tensors]
        lender.attention = kernels.attention(lender.layer, replace(lender.settings, writes=False))
        got = lender.run([(blocks, 0, 40)], other, k, v)
        wanted = expected.run([(expected.context(40), 0, 40)], other, k, v)
        assert torch.equal(got.nan_to_num(), wanted.nan_to_num())
        assert all(torch.equal(*pair) for pair in zip(before, lender.tensors, strict=True))
        # Nothing is written: zeros are not those of the cache.
        still = lender.run([(blocks, 0, 40)], other, k * 0, v)
        assert torch.equal(still.nan_to_num(), wanted.nan_to_num())
