"""How much memory a run has taken."""

from __future__ import annotations

import contextlib
import errno
import re
import resource
import sys
from pathlib import Path

import torch

_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")
_ONEDNN = re.compile(r"could not (create a (primitive|memory|memory object)|execute a primitive)")
"""All that oneDNN says when it finds no memory. What it does not support is a "primitive descriptor"."""


def peak_memory(device: torch.device) -> int:
    """Most bytes until now: allocated on a GPU, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage's figure where there is this one: a process begins with its parent's.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python says that memory is short."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if not isinstance(error, RuntimeError):
        return False
    said = str(error)
    return any(part in said for part in _NO_MEMORY) or _ONEDNN.fullmatch(said) is not None


def keep_freed_memory() -> None:
    """Tell glibc to use freed memory again instead of giving it back: a run asks for the same sizes again.

    Fresh pages of a large tensor cost as much as computing it does. Elsewhere than on glibc nothing happens.
    """
    import ctypes

    trim_threshold, mmap_threshold = -1, -3
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):
        return
