"""What a sweep has found: a table for the terminal, CSV and JSON for programs, advice for people."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from onebase_adapters.training.checkpoint import write_whole
from onebase_adapters.training.sweep import SweepResult, Trial

TABLE, RESULTS, PLOT = "results.csv", "results.json", "sweep.svg"
_NEAR = 1.01
"""A loss is as good as the best one up to this factor."""
_STYLES = {"finished": "", "failed": "red", "stopped": "dim", "paused": "yellow", "waiting": "yellow"}


def write(result: SweepResult) -> None:
    """Write the table, the results and the plot into the sweep's folder."""
    write_whole(result.folder / TABLE, _csv(result))
    best = result.best
    found = {
        "best": best.name if best else None,
        "base_loss": None if math.isnan(result.base_loss) else result.base_loss,
        "steps": result.steps,
        "runs": [{**asdict(trial), "loss": trial.loss} for trial in result.trials],
    }
    write_whole(result.folder / RESULTS, json.dumps(found, indent=1, allow_nan=False))
    write_whole(result.folder / PLOT, plot(result))


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
    """Print the runs, best first, and what to take."""
    console.print(Group(_table(result), Text()))
    for line in advice(result):
        console.print(line, highlight=False, soft_wrap=True)


def _table(result: SweepResult) -> Table:
    table = Table(
        title=f"Held-out loss, best first (base {result.base_loss:.4f})",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for name in ("r", "alpha"):
        table.add_column(name, justify="right")
    table.add_column("targets", overflow="ellipsis", no_wrap=True, min_width=10, max_width=30)
    for name in ("rate", "MB", "loss", "steps", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for trial in result.trials:
        best = trial is result.best
        table.add_row(
            str(trial.r),
            f"{trial.alpha:g}",
            ", ".join(trial.targets),
            f"{trial.learning_rate:g}",
            f"{4 * trial.parameters / 1e6:.1f}",
            "" if trial.loss is None else f"{trial.loss:.4f}",
            f"{trial.step}/{result.steps}",
            seconds(trial.seconds),
            "best" if best else "" if trial.status == "finished" else trial.status,
            style="bold green" if best else _STYLES[trial.status],
        )
    return table


def advice(result: SweepResult) -> list[str]:
    """Which run to take; a smaller one that is as good; what failed."""
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
    """The best run at the end of what was tried may have a better one beyond it."""
    lines = []
    for name, label in (("learning_rate", "learning rate"), ("r", "rank")):
        values = sorted({getattr(trial, name) for trial in result.trials})
        chosen = getattr(best, name)
        if len(values) > 1 and chosen in (values[0], values[-1]):
            way = "lower" if chosen == values[0] else "higher"
            lines.append(f"The best {label} is the {way[:-2]}est that was tried: try a {way} one too.")
    return lines


def seconds(value: float) -> str:
    """A duration, short: 41 s, 12 min, 3.4 h."""
    if value < 100:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.1f} h"


WIDTH, HEIGHT = 1120, 560
_TOP, _BOTTOM, _LEFT, _GAP, _RIGHT = 96, 116, 76, 84, 36
_COLOURS = ("#3b6fb6", "#d9822b", "#3f9b6d", "#b8487f", "#7a5bb5", "#8a7a2f", "#4aa3b8", "#777777")
"""Told apart also by people who see colours otherwise (after Okabe and Ito)."""
_INK, _SOFT, _GRID = "#222831", "#6b7480", "#e6e9ee"
_ROOM = 0.08


@dataclass(frozen=True)
class _Panel:
    """A plot's place, in pixels, and what its axes mean. `log`: the x axis grows by factors."""

    left: float
    width: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log: bool

    def x(self, value: float) -> float:
        low, high = self.x_range
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-9))
        return self.left + self.width * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (value - low) / (high - low)


def plot(result: SweepResult) -> str:
    """Held-out loss against parameters, and against time of training; an SVG document."""
    trials = [trial for trial in result.trials if trial.loss is not None and math.isfinite(trial.loss)]
    body = [_title(result)]
    if trials:
        colours = _colours(trials)
        width = (WIDTH - _LEFT - _GAP - _RIGHT) / 2
        losses = _loss_range(trials)
        sizes = _Panel(_LEFT, width, _size_range(trials), losses, log=True)
        longest = max(trial.seconds for trial in trials) or 1.0
        times = _Panel(_LEFT + width + _GAP, width, (0.0, 1.04 * longest), losses, log=False)
        body += _frame(sizes, _size_ticks(trials), _millions, "parameters of the adapter")
        body += _frame(times, _time_ticks(longest), _time, "time of training")
        body += _by_size(sizes, trials, colours, result.best)
        body += _by_time(times, trials, colours, result.best)
        body += _legend(colours)
    else:
        body.append(_text(WIDTH / 2, HEIGHT / 2, "no run has been evaluated yet", _SOFT, anchor="middle"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" font-size="13">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _series(trial: Trial) -> str:
    return f"{', '.join(trial.targets)}, learning rate {trial.learning_rate:g}"


def _colours(trials: Sequence[Trial]) -> dict[str, str]:
    """By targets and learning rate; what is left to tell apart, the ranks, is along the x axis."""
    names = sorted({(tuple(t.targets), t.learning_rate, _series(t)) for t in trials})
    return {name: _COLOURS[place % len(_COLOURS)] for place, (_, _, name) in enumerate(names)}


def _loss_range(trials: Sequence[Trial]) -> tuple[float, float]:
    """From the best to the worst of the last losses: how the runs begin would hide how they end."""
    ends = [trial.loss_at(trial.step) for trial in trials if math.isfinite(trial.loss_at(trial.step))]
    low = min(trial.loss or math.inf for trial in trials)
    high = max([*ends, low * 1.02, low + 1e-4])
    # Nothing is below the best run but its label.
    return low - 2 * _ROOM * (high - low), high + _ROOM * (high - low)


def _size_range(trials: Sequence[Trial]) -> tuple[float, float]:
    sizes = [max(trial.parameters, 1) for trial in trials]
    return min(sizes) / 1.5, max(sizes) * 1.5


def _size_ticks(trials: Sequence[Trial]) -> list[float]:
    """The sizes that there are, as far as their labels have room."""
    ticks: list[float] = []
    for size in sorted({float(max(trial.parameters, 1)) for trial in trials}):
        if not ticks or size / ticks[-1] > 1.35:
            ticks.append(size)
    return ticks


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers within the range."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= next((factor for factor in (1, 2, 5) if (high - low) / (factor * step) <= about), 10)
    first = math.ceil(low / step)
    return [step * place for place in range(first, math.floor(high / step) + 1)]


def _time_ticks(longest: float) -> list[float]:
    """Round numbers of the unit that `_time` will choose for most of them."""
    unit = 1 if longest < 240 else 60 if longest < 4 * 3600 else 3600
    return [unit * tick for tick in _ticks(0.0, longest / unit, 6)]


def _frame(panel: _Panel, ticks: Sequence[float], label: Callable[[float], str], title: str) -> list[str]:
    """Grid, labels and titles of a panel."""
    left, right, bottom = panel.left, panel.left + panel.width, HEIGHT - _BOTTOM
    parts = []
    losses = [loss for loss in _ticks(*panel.y_range, 6) if loss >= 0]
    places = max(0, -math.floor(math.log10(losses[1] - losses[0]))) if len(losses) > 1 else 3
    for loss in losses:
        y = panel.y(loss)
        parts.append(f'<line x1="{left}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_GRID}"/>')
        parts.append(_text(left - 10, y + 4, f"{loss:.{places}f}", _SOFT, anchor="end"))
    parts.append(f'<line x1="{left}" x2="{right:.1f}" y1="{bottom}" y2="{bottom}" stroke="{_SOFT}"/>')
    for tick in ticks:
        x = panel.x(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}" stroke="{_SOFT}"/>')
        parts.append(_text(x, bottom + 20, label(tick), _SOFT, anchor="middle"))
    parts.append(_text(left + panel.width / 2, bottom + 42, title, _INK, anchor="middle"))
    parts.append(_text(left, _TOP - 14, "held-out loss", _INK))
    return parts


def _by_size(
    panel: _Panel, trials: Sequence[Trial], colours: dict[str, str], best: Trial | None
) -> list[str]:
    parts = []
    for name, colour in colours.items():
        whole = sorted(
            (t.parameters, t.loss or 0.0) for t in trials if _series(t) == name and t.status == "finished"
        )
        parts.append(_line([(panel.x(size), panel.y(loss)) for size, loss in whole], colour, 2, 0.5))
    for trial in trials:
        x, y = panel.x(max(trial.parameters, 1)), panel.y(trial.loss or 0.0)
        parts.append(_dot(x, y, colours[_series(trial)], trial))
    if best is not None:
        parts += _best(panel.x(max(best.parameters, 1)), panel.y(best.loss or 0.0), best, panel)
    return parts


def _by_time(
    panel: _Panel, trials: Sequence[Trial], colours: dict[str, str], best: Trial | None
) -> list[str]:
    low, high = panel.y_range
    top, bottom = panel.y(high), panel.y(low)
    parts = [
        f'<clipPath id="times"><rect x="{panel.left}" y="{top:.1f}" width="{panel.width:.1f}" '
        f'height="{bottom - top:.1f}"/></clipPath>',
        '<g clip-path="url(#times)">',
    ]
    for trial in trials:
        points = [(panel.x(at), panel.y(loss)) for _, at, loss in trial.curve if math.isfinite(loss)]
        whole = trial.status == "finished"
        width = 3.5 if trial is best else 2 if whole else 1.5
        parts.append(_line(points, colours[_series(trial)], width, 0.95 if whole else 0.4))
    parts.append("</g>")
    for trial in trials:
        _, at, loss = trial.curve[-1]
        if math.isfinite(loss):
            parts.append(_dot(panel.x(at), panel.y(loss), colours[_series(trial)], trial))
    return parts


def _best(x: float, y: float, trial: Trial, panel: _Panel) -> list[str]:
    label = f"best: r {trial.r}, {trial.loss:.4f}"
    late = x > panel.left + 0.6 * panel.width
    place = (x + 9, "end") if late else (x - 9, "start")
    return [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="10" fill="none" stroke="{_INK}" stroke-width="1.5"/>',
        '<g paint-order="stroke" stroke="white" stroke-width="4">',
        _text(place[0], y + 26, label, _INK, anchor=place[1], weight=600),
        "</g>",
    ]


def _dot(x: float, y: float, colour: str, trial: Trial) -> str:
    """Filled where the run came to its end, hollow where it was stopped. Pointing at it tells its name."""
    loss = f"{trial.loss:.4f}" if trial.loss is not None else ""
    title = f"<title>{escape(trial.name)}: {loss} ({trial.status} after {trial.step} steps)</title>"
    if trial.status == "finished":
        style = f'fill="{colour}" stroke="white" stroke-width="1.5"'
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" {style}>{title}</circle>'
    style = f'fill="white" stroke="{colour}" stroke-width="1.5" opacity="0.7"'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {style}>{title}</circle>'


def _line(points: Sequence[tuple[float, float]], colour: str, width: float, opacity: float) -> str:
    if len(points) < 2:
        return ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" '
        f'stroke-linejoin="round" opacity="{opacity}"/>'
    )


def _legend(colours: dict[str, str]) -> list[str]:
    parts, x, y = [], float(_LEFT), HEIGHT - 44.0
    for name, colour in colours.items():
        shown = name if len(name) <= 60 else name[:57] + "..."
        width = 34 + 6.6 * len(shown)
        if x + width > WIDTH - _RIGHT and x > _LEFT:
            x, y = float(_LEFT), y + 20
        parts.append(f'<circle cx="{x + 6:.1f}" cy="{y - 4:.1f}" r="6" fill="{colour}"/>')
        parts.append(_text(x + 18, y, shown, _INK))
        x += width
    return parts


def _title(result: SweepResult) -> str:
    whole = sum(trial.status == "finished" for trial in result.trials)
    stopped = sum(trial.status == "stopped" for trial in result.trials)
    base = f"base {result.base_loss:.4f}" if math.isfinite(result.base_loss) else "base unknown"
    facts = (
        f"{len(result.trials)} runs: {whole} to the end (filled), {stopped} stopped early (hollow); "
        f"{result.steps} steps; {base}"
    )
    return _text(_LEFT, 34, "Sweep", _INK, size=20, weight=600) + _text(_LEFT, 56, facts, _SOFT)


def _text(
    x: float, y: float, text: str, colour: str, *, anchor: str = "start", size: int = 13, weight: int = 400
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )


def _millions(value: float) -> str:
    if value < 1e5:
        return f"{value / 1e3:.1f} K"
    return f"{value / 1e6:.3g} M"


def _time(value: float) -> str:
    if value < 240:
        return f"{value:g} s"
    return f"{value / 60:.4g} min" if value < 4 * 3600 else f"{value / 3600:.3g} h"
