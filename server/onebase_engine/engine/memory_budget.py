"""How much of the free memory the KV cache and the slots take."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from onebase_engine import machine
from onebase_engine.base.layers import LayerShape
from onebase_engine.engine.kv_cache import RESERVED_BLOCKS

CPU_SHARE = 0.5
"""Part of the free memory that the KV cache may take on the CPU, where everything else lives as well."""
CUDA_SHARE = 0.9
"""On CUDA the rest is for activations and the allocator's fragments."""


class MemoryBudgetError(Exception):
    """The KV cache has no room; the message says which setting to change."""


def kv_memory_available(device: torch.device) -> int:
    """Bytes that the KV cache may take on `device`, before `train_memory` is set aside.

    Raises MemoryBudgetError where the system does not say.
    """
    free = machine.free_memory(device)
    if free == machine.NO_LIMIT:
        raise MemoryBudgetError("/proc/meminfo does not say what is available; set --kv-memory")
    return int(free * (CUDA_SHARE if device.type == "cuda" else CPU_SHARE))


def kv_block_count(block_bytes: int, most: int, free: int, *, kv_memory: int, train_memory: int) -> int:
    """Blocks for the KV cache: what `kv_memory` says, else what is free less `train_memory`, at most `most`.

    Args:
        block_bytes: bytes of one block over all layers.
        most: blocks beyond which none could be used by running rows.
        free: bytes that may be taken.

    Raises:
        MemoryBudgetError: fewer than one usable block fits.
    """
    budget = kv_memory or free - train_memory
    count = budget // block_bytes if kv_memory else min(budget // block_bytes, most)
    if count <= RESERVED_BLOCKS:
        raise MemoryBudgetError(
            f"no memory for the KV cache: {max(budget, 0) / 1e6:.0f} MB available, a block takes "
            f"{block_bytes / 1e6:.2f} MB; lower --train-memory or --slot-memory, "
            "choose a smaller base or set --kv-memory"
        )
    return int(count)


def slot_bytes(layers: Iterable[LayerShape], slots: int, rank: int) -> int:
    """Most bytes of `slots` adapters of `rank`, fp32."""
    ends = sum(layer.size_in + layer.size_out for layer in layers if layer.kind != "norm")
    return ends * rank * slots * 4


def staging_bytes(slot_memory: int) -> int:
    """Bytes for versions that are being copied to the accelerator, besides those in slots; 0 is no limit."""
    return slot_memory // 4
