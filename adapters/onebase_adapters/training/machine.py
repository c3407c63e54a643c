"""The machine that an estimate is for: how much memory it has free, and how fast it multiplies."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from onebase_engine.machine import free_memory

GIB = 1 << 30

GPUS: dict[str, tuple[float, int]] = {
    "t4": (65, 15),
    "l4": (121, 22),
    "a10": (125, 22),
    "l40s": (362, 44),
    "rtx3090": (71, 23),
    "rtx4090": (165, 23),
    "rtx5090": (209, 31),
    "a100-40": (312, 39),
    "a100-80": (312, 79),
    "h100": (989, 79),
    "h200": (989, 139),
    "b200": (2250, 178),
}
"""By name: dense half-precision TFLOP/s of the data sheet, usable memory in GiB."""

_GPU_SHARE = 0.3
"""Part of a data sheet's rate that a training step on 4-bit weights reaches."""
_PROBE_SECONDS = 0.3
_PROBE = (256, 576, 1536, 16)
"""Tokens, inputs, outputs and rank of the layer that is timed."""
_STEP_SHARE = 0.35
"""Part of one layer's rate that a whole step has: attention, norms and unpacking count no FLOPs here.

Measured on the CPU with the default base: 0.2 to 0.6, on a machine that others used too.
"""


class UnknownMachineError(ValueError):
    """The GPU is not in the table."""


@dataclass(frozen=True)
class Machine:
    """memory: bytes that a run may take. rate: FLOP/s of products. how: where the rate comes from."""

    name: str
    kind: str
    memory: int
    rate: float
    how: str


def this_machine(device: torch.device, dtype: torch.dtype, memory: int | None = None) -> Machine:
    """The machine of this process. Takes less than a second, to measure a product.

    Args:
        memory: bytes that a run may take; what is free if None.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this processor"
    free = free_memory(device) if memory is None else memory
    return Machine(name, device.type, free, measured_rate(device, dtype), "measured on this machine")


def known_gpu(name: str, memory: int | None = None) -> Machine:
    """A GPU of the table; this machine need not have it. Raises UnknownMachineError."""
    if name.lower() not in GPUS:
        raise UnknownMachineError(f"GPU {name!r} is not in the table; there are {', '.join(GPUS)}")
    tflops, gib = GPUS[name.lower()]
    how = f"{_GPU_SHARE:.0%} of its data sheet's {tflops:g} TFLOP/s"
    return Machine(name.lower(), "cuda", memory or gib * GIB, tflops * 1e12 * _GPU_SHARE, how)


def measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of training: of one layer with an adapter, forwards and backwards, and what a whole step loses.

    Takes less than a second on any processor. The base's weights are plain: unpacking is in the loss.
    """
    layer = _Layer(device, dtype)
    layer.pass_both_ways()  # the first one loads the kernels
    spent, best, count = 0.0, float("inf"), 0
    while count < 3 or (spent < _PROBE_SECONDS and count < 50):
        started = time.perf_counter()
        layer.pass_both_ways()
        seconds = max(time.perf_counter() - started, 1e-9)
        spent, best, count = spent + seconds, min(best, seconds), count + 1
    return layer.flops / best * _STEP_SHARE


class _Layer:
    """A frozen product and an adapter in fp32, of the size that `_PROBE` gives."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        rows, size_in, size_out, rank = _PROBE
        self._x = torch.ones(rows, size_in, dtype=dtype, device=device, requires_grad=True)
        self._weight = torch.ones(size_in, size_out, dtype=dtype, device=device)
        self._a = torch.ones(size_in, rank, device=device, requires_grad=True)
        self._b = torch.ones(rank, size_out, device=device, requires_grad=True)
        self._gradient = torch.ones(rows, size_out, dtype=dtype, device=device)
        self.flops = 2 * rows * (2 * size_in * size_out + 3 * rank * (size_in + size_out))

    def pass_both_ways(self) -> None:
        y = self._x @ self._weight + (self._x.float() @ self._a @ self._b).to(self._x.dtype)
        torch.autograd.grad(y, [self._x, self._a, self._b], self._gradient)
        if y.is_cuda:
            torch.cuda.synchronize(y.device)
