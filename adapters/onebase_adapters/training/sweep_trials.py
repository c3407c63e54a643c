"""The runs of a sweep: what is tried, and how far each is, on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from onebase_adapters.store.atomic_files import write_atomically
from onebase_adapters.training.checkpoint import CheckpointError
from onebase_adapters.training.plan import Data, identity_of
from onebase_adapters.training.recipe import Auto, Recipe, decided
from onebase_adapters.training.run import Job

_FILE = "sweep.json"

Status = Literal["waiting", "paused", "stopped", "finished", "failed"]


@dataclass(frozen=True)
class Grid:
    """What is tried: every combination. alpha: "auto" is twice the rank. targets: as in a recipe, each."""

    r: tuple[int, ...] = (8, 16, 32, 64)
    alpha: tuple[float | Auto, ...] = ("auto",)
    targets: tuple[tuple[str, ...], ...] = (("all-linear",),)
    learning_rate: tuple[float, ...] = (2e-4, 5e-4, 1e-3)

    def recipes(self, recipe: Recipe) -> Iterator[Recipe]:
        """One for each combination, each once. Raises RecipeError."""
        seen = set()
        for targets, rate, rank, alpha in itertools.product(
            self.targets, self.learning_rate, self.r, self.alpha
        ):
            scale = 2.0 * rank if alpha == "auto" else alpha
            made = replace(recipe, r=rank, alpha=scale, targets=targets, learning_rate=rate)
            if (name := name_of(made)) not in seen:
                seen.add(name)
                yield made


@dataclass
class Trial:
    """One run of a sweep.

    curve: (step, seconds of training, held-out loss), step 0 is the base. loss: the best of its adapter.
    reason: why it failed. diverged: it would again; one that failed for want of memory is tried again.
    """

    name: str
    r: int
    alpha: float
    targets: list[str]
    learning_rate: float
    parameters: int = 0
    status: Status = "waiting"
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    diverged: bool = False

    @property
    def loss(self) -> float | None:
        """Lowest held-out loss, in nats a supervised token; None before the first evaluation."""
        return min((loss for step, _, loss in self.curve if step), default=None)

    @property
    def step(self) -> int:
        """Steps until the last evaluation."""
        return self.curve[-1][0] if self.curve else 0

    @property
    def seconds(self) -> float:
        """Of training, evaluations not counted."""
        return self.curve[-1][1] if self.curve else 0.0

    def loss_at(self, step: int) -> float:
        """At the last evaluation that is not after `step`; infinite if there is none or it failed."""
        losses = [loss for at, _, loss in self.curve if 0 < at <= step]
        return losses[-1] if losses and self.status != "failed" else math.inf


def name_of(recipe: Recipe) -> str:
    """Of a run, by what differs between runs; also a folder's name."""
    targets = re.sub(r"[^\w.-]", "_", "+".join(recipe.targets))
    if len(targets) > 60:
        targets = f"{targets[:40]}-{hashlib.sha256(targets.encode()).hexdigest()[:8]}"
    alpha = recipe.alpha if recipe.alpha == "auto" else f"{recipe.alpha:g}"
    return f"r{recipe.r}-alpha{alpha}-{targets}-lr{recipe.learning_rate:g}"


class Trials:
    """The sweep's file: which runs there are and how far each is. Written after each change."""

    def __init__(self, path: Path, identity: str, trials: dict[str, Trial]) -> None:
        self._path = path
        self._identity = identity
        self.trials = trials

    @classmethod
    def open(cls, job: Job, data: Data, recipes: dict[str, Recipe]) -> Trials:
        """What is there, with the runs that are new. Raises CheckpointError."""
        path, identity = job.folder / _FILE, _identity(job, data)
        trials = _read(path, identity) if path.exists() else {}
        for trial in trials.values():
            if trial.status == "failed" and not trial.diverged:
                trial.status, trial.reason = "waiting", ""
        for name, recipe in recipes.items():
            if name not in trials:
                alpha, rate = decided(recipe.alpha), decided(recipe.learning_rate)
                trials[name] = Trial(name, recipe.r, float(alpha), list(recipe.targets), rate)
        state = cls(path, identity, trials)
        state.write()
        return state

    def write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        trials = [asdict(trial) for trial in self.trials.values()]
        write_atomically(self._path, json.dumps({"identity": self._identity, "trials": trials}, indent=1))

    def stop(self, names: Sequence[str]) -> None:
        """Mark the losers; one that finished under another grid stays finished."""
        for name in names:
            if self.trials[name].status not in ("finished", "failed"):
                self.trials[name].status = "stopped"
                self.forget(self.trials[name])
        self.write()

    def forget(self, trial: Trial) -> None:
        """Remove what only a run that goes on needs: several times the adapter's size, for each run."""
        shutil.rmtree(self._path.parent / trial.name / "checkpoints", ignore_errors=True)

    def chosen(self, names: Iterable[str]) -> list[Trial]:
        return [self.trials[name] for name in names]


def _read(path: Path, identity: str) -> dict[str, Trial]:
    try:
        held = json.loads(path.read_text())
        trials = [Trial(**{**one, "curve": [tuple(p) for p in one["curve"]]}) for one in held["trials"]]
        same = held["identity"] == identity
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): remove {path.parent} to begin anew"
        ) from error
    if not same:
        raise CheckpointError(
            f"{path.parent} holds a sweep with other data, another base or other common settings: choose "
            "another folder, or remove this one"
        )
    return {trial.name: trial for trial in trials}


def _identity(job: Job, data: Data) -> str:
    common = replace(job.recipe, r=1, alpha="auto", targets=("all-linear",), learning_rate="auto")
    return identity_of(common, data, job.base)
