"""A simulation of many servers of one base and thousands of adapters, without a model: the placement of
`onebase route` on requests that are drawn.

A server computes `rows` rows at once, has `slots` for adapters and room for `host` of them in host memory;
one that is in neither comes from the store: a cold start. When the simulation begins, each adapter is in the
host memory of the first servers of its order. What servers tell of themselves is up to `tell_seconds` old.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

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
        if not self.endless:
            self.slots[request.adapter] -= 1


# ---- the rule ---------------------------------------------------------------------------------


class Router:
    """Placement of `onebase route` over simulated servers."""

    def __init__(self, seed: int) -> None:
        self.placement = Placement(seed=seed)
        self._by_name: dict[str, Replica] = {}

    def place(self, request: Request, now: float) -> Replica:
        return self._by_name[self.placement.place(request.adapter, request.tokens, now)]

    def told(self, replica: Replica) -> None:
        self._by_name[replica.name] = replica
        self.placement.record_report(replica.name, replica.told)

    def answered(self, request: Request, place: Replica, now: float) -> None:
        self.placement.answered(place.name, now - request.at, now)

    def ended(self, request: Request, place: Replica, now: float) -> None:
        seconds = None if request.first is None else now - request.first + place.figures.prefill_seconds
        self.placement.ended(place.name, request.adapter, request.tokens, now, seconds=seconds)


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
    """Outcome of one scenario. waits: seconds until the first token of each request that is counted."""

    waits: list[float] = field(default_factory=list)
    cold: int = 0
    evictions: int = 0
    sent_again: int = 0
    never: int = 0

    def waited(self, part: float) -> float:
        ordered = sorted(self.waits)
        return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else math.nan


def simulate(
    router: Router,
    scenario: Scenario,
    coming: Sequence[Request],
    replicas: int,
    adapters: int,
    seconds: float,
    *,
    prefetch: int = 3,
    endless: bool = False,
) -> Outcome:
    """Return the outcome for requests that come after WARMING."""
    figures = Figures()
    there = [Replica(f"r{number}", figures, endless) for number in range(replicas)]
    by_name = {one.name: one for one in there}
    for number in range(adapters):
        for home in order_of(f"a{number}", dict.fromkeys(by_name, figures.slots))[:prefetch]:
            if len(by_name[home].host) < figures.host:
                by_name[home].host[f"a{number}"] = None
    for one in there:
        one.told = one.report()
        router.told(one)
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
        request.place = router.place(request, now)
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
        elif kind == "tell" and replica is not None and replica.alive:
            replica.told = replica.report()
            router.told(replica)
            push(now + figures.tell_seconds, "tell", None, replica)
        elif kind == "first" and request is not None and replica is request.place and replica is not None:
            if replica.alive and request.first is None:
                request.first = now
                router.answered(request, replica, now)
        elif kind == "end" and request is not None and replica is request.place and replica is not None:
            if not replica.alive:
                continue
            left -= 1
            replica.sent -= 1
            replica.end(request)
            router.ended(request, replica, now)
            if request.at > WARMING * seconds and request.first is not None:
                made.waits.append(request.first - request.at)
                made.cold += request.cold
            start(replica, now)
        elif kind == "lose":
            for dead in there[: scenario.lost]:
                dead.alive = False
                router.placement.lost(dead.name)
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
    return made


# ---- what holds -------------------------------------------------------------------------------

REPLICAS, ADAPTERS, SECONDS = 30, 3000, 20.0
FIGURES = Figures()


def outcome(scenario: Scenario, seed: int, *, endless: bool = False) -> Outcome:
    mean = FIGURES.prefill_seconds + TOKENS * FIGURES.token_seconds
    rate = scenario.load * REPLICAS * FIGURES.rows / mean
    coming = requests(scenario, rate, ADAPTERS, SECONDS, seed)
    return simulate(Router(seed), scenario, coming, REPLICAS, ADAPTERS, SECONDS, endless=endless)


def test_where_everything_is_in_memory_a_request_waits_for_its_prompt_alone() -> None:
    made = outcome(Scenario(load=0.3), 0, endless=True)
    assert made.waited(0.99) == pytest.approx(FIGURES.prefill_seconds)
    assert (made.cold, made.evictions, made.never) == (0, 0, 0)


@pytest.mark.parametrize("seed", [0, 1])
def test_after_the_loss_of_a_tenth_of_the_servers_requests_rather_wait_a_little_than_load(seed: int) -> None:
    made = outcome(Scenario(lost=REPLICAS // 10), seed)
    assert made.never == 0
    assert made.sent_again > 0
    assert made.cold / len(made.waits) < 0.005
    assert made.waited(0.99) < 0.3, "a load from the store takes 0.8 s"


def test_the_same_seed_is_the_same_load_and_outcome() -> None:
    scenario = Scenario(churn=0.01, crowd=0.2, slow=2)
    assert outcome(scenario, 3) == outcome(scenario, 3)
