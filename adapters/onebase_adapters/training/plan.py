"""What a run will do, decided before anything is trained: its data, its recipe, whether it fits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from onebase_adapters.base import BaseSettings
from onebase_adapters.base_identity import base_id
from onebase_adapters.training.batches import targets_of
from onebase_adapters.training.checkpoint import CheckpointError, Checkpoints, write_whole
from onebase_adapters.training.data.dataset import Dataset, Row, split
from onebase_adapters.training.data.reader import load_dataset
from onebase_adapters.training.data.tokens import asks_for_date
from onebase_adapters.training.estimate import Estimate, estimate
from onebase_adapters.training.recipe import (
    AUTO_EVAL_SPLIT,
    MOST_HELD_OUT,
    Recipe,
    RecipeError,
    parse_recipe,
    resolve,
    step_count,
    token_count,
)

_FILE = "plan.json"
_DATE_FILE = "template_date"
_MEMORY = ("micro_tokens", "gradient_checkpointing")


class DoesNotFitError(Exception):
    """The run would take more memory than it may; the message says what to change."""

    def __init__(self, estimate: Estimate) -> None:
        super().__init__(estimate.advice)
        self.estimate = estimate


@dataclass(frozen=True)
class Data:
    """Tokenized rows. `held_out` is None if nothing is held out. Names are for people.

    given: rows of a file of held-out data; 0 if there was none.
    """

    train: Dataset
    held_out: Dataset | None
    train_name: str
    held_out_name: str
    given: int = 0


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
        return Data(rows, other, train_name, held_out_name or Path(held_out).name, given=len(other))
    if recipe.eval_split == 0:
        return Data(rows, None, train_name, "")
    if recipe.eval_split == "auto":
        rows, other = split(rows, AUTO_EVAL_SPLIT, recipe.seed, limit=MOST_HELD_OUT)
    else:
        rows, other = split(rows, recipe.eval_split, recipe.seed, limit=len(rows))
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
    """Decide what is "auto", or read what was decided when the run in `folder` began to compute.

    Args:
        config: the base's, from transformers. memory_limit: bytes that the process may take.
        base_resident: the base is another process's. rate: FLOP/s of the machine, if known.

    Raises:
        DoesNotFitError, RecipeError.
        CheckpointError: the folder holds another run.
    """
    if not len(data.train):
        raise RecipeError("training_file", "no row is left to train on: add rows, or hold out fewer")
    identity = identity_of(recipe, data, base)

    def decide(before: Recipe | None) -> Plan:
        decided = before or resolved(recipe, data, config)
        found = estimate(
            config,
            decided,
            quantization=base.quantization,
            dtype=base.dtype,
            device=base.device,
            longest_row=max(map(len, _all_rows(data))),
            total_tokens=token_count(decided, len(data.train), sum(map(len, data.train.rows))),
            supervised_part=_supervised_part(data.train),
            memory_limit=memory_limit,
            base_resident=base_resident,
            rate=rate,
        )
        return Plan(found.applied_to(decided), data, found, identity)

    before = _read(folder, identity, recipe)
    plan = decide(before)
    if not plan.estimate.fits and not Checkpoints(folder / "checkpoints", recipe.keep).steps():
        # Nothing was computed yet, perhaps by a plan for another machine.
        plan = decide(None)
        if not plan.estimate.fits:
            raise DoesNotFitError(plan.estimate)
    if plan.recipe != before:
        _write(folder, identity, plan.recipe)
    return plan


def resolved(recipe: Recipe, data: Data, config: Any) -> Recipe:
    """The recipe with all decided but for what depends on memory. `config`: the base's."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**20
    return resolve(recipe, rows=len(data.train), held_out=data.given, base_limit=limit)


def _all_rows(data: Data) -> list[Row]:
    return [*data.train.rows, *(data.held_out.rows if data.held_out is not None else ())]


def _supervised_part(data: Dataset) -> float:
    return sum(map(targets_of, data.rows)) / max(1, sum(map(len, data.rows)))


def identity_of(recipe: Recipe, data: Data, base: BaseSettings) -> str:
    """SHA-256 of recipe, data and base, by which a folder knows its run."""
    settings = {"quantization": base.quantization, "dtype": str(base.dtype)}
    held_out = data.held_out.digest if data.held_out is not None else ""
    # Only what was asked for: a setting that a later release adds makes no other run of it.
    # How much is computed at once may be asked for otherwise when a run goes on that needed too much memory.
    defaults = Recipe().to_json()
    asked = {
        name: value
        for name, value in recipe.to_json().items()
        if value != defaults.get(name) and name not in _MEMORY
    }
    parts = [asked, data.train.digest, held_out, base_id(base.folder, settings)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(folder: Path, identity: str, asked: Recipe) -> Recipe | None:
    """What was decided when the run in the folder began, with what is asked for now as to memory."""
    path = folder / _FILE
    if not path.exists():
        return None
    try:
        held = json.loads(path.read_text())
        if held["identity"] == identity:
            wishes = {name: getattr(asked, name) for name in _MEMORY if getattr(asked, name) != "auto"}
            return parse_recipe({**held["recipe"], **wishes})
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): remove {folder} to begin anew") from error
    raise CheckpointError(
        f"{folder} holds a run with another recipe, other data or another base: go on with the same ones, "
        "choose another folder, or remove this one"
    )


def _write(folder: Path, identity: str, recipe: Recipe) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / _FILE, json.dumps({"identity": identity, "recipe": recipe.to_json()}, indent=1))


def pin_template_date(recipe: Recipe, tokenizer: Any, folder: Path) -> Recipe:
    """The recipe with the day on which the run in `folder` began; as it is, if the template prints none.

    That day is today, until `keep_template_date`. Raises CheckpointError, OSError.
    """
    if recipe.template_date != "auto" or not asks_for_date(tokenizer):
        return recipe
    path = folder / _DATE_FILE
    try:
        day = date.fromisoformat(path.read_text()).isoformat()
    except FileNotFoundError:
        day = date.today().isoformat()
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): remove {folder} to begin anew") from error
    return replace(recipe, template_date=day)


def keep_template_date(recipe: Recipe, folder: Path) -> None:
    """The run in `folder` begins: on another day it goes on with the recipe's one. Raises OSError."""
    path = folder / _DATE_FILE
    if recipe.template_date != "auto" and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, recipe.template_date)
