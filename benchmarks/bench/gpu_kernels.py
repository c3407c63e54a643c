"""The part of the GPU check that looks at each kernel: `python -m bench.gpu_kernels kernels FILE SETUP`.

Under Triton's interpreter, on the CPU, it runs too, and times nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median, quantiles
from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional
from transformers import LlamaConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from bench import random_base as bases
from bench.gpu_parts import BLOCK, Counted, bandwidth, finish, make_kernels, own_kernels
from bench.gpu_report import Findings, Setup, run_part
from onebase_engine.base.experts import compute_experts, matrix_names, place_stacks, quantize_stack
from onebase_engine.engine.kv_cache import RESERVED_BLOCKS
from onebase_engine.kernels import cuda
from onebase_engine.kernels.cuda import CaptureError, CudaKernels
from onebase_engine.kernels.interface import (
    AttentionSettings,
    Contexts,
    Kernels,
    LayerCache,
    RowGroup,
    RowMap,
)
from onebase_engine.kernels.reference import ReferenceKernels
from onebase_engine.kernels.weights import LoraWeights
from onebase_training import kernels as training
from onebase_training import losses

EPS = torch.finfo(torch.bfloat16).eps
NOBODY = RowMap()
REPEATS = 12
"""Number of times that a call is timed, of which the median is told."""
SHORT, IN_A_ROW = 200.0, 8
"""Microseconds below which a call is timed by a graph of so many of them: beginning one takes some too."""


class Stopwatch:
    """Microseconds that the GPU takes for a call, with nothing of it in its cache."""

    def __init__(self, setup: Setup, found: Findings) -> None:
        self._on, self._found = setup.device == "cuda", found
        self._device = torch.device(setup.device)
        size = 1
        if self._on:
            size = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 1 << 27) // 2
        self._other = torch.zeros(size, dtype=torch.int32, device=setup.device)
        self._wipes: Callable[[], Any] | None = None
        """Graph that wipes the cache IN_A_ROW times."""
        self.spreads: list[float] = []
        """Spread of each timed call: the middle half of its times, as a part of their median."""
        if self._on:
            found.figure("a small kernel", self(lambda: self._other[:1].add_(1)) or 0.0, "us")

    @torch.inference_mode()
    def __call__(self, function: Callable[..., Any], *inputs: Any) -> float | None:
        """Return the median time of a call, in microseconds, or None without a GPU. CUDA graphs of the call
        are replayed where it can be captured, so that no launch counts."""

        def call() -> Any:
            return function(*inputs)

        if not self._on:
            call()
            return None
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        try:
            taken = self._median(self._graph(call))
            return self._in_a_row(call, taken) if taken < SHORT else taken
        except (CaptureError, torch.OutOfMemoryError) as error:
            self._found.figure(
                "timed with its launches", f"{getattr(function, '__name__', function)}: {error}"[:200]
            )
        return self._median(call)

    def _in_a_row(self, call: Callable[[], Any], alone: float) -> float:
        """Return the time of one of IN_A_ROW calls in a graph, each after the cache is wiped, less that of
        the wipes; `alone` where these take too much of it to tell."""
        if self._wipes is None:
            self._wipes = self._graph(lambda: [self._wipe() for _ in range(IN_A_ROW)])
        both = self._graph(lambda: [(self._wipe(), call()) for _ in range(IN_A_ROW)])
        taken = (self._median(both) - self._median(self._wipes)) / IN_A_ROW
        return taken if taken > 0 else alone

    def _wipe(self) -> torch.Tensor:
        """Fill the cache by reads: what is written would have to leave it in the time measured."""
        return self._other.max()

    def _graph(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Return the replay of a graph of a call. Raises CaptureError."""
        graphs = CudaKernels()
        graphs.unawaited(call, self._device)
        return graphs.capture(call, self._device)[0]

    def _median(self, run: Callable[[], Any]) -> float:
        times = []
        Event: Any = torch.cuda.Event  # noqa: N806
        for _ in range(REPEATS):
            begin, end = (Event(enable_timing=True) for _ in range(2))
            self._wipe()
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(float(begin.elapsed_time(end)) * 1e3)
        lower, middle, upper = quantiles(times)
        self.spreads.append((upper - lower) / middle)
        return middle


def tell_launches(setup: Setup, found: Findings, title: str, call: Callable[[], Any]) -> None:
    """Report how long the host takes for each launch of a call, which bounds steps that are no graph."""
    counted = Counted()
    with counted.counting(setup):
        call()
    finish(setup)
    repeats = 1 if setup.interpreted else 20  # fewer launches than the driver's queue has places
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    seconds = (time.perf_counter() - began) / repeats
    finish(setup)
    count = counted.names.total()
    found.check(f"launches are counted: {title}", count > 0)
    if not setup.interpreted:
        found.figure(f"a launch by the host, {title}", seconds / count * 1e6, f"us, of {count}")


def rows_of(count: int, slots: int) -> RowMap:
    """Return a map in which row i has slot i of `slots`, again from the first."""
    groups: dict[int, list[int]] = {}
    for row in range(count):
        groups.setdefault(row % slots, []).append(row)
    return RowMap(tuple(RowGroup(tuple(rows), ((slot, 1.0),)) for slot, rows in groups.items()))


@torch.inference_mode()
def kernels(setup: Setup, found: Findings) -> None:
    """Check each kernel against PyTorch in fp64, and a row's bits alone and in company; then measure each."""
    own = own_kernels(setup, found)
    own.step_rows = 2048  # as an engine on a GPU has, so that the library is tried
    draw = torch.Generator(setup.device).manual_seed(0)
    shape = bases.SHAPES[setup.shape]
    hidden, wide, dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    heads, kv = shape["num_attention_heads"] * dim, shape["num_key_value_heads"] * dim
    sizes = {"q": (hidden, heads), "k": (hidden, kv), "o": (heads, hidden)}
    sizes |= {"gate": (hidden, wide), "down": (wide, hidden)}
    if setup.interpreted:
        sizes = {name: sizes[name] for name in ("q", "down")}
    layers: dict[str, Any] = {name: bases.one_layer(*size, draw) for name, size in sizes.items()}
    head = torch.nn.Linear(hidden, shape["vocab_size"], bias=False, dtype=torch.bfloat16, device=setup.device)
    layers["head"] = head.requires_grad_(False)
    products = Products(setup, found, own, draw)
    for name, layer in layers.items():
        found.trying(name, products.measure, name, layer)
    found.trying("experts", _experts, setup, found, own, products.watch, draw)
    found.trying("joined layers", _join, setup, found, own, draw)
    found.trying("attention", _attention, setup, found, own, products.watch, products.per_second)
    found.trying("a norm", _norm, setup, found, own, products.watch, draw)
    if not setup.interpreted:
        found.trying("training's kernels", _trained, found, products.watch, draw, hidden)
    if spreads := products.watch.spreads:
        said = f"{median(spreads):.1%} of the median, {max(spreads):.1%} at most"
        found.figure(f"the middle half of {REPEATS} times of a call is apart", said)


class Products:
    """Compares and times layers one after the other. per_second: bytes that a large copy reads and writes."""

    def __init__(self, setup: Setup, found: Findings, own: Kernels, draw: torch.Generator) -> None:
        self._setup, self._found, self._own, self._draw = setup, found, own, draw
        self._other = ReferenceKernels(tiled=False)
        usual: cuda.Switches = own.switches  # type: ignore[attr-defined]
        self._turned = make_kernels(setup, replace(usual, permuted=not usual.permuted))
        """Kernels that unpack 4-bit weights the other way."""
        self._counts = (1, 3, 65) if setup.interpreted else (1, 2, 4, 8, 16, 32, 64, 65, 300, 600)
        self._slots, rank = (3, 4) if setup.interpreted else (64, 16)
        self._rank = rank
        self.per_second = bandwidth(setup)
        found.figure("a large copy, read and written", self.per_second / 1e9, "GB/s")
        self.watch = Stopwatch(setup, found)
        timed = 1, 2, 4, 8, 16, 32, 64, 65, 128, 256, 257, 512, 513, 2048
        self._timed = self._counts if setup.interpreted else timed
        headings = [
            "layer",
            "rows",
            "ours",
            "without cuBLAS",
            "unpacked the other way",
            "with adapters",
            "bitsandbytes",
            "cuBLAS, of weights in bf16",
        ]
        headings += ["floor", "ours / floor", "GB/s", "TFLOP/s"]
        title = f"Products, microseconds, with adapters: rank {rank}, up to {self._slots}"
        self._add = found.table(title, headings)

    def measure(self, name: str, layer: Any) -> None:
        own: Any = self._own.linear(layer, self._slots)
        other = self._other.linear(layer, self._slots)
        self._found.check(f"{name} is a kernel's", type(own) is not type(other), type(own).__name__)
        for slot in range(self._slots):
            a, b = self._normal(self._rank, layer.in_features), self._normal(layer.out_features, self._rank)
            for linear in (own, other):
                linear.put(slot, LoraWeights(a * 0.02, b * 0.02, 2.0))
        x = self._normal(max(self._counts), layer.in_features).to(torch.bfloat16)
        self._compare(name, layer, own, other, x)
        weight, turned = exact_weight(layer), cast(Any, self._turned.linear(layer, 1))
        x = self._normal(max(self._timed), layer.in_features).to(torch.bfloat16)
        for count in self._timed:
            some, rows = x[:count], rows_of(count, self._slots)
            weights = layer.in_features * layer.out_features * (2 if name == "head" else 0.5 + 1 / 64)
            read = weights + 2 * count * (layer.in_features + layer.out_features)
            floor = read / self.per_second * 1e6
            times = self.watch(own, some, NOBODY), self.watch(own, some, rows), self.watch(layer, some)
            other_way = self.watch(turned, some, NOBODY) if own.nf4 else None
            plain = self.watch(functional.linear, some, weight) if own.nf4 else times[2]
            used = own.use_library(False)
            kernel = self.watch(own, some, NOBODY) if used and count > cuda.UNPACKED_ROWS else times[0]
            own.use_library(used)
            work = 2 * count * layer.in_features * layer.out_features
            reached = (None, None) if times[0] is None else (read / times[0] / 1e3, work / times[0] / 1e6)
            beside = _beside_floor(times[0], floor)
            self._add(name, count, times[0], kernel, other_way, *times[1:], plain, *beside, *reached)
        if name in ("q", "down"):
            call = partial(own, x[: min(len(x), 256)], rows_of(min(len(x), 256), self._slots))
            tell_launches(self._setup, self._found, f"{name} with adapters", call)
        if own.nf4:
            kernels: Any = self._own
            other_kernels: Any = self._turned
            unpack, unpack_turned = partial(kernels.unpack, own, 0), partial(other_kernels.unpack, turned, 0)
            size = layer.in_features * layer.out_features
            alike = all(torch.equal(one()[:size], weight.view(-1)) for one in (unpack, unpack_turned))
            self._found.check(f"{name}: both ways unpack the weights of bitsandbytes", alike)
            for way, one in (("", unpack), (", the other way", unpack_turned)):
                if (taken := self.watch(one)) is not None:
                    self._found.figure(f"{name}: unpacking its weights{way}", taken, "us")
            told = "the same bits" if torch.equal(own.sums(x[:65]), turned.sums(x[:65])) else "other bits"
            self._found.figure(f"{name}: sums of weights that are unpacked the other way", told)

    def _compare(self, name: str, layer: Any, own: Any, other: Any, x: torch.Tensor) -> None:
        """Compare with and without adapters: errors against fp64, and the bits of the first and the last row
        alone."""
        weight = exact_weight(layer)
        errors, theirs, wrong = list[float](), list[float](), list[str]()
        for adapted in (False, True):
            for count in self._counts:
                rows = rows_of(count, self._slots) if adapted else NOBODY
                got = own(x[:count], rows)
                errors.append(_error(got, x[:count], weight, other, rows))
                theirs.append(_error(other(x[:count], rows), x[:count], weight, other, rows))
                for row in {0, count - 1}:
                    lone = RowMap((RowGroup((0,), ((row % self._slots, 1.0),)),)) if adapted else NOBODY
                    if not torch.equal(own(x[row : row + 1], lone)[0], got[row]):
                        wrong.append(f"{row} of {count}{' with adapters' if adapted else ''}")
        said = f"{max(errors):.3g} of what roundings may give (PyTorch: {max(theirs):.3g})"
        self._found.check(f"{name}: the product in fp64, but for roundings", max(errors) <= 1, said)
        said = f"not {', '.join(wrong)}" if wrong else f"among {max(self._counts)} and fewer"
        self._found.check(f"{name}: a row has the bits that it has alone", not wrong, said)

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self._setup.device, generator=self._draw)


def _beside_floor(taken: float | None, floor: float) -> tuple[float | None, float | None]:
    """Return the floor, and how many times it was taken; nothing where nothing is timed."""
    return (None, None) if taken is None else (floor, taken / floor)


def exact_weight(layer: Any) -> torch.Tensor:
    """Return the weight [out, in] in bf16, as bitsandbytes unpacks it."""
    if type(layer) is torch.nn.Linear:
        return layer.weight
    from bitsandbytes.functional import dequantize_4bit

    unpacked: torch.Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return unpacked.to(torch.bfloat16)


def _error(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, reference: Any, rows: RowMap) -> float:
    """Return the largest error of `got`, as a part of what roundings to bf16 and sums in fp32 may give; a
    slice of the outputs at a time."""
    largest = 0.0
    for first in range(0, len(weight), 8192):
        part = slice(first, first + 8192)
        own = weight[part].double()
        exact = x.double() @ own.T
        bound = x.double().abs() @ own.abs().T * 2.0**-17 + exact.abs() * EPS / 2 * 1.01
        for group in rows.groups:
            index = list(group.rows)
            for slot, factor in group.terms:
                lora = reference.plain[slot]
                added = x[index].double() @ lora.a.double().T @ lora.b[part].double().T * lora.scale * factor
                bound[index] += EPS / 2 * 1.01 * (added.abs() + (exact[index] + added).abs())
                exact[index] += added
        error = (got[:, part].double() - exact).abs() / bound.clamp(min=1e-12)
        largest = max(largest, float(error.nan_to_num(nan=float("inf")).max()))
    return largest


def _experts(setup: Setup, found: Findings, own: Kernels, watch: Stopwatch, draw: torch.Generator) -> None:
    """Compare a mixture's experts at once with those of the modelling code, one after the other."""
    hidden, inner, count, each = (64, 64, 4, 2) if setup.interpreted else (2048, 768, 64, 8)
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=inner, num_local_experts=count, num_experts_per_tok=each
    )
    module = MixtralExperts(config).to(setup.device, torch.bfloat16).requires_grad_(False)
    for name in matrix_names(module):
        parameter = getattr(module, name)
        parameter.data = torch.randn(parameter.shape, device=setup.device, generator=draw).bfloat16() * 0.05
        stack = quantize_stack(parameter.data, transposed=False, blocksize=64, double_quant=True)
        place_stacks(module, {name: stack})
    at_once = own.experts(module, 1)
    found.check("experts are a kernel's, with the bits of each layer", at_once is not None)
    if at_once is None:
        return
    title = f"{count} experts of {hidden} by {inner}, {each} a row, microseconds"
    add = found.table(title, ("rows", "at once", "one by one"))
    one_by_one = partial(compute_experts, module)
    for rows in (1, 5) if setup.interpreted else (1, 16, 64, 512, 2048):
        x = torch.randn(rows, hidden, device=setup.device, generator=draw).to(torch.bfloat16)
        chosen = torch.rand(rows, count, device=setup.device, generator=draw).topk(each).indices
        weights = torch.rand(rows, each, device=setup.device, generator=draw)
        got, alone = at_once(x, chosen, weights, NOBODY), at_once(x[-1:], chosen[-1:], weights[-1:], NOBODY)
        found.check(
            f"experts: a row alone has the bits that it has among {rows}", torch.equal(got[-1:], alone)
        )
        wanted = one_by_one(x, chosen, weights).float()
        error = float((got.float() - wanted).abs().max() / wanted.abs().max())
        found.check(
            f"experts: what modelling code gives {rows} rows", error < 0.05, f"{error:.3g} of the most"
        )
        times = watch(at_once, x, chosen, weights, NOBODY), watch(one_by_one, x, chosen, weights)
        add(rows, *times)


def _join(setup: Setup, found: Findings, own: Kernels, draw: torch.Generator) -> None:
    """Compare what fused calls give with what their layers and PyTorch's operators give one by one."""
    size = bases.SHAPES[setup.shape]["hidden_size"]
    layers = [own.linear(bases.one_layer(size, out, draw), 1) for out in (size, size // 2, size // 2)]
    joined, gated = own.join(layers), own.join(layers[1:], gated=True)
    found.check("q, k and v are one call, gate and up another", joined is not None and gated is not None)
    if joined is None or gated is None:
        return
    for rows in (5,) if setup.interpreted else (5, 70, 600):
        x = torch.randn(rows, size, device=setup.device, generator=draw).to(torch.bfloat16)
        alone = [layer(x, NOBODY) for layer in layers]
        together = joined(x, NOBODY)
        pairs = {f"joined layer {number}": (together[number], alone[number]) for number in range(3)}
        pairs["a gated pair"] = gated(x, NOBODY)[0], functional.silu(alone[1]) * alone[2]
        pairs["an output that is added to rows"] = layers[0](x, NOBODY, x), x + alone[0]
        for name, (got, wanted) in pairs.items():
            wrong = int((got != wanted).sum())
            said = f"{wrong} of {wanted.numel()} outputs differ" if wrong else ""
            found.check(f"{name}, {rows} rows: the bits of each alone", not wrong, said)


def _attention(setup: Setup, found: Findings, own: Kernels, watch: Stopwatch, per_second: float) -> None:
    shape = bases.SHAPES[setup.shape]
    heads, kv, dim = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    small = setup.interpreted
    lengths = (90, 17) if small else (4000, 700, 37)
    rows, behind = ((1, 3), (32, 70)) if small else ((1, 16, 64), (500, 4000))
    chunk, before = (20, (0, 30)) if small else (2048, (0, 6000))
    most = max(max(rows) * -(-max(behind) // BLOCK), -(-(chunk + max(before)) // BLOCK))
    blocks = RESERVED_BLOCKS + max(sum(-(-one // BLOCK) for one in lengths), most)
    draw = torch.Generator(setup.device).manual_seed(1)

    def normal(count: int, size: int) -> torch.Tensor:
        return torch.randn(count, size, dim, device=setup.device, generator=draw).to(torch.bfloat16)

    sides = []
    for one in (own, ReferenceKernels(tiled=False)):
        keys, values = (
            torch.zeros(kv, blocks * BLOCK, dim, dtype=torch.bfloat16, device=setup.device) for _ in range(2)
        )
        sides.append(one.attention(LayerCache(keys, values, BLOCK), AttentionSettings(dim**-0.5)))
    mine, theirs = sides
    total = sum(lengths)
    q, k, v = normal(heads, total), normal(kv, total), normal(kv, total)
    whole = contexts(lengths, lengths)
    got, wanted = mine(q, k, v, whole), theirs(q, k, v, whole)
    found.figure(
        "attention: largest difference from PyTorch", float((got.float() - wanted.float()).abs().max())
    )
    ends = np.cumsum(lengths) - 1
    begin, worst, other = 0, 0.0, list[str]()
    for number, end in enumerate(ends):
        parts = [one[:, begin : end + 1].double() for one in (k, v)]
        keys64, values64 = (one.repeat_interleave(heads // kv, 0) for one in parts)
        scores = torch.einsum("hd,hnd->hn", q[:, end].double(), keys64) * dim**-0.5
        exact = torch.einsum("hn,hnd->hd", scores.softmax(-1), values64)
        worst = max(worst, float((got[end].double() - exact).abs().max()))
        last = slice(end, end + 1)
        step = contexts(lengths, [int(n == number) for n in range(len(lengths))])
        if not torch.equal(mine(q[:, last], k[:, last], v[:, last], step)[0], got[end]):
            other.append(f"alone behind {lengths[number] - 1} tokens, {splits_of(lengths[number])} splits")
        begin = end + 1
    every = torch.from_numpy(ends).to(setup.device)
    together = mine(q[:, every], k[:, every], v[:, every], contexts(lengths, [1] * len(lengths)))
    found.check("attention is that of fp64", worst < 0.02, f"differs by {worst:.2g} at most")
    for one, length, wanted_row in zip(together, lengths, got[every], strict=True):
        if not torch.equal(one, wanted_row):
            other.append(f"in company behind {length - 1} tokens, {splits_of(length)} splits")
    found.check("a decode has the bits of its chunk, alone and in company", not other, "; ".join(other)[:400])
    headings = ("behind", "rows", "ours", "floor", "ours / floor")
    add = found.table("Attention of one layer, decodes, microseconds", headings)
    for length in behind:
        for count in rows:
            x, y, z = normal(heads, count), normal(kv, count), normal(kv, count)
            step = contexts([length] * count, [1] * count)
            ours = watch(mine, x, y, z, step)
            floor = 4 * count * length * kv * dim / per_second * 1e6
            add(length, count, ours, *_beside_floor(ours, floor))
    add = found.table("Attention of one layer, a chunk, microseconds", ("behind", "rows", "ours", "TFLOP/s"))
    for length in before:
        given = normal(heads, chunk), normal(kv, chunk), normal(kv, chunk)
        ours = watch(mine, *given, contexts([length + chunk], [chunk]))
        work = 4 * heads * dim * chunk * (length + chunk / 2)
        add(length, chunk, ours, None if ours is None else work / ours / 1e6)
    tell_launches(setup, found, "attention", partial(mine, x, y, z, step))


def splits_of(length: int) -> int:
    """Return the number of splits in which one attends to so many keys."""
    return -(-length // int(cuda.SPLIT.value))


def contexts(lengths: Sequence[int], counts: Sequence[int]) -> Contexts:
    """Return the last `counts[i]` rows of contexts of `lengths[i]` tokens, whose blocks lie one in front of
    the other, the last first."""
    width = max(-(-length // BLOCK) for length in lengths)
    table = np.zeros((len(lengths), width), dtype=np.int32)
    first = RESERVED_BLOCKS
    rows: list[tuple[int, int, int]] = []
    for number, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        blocks = -(-length // BLOCK)
        table[number, :blocks] = np.arange(first, first + blocks)[::-1]
        first += blocks
        for place in range(length - count, length):
            rows.append((place, number, int(table[number, place // BLOCK]) * BLOCK + place % BLOCK))
    columns = np.ascontiguousarray(np.array(rows, dtype=np.int32).T)
    return Contexts(columns[0], columns[1], columns[2:3], table[None])


def _trained(found: Findings, watch: Stopwatch, draw: torch.Generator, size: int) -> None:
    """Return True if training's kernels pass their trials; what it multiplies by parts in bf16, next to
    fp32."""
    with torch.inference_mode(False), torch.enable_grad():
        shape = LlamaConfig(hidden_size=size, intermediate_size=64, num_attention_heads=size // 64)
        layer = LlamaDecoderLayer(shape, 0).to(draw.device, torch.bfloat16).requires_grad_(False)
        trials = {
            "products by parts": training._has_products_by_parts(draw.device),
            "parts of matrices": training._tried_splitter(draw.device) is not None,
            "loss": losses._tried_kernels(draw.device) is not None,
            "norms": training.fuse_norms(layer) == 2,
            "gates": training.fuse_gates(layer) == 1,
            "rotary embeddings": training.fuse_rotations(layer) == 1,
        }
    for name, passed in trials.items():
        found.check(f"training's {name} pass their trial", passed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=draw.device, generator=draw)

    x, a = normal(8192, size).bfloat16(), normal(16, size)
    exact = x.double() @ a.double().T
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "by parts": lambda: training._by_parts(x, training._parts(a)),
        "in fp32": lambda: x.float() @ a.T,
    }
    errors = {name: float((way() - exact).abs().max() / exact.abs().max()) for name, way in ways.items()}
    found.check("training's products by parts are fp32's", errors["by parts"] < 1e-5, str(errors))
    for name, way in ways.items():
        if (taken := watch(way)) is not None:
            found.figure(f"training's 8,192 rows times rank 16, {name}", taken, "us")


def _norm(setup: Setup, found: Findings, own: Kernels, watch: Stopwatch, draw: torch.Generator) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    size = bases.SHAPES[setup.shape]["hidden_size"]
    base = LlamaRMSNorm(size, 1e-5).to(setup.device, torch.bfloat16).requires_grad_(False)
    base.weight.data.normal_(generator=draw)
    norm = own.norm(base)
    found.check("a norm is a kernel's", norm is not base)
    x = torch.randn(16, size, device=setup.device, generator=draw).to(torch.bfloat16)
    got, wanted = norm(x), base(x)
    near = bool(((got - wanted).abs() <= wanted.abs() * EPS).all())
    found.check("a norm is the base's, but for a last bit", near and torch.equal(norm(x[3:4]), got[3:4]))
    add = found.table("A norm, microseconds", ("rows", "ours", "transformers"))
    add(16, watch(norm, x), watch(base, x))


if __name__ == "__main__":
    sys.exit(run_part({"kernels": kernels}, sys.argv[1:]))
