"""Memory of a training job on a GPU: the KV cache leaves it free, and the job may take no more."""

from __future__ import annotations

from typing import Any

import torch

from onebase_engine.base.load import longest_row
from onebase_engine.engine.messages import EngineConfig
from onebase_training.estimate import estimate
from onebase_training.recipe import Recipe

ROW = 1024
"""Tokens of the longest row for which memory is left free, unless --train-memory says how much is."""
ROOM = 1.2
"""Factor for what no estimate covers, and for a recipe that takes a little more."""


def job_bytes(base: Any, config: EngineConfig) -> int:
    """Return the bytes of a job of the default recipe next to a resident base, from transformers' config of
    it."""
    found = estimate(
        base,
        Recipe(),
        quantization=config.quantization,
        dtype=getattr(torch, config.dtype),
        device="cuda",
        longest_row=min(ROW, config.max_length or longest_row(base) or ROW),
        memory_limit=1,  # so that it plans with as little as it can
        base_resident=True,
    )
    return int(found.total * ROOM)
