#!/usr/bin/env python3
"""Simulates many replicas of one base and thousands of adapters, without a model: the server's own placement
against rules that others have, on the same requests.

  python benchmarks/cluster_sim.py                        # 100 replicas, 10,000 adapters, every scenario
  python benchmarks/cluster_sim.py --scenarios steady loss --seconds 30      # a look

When the simulation begins, each adapter is in the host memory of the first replicas of its order
(`--prefetch`).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.simulation import (
    TOKENS,
    Figures,
    OneBase,
    Outcome,
    Replica,
    Request,
    Rule,
    Scenario,
    requests,
    simulate,
)
from onebase_route.placement import order_of

FIGURES = Figures()


# ---- rules ---------------------------------------------------------------------------------------


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
    """Rule of Ray Serve's router for multiplexed models.

    It draws two replicas that say they have the model, or any two where none does or all that do are full,
    and picks the one with less to do.
    """

    def place(self, request: Request, live: Sequence[Replica], now: float) -> Replica:
        having = [one for one in live if request.adapter in one.told.in_slots and one.sent < FIGURES.rows]
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


SCENARIOS = {
    "steady": Scenario(),
    "skewed": Scenario(skew=1.2),
    "churn": Scenario(churn=0.001),
    "crowd": Scenario(crowd=0.1),
    "loss": Scenario(lost=10),
    "slow": Scenario(slow=3),
}


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
            mean = FIGURES.prefill_seconds + TOKENS * FIGURES.token_seconds
            rate = scenario.load * options.replicas * FIGURES.rows / mean
            coming = requests(scenario, rate, options.adapters, options.seconds, options.seed)
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
