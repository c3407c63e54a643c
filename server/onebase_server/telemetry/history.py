"""Load of the last hours, read once a minute, for the console: a server without Prometheus has a past too."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from onebase_engine.engine.messages import Stats
from onebase_protocol.serving import LoadPoint
from onebase_server.telemetry.histogram import quantile
from onebase_server.telemetry.measurements import FIRST_TOKEN_SECONDS, RequestMeasurements

SECONDS = 60.0
"""Time, in seconds, between two readings."""
MOST_POINTS = 360
"""Points that are kept: six hours."""
_PROBES = ("/health", "/ready", "/metrics", "/status", "/status/history")
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


class LoadRecorder:
    """Reads totals once a minute and remembers them for six hours. For one event loop."""

    def __init__(
        self,
        measured: RequestMeasurements,
        answers: Counter[tuple[str, int]],
        total: Callable[[str], int],
        stats: Callable[[], Stats | None],
    ) -> None:
        """total: returns one of the engine's totals over its restarts, by its name. stats: the engine's."""
        self._measured = measured
        self._answers = answers
        self._total = total
        self._stats = stats
        self._readings = deque([self._read()], maxlen=MOST_POINTS + 1)

    async def keep_reading(self) -> None:
        """Add a reading every SECONDS, for ever."""
        while True:
            await asyncio.sleep(SECONDS)
            self.add_reading()

    def add_reading(self) -> None:
        self._readings.append(self._read())

    def points(self) -> tuple[LoadPoint, ...]:
        """Return the load of each whole minute, the oldest first."""
        return tuple(_point(before, after) for before, after in pairwise(self._readings))

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
        return _Reading(
            at=time.time(),
            answers=sum(count for _, count in answers),
            errors=sum(count for status, count in answers if status >= 500)
            + self._measured.finished["error"],
            generated_tokens=self._total("generated_tokens"),
            prompt_tokens=self._total("prompt_tokens"),
            first_token=self._measured.first_token.counts,
            running=0 if stats is None else stats.sequences_running,
            waiting=0 if stats is None else stats.sequences_waiting,
        )


def _point(before: _Reading, after: _Reading) -> LoadPoint:
    """Return the load between two readings."""
    counts = [late - early for early, late in zip(before.first_token, after.first_token, strict=True)]
    return LoadPoint(
        at=after.at,
        seconds=after.at - before.at,
        answers=after.answers - before.answers,
        errors=min(after.errors - before.errors, after.answers - before.answers),
        requests=sum(counts),
        first_token_p50=quantile(FIRST_TOKEN_SECONDS, counts, 0.5),
        first_token_p95=quantile(FIRST_TOKEN_SECONDS, counts, 0.95),
        generated_tokens=after.generated_tokens - before.generated_tokens,
        prompt_tokens=after.prompt_tokens - before.prompt_tokens,
        running=after.running,
        waiting=after.waiting,
    )
