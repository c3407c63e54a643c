"""A run before it computes: what is asked for, its data, its recipe with all decided, and whether it fits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from onebase_adapters.store.atomic_files import write_atomically
from onebase_adapters.training.checkpoint import CheckpointError, Checkpoints
from onebase_adapters.training.data.dataset import Dataset, split
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
from onebase_engine.base.identity import base_id
from onebase_engine.base.load import BaseSettings

_PLAN, _DATE = "plan.json", "template_date"
_MEMORY = ("micro_tokens", "gradient_checkpointing")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train, on what, and where to.

    train, held_out: files or Hub data sets; without `held_out` the recipe's split is held out. names: what
    the two are called, where their paths do not say it. folder: the run's own; a run that is in it goes on.
    base_repo: the base's name on the Hub, None if it has none. memory_limit: bytes that the process may
    take. base_resident: the base is another process's. save_dtype: of the tensors in the adapter's file.
    """

    name: str
    recipe: Recipe
    train: str | Path
    held_out: str | Path | None = None
    names: tuple[str | None, str | None] = (None, None)
    folder: Path
    base: BaseSettings
    base_name: str
    base_repo: str | None = None
    base_commit: str | None = None
    memory_limit: int | None = None
    base_resident: bool = False
    save_dtype: torch.dtype = torch.float32


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


def load_tokenizer(base: BaseSettings) -> Any:
    """The base's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)


def read_data(job: Job, tokenizer: Any, on_progress: Callable[[float], None]) -> Data:
    """Both files of a job, or one of which a part is held out.

    Args:
        on_progress: gets the part that is read, from 0 to 1. What it raises ends the reading.

    Raises:
        DataError: a file has bad lines.
    """
    recipe, (name, held_out_name) = job.recipe, job.names
    part = 0.5 if job.held_out is not None else 1.0
    rows = load_dataset(
        job.train, tokenizer, recipe, name=name, on_progress=lambda done: on_progress(done * part)
    )
    name = name or Path(job.train).name
    if job.held_out is not None:
        other = load_dataset(
            job.held_out,
            tokenizer,
            recipe,
            part="eval",
            name=held_out_name,
            on_progress=lambda done: on_progress(part + done * part),
        )
        return Data(rows, other, name, held_out_name or Path(job.held_out).name, given=len(other))
    if recipe.eval_split == 0:
        return Data(rows, None, name, "")
    if recipe.eval_split == "auto":
        rows, other = split(rows, AUTO_EVAL_SPLIT, recipe.seed, limit=MOST_HELD_OUT)
    else:
        rows, other = split(rows, recipe.eval_split, recipe.seed, limit=len(rows))
    return Data(rows, other if len(other) else None, name, f"held out of {name}")


def make_plan(job: Job, data: Data, config: Any, rate: float | None = None) -> Plan:
    """Decide what is "auto", or read what was decided when the run in the job's folder began to compute.

    Args:
        config: the base's, from transformers. rate: FLOP/s of the machine, if known.

    Raises:
        DoesNotFitError, RecipeError.
        CheckpointError: the folder holds another run.
    """
    if not len(data.train):
        raise RecipeError("training_file", "no row is left to train on: add rows, or hold out fewer")
    identity = identity_of(job, data)

    def decide(before: Recipe | None) -> Plan:
        recipe = before or resolved(job.recipe, data, config)
        found = _estimate(job, recipe, data, config, rate)
        return Plan(found.applied_to(recipe), data, found, identity)

    before = _read(job, identity)
    plan = decide(before)
    if not plan.estimate.fits and not Checkpoints(job.folder / "checkpoints", job.recipe.keep).steps():
        # Nothing was computed yet, perhaps by a plan for another machine.
        plan = decide(None)
        if not plan.estimate.fits:
            raise DoesNotFitError(plan.estimate)
    if plan.recipe != before:
        job.folder.mkdir(parents=True, exist_ok=True)
        held = {"identity": identity, "recipe": plan.recipe.to_json()}
        write_atomically(job.folder / _PLAN, json.dumps(held, indent=1))
    return plan


def _estimate(job: Job, recipe: Recipe, data: Data, config: Any, rate: float | None) -> Estimate:
    rows, held_out = data.train.rows, data.held_out.rows if data.held_out is not None else ()
    tokens = sum(map(len, rows))
    return estimate(
        config,
        recipe,
        quantization=job.base.quantization,
        dtype=job.base.dtype,
        device=job.base.device,
        longest_row=max(map(len, [*rows, *held_out])),
        total_tokens=token_count(recipe, len(rows), tokens),
        supervised_part=sum(row.targets for row in rows) / max(1, tokens),
        memory_limit=job.memory_limit,
        base_resident=job.base_resident,
        rate=rate,
    )


def resolved(recipe: Recipe, data: Data, config: Any) -> Recipe:
    """The recipe with all decided but for what depends on memory. `config`: the base's."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**20
    return resolve(recipe, rows=len(data.train), held_out=data.given, base_limit=limit)


def identity_of(job: Job, data: Data) -> str:
    """SHA-256 of recipe, data and base, by which a folder knows its run."""
    settings = {"quantization": job.base.quantization, "dtype": str(job.base.dtype)}
    held_out = data.held_out.digest if data.held_out is not None else ""
    # Only what was asked for: a setting that a later release adds makes no other run of it.
    # How much is computed at once may change when a run goes on that needed too much memory.
    defaults = Recipe().to_json()
    asked = {
        name: value
        for name, value in job.recipe.to_json().items()
        if value != defaults.get(name) and name not in _MEMORY
    }
    parts = [asked, data.train.digest, held_out, base_id(job.base.folder, settings)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(job: Job, identity: str) -> Recipe | None:
    """What was decided when the run in the folder began, with what is asked for now as to memory."""
    path = job.folder / _PLAN
    if not path.exists():
        return None
    try:
        held = json.loads(path.read_text())
        if held["identity"] == identity:
            asked = {name: value for name in _MEMORY if (value := getattr(job.recipe, name)) != "auto"}
            return parse_recipe({**held["recipe"], **asked})
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError.unreadable(path, error) from error
    raise CheckpointError.other_run(job.folder)


def with_template_date(job: Job, tokenizer: Any) -> Job:
    """The job with the day on which the run in its folder began; as it is, if the template prints none.

    A chat template that asks for today's date, as Llama 3.2's does, would write other rows after midnight.
    The day is today, until `keep_template_date`. Raises CheckpointError, OSError.
    """
    if job.recipe.template_date != "auto" or not asks_for_date(tokenizer):
        return job
    path = job.folder / _DATE
    try:
        day = date.fromisoformat(path.read_text()).isoformat()
    except FileNotFoundError:
        day = date.today().isoformat()
    except ValueError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): remove {job.folder} to start over"
        ) from error
    return replace(job, recipe=replace(job.recipe, template_date=day))


def keep_template_date(job: Job) -> None:
    """The run begins: on another day it goes on with this one's date. Raises OSError."""
    path = job.folder / _DATE
    if job.recipe.template_date != "auto" and not path.exists():
        job.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, job.recipe.template_date)
