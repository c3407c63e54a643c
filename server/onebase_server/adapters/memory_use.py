"""Where versions are, and what they take there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

Tier = Literal["slot", "host", "disk"]


class PackedAdapterFile(NamedTuple):
    """Where a proven version's tensors can be read, and the SHA-256 of that file."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class MemoryUse:
    """Host memory for versions, in bytes, and what has happened to it since the start."""

    limit: int
    used: int
    versions: int
    pinned: int
    loads: int
    evictions: int
