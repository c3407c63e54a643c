"""The runs of a sweep: what is tried, and how far each is, on disk."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from onebase_adapters.training import events
from onebase_adapters.training.checkpoint import CheckpointError, write_whole
from onebase_adapters.training.estimate import ranks_of
from onebase_adapters.training.events import Gate, Interrupted
from onebase_adapters.training.loop import TrainingDivergedError
from onebase_adapters.training.machine import is_out_of_memory
from onebase_adapters.training.plan import (
    Data,
    DoesNotFitError,
    identity_of,
    keep_template_date,
    make_plan,
    pin_template_date,
    read_data,
    resolved,
)
from onebase_adapters.training.recipe import Auto, Recipe, RecipeError, decided, step_count
from onebase_adapters.training.run import Job, load_tokenizer, run_plan
from onebase_adapters.training.targets import target_layers

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
        write_whole(self._path, json.dumps({"identity": self._identity, "trials": trials}, indent=1))

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


RUNGS = (0.25, 0.5)
"""Parts of the steps after which runs are compared, before the end."""
_EVALUATIONS = 8
_BASE_METRICS = "base_metrics.json"

Listen = Callable[[Trial, events.Event], None]


@dataclass(frozen=True)
class SweepResult:
    """All runs, best first: those that finished, then by how far they came and their loss."""

    trials: list[Trial]
    base_loss: float
    steps: int
    folder: Path

    @property
    def best(self) -> Trial | None:
        """The finished run with the lowest held-out loss."""
        first = self.trials[0] if self.trials else None
        return first if first is not None and first.status == "finished" else None

    def adapter(self, trial: Trial) -> Path:
        """The PEFT folder of a finished run."""
        return self.folder / trial.name / "adapter"


def sweep(
    base: nn.Module,
    job: Job,
    grid: Grid,
    listen: Listen,
    gate: Gate,
    *,
    survivors: float = 0.5,
    tell: Callable[[str], None] = lambda message: None,
) -> SweepResult:
    """Run what the grid says on a loaded base, in `job.folder`; each run has a folder of its own there.

    Args:
        job: as for `train`; its recipe has what is the same in all runs.
        survivors: part of the runs that goes on at each rung; 1 runs all to the end.
        tell: gets a line at each rung.

    Raises:
        DataError: a file has bad lines. CheckpointError: the folder holds another sweep.
        RecipeError: a setting cannot be used on this base, or nothing is held out.
        Interrupted: as the gate says; the same call goes on.
    """
    tokenizer = load_tokenizer(job.base)
    job = replace(job, recipe=pin_template_date(job.recipe, tokenizer, job.folder))
    recipes = {name_of(recipe): recipe for recipe in grid.recipes(job.recipe)}
    for recipe in recipes.values():
        ranks_of(target_layers(base, recipe.targets), recipe)
    data = read_data(
        job.train,
        job.held_out,
        tokenizer,
        job.recipe,
        names=job.names,
        on_progress=lambda part: gate.wait(),
    )
    if data.held_out is None:
        raise RecipeError("eval_split", "a sweep compares held-out losses: set eval_split above 0")
    steps, every = _lengths(base, job.recipe, data)
    state = Trials.open(job, data, recipes)
    keep_template_date(job.recipe, job.folder)
    run = _Sweep(base, job, data, state, listen, gate, every)
    active = list(recipes)
    for rung in _rungs(steps, every, len(active), survivors):
        for name in active:
            run.advance(name, recipes[name], rung if rung < steps else None)
        if rung < steps:
            kept = _better(state.trials, active, rung, survivors)
            state.stop([name for name in active if name not in kept])
            tell(f"step {rung} of {steps}: {len(kept)} of {len(active)} runs go on")
            active = kept
    return SweepResult(_ranked(state.chosen(recipes)), _base_loss(state), steps, job.folder)


def _lengths(base: Any, recipe: Recipe, data: Data) -> tuple[int, int]:
    """Steps of every run, and between evaluations."""
    steps = step_count(resolved(recipe, data, base.config), len(data.train))
    every = math.ceil(steps / _EVALUATIONS) if recipe.eval_every == "auto" else recipe.eval_every
    return steps, every


def _rungs(steps: int, every: int, runs: int, survivors: float) -> list[int]:
    """Steps, multiples of `every`, after which runs are compared; the last is the end."""
    if runs < 2 or survivors >= 1:
        return [steps]
    rungs = {every * max(1, round(part * steps / every)) for part in RUNGS}
    return [*sorted(rung for rung in rungs if rung < steps), steps]


def _better(trials: dict[str, Trial], names: Sequence[str], rung: int, survivors: float) -> list[str]:
    """The part of the runs that goes on, in their own order; none that failed."""
    whole = [name for name in names if trials[name].status != "failed"]
    order = sorted(whole, key=lambda name: trials[name].loss_at(rung))
    chosen = set(order[: max(1, math.ceil(len(names) * survivors))])
    return [name for name in names if name in chosen]


def _ranked(trials: list[Trial]) -> list[Trial]:
    def place(trial: Trial) -> tuple[bool, bool, int, float]:
        loss = trial.loss if trial.loss is not None else math.inf
        finished = trial.status == "finished"
        return (not finished, trial.status == "failed", 0 if finished else -trial.step, loss)

    return sorted(trials, key=place)


def _base_loss(state: Trials) -> float:
    return next((t.curve[0][2] for t in state.trials.values() if t.curve and t.curve[0][0] == 0), math.nan)


class _Rung:
    """A gate that ends a run at a step, so that it can go on from there."""

    def __init__(self, outer: Gate) -> None:
        self._outer = outer
        self.reached = False

    def wait(self) -> None:
        self._outer.wait()
        if self.reached:
            raise Interrupted("pause")


class _Sweep:
    """Runs trials on one base with one set of rows."""

    def __init__(
        self, base: nn.Module, job: Job, data: Data, state: Trials, listen: Listen, gate: Gate, every: int
    ) -> None:
        self._base: Any = base
        self._job = job
        self._data = data
        self._state = state
        self._listen = listen
        self._gate = gate
        self._every = every

    def advance(self, name: str, recipe: Recipe, rung: int | None) -> None:
        """Train one run up to a step, or to its end; nothing if it is there already. Raises as `sweep`."""
        trial = self._state.trials[name]
        if trial.status in ("finished", "failed") or (rung is not None and trial.step >= rung):
            return
        gate = _Rung(self._gate)
        recorder = _Recorder(trial, self._listen, self._state, gate, rung)
        try:
            self._run(trial, recipe, gate, recorder)
        except Interrupted:
            if not gate.reached:
                raise
            trial.status = "paused"
        except TrainingDivergedError as error:
            trial.status, trial.reason, trial.diverged = "failed", str(error), True
        except DoesNotFitError as error:
            trial.status, trial.reason = "failed", str(error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            trial.status, trial.reason = "failed", "there was not enough memory"
        self._state.write()
        gc.collect()  # the run's tensors, which an exception's traceback may have kept

    def _run(self, trial: Trial, recipe: Recipe, gate: Gate, recorder: _Recorder) -> None:
        job = replace(
            self._job,
            name=trial.name,
            folder=self._job.folder / trial.name,
            recipe=replace(recipe, eval_every=self._every),
        )
        self._share_base_metrics(job.folder)
        plan = make_plan(
            job.folder,
            job.recipe,
            self._data,
            job.base,
            self._base.config,
            memory_limit=job.memory_limit,
            base_resident=job.base_resident,
            rate=None,
        )
        trial.parameters = plan.estimate.parameters
        report = run_plan(self._base, job, plan, recorder, gate)
        trial.status, trial.metrics = "finished", report.metrics_after
        self._state.forget(trial)

    def _share_base_metrics(self, folder: Path) -> None:
        """The base answers the same prompts in all runs: once is enough."""
        held = next(self._job.folder.glob(f"*/{_BASE_METRICS}"), None)
        if held is not None and not (folder / _BASE_METRICS).exists():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(held, folder / _BASE_METRICS)


class _Recorder:
    """Takes a run's events: keeps its curve and tells the gate when the rung is reached."""

    def __init__(self, trial: Trial, listen: Listen, state: Trials, gate: _Rung, rung: int | None) -> None:
        self._trial = trial
        self._listen = listen
        self._state = state
        self._gate = gate
        self._rung = rung
        self._seconds = 0.0
        self._since = 0.0

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.Planned):
            self._begin(event.first_step)
        if isinstance(event, events.StepDone):
            self._seconds += event.at - self._since
        if isinstance(event, events.Evaluated):
            self._evaluated(event)
        # What else is done between two steps, evaluations above all, is no training.
        self._since = event.at
        self._listen(self._trial, event)

    def _begin(self, step: int) -> None:
        """A run that goes on from a checkpoint repeats what came after it."""
        self._trial.curve = [point for point in self._trial.curve if point[0] <= step]
        self._seconds = self._trial.seconds

    def _evaluated(self, event: events.Evaluated) -> None:
        self._trial.curve = [point for point in self._trial.curve if point[0] < event.step]
        self._trial.curve.append((event.step, self._seconds, event.loss))
        self._state.write()
        if self._rung is not None and event.step >= self._rung:
            self._gate.reached = True
