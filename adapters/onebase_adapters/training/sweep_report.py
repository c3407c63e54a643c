"""What a sweep has found: a table for the terminal, CSV and JSON for programs, advice for people."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from onebase_adapters.store.atomic_files import write_atomically
from onebase_adapters.training.sweep import SweepResult
from onebase_adapters.training.sweep_plot import plot
from onebase_adapters.training.sweep_trials import Trial

TABLE, RESULTS, PLOT = "results.csv", "results.json", "sweep.svg"
_NEAR = 1.01
"""A loss is as good as the best one up to this factor."""
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
