"""Each loss of a client's rows is its formula, with its gradient, and TRL's where TRL has it."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.training.live_support import ids_of, policy_row, text_row

from onebase_training.datum_losses import LOSSES, Row, check_row, find_loss, target_logprobs
from onebase_training.live_operations import Datum, RefusedError

Array = npt.NDArray[Any]
LOW, HIGH = 0.8, 1.2


def _clip(ratio: Array, low: Array | float, high: Array | float) -> Array:
    clipped: Array = np.minimum(np.maximum(ratio, low), high)
    return clipped


def _clipped(ratio: Array, advantages: Array, low: Array | float, high: Array | float) -> tuple[Array, Array]:
    """The clipped objective, negated, and its gradient where a token's ratio has its logprob's."""
    plain, clipped = ratio * advantages, _clip(ratio, low, high) * advantages
    return -np.minimum(plain, clipped), np.where(plain <= clipped, -plain, 0.0)


def formula(
    name: str, logprobs: Array, inputs: dict[str, Array], settings: dict[str, float]
) -> tuple[Array, Array]:
    """Losses and gradients by logprob in fp64, as the documents have them."""
    if name == "cross_entropy":
        weights = inputs.get("weights", np.ones_like(logprobs))
        return -weights * logprobs, -weights
    advantages = inputs["advantages"]
    apart = logprobs - inputs["logprobs"]
    if name == "importance_sampling":
        return -np.exp(apart) * advantages, -np.exp(apart) * advantages
    if name == "dro":
        beta = settings["beta"]
        return 0.5 * beta * apart**2 - logprobs * advantages, beta * apart - advantages
    low = inputs.get("clip_low_threshold", settings["clip_low_threshold"])
    high = inputs.get("clip_high_threshold", settings["clip_high_threshold"])
    if name == "cispo":
        weight = _clip(np.exp(apart), low, high) * advantages
        return -weight * logprobs, -weight
    if name == "ppo":
        return _clipped(np.exp(apart), advantages, low, high)
    marked = inputs["sequence_ratio_mask"] != 0
    ratio = np.exp(np.full_like(apart, apart[marked].mean()))
    return _clipped(ratio, advantages, low, high)


def _array(draw: Any, count: int, low: float, high: float) -> Array:
    number = st.integers(round(low * 1000), round(high * 1000))
    return np.array(draw(st.lists(number, min_size=count, max_size=count))) / 1000


@given(st.data(), st.sampled_from(sorted(LOSSES)), st.integers(1, 7))
@settings(max_examples=300, deadline=None)
def test_every_loss_is_its_formula_and_its_gradient_the_formulas(data: Any, name: str, count: int) -> None:
    loss, draw = LOSSES[name], data.draw
    logprobs = _array(draw, count, -9.0, -0.01)
    inputs = {"logprobs": logprobs + _array(draw, count, -1.0, 1.0), "advantages": _array(draw, count, -3, 3)}
    optional = {"clip_low_threshold": _array(draw, count, 0.3, 0.9),
                "clip_high_threshold": _array(draw, count, 1.1, 3)}  # fmt: skip
    if name == "cross_entropy":
        inputs, optional = {}, {"weights": _array(draw, count, -4, 4)}
    if name == "gspo":
        marks = draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=count, max_size=count))
        inputs["sequence_ratio_mask"] = np.array(marks)
        inputs["sequence_ratio_mask"][draw(st.integers(0, count - 1))] = 1.0
    inputs |= {one: optional[one] for one in loss.optional if draw(st.booleans())}
    given_ = {one: value * draw(st.sampled_from([1.0, 0.5])) for one, value in loss.config.items()}
    config = loss.settings(given_)
    expected, gradient = formula(name, logprobs, inputs, config)
    for dtype, exact in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        found = torch.tensor(logprobs, dtype=dtype, requires_grad=True)
        losses = loss.elementwise(
            found, {one: torch.tensor(value, dtype=dtype) for one, value in inputs.items()}, config
        )
        losses.sum().backward()  # type: ignore[no-untyped-call]
        np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=exact, atol=exact)
        if dtype == torch.float64:
            assert found.grad is not None
            np.testing.assert_allclose(found.grad.numpy(), gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_of_targets_and_their_gradients_are_those_of_fp64(wide: bool, dtype: torch.dtype) -> None:
    draw, words, counts = torch.Generator().manual_seed(3), 50, (300, 5, 9)
    logits = (3 * torch.randn(sum(counts), words, generator=draw)).to(dtype)
    rows = []
    for number, count in enumerate(counts):
        # Of a row with K targets, and of one with another K in the same pass; a target may come twice.
        shape = (count, number + 1) if wide and number else (count,)
        rows.append(Row(torch.zeros(count), torch.randint(words, shape, generator=draw), {}))
    weights = [torch.randn(row.targets.shape, generator=draw) for row in rows]

    def gradient(given: torch.Tensor, found: list[torch.Tensor]) -> torch.Tensor:
        total = sum((one * weight.to(one)).sum() for one, weight in zip(found, weights, strict=True))
        return torch.autograd.grad(total, given)[0]  # type: ignore[arg-type]

    exact = logits.double().requires_grad_()
    logs = torch.log_softmax(exact, 1).split(counts)  # type: ignore[no-untyped-call]
    expected = [
        one.gather(1, row.targets.view(len(row), -1)).view(row.targets.shape)
        for one, row in zip(logs, rows, strict=True)
    ]
    wanted = gradient(exact, expected)
    leaf = logits.clone().requires_grad_()
    found = target_logprobs(leaf * 1, rows)  # the gradient overwrites what it is given
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(gradient(leaf, found).double(), wanted, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        for one, other in zip(target_logprobs(logits.clone(), rows), found, strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "loss_type", "level"),
    [("ppo", "dapo", "token"), ("gspo", "dapo", "sequence"), ("cispo", "cispo", "token")],
)
@pytest.mark.parametrize("seed", range(8))
def test_losses_of_policies_are_those_of_trl(name: str, loss_type: str, level: str, seed: int) -> None:
    trl: Any = pytest.importorskip("trl.trainer.grpo_trainer")
    draw, count = torch.Generator().manual_seed(seed), 11
    old = -3 * torch.rand(count, generator=draw)
    logprobs = (old + 0.4 * torch.randn(count, generator=draw)).requires_grad_()
    advantage = float(torch.randn(1, generator=draw))
    mask = torch.ones(1, count, dtype=torch.long)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *given, **more: (
            logprobs[None], torch.zeros(1, count), None,
        ),
        args=SimpleNamespace(delta=None, steps_per_generation=1), model=SimpleNamespace(training=False),
        accelerator=Mock(num_processes=1, gather=lambda one: one, reduce=lambda one, reduction: one),
        importance_sampling_level=level, loss_type=loss_type, epsilon_low=1 - LOW,
        # Of CISPO TRL clips at the threshold itself, and only from above.
        epsilon_high=HIGH if loss_type == "cispo" else HIGH - 1, beta=0.0, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_vllm=False, aux_loss_enabled=False, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    inputs = {
        "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask,
        "completion_mask": mask, "advantages": torch.tensor([advantage]), "old_per_token_logps": old[None],
        "num_items_in_batch": torch.tensor(1.0),
    }  # fmt: skip
    expected = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    wanted = torch.autograd.grad(expected, logprobs)[0]
    loss = LOSSES[name]
    config = loss.settings(
        {"clip_low_threshold": 0.0 if name == "cispo" else LOW, "clip_high_threshold": HIGH}
    )
    own = {
        "logprobs": old,
        "advantages": torch.full((count,), advantage),
        "sequence_ratio_mask": torch.ones(count),
    }
    found = loss.elementwise(logprobs, own, config).sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, logprobs)[0], wanted)


def test_a_loss_of_the_clients_own_has_its_gradient_by_weights() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.3], dtype=torch.float64, requires_grad=True)
    own = (logprobs.exp() * torch.tensor([1.0, -2.0, 0.5])).sum() ** 2
    wanted = torch.autograd.grad(own, logprobs)[0]
    losses = LOSSES["cross_entropy"].elementwise(logprobs, {"weights": -wanted}, {})
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), logprobs)[0], wanted)


@pytest.mark.parametrize(
    ("loss", "row", "config", "says"),
    [
        ("stable_reinforce", text_row(3), {}, "use importance_sampling, ppo, cispo or gspo"),
        ("custom", text_row(3), {"loss_id": "x"}, "call forward_backward_custom with a function"),
        ("grpo", text_row(3), {}, "the losses here are cross_entropy, importance_sampling, ppo"),
        ("ppo", text_row(3), {}, "has no logprobs, which ppo needs"),
        ("gspo", policy_row(3), {}, "has no sequence_ratio_mask"),
        ("gspo", policy_row(3, sequence_ratio_mask=np.zeros(3, "f4")), {}, "marks no token"),
        ("dro", policy_row(3), {"clip_low_threshold": 0.5}, "dro has no setting 'clip_low_threshold'"),
        ("ppo", policy_row(3), {"clip_low_threshold": "low"}, "write a finite number"),
        ("ppo", policy_row(3, weights=np.ones(3, "f4")), {}, "not 'weights'"),
        ("cross_entropy", text_row(3, weights=np.ones(4, "f4")), {}, "weights has shape"),
        ("cross_entropy", text_row(3, weights=np.array([1, np.nan, 1], "f4")), {}, "not finite"),
        ("cross_entropy", text_row(3, target_tokens=np.array([1, 2, 320])), {}, "outside of 0 to 319"),
        ("cross_entropy", text_row(3, target_tokens=np.array([1, 2, -100])), {}, "outside of 0 to 319"),
        ("cross_entropy", text_row(3, target_tokens=np.ones((2, 3), int)), {}, "(3,) or (3, K)"),
        ("ppo", policy_row(3, target_tokens=np.ones((3, 2), int)), {}, "ppo takes (3,)"),
        ("cross_entropy", Datum.of([1, 2], {}), {}, "no target_tokens"),
        ("cross_entropy", Datum.of([], {}), {}, "has no tokens"),
        ("cross_entropy", Datum.of([5] * 65, {"target_tokens": ids_of(64, 0)}), {}, "trains 64 at most"),
    ],
)
def test_what_a_loss_cannot_take_is_refused_by_name(
    loss: str, row: Datum, config: dict[str, float | str], says: str
) -> None:
    def check() -> None:
        found = find_loss(loss)
        found.settings(config)
        check_row(row, found, 0, 320, 64)

    with pytest.raises(RefusedError) as caught:
        check()
    assert says in str(caught.value)
    assert caught.value.refused.category == "user"


def test_inputs_for_the_clients_own_use_are_ignored() -> None:
    row = check_row(policy_row(4, mask=np.ones(4, "f4")), LOSSES["ppo"], 0, 320, 64)
    assert row.inputs.keys() == {"logprobs", "advantages"}
