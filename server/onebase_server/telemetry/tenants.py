"""Requests of each tenant in the last six hours, in steps of five minutes, and of each of its adapters.

A tenant with many adapters takes no room from others: when it is short, a tenant with the most series loses
the one that was used least recently.
"""

from __future__ import annotations

import time
from array import array
from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from copy import copy

from onebase_protocol.serving import QueueWait, TenantLoadPoint
from onebase_server.telemetry.histogram import Histogram, quantile

STEP_SECONDS = 300.0
MOST_STEPS = 72
"""Steps that are kept: six hours."""
MOST_SERIES = 600
"""Series of tenants and of their adapters, of all tenants together. A full one takes 30 kB."""
MOST_TENANTS = 200
"""Tenants whose waits are counted since the start under their names; later ones are counted together."""
OTHERS = "other"
QUEUE_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_HOUR_STEPS = 12
_REQUESTS, _ERRORS, _PROMPT, _COMPLETION, _BUCKETS = range(5)
"""Places of a step's counts; the buckets of the first token and then those of the queue follow."""


class TenantLoads:
    """Counts of requests by tenant and adapter. For one event loop; other threads read a `snapshot`."""

    def __init__(self, first_token: Sequence[float], clock: Callable[[], float] = time.time) -> None:
        """first_token: bounds of the buckets of times to the first token, in seconds. clock: Unix seconds."""
        self._first_token = first_token
        self._queue_at = _BUCKETS + len(first_token) + 1
        self._width = self._queue_at + len(QUEUE_SECONDS) + 1
        self._clock = clock
        self._began = clock()
        self._series: OrderedDict[tuple[str, str | None], deque[tuple[int, array[int]]]] = OrderedDict()
        """Steps with their numbers, the oldest first, by tenant and adapter; None is all of the tenant's. The
        least recently used series comes first."""
        self._count: Counter[str] = Counter()
        """Number of series by tenant."""
        self.waits: dict[str, Histogram] = {}
        """Waits in the engine's queue since the start, by tenant."""

    def record(
        self,
        tenant: str,
        adapters: Collection[str],
        *,
        failed: bool,
        prompt: int,
        completion: int,
        first_token: float | None,
        waited: float | None,
    ) -> None:
        """Record that a request has ended. adapters: "" is the base. first_token, waited: seconds, or None if
        the request did not get so far."""
        marks = []
        if first_token is not None:
            marks.append(_BUCKETS + bisect_left(self._first_token, first_token))
        if waited is not None:
            marks.append(self._queue_at + bisect_left(QUEUE_SECONDS, waited))
            self._waits_of(tenant).observe(waited)
        for name in (*adapters, None):
            step = self._step(tenant, name)
            step[_REQUESTS] += 1
            step[_ERRORS] += failed
            step[_PROMPT] += prompt
            step[_COMPLETION] += completion
            for mark in marks:
                step[mark] += 1

    def snapshot(self, tenant: str | None = None, adapter: str | None = None) -> TenantLoads:
        """Return a copy that another thread may read: of one tenant's series, or of all tenants' (None). Only
        the counts of the step that has begun still grow in it."""
        made = copy(self)
        made._series = OrderedDict(
            (key, series.copy())
            for key, series in self._series.items()
            if key[1] == adapter and tenant in (None, key[0])
        )
        return made

    def points(self, tenant: str, adapter: str | None) -> tuple[TenantLoadPoint, ...]:
        """Return a point for each step since the start, six hours at most; without requests it has zeros."""
        now = self._clock()
        last = self._number(now)
        first = max(self._number(self._began), last - MOST_STEPS + 1)
        steps = dict(self._series.get((tenant, adapter), ()))
        nothing = self._nothing()
        return tuple(
            self._point(
                steps.get(number, nothing),
                begin=max(self._began, number * STEP_SECONDS),
                end=min(now, (number + 1) * STEP_SECONDS),
            )
            for number in range(first, last + 1)
        )

    def last_hour(self, tenant: str, adapter: str | None) -> TenantLoadPoint:
        """Return the load of the last hour: of whole steps, and of the one that has begun."""
        now = self._clock()
        first = self._number(now) - _HOUR_STEPS + 1
        total = self._nothing()
        for number, step in self._series.get((tenant, adapter), ()):
            if number >= first:
                for place, value in enumerate(step):
                    total[place] += value
        return self._point(total, begin=max(self._began, first * STEP_SECONDS), end=now)

    def queue_waits(self) -> Iterator[QueueWait]:
        """Yield the waits of tenants that had requests in the last hour."""
        for tenant in [tenant for tenant, adapter in self._series if adapter is None]:
            hour = self.last_hour(tenant, None)
            if hour.requests:
                yield QueueWait(tenant=tenant, requests=hour.requests, p50=hour.queue_p50, p95=hour.queue_p95)

    def _point(self, step: array[int], *, begin: float, end: float) -> TenantLoadPoint:
        first, queue = step[_BUCKETS : self._queue_at], step[self._queue_at :]
        return TenantLoadPoint(
            at=end,
            seconds=max(0.0, end - begin),
            requests=step[_REQUESTS],
            errors=step[_ERRORS],
            prompt_tokens=step[_PROMPT],
            generated_tokens=step[_COMPLETION],
            first_token_p50=quantile(self._first_token, first, 0.5),
            first_token_p95=quantile(self._first_token, first, 0.95),
            queue_p50=quantile(QUEUE_SECONDS, queue, 0.5),
            queue_p95=quantile(QUEUE_SECONDS, queue, 0.95),
        )

    def _step(self, tenant: str, adapter: str | None) -> array[int]:
        """Return the counts of the step that has begun, of a series that becomes the last used one."""
        key, number = (tenant, adapter), self._number(self._clock())
        series = self._series.get(key)
        if series is None:
            self._make_room()
            series = self._series[key] = deque(maxlen=MOST_STEPS)
            self._count[tenant] += 1
        else:
            self._series.move_to_end(key)
        if not series or series[-1][0] < number:
            series.append((number, self._nothing()))
        return series[-1][1]

    def _make_room(self) -> None:
        while len(self._series) >= MOST_SERIES:
            most = max(self._count.values())
            key = next(key for key in self._series if self._count[key[0]] == most)
            del self._series[key]
            self._count[key[0]] -= 1
            if not self._count[key[0]]:
                del self._count[key[0]]

    def _waits_of(self, tenant: str) -> Histogram:
        if tenant not in self.waits and len(self.waits) >= MOST_TENANTS:
            tenant = OTHERS
        if tenant not in self.waits:
            self.waits[tenant] = Histogram(QUEUE_SECONDS)
        return self.waits[tenant]

    def _number(self, at: float) -> int:
        """Return the number of the step at a time."""
        return int(at // STEP_SECONDS)

    def _nothing(self) -> array[int]:
        return array("Q", bytes(8 * self._width))
