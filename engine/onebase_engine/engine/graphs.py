"""CUDA graphs of passes over few rows: a step of a thousand launches becomes one.

A pass is captured for a size when a step of that size occurs a second time; smaller steps are padded to it.
All inputs of a graph have fixed addresses: the base, the slots and the KV cache, and the step in a
`FixedStep`. A step of many rows, or with an adapter that acts outside the kernels, has no graph.

A graph is captured with padding alone, and then has to give the bits that the kernels gave one by one for the
step that requested it. This reveals values of the host that were captured as constants.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from onebase_engine.engine.batch import StepBatch
from onebase_engine.kernels import cuda
from onebase_engine.kernels.cuda import CaptureError, FixedStep, StepSize
from onebase_engine.machine import is_out_of_memory

logger = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Row counts for which passes are captured: decodes, and a short prompt beside them. A graph keeps logits of
all its rows, which would take much memory for a long prompt."""
TERMS = (0, 1, 4)
"""Numbers of adapters of a row for which passes are captured."""
LEAST_RANK = 64
"""Smallest largest rank for which passes are captured: programs for ranks that no adapter has end at once."""
SPLITS_FACTOR = 4
"""Factor between two lengths of contexts for which passes are captured, so that contexts that grow seldom ask
for another one: programs for keys that no context has end at once."""
MOST_GRAPHS = 128
STALE = 4096
"""Age, in steps, at which an unused graph may be replaced once MOST_GRAPHS are captured."""
MOST_BYTES, LEAST_BYTES = 1 << 30, 1 << 27
"""Memory limit, in bytes, of all graphs together, and its smallest value.

What the driver takes for MOST_GRAPHS is added, within a MEMORY_PART of the device. Passes beyond it are
launched kernel by kernel. It becomes half of what the graphs had each time that memory is short.
"""
MEMORY_PART = 8
"""Part of a device's memory that graphs may take, as the number of such parts."""
NODE_BYTES = 10 << 10
"""Bytes that the driver takes for a node of a graph, outside PyTorch's memory. An estimate, not measured by
us."""
LAYER_NODES, MIXTURE_NODES = 16, 36
"""Nodes of a decoder layer, and further ones of one with a mixture of experts."""

Pass = Callable[[FixedStep], tuple[torch.Tensor, torch.Tensor]]
"""A pass that returns the logits and hidden states of all rows of a step."""


def executable_bytes(layers: int, mixtures: int) -> int:
    """Return the bytes that the driver takes for a graph of so many layers, some with a mixture of
    experts."""
    return NODE_BYTES * (LAYER_NODES * layers + MIXTURE_NODES * mixtures)


def most_bytes(executable: int, device: torch.device) -> int:
    """Return the largest number of bytes of all graphs. `executable`: the driver's bytes for each."""
    wanted = MOST_BYTES + MOST_GRAPHS * executable
    if device.type != "cuda":
        return wanted
    total: int = torch.cuda.get_device_properties(device).total_memory
    return min(wanted, total // MEMORY_PART)


@dataclass(frozen=True)
class _Graph:
    step: FixedStep
    replay: Callable[[], None]
    logits: torch.Tensor
    hidden: torch.Tensor


class Graphs:
    """The captured passes of a model."""

    def __init__(
        self,
        run: Pass,
        kernels: Any,
        slots: int,
        block_size: int,
        padding_slots: Sequence[int],
        device: torch.device,
        executable: int = 0,
        tile_rows: int = 1,
        part_bytes: int = 0,
    ) -> None:
        """Capture nothing yet.

        Args:
            padding_slots: of each table of blocks the KV slot of padding.
            executable: bytes that the driver takes for each graph.
            tile_rows: as for a `FixedStep`.
            part_bytes: bytes of attention's partial results of a row in one split.
        """
        self._run = run
        self._kernels = kernels
        self._slots = slots
        self._block_size = block_size
        self._padding_slots = padding_slots
        self._device = device
        self._graphs: dict[StepSize, _Graph | None] = {}
        """Captured pass of each size; None if the size cannot be captured."""
        self._seen: Counter[StepSize] = Counter()
        self._ran: dict[StepSize, int] = {}
        """Number of the step for which each size was last requested, the oldest first."""
        self._steps = 0
        self._executable, self._part_bytes = executable, part_bytes
        self._tile_rows = tile_rows if kernels.switches.tiles else 1
        self._bytes, self._most_bytes = 0, most_bytes(executable, device)
        self._prepared: tuple[StepBatch, _Graph] | None = None
        """Step that has already been written to its graph's place."""
        self._closed = False
        """Whether no more passes are captured."""
        self.ranks: dict[int, int] = {}
        """Largest rank in each filled slot."""
        self.uncaptured: Collection[int] = ()
        """Slots that act outside the kernels."""

    def prepare(self, batch: StepBatch) -> None:
        """Write the next step, except its tokens, to its graph's place. The step before may still run."""
        size = self._size(batch)
        graph = None if size is None else self._graphs.get(size)
        if graph is not None:
            graph.step.prepare(batch.contexts, batch.token_map)
            self._prepared = batch, graph

    def run_graph(self, batch: StepBatch) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return logits and hidden states of the batch's packed rows, or None if it has no graph.

        The next run overwrites them.
        """
        self._steps += 1
        prepared, self._prepared = self._prepared, None
        size = self._size(batch)
        if size is None:
            return None
        self._kernels.commit_slots()
        if size not in self._graphs:
            self._seen[size] += 1
            if self._seen[size] < 2 or self._closed or not self._has_room():
                return None
            self._graphs[size] = self._capture(size, batch)
        self._ran.pop(size, None)
        self._ran[size] = self._steps
        graph = self._graphs[size]
        if graph is None:
            return None
        if prepared is None or prepared[0] is not batch or prepared[1] is not graph:
            graph.step.prepare(batch.contexts, batch.token_map)
        graph.step.send(batch.input_ids)
        graph.replay()
        return graph.logits, graph.hidden

    @property
    def full(self) -> bool:
        """Whether no more passes are captured, unless they replace stale ones."""
        return self._closed or not self._has_bytes or len(self._graphs) >= MOST_GRAPHS

    @property
    def _has_bytes(self) -> bool:
        return self._bytes + self._executable < self._most_bytes

    def _has_room(self) -> bool:
        """Return True if one more graph may be captured; drops a stale one if all places are taken."""
        if not self._has_bytes:
            return False
        if len(self._graphs) >= MOST_GRAPHS:
            oldest = next(iter(self._ran))
            if self._steps - self._ran[oldest] < STALE:
                return False
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # a step of which nothing is read may still run
            # Its memory is the next one's: they share a pool.
            if self._graphs.pop(oldest) is not None:
                self._bytes -= self._executable
            del self._ran[oldest], self._seen[oldest]
        return True

    def forget(self) -> bool:
        """Release the memory of all graphs, since it is short. Return True if there were any."""
        held = any(graph is not None for graph in self._graphs.values())
        if held:
            logger.warning("kernels: memory is short: %d passes are no graphs any more", len(self._graphs))
            half = min(self._bytes, self._most_bytes) // 2
            self._most_bytes, self._bytes, self._prepared = max(half, LEAST_BYTES), 0, None
            for of_sizes in (self._graphs, self._ran, self._seen):
                of_sizes.clear()
            self._reserved()
        return held

    def _capture(self, size: StepSize, batch: StepBatch) -> _Graph | None:
        given = batch.input_ids, batch.contexts, batch.token_map
        began, held = time.monotonic(), self._bytes
        try:
            step = FixedStep(
                size, self._slots, self._block_size, self._padding_slots, self._device, self._tile_rows
            )

            def run_pass() -> tuple[torch.Tensor, torch.Tensor]:
                return self._run(step)

            step.load_step(*given)
            wanted = self._kernels.unawaited(run_pass, self._device)
            step.clear()
            before, launched = self._reserved(), time.monotonic()
            replay, (logits, hidden) = self._kernels.capture(run_pass, self._device)
            self._bytes += self._reserved() - before + self._executable
            recorded = time.monotonic()
            step.load_step(*given)
            replay()
            count = len(batch.input_ids)
            if not all(_same(*pair) for pair in zip(wanted, (logits[:count], hidden[:count]), strict=True)):
                raise CaptureError("it gives something else than its kernels one by one")
        except Exception as error:
            if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
                raise
            # The same kernels compute the step one by one.
            logger.warning("kernels: a pass over %d rows is not captured: %s", size.rows, error)
            self._closed |= not is_out_of_memory(error)
            return None
        times = launched - began, recorded - launched, time.monotonic() - recorded
        logger.info(
            "kernels: %s is captured in %.2f s (launched %.2f, captured %.2f, compared %.2f) and %.1f MB",
            size, sum(times), *times, (self._bytes - held) / 1e6,
        )  # fmt: skip
        return _Graph(step, replay, logits, hidden)

    def _reserved(self) -> int:
        """Release memory that no tensor uses, and return the bytes that PyTorch still reserves."""
        if self._device.type != "cuda":
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device)

    def _size(self, batch: StepBatch) -> StepSize | None:
        """Return the size that the batch needs, rounded up, or None if no graph has it.

        None has so many splits that the tiles which attend at once exceed SCRATCH.
        """
        groups = batch.token_map.groups
        slots = {slot for group in groups for slot, _ in group.terms}
        rows = next((count for count in ROWS if count >= len(batch.input_ids)), None)
        if rows is None or not slots.isdisjoint(self.uncaptured):
            return None
        pairs = sum(len(group.rows) * len(group.terms) for group in groups)
        terms = next((rows * count for count in TERMS if rows * count >= pairs), None)
        if terms is None:
            return None
        rank = max((self.ranks.get(slot, 0) for slot in slots), default=0)
        splits = _rounded_up(int(batch.contexts.position.max(initial=0)) // cuda.SPLIT.value + 1)
        if splits > 1 and min(rows, self._tile_rows) * splits * self._part_bytes > cuda.SCRATCH:
            return None
        rank = triton.next_power_of_2(max(rank, LEAST_RANK)) if terms else 0
        return StepSize(rows, splits, terms, rank)


def _rounded_up(splits: int) -> int:
    """Return the smallest power of SPLITS_FACTOR that is not smaller."""
    rounded = 1
    while rounded < splits:
        rounded *= SPLITS_FACTOR
    return rounded


def _same(wanted: torch.Tensor, got: torch.Tensor) -> bool:
    """Return True if the rows of `got` have the bits of the first rows of `wanted`, NaNs included."""
    return torch.equal(wanted[: len(got)].contiguous().view(torch.uint8), got.contiguous().view(torch.uint8))
