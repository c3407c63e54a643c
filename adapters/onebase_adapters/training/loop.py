"""The training loop, from the first step to the last: one readable file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from onebase_adapters.training import events
from onebase_adapters.training.batches import MicroBatch, pack, step_rows, weight_of
from onebase_adapters.training.checkpoint import CheckpointError, Checkpoints, RunState
from onebase_adapters.training.errors import TrainingDivergedError as TrainingDivergedError
from onebase_adapters.training.evaluation import Scores, held_out_scores
from onebase_adapters.training.gate import Interrupted
from onebase_adapters.training.objectives import Objective
from onebase_adapters.training.optimizers import learning_rate, make_optimizer, set_learning_rate
from onebase_adapters.training.ranks import Ranks
from onebase_adapters.training.recipe import Recipe, step_count
from onebase_adapters.training.samples import Dataset, Row
from onebase_adapters.training.trainable import Trainable
from onebase_engine.machine import peak_memory

Listen = Callable[[events.Event], None]


@dataclass(frozen=True)
class Step:
    """What one step did. loss: mean over supervised tokens (DPO: pairs), nats."""

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    rewards: dict[str, float]


class Trainer:
    """Trains one adapter. The recipe is resolved, `micro_tokens` included.

    Args:
        held_out: evaluated every `eval_every` steps; may be None.
        on_evaluation: called after each evaluation with the number of steps done.
        listen: gets StepDone, Evaluated and Saved.
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
        listen: Listen,
        ranks: Ranks | None = None,
        on_evaluation: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.trainable = trainable
        self.recipe: Any = recipe
        self.steps = step_count(recipe, len(data))
        self.state = RunState(identity)
        self._objective = objective
        self._data = data
        self._held_out = held_out
        self._checkpoints = checkpoints
        self._listen = listen
        self._ranks = ranks or Ranks()
        self._on_evaluation = on_evaluation
        self._optimizer = make_optimizer(trainable.model, recipe)
        # Of this process, which may have gone on from a checkpoint of a slower one.
        self._done = self._tokens = 0
        self._seconds = 0.0

    def resume(self) -> int:
        """Go on from the last checkpoint, if there is one; returns the steps done. Raises CheckpointError."""
        state = self._checkpoints.latest(self.state.identity)
        if state is not None:
            adapter, optimizer = self._checkpoints.tensors(state.step)
            self._load(adapter)
            self._optimizer.load_state_dict(optimizer)
            self.state = state
        return self.state.step

    def run(self) -> RunState:
        """Train to the end, early stopping included, and leave the best adapter in the model.

        Raises:
            TrainingDivergedError: the last checkpoint is from before it.
            Interrupted: for a pause a checkpoint of the last whole step is written first.
            OSError: a checkpoint cannot be written; the one before is whole.
        """
        try:
            self._objective.prepare(self._rows_to_come(), recipe=self.recipe)
            self._evaluate_what_is_due()
            while self.state.step < self.steps and not self._stops_early():
                started = time.monotonic()
                step = self.train_step(self.state.step)
                self._count(step, time.monotonic() - started)
                self._report(step)
                loss = self._evaluate_what_is_due()
                if self._ends() or self.state.step % self.recipe.save_every == 0:
                    self._save(loss)
        except Interrupted as interrupt:
            if interrupt.reason == "pause":
                self._save(None)
            raise
        if self.state.best_step and self.state.best_step != self.state.step:
            self._load(self._checkpoints.best(self.state.best_step))
        return self.state

    def train_step(self, number: int) -> Step:
        """One optimizer step (the first has number 0): its rows' mean loss, its gradient, the update."""
        recipe = self.recipe
        # All that is random in a step follows from its number: dropout is the same after a resumption.
        torch.manual_seed(hash((recipe.seed, number, self._ranks.rank)))
        numbers = step_rows(len(self._data), recipe.batch_size, number, recipe.seed)
        batches = pack(self._data.rows, numbers, recipe.micro_tokens, packing=recipe.packing)
        weight = sum(weight_of(self._data.rows[row]) for row in numbers)
        self._optimizer.zero_grad(set_to_none=True)
        scores = self._scores(number, self._ranks.share(batches), weight)
        parameters = self.trainable.parameters()
        self._share_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm or math.inf)
        if not torch.isfinite(norm):
            raise TrainingDivergedError(number + 1, "the gradient", self._lines(batches))
        rate = learning_rate(number, self.steps, recipe.learning_rate, recipe.schedule, recipe.warmup_ratio)
        set_learning_rate(self._optimizer, rate)
        self._optimizer.step()
        tokens = sum(batch.tokens for batch in batches)
        return Step(scores.loss, float(norm), rate, tokens, scores.rewards)

    def _scores(self, number: int, batches: Sequence[MicroBatch], weight: int) -> Scores:
        """Forward and backward passes of this process's micro-batches; sums over all processes."""
        scores = Scores.empty(self.trainable.device)
        bad: list[int] = []
        for batch in batches:
            loss, rewards = self._objective.loss(batch)
            if not torch.isfinite(loss):
                bad += self._lines([batch])
                continue
            (loss / weight).backward()  # type: ignore[no-untyped-call]
            scores.add(loss.detach(), rewards)
        scores.sum_over(self._ranks, number + 1, "the loss", bad)
        return scores.over(weight)

    def _share_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        if self._ranks.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._ranks.add([parameter.grad for parameter in parameters if parameter.grad is not None])

    def _lines(self, batches: Sequence[MicroBatch]) -> list[int]:
        return sorted(self._data.rows[row].line for batch in batches for row in batch.rows)

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
                rewards=step.rewards,
            )
        )

    def _evaluate_what_is_due(self) -> float | None:
        """Also what a run that was interrupted in an evaluation has left out. The held-out loss, if any."""
        step = self.state.step
        due = step > 0 and (step % self.recipe.eval_every == 0 or step == self.steps)
        if self._held_out is None:
            if due or not step:
                self._on_evaluation(step)
            return None
        if self.state.base_loss is None:
            self._evaluate_base()
        return self._evaluate(step) if due and self.state.held_out[-1][0] != step else None

    def _rows_to_come(self) -> list[Row]:
        """All rows that the run computes, those of the data in its order, each once."""
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

    def _ends(self) -> bool:
        return self.state.step == self.steps or self._stops_early()

    def _evaluate_base(self) -> None:
        with self.trainable.without_adapter():
            scores = self._held_out_scores()
        self.state.base_loss = scores.loss
        self.state.held_out.append((0, scores.loss))
        self._listen(
            events.Evaluated(at=time.time(), step=0, loss=scores.loss, best=False, rewards=scores.rewards)
        )
        self._on_evaluation(0)

    def _evaluate(self, step: int) -> float:
        scores = self._held_out_scores()
        state = self.state
        best = state.best_loss is None or scores.loss < state.best_loss
        if best:
            state.best_loss, state.best_step, state.without_better = scores.loss, step, 0
            if self._ranks.first:
                self._checkpoints.save_best(step, self.trainable.named_parameters())
        else:
            state.without_better += 1
        state.held_out.append((step, scores.loss))
        self._listen(
            events.Evaluated(at=time.time(), step=step, loss=scores.loss, best=best, rewards=scores.rewards)
        )
        self._on_evaluation(step)
        return scores.loss

    def _held_out_scores(self) -> Scores:
        assert self._held_out is not None
        return held_out_scores(
            self.trainable, self._objective, self.recipe, self._held_out, self._ranks, self.state.step
        )

    def _stops_early(self) -> bool:
        return bool(self.recipe.patience) and self.state.without_better >= self.recipe.patience

    def _save(self, loss: float | None) -> None:
        if self._ranks.first and self.state.step not in self._checkpoints.steps():
            adapter = self.trainable.named_parameters()
            path = self._checkpoints.save(self.state, adapter, self._optimizer.state_dict())
            self._listen(events.Saved(at=time.time(), step=self.state.step, path=path.name, loss=loss))
        self._ranks.wait()

    def _load(self, adapter: dict[str, torch.Tensor]) -> None:
        parameters = self.trainable.named_parameters()
        if _shapes(parameters) != _shapes(adapter):
            raise CheckpointError(
                f"{self._checkpoints.folder} holds an adapter of other ranks than EVA finds now: remove the "
                "folder to begin anew"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(adapter[name])


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
