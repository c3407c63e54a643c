"""Figures from samples, and the tables made of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.table import Table

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


def percentile(values: Iterable[float], share: float) -> float:
    """Nearest rank: the smallest value that at least `share` (0 to 1) of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summarize(runs: Sequence[Run]) -> dict[str, dict[str, Figures]]:
    """Figures by scenario, then by target, in the order of the runs."""
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


def sweep_points(
    figures: dict[str, dict[str, Figures]], scenarios: Sequence[Scenario], sweep: str
) -> dict[str, list[tuple[int, Figures]]]:
    """Return each target's figures along the sweep's axis, in order."""
    lines: dict[str, list[tuple[int, Figures]]] = {}
    for scenario in scenarios:
        for name, x in scenario.points:
            for target, figure in figures.get(scenario.key, {}).items() if name == sweep else ():
                lines.setdefault(target, []).append((x, figure))
    return {target: sorted(line, key=lambda point: point[0]) for target, line in lines.items()}


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


def rows(
    figures: dict[str, dict[str, Figures]], scenarios: Sequence[Scenario], main: str
) -> list[tuple[str, ...]]:
    """Table cells; the last but one is the main target's tokens/s over that of the row's target."""
    cells: list[tuple[str, ...]] = []
    for scenario in scenarios:
        targets = figures.get(scenario.key, {})
        ours = targets[main].tokens_per_second if main in targets else math.nan
        for target, figure in targets.items():
            same = target == main or math.isnan(ours)
            cells.append(
                (
                    scenario.title,
                    target,
                    f"{figure.tokens_per_second:.1f}",
                    f"{figure.ttft_p50 * 1e3:.0f}",
                    f"{figure.ttft_p99 * 1e3:.0f}",
                    f"{figure.tpot_p50 * 1e3:.1f}",
                    "" if same else f"{ours / figure.tokens_per_second:.2f}x",
                    ", ".join(f"{value:.1f}" for value in figure.rounds),
                )
            )
    return cells


def rich_table(cells: Sequence[tuple[str, ...]], main: str, title: str) -> Table:
    """Return a table for a terminal of 80 columns: the load is a line of its own above its targets."""
    table = Table(
        title=title,
        caption=f"times in ms; ratio: {main}'s tokens/s over the target's",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for index, heading in enumerate(COLUMNS[1:-1]):
        table.add_column(heading if index else "", justify="right" if index else "left", no_wrap=True)
    for index, row in enumerate(cells):
        if index == 0 or cells[index - 1][0] != row[0]:
            table.add_row(f"[bold]{row[0]}[/]")
        last = index + 1 == len(cells) or cells[index + 1][0] != row[0]
        table.add_row(f"  {row[1]}", *row[2:-1], end_section=last)
    return table


def markdown_table(cells: Sequence[tuple[str, ...]]) -> str:
    rule = tuple("---" if index < 2 else "---:" for index in range(len(COLUMNS)))
    return "\n".join("| " + " | ".join(line) + " |" for line in (COLUMNS, rule, *cells)) + "\n"
