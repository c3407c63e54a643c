"""Pictures of a run of `serve.py`: speed along each sweep, and how the times of single streams are spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report import Figures, Run, sweep_points
from bench.workload import Scenario

AXES = {
    "streams": ("streams at the same time, over all adapters", "tokens/s"),
    "adapters": ("distinct adapters among the streams (0: base only)", "tokens/s"),
    "rank": ("rank of the adapters", "tokens/s"),
    "prompt": ("tokens of the prompt, one stream", "TTFT, s"),
}
"""Sweep -> what its two axes say."""


def draw(
    runs: Sequence[Run],
    figures: dict[str, dict[str, Figures]],
    scenarios: Sequence[Scenario],
    title: str,
    file: Path,
) -> None:
    """Six panels in one PNG: four sweeps, and the distributions of TTFT and TPOT in the mixed load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

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
    """The share of streams that took at most so long, by target."""
    from matplotlib.ticker import LogLocator, NullFormatter

    panel.set(xlabel=below, ylabel="share of streams", ylim=(0, 1.02))
    if not runs:
        panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, ha="center")
        return
    for target, color in colors.items():
        samples = [sample for run in runs if run.target == target for sample in run.samples]
        times = sorted(getattr(sample, time) for sample in samples)
        shares = [(index + 1) / len(times) for index in range(len(times))]
        panel.step(times, shares, color=color, where="post")
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.xaxis.set_minor_formatter(NullFormatter())
