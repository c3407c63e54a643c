"""Training loop, from the first step to the last, in one process or in several that share the work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onebase_engine.machine import peak_memory
from onebase_training import events
from onebase_training.batches import MicroBatch, pack, step_rows
from onebase_training.checkpoint import CheckpointError, Checkpoints, RunState
from onebase_training.data.dataset import Dataset, Row
from onebase_training.events import Interrupted
from onebase_training.objectives import Objective, PreparedRun
from onebase_training.processes import ProcessGroup
from onebase_training.recipe import Recipe, Schedule, decided, step_count
from onebase_training.slices import by_slice
from onebase_training.trainable import Trainable


class TrainingDivergedError(Exception):
    """A loss or gradient is not finite. `lines`: of the rows in the batch it came from."""

    def __init__(self, step: int, what: str, lines: Sequence[int]) -> None:
        shown = ", ".join(map(str, lines[:20])) + (" and more" if len(lines) > 20 else "")
        super().__init__(
            f"step {step}: {what} is not finite, on the rows of lines {shown}. Look at these rows, or lower "
            "learning_rate"
        )
        self.step = step
        self.lines = list(lines)


@dataclass(frozen=True)
class Step:
    """Result of one step. loss: mean over supervised tokens (DPO: pairs; classification: rows), nats."""

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    figures: dict[str, Any]
    """Fields of events: rewards or accuracy."""


class Trainer:
    """Trains one adapter. The recipe is resolved, `micro_tokens` included.

    Args:
        held_out: evaluated every `eval_every` steps; may be None.
        on_evaluation: called after each evaluation with the number of steps done.
        export: as `Checkpoints.save` takes it.
        base_scores: returns the base's scores on the held-out rows, for a classifier, whose base has no head.
            Called in the first process.
        last_step: called between steps, in the first process.
        listen: called with StepDone, Evaluated and Saved.
    """

    def __init__(
        self,
        trainable: Trainable,
        objective: Objective,
        recipe: Recipe,
        data: Dataset,
        held_out: Dataset | None,
        *,
        checkpoints: Checkpoints,
        identity: str,
        listen: events.Listen,
        processes: ProcessGroup | None = None,
        on_evaluation: Callable[[int], None] = lambda step: None,
        export: Callable[[Path], None] = lambda folder: None,
        base_scores: Callable[[], Scores] | None = None,
        last_step: events.LastStep | None = None,
    ) -> None:
        self.trainable = trainable
        self.recipe: Any = recipe
        self.steps = self._end = step_count(recipe, len(data))
        self.state = RunState(identity)
        self._objective = objective
        self._data = data
        self._held_out = held_out
        self._checkpoints = checkpoints
        self._listen = listen
        self._processes = processes or ProcessGroup()
        self._on_evaluation = on_evaluation
        self._export = export
        self._base_scores = base_scores
        self._last_step = last_step
        self._optimizer = make_optimizer(trainable.model, recipe)
        # Steps, tokens and seconds of this process alone: a checkpoint may be of a slower one.
        self._done = self._tokens = 0
        self._seconds = 0.0

    def resume(self) -> int:
        """Continue from the last checkpoint, if any; returns the steps done. Raises CheckpointError."""
        state = self._checkpoints.latest(self.state.identity)
        if state is not None:
            adapter, optimizer = self._checkpoints.tensors(state.step)
            self._load(adapter)
            self._optimizer.load_state_dict(optimizer)
            self.state = state
        return self.state.step

    def run_steps(self, until: int | None = None) -> RunState:
        """Train to the end, early stopping included, and leave the best adapter in the model.

        until: stop after this step, if it comes before the end, with a checkpoint to continue from.

        Raises:
            TrainingDivergedError: the last checkpoint is from before it.
            Interrupted: for a pause a checkpoint of the last whole step is written first.
            OSError: a checkpoint cannot be written; the one before is whole.
        """
        try:
            run = PreparedRun(self.state.identity, self._checkpoints.folder, self._processes)
            self._objective.prepare(self._rows_to_come(), self.recipe, run)
            self._ask_for_the_end()
            self._evaluate_what_is_due()
            while not self.finished and (until is None or self.state.step < until):
                started = time.monotonic()
                step = self.train_step(self.state.step)
                self._count(step, time.monotonic() - started)
                self._report(step)
                self._ask_for_the_end()
                loss = self._evaluate_what_is_due()
                if loss is not None:  # which may take long: what was asked meanwhile ends the run here
                    self._ask_for_the_end()
                done = self.state.step
                if self.finished or done == until or done % self.recipe.save_every == 0:
                    self._save(loss)
        except Interrupted as interrupt:
            if interrupt.reason == "pause":
                self._save(None)
            raise
        if self.finished and self.state.best_step and self.state.best_step != self.state.step:
            self._load(self._checkpoints.best(self.state.best_step))
        return self.state

    @property
    def finished(self) -> bool:
        """Whether the last step is done, or no evaluation was better for as long as the recipe's patience."""
        patience = self.recipe.patience
        return self.state.step >= self._end or bool(patience and self.state.without_better >= patience)

    def _ask_for_the_end(self) -> None:
        """Update the last step of the run, which may end early; the learning rate stays that of the whole
        run."""
        if (ask := self._last_step) is not None:
            asked = self._processes.decide(lambda: ask() or self.steps)
            self._end = min(self.steps, asked)

    def train_step(self, number: int) -> Step:
        """Do one optimizer step (the first has number 0): its rows' mean loss, its gradient, the update."""
        recipe = self.recipe
        # All that is random in a step follows from its number: dropout is the same after a resumption.
        torch.manual_seed(hash((recipe.seed, number, self._processes.rank)))
        numbers = step_rows(len(self._data), recipe.batch_size, number, recipe.seed)
        batches = pack(self._data.rows, numbers, recipe.micro_tokens, packing=recipe.packing)
        self._optimizer.zero_grad(set_to_none=True)
        scores = self._scores(self._data, batches, "the loss", step=number + 1, backwards=True)
        parameters = self.trainable.parameters()
        self._share_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm or math.inf)
        if not torch.isfinite(norm):
            raise TrainingDivergedError(number + 1, "the gradient", _lines(self._data, batches))
        rate = learning_rate(number, self.steps, recipe.learning_rate, recipe.schedule, recipe.warmup_ratio)
        set_learning_rate(self._optimizer, rate)
        self._optimizer.step()
        tokens = sum(batch.tokens for batch in batches)
        return Step(scores.loss, float(norm), rate, tokens, self.figures(scores))

    def _scores(
        self, data: Dataset, batches: Sequence[MicroBatch], what: str, *, step: int, backwards: bool = False
    ) -> Scores:
        """Return the means over the micro-batches of all processes; this one computes its share.

        Raises TrainingDivergedError for `what`, with the lines of the rows.
        """
        weight = sum(data.rows[row].weight for batch in batches for row in batch.rows)
        scores = Scores.empty(self.trainable.device)
        bad: list[int] = []
        for batch in self._processes.share(batches):
            loss, rewards = self._objective.loss(batch)
            if not torch.isfinite(loss):
                bad += _lines(data, [batch])
                continue
            if backwards:
                (loss / weight).backward()  # type: ignore[no-untyped-call]
            scores.add(loss.detach(), rewards)
        scores.sum_over(self._processes, step, what, bad)
        return scores.over(weight)

    def _share_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        if self._processes.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._processes.add([parameter.grad for parameter in parameters if parameter.grad is not None])

    def _count(self, step: Step, seconds: float) -> None:
        self.state.step += 1
        self.state.tokens += step.tokens
        self.state.seconds += seconds
        self.state.losses.append((self.state.step, step.loss))
        self._done, self._tokens, self._seconds = (
            self._done + 1,
            self._tokens + step.tokens,
            self._seconds + seconds,
        )

    def _report(self, step: Step) -> None:
        done = self.state.step
        per_epoch = math.ceil(len(self._data) / self.recipe.batch_size)
        self._listen(
            events.StepDone(
                at=time.time(),
                step=done,
                steps=self.steps,
                epoch=done / per_epoch,
                loss=step.loss,
                learning_rate=step.learning_rate,
                grad_norm=step.grad_norm,
                tokens=step.tokens,
                total_tokens=self.state.tokens,
                tokens_per_second=self._tokens / self._seconds,
                seconds_left=self._seconds / self._done * (self.steps - done),
                memory_bytes=peak_memory(self.trainable.device),
                **step.figures,
            )
        )

    def _evaluate_what_is_due(self) -> float | None:
        """Evaluate if it is due, or if an interruption prevented it. Returns the held-out loss, if
        evaluated."""
        step = self.state.step
        due = step > 0 and (step % self.recipe.eval_every == 0 or step >= self._end)
        if self._held_out is None:
            if due or not step:
                self._on_evaluation(step)
            return None
        if self.state.base_loss is None:
            self._evaluate_base(self._held_out)
        return self._evaluate(self._held_out, step) if due and self.state.held_out[-1][0] != step else None

    def _rows_to_come(self) -> list[Row]:
        """Return all rows that the run computes, each once, in the data's order."""
        numbers = range(len(self._data))
        per_epoch = math.ceil(len(numbers) / self.recipe.batch_size)
        rows = self._data.rows
        if self.steps < per_epoch:
            steps = range(self.steps)
            chosen = {
                row
                for step in steps
                for row in step_rows(len(rows), self.recipe.batch_size, step, self.recipe.seed)
            }
            rows = [rows[number] for number in sorted(chosen)]
        return [*rows, *(self._held_out.rows if self._held_out is not None else ())]

    def _evaluate_base(self, held_out: Dataset) -> None:
        if self._base_scores is not None:
            scores = self._processes.decide(self._base_scores)
        else:
            with self.trainable.without_adapter():
                scores = self.held_out_scores(held_out)
        self.state.base_loss = scores.loss
        self.state.held_out.append((0, scores.loss))
        self._listen(
            events.Evaluated(at=time.time(), step=0, loss=scores.loss, best=False, **self.figures(scores))
        )
        if self.trainable.has_parent:
            with self.trainable.at_start():
                scores = self.held_out_scores(held_out)
            self.state.parent_loss = scores.loss
            self._listen(
                events.Evaluated(
                    at=time.time(),
                    step=0,
                    loss=scores.loss,
                    best=False,
                    parent=True,
                    **self.figures(scores),
                )
            )
        self._on_evaluation(0)

    def _evaluate(self, held_out: Dataset, step: int) -> float:
        scores = self.held_out_scores(held_out)
        state = self.state
        best = state.best_loss is None or scores.loss < state.best_loss
        if best:
            state.best_loss, state.best_step, state.without_better = scores.loss, step, 0
            if self._processes.first:
                self._checkpoints.save_best(step, self.trainable.named_parameters())
        else:
            state.without_better += 1
        state.held_out.append((step, scores.loss))
        self._listen(
            events.Evaluated(at=time.time(), step=step, loss=scores.loss, best=best, **self.figures(scores))
        )
        self._on_evaluation(step)
        return scores.loss

    def held_out_scores(self, data: Dataset) -> Scores:
        """Return the mean loss of all held-out rows, nats a supervised token (DPO, classification: a row)."""
        limit, packing = self.recipe.micro_tokens, self.recipe.packing
        batches = pack(data.rows, range(len(data)), limit, packing=packing)
        with self.trainable.evaluating():
            return self._scores(data, batches, "the held-out loss", step=self.state.step)

    def release_optimizer(self) -> None:
        """Free the gradients and the optimizer's state: no step follows."""
        self._optimizer.zero_grad(set_to_none=True)
        self._optimizer.state.clear()

    @contextmanager
    def measuring(self, other: Trainable) -> Iterator[None]:
        """Measure another adapter of the base meanwhile, on the same rows in the same micro-batches."""
        own = self.trainable, self._objective
        self.trainable, self._objective = other, self._objective.on(other)
        try:
            yield
        finally:
            self.trainable, self._objective = own

    def figures(self, scores: Scores) -> dict[str, Any]:
        """Return a batch's figures for an event besides its loss."""
        if self.recipe.method == "classification":
            return {"accuracy": scores.rewards.get("accuracy")}
        return {"rewards": scores.rewards}

    def slice_losses(self) -> dict[str, float]:
        """Return the held-out loss of each slice, with the adapter as it is now. Call it in all processes at
        once."""
        parts = {} if self._held_out is None else by_slice(self._held_out)
        return {name: self.held_out_scores(part).loss for name, part in parts.items()}

    def _save(self, loss: float | None) -> None:
        if self._processes.first and self.state.step not in self._checkpoints.steps():
            adapter = self.trainable.named_parameters()
            path = self._checkpoints.save(self.state, adapter, self._optimizer.state_dict(), self._export)
            self._listen(events.Saved(at=time.time(), step=self.state.step, path=path.name, loss=loss))
        self._processes.wait()

    def _load(self, adapter: dict[str, torch.Tensor]) -> None:
        parameters = self.trainable.named_parameters()
        if _shapes(parameters) != _shapes(adapter):
            raise CheckpointError(
                f"{self._checkpoints.folder} holds an adapter of other ranks than EVA finds now: remove the "
                "folder to start over"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(adapter[name])


def _lines(data: Dataset, batches: Sequence[MicroBatch]) -> list[int]:
    return sorted(data.rows[row].line for batch in batches for row in batch.rows)


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


_NAMES = ("accuracy", "margin")


@dataclass
class Scores:
    """Sums over micro-batches, then means. sums: [3] fp64: loss, accuracy, DPO's margin."""

    sums: torch.Tensor
    loss: float = 0.0
    rewards: dict[str, float] = field(default_factory=dict)
    _named: set[str] = field(default_factory=set)

    @classmethod
    def empty(cls, device: torch.device) -> Scores:
        return cls(torch.zeros(1 + len(_NAMES), dtype=torch.float64, device=device))

    def add(self, loss: torch.Tensor, rewards: dict[str, torch.Tensor]) -> None:
        self.sums[0] += loss
        for place, name in enumerate(_NAMES, start=1):
            if name in rewards:
                self.sums[place] += rewards[name]
                self._named.add(name)

    def sum_over(self, processes: ProcessGroup, step: int, what: str, bad: list[int]) -> None:
        """Sum over all processes. `bad`: lines of the rows whose loss was not finite in this one.

        Raises TrainingDivergedError in all processes if there are any in one.
        """
        count = self.sums.new_full((1,), len(bad))
        processes.add([self.sums, count])
        if count:
            raise TrainingDivergedError(step, what, sorted(processes.all_of(bad)))

    @classmethod
    def from_means(cls, loss: float, rewards: dict[str, float]) -> Scores:
        """Return means that were computed elsewhere."""
        return cls(torch.zeros(0), loss, rewards)

    def over(self, weight: int) -> Scores:
        """Divide the sums by the rows' weight."""
        loss, *rewards = (self.sums / weight).tolist()
        self.loss = loss
        self.rewards = {
            name: value for name, value in zip(_NAMES, rewards, strict=True) if name in self._named
        }
        return self


_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimizer over the trainable parameters.

    With LoRA+ the B matrices learn `lora_plus_ratio` times faster than the rest (Hayou et al. 2024).
    """
    ratio = recipe.lora_plus_ratio or 1.0
    slow: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (fast if ".lora_B." in name or ".lora_embedding_B." in name else slow).append(parameter)
    groups = [{"params": slow, "factor": 1.0}, {"params": fast, "factor": ratio}]
    options: dict[str, Any] = {
        "lr": decided(recipe.learning_rate),
        "betas": _BETAS,
        "eps": _EPSILON,
        "weight_decay": recipe.weight_decay,
    }
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    import bitsandbytes as bnb

    paged, plain = (
        (bnb.optim.PagedAdamW32bit, bnb.optim.PagedAdamW8bit),
        (torch.optim.AdamW, bnb.optim.AdamW8bit),
    )
    # Without a GPU there is nothing to page to: the states are in host memory anyway.
    on_gpu = slow[0].device.type == "cuda" if slow else False
    kinds = paged if recipe.optimizer.startswith("paged") and on_gpu else plain
    optimizer: torch.optim.Optimizer = kinds[recipe.optimizer.endswith("8bit")](groups, **options)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next step, times the factor of each group (LoRA+)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def learning_rate(step: int, steps: int, peak: float, schedule: Schedule, warmup_ratio: float) -> float:
    """Return the rate of step `step`, from 0: it rises linearly in the warm-up, then falls (cosine, linear)
    or stays.

    It is that of transformers' schedules with the warm-up rounded up, except that the first step of a warm-up
    is not 0, which would be computed for nothing.
    """
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    part = (step - warmup) / max(1, steps - warmup)
    return peak * (0.5 * (1 + math.cos(math.pi * part)) if schedule == "cosine" else 1 - part)
