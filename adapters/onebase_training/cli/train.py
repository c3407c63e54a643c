"""`onebase train`: a new adapter from examples, in a process of its own."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import TaskID
from rich.table import Table

from onebase_engine.base.default_base import ResolvedBase
from onebase_protocol.command_line import OptionParser, add_validation, end_process
from onebase_training import events
from onebase_training.cli.options import (
    FAILED,
    UsageError,
    add_base_options,
    add_recipe_options,
    add_run_options,
    base_repo,
    base_settings,
    check_adapter_name,
    find_base,
    given_settings,
    print_error,
    quiet_libraries,
    recipe_file,
    recipe_from,
    run_command,
    run_progress,
    shown,
    usage_errors,
)

if TYPE_CHECKING:
    from onebase_training.checkpoint import RunReport
    from onebase_training.parent import Parent
    from onebase_training.processes import ProcessGroup
    from onebase_training.run import TrainingRequest

_DESCRIPTION = """\
Train a LoRA adapter on a 4-bit base model (QLoRA), from a file of examples to a PEFT folder.

  onebase train --data train.jsonl --name acme
  onebase train --data more.jsonl --name acme-2 --from runs/acme

A stopped run continues where it was: give the same command again. Several GPUs:
accelerate launch -m onebase_training.cli.train --data train.jsonl --name acme
"""


def main(argv: Sequence[str]) -> int:
    """`onebase train`. Exit status: 0 trained, 1 failed, 2 wrong options, 130 stopped by Ctrl-C."""
    options = train_parser().parse_args(list(argv))
    return run_command(lambda console: _train(options, console), "from the last checkpoint")


def train_parser() -> argparse.ArgumentParser:
    """Return the parser of `onebase train`."""
    parser = OptionParser(
        prog="onebase train",
        usage="onebase train --data FILE --name NAME [options]",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="examples: JSONL, JSON, CSV, Parquet, or a Hub data set org/name[:split][@revision]",
    )
    add_validation(parser, "held-out examples (default: a part of --data)")
    parser.add_argument("--name", required=True, help="the adapter's name")
    parser.add_argument("--out", metavar="DIR", type=Path, help="the run's folder (default: runs/NAME)")
    parser.add_argument(
        "--from",
        dest="parent",
        metavar="DIR",
        type=Path,
        help="go on from this adapter's weights: a PEFT folder, or another run's (default: a new adapter)",
    )
    add_run_options(parser)
    parser.add_argument(
        "--report-to",
        action="append",
        default=[],
        choices=("tensorboard", "trackio"),
        help="also write the curves there; may be repeated (default: nowhere)",
    )
    parser.add_argument(
        "--save-dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="type of the tensors in the adapter's file; bfloat16 halves it, rounded (default: float32)",
    )
    parser.add_argument("--push", metavar="ORG/REPO", help="push the finished adapter to the Hub")
    parser.add_argument(
        "--push-public", action="store_true", help="make what is pushed public (default: private)"
    )
    add_base_options(parser)
    add_recipe_options(parser)
    return parser


def _train(options: argparse.Namespace, console: Console) -> int:
    _check_names(options)
    settings = recipe_file(options.recipe)
    recipe = recipe_from(options, settings)
    parent = None if options.parent is None else _parent(options.parent)
    folder = options.out or Path("runs") / options.name
    quiet_libraries()
    from onebase_engine.machine import keep_freed_memory
    from onebase_training.processes import join_processes

    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    keep_freed_memory()
    processes = join_processes(on_cpu=options.device == "cpu")
    with Display(console, quiet=not processes.first) as display:
        resolved = find_base(options, display.loading)
        if parent is not None:
            recipe = _going_on(parent, given_settings(options, settings), resolved)
        job = replace(_job(options, recipe, folder, resolved, processes), parent=parent)
        report = _run(job, options.report_to, display, processes)
    if report is None:
        return FAILED
    if processes.first:
        display.finished(report, job.folder)
        if options.push:
            return _push(options.push, job.folder, console, private=not options.push_public)
    return 0


def _check_names(options: argparse.Namespace) -> None:
    """Raise UsageError, before hours of training, for a name that cannot be used."""
    check_adapter_name(options.name)
    if options.push and not is_repo_name(options.push):
        raise UsageError(f"--push: {options.push!r} is not the name of a repository: write ORG/REPO")


def _parent(folder: Path) -> Parent:
    """Return the adapter in a folder, or in a run's. Raises UsageError."""
    from onebase_training.parent import Parent

    place = folder / "adapter" if (folder / "adapter").is_dir() else folder
    try:
        return Parent.of_folder(place)
    except OSError as error:
        raise UsageError(
            f"--from: {error.filename or place} cannot be read: {error.strerror or error}. Give the folder "
            "of a PEFT adapter, or a run's. From a server's version: onebase jobs create --model NAME@VERSION"
        ) from error


def _going_on(parent: Parent, given: dict[str, Any], resolved: ResolvedBase) -> Any:
    """Return the recipe with the settings that the parent fixes. Raises UsageError."""
    from onebase_engine.base.layers import empty_base
    from onebase_engine.base.load import load_config
    from onebase_training.parent import modules_of
    from onebase_training.recipe import continued, parse_recipe

    with usage_errors():
        own = modules_of(parent, empty_base(load_config(resolved.folder)))
        return parse_recipe(continued(given, own, parent.label))


def _job(
    options: argparse.Namespace, recipe: Any, folder: Path, resolved: ResolvedBase, processes: ProcessGroup
) -> TrainingRequest:
    import torch

    from onebase_engine.machine import free_memory
    from onebase_training.run import TrainingRequest

    settings = base_settings(options, resolved.folder)
    if settings.device.type == "cuda" and processes.count > 1:
        settings = replace(settings, device=_own_gpu())
    limit = options.memory_limit or free_memory(settings.device)
    return TrainingRequest(
        name=options.name,
        recipe=recipe,
        train=options.data,
        held_out=options.validation,
        folder=folder,
        base=settings,
        base_name=resolved.name,
        base_repo=base_repo(options, resolved),
        base_commit=resolved.revision,
        save_dtype=getattr(torch, options.save_dtype),
        memory_limit=limit // max(1, processes.count) if settings.device.type == "cpu" else limit,
    )


def _own_gpu() -> Any:
    import torch

    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _run(
    job: TrainingRequest, writers: Sequence[str], display: Any, processes: ProcessGroup
) -> RunReport | None:
    """Return the run's report; None after a failure, which has been shown. Raises KeyboardInterrupt."""
    from onebase_engine.base.load import UnsupportedBaseError
    from onebase_engine.base.quantized_cache import load_kept_base
    from onebase_engine.machine import is_out_of_memory
    from onebase_training.checkpoint import CheckpointError
    from onebase_training.cli.options import CtrlC
    from onebase_training.curves import CurveError, open_curves
    from onebase_training.data.dataset import DataError
    from onebase_training.events import Interrupted
    from onebase_training.loop import TrainingDivergedError
    from onebase_training.processes import OtherProcessError
    from onebase_training.recipe import RecipeError
    from onebase_training.run import DoesNotFitError, train

    expected = (UnsupportedBaseError, DataError, DoesNotFitError, RecipeError, CheckpointError, CurveError)
    try:
        with (
            open_curves(writers if processes.first else (), job) as write,
            CtrlC(alone=processes.count == 1) as gate,
        ):

            def load() -> Any:
                display.loading(f"loading {job.base_name}", 0.0)
                with gate.at_once():
                    return load_kept_base(job.base)

            def listen(event: Any) -> None:
                write(event)
                display.show(event)

            return train(load, job, listen, gate, processes)
    except (*expected, TrainingDivergedError) as error:
        display.failed(str(error))
    except OSError as error:
        display.failed(f"{error.filename or job.folder}: {error.strerror or error}")
    except OtherProcessError:
        pass
    except Interrupted:
        raise KeyboardInterrupt from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        display.failed(
            "there is not enough memory. Give --gradient-checkpointing true or a lower --micro-tokens "
            "to continue from the last checkpoint, or start over with a lower --max-length or --r"
        )
    return None


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _push(repo: str, folder: Path, console: Console, *, private: bool) -> int:
    try:
        with console.status(f"pushing to {repo}"):
            url = push(folder / "adapter", repo, private=private)
    except PushError as error:
        print_error(console, f"{error}\nThe adapter itself is complete, in {folder / 'adapter'}.")
        return FAILED
    console.print(f"Pushed to {url}")
    return 0


_PHASES = {
    "validating_files": "reading the data",
    "training": "training",
    "measuring": "measuring",
    "saving": "saving",
}
_WORTH_KNOWING = {
    "truncated": "rows cut at max_length",
    "dropped": "rows dropped as too long",
    "duplicates": "rows that repeat another row",
    "leakage": "rows that are also held out: the held-out loss will look too good",
}


class Display:
    """Shows events. `quiet`: show nothing but failures, in all processes but the first."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = Console(quiet=True) if quiet else console
        self._failures = console
        self._progress = run_progress(self._console)
        self._task: TaskID = self._progress.add_task("starting", total=None, facts="")
        self._losses: list[float] = []

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def loading(self, message: str, part: float) -> None:
        """Show what is downloaded or loaded before the run."""
        self._update(message, 0, None)

    def show(self, event: events.Event) -> None:
        """Show one event."""
        handlers: dict[type[events.Event], Any] = {
            events.Phase: self._phase,
            events.StageProgress: self._progressed,
            events.DataChecked: self._data_checked,
            events.Planned: self._planned,
            events.StepDone: self._step_done,
            events.Evaluated: self._evaluated,
            events.Sampled: self._sampled,
            events.Measured: self._measured,
            events.Notice: self._notice,
        }
        if handler := handlers.get(type(event)):
            handler(event)

    def failed(self, message: str) -> None:
        self._progress.stop()
        print_error(self._failures, message)

    def finished(self, report: RunReport, folder: Path) -> None:
        """Show the table of results, and the next steps."""
        from onebase_training.checkpoint import sparkline

        self._progress.stop()
        against = f"base and {shown(report.parent)}" if report.parent else "base"
        self._console.print(
            f"\n{shown(report.name)}: {against} against adapter, on held-out rows",
            highlight=False,
            style="bold",
        )
        for row in report.replies:
            self._console.print(_replies(row))
        self._console.print(_results(report))
        for warning in report.warnings:
            self._console.print(f"warning: {shown(warning)}", highlight=False, style="yellow")
        if report.classes is not None:
            self._show_classes(report.classes)
        if report.slices is not None:
            self._console.print(_slice_table(report.slices))
            for row in report.slices["changed"][:_MOST_CHANGED]:
                self._console.print(shown(_changed(row)), highlight=False)
        self._console.print(_figures(report), highlight=False)
        if self._losses:
            self._console.print(f"loss {sparkline(self._losses, 48)} {self._losses[-1]:.4f}", highlight=False)
        path, name = shown(str(folder / "adapter")), shown(report.name)
        self._console.print(
            f"\nThe adapter is in [bold]{path}[/]. Serve it:\n"
            f"  onebase serve --adapter {name}={path}\n"
            "or push it to a running server:\n"
            f"  onebase adapters push {path} --name {name} --activate\n",
            highlight=False,
            soft_wrap=True,
        )

    def _show_classes(self, classes: Mapping[str, Any]) -> None:
        from onebase_training.classes import BASE_BY, confusion_rows, figure_rows

        self._console.print(f"base: {BASE_BY[classes['base_by']].partition(': ')[2]}", highlight=False)
        for rows in (figure_rows(classes), confusion_rows(classes)):
            self._console.print(_table(rows))

    def _phase(self, event: events.Phase) -> None:
        text = _PHASES.get(event.name, event.name)
        self._update(f"{text} {event.message}".strip(), 0, None)

    def _progressed(self, event: events.StageProgress) -> None:
        self._update(_PHASES.get(event.name, event.name), event.part, 1, f"{event.part:.0%}")

    def _data_checked(self, event: events.DataChecked) -> None:
        for part, found in (("to train on", event.report), ("held out", event.report.get("evaluation"))):
            if found:
                self._say(f"{part}: {found['rows']:,} rows, {found['tokens']:,} tokens")
                self._warn_of(found["counts"])

    def _warn_of(self, counts: dict[str, int]) -> None:
        found = [f"{counts[name]:,} {words}" for name, words in _WORTH_KNOWING.items() if counts.get(name)]
        if found:
            self._say(f"[yellow]{'; '.join(found)}[/] (`onebase data check` shows which)")

    def _planned(self, event: events.Planned) -> None:
        estimate, recipe = event.estimate, event.recipe
        self._say(
            f"adapter: {estimate['parameters']:,} parameters, r={recipe['r']} on "
            f"{', '.join(recipe['targets'])}; {_count(event.steps, 'step')} of "
            f"{_count(recipe['batch_size'], 'row')}, "
            f"learning rate {recipe['learning_rate']:g}"
        )
        if event.first_step:
            self._say(f"continuing after step {event.first_step}")

    def _step_done(self, event: events.StepDone) -> None:
        self._losses.append(event.loss)
        facts = (
            f"{event.step}/{event.steps}  loss {event.loss:.4f}  {event.tokens_per_second:,.0f} tok/s  "
            f"{_duration(event.seconds_left)} left"
        )
        if not self._console.is_terminal:
            if event.step == 1 or event.step % max(1, event.steps // 20) == 0 or event.step == event.steps:
                self._say(f"step {facts}")
            return
        self._update("training", event.step, event.steps, facts)

    def _evaluated(self, event: events.Evaluated) -> None:
        who = f"step {event.step}" if event.step else "parent" if event.parent else "base"
        rewards = "".join(f"  {name} {value:.3f}" for name, value in event.rewards.items())
        if event.accuracy is not None:
            rewards = f"  accuracy {event.accuracy:.1%}"
        best = "  [green]best[/]" if event.best else ""
        self._say(f"{who}: held-out loss {event.loss:.4f}{rewards}{best}")

    def _sampled(self, event: events.Sampled) -> None:
        who = f"step {event.step}" if event.step else "base"
        self._say(f"{who}: {shown(event.prompt)} [dim]->[/] [italic]{shown(event.text)}[/]")

    def _measured(self, event: events.Measured) -> None:
        found = "  ".join(f"{shown(name)} {value:.1%}" for name, value in event.metrics.items())
        self._say(f"{event.subject}, {event.rows} held-out rows: {found}")

    def _notice(self, event: events.Notice) -> None:
        text = shown(event.message)
        self._say(f"[yellow]{text}[/]" if event.level == "warn" else text)

    def _say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False)

    def _update(self, text: str, done: float, total: float | None, facts: str = "") -> None:
        self._progress.tasks[0].total = total  # `update` takes None for "as it is"
        self._progress.update(self._task, description=shown(text), completed=done, facts=facts)


def _replies(row: Mapping[str, Any]) -> Table:
    """Return a table of a held-out prompt with the replies to it."""
    from onebase_training.checkpoint import REPLY_SUBJECTS

    table = Table(show_header=False)
    table.add_column(style="dim")
    table.add_column()
    lines = [(f"line {row['line']}", row["prompt"]), ("wanted", row["reference"])]
    for name, text in [*lines, *((name, row[name]) for name in REPLY_SUBJECTS if name in row)]:
        table.add_row(
            name, shown(text[-_LONGEST_SHOWN:] if name.startswith("line") else text[:_LONGEST_SHOWN])
        )
    return table


_LONGEST_SHOWN = 160


def _results(report: RunReport) -> Table:
    from onebase_training.checkpoint import results

    table = Table()
    (first, *subjects), *rows = results(report)
    table.add_column(first)
    for subject in subjects:
        table.add_column(subject, justify="right")
    for name, *values in rows:
        table.add_row(shown(name), *values)
    if not table.row_count:
        table.add_row("nothing was held out", *("" for _ in subjects))
    return table


def _table(rows: Sequence[Sequence[str]]) -> Table:
    """Return a table of a head, and rows with a name and figures."""
    (first, *others), *rest = rows
    table = Table()
    table.add_column(shown(first))
    for title in others:
        table.add_column(shown(title), justify="right")
    for row in rest:
        table.add_row(*map(shown, row))
    return table


_MOST_CHANGED = 5


def _slice_table(slices: Mapping[str, Any]) -> Table:
    from onebase_training.checkpoint import slice_rows

    (first, *others), *rows = slice_rows(slices)
    table = Table()
    table.add_column(first)
    for title in others:
        table.add_column(title, justify="right" if title else "left")
    for name, *values in rows:
        table.add_row(shown(name), *values, style="red" if values[-1] == "worse than allowed" else "")
    return table


def _changed(row: Mapping[str, Any]) -> str:
    return (
        f"line {row['line']} was right by {row['metric']} and is wrong: {row['after'][:80]!r} for "
        f"{row['reference'][:80]!r}"
    )


def _figures(report: RunReport) -> str:
    speed = report.tokens / report.seconds if report.seconds else 0.0
    return (
        f"{report.steps} steps, best after {report.best_step}; {report.tokens:,} tokens in "
        f"{_duration(report.seconds)} ({speed:,.0f} tok/s); {report.adapter_bytes / 1e6:.1f} MB; "
        f"at most {report.peak_memory_bytes / 1e9:.1f} GB of memory"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    )


_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
FILES = ("adapter_config.json", "adapter_model.safetensors", "config.json", "README.md")


def is_repo_name(name: str) -> bool:
    """Return True if the Hub may have a repository of this name."""
    return _REPO.fullmatch(name) is not None and ".." not in name


class PushError(Exception):
    """The adapter was not pushed; the message says why and what to do."""


def push(adapter: Path, repo: str, *, private: bool = True) -> str:
    """Upload an adapter's folder as one commit; the repository is made if there is none. Returns its URL.

    The token is the one of `hf auth login`, or HF_TOKEN.

    Raises PushError.
    """
    if not is_repo_name(repo):
        raise PushError(f"{repo!r} is not the name of a repository: write ORG/REPO")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        made = api.upload_folder(
            repo_id=repo, folder_path=adapter, allow_patterns=list(FILES), commit_message="Add the adapter"
        )
    except LocalTokenNotFoundError as error:
        raise PushError("there is no token for the Hub: run `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PushError(
                f"the Hub refuses to write {repo} (HTTP {status}): use a token with write access"
            ) from error
        raise PushError(f"the Hub did not take {repo}: {error}") from error
    except (HFValidationError, OSError, ValueError) as error:
        raise PushError(f"{repo} cannot be pushed: {error}") from error
    return str(made.repo_url if hasattr(made, "repo_url") else made)


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
