"""`onebase train`: a new adapter from examples, in a process of its own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from onebase_adapters.training.cli.common import (
    UsageError,
    add_base_options,
    add_recipe_options,
    base_repo,
    base_settings,
    check_adapter_name,
    find_base,
    open_console,
    positive,
    print_error,
    quiet_libraries,
    recipe_file,
    recipe_from,
    size,
)
from onebase_adapters.training.push import is_repo_name
from onebase_engine.base.default_base import BaseFetchError, ResolvedBase

if TYPE_CHECKING:
    from onebase_adapters.training.plan import Job
    from onebase_adapters.training.process_group import ProcessGroup
    from onebase_adapters.training.result import Report

_DESCRIPTION = """\
Train a LoRA adapter on a 4-bit base model (QLoRA), from a file of examples to a PEFT folder.

  onebase train --data train.jsonl --name acme

A run that was stopped goes on where it was: give the same command again. Several GPUs:
accelerate launch -m onebase_adapters.training.cli.train --data train.jsonl --name acme
"""
_STOPPED, _FAILED, _USAGE = 130, 1, 2


def main(argv: Sequence[str]) -> int:
    """`onebase train`. Exit status: 0 trained, 1 failed, 2 wrong options, 130 stopped by Ctrl-C."""
    options = train_parser().parse_args(list(argv))
    console = open_console(stderr=True)
    try:
        return _train(options, console)
    except UsageError as error:
        print_error(console, str(error))
        return _USAGE
    except BaseFetchError as error:
        print_error(console, str(error))
        return _FAILED
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on from the last checkpoint.")
        return _STOPPED


def train_parser() -> argparse.ArgumentParser:
    """The options of `onebase train`."""
    parser = argparse.ArgumentParser(
        prog="onebase train",
        usage="onebase train --data FILE --name NAME [options]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="examples: JSONL, JSON, CSV, Parquet, or a Hub data set org/name[:split][@revision]",
    )
    parser.add_argument(
        "--eval-data", metavar="FILE", help="held-out examples; else a part of --data is held out"
    )
    parser.add_argument("--name", required=True, help="the adapter's name")
    parser.add_argument("--out", metavar="DIR", type=Path, help="the run's folder (default: runs/NAME)")
    parser.add_argument(
        "--recipe", metavar="FILE", type=Path, help="JSON file of settings; options go before it"
    )
    parser.add_argument(
        "--memory-limit",
        type=size,
        metavar="SIZE",
        help="most memory to take, as in 8GB (default: what is free)",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: every core)")
    parser.add_argument(
        "--report-to",
        action="append",
        default=[],
        choices=("tensorboard", "trackio"),
        help="also write the curves there; may be repeated",
    )
    parser.add_argument(
        "--save-dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="type of the tensors in the adapter's file (default: float32); bfloat16 halves it, rounded",
    )
    parser.add_argument("--push", metavar="ORG/REPO", help="push the finished adapter to the Hub")
    parser.add_argument("--push-public", action="store_true", help="make the pushed repository public")
    add_base_options(parser)
    add_recipe_options(parser)
    return parser


def _train(options: argparse.Namespace, console: Console) -> int:
    _check_names(options)
    recipe = recipe_from(options, recipe_file(options.recipe))
    folder = options.out or Path("runs") / options.name
    quiet_libraries()
    from onebase_adapters.training.cli.progress import Display
    from onebase_adapters.training.process_group import join_processes
    from onebase_engine.machine import keep_freed_memory

    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    keep_freed_memory()
    processes = join_processes(on_cpu=options.device == "cpu")
    with Display(console, quiet=not processes.first) as display:
        resolved = find_base(options, display.loading)
        job = _job(options, recipe, folder, resolved, processes)
        report = _run(job, options.report_to, display, processes)
    if report is None:
        return _FAILED
    if processes.first:
        display.finished(report, job.folder)
        if options.push:
            return _push(options.push, job.folder, console, private=not options.push_public)
    return 0


def _check_names(options: argparse.Namespace) -> None:
    """Before hours of training. Raises UsageError."""
    check_adapter_name(options.name)
    if options.push and not is_repo_name(options.push):
        raise UsageError(f"--push: {options.push!r} is no repository's name: write ORG/REPO")


def _job(
    options: argparse.Namespace, recipe: Any, folder: Path, resolved: ResolvedBase, processes: ProcessGroup
) -> Job:
    import torch

    from onebase_adapters.training.plan import Job
    from onebase_engine.machine import free_memory

    settings = base_settings(options, resolved.folder)
    if settings.device.type == "cuda" and processes.count > 1:
        settings = replace(settings, device=_own_gpu())
    limit = options.memory_limit or free_memory(settings.device)
    return Job(
        name=options.name,
        recipe=recipe,
        train=options.data,
        held_out=options.eval_data,
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


def _run(job: Job, writers: Sequence[str], display: Any, processes: ProcessGroup) -> Report | None:
    """The run's report; None after a failure, which has been shown. Raises KeyboardInterrupt."""
    from onebase_adapters.training.checkpoint import CheckpointError
    from onebase_adapters.training.cli.ctrl_c import CtrlC
    from onebase_adapters.training.curves import CurveError, open_curves
    from onebase_adapters.training.data.records import DataError
    from onebase_adapters.training.events import Interrupted
    from onebase_adapters.training.loop import TrainingDivergedError
    from onebase_adapters.training.plan import DoesNotFitError
    from onebase_adapters.training.process_group import OtherProcessError
    from onebase_adapters.training.recipe import RecipeError
    from onebase_adapters.training.run import train
    from onebase_engine.base.load import UnsupportedBaseError, load_base
    from onebase_engine.machine import is_out_of_memory

    told = (UnsupportedBaseError, DataError, DoesNotFitError, RecipeError, CheckpointError, CurveError)
    try:
        with (
            open_curves(writers if processes.first else (), job) as write,
            CtrlC(alone=processes.count == 1) as gate,
        ):
            display.loading(f"loading {job.base_name}", 0.0)
            base = load_base(job.base)

            def listen(event: Any) -> None:
                write(event)
                display.show(event)

            return train(base, job, listen, gate, processes)
    except (*told, TrainingDivergedError, OSError) as error:
        display.failed(str(error))
    except OtherProcessError:
        pass
    except Interrupted:
        raise KeyboardInterrupt from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        display.failed(
            "there is not enough memory. Give --gradient-checkpointing true or a lower --micro-tokens to go "
            "on from the last checkpoint, or begin anew with a lower --max-length or --r"
        )
    return None


def _push(repo: str, folder: Path, console: Console, *, private: bool) -> int:
    from onebase_adapters.training.push import PushError, push

    try:
        with console.status(f"pushing to {repo}"):
            url = push(folder / "adapter", repo, private=private)
    except PushError as error:
        print_error(console, f"{error}\nThe adapter itself is whole, in {folder / 'adapter'}.")
        return _FAILED
    console.print(f"Pushed to {url}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
