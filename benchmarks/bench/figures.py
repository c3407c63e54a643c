"""Figures of `serve.py` from the samples of its streams, their table, and their plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

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


# ---- plots ----------------------------------------------------------------------------------------

AXES = {
    "streams": ("streams at the same time, over all adapters", "tokens/s"),
    "adapters": ("distinct adapters among the streams (0: base only)", "tokens/s"),
    "rank": ("rank of the adapters", "tokens/s"),
    "prompt": ("tokens of the prompt, one stream", "TTFT, s"),
}
"""Labels of the two axes, by sweep."""


def draw(runs: Sequence[Run], scenarios: Sequence[Scenario], title: str, file: Path) -> None:
    """Draw six panels in one PNG: four sweeps, and the distributions of TTFT and TPOT in the mixed load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    figures = summarize(runs)
    targets = list(dict.fromkeys(run.target for run in runs))
    colors = dict(zip(targets, pyplot.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    figure, panels = pyplot.subplots(2, 3, figsize=(15, 8.5))
    panels = panels.flatten()
    for panel, (sweep, (below, beside)) in zip(panels, AXES.items(), strict=False):
        lines = sweep_points(figures, scenarios, sweep)
        for target, line in lines.items():
            ys = [one.ttft_p50 if sweep == "prompt" else one.tokens_per_second for _, one in line]
            panel.plot([x for x, _ in line], ys, marker="o", label=target, color=colors[target])
        if sweep in ("streams", "rank"):
            panel.set_xscale("log", base=2)
            ticks = sorted({x for line in lines.values() for x, _ in line})
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.set(xlabel=below, ylabel=beside, ylim=(0, None))
        if not lines:
            panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, ha="center")
    mixed = [run for run in runs if run.scenario == "mixed"]
    _spread(panels[4], mixed, colors, "ttft", "TTFT of the mixed load, s")
    _spread(panels[5], mixed, colors, "tpot", "TPOT of the mixed load, s")
    for panel in panels:
        panel.grid(alpha=0.3)
    handles = [Line2D([], [], color=colors[target], marker="o", label=target) for target in targets]
    figure.suptitle(title)
    figure.legend(handles=handles, loc="lower center", ncols=len(targets), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _spread(panel: Any, runs: Sequence[Run], colors: dict[str, Any], time: str, below: str) -> None:
    """Draw the share of streams that took at most so long, by target."""
    panel.set(xlabel=below, ylabel="share of streams", ylim=(0, 1.02), xscale="log")
    if not runs:
        panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, ha="center")
    for target, color in colors.items():
        times = [getattr(sample, time) for run in runs if run.target == target for sample in run.samples]
        if times:
            panel.ecdf(times, color=color)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
