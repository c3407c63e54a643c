"""Figures of `serve.py` from the samples of its streams, their table, and their plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from bench.report import percentile
from bench.stream import Sample
from bench.workload import Scenario


@dataclass(frozen=True)
class Run:
    """One target's run of one scenario in one round."""

    target: str
    scenario: str
    round: int
    tokens_per_second: float
    samples: list[Sample]


@dataclass(frozen=True)
class Figures:
    """One target in one scenario: throughput as the median of the rounds, times over all streams."""

    tokens_per_second: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    """Seconds between two tokens of one stream."""
    rounds: list[float]
    """Tokens per second of each round: their spread tells how far to trust the median."""


def summarize(runs: Sequence[Run]) -> dict[str, dict[str, Figures]]:
    """Return figures by scenario, then by target, in the order of the runs."""
    groups: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        groups.setdefault(run.scenario, {}).setdefault(run.target, []).append(run)
    return {
        scenario: {target: _figures(group) for target, group in targets.items()}
        for scenario, targets in groups.items()
    }


def _figures(runs: list[Run]) -> Figures:
    samples = [sample for run in runs for sample in run.samples]
    ttfts = [sample.ttft for sample in samples]
    rounds = [run.tokens_per_second for run in runs]
    return Figures(
        tokens_per_second=median(rounds),
        ttft_p50=percentile(ttfts, 0.50),
        ttft_p99=percentile(ttfts, 0.99),
        tpot_p50=median(sample.tpot for sample in samples),
        rounds=rounds,
    )


def equal_texts(runs: Sequence[Run], target: str, reference: str) -> dict[str, tuple[int, int]]:
    """Return, by scenario, how many of the target's texts are the reference's, and of how many."""
    texts = {(run.target, run.scenario, run.round): [s.text for s in run.samples] for run in runs}
    counts: dict[str, tuple[int, int]] = {}
    for (name, scenario, number), ours in texts.items():
        theirs = texts.get((reference, scenario, number))
        if name == target and theirs is not None:
            equal, total = counts.get(scenario, (0, 0))
            matches = sum(a == b for a, b in zip(ours, theirs, strict=True))
            counts[scenario] = (equal + matches, total + len(ours))
    return counts


COLUMNS = ("load", "target", "tokens/s", "TTFT p50", "TTFT p99", "TPOT", "ratio", "by round")
"""Headings of the cells that `rows` gives; times are in milliseconds."""


def rows(figures: dict[str, dict[str, Figures]], scenarios: Sequence[Scenario], main: str) -> list[list[str]]:
    """Return the table's cells; ratio: the main target's tokens/s over that of the row's target."""
    cells: list[list[str]] = []
    for scenario in scenarios:
        targets = figures.get(scenario.key, {})
        ours = targets[main].tokens_per_second if main in targets else math.nan
        for target, figure in targets.items():
            ratio = "" if target == main or math.isnan(ours) else f"{ours / figure.tokens_per_second:.2f}x"
            times = f"{figure.ttft_p50 * 1e3:.0f}", f"{figure.ttft_p99 * 1e3:.0f}"
            rounds = ", ".join(f"{value:.1f}" for value in figure.rounds)
            speed, tpot = f"{figure.tokens_per_second:.1f}", f"{figure.tpot_p50 * 1e3:.1f}"
            cells.append([scenario.title, target, speed, *times, tpot, ratio, rounds])
    return cells


def compact(cells: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the cells for a terminal of 80 columns: the load is a line of its own above its targets."""
    lines: list[list[str]] = []
    for index, (load, target, *others) in enumerate(cells):
        if index == 0 or cells[index - 1][0] != load:
            lines.append([f"[bold]{load}[/]"])
        lines.append([f"  {target}", *others[:-1]])
    return lines
