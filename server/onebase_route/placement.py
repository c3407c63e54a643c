"""Choice of the replica that answers a request for an adapter. No network and no clock in it.

Each adapter has homes: the first k replicas, two or more, in its own order of them, which rendezvous hashing
makes of their names, weighted by their slots, so that a replica that comes or goes moves only what belongs on
it. k follows what is asked of the adapter: by Little's law rate x service time is the number of sequences at
once, and a replica has room for `sequences`. Of two homes the one with less to do answers. Where they are
full, or would have to put out a version that is in use, the next in its order does that is not, and has it
in memory.

What counts is what replicas report of themselves (`ReplicaReport`), and what was sent to them since.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from statistics import median
from typing import Literal

Tier = Literal["slot", "host", "disk"]

_SPAN_SECONDS = 30.0
"""Time, in seconds, over which rates and times are averaged."""
_SETTLE_SECONDS = 10.0
"""Least time, in seconds, from a change of an adapter's number of homes to one that takes a home away."""
_SHRINK = 0.7
"""Part of what one home fewer could do below which there is one fewer."""
LEAST_HOMES = 2
"""Least number of homes of an adapter, if there are so many replicas: a choice of two evens out their
load."""
_FILL = 0.75
"""Part of a replica's sequences that one adapter may be expected to take."""
_COLD: dict[Tier, float] = {"slot": 0.0, "host": 1.0, "disk": 40.0}
"""Cost of each tier: tokens that a sequence could compute until the adapter is in a slot."""
_PATIENCE = 8.0
"""Tokens of a sequence for which a request rather waits than begins where its adapter is on disk. For itself
it would be right to wait longer; but the next ones have it in memory there. With 5, one request in fifty came
from the store once a tenth of the replicas were lost (as in tests/server/test_many_servers.py); with 12 the
waits show."""
_MOST_KNOWN = 100_000
"""Largest number of adapters whose demand and order of replicas are remembered."""
_FAILURES = 3
"""Number of consecutive failures after which a replica is ejected."""
_EJECTED_SECONDS = 2.0
"""Time, in seconds, of a first ejection; each later one is twice as long, up to _MOST_EJECTED_SECONDS."""
_MOST_EJECTED_SECONDS = 60.0
_SLOW = 3.0
"""Multiple of the median of all replicas' times to a first token above which a replica is an outlier."""
_SLOW_SECONDS = 0.5
"""Time to a first token, in seconds, below which no replica is an outlier."""
_MOST_EJECTED = 1 / 3
"""Largest part of all replicas that may be ejected for being slow."""


class NoReplicaError(Exception):
    """No replica could answer."""


@dataclass(frozen=True)
class ReplicaReport:
    """State that a replica reports of itself.

    Args:
        sequences: largest number of sequences that it computes at once.
        slots: for versions; 0 if it does not report them: then none is ever thought to be full.
        in_slots: adapters in slots, and whether sequences use them now.
        in_host: adapters in its host memory.
        waiting: requests that wait there, whoever sent them.
        running: sequences that are computed there, whoever sent them.
        kv_dtype: type of its keys and values; "" if it does not report it.
    """

    sequences: int
    slots: int = 0
    in_slots: Mapping[str, bool] = field(default_factory=dict)
    in_host: Collection[str] = frozenset()
    waiting: int = 0
    running: int = 0
    kv_dtype: str = ""


@dataclass(slots=True)
class _Average:
    """Average of a value over the last seconds, and its rate of occurrence a second."""

    value: float = 0.0
    weight: float = 0.0
    at: float = 0.0

    def add(self, value: float, now: float) -> None:
        self._fade(now)
        self.value += value
        self.weight += 1.0

    def mean(self) -> float:
        return self.value / self.weight if self.weight else 0.0

    def rate(self, now: float) -> float:
        self._fade(now)
        return self.weight / _SPAN_SECONDS

    def _fade(self, now: float) -> None:
        kept = math.exp(-max(0.0, now - self.at) / _SPAN_SECONDS)
        self.value, self.weight, self.at = self.value * kept, self.weight * kept, max(now, self.at)


@dataclass(slots=True)
class _Demand:
    """Demand for one adapter. order: the replicas in its order, as of the change `ordered`."""

    order: Sequence[str] = ()
    ordered: int = -1
    arrivals: _Average = field(default_factory=_Average)
    service: _Average = field(default_factory=_Average)
    homes: int = LEAST_HOMES
    changed: float = 0.0


@dataclass
class _Replica:
    report: ReplicaReport
    sent: dict[str, int] = field(default_factory=dict)
    """Number of this router's requests that have not ended, by adapter."""
    sequences: int = 0
    tokens: float = 0.0
    first_token: _Average = field(default_factory=_Average)
    failures: int = 0
    ejections: int = 0
    ejected_until: float = 0.0

    def tier(self, adapter: str | None) -> Tier:
        if adapter is None or adapter in self.report.in_slots or self.sent.get(adapter):
            return "slot"
        return "host" if adapter in self.report.in_host else "disk"

    @property
    def load(self) -> int:
        """Number of requests that it has."""
        return max(self.sequences, self.report.running + self.report.waiting)

    @property
    def full(self) -> bool:
        """Whether one more request would wait."""
        return self.load >= self.report.sequences

    @property
    def tokens_each(self) -> float:
        return self.tokens / self.sequences if self.sequences else 1.0

    def evicts(self, adapter: str | None) -> bool:
        """Return True if the adapter would need a slot, while sequences use all of them."""
        if not self.report.slots or self.tier(adapter) == "slot":
            return False
        used = {name for name, busy in self.report.in_slots.items() if busy} | self.sent.keys()
        return len(used) >= self.report.slots


class Placement:
    """Places requests on replicas. Each time is in seconds, of any clock that does not go back."""

    def __init__(self, *, seed: int | None = None) -> None:
        self._random = random.Random(seed)
        self._replicas: dict[str, _Replica] = {}
        self._gone: dict[str, _Replica] = {}
        """Replicas that are gone, while requests that were sent to them have not ended."""
        self._weights: dict[str, int] = {}
        self._changes = 0
        """Number of changes of the weights."""
        self._demands: OrderedDict[str, _Demand] = OrderedDict()

    @property
    def replicas(self) -> Collection[str]:
        return self._replicas.keys()

    def record_report(self, replica: str, report: ReplicaReport) -> None:
        """Store a replica's report; the first one adds the replica."""
        known = self._replicas.get(replica)
        if known is None:
            known = self._replicas[replica] = self._gone.pop(replica, _Replica(report))
        known.report = report
        if self._weights.get(replica) != max(1, report.slots):
            self._weigh()

    def lost(self, replica: str) -> None:
        """Remove a replica: nothing goes to it, and its adapters move to others."""
        known = self._replicas.pop(replica, None)
        if known is None:
            return
        if known.sequences:
            self._gone[replica] = _Replica(known.report, known.sent, known.sequences, known.tokens)
        self._weigh()

    def _weigh(self) -> None:
        self._weights = {name: max(1, one.report.slots) for name, one in self._replicas.items()}
        self._changes += 1

    def _order(self, adapter: str, demand: _Demand) -> Sequence[str]:
        if demand.ordered != self._changes:
            demand.order, demand.ordered = order_of(adapter, self._weights), self._changes
        return demand.order

    def homes(self, adapter: str) -> list[str]:
        """Return the replicas where the adapter belongs now, the best first, ejected ones included."""
        demand = self._demands.get(adapter) or _Demand()
        return list(self._order(adapter, demand)[: demand.homes])

    # ---- requests ----------------------------------------------------------------------------

    def place(
        self,
        adapter: str | None,
        tokens: float,
        now: float,
        *,
        prefix: str | None = None,
        but: Collection[str] = (),
    ) -> str:
        """Return the replica that is to answer. The request counts as sent to it until `ended`.

        Args:
            adapter: None is the base, which is at home everywhere.
            tokens: an estimate of what it takes, prompt and answer.
            prefix: requests with the same are sent to the same home, where that makes no difference else.
            but: replicas where it was tried already.

        Raises NoReplicaError.
        """
        there = [name for name in self._replicas if name not in but]
        live = [name for name in there if self._replicas[name].ejected_until <= now] or there
        if not live:
            raise NoReplicaError("no replica is there")
        chosen = self._choose(adapter, live, now, prefix)
        replica = self._replicas[chosen]
        if adapter is not None:
            replica.sent[adapter] = replica.sent.get(adapter, 0) + 1
        replica.sequences += 1
        replica.tokens += tokens
        return chosen

    def _choose(self, adapter: str | None, live: Sequence[str], now: float, prefix: str | None) -> str:
        if adapter is None:
            return self._better_of_two(None, live, prefix)
        demand = self._asked(adapter, now)
        alive = set(live)
        order = self._order(adapter, demand)
        homes = list(islice((name for name in order if name in alive), demand.homes))
        best = self._better_of_two(adapter, homes, prefix)
        if not self._is_bad(adapter, best):
            return best
        # Where it begins first; in the adapter's own order, so that it is in memory there the next time.
        kept = [name for name in order if name in alive and not self._replicas[name].evicts(adapter)]
        warm = (
            name
            for name in kept
            if self._replicas[name].tier(adapter) != "disk" and not self._is_bad(adapter, name)
        )
        return next(warm, None) or min(
            kept or live, key=lambda name: self._wait(name) + min(_PATIENCE, self._cold(adapter, name))
        )

    def _is_bad(self, adapter: str, name: str) -> bool:
        replica = self._replicas[name]
        return replica.full or replica.evicts(adapter)

    def _better_of_two(self, adapter: str | None, names: Sequence[str], prefix: str | None) -> str:
        """Return the one with less to do of two that are drawn, the first of them by the prefix if there is
        one."""
        if len(names) == 1:
            return names[0]
        if prefix is None:
            one, other = self._random.sample(names, 2)
        else:
            one = max(names, key=lambda name: _hash(prefix, name))
            other = self._random.choice([name for name in names if name != one])
        bad = adapter is not None and self._is_bad(adapter, one) and not self._is_bad(adapter, other)
        return other if bad or self._cost(adapter, other) < self._cost(adapter, one) else one

    def _cost(self, adapter: str | None, name: str) -> float:
        """Return a replica's pending work, with loading the adapter, in tokens that each of its sequences
        computes."""
        replica = self._replicas[name]
        others = max(0, replica.report.running + replica.report.waiting - replica.sequences)
        sequences = max(1, replica.report.sequences)
        return (replica.tokens + others * replica.tokens_each) / sequences + self._cold(adapter, name)

    def _cold(self, adapter: str | None, name: str) -> float:
        return _COLD[self._replicas[name].tier(adapter)]

    def _wait(self, name: str) -> float:
        """Return the wait until a sequence is free, in tokens of a sequence."""
        replica = self._replicas[name]
        over = replica.load - replica.report.sequences + 1
        return max(0, over) * replica.tokens_each / max(1, replica.report.sequences)

    def answered(self, replica: str, seconds: float, now: float) -> None:
        """Record the time, in seconds, to a first token."""
        known = self._replicas.get(replica)
        if known is None:
            return
        known.first_token.add(seconds, now)
        self._eject_if_slow(known, now)

    def ended(
        self,
        replica: str,
        adapter: str | None,
        tokens: float,
        now: float,
        *,
        seconds: float | None = None,
        refused: bool = False,
    ) -> None:
        """Record the end of a request that was placed. tokens: as in `place`. seconds: that it took; None: it
        failed by the replica's fault. refused: nothing was computed, which is nobody's fault."""
        known = self._replicas.get(replica) or self._gone.get(replica)
        if known is None:
            return
        if adapter is not None:
            left = known.sent.get(adapter, 0) - 1
            if left > 0:
                known.sent[adapter] = left
            else:
                known.sent.pop(adapter, None)
        known.sequences = max(0, known.sequences - 1)
        known.tokens = max(0.0, known.tokens - tokens) if known.sequences else 0.0
        if replica in self._gone:
            if not known.sequences:
                del self._gone[replica]
            return
        if refused:
            return
        if seconds is None:
            known.failures += 1
            if known.failures >= _FAILURES:
                self._eject(known, now)
            return
        known.failures = 0
        if now > known.ejected_until + _MOST_EJECTED_SECONDS:
            known.ejections = 0
        if adapter is not None and (demand := self._demands.get(adapter)) is not None:
            demand.service.add(seconds, now)

    # ---- demand ------------------------------------------------------------------------------

    def _asked(self, adapter: str, now: float) -> _Demand:
        demand = self._demands.get(adapter)
        if demand is None:
            demand = self._demands[adapter] = _Demand()
            if len(self._demands) > _MOST_KNOWN:
                self._demands.popitem(last=False)
        self._demands.move_to_end(adapter)
        demand.arrivals.add(1.0, now)
        sequences = demand.arrivals.rate(now) * demand.service.mean()
        each = _FILL * median(one.report.sequences for one in self._replicas.values())
        needed = min(len(self._replicas), max(LEAST_HOMES, math.ceil(sequences / each)))
        if needed > demand.homes:
            demand.homes, demand.changed = needed, now
        elif (
            demand.homes > LEAST_HOMES
            and sequences < _SHRINK * each * (demand.homes - 1)
            and now - demand.changed >= _SETTLE_SECONDS
        ):
            demand.homes, demand.changed = demand.homes - 1, now
        return demand

    # ---- replicas that fail or are slow ----------------------------------------------------------

    def _eject_if_slow(self, replica: _Replica, now: float) -> None:
        if replica.first_token.weight < _FAILURES or replica.ejected_until > now:
            return
        known = [one.first_token.mean() for one in self._replicas.values() if one.first_token.weight >= 1]
        out = sum(one.ejected_until > now for one in self._replicas.values())
        if len(known) < 3 or (out + 1) / len(self._replicas) > _MOST_EJECTED:
            return
        if replica.first_token.mean() > max(_SLOW_SECONDS, _SLOW * median(known)):
            self._eject(replica, now)
            replica.first_token = _Average()

    def _eject(self, replica: _Replica, now: float) -> None:
        replica.failures = 0
        replica.ejected_until = now + min(_MOST_EJECTED_SECONDS, _EJECTED_SECONDS * 2.0**replica.ejections)
        replica.ejections = min(replica.ejections + 1, 10)


def order_of(key: str, weights: Mapping[str, int]) -> Sequence[str]:
    """Return the replicas by weighted rendezvous hashing, the best first (Schindelhauer and Schomaker, SPAA
    2005)."""
    return sorted(weights, key=lambda name: (math.log(_hash(key, name)) / weights[name], name), reverse=True)


def _hash(key: str, name: str) -> float:
    """Return a hash between 0 and 1, both excluded."""
    digest = blake2b(f"{key}\0{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return ((int.from_bytes(digest, "little") >> 11) + 0.5) * 2.0**-53
