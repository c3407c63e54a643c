"""`onebase sweep`: find rank, targets and learning rate for a task, by many short runs on one base."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from onebase_protocol.command_line import OptionParser, add_validation
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
    open_console,
    print_error,
    quiet_libraries,
    recipe_file,
    recipe_from,
    run_command,
    run_progress,
    shown,
)

if TYPE_CHECKING:
    from onebase_training.recipe import Recipe
    from onebase_training.run import TrainingRequest
    from onebase_training.sweep import Grid, SweepResult, Trial

_ABOUT = """\
Try ranks, targets and learning rates on one base that is loaded once, and stop the losers early.

  onebase sweep --data train.jsonl --name acme
  onebase sweep --data train.jsonl --r 8..64 --targets attention --targets all-linear

Ends in a table, results.csv, results.json and a plot, sweep.svg. A stopped sweep continues where it
was: give the same command again. With longer lists it adds runs.
"""
_SWEPT = ("r", "alpha", "targets", "learning_rate")


def main(argv: Sequence[str]) -> int:
    """`onebase sweep`. Exit status: 0 done, 1 failed, 2 wrong options, 130 stopped by Ctrl-C."""
    options = _parser().parse_args(list(argv))
    return run_command(lambda console: _sweep(options, console), "where it was")


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        prog="onebase sweep", usage="onebase sweep --data FILE [options]", description=_ABOUT
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="examples, as for `onebase train`")
    add_validation(parser, "held-out examples (default: a part of --data)")
    parser.add_argument("--name", help="the adapter's name (default: sweep)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the sweep's folder (default: runs/NAME-sweep, or runs/sweep)"
    )
    _add_tried_options(parser)
    add_run_options(parser)
    add_base_options(parser)
    add_recipe_options(parser, leave_out=_SWEPT)
    return parser


def _add_tried_options(parser: argparse.ArgumentParser) -> None:
    tried = parser.add_argument_group("what is tried, in every combination")
    tried.add_argument(
        "--r", dest="tried_r", type=_ranks, metavar="R,...", help="ranks; 8..64 doubles (default: 8..64)"
    )
    tried.add_argument(
        "--alpha",
        dest="tried_alpha",
        type=_alphas,
        metavar="A,...",
        help="alphas; auto is twice the rank (default: auto)",
    )
    tried.add_argument(
        "--targets",
        dest="tried_targets",
        action="append",
        metavar="A,B,...",
        help="one choice of targets; repeat for others (default: all-linear)",
    )
    tried.add_argument(
        "--learning-rate",
        dest="tried_rates",
        type=_rates,
        metavar="X,...",
        help="learning rates (default: 2e-4,5e-4,1e-3)",
    )
    tried.add_argument(
        "--survivors",
        type=_part,
        default=0.5,
        metavar="X",
        help="part of the runs that continues after a quarter and a half of the steps; 1: all (default: 0.5)",
    )


def _sweep(options: argparse.Namespace, console: Console) -> int:
    if options.name is not None:
        check_adapter_name(options.name)
    folder = options.out or Path("runs") / (f"{options.name}-sweep" if options.name else "sweep")
    given = recipe_file(options.recipe)
    recipe = recipe_from(options, given)
    quiet_libraries()
    from onebase_engine.machine import free_memory, keep_freed_memory
    from onebase_training.run import TrainingRequest

    try:
        from onebase_training.sweep_report import PLOT, TABLE, render, write
    except ModuleNotFoundError as error:
        install = "pip install 'onebase[train]' installs it"
        raise UsageError(f"the sweep's picture needs {error.name}, which is not here: {install}") from error

    keep_freed_memory()
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    with _Show(console) as show:
        resolved = find_base(options, show.loading)
        settings = base_settings(options, resolved.folder)
        job = TrainingRequest(
            name=options.name or "sweep",
            recipe=recipe,
            train=options.data,
            held_out=options.validation,
            folder=folder,
            base=settings,
            base_name=resolved.name,
            base_repo=base_repo(options, resolved),
            base_commit=resolved.revision,
            memory_limit=options.memory_limit or free_memory(settings.device),
        )
        result = _run(job, _grid(options, given, recipe), options.survivors, show)
    if result is None:
        return FAILED
    write(result)
    out = open_console()
    render(result, out)
    plot, results = shown(str(folder / PLOT)), shown(str(folder / TABLE))
    out.print(f"Plot: {plot}  Table: {results}", highlight=False, soft_wrap=True)
    return 0 if result.best else FAILED


def _run(job: TrainingRequest, grid: Grid, survivors: float, show: _Show) -> SweepResult | None:
    """Return the result; None after a failure, which has been shown. Raises KeyboardInterrupt."""
    from onebase_engine.base.load import UnsupportedBaseError
    from onebase_engine.base.quantized_cache import load_kept_base
    from onebase_training.checkpoint import CheckpointError
    from onebase_training.cli.options import CtrlC
    from onebase_training.data.dataset import DataError
    from onebase_training.events import Interrupted
    from onebase_training.recipe import RecipeError
    from onebase_training.sweep import sweep

    try:
        with CtrlC(alone=True) as gate:
            show.loading("reading the data", 0.0)

            def load() -> Any:
                show.loading(f"loading {job.base_name}", 0.0)
                with gate.at_once():
                    return load_kept_base(job.base)

            return sweep(load, job, grid, show.event, gate, survivors=survivors, report=show.say)
    except (UnsupportedBaseError, DataError, RecipeError, CheckpointError, OSError) as error:
        show.failed(str(error))
        return None
    except Interrupted:
        raise KeyboardInterrupt from None


def _grid(options: argparse.Namespace, given: Mapping[str, Any], recipe: Recipe) -> Grid:
    """Return the grid of the options, or else of the recipe's file, or else the defaults."""
    from onebase_training.sweep import Grid

    targets = tuple(
        tuple(part.strip() for part in one.split(",") if part.strip()) for one in options.tried_targets or ()
    )
    tried = {
        "r": options.tried_r,
        "alpha": options.tried_alpha,
        "targets": targets or None,
        "learning_rate": options.tried_rates,
    }
    for name in _SWEPT:
        one = getattr(recipe, name)
        if tried[name] is None and name in given and (one != "auto" or name == "alpha"):
            tried[name] = (one,)
    return Grid(**{name: value for name, value in tried.items() if value is not None})


class _Show:
    """One live bar for the current run, and a line for each run that reached its rung."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = run_progress(console)
        self._task = self._progress.add_task("starting", total=None, facts="")

    def __enter__(self) -> _Show:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def loading(self, message: str, part: float) -> None:
        self._progress.tasks[0].total = None  # `update` takes None for "as it is"
        self._progress.update(self._task, description=shown(message), facts="")

    def say(self, message: str) -> None:
        self._progress.console.print(f"[bold]{shown(message)}[/]", highlight=False)

    def failed(self, message: str) -> None:
        self._progress.stop()
        print_error(self._console, message)

    def event(self, trial: Trial, event: events.Event) -> None:
        """Show one event of a run."""
        if isinstance(event, events.StepDone):
            self._progress.update(
                self._task,
                description=shown(trial.name),
                completed=event.step,
                total=event.steps,
                facts=f"{event.step}/{event.steps}  loss {event.loss:.4f}  "
                f"{event.tokens_per_second:,.0f} tok/s",
            )
        elif isinstance(event, events.Evaluated) and event.step:
            self._progress.console.print(
                f"{shown(trial.name)}: step {event.step}, held-out loss {event.loss:.4f}", highlight=False
            )


def _ranks(text: str) -> tuple[int, ...]:
    """Parse 8,16 or 8..64, which doubles."""
    low, dots, high = text.partition("..")
    if not dots:
        return _listed(text, int, "whole numbers above 0, as in 8,16 or 8..64")
    first, last = (_listed(part, int, "ranks as in 8..64")[0] for part in (low, high))
    ranks = []
    while first <= last:
        ranks.append(first)
        first *= 2
    if not ranks:
        raise argparse.ArgumentTypeError(f"{text!r}: the first rank is above the last")
    return tuple(ranks)


def _rates(text: str) -> tuple[float, ...]:
    return _listed(text, float, "numbers above 0, as in 2e-4,5e-4")


def _alphas(text: str) -> tuple[Any, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return tuple("auto" if p == "auto" else _listed(p, float, "numbers above 0, or auto")[0] for p in parts)


def _part(text: str) -> float:
    value: float = _listed(text, float, "a number above 0, at most 1")[0]
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number above 0, at most 1")
    return value


def _listed(text: str, kind: Callable[[str], Any], words: str) -> tuple[Any, ...]:
    try:
        values = tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        values = ()
    if not values or not all(0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: write {words}")
    return values
