"""A job on the terminal: what it is, its losses as a small chart, and base against adapter."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..._job_display import doing, figures
from ..._job_view import in_words
from ...training_types import CurvePoint, TrainingJobInfo, TrainingReport
from ..adapters.layers import HEIGHTS
from ..tables import Column, duration, line, size, table, when
from .common import loss, status_style

if TYPE_CHECKING:
    from rich.console import Console

CHART: Final = 48
"""Characters of a chart."""
_ASCII: Final = "_.-=*#%@"
_SHOWN: Final = ("r", "alpha", "targets", "epochs", "batch_size", "learning_rate")


def print_job(out: Console, job: TrainingJobInfo, curve: Sequence[CurvePoint]) -> None:
    """The job, then its losses, then base against adapter."""
    out.print(
        line(job.name, "bold") + line("  ") + line(in_words(job), status_style(job.status)), soft_wrap=True
    )
    validation = f", measured on {job.validation_file}" if job.validation_file else ""
    out.print(line(f"  {job.id}, created {when(job.created_at)}", "dim"), soft_wrap=True)
    out.print(
        line(f"  {job.method} on {job.model}, from {job.training_file}{validation}", "dim"), soft_wrap=True
    )
    out.print(line(f"  {_settings(job)}", "dim"), soft_wrap=True)
    if job.status == "running":
        out.print(line(f"  {doing(job)}  {figures(job)}".rstrip()), soft_wrap=True)
    if job.error is not None:
        out.print(line(f"  {job.error.message} ({job.error.code})", "red"), soft_wrap=True)
    _print_curve(out, curve)
    if job.report is not None:
        _print_report(out, job.report)
    if job.fine_tuned_model is not None:
        state = f"active: requests for {job.name} get it" if job.activated else "not active"
        out.print(line(f"{job.fine_tuned_model}  ") + line(state, "green" if job.activated else ""))


def _settings(job: TrainingJobInfo) -> str:
    """`r 16, alpha 32, targets all-linear, ...`."""
    parts = []
    for name in _SHOWN:
        value = job.settings.get(name)
        if isinstance(value, list):
            value = " ".join(map(str, value))
        if value not in (None, ""):
            parts.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(parts)


def _print_curve(out: Console, curve: Sequence[CurvePoint]) -> None:
    ascii_only = out.options.ascii_only
    for title, points in (
        ("training loss", [point.train_loss for point in curve]),
        ("held-out loss", [point.valid_loss for point in curve]),
    ):
        values = [value for value in points if value is not None]
        if len(values) > 1:
            chart = sparkline(values, CHART, ascii_only=ascii_only)
            ends = f"{values[0]:.4f} -> {values[-1]:.4f}"
            out.print(line(f"{title}  ") + line(chart, "cyan") + line(f"  {ends}"), soft_wrap=True)


@dataclass(frozen=True)
class _Measure:
    """One line of the table: how base and adapter did."""

    name: str
    base: str
    adapter: str
    better: bool | None


def _print_report(out: Console, report: TrainingReport) -> None:
    measures = _measures(report)
    if measures:
        out.print()
        out.print(table(_COLUMNS, measures, out.width))
        out.print()
    speed = f", {report.tokens / report.seconds:,.0f} tokens/s" if report.seconds else ""
    out.print(
        line(
            f"{report.steps} steps, the best one {report.best_step}; {report.tokens:,} tokens in "
            f"{duration(report.seconds)}{speed}; {report.parameters:,} parameters, "
            f"{size(report.adapter_bytes)}; at most {size(report.peak_memory_bytes)} of memory"
        ),
        soft_wrap=True,
    )


def _measures(report: TrainingReport) -> list[_Measure]:
    rows = []
    before, after = report.loss_before, report.loss_after
    if before is not None or after is not None:
        better = None if before is None or after is None or before == after else after < before
        rows.append(_Measure("held-out loss", loss(before), loss(after), better))
    for name in {**report.metrics_before, **report.metrics_after}:
        one, two = report.metrics_before.get(name), report.metrics_after.get(name)
        better = None if one is None or two is None or one == two else two > one
        rows.append(_Measure(name, _share(one), _share(two), better))
    return rows


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


_COLUMNS: tuple[Column[_Measure], ...] = (
    Column("", lambda row: row.name),
    Column("base", lambda row: row.base, right=True),
    Column(
        "adapter",
        lambda row: row.adapter,
        right=True,
        style=lambda row: "" if row.better is None else "green" if row.better else "red",
    ),
)


def sparkline(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """A chart of at most `width` characters, the lowest and the highest for the ends of the values.

    Where there are more values than characters, each character is the mean of its share.
    """
    heights = _ASCII if ascii_only else HEIGHTS
    count = min(width, len(values))
    edges = [round(place * len(values) / count) for place in range(count + 1)] if count else [0]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    if high <= low:
        return heights[0] * len(means)
    return "".join(heights[min(7, int((mean - low) / (high - low) * 8))] for mean in means)
