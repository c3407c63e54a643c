"""Load of the machine that the server runs on: processor, memory, and the GPU where there is one.

Read from /proc and the control group of version 2, and from NVIDIA's management library (NVML), which comes
with the driver and opens no CUDA context. What cannot be read is None, and `missing` says why.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PROC = Path("/proc")
_GROUP = Path("/sys/fs/cgroup")
_NVML = "libnvidia-ml.so.1"
_NAME_BYTES = 96
_TICK_FIELDS = 8
"""Fields of a line of /proc/stat that add up to the whole time; later ones are counted in the first two."""


@dataclass(frozen=True)
class MachineReading:
    """State of the machine at one moment."""

    at: float
    """Time of the reading on the monotonic clock, in seconds."""
    cpu_busy: float | None = None
    """Processor time that was used since some moment, in any unit; `cpu_whole` is in the same one."""
    cpu_whole: float | None = None
    """Processor time that there was since that moment, over all cores."""
    memory_used: int | None = None
    """Bytes."""
    gpu: float | None = None
    """Part of the last moments in which the GPU computed, 0 to 1."""
    gpu_memory_used: int | None = None
    """Bytes, of all processes together."""


class Gpu:
    """One GPU as NVML knows it. Raises OSError if there is none, or no driver."""

    class _Utilization(ctypes.Structure):
        _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))

    class _Memory(ctypes.Structure):
        _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))

    def __init__(
        self,
        load: Callable[[str], Any] = ctypes.CDLL,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        """load: opens the library. environment: its CUDA_VISIBLE_DEVICES names the GPU, else it is the
        first."""
        try:
            self._nvml = load(_NVML)
        except OSError as error:
            raise OSError(f"NVIDIA's driver library {_NVML} is not installed") from error
        self._check("nvmlInit_v2", self._nvml.nvmlInit_v2())
        self._device = ctypes.c_void_p()
        first = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        if not first or first.startswith("-"):
            raise OSError("CUDA_VISIBLE_DEVICES names no GPU")
        by_index, by_name = self._nvml.nvmlDeviceGetHandleByIndex_v2, self._nvml.nvmlDeviceGetHandleByUUID
        found = (
            by_index(ctypes.c_uint(int(first)), ctypes.byref(self._device))
            if first.isdigit()
            else by_name(first.encode(), ctypes.byref(self._device))
        )
        self._check("finding the GPU", found)
        name = ctypes.create_string_buffer(_NAME_BYTES)
        known = self._nvml.nvmlDeviceGetName(self._device, name, ctypes.c_uint(_NAME_BYTES)) == 0
        self.name = name.value.decode(errors="replace") if known else "GPU"
        memory = self._memory()
        self.memory_total = None if memory is None else int(memory.total)

    def utilization(self) -> float | None:
        """Return the part of the last moments in which it computed, 0 to 1; None where NVML does not say."""
        found = self._Utilization()
        status = self._nvml.nvmlDeviceGetUtilizationRates(self._device, ctypes.byref(found))
        return None if status else found.gpu / 100

    def memory_used(self) -> int | None:
        """Return the bytes that all processes use; None where NVML does not say."""
        memory = self._memory()
        return None if memory is None else int(memory.used)

    def _memory(self) -> _Memory | None:
        found = self._Memory()
        return None if self._nvml.nvmlDeviceGetMemoryInfo(self._device, ctypes.byref(found)) else found

    @staticmethod
    def _check(what: str, status: int) -> None:
        if status:
            raise OSError(f"NVML: {what} failed with status {status}")


@dataclass
class MachineReader:
    """Reader of the machine, for any one thread at a time. wants_gpu: whether the base may be on a GPU."""

    wants_gpu: bool = True
    proc: Path = _PROC
    group: Path = _GROUP
    open_gpu: Callable[[], Gpu] = Gpu
    cores: float | None = None
    """Cores that the server may use, of which a container may have a part."""
    memory_total: int | None = None
    """Bytes that it may use."""
    missing: dict[str, str] = field(default_factory=dict)
    """Reasons by what cannot be read: `cpu`, `memory`, `gpu`."""
    gpu: Gpu | None = None
    _quota: float | None = None
    _is_open: bool = False

    def read(self) -> MachineReading:
        """Return the state now. It takes well under a millisecond, and a few more where there is a GPU."""
        if not self._is_open:
            self._open()
            self._is_open = True
        busy, whole = self._processor()
        return MachineReading(
            at=time.monotonic(),
            cpu_busy=busy,
            cpu_whole=whole,
            memory_used=self._memory_used(),
            gpu=None if self.gpu is None else self.gpu.utilization(),
            gpu_memory_used=None if self.gpu is None else self.gpu.memory_used(),
        )

    def _open(self) -> None:
        try:
            quota, period = (self.group / "cpu.max").read_text().split()
            self._quota = None if quota == "max" else int(quota) / int(period)
        except (OSError, ValueError):
            self._quota = None
        self.cores = self._quota or float(os.cpu_count() or 1)
        if self._processor()[0] is None:
            self.cores = None
            self.missing["cpu"] = f"{self.proc / 'stat'} cannot be read on this system"
        total, limit = self._machine_memory().get("MemTotal"), _number(self.group / "memory.max")
        self.memory_total = min(total, limit) if total and limit else total
        if total is None:
            self.missing["memory"] = f"{self.proc / 'meminfo'} cannot be read on this system"
        if not self.wants_gpu:
            self.missing["gpu"] = "the base is on the processor (--device cpu)"
            return
        try:
            self.gpu = self.open_gpu()
        except (OSError, AttributeError) as error:
            self.missing["gpu"] = str(error)

    def _processor(self) -> tuple[float | None, float | None]:
        """Return the processor time that was used and that there was, since some moment."""
        if self._quota is not None:
            used = _table(self.group / "cpu.stat").get("usage_usec")
            return (None, None) if used is None else (used / 1e6, time.monotonic() * self._quota)
        try:
            line = (self.proc / "stat").read_text().partition("\n")[0]
            ticks = [int(field) for field in line.split()[1 : 1 + _TICK_FIELDS]]
            return float(sum(ticks) - ticks[3] - ticks[4]), float(sum(ticks))
        except (OSError, ValueError, IndexError):
            return None, None

    def _memory_used(self) -> int | None:
        """Return the bytes in use that cannot simply be dropped: those of files that were read do not
        count."""
        limit = _number(self.group / "memory.max")
        if limit is not None and limit == self.memory_total:
            used = _number(self.group / "memory.current")
            dropped = _table(self.group / "memory.stat").get("inactive_file", 0)
            return None if used is None else max(0, used - dropped)
        memory = self._machine_memory()
        if "MemTotal" not in memory or "MemAvailable" not in memory:
            return None
        return memory["MemTotal"] - memory["MemAvailable"]

    def _machine_memory(self) -> dict[str, int]:
        """Return the lines of /proc/meminfo, in bytes."""
        return {name: value * 1024 for name, value in _table(self.proc / "meminfo").items()}


def _table(path: Path) -> dict[str, int]:
    """Return the lines `name value` or `name: value unit` of a file; none if it cannot be read."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
        return {line[0].rstrip(":"): int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
    except OSError:
        return {}


def _number(path: Path) -> int | None:
    """Return the number in a file; None if it has none, as `max`."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
