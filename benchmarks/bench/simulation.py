"""Many servers of one base and thousands of adapters without a model, on requests that are drawn: what
the placement of `onebase route` makes of them, and what other rules do.

A server computes `rows` rows at once, has `slots` for adapters and room for `host` of them in host memory;
one that is in neither comes from the store: a cold start. When the simulation begins, each adapter is in the
host memory of the first servers of its order. What servers tell of themselves is up to `tell_seconds` old.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import statistics
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from onebase_route.placement import Placement, ReplicaReport, order_of

TOKENS = 48.0
"""Mean length of an answer, in tokens."""
WARMING = 0.25
"""Part of the time whose requests are not counted: averages and memory settle."""
_LONGEST = 400.0
"""Tokens of the longest answer."""


@dataclass(frozen=True)
class Figures:
    """Figures of each server; times are in seconds.

    prefill_seconds: for a prompt. token_seconds: for each token of a row. host_seconds: to bring an adapter
    from host memory to a slot. store_seconds: from the store to host memory. tell_seconds: between two
    reports.
    """

    rows: int = 16
    slots: int = 32
    host: int = 500
    prefill_seconds: float = 0.08
    token_seconds: float = 0.02
    host_seconds: float = 0.02
    store_seconds: float = 0.8
    tell_seconds: float = 0.25


@dataclass
class Request:
    """One request. seconds: that its row takes; at: the time of its arrival."""

    adapter: str
    at: float
    seconds: float
    tokens: float
    place: Replica | None = None
    first: float | None = None
    cold: bool = False


@dataclass
class Replica:
    """A server. It knows nothing of how requests are placed."""

    name: str
    figures: Figures = field(default_factory=Figures)
    endless: bool = False
    """Whether every adapter is always in a slot."""
    slots: OrderedDict[str, int] = field(default_factory=OrderedDict)
    """Adapters in slots, the longest unused first, with the rows that use them."""
    host: OrderedDict[str, None] = field(default_factory=OrderedDict)
    waiting: deque[Request] = field(default_factory=deque)
    running: set[int] = field(default_factory=set)
    told: ReplicaReport = field(default_factory=lambda: ReplicaReport(0))
    alive: bool = True
    slow: float = 1.0
    work: float = 0.0
    evictions: int = 0
    sent: int = 0

    def report(self) -> ReplicaReport:
        return ReplicaReport(
            self.figures.rows,
            self.figures.slots,
            {name: bool(count) for name, count in self.slots.items()},
            frozenset(self.host),
            len(self.waiting),
            len(self.running),
        )

    def begin(self, now: float) -> Iterator[tuple[Request, float, float]]:
        """Yield the requests that can begin, with the times of their first token and of their end."""
        passed: list[Request] = []
        while self.waiting and len(self.running) < self.figures.rows:
            request = self.waiting.popleft()
            loading = 0.0 if self.endless else self._load(request)
            if loading is None:
                passed.append(request)
                continue
            self.running.add(id(request))
            first = now + (loading + self.figures.prefill_seconds) * self.slow
            yield request, first, first + request.seconds * self.slow
        self.waiting.extendleft(reversed(passed))

    def _load(self, request: Request) -> float | None:
        """Return the seconds until its adapter is in a slot; None while rows use all of them."""
        adapter = request.adapter
        if adapter in self.slots:
            self.slots.move_to_end(adapter)
            self.slots[adapter] += 1
            return 0.0
        if len(self.slots) >= self.figures.slots:
            idle = next((name for name, count in self.slots.items() if not count), None)
            if idle is None:
                return None
            del self.slots[idle]
            self.evictions += 1
        self.slots[adapter] = 1
        seconds = self.figures.host_seconds
        if adapter not in self.host:
            request.cold = True
            seconds += self.figures.store_seconds
        self.host[adapter] = None
        self.host.move_to_end(adapter)
        if len(self.host) > self.figures.host:
            self.host.popitem(last=False)
        return seconds

    def end(self, request: Request) -> None:
        self.running.discard(id(request))
        self.work += request.seconds
        if not self.endless:
            self.slots[request.adapter] -= 1


# ---- rules ------------------------------------------------------------------------------------


class Rule(ABC):
    """Rule by which requests are placed. It is given live replicas only."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    @abstractmethod
    def place(self, request: Request, live: Sequence[Replica], now: float) -> Replica: ...

    def told(self, replica: Replica) -> None:
        """Note a replica's new report."""
        return

    def lost(self, replica: Replica) -> None:
        """Note that a replica has died."""
        return

    def answered(self, request: Request, now: float) -> None:
        """Note that the first token came."""
        return

    def ended(self, request: Request, now: float) -> None:
        """Note that the last token came."""
        return


class OneBase(Rule):
    """Placement of `onebase route`."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.placement = Placement(seed=seed)
        self._by_name: dict[str, Replica] = {}

    def place(self, request: Request, live: Sequence[Replica], now: float) -> Replica:
        return self._by_name[self.placement.place(request.adapter, request.tokens, now)]

    def told(self, replica: Replica) -> None:
        self._by_name[replica.name] = replica
        self.placement.record_report(replica.name, replica.told)

    def lost(self, replica: Replica) -> None:
        self.placement.lost(replica.name)

    def answered(self, request: Request, now: float) -> None:
        if request.place is not None:
            self.placement.answered(request.place.name, now - request.at, now)

    def ended(self, request: Request, now: float) -> None:
        if request.place is not None:
            seconds = (
                None if request.first is None else now - request.first + request.place.figures.prefill_seconds
            )
            name = request.place.name
            self.placement.ended(name, request.adapter, request.tokens, now, seconds=seconds)


# ---- what comes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """Scenario of a simulation. load: part of what all rows can do; skew: exponent of Zipf's law over the
    adapters."""

    skew: float = 0.9
    load: float = 0.7
    churn: float = 0.0
    """The part of the adapters that is replaced by new ones each second."""
    crowd: float = 0.0
    """The part of all requests that one unknown adapter gets from a third of the time to two thirds."""
    lost: int = 0
    """Replicas that die at half of the time."""
    slow: int = 0
    """Replicas that take four times as long from a third of the time on."""


def requests(scenario: Scenario, rate: float, adapters: int, seconds: float, seed: int) -> list[Request]:
    """Return all requests, by time. rate: requests a second. An answer has at most `_LONGEST` tokens."""
    chance = random.Random(seed)
    weights = [1 / (rank + 1) ** scenario.skew for rank in range(adapters)]
    sums = list(itertools.accumulate(weights))
    names = [f"a{number}" for number in range(adapters)]
    chance.shuffle(names)
    fresh = itertools.count(adapters)
    made: list[Request] = []
    now, next_change = 0.0, 0.0
    while (now := now + chance.expovariate(rate)) < seconds:
        while scenario.churn and now > next_change:
            names[chance.randrange(adapters)] = f"a{next(fresh)}"
            next_change += 1 / (scenario.churn * adapters)
        adapter = chance.choices(names, cum_weights=sums)[0]
        if seconds / 3 < now < seconds * 2 / 3 and chance.random() < scenario.crowd:
            adapter = "crowd"
        length = max(1.0, min(_LONGEST, chance.expovariate(1 / TOKENS)))
        made.append(Request(adapter, now, length * Figures.token_seconds, length))
    return made


@dataclass
class Outcome:
    """Outcome of one rule in one scenario. times, waits: of the requests that are counted, in seconds."""

    waits: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    cold: int = 0
    evictions: int = 0
    imbalance: float = 0.0
    sent_again: int = 0
    never: int = 0

    def waited(self, part: float) -> float:
        ordered = sorted(self.waits)
        return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else math.nan

    def p99_by_second(self) -> list[tuple[int, float]]:
        seconds: dict[int, list[float]] = {}
        for at, wait in zip(self.times, self.waits, strict=True):
            seconds.setdefault(int(at), []).append(wait)
        return [
            (second, sorted(found)[int(0.99 * (len(found) - 1))]) for second, found in sorted(seconds.items())
        ]

    def recovered(self, lost_at: float, least: float) -> float:
        """Seconds after the loss until each second's p99 stays under `least` and twice what it was."""
        before = [p99 for second, p99 in self.p99_by_second() if second < lost_at - 1]
        if not before:
            return math.nan
        limit = max(2 * statistics.median(before), least)
        bad = [second for second, p99 in self.p99_by_second() if second >= lost_at and p99 > limit]
        return bad[-1] + 1 - lost_at if bad else 0.0


def simulate(
    rule: Rule,
    scenario: Scenario,
    coming: Sequence[Request],
    replicas: int,
    adapters: int,
    seconds: float,
    *,
    figures: Figures | None = None,
    prefetch: int = 3,
    endless: bool = False,
    tick: Callable[[float], None] = lambda now: None,
) -> Outcome:
    """Return the outcome for requests that come after WARMING."""
    figures = figures or Figures()
    there = [Replica(f"r{number}", figures, endless) for number in range(replicas)]
    by_name = {one.name: one for one in there}
    for number in range(adapters):
        for home in order_of(f"a{number}", dict.fromkeys(by_name, figures.slots))[:prefetch]:
            if len(by_name[home].host) < figures.host:
                by_name[home].host[f"a{number}"] = None
    for one in there:
        one.told = one.report()
        rule.told(one)
    made = Outcome()
    counter = itertools.count()
    queue: list[tuple[float, int, str, Request | None, Replica | None]] = []

    def push(at: float, kind: str, request: Request | None = None, replica: Replica | None = None) -> None:
        heapq.heappush(queue, (at, next(counter), kind, request, replica))

    def start(replica: Replica, now: float) -> None:
        for request, first, end in replica.begin(now):
            push(first, "first", request, replica)
            push(end, "end", request, replica)

    def send(request: Request, now: float) -> None:
        request.place = rule.place(request, [one for one in there if one.alive], now)
        request.place.sent += 1
        request.place.waiting.append(request)
        start(request.place, now)

    for new in coming:
        push(new.at, "come", new)
    for number, one in enumerate(there):
        push(figures.tell_seconds * number / replicas, "tell", None, one)
    if scenario.lost:
        push(seconds / 2, "lose")
    if scenario.slow:
        push(seconds / 3, "slow")
    left = len(coming)
    while queue and left:
        now, _, kind, request, replica = heapq.heappop(queue)
        if kind == "come" and request is not None:
            send(request, now)
            tick(now)
        elif kind == "tell" and replica is not None and replica.alive:
            replica.told = replica.report()
            rule.told(replica)
            push(now + figures.tell_seconds, "tell", None, replica)
        elif kind == "first" and request is not None and replica is request.place and replica is not None:
            if replica.alive and request.first is None:
                request.first = now
                rule.answered(request, now)
        elif kind == "end" and request is not None and replica is request.place and replica is not None:
            if not replica.alive:
                continue
            left -= 1
            replica.sent -= 1
            replica.end(request)
            rule.ended(request, now)
            if request.at > WARMING * seconds and request.first is not None:
                made.waits.append(request.first - request.at)
                made.times.append(request.at)
                made.cold += request.cold
            start(replica, now)
        elif kind == "lose":
            for dead in there[: scenario.lost]:
                dead.alive = False
                rule.lost(dead)
            for again in coming:
                place = again.place
                if place is None or place.alive:
                    continue
                if id(again) in place.running or again in place.waiting:
                    made.sent_again += 1
                    again.first, again.cold = None, False
                    send(again, now)
        elif kind == "slow":
            for late in there[-scenario.slow :]:
                late.slow = 4.0
    made.never = left
    made.evictions = sum(one.evictions for one in there)
    shares = [one.work for one in there if one.alive and one.slow == 1.0]
    made.imbalance = max(shares) / statistics.mean(shares)
    return made
