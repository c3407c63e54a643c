#!/usr/bin/env python3
"""Simulates many replicas of one base and thousands of adapters, without a model: the server's own placement
(onebase_server/routing) against rules that others have, on the same requests.

  python benchmarks/cluster_sim.py                        # 100 replicas, 10,000 adapters, every scenario
  python benchmarks/cluster_sim.py --scenarios steady loss --seconds 30      # a look

A replica computes `ROWS` rows at once, has `SLOTS` for adapters and room for `HOST` of them in host memory;
one that is in neither comes from the store: a cold start. When the simulation begins, each adapter is in the
host memory of the first replicas of its order (`--prefetch`), as activation puts it there. What replicas
tell of themselves is up to 0.25 s old.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import statistics
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from onebase_server.routing.placement import Placement, Report, order_of

ROWS, SLOTS, HOST = 16, 32, 500
PREFILL_SECONDS, TOKEN_SECONDS, TOKENS = 0.08, 0.02, 48
HOST_SECONDS, STORE_SECONDS = 0.02, 0.8
TELL_SECONDS = 0.25
WARMING = 0.25
"""The part of the time whose requests are not counted: averages and memory settle."""


@dataclass
class Request:
    """seconds: that its row takes; at: when it came; tries: replicas that died under it."""

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
    endless: bool = False
    """Everything is always in a slot."""
    slots: OrderedDict[str, int] = field(default_factory=OrderedDict)
    """Adapters in slots, the longest unused first, with the rows that use them."""
    host: OrderedDict[str, None] = field(default_factory=OrderedDict)
    waiting: deque[Request] = field(default_factory=deque)
    running: set[int] = field(default_factory=set)
    told: Report = field(default_factory=lambda: Report(ROWS, SLOTS))
    alive: bool = True
    slow: float = 1.0
    work: float = 0.0
    evictions: int = 0
    sent: int = 0

    def report(self) -> Report:
        return Report(
            ROWS,
            SLOTS,
            {name: bool(count) for name, count in self.slots.items()},
            frozenset(self.host),
            len(self.waiting),
            len(self.running),
        )

    def begin(self, now: float) -> Iterator[tuple[Request, float, float]]:
        """Requests that can begin, when their first token comes, and when they end."""
        passed: list[Request] = []
        while self.waiting and len(self.running) < ROWS:
            request = self.waiting.popleft()
            loading = 0.0 if self.endless else self._load(request)
            if loading is None:
                passed.append(request)
                continue
            self.running.add(id(request))
            first = now + (loading + PREFILL_SECONDS) * self.slow
            yield request, first, first + request.seconds * self.slow
        self.waiting.extendleft(reversed(passed))

    def _load(self, request: Request) -> float | None:
        """Seconds until its adapter is in a slot; None while rows use all of them."""
        adapter = request.adapter
        if adapter in self.slots:
            self.slots.move_to_end(adapter)
            self.slots[adapter] += 1
            return 0.0
        if len(self.slots) >= SLOTS:
            idle = next((name for name, count in self.slots.items() if not count), None)
            if idle is None:
                return None
            del self.slots[idle]
            self.evictions += 1
        self.slots[adapter] = 1
        seconds = HOST_SECONDS
        if adapter not in self.host:
            request.cold = True
            seconds += STORE_SECONDS
        self.host[adapter] = None
        self.host.move_to_end(adapter)
        if len(self.host) > HOST:
            self.host.popitem(last=False)
        return seconds

    def end(self, request: Request) -> None:
        self.running.discard(id(request))
        self.work += request.seconds
        if not self.endless:
            self.slots[request.adapter] -= 1


# ---- rules ---------------------------------------------------------------------------------------


class Rule(ABC):
    """How a request is placed. Replicas that are dead are not among those it is given."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    @abstractmethod
    def place(self, request: Request, live: Sequence[Replica], now: float) -> Replica: ...

    def told(self, replica: Replica) -> None:
        """What a replica says of itself now."""
        return

    def lost(self, replica: Replica) -> None:
        """It has died."""
        return

    def answered(self, request: Request, now: float) -> None:
        """The first token came."""
        return

    def ended(self, request: Request, now: float) -> None:
        """The last token came."""
        return


class OneBase(Rule):
    """The server's own."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.placement = Placement(seed=seed)
        self._by_name: dict[str, Replica] = {}

    def place(self, request: Request, live: Sequence[Replica], now: float) -> Replica:
        return self._by_name[self.placement.place(request.adapter, request.tokens, now)]

    def told(self, replica: Replica) -> None:
        self._by_name[replica.name] = replica
        self.placement.told(replica.name, replica.told)

    def lost(self, replica: Replica) -> None:
        self.placement.lost(replica.name)

    def answered(self, request: Request, now: float) -> None:
        if request.place is not None:
            self.placement.answered(request.place.name, now - request.at, now)

    def ended(self, request: Request, now: float) -> None:
        if request.place is not None:
            seconds = None if request.first is None else now - request.first + PREFILL_SECONDS
            name = request.place.name
            self.placement.ended(name, request.adapter, request.tokens, now, seconds=seconds)


class RoundRobin(Rule):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._next = itertools.count()

    def place(self, request: Request, live: Sequence[Replica], now: float) -> Replica:
        return live[next(self._next) % len(live)]


class LeastLoaded(Rule):
    def place(self, request: Request, live: Sequence[Replica], now: float) -> Replica:
        return min(live, key=lambda one: (one.sent, self.random.random()))


class ConsistentHashing(Rule):
    """One home for each adapter."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._orders: dict[str, Sequence[str]] = {}
        self._count = 0

    def place(self, request: Request, live: Sequence[Replica], now: float) -> Replica:
        if len(live) != self._count:
            self._count, self._orders = len(live), {}
        if request.adapter not in self._orders:
            self._orders[request.adapter] = order_of(request.adapter, {one.name: 1 for one in live})[:1]
        home = self._orders[request.adapter][0]
        return next(one for one in live if one.name == home)


class Multiplexed(Rule):
    """As Ray Serve's router for multiplexed models: of two replicas that say they have the model the one with
    less to do; of any two where none does, or all that do are full."""

    def place(self, request: Request, live: Sequence[Replica], now: float) -> Replica:
        having = [one for one in live if request.adapter in one.told.in_slots and one.sent < ROWS]
        pair = self.random.sample(having or live, min(2, len(having or live)))
        return min(pair, key=lambda one: one.sent)


RULES: dict[str, type[Rule]] = {
    "OneBase": OneBase,
    "multiplexed (Ray)": Multiplexed,
    "consistent hashing": ConsistentHashing,
    "least loaded": LeastLoaded,
    "round robin": RoundRobin,
}
IDEAL = "infinite memory"


# ---- scenarios -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """What happens. load: of what all rows can do; skew: of Zipf's law over the adapters."""

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


SCENARIOS = {
    "steady": Scenario(),
    "skewed": Scenario(skew=1.2),
    "churn": Scenario(churn=0.001),
    "crowd": Scenario(crowd=0.1),
    "loss": Scenario(lost=10),
    "slow": Scenario(slow=3),
}


def requests(scenario: Scenario, replicas: int, adapters: int, seconds: float, seed: int) -> list[Request]:
    """All that come, by time."""
    chance = random.Random(seed)
    mean = PREFILL_SECONDS + TOKENS * TOKEN_SECONDS
    rate = scenario.load * replicas * ROWS / mean
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
        tokens = max(1.0, min(400.0, chance.expovariate(1 / TOKENS)))
        made.append(Request(adapter, now, tokens * TOKEN_SECONDS, tokens))
    return made


@dataclass
class Outcome:
    """Of one rule in one scenario. recovered: seconds from a loss until TTFT's p99 was as before; times and
    waits: of the requests that are counted."""

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
    prefetch: int = 3,
    endless: bool = False,
    tick: Callable[[float], None] = lambda now: None,
) -> Outcome:
    """What comes of it, for requests that come after WARMING."""
    there = [Replica(f"r{number}", endless) for number in range(replicas)]
    by_name = {one.name: one for one in there}
    for number in range(adapters):
        for home in order_of(f"a{number}", dict.fromkeys(by_name, SLOTS))[:prefetch]:
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
        push(TELL_SECONDS * number / replicas, "tell", None, one)
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
            push(now + TELL_SECONDS, "tell", None, replica)
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


# ---- the run ---------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, default=100)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the simulated time (default: 60)")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--prefetch", type=int, default=3, help="replicas that activation puts it on (3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="write a picture here (needs matplotlib)")
    options = parser.parse_args()
    console = Console()
    found: dict[str, dict[str, Outcome]] = {}
    for name in options.scenarios:
        found[name] = run(name, options, console)
        show(name, found[name], options, console)
    if options.plot:
        draw(found, options, options.plot)
        console.print(f"{options.plot}: TTFT's p99, cold starts, evictions and imbalance")


def run(name: str, options: argparse.Namespace, console: Console) -> dict[str, Outcome]:
    scenario = SCENARIOS[name]
    outcomes: dict[str, Outcome] = {}
    cases: list[tuple[str, type[Rule], bool]] = [(IDEAL, LeastLoaded, True)]
    cases += [(rule, RULES[rule], False) for rule in options.rules]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for title, rule, endless in cases:
            task = progress.add_task(f"{name}: {title}", total=options.seconds)
            coming = requests(scenario, options.replicas, options.adapters, options.seconds, options.seed)
            outcomes[title] = simulate(
                rule(options.seed),
                scenario,
                coming,
                options.replicas,
                options.adapters,
                options.seconds,
                prefetch=options.prefetch,
                endless=endless,
                tick=lambda now, task=task: progress.update(task, completed=now),  # type: ignore[misc]
            )
            progress.remove_task(task)
    return outcomes


def show(name: str, outcomes: dict[str, Outcome], options: argparse.Namespace, console: Console) -> None:
    scenario = SCENARIOS[name]
    columns = ["rule", "TTFT p50", "p99", "p99 to ideal", "cold starts", "evictions", "busiest to mean"]
    table = Table(*columns, *(["recovered in"] if scenario.lost else []), title=f"{name}: {scenario}")
    ideal = outcomes[IDEAL].waited(0.99)
    for title, made in outcomes.items():
        cells = [
            title,
            f"{made.waited(0.5):.3f} s",
            f"{made.waited(0.99):.3f} s",
            f"{made.waited(0.99) / ideal:.2f}",
            f"{100 * made.cold / max(1, len(made.waits)):.2f}%",
            f"{made.evictions:,}",
            f"{made.imbalance:.2f}",
        ]
        if scenario.lost:
            cells.append(f"{made.recovered(options.seconds / 2, 2 * ideal):.0f} s")
        table.add_row(*cells)
    console.print(table)


def draw(found: dict[str, dict[str, Outcome]], options: argparse.Namespace, file: Path) -> None:
    """Four panels in one picture: bars by scenario and rule."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[tuple[str, Callable[[Outcome], float]]] = [
        ("TTFT p99, s", lambda made: made.waited(0.99)),
        ("cold starts, % of requests", lambda made: 100 * made.cold / max(1, len(made.waits))),
        ("evictions", lambda made: made.evictions),
        ("busiest replica to the mean", lambda made: made.imbalance),
    ]
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 8))
    titles = [IDEAL, *options.rules]
    width = 0.8 / len(titles)
    for (label, value), panel in zip(panels, axes.flatten(), strict=True):
        for number, title in enumerate(titles):
            places = [index + (number - len(titles) / 2) * width for index in range(len(found))]
            heights = [value(outcomes[title]) for outcomes in found.values()]
            panel.bar(places, heights, width, label=title)
        panel.set_xticks(range(len(found)), list(found))
        panel.set_ylabel(label)
        panel.grid(axis="y", alpha=0.3)
        if label.startswith("TTFT"):
            panel.set_yscale("log")
    figure.suptitle(f"{options.replicas} replicas, {options.adapters:,} adapters")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
