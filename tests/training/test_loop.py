"""The training loop: what a step computes, when it evaluates, stops early, and stops for good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.runs import (
    assert_equal,
    dataset,
    noise,
    preferences,
    recipe_for,
    samples,
    trainer,
    weights,
)

from onebase_engine.base.load import fingerprint
from onebase_training.data.dataset import Sample
from onebase_training.events import Evaluated, Event, Saved, StepDone
from onebase_training.loop import TrainingDivergedError
from onebase_training.objectives import PreparedRun
from onebase_training.processes import ProcessGroup


def losses(events: list[Event]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepDone)]


@pytest.mark.parametrize(
    "other",
    [{"packing": False}, {"micro_tokens": 100_000}, {"gradient_checkpointing": True}],
    ids=["unpacked", "in one micro-batch", "with gradient checkpointing"],
)
def test_the_curve_does_not_depend_on_how_a_step_is_computed(
    other: dict[str, object], exact_base: torch.nn.Module, tmp_path: Path
) -> None:
    data = samples(24)
    curves: list[list[float]] = []
    for number, settings in enumerate(({}, other)):
        seen: list[Event] = []
        recipe = recipe_for(data, batch_size=8, **settings)
        trainer(exact_base, recipe, data, tmp_path / str(number), listen=seen.append).run_steps()
        curves.append(losses(seen))
    assert len(curves[0]) == 6
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)


def test_a_step_weighs_every_supervised_token_the_same(exact_base: torch.nn.Module, tmp_path: Path) -> None:
    data = samples(8)
    recipe = recipe_for(data, batch_size=8, packing=False, max_grad_norm=0)
    run = trainer(exact_base, recipe, data, tmp_path)
    model = run.trainable
    batch = [row for row in data.rows if isinstance(row, Sample)]
    total = sum(row.targets for row in batch)
    from onebase_training.batches import MicroBatch

    whole = torch.cat([model.losses(MicroBatch((row,), (0,)))[0] for row in batch]).sum() / total
    whole.backward()  # type: ignore[no-untyped-call]
    expected = {
        name: one.grad.clone() for name, one in model.named_parameters().items() if one.grad is not None
    }
    run.train_step(0)
    for name, parameter in model.named_parameters().items():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-3)


def test_a_run_learns_and_leaves_the_base_alone(base: torch.nn.Module, tmp_path: Path) -> None:
    data, held_out = samples(40), samples(10, seed=1)
    before, seen = fingerprint(base), list[Event]()
    recipe = recipe_for(data, epochs=4, max_steps=40, eval_every=10, learning_rate=1e-2)
    state = trainer(base, recipe, data, tmp_path, held_out=held_out, listen=seen.append).run_steps()
    assert state.best_loss is not None
    assert state.best_loss < 0.5 * (state.base_loss or 0.0)
    assert losses(seen)[-1] < 0.5 * losses(seen)[0]
    assert [event.step for event in seen if isinstance(event, Evaluated)] == [0, 10, 20, 30, 40]
    assert fingerprint(base) == before


def test_preferences_come_to_prefer_what_was_chosen(base: torch.nn.Module, tmp_path: Path) -> None:
    data, seen = preferences(16), list[Event]()
    recipe = recipe_for(data, method="dpo", epochs=12, max_steps=24, learning_rate=5e-3, batch_size=8)
    trainer(base, recipe, data, tmp_path, held_out=data, listen=seen.append).run_steps()
    steps = [event for event in seen if isinstance(event, StepDone)]
    # With the adapter still silent the policy is the reference: the loss is log 2 and nothing is preferred.
    assert steps[0].loss == pytest.approx(np.log(2), abs=1e-3)
    assert steps[-1].loss < 0.3
    last = [event for event in seen if isinstance(event, Evaluated)][-1]
    assert last.rewards["accuracy"] == 1.0
    assert last.rewards["margin"] > 1


def test_it_stops_early_and_keeps_the_best(base: torch.nn.Module, tmp_path: Path) -> None:
    data, held_out, seen = samples(8), noise(6, seed=5), list[Event]()
    recipe = recipe_for(data, epochs=100, max_steps=400, eval_every=1, patience=2, learning_rate=1e-3)
    run = trainer(base, recipe, data, tmp_path, held_out=held_out, listen=seen.append)
    state = run.run_steps()
    evaluated = [event for event in seen if isinstance(event, Evaluated)][1:]
    assert state.step < 400
    assert [event.best for event in evaluated[-2:]] == [False, False]
    assert state.best_step == evaluated[-3].step
    assert state.best_loss == min(event.loss for event in evaluated)
    again = trainer(base, recipe, data, tmp_path, held_out=held_out)
    kept = again._checkpoints.best(state.best_step)
    assert_equal(weights(run), kept)


def test_a_loss_that_is_not_finite_stops_the_run_with_its_lines(
    base: torch.nn.Module, tmp_path: Path
) -> None:
    data, seen = samples(12), list[Event]()
    recipe = recipe_for(data, batch_size=12, micro_tokens=40, save_every=1, epochs=9)
    run = trainer(base, recipe, data, tmp_path, listen=seen.append)
    run.train_step(0)
    broken = run._objective.loss

    def loss(batch):  # type: ignore[no-untyped-def]
        value, rewards = broken(batch)
        return (value * float("nan") if 3 in batch.rows else value), rewards

    run._objective.loss = loss  # type: ignore[method-assign]
    with pytest.raises(TrainingDivergedError, match="lower learning_rate") as caught:
        run.run_steps()
    assert data.rows[3].line in caught.value.lines
    assert len(caught.value.lines) < 12
    assert str(data.rows[3].line) in str(caught.value)


def test_only_the_last_checkpoints_and_the_best_are_kept(base: torch.nn.Module, tmp_path: Path) -> None:
    data, seen = samples(8), list[Event]()
    recipe = recipe_for(data, epochs=4, max_steps=7, eval_every=2, save_every=1, keep=3)
    state = trainer(base, recipe, data, tmp_path, held_out=data, listen=seen.append).run_steps()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    # The best of each step that is kept: whichever of them a run goes on from, it finds its own.
    best = [f"best-{step:08d}" for step in (4, 6, state.best_step)]
    assert names == [*sorted(set(best)), "step-00000005", "step-00000006", "step-00000007"]
    assert [event.step for event in seen if isinstance(event, Saved)] == list(range(1, 8))


def test_rows_whose_loss_is_on_one_token_are_trained(base: torch.nn.Module, tmp_path: Path) -> None:
    ids = np.array([5, 6], dtype=np.int32)
    data = dataset([Sample(ids, np.array([False, True]), 1)])
    state = trainer(base, recipe_for(data, batch_size=1, epochs=20, max_steps=20), data, tmp_path).run_steps()
    assert state.losses[-1][1] < 0.5 * state.losses[0][1]


def test_a_held_out_loss_that_is_not_finite_stops_the_run(base: torch.nn.Module, tmp_path: Path) -> None:
    data = samples(8)
    run = trainer(base, recipe_for(data, eval_every=1), data, tmp_path, held_out=data)
    run.train_step(0)
    with torch.no_grad():
        run.trainable.parameters()[1].fill_(float("inf"))
    with pytest.raises(TrainingDivergedError, match="held-out loss"):
        run._evaluate(data, 1)
    assert run.state.best_loss is None


def test_a_pairs_reference_does_not_depend_on_where_a_run_goes_on(
    exact_base: torch.nn.Module, tmp_path: Path
) -> None:
    data = preferences(10)
    recipe = recipe_for(data, method="dpo", batch_size=3)
    found = []
    for first in (0, 5):
        run = trainer(exact_base, recipe, data, tmp_path / str(first))
        run.state.step = first
        objective: Any = run._objective
        state = PreparedRun("run", tmp_path / f"{first} prepared", ProcessGroup())
        objective.prepare(run._rows_to_come(), recipe, state)
        found.append([objective._references[id(row.chosen)] for row in data.rows])  # type: ignore[union-attr]
    assert found[0] == found[1]


def test_prompts_are_answered_although_nothing_is_held_out(base: torch.nn.Module, tmp_path: Path) -> None:
    data, asked = samples(8), list[int]()
    run = trainer(base, recipe_for(data, eval_every=2, max_steps=5, epochs=3), data, tmp_path)
    run._on_evaluation = asked.append
    run.run_steps()
    assert asked == [0, 2, 4, 5]
