"""Load of the last hours, read once a minute, for the console: a server without Prometheus has a past too."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

from onebase_edge.background import Threads
from onebase_engine.engine.messages import Stats
from onebase_protocol.serving import LoadPoint, MachineLoad
from onebase_server.telemetry.histogram import quantile
from onebase_server.telemetry.machine import MachineReader, MachineReading
from onebase_server.telemetry.measurements import FIRST_TOKEN_SECONDS, RequestMeasurements

SECONDS = 60.0
"""Time, in seconds, between two readings."""
MOST_POINTS = 360
"""Points that are kept: six hours."""
MACHINE_SECONDS = 5.0
"""Time, in seconds, between two looks at the machine."""
_STALE_SECONDS = 6 * MACHINE_SECONDS
"""Age, in seconds, from which on a look at the machine says nothing of now: its driver may not answer."""
_PROBES = ("/health", "/ready", "/metrics", "/status", "/status/history", "/v1/load")
"""Routes that are asked again and again by machines, and by the console: they are no load."""


@dataclass(frozen=True)
class _Reading:
    """Totals since the start of the server, and what runs, at one moment."""

    at: float
    answers: int
    errors: int
    generated_tokens: int
    prompt_tokens: int
    first_token: tuple[int, ...]
    """Requests by their time to the first token, by bucket."""
    running: int
    waiting: int
    machine: MachineReading
    gpu: float | None
    """Mean of the GPU's utilization since the reading before."""


class LoadRecorder:
    """Reads totals once a minute and remembers them for six hours. For one event loop."""

    def __init__(
        self,
        measured: RequestMeasurements,
        answers: Counter[tuple[str, int]],
        total: Callable[[str], int],
        stats: Callable[[], Stats | None],
        machine: MachineReader,
    ) -> None:
        """total: returns one of the engine's totals over its restarts, by its name. stats: the engine's."""
        self._measured = measured
        self._answers = answers
        self._total = total
        self._stats = stats
        self._machine = machine
        self._threads = Threads("machine", 1)
        self._seen = self._before = MachineReading(time.monotonic())
        self._gpu: list[float] = []
        """The GPU's utilization at each look since the last reading."""
        self._readings = deque([self._read()], maxlen=MOST_POINTS + 1)

    async def keep_reading(self) -> None:
        """Add a reading every SECONDS, for ever."""
        while True:
            await asyncio.sleep(SECONDS)
            self.add_reading()

    async def keep_watching_machine(self) -> None:
        """Look at the machine every MACHINE_SECONDS, for ever: in a thread, since a driver may hang."""
        while True:
            self.note_machine(await self._threads.run_blocking(self._machine.read))
            await asyncio.sleep(MACHINE_SECONDS)

    def note_machine(self, reading: MachineReading) -> None:
        """Take a look at the machine into account."""
        if self._seen.cpu_whole is None and len(self._readings) == 1:  # the first look: the past begins there
            self._readings[0] = replace(self._readings[0], machine=reading)
        self._before, self._seen = self._seen, reading
        if reading.gpu is not None:
            self._gpu.append(reading.gpu)

    @property
    def machine(self) -> MachineLoad:
        """Load of the machine now, what it has, and why something of it is not known."""
        known, gpu = self._machine, self._machine.gpu
        now = self._seen if self._is_fresh() else MachineReading(self._seen.at)
        return MachineLoad(
            cpu=_cpu(self._before, now),
            cpu_cores=known.cores,
            memory_used=now.memory_used,
            memory_total=known.memory_total,
            gpu=now.gpu,
            gpu_name=None if gpu is None else gpu.name,
            gpu_memory_used=now.gpu_memory_used,
            gpu_memory_total=None if gpu is None else gpu.memory_total,
            missing=dict(known.missing),
        )

    def _is_fresh(self) -> bool:
        return time.monotonic() - self._seen.at < _STALE_SECONDS

    def add_reading(self) -> None:
        self._readings.append(self._read())
        self._gpu.clear()

    def points(self) -> tuple[LoadPoint, ...]:
        """Return the load of each whole minute, the oldest first. It may be called from any thread."""
        return tuple(_point(before, after) for before, after in pairwise(tuple(self._readings)))

    def since(self, seconds: float) -> LoadPoint:
        """Return the load of the last `seconds`, or since the oldest reading if that is later."""
        now = self._read()
        within = (reading for reading in self._readings if reading.at >= now.at - seconds)
        return _point(next(within, self._readings[-1]), now)

    def _read(self) -> _Reading:
        stats = self._stats()
        answers = [
            (status, count) for (route, status), count in self._answers.items() if route not in _PROBES
        ]
        machine = self._seen if self._is_fresh() else MachineReading(self._seen.at)
        return _Reading(
            at=time.time(),
            answers=sum(count for _, count in answers),
            errors=sum(count for status, count in answers if status >= 500) + self._measured.broken_answers,
            generated_tokens=self._total("generated_tokens"),
            prompt_tokens=self._total("prompt_tokens"),
            first_token=self._measured.first_token.counts,
            running=0 if stats is None else stats.sequences_running,
            waiting=0 if stats is None else stats.sequences_waiting,
            machine=machine,
            gpu=sum(self._gpu) / len(self._gpu) if self._gpu and machine is self._seen else machine.gpu,
        )


def _point(before: _Reading, after: _Reading) -> LoadPoint:
    """Return the load between two readings."""
    counts = [late - early for early, late in zip(before.first_token, after.first_token, strict=True)]
    return LoadPoint(
        at=after.at,
        seconds=after.at - before.at,
        answers=after.answers - before.answers,
        errors=after.errors - before.errors,
        requests=sum(counts),
        first_token_p50=quantile(FIRST_TOKEN_SECONDS, counts, 0.5),
        first_token_p95=quantile(FIRST_TOKEN_SECONDS, counts, 0.95),
        generated_tokens=after.generated_tokens - before.generated_tokens,
        prompt_tokens=after.prompt_tokens - before.prompt_tokens,
        running=after.running,
        waiting=after.waiting,
        cpu=_cpu(before.machine, after.machine),
        memory_used=after.machine.memory_used,
        gpu=after.gpu,
        gpu_memory_used=after.machine.gpu_memory_used,
    )


def _cpu(before: MachineReading, after: MachineReading) -> float | None:
    """Return the part of the processor time that was used between two readings, 0 to 1."""
    if None in (before.cpu_busy, before.cpu_whole, after.cpu_busy, after.cpu_whole):
        return None
    whole = (after.cpu_whole or 0.0) - (before.cpu_whole or 0.0)
    return (
        min(1.0, max(0.0, (after.cpu_busy or 0.0) - (before.cpu_busy or 0.0)) / whole) if whole > 0 else None
    )
