"""Many small runs in turn on one loaded base, to find rank, targets and learning rate for a task.

All runs share the tokenized data. They follow successive halving (Jamieson and Talwalkar 2016): each trains
for a quarter of the steps, the better half continues to a half of them, and the better half of those to the
end. They are compared by held-out loss after equally many steps of the same schedule. Results are stored in
the sweep's folder: the same call again continues it, and a larger grid adds runs to the existing ones.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from onebase_adapters.store.atomic_files import write_atomically
from onebase_engine.machine import is_out_of_memory
from onebase_training import events
from onebase_training.checkpoint import CheckpointError
from onebase_training.data.tokens import with_invocation
from onebase_training.estimate import adapted_shapes, ranks_of
from onebase_training.events import Gate
from onebase_training.loop import TrainingDivergedError
from onebase_training.recipe import Auto, Recipe, RecipeError, decided, step_count
from onebase_training.replies import BASE_METRICS
from onebase_training.run import (
    Data,
    DoesNotFitError,
    PlannedRun,
    TrainingRequest,
    identity_of,
    keep_rows,
    keep_template_date,
    load_tokenizer,
    make_plan,
    read_data,
    resolved,
    with_template_date,
)

RUNGS = (0.25, 0.5)
"""Parts of the steps after which runs are compared, before the end."""
_EVALUATIONS = 8
_FILE = "sweep.json"

Status = Literal["waiting", "paused", "stopped", "finished", "failed"]


@dataclass(frozen=True)
class Grid:
    """Values to try, in every combination. alpha: "auto" is twice the rank. targets: as in a recipe, each."""

    r: tuple[int, ...] = (8, 16, 32, 64)
    alpha: tuple[float | Auto, ...] = ("auto",)
    targets: tuple[tuple[str, ...], ...] = (("all-linear",),)
    learning_rate: tuple[float, ...] = (2e-4, 5e-4, 1e-3)

    def recipes(self, recipe: Recipe) -> Iterator[Recipe]:
        """Yield one recipe for each combination, each once. Raises RecipeError."""
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
    reason: of its failure. diverged: it would diverge again; a run that lacked memory is tried again.
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
        """Time of training, in seconds, without evaluations."""
        return self.curve[-1][1] if self.curve else 0.0

    def loss_at(self, step: int) -> float:
        """Return the loss at the last evaluation up to `step`; infinite if there is none, or if the run
        failed."""
        losses = [loss for at, _, loss in self.curve if 0 < at <= step]
        return losses[-1] if losses and self.status != "failed" else math.inf


def name_of(recipe: Recipe) -> str:
    """Return the name of a run, from the settings that differ between runs; it is also that of its folder."""
    targets = re.sub(r"[^\w.-]", "_", "+".join(recipe.targets))
    if len(targets) > 60:
        targets = f"{targets[:40]}-{hashlib.sha256(targets.encode()).hexdigest()[:8]}"
    alpha = recipe.alpha if recipe.alpha == "auto" else f"{recipe.alpha:g}"
    return f"r{recipe.r}-alpha{alpha}-{targets}-lr{recipe.learning_rate:g}"


Listen = Callable[[Trial, events.Event], None]


@dataclass(frozen=True)
class SweepResult:
    """All runs, best first: finished ones, then by the steps they reached and by loss."""

    trials: list[Trial]
    base_loss: float
    steps: int
    folder: Path

    @property
    def best(self) -> Trial | None:
        """Finished run with the lowest held-out loss, or None."""
        first = self.trials[0] if self.trials else None
        return first if first is not None and first.status == "finished" else None

    def adapter(self, trial: Trial) -> Path:
        """Return the PEFT folder of a finished run."""
        return self.folder / trial.name / "adapter"


def sweep(
    load: Callable[[], nn.Module],
    job: TrainingRequest,
    grid: Grid,
    listen: Listen,
    gate: Gate,
    *,
    survivors: float = 0.5,
    report: Callable[[str], None] = lambda message: None,
) -> SweepResult:
    """Train the grid's runs on one base, in `job.folder`; each run has its own folder there.

    Args:
        load: returns the base; it is called once the data is read.
        job: as for `train`; its recipe has the settings that are the same in all runs.
        survivors: part of the runs that continues at each rung; 1 runs all to the end.
        report: called with a line at each rung.

    Raises:
        DataError: a file has bad lines. CheckpointError: the folder holds another sweep.
        RecipeError: a setting cannot be used on this base, or nothing is held out.
        Interrupted: by the gate; the same call continues the sweep.
    """
    tokenizer = load_tokenizer(job.base)
    job = with_template_date(job, tokenizer)
    job = replace(job, recipe=with_invocation(job.recipe, tokenizer))
    recipes = {name_of(recipe): recipe for recipe in grid.recipes(job.recipe)}
    data = read_data(job, tokenizer, lambda part: gate.wait())
    if data.held_out is None:
        raise RecipeError("eval_split", "a sweep compares held-out losses: set eval_split above 0")
    base = load()
    for recipe in recipes.values():
        ranks_of(adapted_shapes(base, recipe.targets), recipe)
    runs = _Sweep(base, job, data, listen, gate)
    runs.open_runs(recipes)
    keep_template_date(job)
    if not data.kept:
        keep_rows(job, data)
    active = list(recipes)
    for rung in runs.rungs(len(active), survivors):
        for name in active:
            runs.advance(runs.trials[name], recipes[name], rung)
        if rung < runs.steps:
            kept = _better([runs.trials[name] for name in active], rung, survivors)
            runs.stop([name for name in active if name not in kept])
            report(f"step {rung} of {runs.steps}: {len(kept)} of {len(active)} runs continue")
            active = kept
    ranked = sorted((runs.trials[name] for name in recipes), key=_rank)
    return SweepResult(ranked, runs.base_loss, runs.steps, job.folder)


def _better(trials: Sequence[Trial], rung: int, survivors: float) -> list[str]:
    """Return the names of the runs that continue, in their order; none that failed."""
    order = sorted((t for t in trials if t.status != "failed"), key=lambda trial: trial.loss_at(rung))
    chosen = order[: max(1, math.ceil(len(trials) * survivors))]
    return [trial.name for trial in trials if trial in chosen]


def _rank(trial: Trial) -> tuple[bool, bool, int, float]:
    """Return a key that sorts finished runs first, then those that reached most steps."""
    finished = trial.status == "finished"
    loss = math.inf if trial.loss is None else trial.loss
    return not finished, trial.status == "failed", 0 if finished else -trial.step, loss


class _Sweep:
    """Runs of one sweep, on one base and one set of rows. The folder's file records the progress of each."""

    def __init__(self, base: Any, job: TrainingRequest, data: Data, listen: Listen, gate: Gate) -> None:
        self._base, self._job, self._data = base, job, data
        self._listen, self._gate = listen, gate
        self.steps = step_count(resolved(job.recipe, data, base.config), len(data.train))
        auto = math.ceil(self.steps / _EVALUATIONS)
        self._every = auto if job.recipe.eval_every == "auto" else job.recipe.eval_every
        common = replace(job.recipe, r=1, alpha="auto", targets=("all-linear",), learning_rate="auto")
        self._identity = identity_of(replace(job, recipe=common), data)
        self.trials: dict[str, Trial] = {}

    @property
    def base_loss(self) -> float:
        curves = (trial.curve for trial in self.trials.values())
        return next((curve[0][2] for curve in curves if curve and curve[0][0] == 0), math.nan)

    def rungs(self, runs: int, survivors: float) -> list[int]:
        """Return the steps at which runs are evaluated and compared; the last is the end."""
        every = self._every
        parts = RUNGS if runs > 1 and survivors < 1 else ()
        rungs = {every * max(1, round(part * self.steps / every)) for part in parts}
        return [*sorted(rung for rung in rungs if rung < self.steps), self.steps]

    def open_runs(self, recipes: Mapping[str, Recipe]) -> None:
        """Read the existing runs and add the new ones. Raises CheckpointError."""
        path = self._job.folder / _FILE
        if path.exists():
            self._read(path)
        for trial in self.trials.values():
            if trial.status == "failed" and not trial.diverged:
                trial.status, trial.reason = "waiting", ""
        for name, recipe in recipes.items():
            if name not in self.trials:
                alpha, rate = decided(recipe.alpha), decided(recipe.learning_rate)
                self.trials[name] = Trial(name, recipe.r, float(alpha), list(recipe.targets), rate)
        self._job.folder.mkdir(parents=True, exist_ok=True)
        self._write()

    def _read(self, path: Path) -> None:
        try:
            held = json.loads(path.read_text())
            trials = [Trial(**{**one, "curve": [tuple(p) for p in one["curve"]]}) for one in held["trials"]]
            same = held["identity"] == self._identity
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError.unreadable(path, error) from error
        if not same:
            raise CheckpointError(
                f"{path.parent} holds a sweep with other data, another base or other common settings: choose "
                "another folder, or remove this one"
            )
        self.trials = {trial.name: trial for trial in trials}

    def _write(self) -> None:
        held = {"identity": self._identity, "trials": [asdict(trial) for trial in self.trials.values()]}
        write_atomically(self._job.folder / _FILE, json.dumps(held, indent=1))

    def stop(self, names: Sequence[str]) -> None:
        """Mark the losers; a run that finished under another grid stays finished."""
        for trial in (self.trials[name] for name in names):
            if trial.status not in ("finished", "failed"):
                trial.status = "stopped"
                self._remove_checkpoints(trial)
        self._write()

    def _remove_checkpoints(self, trial: Trial) -> None:
        """Remove a run's checkpoints, which only a continuing run needs; they take several times the
        adapter's size."""
        shutil.rmtree(self._job.folder / trial.name / "checkpoints", ignore_errors=True)

    def advance(self, trial: Trial, recipe: Recipe, rung: int) -> None:
        """Train one run up to a step; nothing if it has reached it already. Raises as `sweep`."""
        if trial.status in ("finished", "failed") or (rung < self.steps and trial.step >= rung):
            return
        try:
            self._run(trial, replace(recipe, eval_every=self._every), rung)
        except TrainingDivergedError as error:
            trial.status, trial.reason, trial.diverged = "failed", str(error), True
        except DoesNotFitError as error:
            trial.status, trial.reason = "failed", str(error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            trial.status, trial.reason = "failed", "there was not enough memory"
        self._write()
        gc.collect()  # the run's tensors, which an exception's traceback may have kept

    def _run(self, trial: Trial, recipe: Recipe, rung: int) -> None:
        job = replace(self._job, name=trial.name, folder=self._job.folder / trial.name, recipe=recipe)
        self._share_base_metrics(job.folder)
        plan = make_plan(job, self._data, self._base.config)
        trial.parameters = plan.estimate.parameters
        run = PlannedRun(self._base, job, plan, self._recorder(trial), self._gate)
        if not run.train(until=rung):
            trial.status = "paused"
            return
        trial.metrics = run.finish().metrics_after
        trial.status = "finished"
        self._remove_checkpoints(trial)

    def _share_base_metrics(self, folder: Path) -> None:
        """Copy the base's metrics from another run: the base answers the same prompts in all runs."""
        held = next(self._job.folder.glob(f"*/{BASE_METRICS}"), None)
        if held is not None and not (folder / BASE_METRICS).exists():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(held, folder / BASE_METRICS)

    def _recorder(self, trial: Trial) -> Callable[[events.Event], None]:
        """Return a listener that records the run's curve."""
        seconds, before = 0.0, 0.0

        def record(event: events.Event) -> None:
            nonlocal seconds, before
            if isinstance(event, events.Planned):
                # A run that continues from a checkpoint repeats what came after it.
                trial.curve = [point for point in trial.curve if point[0] <= event.first_step]
                seconds = trial.seconds
            if isinstance(event, events.StepDone):
                seconds += event.at - before
            if isinstance(event, events.Evaluated):
                trial.curve = [point for point in trial.curve if point[0] < event.step]
                trial.curve.append((event.step, seconds, event.loss))
                self._write()
            before = event.at  # what is done between two steps, evaluations above all, is not training
            self._listen(trial, event)

        return record
