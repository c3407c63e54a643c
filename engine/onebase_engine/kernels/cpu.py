"""The engine's products, attention, norms and draws on a CPU, by a small library in C (`native/`).

PyTorch's libraries choose their order of summation by processor, threads and shape. Where a trial on this
machine finds it, the library sums so and has PEFT's own bits. Elsewhere it sums in an order of its own: a
row's bits are still the row's alone, and no farther from the exact sum.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from onebase_engine.base.experts import ExpertStack, Int8Matrix, Int8Stack, is_usual, layer_of, matrix_names
from onebase_engine.base.layers import is_nf4, plain_absmax
from onebase_engine.environment import KERNELS
from onebase_engine.kernels.interface import (
    IN_PLACE,
    TILE,
    AttentionSettings,
    Contexts,
    Drawing,
    Draws,
    Kernels,
    LayerCache,
    LinearKernel,
    Rotation,
    Router,
    RowMap,
    StateRuns,
)
from onebase_engine.kernels.reference import (
    ReferenceKernels,
    ReferenceLinear,
    ReferenceRecurrence,
    rows_among,
)
from onebase_engine.kernels.weights import ExpertLora, LoraWeights

logger = logging.getLogger(__name__)

CHOICE = "ONEBASE_KERNELS"
"""Environment variable: `torch`, or one of the library's (amx, avx512_bf16, avx512, avx2, portable)."""
OTHER_LIBRARY = "ONEBASE_KERNELS_LIBRARY"
"""Environment variable: the path of another build, for instance with sanitizers."""
ABI = 11
LANES = 16
TRIAL_OUTPUTS = 1 << 20
IN_MULTIPLE = 32
_MOST_BLOCKS = 64
_BLOCKS = (1024, 512, 256, 4096)
"""Terms that a library may sum before it adds them to the rest, in the order in which they are tried."""
_NF4, _BF16, _INT8 = range(3)
_LINEAR, _NORM, _ATTEND, _ADD, ROUTE, _EXPERTS = range(6)
_MOST_LAYERS = 3
_OUT_OF_MEMORY, _NO_EXPERT, NOT_CHOSEN = -1, -3, -4
_SILU = ("SiLU", "SiLUActivation")
"""Names of the classes of silu."""
_READ = (torch.bfloat16, torch.float32)
"""Dtypes of which the library reads rows of recurrent layers."""


class _Order(ctypes.Structure):
    _fields_ = (("blocks", c_int64), ("ends", c_int32 * _MOST_BLOCKS), ("group", c_int32 * _MOST_BLOCKS))


class _Lora(ctypes.Structure):
    _fields_ = (
        ("a", c_void_p), ("b", c_void_p), ("rank", c_int64),
        ("shrink", POINTER(_Order)), ("expand", POINTER(_Order)), ("scale", c_float), ("wide", c_int32),
    )  # fmt: skip


class _Linear(ctypes.Structure):
    _fields_ = (
        ("kind", c_int64), ("size_in", c_int64), ("size_out", c_int64), ("weight", c_void_p),
        ("absmax", c_void_p), ("code", c_void_p), ("blocksize_log2", c_int64), ("bias", c_void_p),
        ("block", c_int64), ("quantized", c_int64), ("lora", POINTER(_Lora)), ("nested", c_void_p),
        ("nested_first", c_int64), ("nested_code", c_void_p), ("nested_absmax", c_void_p),
        ("nested_offset", c_float),
    )  # fmt: skip


class _Groups(ctypes.Structure):
    _fields_ = (
        ("groups", c_int64), ("row_starts", c_void_p), ("row", c_void_p), ("term_starts", c_void_p),
        ("slot", c_void_p), ("weight", c_void_p),
    )  # fmt: skip


class _Attention(ctypes.Structure):
    _fields_ = (
        ("keys", c_void_p), ("values", c_void_p), ("key_scales", c_void_p), ("value_scales", c_void_p),
        ("kv_heads", c_int64), ("groups", c_int64),
        ("key_dim", c_int64), ("value_dim", c_int64), ("slots", c_int64), ("block_size", c_int64),
        ("scaling", c_float), ("softcap", c_float), ("window", c_int64), ("chunk", c_int64),
        ("writes", c_int64), ("table", c_int64), ("sinks", c_void_p),
    )  # fmt: skip


class _Contexts(ctypes.Structure):
    _fields_ = (
        ("rows", c_int64), ("position", c_void_p), ("table_row", c_void_p), ("write", c_void_p),
        ("table", c_void_p), ("table_width", c_int64),
    )  # fmt: skip


class _Projected(ctypes.Structure):
    _fields_ = (
        ("q", c_void_p), ("k", c_void_p), ("v", c_void_p), ("q_row", c_int64), ("q_head", c_int64),
        ("k_row", c_int64), ("k_head", c_int64), ("v_row", c_int64), ("v_head", c_int64), ("out", c_void_p),
        ("cosines", c_void_p), ("sines", c_void_p),
    )  # fmt: skip


class _Mixture(ctypes.Structure):
    _fields_ = (("experts", c_int64), ("layers", c_void_p))


class _Choice(ctypes.Structure):
    _fields_ = (("experts", c_void_p), ("weights", c_void_p), ("each", c_int64), ("wide", c_int64))


RouteCallback = ctypes.CFUNCTYPE(c_int, c_int64)
"""Function that makes the choice of so many rows; it returns 0 or NOT_CHOSEN."""


class KernelCall(ctypes.Structure):
    """One call of the library, with all arguments that stay the same from step to step."""

    _fields_ = (
        ("kind", c_int64), ("rows", c_int64), ("count", c_int64), ("gated", c_int64), ("size", c_int64),
        ("eps", c_float), ("around_one", c_int32), ("layers", c_void_p * _MOST_LAYERS),
        ("ys", c_void_p * _MOST_LAYERS), ("x", c_void_p), ("other", c_void_p), ("weight", c_void_p),
        ("attention", c_void_p), ("projected", _Projected), ("route", RouteCallback), ("mixture", c_void_p),
        ("choice", _Choice),
    )  # fmt: skip


_ROWS_WORD, _X_WORD, _Y_WORD = (field.offset // 8 for field in (KernelCall.rows, KernelCall.x, KernelCall.ys))
"""Places of fields in a call that is read as words of 8 bytes."""


class _Draw(ctypes.Structure):
    """Sampling settings of one row, and the token drawn."""

    _fields_ = (
        ("logits", c_void_p), ("allowed", c_void_p), ("wide", c_int64), ("top_k", c_int64),
        ("uniform", c_double), ("temperature", c_float), ("top_p", c_float), ("min_p", c_float),
        ("token", c_int32),
    )  # fmt: skip


class _Runs(ctypes.Structure):
    _fields_ = (("runs", c_int64), ("starts", c_void_p), ("read", c_void_p), ("write", c_void_p))


class _Rows(ctypes.Structure):
    _fields_ = (("start", c_void_p), ("stride", c_int64), ("wide", c_int64))


class _Convolution(ctypes.Structure):
    _fields_ = (
        ("rows", c_int64), ("channels", c_int64), ("taps", c_int64), ("x", _Rows), ("weight", c_void_p),
        ("bias", c_void_p), ("wide", c_int64), ("states", c_void_p), ("y", c_void_p),
    )  # fmt: skip


class _DeltaRule(ctypes.Structure):
    _fields_ = (
        ("rows", c_int64), ("key_heads", c_int64), ("heads", c_int64), ("key_dim", c_int64),
        ("value_dim", c_int64), ("q", _Rows), ("k", _Rows), ("v", _Rows), ("decay", _Rows), ("beta", _Rows),
        ("by_key", c_int64), ("normalized", c_int64), ("eps", c_float), ("scale", c_float),
        ("states", c_void_p), ("y", c_void_p),
    )  # fmt: skip


class _StateSpace(ctypes.Structure):
    _fields_ = (
        ("rows", c_int64), ("heads", c_int64), ("dim", c_int64), ("groups", c_int64), ("size", c_int64),
        ("x", _Rows), ("dt", _Rows), ("b", _Rows), ("c", _Rows), ("a", c_void_p), ("skip", c_void_p),
        ("by_size", c_int64), ("states", c_void_p), ("y", c_void_p),
    )  # fmt: skip


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "onebase_abi": (c_int64, ()),
    "onebase_choose": (c_char_p, (c_char_p,)),
    "onebase_use_threads": (c_int64, (c_int64,)),
    "onebase_run": (c_int, (c_void_p, c_int64, c_void_p, c_void_p)),
    "onebase_draw_tokens": (c_int, (c_void_p, c_int64, c_int64)),
    "onebase_convolve": (c_int, (c_void_p, c_void_p)),
    "onebase_apply_delta_rule": (c_int, (c_void_p, c_void_p)),
    "onebase_scan_states": (c_int, (c_void_p, c_void_p)),
    "onebase_gate": (c_int, (c_void_p, c_void_p, c_void_p, c_int64)),
    "onebase_sums": (c_int, (c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p)),
}


class Recorder(Protocol):
    """Protocol of an object that records calls and provides the memory for their results."""

    def note(self, call: KernelCall, reads: Sequence[torch.Tensor]) -> None: ...

    def empty(self, *shape: int) -> torch.Tensor: ...

    def route(self, choose: Router, x: torch.Tensor) -> tuple[torch.Tensor, ...]: ...


def _groups_of(rows: RowMap) -> int | None:
    """Return the address of the library's structure of the groups, built once; None without groups."""
    if not rows.groups:
        return None
    if "native" not in rows.held:
        flat = [term for group in rows.groups for term in group.terms]
        arrays = [
            np.cumsum([0, *(len(group.rows) for group in rows.groups)], dtype=np.int32),
            np.concatenate([np.asarray(group.rows, dtype=np.int32) for group in rows.groups]),
            np.cumsum([0, *(len(group.terms) for group in rows.groups)], dtype=np.int32),
            np.array([slot for slot, _ in flat], dtype=np.int32),
            np.array([weight for _, weight in flat], dtype=np.float32),
        ]
        groups = _Groups(len(rows.groups), *(array.ctypes.data for array in arrays))
        rows.held["native"] = ctypes.addressof(groups), groups, arrays
    address: int = rows.held["native"][0]
    return address


def _contexts_of(contexts: Contexts) -> int:
    """Return the address of the library's structures of the contexts, one a table, built once."""
    if IN_PLACE not in contexts.held:
        count, width = len(contexts.position), contexts.tables.shape[2]
        same = contexts.position.ctypes.data, contexts.table_row.ctypes.data
        own = (_Contexts * len(contexts.tables))(
            *(
                _Contexts(count, *same, write.ctypes.data, table.ctypes.data, width)
                for write, table in zip(contexts.write, contexts.tables, strict=True)
            )
        )
        contexts.held[IN_PLACE] = ctypes.addressof(own), own
    address: int = contexts.held[IN_PLACE][0]
    return address


def _runs_of(runs: StateRuns) -> int:
    """Return the address of the library's structure of the runs, built once."""
    if "native" not in runs.held:
        arrays = (runs.starts, runs.read, runs.write)
        own = _Runs(len(runs.read), *(array.ctypes.data for array in arrays))
        runs.held["native"] = ctypes.addressof(own), own
    address: int = runs.held["native"][0]
    return address


def _rows(x: torch.Tensor) -> _Rows:
    """Describe rows [T, ...], each of them contiguous."""
    return _Rows(x.data_ptr(), x.stride(0), x.dtype == torch.float32)


def _with_rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return tensors [T, ...] with each row contiguous, copied where it is not."""
    return [x if x.shape[0] and x[0].is_contiguous() else x.contiguous() for x in tensors]


def find_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Return the kernels for a base of this dtype. In bf16 these are the library's on a CPU and Triton's on a
    GPU, if they work there; PyTorch's otherwise."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        return _on_gpu(device)
    kernels = load_library() if device.type == "cpu" and dtype == torch.bfloat16 else None
    if kernels is None:
        return ReferenceKernels(tiled=device.type == "cpu")
    kernels.use_threads()
    return kernels


@cache
def _on_gpu(device: torch.device) -> Kernels:
    kernels = None
    if os.environ.get(CHOICE, "") != "torch":
        try:
            from onebase_engine.kernels import cuda
        except ImportError as error:
            logger.warning("kernels: PyTorch, since Triton cannot be imported: %s", error)
        else:
            kernels = cuda.load_kernels(device)
    found: Any = ReferenceKernels(tiled=False) if kernels is None else kernels
    # The name holds the kind of GPU, because a proof holds for one kind alone.
    major, minor = torch.cuda.get_device_capability(device)
    found.name = f"{found.name} sm_{major}{minor}"
    return found  # type: ignore[no-any-return]


@cache
def load_library() -> CpuKernels | None:
    """Return the library's kernels for this processor; None, with the reason logged, if PyTorch computes."""
    wanted = os.environ.get(CHOICE, "")
    if wanted == "torch":
        return None
    path = Path(os.environ.get(OTHER_LIBRARY) or KERNELS)
    if not path.exists():
        logger.warning("kernels: PyTorch, since the library in C was not built; install a C compiler")
        return None
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        logger.warning("kernels: PyTorch, since %s cannot be loaded: %s", path, error)
        return None
    if library.onebase_abi() != ABI:
        logger.warning("kernels: PyTorch, since %s is of another version; install OneBase again", path)
        return None
    chosen = library.onebase_choose(wanted.encode() or None)
    if chosen is None:
        logger.warning("kernels: PyTorch, since this processor has none of %s=%s", CHOICE, wanted)
        return None
    if chosen == b"portable" and not wanted:
        # Not yet timed on a processor that has nothing better.
        logger.info("kernels: PyTorch, since there are none for this processor; %s=portable tries C", CHOICE)
        return None
    return CpuKernels(library, chosen.decode())


class CpuKernels(ReferenceRecurrence):
    """The library, with the results of trials on this machine."""

    tiled = True
    row_multiple = 1
    joins = True
    unfused: frozenset[str] = frozenset()
    drafts = True
    draft_cost = 0.15  # measured with AVX512-BF16
    draft_rows = sys.maxsize
    compiles = False
    narrows = False
    captures = False
    step_rows = 0
    asynchronous = False

    def __init__(self, library: Any, name: str) -> None:
        self.name = name
        self.library = library
        self._blocks: dict[tuple[Any, ...], tuple[int, bool]] = {}
        self._orders: dict[tuple[int, int, int], tuple[_Order, bool]] = {}
        self._norms: dict[tuple[Any, ...], bool | None] = {}
        """Whether a kind of norm has a weight around 1; None if PyTorch computes it."""
        self.threads = 0
        self.recorder: Recorder | None = None
        """Recorder of the calls, if they are being recorded."""
        self.route_error: BaseException | None = None
        """Error of a router that a recorded call has called."""
        self.use_threads()

    def run_call(
        self, call: KernelCall, reads: Sequence[torch.Tensor], rows: RowMap | None, contexts: Contexts | None
    ) -> None:
        """Make one call. `reads`: the rows that it reads.

        Raises:
            MemoryError: there is none for this step.
        """
        if self.recorder is not None:
            self.recorder.note(call, reads)
        self.run_all(ctypes.addressof(call), 1, rows, contexts)

    def run_all(self, calls: int, count: int, rows: RowMap | None, contexts: Contexts | None) -> None:
        """Make the `count` calls that lie at the address `calls`, one after the other, as `run_call` does."""
        terms = None if rows is None else _groups_of(rows)
        step = None if contexts is None else _contexts_of(contexts)
        result = self.library.onebase_run(calls, count, terms, step)
        error, self.route_error = self.route_error, None
        if error is not None:
            raise error
        _check(result)

    def route(self, choose: Router, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return choose(x) if self.recorder is None else self.recorder.route(choose, x)

    def empty(self, *shape: int) -> torch.Tensor:
        """Return memory, bf16, for a call's result."""
        if self.recorder is not None:
            return self.recorder.empty(*shape)
        return torch.empty(*shape, dtype=torch.bfloat16)

    def use_threads(self) -> None:
        """Use as many threads as PyTorch."""
        if self.threads != torch.get_num_threads():
            self.threads = torch.get_num_threads()
            self.library.onebase_use_threads(self.threads)

    def linear(self, base: Any, slots: int, *, unpacked: bool = False) -> NativeLinear | ReferenceLinear:
        reference = ReferenceLinear(base, tiled=True, unpacked=unpacked)
        weight = base.weight
        if base.in_features % IN_MULTIPLE or not weight.is_contiguous() or weight.device.type != "cpu":
            return reference
        plain = type(base) is nn.Linear and weight.dtype == torch.bfloat16
        if not (plain or _is_nf4(base) or _is_int8(base)):
            return reference
        layer = NativeLinear(self, base, slots, reference, unpacked=unpacked)
        key = (layer.kind, base.in_features, base.out_features, base.bias is not None, self.threads)
        if key not in self._blocks:
            self._blocks[key] = self._find_block(layer, *reference.weight())
        layer.structure.block, layer.exact_base = self._blocks[key]
        return layer

    def experts(self, module: Any, slots: int) -> NativeExperts | None:
        kind: Any = type(module)
        if not is_usual(kind):
            return None
        held = {name: getattr(module, name) for name in matrix_names(module)}
        up, down = (self.linear(layer_of(one, 0), 0) for one in held.values())
        if not (isinstance(up, NativeLinear) and isinstance(down, NativeLinear)):
            return None
        silu = type(module.act_fn).__name__ in _SILU and self.gates and up.size_out % (2 * LANES) == 0
        return NativeExperts(self, held, up, down, None if silu else module.act_fn, slots)

    def join(self, layers: Sequence[LinearKernel], *, gated: bool = False) -> NativeLayers | None:
        """Join layers. A gated pair is joined only if silu has PyTorch's bits."""
        own = [layer for layer in layers if isinstance(layer, NativeLinear)]
        if len(own) < len(layers) or (gated and not self.gates):
            return None
        return NativeLayers(own, gated=gated)

    @torch.inference_mode()
    def _find_block(
        self, layer: NativeLinear, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[int, bool]:
        """Return the terms summed in one block, and whether that gives PyTorch's bits."""
        for block in (layer.size_in, *_BLOCKS):
            layer.structure.block = block
            tried = _inputs(layer.size_in, layer.size_out)
            if all(torch.equal(layer.alone(x), functional.linear(x, weight, bias)) for x in tried):
                return block, True
        logger.info(
            "kernels: layers of %d by %d have other last bits by %s than by PyTorch",
            layer.size_out, layer.size_in, self.name,
        )  # fmt: skip
        return layer.size_in, False

    def order(self, inner: int, outer: int) -> tuple[_Order, bool]:
        """Return the order in which to sum fp32 products, and whether it is PyTorch's.

        The products have `inner` terms, TILE rows and `outer` outputs.
        """
        key = (inner, outer, self.threads)
        if key not in self._orders:
            self._orders[key] = self._find_order(inner, outer)
        return self._orders[key]

    def _find_order(self, inner: int, outer: int) -> tuple[_Order, bool]:
        draw = torch.Generator().manual_seed(0)
        x, weight = torch.randn(TILE, inner, generator=draw), torch.randn(outer, inner, generator=draw)
        wanted = functional.linear(x, weight)
        for find in (_one_block, _strands, _probed_blocks):
            order = find(inner, outer)
            if order is not None and torch.equal(self._sums(order, x, weight), wanted):
                return order, True
        return _one_block(inner, outer), False

    def _sums(self, order: _Order, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.empty(-(-len(weight) // LANES), len(x), LANES)
        for part in range(len(out)):
            some = weight[part * LANES : (part + 1) * LANES]
            self.library.onebase_sums(
                ctypes.addressof(order), x.data_ptr(), len(x), some.data_ptr(), len(some), x.shape[1],
                out[part].data_ptr(),
            )  # fmt: skip
        return out.permute(1, 0, 2).reshape(len(x), -1)[:, : len(weight)]

    def norm(self, base: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the library's norm if a trial gives the bits of `base`, a root mean square norm whose weight
        may be around 1; else `base`."""
        weight, bias = getattr(base, "weight", None), getattr(base, "bias", None)
        eps = getattr(base, "variance_epsilon", getattr(base, "eps", None))
        own: Callable[[torch.Tensor], torch.Tensor] = base
        if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or weight.dtype != torch.bfloat16:
            return own
        if weight.numel() % LANES or bias is not None or not isinstance(eps, float):
            return own
        size = weight.numel()

        def normed(x: torch.Tensor, around_one: bool) -> torch.Tensor:
            x = x.contiguous()
            y = self.empty(*x.shape)
            call = KernelCall(
                _NORM, x.numel() // size, size=size, eps=eps, around_one=around_one, x=x.data_ptr(),
                weight=weight.data_ptr(),
            )  # fmt: skip
            call.ys[0] = y.data_ptr()
            self.run_call(call, [x], None, None)
            return y

        settings = [
            (name, value) for name, value in vars(base).items() if isinstance(value, int | float | str)
        ]
        key = (type(base), *settings, size, self.threads)
        if key not in self._norms:
            with torch.inference_mode():
                ways = (
                    way
                    for way in (False, True)
                    if all(torch.equal(normed(x, way), own(x)) for x in _inputs(size, size))
                )
                self._norms[key] = next(ways, None)
        around_one = self._norms[key]
        if around_one is None:
            return own

        def norm(x: torch.Tensor) -> torch.Tensor:
            # A norm that ignores its weight (Falcon Mamba) may be given rows of another width.
            fits = x.dtype == torch.bfloat16 and x.shape[-1] == size
            return normed(x, around_one) if fits else own(x)

        return norm

    def add(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Return x + other, bf16, both contiguous and of one shape, whose last size is a multiple of
        LANES."""
        y = self.empty(*x.shape)
        size = x.shape[-1]
        call = KernelCall(_ADD, x.numel() // size, size=size, x=x.data_ptr(), other=other.data_ptr())
        call.ys[0] = y.data_ptr()
        self.run_call(call, [x, other], None, None)
        return y

    def convolve(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        states: torch.Tensor,
        runs: StateRuns,
    ) -> torch.Tensor:
        alike = x.dtype == states.dtype and (bias is None or bias.dtype == weight.dtype)
        if x.dtype not in _READ or weight.dtype not in _READ or not alike:
            return super().convolve(x, weight, bias, states, runs)
        (x,), weight = _with_rows(x), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        y = torch.empty(x.shape, dtype=weight.dtype)
        layer = _Convolution(
            len(x), *weight.shape, _rows(x), weight.data_ptr(), None if bias is None else bias.data_ptr(),
            weight.dtype == torch.float32, states.data_ptr(), y.data_ptr(),
        )  # fmt: skip
        _check(self.library.onebase_convolve(ctypes.addressof(layer), _runs_of(runs)))
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
        if any(one.dtype not in _READ for one in (q, k, v, decay, beta)):
            return super().delta_rule(q, k, v, decay, beta, states, runs, scale=scale, eps=eps)
        q, k, v, decay, beta = _with_rows(q, k, v, decay, beta)
        y = torch.empty(v.shape, dtype=v.dtype)
        layer = _DeltaRule(
            len(v), q.shape[1], v.shape[1], q.shape[2], v.shape[2],
            *(_rows(one) for one in (q, k, v, decay, beta)), decay.dim() == 3, eps is not None, eps or 0.0,
            scale, states.data_ptr(), y.data_ptr(),
        )  # fmt: skip
        _check(self.library.onebase_apply_delta_rule(ctypes.addressof(layer), _runs_of(runs)))
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
        if any(one.dtype not in _READ for one in (x, dt, b, c)):
            return super().state_space(x, dt, a, b, c, states, runs, skip=skip)
        x, dt, b, c = _with_rows(x, dt, b, c)
        a, skip = a.float().contiguous(), None if skip is None else skip.float().contiguous()
        y = torch.empty(x.shape)
        layer = _StateSpace(
            *x.shape, *b.shape[1:], *(_rows(one) for one in (x, dt, b, c)), a.data_ptr(),
            None if skip is None else skip.data_ptr(), a.dim() == 2, states.data_ptr(), y.data_ptr(),
        )  # fmt: skip
        _check(self.library.onebase_scan_states(ctypes.addressof(layer), _runs_of(runs)))
        return y

    def draw(
        self, logits: Sequence[torch.Tensor], draws: Draws, allowed: Sequence[np.ndarray | None]
    ) -> Drawing:
        if any(row.dtype not in (torch.bfloat16, torch.float32) for row in logits):
            raise TypeError("tokens are drawn from logits in bf16 or fp32")
        logits = [row.contiguous() for row in logits]
        masks = [None if mask is None else mask.ctypes.data for mask in allowed]
        rows = (_Draw * len(logits))(
            *(
                _Draw(row.data_ptr(), mask, row.dtype == torch.float32, *settings)
                for row, mask, *settings in zip(
                    logits, masks, draws.top_k.tolist(), draws.uniform.tolist(), draws.temperature.tolist(),
                    draws.top_p.tolist(), draws.min_p.tolist(), strict=True,
                )
            )
        )  # fmt: skip
        _check(self.library.onebase_draw_tokens(ctypes.addressof(rows), len(rows), len(logits[0])))
        found = [None if row.token < 0 else row.token for row in rows]
        return lambda: found

    @cached_property
    def gates(self) -> bool:
        """Whether silu(gate) * up has PyTorch's bits, for each gate that bf16 has."""
        gate, up = _every_number()
        y = torch.empty_like(gate)
        self.library.onebase_gate(gate.data_ptr(), up.data_ptr(), y.data_ptr(), len(gate))
        return _same(y, functional.silu(gate) * up)

    @cached_property
    def adds(self) -> bool:
        """Whether `add` has PyTorch's bits, for each number that bf16 has."""
        x, other = _every_number()
        return _same(self.add(x, other), x + other)

    def attention(self, cache: LayerCache, settings: AttentionSettings) -> NativeAttention:
        kv_heads, _, dim = cache.keys.shape
        scales = (None, None) if cache.scales is None else (one.data_ptr() for one in cache.scales)
        sinks = settings.sinks
        structure = _Attention(
            cache.keys.data_ptr(), cache.values.data_ptr(), *scales, kv_heads, 1, dim,
            cache.values.shape[2], cache.head_slots, cache.block_size, settings.scaling,
            settings.softcap or 0.0, settings.window or 0, settings.chunk or 0, settings.writes, cache.table,
            None if sinks is None else sinks.data_ptr(),
        )  # fmt: skip
        return NativeAttention(self, structure, sinks)


class NativeLinear:
    """One linear layer by the library: the base's product, plus the plain LoRAs in its slots."""

    captures = False
    adds = False

    def __init__(
        self, kernels: CpuKernels, base: Any, slots: int, reference: ReferenceLinear, *, unpacked: bool
    ) -> None:
        """Describe the layer to the library. `reference`: the same layer by PyTorch."""
        self.kernels = kernels
        self.reference = reference
        self.size_in, self.size_out = base.in_features, base.out_features
        self.kind = _BF16 if unpacked else _NF4 if _is_nf4(base) else _INT8 if _is_int8(base) else _BF16
        # The last one stays empty.
        self._lora = (_Lora * (slots + 1))()
        self._held: dict[int, Any] = {}
        self.exact_base = True
        self._inexact: set[int] = set()
        """Slots whose products PyTorch sums in another order."""
        weight: Any = reference.weight()[0] if unpacked else base.weight
        bias = base.bias
        self._base: list[Any] = [weight, None if bias is None else bias.to(torch.bfloat16)]
        absmax = code = None
        shift = 0
        if self.kind == _NF4:
            state = weight.quant_state
            absmax, code = _by_panels(weight, self.size_out), state.code.float().contiguous()
            shift = state.blocksize.bit_length() - 1
            self._base += [absmax, code]
        elif self.kind == _INT8:
            absmax = base.absmax.contiguous()
            self._base.append(absmax)
        self.structure = _Linear(
            self.kind, self.size_in, self.size_out, weight.data_ptr(),
            None if absmax is None else absmax.data_ptr(), None if code is None else code.data_ptr(), shift,
            None if bias is None else self._base[1].data_ptr(), self.size_in,
            _is_nf4(base) or _is_int8(base),
            ctypes.cast(self._lora, POINTER(_Lora)),
        )  # fmt: skip
        self._layers = NativeLayers([self])

    @property
    def adapted(self) -> bool:
        """Whether any slot has weights that the library multiplies with."""
        return bool(self._held)

    def __call__(self, x: torch.Tensor, rows: RowMap, onto: torch.Tensor | None = None) -> torch.Tensor:
        if x.dtype != torch.bfloat16:
            return self.reference(x, rows, onto)
        y = self._layers(x.contiguous(), rows)[0]
        return y if onto is None else onto + y

    def exact(self, slot: int) -> bool:
        return self.exact_base and slot not in self._inexact

    def alone(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the base's product alone: x [rows, in] bf16, contiguous -> [rows, out] bf16."""
        return self._layers(x, None)[0]

    def put(self, slot: int, weights: LoraWeights | None) -> None:
        self.reference.put(slot, weights)
        self._held.pop(slot, None)
        self._inexact.discard(slot)
        self._lora[slot] = _Lora()
        if weights is None:
            return
        shrink, same_shrink = self.kernels.order(self.size_in, weights.rank)
        expand, same_expand = self.kernels.order(weights.rank, self.size_out)
        if not (same_shrink and same_expand):
            self._inexact.add(slot)
        a, b = weights.a.contiguous(), weights.b.contiguous()
        orders = ctypes.pointer(shrink), ctypes.pointer(expand)
        self._held[slot] = (a, b)
        wide = weights.adds_wide
        self._lora[slot] = _Lora(a.data_ptr(), b.data_ptr(), weights.rank, *orders, weights.scale, wide)


class NativeLayers:
    """Up to three linear layers that multiply the same rows, in one call.

    `gated`: two of them, a gate and an up projection; the one result is silu(gate) * up.
    """

    def __init__(self, layers: Sequence[NativeLinear], *, gated: bool = False) -> None:
        self._kernels = layers[0].kernels
        self._layers = tuple(layers)
        self._sizes = [layer.size_out for layer in layers[: 1 if gated else None]]
        self._call = KernelCall(_LINEAR, count=len(layers), gated=gated)
        for number, layer in enumerate(layers):
            self._call.layers[number] = ctypes.addressof(layer.structure)

    def __call__(self, x: torch.Tensor, rows: RowMap | None) -> list[torch.Tensor]:
        """Compute x [rows, in] bf16, contiguous -> [rows, out] bf16 of each; without `rows` no adapter
        acts."""
        call, count = self._call, x.shape[0]
        ys = [self._kernels.empty(count, size) for size in self._sizes]
        for number, y in enumerate(ys):
            call.ys[number] = y.data_ptr()
        call.x, call.rows = x.data_ptr(), count
        self._kernels.run_call(
            call, [x], rows if any(layer.adapted for layer in self._layers) else None, None
        )
        return ys


class NativeExperts:
    """Experts of a mixture by the library: one call, or, if PyTorch computes the gate's activation, two for
    each expert that is used.

    The gate and the up projection are the halves of one matrix.
    """

    captures = False

    def __init__(
        self,
        kernels: CpuKernels,
        held: Mapping[str, Any],
        up: NativeLinear,
        down: NativeLinear,
        activation: Callable[[torch.Tensor], torch.Tensor] | None,
        slots: int,
    ) -> None:
        """Describe the experts to the library.

        Args:
            held: stacks or parameters of the matrices up and down, by name.
            up: layer of the first expert's matrix up; `down`: of its matrix down.
            activation: of the gate; None: silu, which the library computes.
            slots: number of adapters.
        """
        self._kernels = kernels
        self._activation = activation
        self._names = tuple(held)
        self._slot_count = slots
        self._exact = up.exact_base and down.exact_base
        self._inexact: set[tuple[str, int]] = set()
        """Names and slots of matrices whose products PyTorch sums in another order."""
        self._adapters: dict[tuple[str, int], ExpertLora] = {}
        """Matrices by the parameter's name and slot."""
        self._tables: dict[str, list[Any]] = {}
        """Description of each structure's matrices by slot, by the parameter's name."""
        self._inner, self._size = down.size_in, down.size_out
        self._sizes = {name: (one.size_in, one.size_out) for name, one in zip(held, (up, down), strict=True)}
        stacks = list(held.values())
        count = len(stacks[1].weight if isinstance(stacks[1], ExpertStack) else stacks[1])
        fill = [_matrices_of(one) for one in stacks]
        self._base = [up, down, *stacks, *fill]
        self._layers = (_Linear * (3 * count))()
        self._mixture = _Mixture(count, ctypes.addressof(self._layers))
        calls = (KernelCall * (2 * count))()
        for number in range(count):
            gate, second, last = (self._layers[3 * number + place] for place in range(3))
            halves = (0, 1) if activation is None else (None, None)
            for structure, layer, matrix, half in (
                (gate, up, fill[0], halves[0]), (second, up, fill[0], halves[1]),
                (last, down, fill[1], None),
            ):  # fmt: skip
                ctypes.pointer(structure)[0] = layer.structure
                structure.lora = None
                structure.size_out = layer.size_out if half is None else layer.size_out // 2
                matrix(structure, number, (half or 0) * structure.size_out)
            first, then = calls[2 * number], calls[2 * number + 1]
            first.kind = then.kind = _LINEAR
            first.count = then.count = 1
            first.layers[0], then.layers[0] = ctypes.addressof(gate), ctypes.addressof(last)
        words = np.frombuffer(memoryview(calls).cast("B"), np.int64)
        self._calls = words.reshape(count, 2, -1).copy()
        """The two calls of each expert, as words [experts, 2, ...]."""

    def exact(self, slot: int) -> bool:
        return self._exact and not any((name, slot) in self._inexact for name in self._names)

    def put(self, name: str, slot: int, weights: ExpertLora | None) -> None:
        self._adapters.pop((name, slot), None)
        self._inexact.discard((name, slot))
        if name not in self._tables:
            if weights is None:
                return
            self._tables[name] = self._add_tables(name)
        if weights is None:
            for table in self._tables[name]:
                table[slot] = _Lora()
            return
        size_in, size_out = self._sizes[name]
        shrink, same_shrink = self._kernels.order(size_in, weights.rank)
        expand, same_expand = self._kernels.order(weights.rank, size_out)
        if not (same_shrink and same_expand):
            self._inexact.add((name, slot))
        a, b = weights.a.contiguous(), weights.b.contiguous()
        self._adapters[name, slot] = ExpertLora(a, b, weights.scale)
        orders = ctypes.pointer(shrink), ctypes.pointer(expand)
        each = len(self._tables[name]) // len(self._calls)
        for number, table in enumerate(self._tables[name]):
            expert, half = divmod(number, each)
            own = b[expert][half * (size_out // each) :]
            table[slot] = _Lora(a[expert].data_ptr(), own.data_ptr(), weights.rank, *orders, weights.scale, 0)

    def _add_tables(self, name: str) -> list[Any]:
        """Give each structure of a parameter's matrices a table of adapters by slot; return the tables.

        A matrix up whose halves the library multiplies by themselves has two.
        """
        up = [0] if self._activation is not None else [0, 1]
        places = [2] if name == self._names[1] else up
        tables = []
        for expert in range(len(self._calls)):
            for place in places:
                table = (_Lora * (self._slot_count + 1))()
                self._layers[3 * expert + place].lora = ctypes.cast(table, POINTER(_Lora))
                tables.append(table)
        return tables

    def _groups_of(
        self, rows: RowMap, packed: np.ndarray, starts: np.ndarray, counts: np.ndarray
    ) -> dict[int, RowMap]:
        """Return the groups among the rows of each expert for which an adapter acts, by its place among the
        used experts.

        packed: numbers of the packed rows, sorted by expert, [rows * k].
        """
        filled = {slot for _, slot in self._adapters}
        acting = tuple(group for group in rows.groups if any(slot in filled for slot, _ in group.terms))
        if not acting:
            return {}
        if len(acting) < len(rows.groups):
            rows = RowMap(acting)
        found = {
            place: rows_among(rows, packed[start : start + count].tolist())
            for place, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True))
        }
        return {place: groups for place, groups in found.items() if groups.groups}

    def __call__(
        self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, rows: RowMap
    ) -> torch.Tensor:
        if x.dtype != torch.bfloat16:
            raise TypeError(f"experts in bf16 got rows in {x.dtype}")
        if self._activation is not None:
            return self._by_steps(self._activation, x, chosen, weights, rows)
        x, chosen, weights = x.contiguous(), chosen.contiguous(), weights.contiguous()
        wide = weights.dtype == torch.float32
        if chosen.dtype != torch.int64 or not (wide or weights.dtype == torch.bfloat16):
            raise TypeError(f"experts in {chosen.dtype} with weights in {weights.dtype} are not computed")
        y = self._kernels.empty(*x.shape)
        choice = _Choice(chosen.data_ptr(), weights.data_ptr(), chosen.shape[1], wide)
        call = KernelCall(
            _EXPERTS, len(x), x=x.data_ptr(), mixture=ctypes.addressof(self._mixture), choice=choice
        )
        call.ys[0] = y.data_ptr()
        self._kernels.run_call(call, [x, chosen, weights], rows, None)
        return y

    def _by_steps(
        self,
        activation: Callable[[torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        rows: RowMap,
    ) -> torch.Tensor:
        each = chosen.shape[1]
        numbers = chosen.numpy()
        flat = numbers.reshape(-1)
        order = np.argsort(flat, kind="stable")
        used, starts, counts = np.unique(flat[order], return_index=True, return_counts=True)
        if len(used) and not 0 <= used[0] <= used[-1] < len(self._calls):
            raise ValueError("a router chose an expert that there is not")
        xs = x[torch.from_numpy(order // each)]
        ys = torch.empty(len(flat), self._size, dtype=x.dtype)
        calls = self._calls[used]
        calls[:, :, _ROWS_WORD] = counts[:, None]
        adapted = self._groups_of(rows, order // each, starts, counts) if self._adapters else {}
        bare = np.setdiff1d(np.arange(len(used)), list(adapted))

        def multiply(part: int, *tensors: torch.Tensor) -> None:
            places = [one.data_ptr() + starts * one.stride(0) * one.itemsize for one in tensors]
            calls[:, part, [_X_WORD, _Y_WORD]] = np.stack(places, 1)
            made = np.ascontiguousarray(calls[bare, part])
            self._kernels.run_all(made.ctypes.data, len(made), None, None)
            for place, groups in adapted.items():
                made = np.ascontiguousarray(calls[place, part])
                self._kernels.run_all(made.ctypes.data, 1, groups, None)

        both = torch.empty(len(flat), 2 * self._inner, dtype=x.dtype)
        multiply(0, xs, both)
        gate, up = both.chunk(2, dim=-1)
        multiply(1, activation(gate) * up, ys)
        # A row adds up by ascending number of the expert.
        place = np.empty(len(flat), np.int64)
        place[order] = np.arange(len(flat))
        by_expert = np.argsort(numbers, axis=1, kind="stable")
        index = torch.from_numpy(np.take_along_axis(place.reshape(-1, each), by_expert, 1))
        parts = ys[index] * weights.gather(1, torch.from_numpy(by_expert))[..., None]
        parts = parts.to(x.dtype)
        total = torch.zeros_like(x)
        for part in parts.unbind(1):
            total += part
        return total


def _matrices_of(held: Any) -> Callable[[_Linear, int, int], None]:
    """Return a function that describes a matrix of a stack, or of a parameter, in a structure that has its
    sizes: by its number, from an output on."""

    def describe(structure: _Linear, number: int, output: int) -> None:
        first, blocks = output * structure.size_in, structure.size_in >> structure.blocksize_log2
        if not isinstance(held, ExpertStack):
            structure.weight = _address(held, number, first)
        elif isinstance(held, Int8Stack):
            structure.weight = _address(held.weight, number, first)
            structure.absmax = _address(held.absmax, number, output)
        else:
            structure.weight = _address(held.weight, number, first // 2)
            if panels is not None:
                structure.absmax = _address(panels, number, output * blocks)
                return
            buffers: Any = held
            structure.absmax = None
            structure.nested, structure.nested_first = _address(held.absmax, number), output * blocks
            structure.nested_code = buffers.nested_code.data_ptr()
            structure.nested_absmax = _address(buffers.nested_absmax, number)
            structure.nested_offset = float(buffers.offset[number])

    plain = isinstance(held, ExpertStack) and not isinstance(held, Int8Stack) and not held.nested
    panels = _panels_of_stack(held) if plain else None
    return describe


def _address(tensor: torch.Tensor, number: int, place: int = 0) -> int:
    """Return the address of a number within `tensor[number]`, which is contiguous."""
    return tensor.data_ptr() + (number * tensor.stride(0) + place) * tensor.itemsize


class NativeAttention:
    """Attention of one layer by the library."""

    def __init__(self, kernels: CpuKernels, structure: _Attention, sinks: torch.Tensor | None) -> None:
        """Describe the layer. `sinks`: the memory to which the structure points."""
        self._kernels = kernels
        self._structure = structure
        self._sinks = sinks

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
        self._structure.groups = q.shape[0] // self._structure.kv_heads
        out = self._kernels.empty(q.shape[1], q.shape[0], v.shape[2])
        projected = _Projected(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(1), q.stride(0), k.stride(1), k.stride(0),
            v.stride(1), v.stride(0), out.data_ptr(),
            *((None, None) if rotation is None else (one.data_ptr() for one in rotation)),
        )  # fmt: skip
        call = KernelCall(
            _ATTEND, q.shape[1], attention=ctypes.addressof(self._structure), projected=projected
        )
        self._kernels.run_call(call, [q, k, v, *(rotation or ())], None, contexts)
        return out


def _inputs(size_in: int, size_out: int) -> Iterator[torch.Tensor]:
    """Yield rows [TILE, in] bf16 for TRIAL_OUTPUTS outputs: another order changes one in ten thousand."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(-(-TRIAL_OUTPUTS // (TILE * size_out))):
        yield torch.randn(TILE, size_in, generator=draw).to(torch.bfloat16)


def _check(result: int) -> None:
    if result == _OUT_OF_MEMORY:
        raise MemoryError("the kernels have no memory for this step")
    if result == _NO_EXPERT:
        raise ValueError("a router chose an expert that there is not")
    if result:
        raise RuntimeError("the kernels were called for other rows than the step has")


def _by_panels(weight: Any, outputs: int) -> torch.Tensor:
    """Return the scales of a weight's blocks as [out / LANES, blocks of an output, LANES], fp32.

    The weight keeps them: views of a base share it, and would have a sixteenth of a byte a weight each.
    """
    made: torch.Tensor | None = getattr(weight, "onebase_panels", None)
    if made is None:
        made = weight.onebase_panels = _panels(plain_absmax(weight.quant_state).float().view(outputs, -1))
    return made


def _panels_of_stack(stack: ExpertStack) -> torch.Tensor:
    """Return the same of all experts, [experts, out / LANES, blocks of an output, LANES]; the stack's weight
    keeps it."""
    made: torch.Tensor | None = getattr(stack.weight, "onebase_panels", None)
    if made is None:
        absmax = (plain_absmax(stack.state(number)).float() for number in range(stack.count))
        made = torch.stack([_panels(one.view(stack.size_out, -1)) for one in absmax])
        stack.weight.onebase_panels = made  # type: ignore[attr-defined]
    return made


def _panels(absmax: torch.Tensor) -> torch.Tensor:
    padded = functional.pad(absmax, (0, 0, 0, -len(absmax) % LANES))
    return padded.view(-1, LANES, padded.shape[1]).transpose(1, 2).contiguous()


def _every_number() -> tuple[torch.Tensor, torch.Tensor]:
    """Return every number that bf16 has, infinities and NaNs included, and as many random ones."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return every, torch.randn(len(every), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def _same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(((got == expected) | (got.isnan() & expected.isnan())).all())


def _is_nf4(base: Any) -> bool:
    if not is_nf4(base):
        return False
    blocksize: int = base.weight.quant_state.blocksize
    # bitsandbytes gives other weights where a block lies in two rows.
    return blocksize & (blocksize - 1) == 0 and base.in_features % blocksize == 0


def _is_int8(base: Any) -> bool:
    return isinstance(base, Int8Matrix) and base.dtype == torch.bfloat16


# ---- in which order PyTorch sums ---------------------------------------------------------------


def _ordered(ends: Sequence[int], groups: Sequence[int]) -> _Order:
    order = _Order(blocks=len(ends))
    order.ends[: len(ends)] = list(ends)
    order.group[: len(groups)] = list(groups)
    return order


def _one_block(inner: int, outer: int) -> _Order:
    return _ordered([inner], [0])


def _strands(inner: int, outer: int) -> _Order:
    """Return the order of four sums of every fourth term (MKL on AMD's processors, for few outputs)."""
    return _Order()


def _probed_blocks(inner: int, outer: int) -> _Order | None:
    """Return the order of blocks of consecutive terms, in groups; None if PyTorch's order is more complex.

    Two huge terms that cancel swallow what is added between them: what is left of a sum of ones tells how
    many terms were summed before the two met (FPRev, arXiv 2411.00442).
    """
    x, weight = torch.ones(TILE, inner), torch.ones(outer, inner)

    def met(first: int, second: int) -> int:
        weight[0, first], weight[0, second] = 2.0**60, -(2.0**60)
        left = float(functional.linear(x, weight)[0, 0])
        weight[0, first] = weight[0, second] = 1.0
        return inner - round(left)

    ends: list[int] = []
    groups: list[int] = []
    start = opened = 0
    while start < inner:
        low, high = start + 1, inner  # the block holds at least `low - start` terms, at most `high - start`
        while low < high:
            middle = (low + high + 1) // 2
            if met(start, middle - 1) == middle - start:
                low = middle
            else:
                high = middle - 1
        if not ends:
            groups.append(0)
        elif met(opened, start) == low - opened:
            groups.append(groups[-1])
        else:
            groups.append(groups[-1] + 1)
            opened = start
        ends.append(low)
        if len(ends) > _MOST_BLOCKS:
            return None
        start = low
    return _ordered(ends, groups)
