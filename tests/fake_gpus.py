"""Several GPUs where there is none: each tensor's storage is noted to lie on one, and computed on the CPU.

What a real GPU refuses is refused: an operator over tensors of two GPUs, or of a GPU and the host; a kernel
of Triton that is launched on another GPU than its tensors'; NumPy over a GPU's memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import modeling_utils

_DEVICE = torch.Tensor.device.__get__  # type: ignore[attr-defined]
_IS_CUDA = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::set_", "aten::_copy_from")


class FakeGpus:
    """`count` GPUs."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.free = [1 << 34] * count
        """Bytes of each."""
        self.current = 0
        self.moved: list[tuple[int, ...]] = []
        """Shapes of what was brought to a GPU, from the host or from another one."""
        self.launched: list[tuple[str, int]] = []
        """Kernels of Triton, and the GPU on which they ran."""
        self._held: dict[int, tuple[StorageWeakRef, int, int, int]] = {}
        """By storage: what tells whether it still is one, its GPU, its address and its end."""

    def place(self, tensor: torch.Tensor) -> int | None:
        """The GPU of a tensor; None for the host's."""
        return self._place(tensor)

    def _place(self, tensor: torch.Tensor) -> int | None:
        with torch._C.DisableTorchFunction():
            if tensor.device.type != "cpu":
                return None
            held = self._held.get(tensor.untyped_storage()._cdata)
        return None if held is None or held[0].expired() else held[1]

    def put(self, tensor: torch.Tensor, gpu: int) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
            start = storage.data_ptr()
            self._held[storage._cdata] = StorageWeakRef(storage), gpu, start, start + storage.nbytes()
        return tensor

    def place_of_address(self, address: int) -> int | None:
        for held, gpu, start, end in self._held.values():
            if start <= address < end and not held.expired():
                return gpu
        return None

    @contextmanager
    def there(self) -> Iterator[FakeGpus]:
        """Computes on them inside."""
        with pytest.MonkeyPatch.context() as patch:
            self._patch_cuda(patch)
            _patch_triton(self, patch)
            with _Operators(self), _Functions(self):
                yield self

    def _patch_cuda(self, patch: pytest.MonkeyPatch) -> None:
        @contextmanager
        def on(device: torch.device) -> Iterator[None]:
            before, self.current = self.current, device.index
            try:
                yield
            finally:
                self.current = before

        patch.setattr(torch.cuda, "current_device", lambda: self.current)
        patch.setattr(torch.cuda, "device", on)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: self.count)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free[device.index], 1 << 40))
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
            patch.setattr(torch.cuda, name, lambda *device: None)
        for name in ("memory_reserved", "max_memory_reserved"):
            patch.setattr(torch.cuda, name, lambda device: 0)
        # What a tensor's device is said to be is said in this thread only.
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
        patch.setattr(modeling_utils, "caching_allocator_warmup", lambda *args: None)


class _Functions(TorchFunctionMode):
    """What Python asks for by a device."""

    def __init__(self, gpus: FakeGpus) -> None:
        super().__init__()
        self._gpus = gpus

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        gpus = self._gpus
        if func in (_DEVICE, _IS_CUDA):
            place = gpus.place(args[0])
            if func is _IS_CUDA:
                return place is not None
            return func(*args) if place is None else torch.device("cuda", place)
        name = getattr(func, "__name__", "")
        if name == "to" and func is torch.Tensor.to:
            return self._to(args[0], args[1:], named)
        if name in ("cpu", "cuda") and func in (torch.Tensor.cpu, torch.Tensor.cuda):
            return self._to(args[0], (name,), {})
        if name == "pin_memory":
            return args[0].clone()
        if name in ("numpy", "__array__") and gpus.place(args[0]) is not None:
            raise TypeError("can't convert a GPU's tensor to numpy: use Tensor.cpu() first")
        named.pop("pin_memory", None)
        target = named.get("device")
        if target is None or torch.device(target).type != "cuda":
            return func(*args, **named)
        named["device"] = "cpu"
        made = func(*args, **named)
        return gpus.put(made, torch.device(target).index or 0)

    def _to(self, tensor: torch.Tensor, args: Any, named: Any) -> torch.Tensor:
        """`Tensor.to`, with its copy."""
        gpus = self._gpus
        rest, target, asked = [], gpus.place(tensor), False
        for one in [*args, named.pop("device", None)]:
            if isinstance(one, torch.Tensor):
                target, asked = gpus.place(one), True
                rest.append(one.dtype)
            elif isinstance(one, str | torch.device):
                device = torch.device(one)
                if device.type == "meta":
                    return torch.Tensor.to(
                        tensor, *args, **named, **({"device": one} if one not in args else {})
                    )
                target, asked = (device.index or 0) if device.type == "cuda" else None, True
            elif one is not None:
                rest.append(one)
        named.pop("non_blocking", None)
        dtype = named.pop("dtype", None) or next((one for one in rest if isinstance(one, torch.dtype)), None)
        dtype = tensor.dtype if dtype is None else dtype
        if not asked or target == gpus.place(tensor):
            return torch.Tensor.to(tensor, dtype=dtype, copy=bool(named.get("copy", False)))
        made = torch.Tensor.to(tensor, dtype=dtype, copy=True)
        if target is None:
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                return torch.Tensor.to(tensor, dtype=dtype, copy=True)
        gpus.moved.append(tuple(tensor.shape))
        return gpus.put(made, target)


class _Operators(TorchDispatchMode):  # type: ignore[misc, no-untyped-call]
    """Where what operators make lies, and whether they may have what they get."""

    def __init__(self, gpus: FakeGpus) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._gpus = gpus

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpus = self._gpus
        with torch._C.DisableTorchFunction():
            given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
            places = {gpus.place(one) for one in given if one.dim() or gpus.place(one) is not None}
            if func._schema.name in ("aten::index", "aten::index_put_"):
                places -= {None}  # a GPU takes indices of the host's
            if len(places) > 1 and not func._schema.name.startswith(_COPIES):
                raise RuntimeError(f"{func} got tensors of {_named(places)}")
            result = func(*args, **(kwargs or {}))
            where = next(iter(places - {None}), None)
            if where is not None and not func._schema.name.startswith("aten::copy_"):
                for one in tree_leaves(result):
                    if isinstance(one, torch.Tensor) and gpus.place(one) is None:
                        gpus.put(one, where)
        return result


def _named(places: set[int | None]) -> str:
    return " and ".join("the host" if one is None else f"GPU {one}" for one in sorted(places, key=str))


def _patch_triton(gpus: FakeGpus, patch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    from onebase_engine.kernels import cuda

    launch: Callable[..., Any] = interpreter.GridExecutor.__call__

    def checked(self: Any, *args: Any, **named: Any) -> Any:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            name = self.fn.__name__
            tensors = [one for one in (*args, *named.values()) if isinstance(one, torch.Tensor)]
            places = {gpus.place(one) for one in tensors if one.numel()}
            layers = dict(zip(inspect.signature(self.fn).parameters, args, strict=False)).get("layers")
            if layers is not None:
                addresses = layers[:, : cuda.SLOTS.value + 1].flatten().tolist()
                places |= {gpus.place_of_address(address) for address in addresses if address}
            if places - {gpus.current}:
                raise RuntimeError(f"{name} on GPU {gpus.current} got tensors of {_named(places)}")
            gpus.launched.append((name, gpus.current))
            return launch(self, *args, **named)

    patch.setattr(interpreter.GridExecutor, "__call__", checked)
