"""`onebase jobs list | show | checkpoints | events`: look at jobs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from ..._core.jobs import in_words
from ..._sync.client import Client
from ..._sync.jobs import TrainingJob
from ..._terminal.jobs import EventLines, doing, figures
from ..._terminal.ui import (
    Column,
    beginning,
    console,
    duration,
    line,
    note,
    print_table,
    size,
    sparkline,
    table,
    when,
)
from ...training_types import (
    ClassReport,
    CurvePoint,
    HeldOutReplies,
    LabelFigures,
    SliceReport,
    SliceResult,
    TrainingCheckpoint,
    TrainingEvent,
    TrainingJobInfo,
    TrainingReport,
    TrainingStop,
)
from ..command import OK, action_parser, count, perform, plain, print_json, short_id, whole_id

if TYPE_CHECKING:
    from rich.console import Console

PREFIX: Final = "ftjob-"
_SHORT_DIGEST: Final = 12

_CHART: Final = 48
"""Characters of a chart."""
_MOST_TARGETS: Final = 8
_MOST_CHANGED: Final = 5
_MOST_PLACES: Final = 10
_ODD: Final = {
    "truncated": "rows that are cut, since they are too long",
    "dropped": "rows that are left out, since they are too long",
    "duplicates": "rows that say the same as one before",
    "leakage": "rows that are held out as well, so that what is measured on them proves nothing",
    "same_prompt": "rows that ask the same as one held out",
}
_WIDEST_MATRIX: Final = 10
_MOST_CONFUSED: Final = 10
_WIDE: Final = 1.25
"""Ratio of the longest to the shortest time from which on both are shown."""
_OPTIONAL: Final = ("parent", "active")
"""Columns of the table of results that are left out where nothing was measured for them."""
_BASE_BY: Final = {
    "decide": "the label whose name it finds likeliest (/v1/decide)",
    "most_frequent": "always the label that most rows to train on have",
}
_SHOWN: Final = ("r", "alpha", "targets", "epochs", "batch_size", "learning_rate")

_DESCRIPTIONS: Final = {
    "list": "List the jobs of a server, the newest first. Losses are of held-out rows, base and adapter.",
    "show": "Show one job: its progress or its end, its losses, and base against adapter on held-out rows.",
    "checkpoints": """\
List the checkpoints of a job, the newest first. `resume` continues from the newest one. While a job
keeps one, requests may ask for it: onebase generate --adapter ADAPTER. One that has succeeded keeps
none.
""",
    "events": """\
Print the events of a job, the oldest first. With --follow, all of them, and then new ones until the
job ends; with --json too, each event is one line. Ctrl-C stops following, not the job.
""",
}
_EXAMPLES: Final = {
    "show": "  onebase jobs show ftjob-3f2a9c41\n",
    "events": "  onebase jobs events ftjob-3f2a9c41 --follow --json\n",
}


def run(action: str, argv: list[str]) -> int:
    """Run the action. Gives its exit status."""
    made = job_parser(action, _DESCRIPTIONS[action], _EXAMPLES.get(action, ""), one=action != "list")
    if action == "list":
        made.add_argument("--limit", type=count, default=50, metavar="N", help="the newest N (default: 50)")
    elif action == "events":
        made.add_argument(
            "--limit", type=int, default=100, metavar="N", help="the newest N (default: 100); 0: all"
        )
        made.add_argument("--follow", action="store_true", help="continue until the job ends")
    args = made.parse_args(argv)
    work = {"list": _list, "show": _show, "checkpoints": _checkpoints, "events": _events}[action]
    return perform(made, args, lambda client: work(client, args))


# ---- which job ---------------------------------------------------------------------------------------


def job_parser(
    action: str, description: str, examples: str = "", *, one: bool = True
) -> argparse.ArgumentParser:
    """Return a parser for an action on jobs, by default on one of them."""
    made = action_parser(f"jobs {action}", description, examples)
    if one:
        made.add_argument("job", metavar="ID")
    return made


def find(client: Client, wanted: str) -> TrainingJob:
    """Return the job of an id, or of the first digits of one.

    Raises:
        NotFoundError: there is no such job.
        ValueError: there are several, or too few digits.
    """
    # A list has no slices and classes.
    known = whole_id(wanted, PREFIX, "jobs", lambda: (job.id for job in client.training.list()))
    return client.training.get(known)


def short(job_id: str) -> str:
    """Return an id as people see it."""
    return short_id(job_id, PREFIX)


def status_style(status: str) -> str:
    """Return the style of a status, in rich's words."""
    return {"succeeded": "green", "failed": "red", "cancelled": "dim"}.get(status, "yellow")


_REWARD = "reward"
"""Measure of `reinforcement`, in place of a loss."""


def loss(value: float | None) -> str:
    """Return a loss in four decimals, nothing for None."""
    return "" if value is None else f"{value:.4f}"


# ---- all jobs -----------------------------------------------------------------------------------------


def _list(client: Client, args: argparse.Namespace) -> int:
    jobs = tuple(job.info for job in client.training.list(limit=args.limit))
    if args.json:
        print_json(jobs)
    elif jobs:
        print_table(COLUMNS, jobs)
    else:
        note("The server has no jobs. Begin one: onebase jobs create FILE --name NAME")
    return OK


def _step(job: TrainingJobInfo) -> str:
    return f"{job.progress.step}/{job.progress.steps}" if job.progress and job.progress.steps else ""


def _left(job: TrainingJobInfo) -> str:
    left = job.progress.seconds_left if job.progress and job.status == "running" else None
    return "" if left is None else duration(left)


def _after(job: TrainingJobInfo) -> float | None:
    if job.report is not None:
        return job.report.loss_after
    return job.progress.eval_loss if job.progress else None


def _active(job: TrainingJobInfo) -> str:
    return "" if job.activated is None else "yes" if job.activated else "no"


COLUMNS: tuple[Column[TrainingJobInfo], ...] = (
    Column("id", lambda job: short(job.id), style=lambda _: "bold"),
    Column("name", lambda job: job.name, shrink=True),
    Column("status", lambda job: job.status, style=lambda job: status_style(job.status)),
    Column("step", _step, right=True),
    Column("left", _left, right=True, spare=1),
    Column("base", lambda job: loss(job.report.loss_before) if job.report else "", right=True, spare=2),
    Column("adapter", lambda job: loss(_after(job)), right=True),
    Column("active", _active),
    Column("method", lambda job: job.method, spare=3),
    Column("created", lambda job: when(job.created_at), spare=2),
)


# ---- checkpoints and events ---------------------------------------------------------------------------


def _checkpoints(client: Client, args: argparse.Namespace) -> int:
    job = find(client, args.job)
    found = job.checkpoints()
    if args.json:
        print_json(found)
    elif found:
        print_table(_CHECKPOINT_COLUMNS, found)
    else:
        note(f"Job {short(job.id)} has no checkpoints (it is {in_words(job.info)}).")
    return OK


_CHECKPOINT_COLUMNS: tuple[Column[TrainingCheckpoint], ...] = (
    Column("step", lambda item: str(item.step), right=True),
    Column("training loss", lambda item: loss(item.metrics.get("train_loss")), right=True),
    Column("held-out loss", lambda item: loss(item.metrics.get("valid_loss")), right=True),
    Column("saved", lambda item: when(item.created_at)),
    Column("adapter", lambda item: item.model, style=lambda _: "dim"),
)


def _events(client: Client, args: argparse.Namespace) -> int:
    job = find(client, args.job)
    log = EventLines()
    if args.follow:
        with job.stream_events() as events:
            for event in events:
                _print_event(event, log, args.json)
        return OK
    found = job.events(limit=args.limit or None)[::-1]
    if args.json:
        print_json(found)
    else:
        for event in found:
            _print_event(event, log, False)
    return OK


def _print_event(event: TrainingEvent, log: EventLines, as_json: bool) -> None:
    if as_json:
        print(json.dumps(plain(event), ensure_ascii=False), flush=True)
        return
    style = {"warn": "yellow", "error": "red"}.get(event.level, "")
    (first, colour), *more = list(log.of(event)) or [(event.message, style)]
    at = datetime.fromtimestamp(event.created_at).strftime("%H:%M:%S")
    out = console()
    out.print(line(f"{at}  ", "dim") + line(first, colour), soft_wrap=True)
    for text, style in more:
        out.print(line(text, style), soft_wrap=True)


# ---- one job ------------------------------------------------------------------------------------------


def _show(client: Client, args: argparse.Namespace) -> int:
    job = find(client, args.job)
    curve = job.curve()
    if args.json:
        data = {"data": job.data_report()} if job.info.held else {}
        print_json(plain(job.info) | {"curve": curve} | data)
    elif job.info.held:
        print_held(console(), job.info, job.data_report())
    else:
        print_job(console(), job.info, curve)
    return OK


def print_held(out: Console, job: TrainingJobInfo, data: Mapping[str, Any] | None) -> None:
    """Print a job that waits for a word: what is in its files, rows as the model reads them, what it will
    take."""
    print_job(out, job, ())
    if data is not None:
        _print_data(out, data)
    found = job.estimate or {}
    takes = [f"{time} of training"] if (time := time_taken(found)) else []
    if "total" in found:
        limit = found.get("memory_limit")
        takes.append(
            f"{size(found['total'])} of memory" + (f" of {size(limit)} that it may take" if limit else "")
        )
    if "parameters" in found:
        takes.append(
            f"{size(found['adapter_bytes'])} for the adapter with {found['parameters']:,} parameters"
        )
    out.print()
    out.print(line("It will take ", "bold") + line(", ".join(takes)), soft_wrap=True)


def time_taken(estimate: Mapping[str, Any]) -> str:
    """Return the time that training takes, with where it is known from; "" if it is unknown."""
    seconds = estimate.get("seconds")
    if not seconds:
        return ""
    low, high = (float(estimate.get(f"seconds_{end}") or seconds) for end in ("low", "high"))
    wide = high > _WIDE * low
    spread = f"{duration(low)} to {duration(high)}" if wide else f"about {duration(seconds)}"
    if estimate.get("seconds_from") == "finished_jobs":
        jobs = estimate.get("finished_jobs", 1)
        return f"{spread} (as {'the last job' if jobs == 1 else f'the last {jobs} jobs'} on this base)"
    busy = ", machine busy" if wide else ""
    return f"{spread} (measured just now{busy})" if "seconds_from" in estimate else spread


def _print_data(out: Console, data: Mapping[str, Any]) -> None:
    held_out = (data.get("evaluation") or {}).get("rows", 0)
    tokens, learned = data.get("tokens", 0), data.get("supervised_tokens", 0)
    share = _share(learned / tokens if tokens else 0.0)
    lengths = f"{data.get('shortest', 0):,} to {data.get('longest', 0):,}"
    facts = (
        f"{data.get('rows', 0):,} rows to train on, {held_out:,} held out",
        f"{tokens:,} tokens, of which {learned:,} are learned ({share})",
        f"{lengths} tokens a row, half of them up to {data.get('median', 0):,}",
    )
    for fact in facts:
        out.print(line(f"  {fact}"), soft_wrap=True)
    word = data.get("named_by", "line")
    for name, found in (data.get("counts") or {}).items():
        if found:
            places = ", ".join(map(str, _places(data, name)))
            more = ", ..." if found > _MOST_PLACES else ""
            by = f" ({word} {places}{more})"
            out.print(line(f"! {_ODD.get(name, name)}: {found:,}{by}", "yellow"), soft_wrap=True)
    _print_examples(out, data.get("examples") or (), word)


def _print_examples(out: Console, examples: Sequence[Mapping[str, Any]], word: str) -> None:
    """Print rows as the model reads them. word: what they are named by, "line" or "row"."""
    left, right = (">>", "<<") if out.options.ascii_only else ("«", "»")
    if examples:
        out.print()
        learned = line(f"{left}learned{right}", "bold green")
        out.print(line("As the model reads it: ") + learned + line(", only read", "dim"))
    for example in examples:
        side = "".join(f", {example[key]}" for key in ("side", "label") if example.get(key))
        out.print(line(f"{word} {example['line' if word == 'line' else 'row']}{side}", "bold"))
        text = line("")
        for part in example["segments"]:
            if part["supervised"]:
                text += line(f"{left}{part['text']}{right}", "bold green")
            else:
                text += line(part["text"], "dim")
        text.rstrip()
        out.print(text, soft_wrap=True)


def _places(data: Mapping[str, Any], name: str) -> list[Any]:
    """Return the first row numbers in a list of the report; the later one for two rows that say the same."""
    return [one[0] if isinstance(one, list) else one for one in (data.get(name) or [])[:_MOST_PLACES]]


def print_job(out: Console, job: TrainingJobInfo, curve: Sequence[CurvePoint]) -> None:
    """Print the job, then its losses, then base against adapter."""
    out.print(
        line(job.name, "bold") + line("  ") + line(in_words(job), status_style(job.status)), soft_wrap=True
    )
    validation = f", measured on {job.validation_file}" if job.validation_file else ""
    out.print(line(f"  {job.id}, created {when(job.created_at)}", "dim"), soft_wrap=True)
    out.print(
        line(f"  {job.method} on {job.model}, from {job.training_file}{validation}", "dim"), soft_wrap=True
    )
    out.print(line(f"  {settings_line(job)}", "dim"), soft_wrap=True)
    if job.status == "running":
        out.print(line(f"  {doing(job)}  {figures(job)}".rstrip()), soft_wrap=True)
    if job.stopped is not None:
        out.print(line(f"  {_stopped(job.stopped)}"), soft_wrap=True)
    if job.error is not None:
        out.print(
            line(f"  {job.error.code}: {job.error.message}".replace("\n", "\n  "), "red"), soft_wrap=True
        )
    _print_curve(out, curve, rewarded=job.method == "reinforcement")
    if job.report is not None:
        _print_report(out, job.report)
        out.print(line(_compared(job.name, job.report)), soft_wrap=True)
    if job.fine_tuned_model is not None:
        state = f"active: requests for {job.name} get it" if job.activated else "not active"
        replaced = f"; it replaced {_label(job.name, job.replaced)}" if job.replaced else ""
        shown = line(f"{job.fine_tuned_model}  ") + line(state + replaced, "green" if job.activated else "")
        out.print(shown, soft_wrap=True)


def _compared(name: str, report: TrainingReport) -> str:
    """Return a sentence that says which version the adapter was compared with."""
    if report.active is None:
        return f"No version of {name} was active when training ended, to compare it with."
    active = f"{_label(name, report.active)}, which was active when training ended"
    if report.not_compared is not None:
        return f"Not compared with {active}: {report.not_compared}."
    return f"Compared with {active}."


def _label(name: str, digest: str) -> str:
    return f"{name}@{digest[:_SHORT_DIGEST]}"


def _stopped(stop: TrainingStop) -> str:
    by = f" by key {stop.by}" if stop.by else ""
    where = (
        "to be stopped at its next step"
        if stop.step is None
        else f"stopped at step {stop.step} of {stop.steps}"
    )
    return f"{where}{by}, asked {when(stop.at)}"


def settings_line(job: TrainingJobInfo) -> str:
    """`r 16, alpha 32, targets all-linear, ...`."""
    parts = []
    for name in _SHOWN:
        value = job.settings.get(name)
        if isinstance(value, list):
            more = f" and {len(value) - _MOST_TARGETS} more" if len(value) > _MOST_TARGETS else ""
            value = " ".join(map(str, value[:_MOST_TARGETS])) + more
        if value not in (None, ""):
            parts.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(parts)


def _print_curve(out: Console, curve: Sequence[CurvePoint], *, rewarded: bool) -> None:
    """Print the losses, or the rewards, which are negated losses."""
    ascii_only, what, sign = out.options.ascii_only, "reward" if rewarded else "loss", -1 if rewarded else 1
    for title, points in (
        (f"training {what}", [point.train_loss for point in curve]),
        (f"held-out {what}", [point.valid_loss for point in curve]),
    ):
        values = [sign * value for value in points if value is not None]
        if len(values) > 1:
            chart = sparkline(values, _CHART, ascii_only=ascii_only)
            ends = f"{values[0]:.4f} -> {values[-1]:.4f}"
            out.print(line(f"{title}  ") + line(chart, "cyan") + line(f"  {ends}"), soft_wrap=True)


@dataclass(frozen=True)
class _Measure:
    """One line of the table of those that the adapter is compared with, and the adapter."""

    name: str
    base: str
    parent: str
    active: str
    adapter: str
    better: bool | None


def _print_replies(out: Console, replies: Sequence[HeldOutReplies]) -> None:
    """Print the first held-out prompts with the replies of all."""
    for row in replies:
        of = f" ({row.slice})" if row.slice else ""
        out.print()
        out.print(
            line(f"held-out line {row.line}{of}: ", "bold") + line(beginning(row.prompt)), soft_wrap=True
        )
        subjects = (
            ("wanted", row.reference), ("base", row.base), ("parent", row.parent), ("active", row.active),
            ("adapter", row.adapter),
        )  # fmt: skip
        for name, text in subjects:
            if text is not None:
                style = "green" if name == "adapter" and text.strip() == row.reference.strip() else ""
                out.print(line(f"  {name:8}", "dim") + line(beginning(text), style), soft_wrap=True)


def _print_report(out: Console, report: TrainingReport) -> None:
    _print_replies(out, report.replies)
    measures = _measures(report)
    if measures:
        out.print()
        columns = [
            one
            for one in _MEASURE_COLUMNS
            if one.title not in _OPTIONAL or any(getattr(measure, one.title) for measure in measures)
        ]
        out.print(table(columns, measures, out.width))
        out.print()
    for warning in report.warnings:
        out.print(line(f"! {warning}", "yellow"), soft_wrap=True)
    if report.classes is not None:
        _print_classes(out, report.classes)
    if report.slices is not None:
        _print_slices(out, report.slices)
    speed = f", {report.tokens / report.seconds:,.0f} tokens/s" if report.seconds else ""
    out.print(
        line(
            f"{report.steps} steps, the best one {report.best_step}; {report.tokens:,} tokens in "
            f"{duration(report.seconds)}{speed}; {report.parameters:,} parameters, "
            f"{size(report.adapter_bytes)}; at most {size(report.peak_memory_bytes)} of memory"
        ),
        soft_wrap=True,
    )


def _print_classes(out: Console, found: ClassReport) -> None:
    """Print a table of the labels, then a matrix of what is taken for what, or the most frequent mistakes."""
    base = {one.label: _share(one.f1) for one in found.base.labels}
    columns: tuple[Column[LabelFigures], ...] = (
        Column("label", lambda one: one.label, shrink=True),
        Column("rows", lambda one: str(one.rows), right=True),
        Column("F1 of the base", lambda one: base.get(one.label, ""), right=True),
        Column("F1", lambda one: _share(one.f1), right=True),
        Column("precision", lambda one: _share(one.precision), right=True),
        Column("recall", lambda one: _share(one.recall), right=True),
    )
    out.print(
        line(f"The base without training: {_BASE_BY.get(found.base_by, found.base_by)}."), soft_wrap=True
    )
    out.print(table(columns, found.adapter.labels, out.width))
    matrix = found.adapter.confusion
    if matrix is not None and len(matrix) <= _WIDEST_MATRIX:
        rows = list(zip(found.labels, matrix, strict=True))
        named = [Column[tuple[str, tuple[int, ...]]]("label \\ given", lambda row: row[0], shrink=True)]
        for place, label in enumerate(found.labels):
            named.append(Column(label, _cell(place), right=True, shrink=True))
        out.print(table(named, rows, out.width))
        return
    for one in found.adapter.confused[:_MOST_CONFUSED]:
        some = "1 row" if one.rows == 1 else f"{one.rows} rows"
        out.print(line(f"{one.label}: taken for {one.given} in {some}"), soft_wrap=True)


def _cell(place: int) -> Callable[[tuple[str, tuple[int, ...]]], str]:
    return lambda row: str(row[1][place])


def _print_slices(out: Console, found: SliceReport) -> None:
    """Print a table of the slices, then the rows that were right and are wrong."""
    by_loss = found.by == "loss"
    name = "held-out loss" if by_loss else found.by

    def shown(value: float | None) -> str:
        return loss(value) if found.by in ("loss", _REWARD) else _share(value)

    def style(one: SliceResult) -> str:
        return "red" if one.regressed else "yellow" if one.worse_by > 0 else ""

    active = Column[SliceResult]("active", lambda one: shown(one.active), right=True)
    columns: tuple[Column[SliceResult], ...] = (
        Column(f"{name} by slice", lambda one: one.slice, shrink=True),
        Column("rows", lambda one: str(one.measured), right=True),
        Column(found.against, lambda one: shown(one.before), right=True),
        *([active] if any(one.active is not None for one in found.slices) else []),
        Column("adapter", lambda one: shown(one.after), right=True, style=style),
        Column("", _verdict),
    )
    out.print(table(columns, found.slices, out.width))
    more = found.slice_count - len(found.slices)
    if more:
        out.print(line(f"and {more} slices more"), soft_wrap=True)
    for row in found.changed[:_MOST_CHANGED]:
        of = f" ({row.slice})" if row.slice else ""
        out.print(
            line(
                f"line {row.line}{of} was right by {row.metric} and is wrong: {row.after[:80]!r} for "
                f"{row.reference[:80]!r}"
            ),
            soft_wrap=True,
        )
    if found.changed_count > _MOST_CHANGED:
        out.print(line(f"{found.changed_count} rows were right and are wrong: --json lists more"))
    out.print()


def _verdict(one: SliceResult) -> str:
    return "worse than allowed" if one.regressed else "worse" if one.worse_by > 0 else ""


def _measures(report: TrainingReport) -> list[_Measure]:
    rows = []
    others, after = (report.loss_before, report.loss_parent, report.loss_active), report.loss_after
    if _REWARD not in report.metrics_after and (report.loss_before is not None or after is not None):
        best = min((one for one in others if one is not None), default=None)
        better = None if best is None or after is None or best == after else after < best
        rows.append(_measure("held-out loss", loss, others, after, better))
    subjects = (report.metrics_before, report.metrics_parent, report.metrics_active)
    for name in {**report.metrics_before, **report.metrics_after}:
        shares, share = [one.get(name) for one in subjects], report.metrics_after.get(name)
        best = max((one for one in shares if one is not None), default=None)
        better = None if best is None or share is None or best == share else share > best
        rows.append(_measure(name, loss if name == _REWARD else _share, shares, share, better))
    return rows


def _measure(
    name: str,
    shown: Callable[[float | None], str],
    others: Sequence[float | None],
    after: float | None,
    better: bool | None,
) -> _Measure:
    """others: of the base, the parent and the active version."""
    base, parent, active = map(shown, others)
    return _Measure(name, base, parent, active, shown(after), better)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


_MEASURE_COLUMNS: tuple[Column[_Measure], ...] = (
    Column("", lambda row: row.name),
    Column("base", lambda row: row.base, right=True),
    Column("parent", lambda row: row.parent, right=True),
    Column("active", lambda row: row.active, right=True),
    Column(
        "adapter",
        lambda row: row.adapter,
        right=True,
        style=lambda row: "" if row.better is None else "green" if row.better else "red",
    ),
)
