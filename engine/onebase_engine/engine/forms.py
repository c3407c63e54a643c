"""Kernels and captured passes that steps will ask for, made before the first request.

Triton compiles a form of a kernel when a launch first asks for it, in the stepping thread: a second in which
every sequence waits. Which forms a base needs is known once it is loaded: a few passes ask for all of them.
They are compiled side by side. A pass of a size is captured when it occurs a second time, which takes some
tenths of a second too. Not run on a GPU.
"""

from __future__ import annotations

import logging
import os
import time
from array import array
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from onebase_engine.base.layers import LayerShape
from onebase_engine.engine.batch import Packer, StepBatch
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.kv_cache import RESERVED_BLOCKS
from onebase_engine.engine.memory_budget import thin_adapter
from onebase_engine.engine.messages import AdapterRef, Sampling, Submit
from onebase_engine.engine.model import ServedModel
from onebase_engine.engine.scheduler import NeverFitsError, SchedulerLimits
from onebase_engine.engine.sequence import AdapterMix, Segment, SequenceState, StepPlan
from onebase_engine.kernels.interface import Draws

if TYPE_CHECKING:
    from onebase_engine.kernels.cuda import Form

logger = logging.getLogger(__name__)

_ANY = "any"
_RANK = 16
"""Rank of the adapter of these passes. No form depends on it."""
CAPTURED_LENGTHS = 4
"""Number of lengths of contexts with which passes are captured at the start: up to 256, 1,024, 4,096 and
16,384 tokens."""

CAPTURED_ROWS = 64
"""Largest number of rows with which passes behind a context are captured at the start."""


def compile_kernels(engine: Engine) -> None:
    """Compile all forms of kernels that steps will ask for; from then on, log each one that is compiled."""
    if not engine.model.kernels.compiles:
        return
    from onebase_engine.kernels import cuda

    began = time.monotonic()
    try:
        wanted = wanted_forms(engine.model, engine.layers, engine.scheduler.limits, engine.pool.block_size)
        cuda.compile_forms(wanted, engine.model.device, threads=os.cpu_count() or 1)
    except torch.AcceleratorError:
        raise
    except Exception as error:
        # Whatever another Triton's hooks or its compiler may raise: a launch compiles what it needs.
        logger.warning(
            "kernels: they are compiled while sequences run, since not all could be before: %s",
            error,
            exc_info=True,
        )
        return
    logger.info("kernels: %d forms compiled in %.1f s", len(wanted), time.monotonic() - began)
    cuda.warn_of_compiles()


def wanted_forms(
    model: ServedModel, layers: Mapping[str, LayerShape], limits: SchedulerLimits, block_size: int
) -> list[Form]:
    """Return the forms that steps will ask for and that are not compiled yet. Nothing is computed."""
    from onebase_engine.kernels import cuda

    with cuda.collecting() as forms:
        adapter = thin_adapter(layers, _RANK)
        for error in model.move_slots({0: _ANY}, lambda digest: adapter).values():
            raise error
        try:
            for batch in _batches(model, limits, block_size):
                model.launch(batch)
            logits = torch.zeros(1, model.vocabulary, device=model.device)
            ones, none = np.ones(1, dtype=np.float32), np.zeros(1)
            draws = Draws(ones, none.astype(np.int64), ones, none.astype(np.float32), none)
            model.kernels.draw([logits[0]], draws, [None])
        finally:
            model.move_slots({0: None}, lambda digest: {})
    return forms


def _batches(model: ServedModel, limits: SchedulerLimits, block_size: int) -> Iterator[StepBatch]:
    """Yield decodes of each number of rows from which on other forms are used, with an adapter, and in a long
    context."""
    from onebase_engine.kernels import cuda

    packer = Packer(block_size, model.row_multiple, model.groups, recurrent=model.state_bytes > 0)
    acting, bare = AdapterMix(((_ANY, 1.0),)), AdapterMix()

    def decodes(rows: int, length: int, mix: AdapterMix) -> StepBatch:
        one = SequenceState("forms", 0, [0] * length, Sampling(), mix, arrival=0, arrived_at=0.0)
        one.blocks = [array("i", [RESERVED_BLOCKS]) * -(-length // block_size)] * len(model.groups)
        plan = StepPlan([Segment(one, length - 1, length) for _ in range(rows)], [])
        return packer.pack(plan, {_ANY: 0})

    for rows in cuda.FORM_ROWS:
        if rows <= max(limits.step_tokens, 1):
            yield decodes(rows, 2, bare)
    yield decodes(1, 2, acting)
    if limits.max_length > cuda.SPLIT.value:
        yield decodes(1, cuda.SPLIT.value + 1, bare)


def capture_steps(engine: Engine) -> None:
    """Compute passes over each number of rows, with an adapter and without, until they are captured.

    The rows are the ends of prompts, behind contexts of each length for which there is another graph, up to
    CAPTURED_LENGTHS of them. Where memory does not suffice for all, it does for the shorter contexts.
    """
    if not engine.model.captures:
        return
    from onebase_engine.engine import graphs
    from onebase_engine.kernels import cuda

    mixes: list[list[AdapterRef]] = [[]]
    try:
        engine.put_adapter(_ANY, engine.model.kept(thin_adapter(engine.layers, _RANK)))
        mixes.insert(0, [AdapterRef(_ANY)])
    except NeverFitsError as error:
        logger.info("kernels: passes with an adapter are captured while sequences run: %s", error)
    block, began = engine.pool.block_size, time.monotonic()
    lengths = [cuda.SPLIT.value * graphs.SPLITS_FACTOR**number for number in range(CAPTURED_LENGTHS - 1)]
    for context in (0, *(-(-length // block) * block for length in lengths)):
        counts = [
            count
            for count in graphs.ROWS
            if count <= engine.scheduler.limits.step_tokens
            and context + count < engine.longest
            and (not context or count <= CAPTURED_ROWS)
        ]
        if not counts or not engine.model.captures:
            break
        for adapters in mixes:
            if context:
                _compute(engine, [0] * (context + 1), adapters)  # from now on a cached prefix
            # Other tokens each time, of which no block is cached.
            for number, count in enumerate(counts):
                for token in (2 * number + 1, 2 * number + 2):
                    if engine.model.captures:
                        _compute(engine, [0] * context + [token] * count, adapters)
        logger.info(
            "kernels: passes behind %d tokens are captured, %.1f s so far", context, time.monotonic() - began
        )
    engine.unload_adapter(_ANY)
    # Nobody outside has heard of that version.
    engine.versions.take_dropped()
    engine.slots_changed()


def _compute(engine: Engine, prompt: list[int], adapters: list[AdapterRef]) -> None:
    sampling = Sampling(temperature=0.0, max_tokens=1, ignore_eos=True)
    engine.submit(Submit(id="capture", prompt=prompt, sampling=sampling, adapters=adapters, tenant="warm-up"))
    while engine.busy:
        engine.step()
    engine.take_outputs()
