"""What a run will do, decided before anything is trained: its data, its recipe, whether it fits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onebase_adapters.base import BaseSettings
from onebase_adapters.base_identity import base_id
from onebase_adapters.training.batches import step_rows, targets_of
from onebase_adapters.training.checkpoint import CheckpointError, sync
from onebase_adapters.training.data import load_dataset
from onebase_adapters.training.data_split import split
from onebase_adapters.training.estimate import Estimate, estimate
from onebase_adapters.training.recipe import Recipe, RecipeError, parse_recipe, resolve, step_count
from onebase_adapters.training.samples import Dataset

_FILE = "plan.json"


class DoesNotFitError(Exception):
    """The run would take more memory than it may; the message says what to change."""

    def __init__(self, estimate: Estimate) -> None:
        super().__init__(estimate.advice)
        self.estimate = estimate


@dataclass(frozen=True)
class Data:
    """Tokenized rows. `held_out` is None if nothing is held out. Names are for people."""

    train: Dataset
    held_out: Dataset | None
    train_name: str
    held_out_name: str


@dataclass(frozen=True)
class Plan:
    """A run that can start. identity: SHA-256 of recipe, data and base."""

    recipe: Recipe
    data: Data
    estimate: Estimate
    identity: str

    @property
    def steps(self) -> int:
        return step_count(self.recipe, len(self.data.train))


def read_data(
    train: str | Path,
    held_out: str | Path | None,
    tokenizer: Any,
    recipe: Recipe,
    *,
    names: tuple[str | None, str | None] = (None, None),
    on_progress: Callable[[float], None] | None = None,
) -> Data:
    """Both files, or one of which a part is held out.

    Raises:
        DataError: a file has bad lines.
        RecipeError: nothing is left to train on.
    """
    half = 0.5 if held_out is not None else 1.0
    report = on_progress or (lambda part: None)
    rows = load_dataset(train, tokenizer, recipe, name=names[0], on_progress=lambda part: report(part * half))
    train_name, held_out_name = names[0] or Path(train).name, names[1] or ""
    if held_out is not None:
        other = load_dataset(
            held_out,
            tokenizer,
            recipe,
            part="eval",
            name=names[1],
            on_progress=lambda part: report(half + part * half),
        )
        return Data(rows, other, train_name, held_out_name or Path(held_out).name)
    part = 0.1 if recipe.eval_split == "auto" else recipe.eval_split
    if part == 0:
        return Data(rows, None, train_name, "")
    rows, other = split(rows, part, recipe.seed)
    return Data(rows, other if len(other) else None, train_name, f"held out of {train_name}")


def make_plan(
    folder: Path,
    recipe: Recipe,
    data: Data,
    base: BaseSettings,
    config: Any,
    *,
    memory_limit: int | None,
    base_resident: bool,
    rate: float | None,
) -> Plan:
    """Decide what is "auto", or read what was decided when the run in `folder` began.

    Args:
        config: the base's, from transformers. memory_limit: bytes that the process may take.
        base_resident: the base is another process's. rate: FLOP/s of the machine, if known.

    Raises:
        DoesNotFitError, RecipeError.
        CheckpointError: the folder holds another run.
    """
    if not len(data.train):
        raise RecipeError("training_file", "no row is left to train on: add rows, or hold out fewer")
    asked = _identity(recipe, data, base)
    before = _read(folder, asked)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**20
    held_out = len(data.held_out) if data.held_out is not None else 0
    decided = before or resolve(recipe, rows=len(data.train), held_out=held_out, base_limit=limit)
    rows = [*data.train.rows, *(data.held_out.rows if data.held_out is not None else ())]
    found = estimate(
        config,
        decided,
        quantization=base.quantization,
        dtype=base.dtype,
        device=base.device,
        longest_row=max(map(len, rows)),
        total_tokens=_total_tokens(decided, data.train),
        supervised_part=_supervised_part(data.train),
        memory_limit=memory_limit,
        base_resident=base_resident,
        rate=rate,
    )
    if not found.fits and before is None:
        raise DoesNotFitError(found)
    decided = replace(
        decided, micro_tokens=found.micro_tokens, gradient_checkpointing=found.gradient_checkpointing
    )
    if before is None:
        _write(folder, asked, decided)
    return Plan(decided, data, found, asked)


def _total_tokens(recipe: Recipe, data: Dataset) -> int:
    """Of all steps together."""
    sizes = [len(row) for row in data.rows]
    if not recipe.max_steps:
        return round(float(recipe.epochs) * sum(sizes))
    batch = int(recipe.batch_size)
    steps = range(step_count(recipe, len(sizes)))
    return sum(sizes[row] for step in steps for row in step_rows(len(sizes), batch, step, recipe.seed))


def _supervised_part(data: Dataset) -> float:
    return sum(map(targets_of, data.rows)) / max(1, sum(map(len, data.rows)))


def _identity(recipe: Recipe, data: Data, base: BaseSettings) -> str:
    settings = {"quantization": base.quantization, "dtype": str(base.dtype)}
    held_out = data.held_out.digest if data.held_out is not None else ""
    parts = [recipe.to_json(), data.train.digest, held_out, base_id(base.folder, settings)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(folder: Path, identity: str) -> Recipe | None:
    path = folder / _FILE
    if not path.exists():
        return None
    try:
        held = json.loads(path.read_text())
        if held["identity"] == identity:
            return parse_recipe(held["recipe"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): remove {folder} to begin anew") from error
    raise CheckpointError(
        f"{folder} holds a run with another recipe, other data or another base: go on with the same ones, "
        "choose another folder, or remove this one"
    )


def _write(folder: Path, identity: str, recipe: Recipe) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / f".{_FILE}.part"
    work.write_text(json.dumps({"identity": identity, "recipe": recipe.to_json()}, indent=1))
    sync(work)
    work.rename(folder / _FILE)
    sync(folder)
