"""Triton's kernels on the CPU, by its interpreter; `tests/conftest.py` asks for it before Triton is imported.

The interpreter keeps bf16 as the integers of its bits. It multiplies these integers, and cuts numbers off
where a GPU rounds them to the nearest: both are mended here. It has no PTX, which is run here.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

_plain_convert = interpreter._convert_float


def _convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    if (source, target) == (tl.bfloat16, tl.float32):
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if (source, target) != (tl.float32, tl.bfloat16):
        return _plain_convert(data, source, target, rounding)
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)


def _dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
    """In fp64, rounded once: a product by BLAS may sum a row otherwise at another place of its tile."""
    wide = (
        _convert(one.data, tl.bfloat16, tl.float32, None) if one.dtype.scalar == tl.bfloat16 else one.data
        for one in (a, b)
    )
    product = np.matmul(*wide, dtype=np.float64).astype(d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


_patch_lang = interpreter._patch_lang
_patched: set[str] = set()


def _patch_once(kernel: Any) -> Any:
    """Triton's functions are replaced for good: done anew at each call, it takes a third of the time."""
    if kernel.__module__ not in _patched:
        _patch_lang(kernel)
        _patched.add(kernel.__module__)
    return interpreter._LangPatchScope()


_plain_dtype_of = interpreter._get_np_dtype
_dtypes: dict[str, Any] = {}


def _dtype_of(type: Any) -> Any:
    if type.name not in _dtypes:
        _dtypes[type.name] = _plain_dtype_of(type)
    return _dtypes[type.name]


@functools.cache
def _shape_of(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    """As Triton does, but for a shape and a number of elements of its own for each of millions of tensors."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shape_of(type.shape if type.is_block() else ())


def _bytes_picked(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """As PTX's prmt without a mode: each byte is the one of eight that four bits of the selector name."""
    eight = np.stack([(word >> np.uint32(8 * n)) & np.uint32(255) for word in (a, b) for n in range(4)], -1)
    result = np.zeros_like(a)
    for n in range(4):
        number = (selector >> np.uint32(4 * n)) & np.uint32(15)
        picked = np.take_along_axis(eight, (number & 7)[..., None].astype(np.int64), -1)[..., 0]
        sign = np.where(picked & np.uint32(128), np.uint32(255), np.uint32(0))
        result |= np.where(number & np.uint32(8), sign, picked) << np.uint32(8 * n)
    return result


def _ptx(
    asm: Any, constraints: Any, args: list[Any], dtype: tuple[Any, ...], is_pure: bool, pack: int
) -> Any:
    """Run the few instructions of PTX that the kernels have, on all elements."""
    assert pack == 1
    given = np.broadcast_arrays(*(one.handle.data for one in args))
    known = {
        f"${len(dtype) + number}": one.view(np.uint32) if one.dtype == np.float32 else one.astype(np.uint32)
        for number, one in enumerate(map(np.ascontiguousarray, given))
    }

    def value(name: str) -> np.ndarray:
        return known[name] if name in known else np.full(given[0].shape, int(name, 0), dtype=np.uint32)

    for line in asm.value.strip("{}\n ").splitlines():
        name, _, rest = line.rstrip(";").partition(" ")
        if name == ".reg":
            continue
        if name == "mov.b32":
            (low, high), word = rest[1:].partition("}")[0].split(", "), value(rest.rpartition(", ")[2])
            known[low], known[high] = word & np.uint32(0xFFFF), word >> np.uint32(16)
            continue
        to, *names = rest.split(", ")
        first, second, *more = map(value, names)
        if name == "cvt.rn.bf16x2.f32":
            high, low = (
                _convert(one.view(np.float32), tl.float32, tl.bfloat16, None).astype(np.uint32)
                for one in (first, second)
            )
            known[to] = high << np.uint32(16) | low
        elif name == "prmt.b32":
            known[to] = _bytes_picked(first, second, *more)
        else:
            operation = {"and.b32": np.bitwise_and, "or.b32": np.bitwise_or, "shr.u32": np.right_shift}[name]
            known[to] = operation(first, second)

    def made(number: int, kind: Any) -> Any:
        data = known[f"${number}"]
        data = data.astype(np.uint16) if kind == tl.bfloat16 else data.view(np.int32)
        return tl.tensor(interpreter.TensorHandle(data, kind), tl.block_type(kind, list(data.shape)))

    return tuple(made(number, kind) for number, kind in enumerate(dtype))


tl.inline_asm_elementwise = _ptx
interpreter._convert_float = _convert
interpreter._get_np_dtype = _dtype_of
tl.tensor.__init__ = _init_tensor
interpreter.InterpreterBuilder.create_dot = _dot
interpreter._patch_lang = _patch_once
# Each sum of integers would be made again in 64 bits, a fifth of the time; none here comes near its end.
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def constant(value: int) -> Any:
    """For a constant of a module of kernels."""
    return tl.constexpr(value)


def tell(monkeypatch: pytest.MonkeyPatch, listen: Callable[[str], None]) -> None:
    """Have `listen` called with the name of each kernel that is launched."""
    launch = interpreter.GridExecutor.__call__

    def told(self: Any, *args: Any, **named: Any) -> Any:
        listen(self.fn.__name__)
        with _disable_current_modes():  # the interpreter's own operators are none of a GPU's
            return launch(self, *args, **named)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", told)


class Capture(TorchDispatchMode):  # type: ignore[misc, no-untyped-call]
    """What a graph of CUDA does, on the CPU: a pass's launches are noted, and made again on the same memory.

    Raises:
        RuntimeError: the host reads what a device would hold, or sends it something.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._launches: list[Callable[[], None]] = []
        self.nodes: Counter[str] = Counter()
        """Launches of the last capture: `kernel` of Triton, `operator` of PyTorch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default):
            raise RuntimeError(f"{func} while a pass is captured")
        result = func(*args, **named)
        self.nodes["operator"] += not func.is_view and "empty" not in str(func)
        if func._schema.is_mutable:
            self._launches.append(lambda: func(*args, **named))
        elif "empty" not in str(func):
            self._launches.append(lambda: _write_again(result, func(*args, **named)))
        return result

    def of(self, run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        """As `CudaKernels.capture`."""
        launch = interpreter.GridExecutor.__call__
        self._launches, self.nodes = [], Counter()  # not those of a capture that failed

        def told(executor: Any, *args: Any, **named: Any) -> Any:
            self.nodes["kernel"] += 1
            with _disable_current_modes():
                self._launches.append(lambda: launch(executor, *args, **named))
                return launch(executor, *args, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interpreter.GridExecutor, "__call__", told)
            with self:
                outputs = run()
        launches, self._launches = tuple(self._launches), []

        def replay() -> None:
            with torch.inference_mode():
                for one in launches:
                    one()

        return replay, outputs


def _write_again(there: Any, new: Any) -> None:
    own, made = (one if isinstance(one, tuple | list) else (one,) for one in (there, new))
    for place, tensor in zip(own, made, strict=True):
        if isinstance(place, torch.Tensor) and place.data_ptr() != tensor.data_ptr():  # views stay
            place.copy_(tensor)
