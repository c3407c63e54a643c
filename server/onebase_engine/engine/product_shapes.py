"""The shapes of attention's products for which a row's bits are its own.

A library chooses by a product's shape in which order it sums, and the order decides the last bits. So a row
would depend on the longest of its neighbours, to which all are padded, and on where its prompt was cut. On
the CPU a trial at start finds which shapes agree. oneDNN's bf16 products with AVX512-BF16 sum in one order
up to 1,024 keys and in another above, and a single query in a third: contexts on either side are computed
apart, with two queries at least. On a processor where too little agrees, as with AVX-512 but no bf16, every
product is computed in fp32 in one fixed shape. So are those of bases that are not bf16.

The trial takes seconds. What it found is kept in the user's cache, under all that it depends on: the
processor and its caches, torch's build, the number of threads, the environment's settings for both.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from onebase_engine.user_cache import keep, recall

LENGTH_MULTIPLE = 64
"""Contexts are padded to this many tokens, so that vectorized reductions have no ragged tail."""
LENGTHS_PER_DOUBLING = 16
"""Above 1,024 tokens contexts are padded further, to so many lengths between a power of two and the next:
oneDNN keeps close to a megabyte of compiled kernel for every shape that it meets, and each is tried."""
QUERY_CHUNK = 128
"""Tokens whose scores are held at once; bounds the memory of a long prefill."""
QUERY_MULTIPLE = 32
"""Rows of the half-precision products of a prefill on the CPU are padded to this many, for few kernels."""
FIXED_ROWS = 32
FIXED_KEYS = 256
"""The one shape of products where `ProductShapes.fixed`."""
MAX_EDGES = 4
"""With more, contexts would be computed in too many parts."""
_QUERIES = (2, 4, 8, 16, 32)
_MANY_ROWS = 16
_SETTINGS = ("OMP_", "MKL_", "DNNL_", "ONEDNN_", "ATEN_", "KMP_", "GOMP_")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_FEATURES = (
    "vendor_id", "cpu family", "model", "model name", "stepping", "flags",
    "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features",
)  # fmt: skip
"""Names of /proc/cpuinfo, on x86 and on Arm."""
_TRIAL_NUMBERS = 1 << 21
"""Numbers in one operand of a trial, at most: shapes of many rows are tried at short contexts only."""


@dataclass(frozen=True)
class Heads:
    """Heads of one layer's attention; `groups` is the number of query heads for each KV head."""

    kv: int
    groups: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class ProductShapes:
    """Which products are computed together; the defaults are those of accelerators."""

    edges: tuple[int, ...] = ()
    """Lengths up to which products sum in one order, and above which in another."""
    queries: int = 1
    """A decode's products have this many rows at least."""
    fixed: bool = False
    """In fp32, in blocks of FIXED_ROWS queries and FIXED_KEYS keys."""

    def padded(self, length: int) -> int:
        """The length that a context of `length` tokens is padded to; never across an edge."""
        multiple = max(FIXED_KEYS if self.fixed else LENGTH_MULTIPLE, _grid(length))
        return -(-length // multiple) * multiple

    def side(self, length: int) -> int:
        """Which edges a context of `length` tokens lies between; contexts of one side are padded together."""
        return bisect_left(self.edges, length)

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Positions `start:stop` cut at the edges: a token at position p has a context of p + 1 tokens."""
        for edge in self.edges:
            if start < edge < stop:
                yield start, edge
                start = edge
        yield start, stop


def _grid(length: int) -> int:
    """The multiple that contexts of about `length` tokens are padded to."""
    return (1 << (length - 1).bit_length()) // 2 // LENGTHS_PER_DOUBLING


@cache
def find_shapes(heads: frozenset[Heads], dtype: torch.dtype, longest: int) -> ProductShapes:
    """Which shapes agree on this machine, with its number of threads, up to `longest` tokens."""
    if dtype != torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return ProductShapes(fixed=True)
    processor = _processor()
    if not processor:  # the system does not tell: every start has a trial of its own
        return _try_shapes(heads, dtype, longest)
    key = [sorted(map(astuple, heads)), str(dtype), longest, processor, *_build()]
    known = recall("product-shapes", key)
    try:
        return ProductShapes(tuple(map(int, known["edges"])), int(known["queries"]), bool(known["fixed"]))
    except (TypeError, ValueError, KeyError):
        shapes = _try_shapes(heads, dtype, longest)
    keep("product-shapes", key, asdict(shapes))
    return shapes


def _try_shapes(heads: frozenset[Heads], dtype: torch.dtype, longest: int) -> ProductShapes:
    for queries in _QUERIES:
        found = [_find_edges(one, max(queries, one.groups), dtype, longest) for one in heads]
        edges = {edge for some in found if some is not None for edge in some}
        if None not in found and len(edges) <= MAX_EDGES:
            return ProductShapes(tuple(sorted(edges)), queries)
    return ProductShapes(fixed=True)


def _build() -> list[Any]:
    """What else a library may choose its order of sums by, and this trial itself."""
    settings = {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)}
    build = [torch.__version__, torch.__config__.show(), torch.get_num_threads(), settings]
    return [*build, Path(__file__).read_text(encoding="utf-8")]


def _processor() -> list[str]:
    """What a library chooses its kernels by: the processor's model, features and caches; [] if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        caches = [file.read_text() for file in sorted(_CACHES.glob("index*/*size"))]
    except OSError:
        return []
    found = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    features = [f"{name}:{found[name]}" for name in _FEATURES if name in found]
    return features + caches if features else []


def _find_edges(heads: Heads, queries: int, dtype: torch.dtype, longest: int) -> list[int] | None:
    """Lengths after which sums are made in another order, or None where rows of one length differ."""
    trial = _Trial(heads, queries, dtype)
    shapes = ProductShapes()
    edges: list[int] = []
    length = shapes.padded(1)
    while length < longest and len(edges) <= MAX_EDGES:
        following = shapes.padded(length + 1)
        bits, padded = trial.row(length, length), trial.row(length, following)
        if bits is None or padded is None:
            return None
        if not torch.equal(bits, padded):
            edges.append(length)
        length = following
    return edges if trial.row(length, length) is not None else None


class _Trial:
    """One query among several, alone and in company. Its sums are zero but for rounding, and so is every
    number of the result: whatever order they are made in shows in every bit."""

    def __init__(self, heads: Heads, queries: int, dtype: torch.dtype) -> None:
        many = -(-QUERY_CHUNK * heads.groups // QUERY_MULTIPLE) * QUERY_MULTIPLE
        counts = (1, heads.kv, heads.kv * _MANY_ROWS)
        shapes = [*((count, queries) for count in counts), (1, QUERY_MULTIPLE), (heads.kv, many)]
        self._shapes = tuple(dict.fromkeys(shapes))
        """(products, rows of each)"""
        self._heads = heads
        self._dtype = dtype

    @torch.inference_mode()
    def row(self, length: int, padded: int) -> torch.Tensor | None:
        """A context of `length` keys padded to `padded`: scores and mixed values; None if shapes disagree."""
        scores = self._product(*_cancelling(1, self._heads.key_dim, length, self._dtype), padded, keys=True)
        values = self._product(*_cancelling(1, length, self._heads.value_dim, self._dtype), padded)
        return None if scores is None or values is None else torch.cat([scores[:length], values])

    def _product(
        self, left: torch.Tensor, right: torch.Tensor, padded: int, *, keys: bool = False
    ) -> torch.Tensor | None:
        """The one row of `left` @ `right`, as each shape gives it; with `keys` `right` is transposed keys."""
        if keys:
            right = torch.nn.functional.pad(right, (0, padded - right.shape[1]))
        else:
            right = torch.nn.functional.pad(right, (0, 0, 0, padded - right.shape[0]))
            left = torch.nn.functional.pad(left, (0, padded - left.shape[1]))
        row: torch.Tensor | None = None
        for count, queries in self._shapes:
            size = count * max(right.numel(), queries * padded)
            if size > _TRIAL_NUMBERS and (count, queries) not in self._shapes[:1]:
                continue
            # Keys lie in memory as they do in the cache: a token after the other.
            many = right.mT.repeat(count, 1, 1).mT if keys else right.repeat(count, 1, 1)
            out = torch.matmul(left.repeat(count, queries, 1), many).view(count * queries, -1)
            row = out[0] if row is None else row
            if not torch.equal(out, row.expand_as(out)):
                return None
        return row


def _cancelling(rows: int, inner: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices [rows, inner] and [inner, columns] whose product is zero: each term has its negative."""
    generator = torch.Generator().manual_seed(inner)
    half = inner // 2
    left = torch.rand(rows, half, generator=generator) + 0.1
    right = torch.randn(half, columns, generator=generator)
    order = torch.randperm(2 * half, generator=generator)
    left = torch.cat([left, left], dim=1)[:, order]
    right = torch.cat([right, -right])[order]
    pad = torch.nn.functional.pad
    return pad(left, (0, inner - 2 * half)).to(dtype), pad(right, (0, 0, 0, inner - 2 * half)).to(dtype)
