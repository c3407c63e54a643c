"""Triton's kernels on the CPU, by its interpreter; `tests/conftest.py` asks for it before Triton is imported.

The interpreter keeps bf16 as the integers of its bits. It multiplies these integers, and cuts numbers off
where a GPU rounds them to the nearest: both are mended here.
"""

from __future__ import annotations

import functools
import math
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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default):
            raise RuntimeError(f"{func} while a pass is captured")
        result = func(*args, **named)
        if func._schema.is_mutable:
            self._launches.append(lambda: func(*args, **named))
        elif "empty" not in str(func):
            self._launches.append(lambda: _write_again(result, func(*args, **named)))
        return result

    def of(self, run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        """As `CudaKernels.capture`."""
        launch = interpreter.GridExecutor.__call__

        def told(executor: Any, *args: Any, **named: Any) -> Any:
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
