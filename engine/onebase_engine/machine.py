"""Memory of the machine: total, free and peak bytes, and the errors that report a lack of it; the
interpreter's memory for frames, and what its garbage collector goes through; the priority of processes;
the processor time of threads, and their turns.

torch is imported where it is needed: the api asks for memory too, and loads no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import math
import os
import re
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

_Result = TypeVar("_Result")
_counted = threading.local()
"""Has `seconds`: see count_seconds."""

NO_LIMIT = 1 << 62
"""Number of bytes that stands for no known limit."""

_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")
_ONEDNN = re.compile(r"could not (create a (primitive|memory|memory object)|execute a primitive)")
"""Pattern of oneDNN's out-of-memory errors. Unsupported cases name a "primitive descriptor"."""
_NOT_MAPPED = ("failed to map segment from shared object", "cannot map zero-fill pages")
"""Ends of glibc's messages for a library that got no memory. Where it was another reason, that follows."""
_NO_CPU_MEMORY = ("can't allocate memory", "Cannot allocate memory", "bad_alloc")
"""Parts of the messages of C++ libraries for memory that the system, not a GPU, refused."""


PROVING = 10
"""Niceness of the one process for which each upload and activation waits: it gets a tenth of a core that the
engine wants as well."""
BESIDE_SERVING = 15
"""Niceness of another process for whose result a request waits: a thirtieth of such a core, since there may
be several."""
BEHIND_SERVING = 19
"""Niceness of a process for whose result nobody waits: a seventieth of such a core."""
_STEP_OF_NICENESS = 1.25
"""Ratio of the times that Linux gives to two processes that want one core, one step of niceness apart."""


SWITCH_SECONDS = 0.0002
"""Time, in seconds, for which a thread that computes in Python keeps others waiting for their turn."""


def freeze_loaded() -> None:
    """Leave all that is loaded by now out of later garbage collections. Each full one would go through it,
    for a tenth of a second in which nothing else runs, whenever requests have made enough objects."""
    gc.collect()
    gc.freeze()


def switch_threads_soon() -> None:
    """Let threads take turns often, for the sake of one that others wait for. It waits for its turn whenever
    it has called what does not need the interpreter: an event loop each time that it has looked for what has
    arrived, an engine after each of a step's calls of the kernels."""
    sys.setswitchinterval(SWITCH_SECONDS)


def count_seconds(seconds: float) -> None:
    """Add processor time of another process, which computes for this thread, to `thread_seconds`."""
    _counted.seconds = getattr(_counted, "seconds", 0.0) + seconds


def thread_seconds() -> float:
    """Return the processor time that this thread has taken, and other processes for it, in seconds."""
    counted: float = getattr(_counted, "seconds", 0.0)
    return time.thread_time() + counted


def niceness_for(share: float) -> int:
    """Return the niceness with which a process gets `share` (0 to 1) of a core that the engine wants as well.

    It is 0, with which each of the two gets a half, for a larger share too.
    """
    if share <= 0.0:
        return BEHIND_SERVING
    others = max(1.0 - share, 0.5) / min(share, 0.5)
    return min(round(math.log(others, _STEP_OF_NICENESS)), BEHIND_SERVING)


def step_aside(pid: int, niceness: int) -> None:
    """Make a process leave the processor to others, and be the first to be killed when memory is short.

    Called by who started it, before it has threads and has imported anything. It must be in the session of
    the engine: between sessions, Linux shares the processor evenly whatever the niceness (`sched(7)`, "The
    autogroup feature").
    """
    with contextlib.suppress(OSError):  # it may have ended
        os.setpriority(os.PRIO_PROCESS, pid, min(19, os.getpriority(os.PRIO_PROCESS, 0) + niceness))
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def step_aside_in_thread() -> None:
    """Let the engine go before this thread, and before those that it starts."""
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        os.setpriority(os.PRIO_PROCESS, 0, min(19, usual + BESIDE_SERVING))  # Linux: of the thread that calls


def total_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of the machine's memory, or of the container's if that is less."""
    return min(_meminfo("MemTotal", proc), _container_limit(cgroup))


def free_memory(device: torch.device) -> int:
    """Return the free bytes of the device; on the CPU, of both the system and the container."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return free_host_memory()


def free_host_memory() -> int:
    """Return the bytes of host memory that both the system and the container leave free."""
    return min(_meminfo("MemAvailable"), container_free())


def container_free(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that the container may still take (cgroup v2); NO_LIMIT if there is no limit.

    The page cache counts as free: having read the base's files, it may fill the container to its limit.
    """
    limit = _container_limit(root)
    try:
        used = int((root / "memory.current").read_text())
        pairs = (line.split() for line in (root / "memory.stat").read_text().splitlines())
        cached = sum(int(value) for name, value in pairs if name in ("active_file", "inactive_file"))
    except (OSError, ValueError):
        return NO_LIMIT
    return NO_LIMIT if limit == NO_LIMIT else max(limit - max(used - cached, 0), 0)


def _container_limit(root: Path) -> int:
    try:
        text = (root / "memory.max").read_text().strip()
    except OSError:
        return NO_LIMIT
    return int(text) if text.isdigit() else NO_LIMIT


def _meminfo(field: str, proc: Path = Path("/proc")) -> int:
    """Return the bytes in a line of /proc/meminfo, or NO_LIMIT if there is none."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return NO_LIMIT
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), NO_LIMIT)


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes so far: allocated on a GPU, else of the process's resident set."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    # Not getrusage's figure where there is this one: a process begins with its parent's.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error of torch or Python says that memory is short."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if not isinstance(error, RuntimeError):
        return False
    said = str(error)
    return any(part in said for part in _NO_MEMORY) or _ONEDNN.fullmatch(said) is not None


def explain_refusal(error: BaseException) -> str | None:
    """Return a sentence for an error that comes from memory or a thread that the system refused, with the
    remedy; None for any other error, a GPU's lack of memory among them."""
    refused = find_refusal(error)
    return None if refused is None else describe_refusal(refused)


def find_refusal(error: BaseException | None, above: frozenset[int] = frozenset()) -> BaseException | None:
    """Return the error by which the system refused memory or a thread: this one, its cause, or the first of
    a group in which all are such. What was only being handled when an error was raised is no cause.

    above: ids of the errors that this one is the cause of, since causes may form a circle.
    """
    if error is None or id(error) in above:
        return None
    if _is_refusal(error):
        return error
    above |= {id(error)}
    if isinstance(error, BaseExceptionGroup):
        found = [find_refusal(one, above) for one in error.exceptions]
        if None not in found:
            return found[0]
    return find_refusal(error.__cause__, above)


def describe_refusal(refused: BaseException) -> str:
    """Return a sentence that says what the system refused, with the remedy."""
    return (
        f"the system refuses more memory or threads ({str(refused) or type(refused).__name__}): end other "
        "programs, or raise what limits memory (ulimit -v and -d, vm.overcommit_memory where it is 2) or "
        "threads and processes (ulimit -u, TasksMax= of the service, --pids-limit of the container)"
    )


def _is_refusal(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if isinstance(error, ImportError | OSError):  # of Python's own modules, or of ctypes
        said = str(error)
        return said.endswith(_NOT_MAPPED) or "Cannot allocate memory" in said
    # A GPU's lack of memory, and this project's errors, which may quote such a message, are of subclasses.
    if type(error) is not RuntimeError:
        return False
    said = str(error)
    return said == "can't start new thread" or any(part in said for part in _NO_CPU_MEMORY)


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of returning it, since steps request the same sizes again.

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


def return_freed_memory() -> None:
    """Return freed memory to the system; glibc would keep it for later allocations."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def release_mapped_files(suffix: str) -> None:
    """Let go of the pages of mapped files whose names end in `suffix`; what is read again comes from disk.

    They could be reclaimed at any time, but count as resident until then. Pages that were written stay.
    """
    libc, pageout = ctypes.CDLL(None), 21  # MADV_PAGEOUT, for which older Pythons have no name
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
            if line.endswith(suffix):
                start, end = (int(one, 16) for one in line.partition(" ")[0].split("-"))
                # A kernel that does not know it reclaims them when it needs to.
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), pageout)


def with_room(program: Callable[[], _Result]) -> _Result:
    """Run `program` on a frame so large that those above it share its piece of memory.

    CPython keeps frames in pieces of 16 KB, some 30 to 130 of them. Where a loop's calls are the first in a
    new piece, each takes it from the system and gives it back, which takes 7 microseconds.
    """
    return program()


with_room.__code__ = with_room.__code__.replace(co_stacksize=65_000)
