"""Counts of values by bucket, as Prometheus has them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

LOAD_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PROOF_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Histogram:
    """Count of values up to each of the bounds. For one thread.

    prometheus_client's takes a lock and a walk over the bounds for each value, six times as long: too much
    for one value a token.
    """

    __slots__ = ("_counts", "bounds", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.total = 0.0
        """The sum of all values."""
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def counts(self) -> tuple[int, ...]:
        """Values by bucket: up to each of the bounds but above the one before, and above the last."""
        return tuple(self._counts)

    def buckets(self) -> list[tuple[str, float]]:
        """Prometheus' cumulative counts, by their upper bounds as text."""
        names = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self._counts)), strict=True))


def quantile(bounds: Sequence[float], counts: Sequence[int], part: float) -> float | None:
    """Return the value that `part` of all are below, or None if there are none.

    Within a bucket values are taken to be spread evenly, as by Prometheus' histogram_quantile; of those above
    the last bound only that bound is known.
    """
    rank, below = part * sum(counts), 0
    if not rank:
        return None
    for lower, upper, count in zip((0.0, *bounds), bounds, counts, strict=False):
        if count and below + count >= rank:
            return lower + (upper - lower) * (rank - below) / count
        below += count
    return bounds[-1]
