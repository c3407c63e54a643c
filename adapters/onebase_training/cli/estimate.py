"""`onebase estimate`: predict what a training run takes, before anything is downloaded or loaded."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onebase_engine.base.default_base import (
    DEFAULT_BASE,
    DEFAULT_REPO,
    HUB_TIMEOUT_S,
    BaseError,
    BaseFetchError,
    BaseSpecError,
    fetch_default_base,
    parse_repo,
)
from onebase_engine.base.hub_access import first_line, hub_silence
from onebase_engine.imports import quick_imports
from onebase_engine.user_cache import default_cache
from onebase_protocol.command_line import OptionParser
from onebase_training.cli.options import (
    UsageError,
    add_base_options,
    add_recipe_options,
    base_settings,
    open_console,
    option_name,
    positive,
    print_error,
    printable,
    recipe_from,
    size,
)
from onebase_training.data.dataset import DataError, check_labels
from onebase_training.recipe import (
    Recipe,
    RecipeError,
    decided,
    held_out_count,
    resolve,
    token_count,
)

if TYPE_CHECKING:
    import torch

    from onebase_training.estimate import Estimate

_ABOUT = """\
What training an adapter will take: parameters, size of the file, memory by part, time.

Only the base's config is read; a repository on the Hub gives config.json and nothing else.

  onebase estimate --base meta-llama/Llama-3.1-8B --r 32 --targets attention --gpu l4
  onebase estimate --rows 2000 --row-tokens 300
"""
_BAR = 24
_FEWEST_LABELS = 2
_BARS_FROM = 72
"""Width of a terminal, in characters, from which bars have room."""
_PARTS = (
    ("weights", "base_bytes"),
    ("adapter, with gradients", "adapter_memory"),
    ("optimizer", "optimizer_bytes"),
    ("activations", "activation_bytes"),
    ("logits and loss", "logits_bytes"),
    ("process", "process_bytes"),
)


def main(argv: Sequence[str]) -> int:
    """`onebase estimate`. Exit status: 0 it fits, 1 it does not or cannot be said, 2 wrong options."""
    options = _parser().parse_args(list(argv))
    # As `onebase train` sets it, so that the speed is measured as it will be.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        return _estimate(options)
    except UsageError as error:
        print_error(open_console(stderr=True), str(error))
        return 2
    except RecipeError as error:
        print_error(open_console(stderr=True), f"{option_name(error.field)}: {error}")
        return 2
    except (BaseError, DataError) as error:
        print_error(open_console(stderr=True), str(error))
        return 1


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the options: base and recipe, amount of data, machine."""
    parser = OptionParser(prog="onebase estimate", usage="onebase estimate [options]", description=_ABOUT)
    add_base_options(parser)
    data = parser.add_argument_group("the data and the machine")
    data.add_argument("--data", metavar="FILE", help="examples, as for `onebase train`; they are read")
    data.add_argument("--rows", type=positive, metavar="N", help="or: the number of examples, for the time")
    data.add_argument(
        "--row-tokens", type=positive, metavar="N", help="tokens of a mean example (default: 256)"
    )
    data.add_argument(
        "--longest-row",
        type=positive,
        metavar="N",
        help="tokens of the longest example (default: max_length)",
    )
    data.add_argument(
        "--gpu",
        metavar="NAME",
        help="a GPU to ask about, as in l4, a100-80 or h100 (default: this machine)",
    )
    data.add_argument(
        "--memory", type=size, metavar="SIZE", help="most memory, as in 20GB (default: what is free)"
    )
    data.add_argument(
        "--resident", action="store_true", help="a job on a server, whose base is in memory already"
    )
    data.add_argument("--json", action="store_true", help="print the result as JSON, sizes in bytes")
    add_recipe_options(parser, ("method", "lora", "training", "data", "memory"))
    return parser


def _estimate(options: argparse.Namespace) -> int:
    from onebase_training.estimate import estimate

    recipe = recipe_from(options)
    config: Any = find_config(options.base)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31
    amount = (_read(options, recipe) if options.data else _amount(options)).without_held_out(recipe)
    recipe = resolve(recipe, rows=amount.rows or 1000, held_out=0, base_limit=limit)
    machine = _machine(options)
    classifies = recipe.method == "classification"
    made = estimate(
        config,
        recipe,
        quantization=options.quantization,
        dtype=_dtype(options),
        device=machine.kind,
        longest_row=amount.longest or decided(recipe.max_length),
        total_tokens=token_count(recipe, amount.rows, amount.tokens) if amount.rows else None,
        supervised_part=amount.supervised_part,
        labels=(amount.labels or _FEWEST_LABELS) if classifies else 0,
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
    """Amount of data. rows: 0 if unknown. tokens: of all rows. longest: of a row, in tokens; None is
    max_length. labels: 0 if unknown."""

    rows: int
    tokens: int
    longest: int | None
    supervised_part: float = 1.0
    labels: int = 0

    def without_held_out(self, recipe: Recipe) -> _Amount:
        """Return the amount to train on; the held-out rest has rows of the mean length."""
        if not self.rows:
            return self
        left = max(1, self.rows - held_out_count(recipe, self.rows))
        return replace(self, rows=left, tokens=round(self.tokens * left / self.rows))


def _amount(options: argparse.Namespace) -> _Amount:
    rows = options.rows or 0
    return _Amount(rows, rows * (options.row_tokens or 256), options.longest_row)


def _read(options: argparse.Namespace, recipe: Recipe) -> _Amount:
    """Tokenize the data, which needs the base's tokenizer but none of its weights. Raises DataError."""
    from onebase_training.data.reader import load_dataset

    data = load_dataset(options.data, find_tokenizer(options.base), recipe)
    rows = data.rows
    if recipe.method == "classification":
        check_labels(data, None)
    if not rows:
        raise UsageError(f"--data: {options.data} has no rows")
    tokens = sum(map(len, rows))
    learned = sum(row.targets for row in rows) / tokens
    return _Amount(len(rows), tokens, max(map(len, rows)), learned, len(data.labels))


def _dtype(options: argparse.Namespace) -> Any:
    import torch

    return getattr(torch, options.dtype)


def _machine(options: argparse.Namespace) -> Machine:
    if options.gpu:
        try:
            return known_gpu(options.gpu, options.memory)
        except UnknownMachineError as error:
            raise UsageError(f"--gpu: {error}") from error
    settings = base_settings(options, Path())
    return this_machine(settings.device, settings.dtype, options.memory)


def show(console: Console, made: Estimate, recipe: Recipe, machine: Machine, base: str) -> None:
    """Print the estimate as a table; through a pipe as lines, their columns separated by tabs."""
    rows = _rows(made, recipe, machine, base, bars=console.is_terminal and console.width >= _BARS_FROM)
    print_rows(console, rows)
    if made.advice:
        console.print(f"\n[bold red]It does not fit:[/] {made.advice}.", highlight=False)
    console.print(
        "\n[dim]Measured peaks were within a quarter of the estimate for the default base on a CPU. "
        "The time is rough: the first steps of a run show it better."
    )


def print_rows(console: Console, rows: Iterable[tuple[str, Text, Text]]) -> None:
    """Print label, value and words of each row, as a table; through a pipe as lines with tabs."""
    if console.is_terminal:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim")
        table.add_column(justify="right")
        table.add_column()
        for row in rows:
            table.add_row(*row)
        console.print(table)
    else:
        for label, value, words in rows:
            print(label, value, words, sep="\t", file=console.file)


def _rows(
    made: Estimate, recipe: Recipe, machine: Machine, base: str, *, bars: bool
) -> Iterator[tuple[str, Text, Text]]:
    """Yield the label, the value and a comment of each part of the estimate."""
    targets = printable(", ".join(recipe.targets))
    twice = ", computing activations twice" if made.gradient_checkpointing else ""
    yield "base", Text(f"{made.base_parameters:,}"), Text(f"parameters ({printable(base)})")
    yield "adapter", Text(f"{made.parameters:,}", "bold"), Text(f"parameters (r={recipe.r} on {targets})")
    yield "file", Text(f"{made.adapter_bytes / 1e6:,.2f} MB"), Text("fp32")
    for label, name in _PARTS:
        part = getattr(made, name)
        yield label, Text(f"{part / 1e9:.2f} GB"), _share(part, max(made.total, 1), bars=bars)
    style = "bold green" if made.fits else "bold red"
    yield "peak memory", Text(f"{made.total / 1e9:.2f} GB", style), _verdict(made, machine)
    yield "micro-batch", Text(f"{made.micro_tokens:,}"), Text(f"tokens{twice}")
    time, words = _time(made, machine)
    yield "time", Text(time), Text(words)


def _share(part: int, total: int, *, bars: bool) -> Text:
    if not bars:
        return Text(f"{part / total:.0%}")
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
    """Format a duration in its two largest units: 3 h 20 min."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{round(hours / 24)} days"


GIB = 1 << 30

GPUS: dict[str, tuple[float, int]] = {
    "t4": (65, 15),
    "l4": (121, 22),
    "a10": (125, 22),
    "l40s": (362, 44),
    "rtx3090": (71, 23),
    "rtx4090": (165, 23),
    "rtx5090": (209, 31),
    "a100-40": (312, 39),
    "a100-80": (312, 79),
    "h100": (989, 79),
    "h200": (989, 139),
    "b200": (2250, 178),
}
"""Dense half-precision TFLOP/s of the data sheet and usable memory in GiB, by the GPU's name."""

_GPU_SHARE = 0.3
"""Part of a data sheet's rate that a training step on 4-bit weights reaches."""


class UnknownMachineError(ValueError):
    """The GPU is not in the table."""


@dataclass(frozen=True)
class Machine:
    """A machine. memory: bytes that a run may take. rate: FLOP/s of products. how: source of the rate."""

    name: str
    kind: str
    memory: int
    rate: float
    how: str


def this_machine(device: torch.device, dtype: torch.dtype, memory: int | None = None) -> Machine:
    """Return the machine of this process. Measuring a product takes less than a second.

    Args:
        memory: bytes that a run may take; all free memory if None.
    """
    import torch

    from onebase_engine.machine import free_memory
    from onebase_training.estimate import measured_rate

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this processor"
    free = free_memory(device) if memory is None else memory
    return Machine(name, device.type, free, measured_rate(device, dtype), "measured on this machine")


def known_gpu(name: str, memory: int | None = None) -> Machine:
    """Return a GPU of the table; this machine need not have it. Raises UnknownMachineError."""
    if name.lower() not in GPUS:
        raise UnknownMachineError(f"GPU {name!r} is not in the table; there are {', '.join(GPUS)}")
    tflops, gib = GPUS[name.lower()]
    how = f"{_GPU_SHARE:.0%} of its data sheet's {tflops:g} TFLOP/s"
    return Machine(name.lower(), "cuda", memory or gib * GIB, tflops * 1e12 * _GPU_SHARE, how)


_CONFIG = "config.json"


def find_config(spec: str, cache: Path | None = None) -> Any:
    """Return transformers' config of a base: of a folder, a config.json, or a repository (only that file).

    Args:
        spec: as `resolve_base` takes it, or the path of a config.json.
        cache: folder of stored bases; `default_cache()` if None.

    Raises:
        BaseSpecError: it is none of these, or no config of a base that can be trained.
        BaseFetchError: the download failed.
    """
    with quick_imports():
        from onebase_engine.base.load import UnsupportedBaseError, load_config

    path = _config_file(spec, cache)
    try:
        return load_config(path)
    except UnsupportedBaseError as error:
        raise BaseSpecError(f"{path} is not the config of a base that can be trained: {error}") from error


def find_tokenizer(spec: str, cache: Path | None = None) -> Any:
    """Return the base's tokenizer; of a repository only its files are downloaded. Raises as `find_config`."""
    from transformers import AutoTokenizer

    path = _config_file(spec, cache).parent
    # Of the default base, unless it is kept here, only the config has come from the Hub.
    local = path == _kept(cache) if spec == DEFAULT_BASE else Path(spec).expanduser().exists()
    repo = DEFAULT_REPO if spec == DEFAULT_BASE else spec
    source, revision = (str(path), None) if local else parse_repo(repo)
    silence = None if local else hub_silence(source)
    try:
        return AutoTokenizer.from_pretrained(
            source,
            revision=revision or "main",
            trust_remote_code=False,
            local_files_only=local or silence is not None,
        )
    except Exception as error:  # the client's and the tokenizers' exceptions share no base class
        reason = (
            f"is not in the Hub's cache, and {silence}"
            if silence
            else f"cannot be loaded ({first_line(error)})"
        )
        raise BaseFetchError(f"the tokenizer of {spec!r} {reason}") from error


def _config_file(spec: str, cache: Path | None) -> Path:
    given = Path(spec).expanduser()
    if given.is_file():
        return given
    if given.is_dir() and spec != DEFAULT_BASE:
        if not (given / _CONFIG).is_file():
            raise BaseSpecError(f"{given} has no {_CONFIG}")
        return given / _CONFIG
    if spec != DEFAULT_BASE:
        return _download(*parse_repo(spec))
    kept = _kept(cache) / _CONFIG
    if kept.is_file():
        return kept
    try:
        return _download(DEFAULT_REPO, None)
    except BaseFetchError:
        return fetch_default_base(cache=cache) / _CONFIG


def _kept(cache: Path | None) -> Path:
    return (cache or default_cache()) / "bases" / DEFAULT_BASE


def _download(repo: str, revision: str | None) -> Path:
    import huggingface_hub

    silence = hub_silence(repo)
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                repo,
                _CONFIG,
                revision=revision,
                etag_timeout=HUB_TIMEOUT_S,
                local_files_only=silence is not None,
            )
        )
    except Exception as error:  # the client's exceptions share no base class
        if silence:
            raise BaseFetchError(
                f"the config of {repo!r} is not on this machine, and {silence}. Check the network, or "
                "give the path of a config.json"
            ) from error
        raise BaseFetchError(
            f"the config of {repo!r} could not be downloaded ({first_line(error)}). Check the name and, "
            "for a gated repository, your Hub login; or give the path of a config.json"
        ) from error
