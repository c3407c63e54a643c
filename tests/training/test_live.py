"""Live adapters: each operation once, in order, with the gradients and numbers that its rows have."""

from __future__ import annotations

import errno
import hashlib
import threading
import weakref
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from tests.training.live_support import (
    SPECS,
    STEP,
    ask,
    done,
    ids_of,
    lesson,
    live_models,
    policy_row,
    text_row,
)
from tests.training.runs import assert_equal

from onebase_adapters.store.blobs import version_digest
from onebase_engine.base.load import BaseChangedError, fingerprint
from onebase_engine.base.view import peft_view
from onebase_engine.engine.messages import AdapterRef, Sampling, Submit
from onebase_training import live, live_store, replies
from onebase_training.checkpoint import save_peft
from onebase_training.events import Interrupted, OpenGate
from onebase_training.live import (
    SHORTAGE_SECONDS,
    STATE_BYTES,
    BaseName,
    ComputedPass,
    LiveModel,
    LiveModels,
    compute_together,
)
from onebase_training.live_operations import (
    Computed,
    Datum,
    DenseArray,
    Load,
    ModelSpec,
    Operation,
    OptimStep,
    ParentCheckpoint,
    Refuse,
    Refused,
    RefusedError,
    Save,
    StartingWeights,
    Stepped,
    WeightsSaved,
)
from onebase_training.live_store import (
    LiveStore,
    ModelRefusedError,
    OtherBaseError,
    SequenceConflictError,
    UnknownCheckpointError,
    UnknownLiveModelError,
)
from onebase_training.parent import Parent
from onebase_training.trainable import Trainable

pytestmark = pytest.mark.usefixtures("quick_collections")
LEARNING = ModelSpec(id="learning", rank=8, seed=3)


def model_of(base: torch.nn.Module, spec: ModelSpec = LEARNING) -> LiveModel:
    return LiveModel(base, spec, OpenGate(), BaseName("tiny"), replies.Scorer(base, lambda: None))


def logprobs(result: Computed) -> list[np.ndarray]:
    return [output["logprobs"].array() for output in result.outputs]


def saved(result: Any) -> dict[str, torch.Tensor]:
    assert isinstance(result, WeightsSaved)
    return load_file(Path(result.checkpoint.folder) / "adapter_model.safetensors")


# ---- numbers -----------------------------------------------------------------------------------


def test_losses_fall_and_the_base_stays_as_it_was(base: torch.nn.Module, tmp_path: Path) -> None:
    before = fingerprint(base)
    rows = [text_row(20, seed) for seed in range(4)]
    steps = [operation for _ in range(12) for operation in (ask(*rows), STEP)]
    found = done(base, tmp_path, dict(enumerate(steps, start=1)), LEARNING)
    losses = [result.metrics["loss:sum"] for result in found if isinstance(result, Computed)]
    assert losses[-1] < 0.5 * losses[0]
    assert [result.step for result in found if isinstance(result, Stepped)] == list(range(1, 13))
    assert fingerprint(base) == before


def test_gradients_add_up_to_those_of_all_rows_at_once(exact_base: torch.nn.Module, tmp_path: Path) -> None:
    rows = [text_row(9 + seed, seed) for seed in range(4)]
    parts = [ask(rows[0]), ask(rows[1], rows[2]), ask(rows[3])]
    end = [STEP, Save(name="end", kind="weights")]
    one = done(exact_base, tmp_path / "one", dict(enumerate([ask(*rows), *end], start=1)))
    more = done(exact_base, tmp_path / "more", dict(enumerate([*parts, *end], start=1)))
    assert one[0].metrics["loss:sum"] == pytest.approx(sum(part.metrics["loss:sum"] for part in more[:3]))
    for name, tensor in saved(one[-1]).items():
        torch.testing.assert_close(saved(more[-1])[name], tensor, rtol=1e-3, atol=1e-6)


def test_a_step_is_adamw_as_pytorch_has_it_with_the_settings_of_that_step(base: torch.nn.Module) -> None:
    model = model_of(base)
    parameters = [one.detach().clone().requires_grad_() for one in model._parameters.values()]
    reference = torch.optim.AdamW(parameters)
    for number, step in enumerate(
        (OptimStep(), OptimStep(learning_rate=1e-2, beta1=0.5, weight_decay=0.1, grad_clip_norm=0.3))
    ):
        model.forward_backward(ask(text_row(12, number)))
        assert model.gradients is not None
        gradients = [one.clone() for one in model.gradients.values()]
        norm = torch.stack([one.norm() for one in gradients]).norm()
        scale = 0.3 / (norm + 1e-6) if step.grad_clip_norm else 1.0
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * scale
        reference.param_groups[0] |= {
            "lr": step.learning_rate, "betas": (step.beta1, step.beta2), "eps": step.eps,
            "weight_decay": step.weight_decay,
        }  # fmt: skip
        reference.step()
        assert model.optim_step(step).metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        for own, parameter in zip(model._parameters.values(), parameters, strict=True):
            torch.testing.assert_close(own.detach(), parameter.detach(), rtol=1e-6, atol=1e-8)


def test_a_custom_loss_by_weights_has_the_gradient_of_the_loss_itself(exact_base: torch.nn.Module) -> None:
    ids = ids_of(14, 5)
    row = text_row(14, 5)

    def own(given: torch.Tensor) -> torch.Tensor:
        return (given.exp() * torch.linspace(-1, 1, 14)).sum() ** 2 - given[3]

    model = model_of(exact_base)
    for _ in range(2):
        model.forward_backward(ask(text_row(14, 6)))
        model.optim_step(STEP)
    forward = torch.tensor(logprobs(model.forward_backward(ask(row, forward_only=True)))[0])
    leaf = forward.clone().requires_grad_()
    own(leaf).backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    model.forward_backward(ask(text_row(14, 5, weights=-leaf.grad.numpy())))
    assert model.gradients is not None
    tree = model.trainable.model
    logits = tree(input_ids=torch.from_numpy(ids[None, :-1]), use_cache=False).logits[0]
    picked = torch.log_softmax(logits, 1).gather(1, torch.from_numpy(ids[1:, None]))[:, 0]
    expected = torch.autograd.grad(own(picked), list(model._parameters.values()))
    for gradient, wanted in zip(model.gradients.values(), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=2e-3, atol=2e-4)


def test_targets_may_be_several_a_position(base: torch.nn.Module) -> None:
    model = model_of(base)
    ids = ids_of(10, 1)
    several = np.stack([ids[1:], (ids[1:] + 5) % 300 + 3], axis=1)
    weights = np.random.default_rng(0).standard_normal((10, 2)).astype("f4")
    wide = Datum.of(ids[:-1].tolist(), {"target_tokens": several, "weights": weights})
    for forward_only in (True, False):
        both = model.forward_backward(ask(wide, text_row(10, 1), forward_only=forward_only))
        found, plain = logprobs(both)
        assert (found.shape, plain.shape) == ((10, 2), (10,))
        np.testing.assert_allclose(found[:, 0], plain, rtol=1e-6)
        assert both.metrics["loss:sum"] == pytest.approx(-(found * weights).sum() - plain.sum(), rel=1e-5)


def test_forward_and_policies_have_the_numbers_of_the_engine_that_samples(base: torch.nn.Module) -> None:
    model = model_of(base)
    for seed in range(3):
        model.forward_backward(ask(text_row(30, seed)))
        model.optim_step(STEP)
    rows = [(ids_of(count, count), count) for count in (40, 7, 90)]
    engine = replies._engine(base, 8, 40, frozenset(), lambda: None)
    engine.put_adapter("own", model.trainable.weights())
    sampled: dict[int, list[float]] = {}
    for number, (ids, _) in enumerate(rows):
        sampling = Sampling(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        engine.submit(
            Submit(id=str(number), prompt=ids.tolist(), sampling=sampling, adapters=[AdapterRef("own")])
        )
    while engine.busy:
        engine.step()
        for output in engine.take_outputs():
            if output.prompt_logprobs:
                sampled[int(output.id)] = [one.logprob for one in output.prompt_logprobs]
    texts = [text_row(count, count) for _, count in rows]
    policies = [
        policy_row(count, count, logprobs=np.array(sampled[number], "f4"), advantages=np.ones(count, "f4"))
        for number, (_, count) in enumerate(rows)
    ]
    for result in (
        model.forward_backward(ask(*texts, forward_only=True)),
        model.forward_backward(ask(*policies, loss="importance_sampling")),
    ):
        for number, found in enumerate(logprobs(result)):
            assert (found == np.array(sampled[number], "f4")).all()
    # So the ratio of learner and sampler is 1, not about 1.
    assert result.metrics["loss:sum"] == -sum(count for _, count in rows)
    assert model.gradients is not None
    assert all(gradient.isfinite().all() for gradient in model.gradients.values())


def test_a_models_numbers_do_not_depend_on_another_model(base: torch.nn.Module, tmp_path: Path) -> None:
    root = tmp_path / "both"
    alone = done(base, tmp_path / "alone", lesson(tmp_path / "alone", "small"))
    store = LiveStore(root)
    for spec in SPECS:
        store.create(spec)
        for seq_id, operation in lesson(root, spec.id).items():
            store.submit(spec.id, seq_id, operation)
    order: list[str] = []
    models = live_models(base, root, on_done=lambda model_id, seq_id: order.append(model_id))
    while models.do_next():
        pass
    assert order[-4:] == ["small", "wide:0"] * 2  # in turns
    beside = [store.result("small", seq_id) for seq_id in lesson(root, "small")]
    assert_equal(saved(alone[-1]), saved(beside[-1]))
    assert alone[-1].checkpoint.digest == beside[-1].checkpoint.digest  # type: ignore[union-attr]


def test_passes_of_several_models_are_one_over_the_base_with_the_numbers_of_each(
    exact_base: torch.nn.Module,
) -> None:
    def trained() -> list[LiveModel]:
        """Two adapters of other ranks on other layers, neither of which is as it began."""
        models = [model_of(exact_base, spec) for spec in SPECS]
        for model in models:
            model.forward_backward(ask(text_row(20, 7)))
            model.optim_step(STEP)
        return models

    asked = [
        ask(text_row(20, 1), text_row(9, 2)),
        ask(policy_row(12, 3), policy_row(30, 4), loss="importance_sampling"),
    ]
    alone, together = trained(), trained()
    forwards = [vars(module).get("forward") for module in together[0].trainable.model.modules()]
    expected = [model.forward_backward(operation) for model, operation in zip(alone, asked, strict=True)]
    computed = compute_together(list(zip(together, asked, strict=True)))
    assert forwards == [vars(module).get("forward") for module in together[0].trainable.model.modules()]
    for own, other, one_pass, wanted in zip(alone, together, computed, expected, strict=True):
        assert isinstance(one_pass, ComputedPass)
        found = other.add(one_pass)
        assert found.metrics["loss:sum"] == pytest.approx(wanted.metrics["loss:sum"], rel=1e-5)
        for one, two in zip(logprobs(found), logprobs(wanted), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
        assert own.gradients is not None
        assert other.gradients is not None
        assert any(gradient.abs().max() > 0 for gradient in own.gradients.values())
        for name, gradient in own.gradients.items():
            largest = float(gradient.abs().max())
            torch.testing.assert_close(other.gradients[name], gradient, rtol=1e-3, atol=1e-4 * largest)


def test_what_one_model_is_refused_for_in_a_pass_of_several_leaves_the_others_alone(
    exact_base: torch.nn.Module,
) -> None:
    models = [model_of(exact_base, spec) for spec in SPECS]
    much = np.full(6, 3e38, "f4")
    asked = [ask(text_row(9, 2)), ask(text_row(6, 1, weights=much))]
    fine, spoilt = compute_together(list(zip(models, asked, strict=True)))
    plain = model_of(exact_base, SPECS[0]).forward_backward(asked[0])
    assert isinstance(spoilt, ComputedPass)
    with pytest.raises(RefusedError, match="the loss is not finite"):
        models[1].add(spoilt)
    assert models[1].gradients is None
    assert isinstance(fine, ComputedPass)
    assert models[0].add(fine).metrics["loss:sum"] == pytest.approx(plain.metrics["loss:sum"], rel=1e-5)
    refused = compute_together([(models[0], asked[0]), (models[1], ask(text_row(6), loss="no such loss"))])[1]
    assert isinstance(refused, Refused)
    assert "no such loss" in refused.message


def test_small_passes_that_are_next_are_computed_together_once_each_model_has_done_one_alone(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, whole = [], Trainable.logits

    def counted(trainable: Trainable, packed: Any) -> torch.Tensor:
        passes.append(len(packed.lengths))
        return whole(trainable, packed)

    monkeypatch.setattr(Trainable, "logits", counted)
    monkeypatch.setattr(live, "MICRO_TOKENS", 40)
    store = LiveStore(tmp_path)
    steps = [ask(text_row(20, 1)), ask(text_row(9, 2)), STEP, ask(text_row(15, 4)), ask(text_row(30, 5))]
    for spec in SPECS:
        store.create(spec)
        for seq_id, operation in enumerate(steps, 1):
            store.submit(spec.id, seq_id, operation)
    models = live_models(base, tmp_path, joins=True)
    while models.do_next():
        pass
    assert passes == [1, 1, 2, 2, 1, 1]  # 30 tokens of each are too many for one
    for spec in SPECS:
        results = [store.result(spec.id, seq_id) for seq_id in range(1, 6)]
        assert [type(one) for one in results] == [Computed, Computed, Stepped, Computed, Computed]
    charged = [store.result(spec.id, 2) for spec in SPECS]
    assert charged[0].seconds == pytest.approx(charged[1].seconds)  # type: ignore[union-attr]


def test_a_large_operation_is_not_read_to_find_out_whether_it_joins_a_pass(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, together, read = LiveStore(tmp_path), list[int](), list[tuple[str, int]]()
    plain = LiveStore.operation

    def reading(self: LiveStore, model_id: str, seq_id: int) -> Operation | None:
        read.append((model_id, seq_id))
        return plain(self, model_id, seq_id)

    def counted(asked: Any) -> list[ComputedPass | Refused]:
        together.append(len(asked))
        return compute_together(asked)

    monkeypatch.setattr(live, "compute_together", counted)
    monkeypatch.setattr(live, "JOINED_BYTES", 1000)
    for spec in SPECS:
        store.create(spec)
        for seq_id, count in ((1, 9), (2, 9), (3, 90 if spec == SPECS[0] else 9)):
            store.submit(spec.id, seq_id, ask(text_row(count, seq_id)))
    models = live_models(base, tmp_path, joins=True)
    monkeypatch.setattr(LiveStore, "operation", reading)
    while models.do_next():
        pass
    assert together == [2]
    assert read.count((SPECS[0].id, 3)) == 1  # in its own turn
    assert all(isinstance(store.result(spec.id, 3), Computed) for spec in SPECS)


def test_an_operation_that_does_not_fit_into_passes_of_others_is_read_once_to_find_that_out(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, read, plain = LiveStore(tmp_path), list[tuple[str, int]](), LiveStore.operation

    def reading(self: LiveStore, model_id: str, seq_id: int) -> Operation | None:
        read.append((model_id, seq_id))
        return plain(self, model_id, seq_id)

    monkeypatch.setattr(live, "MICRO_TOKENS", 40)
    names = [spec.id for spec in SPECS] + ["third", "fourth"]
    for spec in (*SPECS, ModelSpec(id="third", rank=4), ModelSpec(id="fourth", rank=4)):
        store.create(spec)
        for seq_id, count in ((1, 9), (2, 30)):
            store.submit(spec.id, seq_id, ask(text_row(count, seq_id)))
    models = live_models(base, tmp_path, joins=True)
    monkeypatch.setattr(LiveStore, "operation", reading)
    while models.do_next():
        pass
    assert all(isinstance(store.result(name, 2), Computed) for name in names)
    assert max(read.count((name, 2)) for name in names) == 2  # by another one, and in its own turn


@pytest.mark.parametrize("more", [False, True])
def test_a_pass_for_whose_gradients_memory_is_short_in_one_of_several_is_done_alone_with_what_is_free_then(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: bool
) -> None:
    store, together, found = LiveStore(tmp_path), list[int](), list[int]()
    add_gradients = LiveModel._add_gradients

    def counted(asked: Any) -> list[ComputedPass | Refused]:
        together.append(len(asked))
        return compute_together(asked)

    def find() -> int:
        found.append(10**12 + (len(found) if more else 0))
        return found[-1]

    def full(self: LiveModel) -> None:
        if together == [2] and self.spec.id == SPECS[0].id and not (more and len(found) > 2):
            raise torch.OutOfMemoryError("CUDA out of memory")
        add_gradients(self)

    monkeypatch.setattr(live, "compute_together", counted)
    monkeypatch.setattr(LiveModel, "_add_gradients", full)
    for spec in SPECS:
        store.create(spec)
        for seq_id in (1, 2):
            store.submit(spec.id, seq_id, ask(text_row(9, seq_id)))
    models = live_models(base, tmp_path, joins=True, find_memory=find)
    while models.do_next():
        pass
    assert together == [2]
    assert len(found) == 3  # of two models that were made, and of the pass
    short, computed = (store.result(spec.id, 2) for spec in SPECS)
    if more:
        assert isinstance(short, Computed)
    else:
        assert isinstance(short, Refused)
        assert (short.code, short.category) == ("out_of_memory", "server")
    assert isinstance(computed, Computed)
    assert all(one.grad is None for one in models._models[SPECS[0].id]._parameters.values())


def test_a_model_with_which_a_pass_of_several_failed_joins_none_until_it_has_done_one_alone(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, together, bad = LiveStore(tmp_path), list[list[str]](), "bad"
    forward_backward = LiveModel.forward_backward

    def spoils(operation: Any) -> bool:
        return bool(operation.loss == "ppo")

    def counted(asked: Any) -> list[ComputedPass | Refused]:
        together.append(sorted(model.spec.id for model, _ in asked))
        if any(spoils(operation) for _, operation in asked):
            raise RuntimeError("a gradient is not finite")
        return compute_together(asked)

    def alone(self: LiveModel, operation: Any) -> Computed:
        if spoils(operation):
            raise RefusedError("the gradient is not finite", "not_finite")
        return forward_backward(self, operation)

    monkeypatch.setattr(live, "compute_together", counted)
    monkeypatch.setattr(LiveModel, "forward_backward", alone)
    for spec in (*SPECS, ModelSpec(id=bad, rank=4)):
        store.create(spec)
        for seq_id in range(1, 8):
            spoilt = spec.id == bad and seq_id in (2, 3, 4)
            operation = ask(policy_row(9, seq_id), loss="ppo") if spoilt else ask(text_row(9, seq_id))
            store.submit(spec.id, seq_id, operation)
    models = live_models(base, tmp_path, joins=True)
    while models.do_next():
        pass
    everyone, good = sorted([*(spec.id for spec in SPECS), bad]), sorted(spec.id for spec in SPECS)
    assert together[0] == everyone
    assert together.count(everyone) > 1  # it has done one alone
    first = together[1 : together.index(everyone, 1)]
    assert first
    assert all(one == good for one in first)
    for name in everyone:
        results = [store.result(name, seq_id) for seq_id in range(1, 8)]
        refused = [isinstance(one, Refused) for one in results]
        assert refused == [name == bad and place in (1, 2, 3) for place in range(7)]


def test_a_model_that_is_made_again_joins_no_pass_until_it_has_done_one_alone(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, together = LiveStore(tmp_path), list[tuple[str, int]]()

    def counted(asked: Any) -> list[ComputedPass | Refused]:
        together.extend((model.spec.id, store.next_seq(model.spec.id)) for model, _ in asked)
        return compute_together(asked)

    def failing(self: LiveModel, operation: OptimStep) -> Stepped:
        raise RuntimeError("overflow")

    monkeypatch.setattr(live, "compute_together", counted)
    monkeypatch.setattr(LiveModel, "optim_step", failing)
    for spec in SPECS:
        store.create(spec)
        for seq_id in range(1, 5):
            fails = spec.id == "wide:0" and seq_id == 2
            store.submit(spec.id, seq_id, STEP if fails else ask(text_row(9, seq_id)))
    models = live_models(base, tmp_path, joins=True)
    while models.do_next():
        pass
    assert isinstance(store.result("wide:0", 2), Refused)
    assert together == [("small", 4), ("wide:0", 4)]


def test_a_model_that_is_unloaded_while_a_pass_of_several_runs_leaves_the_others_theirs(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, together = LiveStore(tmp_path), list[list[str]]()

    def unloading(asked: Any) -> list[ComputedPass | Refused]:
        computed = compute_together(asked)
        together.append([model.spec.id for model, _ in asked])
        store.unload(together[0][1])
        return computed

    monkeypatch.setattr(live, "compute_together", unloading)
    for spec in (*SPECS, ModelSpec(id="third", rank=4)):
        store.create(spec)
        for seq_id in (1, 2, 3):
            store.submit(spec.id, seq_id, ask(text_row(9, seq_id)))
    told: list[tuple[str, int]] = []
    models = live_models(base, tmp_path, joins=True, on_done=lambda *one: told.append(one))
    while models.do_next():
        pass
    first, second, third = together[0]
    assert sorted(together[1]) == sorted([first, third])
    for one in (first, third):
        assert isinstance(store.result(one, 3), Computed)
        assert {(one, 2), (one, 3)} <= set(told)
    assert (second, 2) not in told


# ---- order, once, errors -----------------------------------------------------------------------


def test_operations_are_done_by_number_whatever_their_order_and_never_twice(
    base: torch.nn.Module, tmp_path: Path
) -> None:
    store = LiveStore(tmp_path)
    store.create(LEARNING)
    store.create(LEARNING)
    numbers: list[int] = []
    models = live_models(base, tmp_path, on_done=lambda model_id, seq_id: numbers.append(seq_id))
    rows = {seq_id: ask(text_row(5, seq_id)) for seq_id in (2, 3, 1)}
    for seq_id, operation in rows.items():
        store.submit("learning", seq_id, operation)
        models.enqueue("learning")
        while models.do_next():
            pass
        store.submit("learning", seq_id, operation)
    assert numbers == [0, 1, 2, 3]
    kept = store.result("learning", 2)
    store.submit("learning", 2, Refuse(message="no room now"))  # done already: what is kept holds
    store.submit("learning", 9, STEP)
    for seq_id, other in ((2, STEP), (9, ask(text_row(5)))):
        with pytest.raises(SequenceConflictError, match="was accepted as another operation"):
            store.submit("learning", seq_id, other)
    models.enqueue("learning")
    assert not models.do_next()
    assert store.result("learning", 2) == kept
    with pytest.raises(SequenceConflictError):
        store.create(ModelSpec(id="learning", rank=9))
    with pytest.raises(UnknownLiveModelError):
        store.submit("another", 1, STEP)


@pytest.mark.parametrize(
    ("accepted", "again"),
    [
        (Refuse(message="1000 checkpoints are named"), Save(name="a", kind="weights")),
        (Refuse(message="1000 checkpoints are named"), Refuse(message="1001 checkpoints are named")),
        (Load(folder="/a"), Refuse(message="there is no checkpoint")),
        (ask(loss="ppo", config={"a": nan, "b": 1.0}), ask(loss="ppo", config={"b": 1.0, "a": nan})),
    ],
    ids=["room since", "other count", "expired since", "not a number"],
)
def test_a_request_that_waits_and_comes_again_stays_what_it_was_accepted_as(
    tmp_path: Path, accepted: Operation, again: Operation
) -> None:
    store = LiveStore(tmp_path)
    store.create(LEARNING)
    store.submit("learning", 1, accepted)
    before = store.operation("learning", 1)
    store.submit("learning", 1, again)
    assert str(store.operation("learning", 1)) == str(before) == str(accepted)


def test_what_is_refused_changes_nothing_and_the_next_operation_is_done(
    base: torch.nn.Module, tmp_path: Path
) -> None:
    overflowing = text_row(4, weights=np.array([3e38, 3e38, 3e38, 3e38], "f4"))
    refused: dict[int, Operation] = {
        2: ask(text_row(4), policy_row(4), loss="ppo"),
        3: ask(overflowing),
        4: Refuse(message="images are not trained here"),
        5: Load(folder=str(tmp_path / "nowhere")),
        6: Save(name="../outside", kind="weights"),
        7: OptimStep(beta1=1.5),
        8: ask(),
    }
    rest: dict[int, Operation] = {
        1: ask(text_row(6)),
        9: STEP,
        10: STEP,
        11: Save(name="end", kind="sampler"),
    }
    found = done(base, tmp_path / "a", dict(sorted((refused | rest).items())), LEARNING)
    assert [type(result) for result in found[1:8]] == [Refused] * 7
    assert [result.code for result in found[2:4]] == ["not_finite", "invalid_request"]
    assert "call forward_backward first" in found[9].message
    plain = done(base, tmp_path / "b", {1: rest[1], 2: STEP, 3: Save(name="end", kind="sampler")}, LEARNING)
    assert found[-1].checkpoint.digest == plain[-1].checkpoint.digest


def test_numbers_and_tensors_that_nobody_can_compute_with_fail_alone(
    base: torch.nn.Module, tmp_path: Path
) -> None:
    deep, huge = (
        DenseArray("float32", shape, b"\0" * 4 * n) for shape, n in (((1,) * 65, 1), ((0, 2**62), 0))
    )
    refused: list[Operation] = [
        *(ask(Datum(text_row(1).tokens, text_row(1).inputs | {"weights": one})) for one in (deep, huge)),
        *(OptimStep(learning_rate=rate) for rate in (1e300, 1e39, 1e6)),
        OptimStep(weight_decay=1e39),
        ask(policy_row(4), loss="dro", config={"beta": 1e300}),
    ]
    row = ask(text_row(6))
    end = [OptimStep(learning_rate=9e5, beta1=1 - 1e-16), STEP, Save(name="end", kind="sampler")]
    found = done(base, tmp_path / "a", dict(enumerate([row, *refused, row, *end], start=1)), LEARNING)
    assert [type(one) for one in found[1:8]] == [Refused] * 7
    assert [one.category for one in found[1:8]] == ["user"] * 7
    assert isinstance(found[9], Stepped)


def test_an_error_fails_its_operation_and_leaves_no_half_of_a_step(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, end = ask(text_row(6)), Save(name="end", kind="sampler")
    plain = done(base, tmp_path / "a", {1: row, 2: STEP, 3: row, 4: STEP, 5: end}, LEARNING)
    step, logits = torch.optim.AdamW.step, Trainable.logits
    failing = {"step", "logits"}

    def half_step(self: torch.optim.AdamW) -> Any:
        if "step" in failing:
            failing.remove("step")
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1.0)
            raise RuntimeError("overflow")
        return step(self)

    def no_logits(self: Trainable, packed: Any) -> torch.Tensor:
        if "logits" in failing and store.last_result("learning") == 3:
            failing.remove("logits")
            raise IndexError("no such token")
        return logits(self, packed)

    monkeypatch.setattr(torch.optim.AdamW, "step", half_step)
    monkeypatch.setattr(Trainable, "logits", no_logits)
    models = live_models(base, tmp_path / "b")
    store = LiveStore(tmp_path / "b")
    store.create(LEARNING)
    operations: list[Operation] = [row, STEP, STEP, row, row, STEP, end]
    for seq_id, operation in enumerate(operations, start=1):
        store.submit("learning", seq_id, operation)
    models.enqueue("learning")
    while models.do_next():
        pass
    found = [store.result("learning", seq_id) for seq_id in range(1, 8)]
    assert [type(one) for one in found] == [
        Computed,
        Refused,
        Stepped,
        Refused,
        Computed,
        Stepped,
        WeightsSaved,
    ]
    assert isinstance(found[1], Refused)
    assert (found[1].code, found[1].category) == ("operation_failed", "server")
    assert found[6].checkpoint.digest == plain[-1].checkpoint.digest  # type: ignore[union-attr]


@pytest.mark.parametrize("error", ["in its second pass", "while gradients are added", "of its loss"])
def test_an_operation_that_fails_leaves_no_gradients_in_memory(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    store, passes, logits = LiveStore(tmp_path), list[int](), Trainable.logits

    def second_fails(self: Trainable, packed: Any) -> torch.Tensor:
        passes.append(len(packed.lengths))
        if len(passes) > 1:
            raise MemoryError
        return logits(self, packed)

    def full(self: LiveModel) -> None:
        raise MemoryError

    weights = np.array([1.0] * 5 + [3e38], "f4")
    row = text_row(6, 1, weights=weights) if error == "of its loss" else text_row(6, 1)
    if error == "in its second pass":
        monkeypatch.setattr(live, "MICRO_TOKENS", 6)
        monkeypatch.setattr(Trainable, "logits", second_fails)
    elif error == "while gradients are added":
        monkeypatch.setattr(LiveModel, "_add_gradients", full)
    store.create(LEARNING)
    store.submit("learning", 1, ask(row, text_row(6, 2)))
    models = live_models(base, tmp_path)
    while models.do_next():
        pass
    refused = store.result("learning", 1)
    assert isinstance(refused, Refused)
    assert refused.code == ("not_finite" if error == "of its loss" else "out_of_memory")
    assert all(one.grad is None for one in models._models["learning"]._parameters.values())


@pytest.mark.parametrize(
    ("method", "operation", "remedy"),
    [
        ("forward_backward", ask(text_row(6)), "send fewer or shorter rows"),
        ("optim_step", STEP, "try it again, end another run, or begin one of a lower rank"),
        ("load", Load(folder="/nowhere"), "try it again, end another run, or begin one of a lower rank"),
        (
            "save",
            Save(name="end", kind="weights"),
            "try it again, end another run, or begin one of a lower rank",
        ),
    ],
)
def test_an_operation_without_memory_says_what_helps_it_and_the_next_may_take_what_is_free_then(
    base: torch.nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    operation: Operation,
    remedy: str,
) -> None:
    store, order = LiveStore(tmp_path), list[str]()

    def full(self: LiveModel, *given: Any) -> None:
        order.append("full")
        raise MemoryError

    def find() -> int:
        order.append("find")
        return 1

    monkeypatch.setattr(LiveModel, method, full)
    store.create(LEARNING)
    store.submit("learning", 1, operation)
    models = live_models(base, tmp_path, find_memory=find)
    while models.do_next():
        pass
    refused = store.result("learning", 1)
    assert isinstance(refused, Refused)
    assert (refused.code, refused.category) == ("out_of_memory", "server")
    assert refused.message == f"it needs more memory than the trainer may take: {remedy}"
    assert order[:3] == ["find", "full", "find"]


@pytest.mark.parametrize(("free", "tries"), [(1000, 2), (500, 1), (400, 1)])
def test_a_pass_without_memory_is_done_again_if_there_is_more_now(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, tries: int
) -> None:
    """The limit fell while another process had the memory, which may have given it back since."""
    store, limit, passes = LiveStore(tmp_path), [500], list[int]()
    forward_backward = LiveModel.forward_backward

    def bounded(self: LiveModel, operation: Any) -> Computed:
        passes.append(models._memory)
        if models._memory < 1000:
            raise MemoryError
        return forward_backward(self, operation)

    monkeypatch.setattr(LiveModel, "forward_backward", bounded)
    store.create(LEARNING)
    models = live_models(base, tmp_path, find_memory=lambda: limit[0])
    assert not models.do_next()
    limit[0] = free
    store.submit("learning", 1, ask(text_row(6)))
    models.enqueue("learning")
    while models.do_next():
        pass
    assert passes == [500, 1000][:tries]
    result = store.result("learning", 1)
    assert isinstance(result, Computed) if tries == 2 else isinstance(result, Refused)


def test_an_error_of_the_device_or_the_base_ends_the_trainer_without_a_result(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LiveStore(tmp_path)
    store.create(LEARNING)
    store.submit("learning", 1, ask(text_row(6)))
    errors = (
        torch.AcceleratorError("illegal access"),
        BaseChangedError("bits"),
        RuntimeError("CUDA error: x"),
    )
    for error in errors:

        def failing(self: Trainable, packed: Any, error: Exception = error) -> torch.Tensor:
            raise error

        monkeypatch.setattr(Trainable, "logits", failing)
        with pytest.raises(type(error)):
            live_models(base, tmp_path).do_next()
        assert store.result("learning", 1) is None


class Clock:
    """Clock of live models, which a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def retry(self, models: LiveModels) -> None:
        """Do what there is to do once the next model that waits for memory is to be tried again."""
        self.now += models.seconds_to_retry() or 0.0
        while models.do_next():
            pass


def test_a_model_without_memory_waits_until_another_is_unloaded(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(base, tmp_path, {1: ask(text_row(6))}, SPECS[0])
    done(base, tmp_path, {1: ask(text_row(6))}, SPECS[1])
    store = LiveStore(tmp_path)
    models, read = live_models(base, tmp_path), LiveModel.read_state

    def full(self: LiveModel, folder: Path) -> None:
        if self.spec.id == "wide:0" and store.is_live("small"):
            raise MemoryError
        read(self, folder)

    monkeypatch.setattr(LiveModel, "read_state", full)
    for spec in SPECS:
        store.submit(spec.id, 2, STEP)
    for _ in range(2):
        while models.do_next():
            pass
        assert isinstance(store.result("small", 2), Stepped)
        assert store.result("wide:0", 2) is None
        models.enqueue("wide:0")
    store.unload("small")
    models.enqueue("small")
    while models.do_next():
        pass
    assert isinstance(store.result("wide:0", 2), Stepped)
    assert list(models._since_point) == ["wide:0"]


def test_a_model_alone_that_ran_out_of_memory_is_made_again_once_its_memory_is_free(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, made, step = LiveStore(tmp_path), weakref.WeakSet[LiveModel](), LiveModel.optim_step
    init = LiveModel.__init__

    def fits_once(self: LiveModel, *given: Any) -> None:
        if len(made):
            raise MemoryError
        init(self, *given)
        made.add(self)

    def too_large(self: LiveModel, operation: OptimStep) -> Stepped:
        if operation.learning_rate == 0.5:
            raise MemoryError
        return step(self, operation)

    monkeypatch.setattr(LiveModel, "__init__", fits_once)
    monkeypatch.setattr(LiveModel, "optim_step", too_large)
    store.create(LEARNING)
    for seq_id, operation in enumerate(
        (ask(text_row(6)), OptimStep(learning_rate=0.5), ask(text_row(6)), STEP), 1
    ):
        store.submit("learning", seq_id, operation)
    models = live_models(base, tmp_path)
    while models.do_next():
        pass
    found = [store.result("learning", seq_id) for seq_id in range(1, 5)]
    assert [type(one) for one in found] == [Computed, Refused, Computed, Stepped]


@pytest.mark.parametrize("then", ["it is unloaded", "it finds no memory"])
def test_a_model_waits_no_longer_once_another_has_lost_its_memory_by_a_failed_step(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    for spec in SPECS:
        done(base, tmp_path, {1: ask(text_row(6))}, spec)
    store, lost = LiveStore(tmp_path), list[str]()
    models, read = live_models(base, tmp_path, clock=lambda: 0.0), LiveModel.read_state

    def full(self: LiveModel, folder: Path) -> None:
        if self.spec.id == ("small" if lost else "wide:0"):
            raise MemoryError
        read(self, folder)

    def too_large(self: LiveModel, operation: OptimStep) -> Stepped:
        lost.append(self.spec.id)
        raise MemoryError

    step = LiveModel.optim_step
    monkeypatch.setattr(LiveModel, "read_state", full)
    store.submit("wide:0", 2, STEP)
    while models.do_next():
        pass
    assert store.result("wide:0", 2) is None

    monkeypatch.setattr(LiveModel, "optim_step", too_large)
    store.submit("small", 2, STEP)
    models.enqueue("small")
    assert models.do_next()
    monkeypatch.setattr(LiveModel, "optim_step", step)
    assert lost == ["small"]
    if then == "it is unloaded":
        store.unload("small")
    while models.do_next():
        pass
    assert isinstance(store.result("wide:0", 2), Stepped)


def test_a_model_whose_step_failed_is_made_again_and_those_that_wait_for_memory_wait_on(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for spec in SPECS:
        done(base, tmp_path, {1: ask(text_row(6))}, spec)
    store, tried = LiveStore(tmp_path), list[str]()
    models, read = live_models(base, tmp_path, clock=lambda: 0.0), LiveModel.read_state

    def full(self: LiveModel, folder: Path) -> None:
        tried.append(self.spec.id)
        if self.spec.id == "wide:0":
            raise MemoryError
        read(self, folder)

    def too_large(self: LiveModel, operation: OptimStep) -> Stepped:
        raise MemoryError

    monkeypatch.setattr(LiveModel, "read_state", full)
    monkeypatch.setattr(LiveModel, "optim_step", too_large)
    assert not models.do_next()
    for spec in SPECS:
        store.submit(spec.id, 2, STEP)
    for seq_id in (3, 4):
        store.submit("small", seq_id, STEP)
    pause = models.seconds_to_retry()
    models.enqueue("small")
    while models.do_next():
        pass
    assert isinstance(store.result("small", 4), Refused)
    assert tried == ["small", "wide:0", *["small"] * 3]
    assert models.seconds_to_retry() == pause == 1.0


def test_an_operation_of_another_model_comes_before_the_next_step_of_one_whose_steps_fail(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for spec in SPECS:
        done(base, tmp_path, {1: ask(text_row(6))}, spec)
    store, order, step = LiveStore(tmp_path), list[str](), LiveModel.optim_step

    def too_large(self: LiveModel, operation: OptimStep) -> Stepped:
        order.append(self.spec.id)
        if self.spec.id == "wide:0":
            raise MemoryError
        return step(self, operation)

    monkeypatch.setattr(LiveModel, "optim_step", too_large)
    models = live_models(base, tmp_path)
    while models.do_next():
        pass
    for seq_id in range(2, 5):
        store.submit("wide:0", seq_id, STEP)
    store.submit("small", 2, STEP)
    models.enqueue("wide:0")
    models.enqueue("small")
    while models.do_next():
        pass
    assert order == ["wide:0", "small", "wide:0", "wide:0"]
    assert isinstance(store.result("small", 2), Stepped)


def test_a_shortage_of_memory_that_passes_breaks_no_model(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for spec in SPECS:
        done(base, tmp_path, {1: ask(text_row(6))}, spec)
    store, clock, is_short = LiveStore(tmp_path), Clock(), [True]
    found, read = list[int](), LiveModel.read_state

    def find() -> int:
        found.append(len(models._models))
        return 1

    models = live_models(base, tmp_path, clock=clock, memory=1, find_memory=find)

    def full(self: LiveModel, folder: Path) -> None:
        if is_short:
            raise MemoryError
        read(self, folder)

    monkeypatch.setattr(LiveModel, "read_state", full)
    for spec in SPECS:
        store.submit(spec.id, 2, STEP)
    for _ in range(3):
        clock.retry(models)
        assert [store.result(spec.id, 2) for spec in SPECS] == [None, None]
    is_short.clear()
    for spec in SPECS:
        models.enqueue(spec.id)
    while models.do_next():
        pass
    assert store.result("small", 2) is None  # its time has not come
    clock.retry(models)
    assert all(isinstance(store.result(spec.id, 2), Stepped) for spec in SPECS)
    assert models.seconds_to_retry() is None
    assert found == [0] * 7 + [1]


def test_a_model_alone_that_finds_no_memory_for_ten_minutes_is_refused(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(base, tmp_path, {1: ask(text_row(6))}, LEARNING)
    store, clock, pauses = LiveStore(tmp_path), Clock(), list[float]()

    def full(self: LiveModel, folder: Path) -> None:
        raise MemoryError

    monkeypatch.setattr(LiveModel, "read_state", full)
    store.submit("learning", 2, STEP)
    models = live_models(base, tmp_path, clock=clock)
    clock.retry(models)
    while (pause := models.seconds_to_retry()) is not None:
        assert store.result("learning", 2) is None
        pauses.append(pause)
        clock.retry(models)
    assert (pauses[:3], max(pauses)) == ([1.0, 2.0, 4.0], 60.0)
    assert sum(pauses[:-1]) < SHORTAGE_SECONDS <= sum(pauses)
    refused = store.result("learning", 2)
    assert isinstance(refused, Refused)
    assert (refused.code, refused.category) == ("model_broken", "server")
    assert "no memory for this model for 10 minutes: begin another" in refused.message


@pytest.mark.parametrize(
    ("others", "try_seconds", "pause"),
    [((), 12.0, 120.0), ((), 120.0, SHORTAGE_SECONDS / 2), (SPECS[:1], 120.0, 1200.0)],
)
def test_the_pause_after_a_long_try_is_ten_times_as_long_but_five_minutes_at_most_for_a_model_alone(
    base: torch.nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    others: tuple[ModelSpec, ...],
    try_seconds: float,
    pause: float,
) -> None:
    for spec in (*others, LEARNING):
        done(base, tmp_path, {1: ask(text_row(6))}, spec)
    store, clock, read = LiveStore(tmp_path), Clock(), LiveModel.read_state
    models = LiveModels(base, store, OpenGate(), BaseName("tiny"), clock=clock)

    def full(self: LiveModel, folder: Path) -> None:
        if self.spec.id == "learning":
            clock.now += try_seconds
            raise MemoryError
        read(self, folder)

    monkeypatch.setattr(LiveModel, "read_state", full)
    for spec in (*others, LEARNING):
        models.enqueue(spec.id)
    assert not models.do_next()
    assert caplog.messages[-1].endswith("it is tried again once an operation waits for it")
    store.submit("learning", 2, STEP)
    assert models.seconds_to_retry() == pause
    clock.retry(models)
    assert models.seconds_to_retry() == pause
    assert caplog.messages[-1].endswith(f"it is tried again in {pause:g} s")


@pytest.mark.parametrize("why", ["another is loaded", "no operation waits"])
def test_a_model_is_not_given_up_while_another_is_loaded_or_no_operation_waits(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    for spec in SPECS if why == "another is loaded" else SPECS[1:]:
        done(base, tmp_path, {1: ask(text_row(6))}, spec)
    store, clock, is_short = LiveStore(tmp_path), Clock(), [True]
    models, read = live_models(base, tmp_path, clock=clock), LiveModel.read_state

    def full(self: LiveModel, folder: Path) -> None:
        if is_short and self.spec.id == "wide:0":
            raise MemoryError
        read(self, folder)

    monkeypatch.setattr(LiveModel, "read_state", full)
    if why == "another is loaded":
        store.submit("wide:0", 2, STEP)
        while clock.now < 2 * SHORTAGE_SECONDS:
            clock.retry(models)
    else:
        clock.retry(models)
        assert models.seconds_to_retry() is None  # it is nobody's time to try
        clock.now += 2 * SHORTAGE_SECONDS
    if why == "another is loaded":
        store.unload("small")
        models.enqueue("small")
    else:
        store.submit("wide:0", 2, STEP)
    clock.retry(models)
    assert store.result("wide:0", 2) is None
    is_short.clear()
    clock.retry(models)
    assert isinstance(store.result("wide:0", 2), Stepped)


@pytest.mark.parametrize(
    ("others", "remedy"),
    [((), "lower the rank, or try later"), (SPECS[:1], "end another run, or lower the rank")],
)
def test_a_new_model_for_which_there_is_no_memory_is_refused_at_once(
    base: torch.nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    others: tuple[ModelSpec, ...],
    remedy: str,
) -> None:
    for spec in others:
        done(base, tmp_path, {1: ask(text_row(6))}, spec)
    init = LiveModel.__init__

    def full(self: LiveModel, base: torch.nn.Module, spec: ModelSpec, *given: Any) -> None:
        if spec.id == "wide:0":
            raise MemoryError
        init(self, base, spec, *given)

    monkeypatch.setattr(LiveModel, "__init__", full)
    (refused,) = done(base, tmp_path, {1: STEP}, SPECS[1])
    assert refused.code == "model_broken"
    assert refused.message.endswith(f"no memory for this model: {remedy}")


def test_an_owner_has_so_many_models_and_so_much_of_the_memory(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onebase_training.live_store.MOST_MODELS", 3)
    store = LiveStore(tmp_path)
    for name, owner in (("a", "acme"), ("b", "acme"), ("c", "globex"), ("d", "acme")):
        store.create(ModelSpec(id=name, rank=4, owner=owner, created=float(ord(name))))
    store.create(ModelSpec(id="d", rank=4, owner="acme"))
    with pytest.raises(ModelRefusedError, match="3 runs of this tenant"):
        store.create(ModelSpec(id="e", rank=4, owner="acme"))
    size = STATE_BYTES * model_of(base, ModelSpec(id="x", rank=4)).parameters
    models = live_models(base, tmp_path, memory=5 * size)
    while models.do_next():
        pass
    made = {name: store.made(name) for name in "abcd"}
    assert [one is not None and not one.refused for one in made.values()] == [True, True, True, False]
    assert made["d"] is not None
    assert "with this model your 3 would take" in made["d"].refused
    store.unload("a")
    for name, owner in (("e", "acme"), ("f", "initech"), ("g", "hooli")):
        store.create(ModelSpec(id=name, rank=4, owner=owner))
        models.enqueue(name)
    store.unload("d")
    while models.do_next():
        pass
    found = [store.made(name) for name in "efg"]
    assert [one.refused[:21] for one in found if one] == ["", "", "with this model all 5"]


def test_a_row_that_the_engine_refuses_is_refused(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onebase_engine.engine.engine.MAX_SCORE_BYTES", 1000)
    found = done(base, tmp_path, {1: ask(text_row(90), forward_only=True), 2: ask(text_row(90))}, LEARNING)
    assert "prompt logprobs with 0 alternatives are limited" in found[0].message
    assert isinstance(found[1], Computed)


def test_a_model_that_cannot_be_made_says_why_to_each_operation(
    base: torch.nn.Module, tmp_path: Path
) -> None:
    nothing = ModelSpec(id="x", rank=4, train_mlp=False, train_attn=False, train_unembed=False)
    for spec, why in ((nothing, "nothing is to be trained"), (ModelSpec(id="y", rank=9999), "1 to 1024")):
        (result,) = done(base, tmp_path, {1: STEP}, spec)
        assert isinstance(result, Refused)
        assert why in result.message
        assert (made := LiveStore(tmp_path).made(spec.id)) is not None
        assert why in made.refused


def test_a_model_whose_state_is_damaged_fails_alone(base: torch.nn.Module, tmp_path: Path) -> None:
    done(base, tmp_path, {1: ask(text_row(5)), 2: STEP}, LEARNING)
    (tmp_path / "learning" / "points" / "00000000" / "state.safetensors").write_bytes(b"half")
    store = LiveStore(tmp_path)
    store.submit("learning", 3, STEP)
    (beside,) = done(base, tmp_path, {1: ask(text_row(5))}, SPECS[0])
    assert isinstance(beside, Computed)
    refused = store.result("learning", 3)
    assert isinstance(refused, Refused)
    assert (refused.code, refused.category) == ("model_broken", "server")


def test_an_unloaded_model_is_gone_but_for_its_checkpoints(base: torch.nn.Module, tmp_path: Path) -> None:
    done(base, tmp_path, {1: Save(name="a", kind="weights")}, LEARNING)
    store = LiveStore(tmp_path)
    store.submit("learning", 2, STEP)
    models = live_models(base, tmp_path)
    store.unload("learning")
    assert not models.do_next()
    assert not store.models()
    assert [one.name for one in store.checkpoints("learning")] == ["a"]
    assert [spec.id for spec in store.runs()] == ["learning"]
    with pytest.raises(UnknownLiveModelError):
        store.submit("learning", 3, STEP)
    store.remove("learning")
    assert not store.runs()


def test_a_model_is_created_while_others_accept_operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, submitted = LiveStore(tmp_path / "live"), list[bool]()
    store.create(LEARNING)
    (tmp_path / "brought").write_text("weights")

    def linking(path: Path, target: Path) -> None:
        """Stand for a long copy."""
        submitting = threading.Thread(target=store.submit, args=("learning", 1, STEP), daemon=True)
        submitting.start()
        submitting.join(60)
        submitted.append(not submitting.is_alive())
        target.write_bytes(path.read_bytes())

    monkeypatch.setattr("onebase_training.live_store._link", linking)
    store.create(SPECS[0], {"adapter_config.json": tmp_path / "brought"})
    assert submitted == [True]
    assert (store.folder("small") / "start" / "adapter_config.json").read_text() == "weights"


def test_a_model_that_begins_with_an_adapter_keeps_no_second_copy_of_its_weights(
    base: torch.nn.Module, tmp_path: Path
) -> None:
    (made,) = done(base, tmp_path, {1: Save(name="a", kind="weights")}, LEARNING)
    start, scorer = Parent.of_folder(Path(made.checkpoint.folder)), replies.Scorer(base, lambda: None)
    model = LiveModel(base, LEARNING, OpenGate(), BaseName("tiny"), scorer, start)
    assert not model.trainable.has_parent
    assert_equal(dict(model._parameters), dict(model_of(base)._parameters))


# ---- checkpoints -------------------------------------------------------------------------------


def test_a_loaded_checkpoint_goes_on_as_the_model_that_was_saved(
    base: torch.nn.Module, tmp_path: Path
) -> None:
    begin = [ask(text_row(9, 1)), STEP, ask(text_row(9, 2)), STEP, Save(name="half", kind="weights")]
    go_on = [ask(text_row(9, 3)), STEP, Save(name="end", kind="weights")]
    whole = done(base, tmp_path / "a", dict(enumerate([*begin, *go_on], start=1)), LEARNING)
    folder = whole[4].checkpoint.folder
    again = ModelSpec(id="again", rank=8, seed=77, start=StartingWeights(folder, optimizer=True))
    other = done(base, tmp_path / "b", dict(enumerate(go_on, start=1)), again)
    assert other[-1].checkpoint.digest == whole[-1].checkpoint.digest
    assert other[1].step == 3
    weights_only = ModelSpec(id="weights", rank=8, start=StartingWeights(folder))
    new = done(base, tmp_path / "b", dict(enumerate(go_on, start=1)), weights_only)
    assert new[1].step == 1
    assert new[-1].checkpoint.digest != whole[-1].checkpoint.digest
    wrong = ModelSpec(id="wrong", rank=4)
    (refused,) = done(base, tmp_path / "b", {1: Load(folder=folder)}, wrong)
    assert "make a model from the checkpoint" in refused.message


def test_a_checkpoint_tells_which_one_its_weights_began_with_and_so_does_a_process_that_begins_again(
    base: torch.nn.Module, tmp_path: Path
) -> None:
    first = done(
        base, tmp_path, {1: ask(text_row(9, 1)), 2: STEP, 3: Save(name="half", kind="weights")}, LEARNING
    )[-1].checkpoint
    assert first.parent is None
    files = (Path(first.folder) / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    assert first.digest == version_digest(*(hashlib.sha256(file.read_bytes()).hexdigest() for file in files))
    begun = ModelSpec(id="begun", rank=8, start=StartingWeights(first.folder))
    second = done(base, tmp_path, {1: Save(name="begun", kind="weights")}, begun)[-1].checkpoint
    expected = ParentCheckpoint(
        model="learning", kind="weights", name="half", digest=first.digest, step=1, optimizer=False,
        from_base=True,
    )  # fmt: skip
    assert (second.parent, second.step) == (expected, 0)

    loading = {1: Load(folder=second.folder, optimizer=True), 2: ask(text_row(9)), 3: STEP}
    other = ModelSpec(id="other", rank=8)
    done(base, tmp_path, loading, other)
    (last,) = done(base, tmp_path, {4: Save(name="end", kind="sampler")}, other)
    assert last.checkpoint.step == 1
    assert last.checkpoint.parent == ParentCheckpoint(
        model="begun", kind="weights", name="begun", digest=second.digest, step=0, optimizer=True,
        from_base=False,
    )  # fmt: skip


def test_a_checkpoint_is_a_peft_folder_with_the_trained_numbers(
    base: torch.nn.Module, tmp_path: Path
) -> None:
    steps = {1: ask(text_row(9)), 2: STEP, 3: ask(text_row(12), forward_only=True)}
    found = done(base, tmp_path, steps | {4: Save(name="s", kind="sampler")}, LEARNING)
    folder = Path(found[-1].checkpoint.folder)
    assert not (folder / "optimizer.safetensors").exists()
    trained = model_of(base)
    trained.load(StartingWeights(str(folder)))
    save_peft(trained.trainable.model, tmp_path / "peft", base="tiny", commit=None)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    loaded = PeftModel.from_pretrained(peft_view(base), str(folder))
    ids = ids_of(12, 0)
    with torch.no_grad():
        logits = loaded(input_ids=torch.from_numpy(ids[None, :-1]), use_cache=False).logits[0].float()
    picked = torch.log_softmax(logits, 1).gather(1, torch.from_numpy(ids[1:, None]))[:, 0]
    np.testing.assert_allclose(picked.numpy(), logprobs(found[2])[0], atol=0.05)


@pytest.mark.parametrize(
    "key",
    [
        "ssh-rsa AAAAB3NzaC1yc2EAAAABAAAAAAkAwwECAwQFBgc=",
        "age1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq5cu47z",
        "age1qyqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqj7vrya",
    ],
    ids=["exponent 0", "point 0", "point 1"],
)
def test_a_key_over_which_pyrage_panics_is_refused_and_the_next_operation_is_done(
    base: torch.nn.Module, tmp_path: Path, key: str
) -> None:
    pyrage = pytest.importorskip("pyrage")
    own = str(pyrage.x25519.Identity.generate().to_public())
    saves = [Save(name="a", kind="external", recipients=keys) for keys in ([own, key], [own])]
    refused, kept = done(base, tmp_path, dict(enumerate(saves, 1)), LEARNING)
    assert isinstance(refused, Refused)
    assert (refused.code, refused.category) == ("invalid_value", "user")
    assert "age_encryption_recipients[1]: nothing can be encrypted to" in refused.message
    assert "make a new key pair" in refused.message
    assert isinstance(kept, WeightsSaved)
    names = {path.name for path in Path(kept.checkpoint.folder).iterdir()}
    assert names == {"checkpoint.json", "adapter_config.json.age", "adapter_model.safetensors.age"}


def test_a_panic_while_files_are_encrypted_refuses_the_save_and_leaves_nothing(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyrage = pytest.importorskip("pyrage")
    dead = pyrage.x25519.Recipient.from_str("age1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq5cu47z")
    monkeypatch.setattr(live, "_recipients", lambda keys: [dead])
    (refused,) = done(base, tmp_path, {1: Save(name="a", kind="external", recipients=["x"])}, LEARNING)
    assert isinstance(refused, Refused)
    assert "the files cannot be encrypted to these keys" in refused.message
    assert list((tmp_path / "learning" / "external").iterdir()) == []


def test_a_snapshot_for_sampling_has_the_engines_file_alone(base: torch.nn.Module, tmp_path: Path) -> None:
    snapshot = Save(name="s", kind="sampler", packed_only=True)
    load = Load(folder=str(tmp_path / "learning" / "sampler" / "s"))
    first, whole, refused = done(
        base, tmp_path, {1: snapshot, 2: Save(name="w", kind="sampler"), 3: load}, LEARNING
    )
    names = {path.name for path in Path(first.checkpoint.folder).iterdir()}
    assert names == {"packed.safetensors", "checkpoint.json"}
    assert first.checkpoint.packed == whole.checkpoint.packed
    assert "a snapshot for sampling" in refused.message


def test_names_and_times_of_checkpoints(base: torch.nn.Module, tmp_path: Path) -> None:
    asked = {
        1: Save(name="a", kind="weights"),
        2: Save(name="a", kind="weights"),
        3: Save(name="a", kind="weights", overwrite=True, ttl_seconds=100.0),
        4: Save(name="a", kind="sampler"),
    }
    found = done(base, tmp_path, asked, LEARNING)
    assert [type(result) for result in found] == [WeightsSaved, Refused, WeightsSaved, WeightsSaved]
    store = LiveStore(tmp_path)
    kept = store.checkpoint("learning", "weights", "a")
    assert (kept.seq_id, kept.expires) == (3, kept.created + 100)
    for expires in (5.0, None):
        store.set_ttl("learning", "weights", "a", expires)
        assert store.checkpoint("learning", "weights", "a").expires == expires
    store.back_up(tmp_path / "copy")
    assert LiveStore(tmp_path / "copy").checkpoint("learning", "weights", "a").expires is None
    store.delete_checkpoint("learning", "weights", "a")
    with pytest.raises(UnknownCheckpointError):
        store.set_ttl("learning", "weights", "a", 5.0)
    with pytest.raises(UnknownCheckpointError):
        store.delete_checkpoint("learning", "sampler", "..")


@pytest.mark.parametrize("step", ["_write", "replace_synced"])
def test_a_save_while_the_expiry_of_the_former_one_is_set_keeps_its_own_description_and_expiry(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    store, real = LiveStore(tmp_path), getattr(live_store, step)
    done(base, tmp_path, {1: Save(name="a", kind="weights")}, LEARNING)
    again = Save(name="a", kind="weights", overwrite=True, ttl_seconds=100.0)

    def saving(*given: Any) -> None:
        monkeypatch.setattr(live_store, step, real)
        done(base, tmp_path, {2: again}, LEARNING)
        real(*given)

    monkeypatch.setattr(live_store, step, saving)
    store.set_ttl("learning", "weights", "a", 5.0)
    kept = store.checkpoint("learning", "weights", "a")
    assert (kept.seq_id, kept.expires) == (2, kept.created + 100)


# ---- a process that ends -----------------------------------------------------------------------


def no_space(*given: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class _CutError(BaseException):
    """Stands for the death of the process."""


@pytest.mark.parametrize("point_seconds", [0.0, 1e9])
def test_a_process_cut_at_each_write_continues_with_the_same_bits(
    point_seconds: float, base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two writes to the disk the process dies, and with it everything in memory."""
    whole = done(base, tmp_path / "whole", lesson(tmp_path / "whole", "small"))
    root = tmp_path / "cut"
    store = LiveStore(root)
    store.create(SPECS[0])
    for seq_id, operation in lesson(root, "small").items():
        store.submit("small", seq_id, operation)
    left, deaths, ended = 1, 0, False
    plain = {name: getattr(LiveStore, name) for name in ("write_result", "forget_before", "write_made")}

    def cutting(name: str) -> Any:
        def cut(self: LiveStore, *given: Any) -> None:
            nonlocal left
            if (left := left - 1) == 0:
                raise _CutError
            plain[name](self, *given)
            if (left := left - 1) == 0:
                raise _CutError

        return cut

    for name in plain:
        monkeypatch.setattr(LiveStore, name, cutting(name))
    while not ended:
        left = 2 + deaths % 3
        models = live_models(base, root, point_seconds=point_seconds)
        try:
            while models.do_next():
                pass
            ended = True
        except _CutError:
            deaths += 1
    assert deaths > 10
    for seq_id, expected in enumerate(whole, start=1):
        found = store.result("small", seq_id)
        assert type(found) is type(expected)
        if isinstance(expected, Computed) and isinstance(found, Computed):
            assert (found.outputs, found.metrics) == (expected.outputs, expected.metrics)
        elif isinstance(expected, Stepped):
            assert found == expected
    assert_equal(saved(store.result("small", 14)), saved(whole[-1]))


def test_points_cover_what_is_done_and_its_operations_go(base: torch.nn.Module, tmp_path: Path) -> None:
    operations: dict[int, Operation] = {1: ask(text_row(6)), 2: STEP, 3: ask(text_row(6)), 4: STEP}
    store = LiveStore(tmp_path)
    store.create(LEARNING)
    for seq_id, operation in operations.items():
        store.submit("learning", seq_id, operation)
    models = live_models(base, tmp_path, point_seconds=0.0)
    while models.do_next():
        pass
    assert store.last_point("learning") == 4
    assert [seq_id for seq_id in operations if store.operation("learning", seq_id)] == []
    assert [path.name for path in (tmp_path / "learning" / "points").iterdir()] == ["00000004"]
    assert all(store.result("learning", seq_id) for seq_id in operations)


@pytest.mark.parametrize("joins", [False, True])
def test_backward_passes_without_a_step_are_in_a_point_with_their_gradients(
    base: torch.nn.Module, tmp_path: Path, joins: bool
) -> None:
    ends = []
    for point_seconds in (1e9, 0.0):
        root = tmp_path / f"{point_seconds}"
        store = LiveStore(root)
        for spec in SPECS:
            store.create(spec)
            for seq_id in (1, 2, 3):
                store.submit(spec.id, seq_id, ask(text_row(9, seq_id)))
        models = live_models(base, root, joins=joins, point_seconds=point_seconds)
        while models.do_next():
            pass
        newest = 0 if point_seconds else 3
        assert [store.last_point(spec.id) for spec in SPECS] == [newest, newest]
        if not point_seconds:
            models = live_models(base, root, joins=joins)  # after the death of the other
        for spec in SPECS:
            store.submit(spec.id, 4, STEP)
            store.submit(spec.id, 5, Save(name="end", kind="weights"))
            models.enqueue(spec.id)
        while models.do_next():
            pass
        ends.append([saved(store.result(spec.id, 5)) for spec in SPECS])
    for one, other in zip(*ends, strict=True):
        assert_equal(one, other)


def test_a_point_between_steps_is_written_later_than_one_after_a_step(
    base: torch.nn.Module, tmp_path: Path
) -> None:
    store, bound, points = LiveStore(tmp_path), 1e6, list[int]()
    store.create(LEARNING)
    models = live_models(base, tmp_path, point_seconds=bound)
    operations = [ask(text_row(6)), ask(text_row(6)), ask(text_row(6)), STEP]
    for seq_id, operation in enumerate(operations, 1):
        store.submit("learning", seq_id, operation)
        models.enqueue("learning")
        while models.do_next():
            pass
        points.append(store.last_point("learning"))
        models._since_point["learning"] = bound * (live.STEPLESS_POINTS if seq_id == 2 else 1)
    assert points == [0, 0, 3, 4]


@pytest.mark.parametrize("full", ["its result", "the model's first point"])
def test_a_full_disk_ends_the_trainer_and_is_not_held_against_the_operation(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    store, operation = LiveStore(tmp_path), ask(text_row(6))
    store.create(LEARNING)
    store.submit("learning", 1, operation)
    last = 1
    if full == "its result":
        done(base, tmp_path, {1: operation}, LEARNING)
        last = 2
        store.submit("learning", last, operation)
    with pytest.MonkeyPatch.context() as patch:
        if full == "its result":
            patch.setattr(LiveStore, "write_result", no_space)
        else:
            patch.setattr(LiveModel, "write_state", no_space)
            patch.setattr(LiveStore, "write_made", no_space)
        for _ in range(3):
            with pytest.raises(OSError, match="No space"):
                live_models(base, tmp_path).do_next()
            assert store.died_of() is None
    models = live_models(base, tmp_path)
    while models.do_next():
        pass
    assert not isinstance(store.result("learning", last), Refused | None)


@pytest.mark.parametrize("full", ["its point", "its result", "its result in a pass of several"])
def test_what_is_too_large_for_the_disk_is_refused_and_holds_up_no_other_model(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    row, large, end = ask(text_row(6)), ask(text_row(60, 2)), Save(name="end", kind="weights")
    start = Load(folder=str(tmp_path / "full" / "learning" / "weights" / "a"))
    save = Save(name="a", kind="weights")
    store, write_result = LiveStore(tmp_path / "full"), LiveStore.write_result
    for spec in (LEARNING, SPECS[0]):
        store.create(spec)
        for seq_id, operation in enumerate((row, save, STEP, row), 1):
            store.submit(spec.id, seq_id, operation)
    models = live_models(base, store.root, joins=full == "its result in a pass of several")
    while models.do_next():
        pass
    with pytest.MonkeyPatch.context() as patch:

        def write(self: LiveStore, model_id: str, seq_id: int, result: Any) -> None:
            if isinstance(result, Computed) and result.tokens > 50:
                no_space()
            write_result(self, model_id, seq_id, result)

        patch.setattr(LiveModel, "write_state", no_space)
        patch.setattr(LiveStore, "write_result", write)
        store.submit("learning", 5, start if full == "its point" else large)
        for seq_id, operation in enumerate((row, STEP, row), 5):
            store.submit("small", seq_id, operation)
        models.enqueue_all()
        while models.do_next():
            pass
    assert full == "its point" or "learning" in models._models, "no pass is done over"
    refused = store.result("learning", 5)
    assert isinstance(refused, Refused)
    assert (refused.code, refused.category) == ("disk_full", "server")
    assert [type(store.result("small", one)) for one in (5, 6, 7)] == [Computed, Stepped, Computed]
    plain = done(base, tmp_path / "plain", dict(enumerate((row, STEP, row, STEP, end), 1)), LEARNING)
    found = done(base, store.root, {6: STEP, 7: end}, LEARNING)
    assert_equal(saved(found[-1]), saved(plain[-1]))


def test_a_save_whose_result_finds_no_room_is_answered_by_the_next_process(
    base: torch.nn.Module, tmp_path: Path
) -> None:
    store, write_result = LiveStore(tmp_path), LiveStore.write_result
    store.create(LEARNING)
    store.submit("learning", 1, Save(name="a", kind="weights"))

    def write(self: LiveStore, model_id: str, seq_id: int, result: Any) -> None:
        if isinstance(result, WeightsSaved):
            no_space()
        write_result(self, model_id, seq_id, result)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveStore, "write_result", write)
        models = live_models(base, tmp_path)
        with pytest.raises(OSError, match="No space"):
            list(iter(models.do_next, False))
    models = live_models(base, tmp_path)
    while models.do_next():
        pass
    assert isinstance(store.result("learning", 1), WeightsSaved)


def test_an_error_of_the_disk_that_is_not_full_is_held_against_the_operation(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*given: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    store = LiveStore(tmp_path)
    store.create(LEARNING)
    store.submit("learning", 1, ask(text_row(6)))
    monkeypatch.setattr(Trainable, "logits", denied)
    with pytest.raises(PermissionError):
        live_models(base, tmp_path).do_next()
    assert store.died_of() == ("learning", 1)


@pytest.mark.parametrize("due", ["by time", "by operations"])
def test_a_point_that_does_not_fit_on_the_disk_is_tried_again_later(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, due: str
) -> None:
    store, bound, tries = LiveStore(tmp_path), 1e6, list[int]()
    monkeypatch.setattr(live, "POINT_OPERATIONS", 3 if due == "by operations" else 1000)
    store.create(LEARNING)
    models = live_models(base, tmp_path, point_seconds=bound)
    assert not models.do_next()

    def full(self: LiveModel, folder: Path) -> None:
        tries.append(store.last_result("learning"))
        no_space()

    def do_next(seq_id: int, seconds: float) -> None:
        """Do one operation. seconds: computing since the point, as it is before."""
        store.submit("learning", seq_id, ask(text_row(6)) if seq_id % 2 else STEP)
        models._since_point["learning"] = seconds if due == "by time" else 1.0
        models.enqueue("learning")
        while models.do_next():
            pass
        assert isinstance(store.result("learning", seq_id), Stepped | Computed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveModel, "write_state", full)
        for seq_id in range(1, 8):
            do_next(seq_id, seconds=1.0 if seq_id == 1 else 2 * bound if seq_id < 6 else 4 * bound)
        assert tries == ([2, 6] if due == "by time" else [3, 6])
        assert store.last_point("learning") == 0
        assert models._since_point["learning"] > (4 * bound if due == "by time" else 1.0)
    models.write_points()
    assert store.last_point("learning") == 7


def test_what_a_process_does_over_is_covered_by_points_before_all_of_it_is_done(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, logits, passes = LiveStore(tmp_path), Trainable.logits, list[int]()
    store.create(LEARNING)
    for seq_id in range(1, 7):
        store.submit("learning", seq_id, ask(text_row(6)) if seq_id % 2 else STEP)
    models = live_models(base, tmp_path, point_seconds=1e9)
    while models.do_next():
        pass
    assert store.last_point("learning") == 0  # as if there had been no room for others

    def cut_third(self: Trainable, packed: Any) -> torch.Tensor:
        passes.append(store.last_point("learning"))
        if len(passes) == 3:
            raise _CutError
        return logits(self, packed)

    monkeypatch.setattr(Trainable, "logits", cut_third)
    with pytest.raises(_CutError):
        live_models(base, tmp_path, point_seconds=0.0).do_next()
    for _ in range(2):
        assert not live_models(base, tmp_path, point_seconds=0.0).do_next()
    assert passes == [0, 2, 4, 4]
    assert store.last_point("learning") == 6


@pytest.mark.parametrize("moment", ["before its point is begun", "once its point is begun"])
@pytest.mark.parametrize("end", [LiveStore.unload, LiveStore.remove])
def test_of_a_model_that_ends_between_a_result_and_its_point_no_point_stays(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, end: Any
) -> None:
    store, place = LiveStore(tmp_path), LiveStore.point

    def on_done(model_id: str, seq_id: int) -> None:
        if seq_id == 2 and moment.startswith("before"):
            end(store, model_id)

    def point(self: LiveStore, model_id: str, seq_id: int) -> Path:
        if seq_id == 2 and store.is_live(model_id):
            end(store, model_id)
        return place(self, model_id, seq_id)

    store.create(LEARNING)
    store.submit("learning", 1, ask(text_row(6)))
    store.submit("learning", 2, STEP)
    if moment.startswith("once"):
        monkeypatch.setattr(LiveStore, "point", point)
    models = live_models(base, tmp_path, point_seconds=0.0, on_done=on_done)
    while models.do_next():
        pass
    assert not (tmp_path / "learning" / "points").exists()
    assert (tmp_path / "learning").exists() == (end is LiveStore.unload)


def test_a_result_for_which_the_disk_is_full_breaks_no_model_that_is_continued(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The point of a load was written, and its result is to be written by the next process."""
    save = Save(name="a", kind="weights")
    done(base, tmp_path, {1: save}, LEARNING)
    store = LiveStore(tmp_path)
    store.submit("learning", 2, Load(folder=str(tmp_path / "learning" / "weights" / "a")))
    write_result = LiveStore.write_result

    def full(self: LiveStore, model_id: str, seq_id: int, result: Any) -> None:
        if seq_id == 2:
            no_space()
        write_result(self, model_id, seq_id, result)

    monkeypatch.setattr(LiveStore, "write_result", full)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            live_models(base, tmp_path).do_next()
        assert store.last_point("learning") == 2
        store.submit("learning", 3, ask(text_row(6)))
    monkeypatch.setattr(LiveStore, "write_result", write_result)
    models = live_models(base, tmp_path)
    while models.do_next():
        pass
    assert isinstance(store.result("learning", 3), Computed)


def test_a_model_that_cannot_be_written_at_a_stop_leaves_the_others_theirs(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, write_state = LiveStore(tmp_path), LiveModel.write_state
    for spec in SPECS:
        store.create(spec)
        store.submit(spec.id, 1, ask(text_row(6)))
    models = live_models(base, tmp_path, point_seconds=1e9)
    while models.do_next():
        pass

    def full(self: LiveModel, folder: Path) -> None:
        if self.spec.id == next(iter(models._models)):
            no_space()
        write_state(self, folder)

    monkeypatch.setattr(LiveModel, "write_state", full)
    models.write_points()
    assert sorted(store.last_point(spec.id) for spec in SPECS) == [0, 1]


@pytest.mark.parametrize("joins", [False, True])
def test_operations_that_compute_little_are_covered_by_points_too(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joins: bool
) -> None:
    monkeypatch.setattr(live, "POINT_OPERATIONS", 3)
    store, row = LiveStore(tmp_path), text_row(5)
    store.create(LEARNING)
    store.create(SPECS[0])
    store.submit("small", 1, ask(row))
    models = live_models(base, tmp_path, joins=joins, point_seconds=1e9)
    save, refused = Save(name="a", kind="sampler", overwrite=True), Refuse(message="too long")
    operations = [ask(row), refused, save, save, ask(row, loss="no such loss"), refused, refused, ask(row)]
    points = list[int]()
    for seq_id, operation in enumerate(operations, 1):
        store.submit("learning", seq_id, operation)
        store.submit("small", seq_id + 1, ask(row))
        models.enqueue("learning")
        models.enqueue("small")
        while models.do_next():
            pass
        points.append(store.last_point("learning"))
    assert points == [0, 0, 3, 3, 3, 6, 6, 6]
    assert store.last_point("small") == 9
    left = [seq_id for seq_id in range(1, 9) if store.operation("learning", seq_id) is not None]
    assert left == [7, 8]


def test_what_was_refused_long_ago_is_not_done_over(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal is older than all results that can be asked for, and no point covers it."""
    monkeypatch.setattr("onebase_training.live_store.RESULTS_KEPT", 2)
    forward_backward = LiveModel.forward_backward

    def full(self: LiveModel, operation: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(LiveModel, "forward_backward", full)
    first = done(base, tmp_path, {1: ask(text_row(5, 1))}, LEARNING)
    monkeypatch.setattr(LiveModel, "forward_backward", forward_backward)
    little: list[Operation] = [Refuse(message="too long")] * 4
    rest = [STEP, *little, ask(text_row(5, 2)), STEP, Save(name="end", kind="weights")]
    found = done(base, tmp_path, dict(enumerate(rest, 2)), LEARNING)
    assert [type(one) for one in (*first, *found[:2])] == [Refused] * 3
    alone = done(base, tmp_path / "alone", dict(enumerate(rest[-3:], 1)), LEARNING)
    assert_equal(saved(found[-1]), saved(alone[-1]))


def test_an_interruption_loses_nothing(base: torch.nn.Module, tmp_path: Path) -> None:
    plain = done(base, tmp_path / "plain", lesson(tmp_path / "plain", "small"))
    root = tmp_path / "stopped"
    store = LiveStore(root)
    store.create(SPECS[0])
    for seq_id, operation in lesson(root, "small").items():
        store.submit("small", seq_id, operation)

    class Stopping:
        left = 0

        def wait(self) -> None:
            self.left -= 1
            if self.left == 0:
                raise Interrupted("pause")

    stops = 0
    for passes in (9, 14, 20, 17, 23, 10**6):
        gate = Stopping()
        gate.left = passes
        models = LiveModels(base, store, gate, BaseName("tiny"))
        models.enqueue_all()
        try:
            while models.do_next():
                pass
        except Interrupted:
            stops += 1
        models.write_points()
    assert stops >= 3
    assert_equal(saved(store.result("small", 14)), saved(plain[-1]))


def test_models_of_another_base_are_neither_trained_nor_read_and_stay(
    base: torch.nn.Module, tmp_path: Path
) -> None:
    first, other = LiveStore(tmp_path, "first"), LiveStore(tmp_path, "other")

    def train(store: LiveStore) -> None:
        models = LiveModels(base, store, OpenGate(), BaseName("tiny"))
        models.enqueue_all()
        models.enqueue("learning")
        while models.do_next():
            pass

    first.create(LEARNING)
    first.submit("learning", 1, Save(name="a", kind="weights"))
    train(first)
    first.submit("learning", 2, ask(text_row(5)))
    checkpoint = first.checkpoint("learning", "weights", "a")
    packed = Path(checkpoint.folder) / "packed.safetensors"
    with safe_open(packed, "pt") as file:
        assert file.metadata()["base_id"] == checkpoint.base_id == "first"
    train(other)
    assert first.result("learning", 2) is None
    assert (other.models(), other.runs()) == ([], [])
    other.back_up(tmp_path / "copy")
    assert [spec.id for spec in LiveStore(tmp_path / "copy", "first").runs()] == ["learning"]
    with pytest.raises(OtherBaseError, match="trained on another base"):
        other.submit("learning", 3, STEP)
    with pytest.raises(OtherBaseError):
        other.check_base(checkpoint)
    other.create(ModelSpec(id="new", rank=8, start=StartingWeights(checkpoint.folder)))
    train(other)
    assert (made := other.made("new")) is not None
    assert "made on another base" in made.refused
    train(first)
    assert isinstance(first.result("learning", 2), Computed)


def test_a_copy_made_while_a_model_is_trained_goes_on_where_it_was(
    base: torch.nn.Module, tmp_path: Path
) -> None:
    whole = done(base, tmp_path / "whole", lesson(tmp_path / "whole", "small"))
    root, copies = tmp_path / "root", []
    store = LiveStore(root)
    store.create(SPECS[0])
    models = live_models(base, root, point_seconds=0.0)
    for seq_id, operation in lesson(root, "small").items():
        store.submit("small", seq_id, operation)
        models.enqueue("small")
        store.back_up(tmp_path / f"copy {seq_id}")
        copies.append(LiveStore(tmp_path / f"copy {seq_id}"))
        while models.do_next():
            pass
    for copy in copies[5:12:3]:
        assert copy.checkpoint("small", "weights", "half").folder.startswith(str(copy.root))
        for seq_id, operation in lesson(root, "small").items():
            copy.submit("small", seq_id, operation)
        again = live_models(base, copy.root)
        while again.do_next():
            pass
        assert_equal(saved(copy.result("small", 14)), saved(whole[-1]))


def test_results_are_kept_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onebase_training.live_store.RESULTS_KEPT", 2)
    store = LiveStore(tmp_path)
    store.create(LEARNING)
    for seq_id in range(1, 5):
        store.write_result("learning", seq_id, Refused(message=str(seq_id)))
    assert [store.expired("learning", seq_id) for seq_id in range(7)] == [False, True, True] + [False] * 4
    assert store.next_seq("learning") == 5


def test_a_result_that_no_point_covers_is_kept_until_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onebase_training.live_store.RESULTS_KEPT", 2)
    store = LiveStore(tmp_path)
    store.create(LEARNING)
    store.point("learning", 0).mkdir()
    for seq_id in range(1, 6):
        store.write_result("learning", seq_id, Refused(message=str(seq_id)))
    assert not any(store.expired("learning", seq_id) for seq_id in range(1, 6))
    store.point("learning", 2).mkdir()
    store.forget_before("learning", 2)
    assert [seq_id for seq_id in range(1, 6) if store.expired("learning", seq_id)] == [1, 2]
    store.point("learning", 5).mkdir()
    store.forget_before("learning", 5)
    assert [seq_id for seq_id in range(1, 6) if store.expired("learning", seq_id)] == [1, 2, 3]
