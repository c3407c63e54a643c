"""Many small runs in turn on one loaded base, to find rank, targets and learning rate for a task.

All runs share the tokenized data. They go by successive halving (Jamieson and Talwalkar 2016): each trains
for a quarter of the steps, the better half goes on to a half of them, and the better half of those to the
end. They are compared by held-out loss after equally many steps of the same schedule. What was computed is in
the sweep's folder: the same call again goes on, and a larger grid adds runs to those that are there.
"""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from onebase_adapters.training import events
from onebase_adapters.training.estimate import ranks_of
from onebase_adapters.training.gate import Gate, Interrupted
from onebase_adapters.training.loop import TrainingDivergedError
from onebase_adapters.training.plan import Data, DoesNotFitError, make_plan, read_data, resolved
from onebase_adapters.training.recipe import Recipe, RecipeError, step_count
from onebase_adapters.training.run import Job, load_tokenizer, run_plan
from onebase_adapters.training.sweep_trials import Grid, Trial, Trials, name_of
from onebase_adapters.training.targets import target_layers
from onebase_adapters.training.template_date import keep_template_date, pin_template_date
from onebase_engine.machine import is_out_of_memory

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
