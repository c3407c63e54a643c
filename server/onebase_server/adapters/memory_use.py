"""Where versions are, and what they take there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onebase_adapters.registry import VersionRecord
from onebase_adapters.store.content import Blob

Tier = Literal["slot", "host", "disk"]


@dataclass(frozen=True)
class PackedAdapterFile:
    """The file with a proven version's tensors. `versions`: those that have it, as they were seen then."""

    blob: Blob
    versions: tuple[VersionRecord, ...]


@dataclass(frozen=True)
class MemoryUse:
    """Host memory for versions, in bytes, and what has happened to it since the start."""

    limit: int
    used: int
    versions: int
    pinned: int
    loads: int
    evictions: int
