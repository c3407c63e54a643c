"""Keeps a trainer out of serving's way: last for the processors, first to go when memory runs out."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

import torch

from onebase_engine.machine import free_memory

NICENESS = 19
_PARALLEL = 1 << 20
"""Elements of an operation that takes all threads."""


def step_aside() -> None:
    """Leave the processor to whoever else wants it, and be the first to be killed when memory is short.

    SCHED_IDLE spared serving no more than this in measurements, and could leave a job without any time.
    """
    os.nice(NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def memory_limit(asked: int, device: torch.device) -> int:
    """Bytes that a job may take beside the base: what was asked for, else half of what is free."""
    return asked or free_memory(device) // 2


def bound_memory(limit: int, device: torch.device) -> None:
    """From now on this process may take `limit` bytes more; beyond that allocations fail, here alone.

    On the CPU by RLIMIT_DATA, which counts private writable memory, mapped or not from a file: the base is
    counted already when this is called.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
        return
    torch.ones(_PARALLEL).add_(1.0)  # the threads' stacks are not what a job takes
    most = private_bytes() + limit
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def private_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Private writable memory of this process, as RLIMIT_DATA counts it."""
    for line in status.read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0
