"""Report a sweep's results: a table, a plot and advice for people, CSV and JSON for programs."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from onebase_adapters.store.atomic_files import write_atomically
from onebase_training.sweep import SweepResult, Trial

TABLE, RESULTS, PLOT = "results.csv", "results.json", "sweep.svg"
_NEAR = 1.01
"""Factor up to which a loss is as good as the best one."""
_COLOURS = ("#3b6fb6", "#d9822b", "#3f9b6d", "#b8487f", "#7a5bb5", "#8a7a2f", "#4aa3b8", "#777777")
"""Colours that are distinct also for colour-blind people (after Okabe and Ito)."""
_INK, _SOFT, _GRID = "#222831", "#6b7480", "#e6e9ee"
_SVG, _POINT = "http://www.w3.org/2000/svg", "run-"
_COLUMNS = ("r", "alpha", "targets", "rate", "MB", "loss", "steps", "time")
_STYLES = {"finished": "", "failed": "red", "stopped": "dim", "paused": "yellow", "waiting": "yellow"}


def write(result: SweepResult) -> None:
    """Write the table, the results and the plot into the sweep's folder."""
    write_atomically(result.folder / TABLE, _csv(result))
    best = result.best
    found = {
        "best": best.name if best else None,
        "base_loss": None if math.isnan(result.base_loss) else result.base_loss,
        "steps": result.steps,
        "runs": [{**asdict(trial), "loss": trial.loss} for trial in result.trials],
    }
    write_atomically(result.folder / RESULTS, json.dumps(found, indent=1, allow_nan=False))
    write_atomically(result.folder / PLOT, plot(result))


def _csv(result: SweepResult) -> str:
    file = io.StringIO()
    rows = [_row(trial) for trial in result.trials]
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)) or ["name"])
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _row(trial: Trial) -> dict[str, Any]:
    loss = trial.loss
    return {
        "name": trial.name,
        "r": trial.r,
        "alpha": trial.alpha,
        "targets": "+".join(trial.targets),
        "learning_rate": trial.learning_rate,
        "parameters": trial.parameters,
        "adapter_mb": round(4 * trial.parameters / 1e6, 3),
        "status": trial.status,
        "steps": trial.step,
        "seconds": round(trial.seconds, 2),
        "loss": "" if loss is None else round(loss, 6),
        **{f"metric {name}": round(value, 4) for name, value in trial.metrics.items()},
    }


def render(result: SweepResult, console: Console) -> None:
    """Print the runs, best first, and the advice; through a pipe columns are separated by tabs."""
    if console.is_terminal:
        console.print(Group(_table(result), Text()))
    else:
        for row in ([*_COLUMNS, "state"], *(_cells(result, trial) for trial in result.trials)):
            print(*row, sep="\t", file=console.file)
    for line in advice(result):
        console.print(line, highlight=False, soft_wrap=True)


def _table(result: SweepResult) -> Table:
    table = Table(
        title=f"Held-out loss, best first (base {result.base_loss:.4f})",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for name in _COLUMNS:
        if name == "targets":
            table.add_column(name, overflow="ellipsis", no_wrap=True, min_width=10, max_width=30)
        else:
            table.add_column(name, justify="right", no_wrap=name not in ("r", "alpha"))
    table.add_column("", no_wrap=True)
    for trial in result.trials:
        style = "bold green" if trial is result.best else _STYLES[trial.status]
        table.add_row(*_cells(result, trial), style=style)
    return table


def _cells(result: SweepResult, trial: Trial) -> list[str]:
    """Return the cells of _COLUMNS, and the run's state."""
    return [
        str(trial.r),
        f"{trial.alpha:g}",
        ", ".join(trial.targets),
        f"{trial.learning_rate:g}",
        f"{4 * trial.parameters / 1e6:.1f}",
        "" if trial.loss is None else f"{trial.loss:.4f}",
        f"{trial.step}/{result.steps}",
        seconds(trial.seconds),
        "best" if trial is result.best else "" if trial.status == "finished" else trial.status,
    ]


def advice(result: SweepResult) -> list[str]:
    """Return sentences on the best run, a smaller one that is as good, and failed runs."""
    best = result.best
    lines = []
    if best is None or best.loss is None:
        lines.append("No run has finished.")
    else:
        lines.append(f"Best: {best.name}. Its adapter is in {result.adapter(best)}")
        if best.loss >= result.base_loss:
            lines.append("It is no better than the base on the held-out rows.")
        small = min(
            (t for t in result.trials if t.status == "finished" and (t.loss or 0) <= _NEAR * best.loss),
            key=lambda trial: trial.parameters,
        )
        if small.parameters < best.parameters:
            part = small.parameters / best.parameters
            lines.append(f"As good within 1%, at {part:.0%} of the size: {small.name}")
        lines += _edges(result, best)
    lines += [f"{trial.name} failed: {trial.reason}" for trial in result.trials if trial.status == "failed"]
    return lines


def _edges(result: SweepResult, best: Trial) -> list[str]:
    """Return advice to try values beyond the end of a range, if the best run is at that end."""
    lines = []
    for name, label in (("learning_rate", "learning rate"), ("r", "rank")):
        values = sorted({getattr(trial, name) for trial in result.trials})
        chosen = getattr(best, name)
        if len(values) > 1 and chosen in (values[0], values[-1]):
            way = "lower" if chosen == values[0] else "higher"
            lines.append(f"The best {label} is the {way[:-2]}est that was tried: try a {way} one too.")
    return lines


def seconds(value: float) -> str:
    """Format a duration: 41 s, 12 min, 3.4 h."""
    if value < 100:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.1f} h"


def plot(result: SweepResult) -> str:
    """Plot held-out loss against parameters, and against time of training; returns an SVG document.

    Pointing at a run shows its name.
    """
    drawn = [trial for trial in result.trials if trial.loss is not None and math.isfinite(trial.loss)]
    figure = Figure(figsize=(11.2, 5.6), layout="constrained")
    figure.suptitle(_title(result), x=0.01, ha="left", color=_SOFT)
    if drawn:
        sizes, times = figure.subplots(1, 2, sharey=True)
        colours = _colours(drawn)
        _draw_sizes(sizes, drawn, colours)
        _draw_times(times, drawn, colours, result.best)
        _mark_best(sizes, result.best)
        for axes in (sizes, times):
            axes.set_ylim(*_loss_range(drawn))
            axes.grid(axis="y", color=_GRID)
            axes.tick_params(labelleft=True, color=_SOFT, labelcolor=_SOFT)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.set_title("held-out loss", loc="left", fontsize="medium")
        handles = [Line2D([], [], marker="o", linestyle="", color=colour) for colour in colours.values()]
        names = [name if len(name) <= 60 else f"{name[:57]}..." for name in colours]
        figure.legend(handles, names, loc="outside lower left", ncols=min(3, len(names)), frameon=False)
    else:
        figure.text(0.5, 0.5, "no run has been evaluated yet", ha="center", color=_SOFT)
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sweep"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return _with_tooltips(file.getvalue(), result.trials)


def _title(result: SweepResult) -> str:
    whole = sum(trial.status == "finished" for trial in result.trials)
    stopped = sum(trial.status == "stopped" for trial in result.trials)
    base = f"base {result.base_loss:.4f}" if math.isfinite(result.base_loss) else "base unknown"
    return (
        f"Sweep of {len(result.trials)} runs: {whole} to the end (filled), {stopped} stopped early (hollow); "
        f"{result.steps} steps; {base}"
    )


def _series(trial: Trial) -> str:
    return f"{', '.join(trial.targets)}, learning rate {trial.learning_rate:g}"


def _colours(trials: Sequence[Trial]) -> dict[str, str]:
    """Return colours by targets and learning rate; the ranks are along the x axis."""
    names = sorted({(tuple(t.targets), t.learning_rate, _series(t)) for t in trials})
    return {name: _COLOURS[place % len(_COLOURS)] for place, (_, _, name) in enumerate(names)}


def _loss_range(trials: Sequence[Trial]) -> tuple[float, float]:
    """Return the range from the best to the worst of the last losses; first losses would compress it."""
    ends = [trial.loss_at(trial.step) for trial in trials if math.isfinite(trial.loss_at(trial.step))]
    low = min(trial.loss or math.inf for trial in trials)
    high = max([*ends, low * 1.02, low + 1e-4])
    # Nothing is below the best run but its label.
    return low - 0.16 * (high - low), high + 0.08 * (high - low)


def _draw_sizes(axes: Axes, trials: Sequence[Trial], colours: Mapping[str, str]) -> None:
    for name, colour in colours.items():
        whole = sorted(
            (t.parameters, t.loss or 0.0) for t in trials if _series(t) == name and t.status == "finished"
        )
        axes.plot(*zip(*whole, strict=True) if whole else ((), ()), color=colour, alpha=0.5)
    for trial in trials:
        _draw_end(axes, trial, max(trial.parameters, 1), trial.loss or 0.0, colours[_series(trial)])
    sizes = sorted({max(trial.parameters, 1) for trial in trials})
    ticks = sizes[:1]  # the sizes that there are, as far as their labels have room
    for size in sizes:
        if size / ticks[-1] > 1.35:
            ticks.append(size)
    axes.set_xscale("log")
    axes.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
    axes.set_xticks(ticks, [f"{s / 1e3:.3g} K" if s < 1e6 else f"{s / 1e6:.3g} M" for s in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("parameters of the adapter")


def _draw_times(axes: Axes, trials: Sequence[Trial], colours: Mapping[str, str], best: Trial | None) -> None:
    longest = max(trial.seconds for trial in trials) or 1.0
    unit, word = (1, "s") if longest < 240 else (60, "min") if longest < 4 * 3600 else (3600, "h")
    for trial in trials:
        points = [(at / unit, loss) for _, at, loss in trial.curve if math.isfinite(loss)]
        whole, colour = trial.status == "finished", colours[_series(trial)]
        width = 3 if trial is best else 1.8 if whole else 1.2
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, alpha=0.95 if whole else 0.4)
        if math.isfinite(trial.curve[-1][2]):
            _draw_end(axes, trial, trial.seconds / unit, trial.curve[-1][2], colour)
    axes.set_xlim(0, 1.04 * longest / unit)
    axes.set_xlabel(f"time of training ({word})")


def _draw_end(axes: Axes, trial: Trial, x: float, y: float, colour: str) -> None:
    """Draw a run's end: filled if it finished, hollow if it was stopped."""
    whole = trial.status == "finished"
    axes.plot(
        [x],
        [y],
        marker="o",
        markersize=8 if whole else 5.5,
        color=colour,
        markerfacecolor=colour if whole else "white",
        markeredgecolor="white" if whole else colour,
        zorder=3,
        clip_on=False,
        gid=f"{_POINT}{trial.name}",
    )


def _mark_best(axes: Axes, best: Trial | None) -> None:
    if best is None or best.loss is None:
        return
    at = (max(best.parameters, 1), best.loss)
    axes.plot(*at, marker="o", markersize=14, markerfacecolor="none", markeredgecolor=_INK, zorder=4)
    low, high = axes.get_xlim()
    late = math.log(at[0] / low) > 0.6 * math.log(high / low)
    axes.annotate(
        f"best: r {best.r}, {best.loss:.4f}",
        at,
        xytext=(7 if late else -7, -22),
        textcoords="offset points",
        ha="right" if late else "left",
        fontweight="bold",
        color=_INK,
    )


def _with_tooltips(svg: str, trials: Sequence[Trial]) -> str:
    """Return the document with a title in each run's points, which matplotlib does not write."""
    for space in ("", "xlink"):
        ElementTree.register_namespace(space, _SVG if not space else "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)
    named = {f"{_POINT}{trial.name}": trial for trial in trials}
    for node in root.iter(f"{{{_SVG}}}g"):
        if (trial := named.get(node.get("id", ""))) is not None:
            title = ElementTree.Element(f"{{{_SVG}}}title")
            loss = f"{trial.loss:.4f}" if trial.loss is not None else ""
            title.text = f"{trial.name}: {loss} ({trial.status} after {trial.step} steps)"
            node.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode")
