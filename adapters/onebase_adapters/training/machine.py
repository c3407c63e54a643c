"""How much memory the machine has free."""

from __future__ import annotations

from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device; on the CPU what the system and the container leave."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return min(_system_free(), _container_free())


def _system_free(path: Path = Path("/proc/meminfo")) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 1 << 62
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 1 << 62)


def _container_free(root: Path = Path("/sys/fs/cgroup")) -> int:
    """What the container's limit (cgroup v2) leaves; the page cache counts as free."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        pairs = (line.split() for line in (root / "memory.stat").read_text().splitlines())
        cached = sum(int(value) for name, value in pairs if name in ("active_file", "inactive_file"))
    except (OSError, ValueError):
        return 1 << 62
    return 1 << 62 if limit == "max" else max(int(limit) - max(used - cached, 0), 0)
