"""`onebase estimate`: what a training run will take, before anything is downloaded or loaded."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onebase_adapters.training.cli.common import (
    UsageError,
    add_base_options,
    add_recipe_options,
    base_settings,
    open_console,
    positive,
    print_error,
    recipe_from,
    size,
)
from onebase_adapters.training.cli.printable import shown
from onebase_adapters.training.recipe import (
    Recipe,
    RecipeError,
    decided,
    held_out_count,
    resolve,
    token_count,
)
from onebase_engine.base.default_base import BaseError

if TYPE_CHECKING:
    from onebase_adapters.training.estimate import Estimate
    from onebase_adapters.training.machine import Machine

_ABOUT = """\
What training an adapter will take: parameters, size of the file, memory by part, time.

Only the base's config is read; a repository on the Hub gives config.json and nothing else.

  onebase estimate --base meta-llama/Llama-3.1-8B --r 32 --targets attention --gpu l4
  onebase estimate --rows 2000 --row-tokens 300
"""
_BAR = 24
_PARTS = (
    ("base", "base_bytes"),
    ("adapter, with gradients", "adapter_memory"),
    ("optimizer", "optimizer_bytes"),
    ("activations", "activation_bytes"),
    ("logits and loss", "logits_bytes"),
    ("process", "process_bytes"),
)


def main(argv: Sequence[str]) -> int:
    """`onebase estimate`. Exit status: 0 it fits, 1 it does not or the base is unknown, 2 wrong options."""
    parser = _parser()
    options = parser.parse_args(list(argv))
    # As `onebase train` sets it, so that the speed is measured as it will be.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        return _estimate(options)
    except UsageError as error:
        parser.error(str(error))
    except RecipeError as error:
        parser.error(f"{error.field}: {error}")
    except BaseError as error:
        print_error(open_console(stderr=True), str(error))
        return 1


def _parser() -> argparse.ArgumentParser:
    """The options: those of the base and of a recipe, the amount of data, the machine."""
    parser = argparse.ArgumentParser(
        prog="onebase estimate",
        usage="onebase estimate [options]",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_base_options(parser)
    data = parser.add_argument_group("the data and the machine")
    data.add_argument("--data", metavar="FILE", help="training data, as `onebase train` takes it: is read")
    data.add_argument("--rows", type=positive, metavar="N", help="or: rows of training data, for the time")
    data.add_argument("--row-tokens", type=positive, metavar="N", help="mean length of a row (default: 256)")
    data.add_argument(
        "--longest-row", type=positive, metavar="N", help="longest row, in tokens (default: max_length)"
    )
    data.add_argument("--gpu", metavar="NAME", help="for a GPU that is not here, as in l4, a100-80 or h100")
    data.add_argument("--memory", type=size, metavar="SIZE", help="memory that a run may take, as in 20GB")
    data.add_argument(
        "--resident", action="store_true", help="as a job on a server, whose base is in memory already"
    )
    data.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    add_recipe_options(parser, ("method", "lora", "training", "data", "memory"))
    return parser


def _estimate(options: argparse.Namespace) -> int:
    from onebase_adapters.training.base_config import find_config
    from onebase_adapters.training.estimate import estimate

    recipe = recipe_from(options)
    config: Any = find_config(options.base)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31
    amount = (_read(options, recipe) if options.data else _amount(options)).without_held_out(recipe)
    recipe = resolve(recipe, rows=amount.rows or 1000, held_out=0, base_limit=limit)
    machine = _machine(options)
    made = estimate(
        config,
        recipe,
        quantization=options.quantization,
        dtype=_dtype(options),
        device=machine.kind,
        longest_row=amount.longest or decided(recipe.max_length),
        total_tokens=token_count(recipe, amount.rows, amount.tokens) if amount.rows else None,
        supervised_part=amount.supervised_part,
        memory_limit=machine.memory,
        base_resident=options.resident,
        rate=machine.rate,
    )
    if options.json:
        sys.stdout.write(json.dumps({**made.to_json(), "machine": machine.name, "rate": machine.rate}) + "\n")
    else:
        show(open_console(), made, recipe, machine, f"{options.base}, {options.quantization}")
    return 0 if made.fits else 1


@dataclass(frozen=True)
class _Amount:
    """Of data. rows: 0 is unknown. tokens: of all rows. longest: row in tokens, None is max_length."""

    rows: int
    tokens: int
    longest: int | None
    supervised_part: float = 1.0

    def without_held_out(self, recipe: Recipe) -> _Amount:
        """What is trained on: the rest is held out, of rows of the mean length."""
        if not self.rows:
            return self
        left = max(1, self.rows - held_out_count(recipe, self.rows))
        return replace(self, rows=left, tokens=round(self.tokens * left / self.rows))


def _amount(options: argparse.Namespace) -> _Amount:
    rows = options.rows or 0
    return _Amount(rows, rows * (options.row_tokens or 256), options.longest_row)


def _read(options: argparse.Namespace, recipe: Recipe) -> _Amount:
    """Tokenize the data, which needs the base's tokenizer but none of its weights."""
    from onebase_adapters.training.base_config import find_tokenizer
    from onebase_adapters.training.data.reader import load_dataset
    from onebase_adapters.training.data.records import DataError

    try:
        rows = load_dataset(options.data, find_tokenizer(options.base), recipe).rows
    except DataError as error:
        raise UsageError(f"--data: {error}") from error
    if not rows:
        raise UsageError(f"--data: {options.data} has no rows")
    tokens = sum(map(len, rows))
    return _Amount(len(rows), tokens, max(map(len, rows)), sum(row.targets for row in rows) / tokens)


def _dtype(options: argparse.Namespace) -> Any:
    import torch

    return getattr(torch, options.dtype)


def _machine(options: argparse.Namespace) -> Machine:
    from pathlib import Path

    from onebase_adapters.training.machine import UnknownMachineError, known_gpu, this_machine

    if options.gpu:
        try:
            return known_gpu(options.gpu, options.memory)
        except UnknownMachineError as error:
            raise UsageError(f"--gpu: {error}") from error
    settings = base_settings(options, Path())
    return this_machine(settings.device, settings.dtype, options.memory)


def show(console: Console, made: Estimate, recipe: Recipe, machine: Machine, base: str) -> None:
    """Print the estimate as a table."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column()
    table.add_row("base", f"{made.base_parameters:,}", f"parameters ({shown(base)})")
    targets = ", ".join(recipe.targets)
    table.add_row("adapter", f"[bold]{made.parameters:,}", f"parameters (r={recipe.r} on {targets})")
    table.add_row("file", f"{made.adapter_bytes / 1e6:,.2f} MB", "fp32")
    table.add_section()
    for label, name in _PARTS:
        part = getattr(made, name)
        table.add_row(label, f"{part / 1e9:.2f} GB", _bar(part, max(made.total, 1)))
    style = "bold green" if made.fits else "bold red"
    table.add_row("[bold]peak", Text(f"{made.total / 1e9:.2f} GB", style), _verdict(made, machine))
    table.add_section()
    twice = ", computing activations twice" if made.gradient_checkpointing else ""
    table.add_row("micro-batch", f"{made.micro_tokens:,}", f"tokens{twice}")
    table.add_row("time", *_time(made, machine))
    console.print(table)
    if made.advice:
        console.print(f"\n[bold red]It does not fit:[/] {made.advice}.", highlight=False)
    console.print(
        "\n[dim]Measured peaks were within a quarter of the estimate for the default base on a CPU. "
        "The time is rough: the first steps of a run tell better."
    )


def _bar(part: int, total: int) -> Text:
    filled = round(_BAR * part / total)
    return Text("█" * filled, "cyan").append("·" * (_BAR - filled), "dim").append(f" {part / total:4.0%}")


def _verdict(made: Estimate, machine: Machine) -> Text:
    if made.memory_limit is None or made.memory_limit >= 1 << 60:
        return Text("no limit known", "dim")
    words = "fits in" if made.fits else "more than"
    return Text(f"{words} the {made.memory_limit / 1e9:.1f} GB of {machine.name}")


def _time(made: Estimate, machine: Machine) -> tuple[str, str]:
    rate = f"{machine.rate / 1e12:.2g} TFLOP/s, {machine.how}"
    if made.seconds is None:
        return duration(1e6 * made.flops_per_token / machine.rate), f"a million tokens, roughly ({rate})"
    return duration(made.seconds), f"roughly, {made.total_tokens:,} tokens ({rate})"


def duration(seconds: float) -> str:
    """In the two units that matter: 3 h 20 min."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{round(hours / 24)} days"
