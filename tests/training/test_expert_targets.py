"""Adapters on a mixture's experts: trained as PEFT would, saved as PEFT does, served as they were trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import ON_EXPERTS, load_folder, plain_experts, save_base
from tests.training.test_parity import FP32, losses_of, plain_losses, recipe, rows, summed_loss

from onebase_engine.base.load import BaseSettings, fingerprint, load_base
from onebase_training.batches import pack
from onebase_training.checkpoint import write_adapter
from onebase_training.estimate import adapted_shapes, estimate
from onebase_training.events import OpenGate
from onebase_training.parent import Parent
from onebase_training.recipe import RecipeError
from onebase_training.trainable import Trainable, resolve_parameters, resolve_targets

KINDS = ["qwen3_moe", "gpt_oss", "deepseek_v3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixtures")
    return {kind: save_base(kind, root / kind) for kind in KINDS}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_curve_is_that_of_a_plain_loop_over_pefts_own_parameters(
    kind: str, checkpointing: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    settings = BaseSettings(folders[kind], **FP32)
    data = rows(24, 320, 40)
    made = recipe(data, targets=("experts",), gradient_checkpointing=checkpointing)
    theirs = {"target_modules": [], "target_parameters": ON_EXPERTS}
    expected = plain_losses(plain_experts(load_base(settings)), made, data, **theirs)
    assert losses_of(load_base(settings), made, data, tmp_path) == pytest.approx(expected, abs=1e-4)
    assert abs(expected[0] - expected[-1]) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_pefts_but_for_roundings_of_bf16(kind: str, folders: dict[str, Path]) -> None:
    from peft import LoraConfig, get_peft_model

    base = load_base(BaseSettings(folders[kind]))
    before = fingerprint(base)
    data = rows(4, 320, 30)
    made = recipe(data, targets=("experts",), init="false", alpha=32.0)
    own = Trainable(base, made, OpenGate())
    config = LoraConfig(
        task_type="CAUSAL_LM", r=made.r, lora_alpha=32, target_modules=[], target_parameters=ON_EXPERTS
    )
    theirs: Any = get_peft_model(plain_experts(base), config, adapter_name="default").train()
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(own.named_parameters()[name].data)
    for row in data:
        (batch,) = pack([row], [0], 64, packing=True)
        losses, _ = own.losses(batch)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        summed_loss(theirs, [row]).backward()  # type: ignore[no-untyped-call]
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            mine, other = own.named_parameters()[name].grad, parameter.grad
            assert mine is not None
            assert other is not None
            assert float((mine - other).norm() / other.norm()) < 0.1, name
    assert fingerprint(base) == before


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_saved_as_peft_does_and_goes_on_from_there(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    base = load_base(BaseSettings(folders[kind]))
    data = rows(4, 320, 30)
    made = recipe(data, targets=("experts",), init="false", rank_pattern={"down_proj": 2})
    trained = Trainable(base, made, OpenGate())
    folder = tmp_path / "adapter"
    write_adapter(trained.model, folder, base="base", commit=None, card=lambda size: "")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_parameters"] == sorted(ON_EXPERTS)
    assert config["target_modules"] == []
    loaded = load_folder(base, folder)
    assert loaded.weights.keys() == trained.weights().keys()
    for name, one in trained.weights().items():
        assert torch.equal(one.a, loaded.weights[name].a)  # type: ignore[union-attr]
        assert torch.equal(one.b, loaded.weights[name].b)  # type: ignore[union-attr]
    again = Trainable(base, made, OpenGate(), parent=Parent.of_folder(folder))
    measured = Trainable(base, made, OpenGate(), version=Parent.of_folder(folder))
    batch = pack(data, range(4), 128, packing=True)[0]
    with torch.no_grad():
        losses = [one.losses(batch)[0] for one in (trained, again, measured)]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    with torch.no_grad(), trained.without_adapter():
        assert not torch.equal(losses[0], trained.losses(batch)[0])


def test_targets_name_parameters_of_experts(folders: dict[str, Path]) -> None:
    base = load_base(BaseSettings(folders["deepseek_v3"]))
    assert resolve_parameters(base, ["experts"]) == sorted(ON_EXPERTS)
    assert resolve_parameters(base, ["experts.down_proj"]) == ["experts.down_proj"]
    assert resolve_parameters(base, ["down_proj", "mlp", "all-linear"]) == []
    assert resolve_targets(base, ["experts", "q_b_proj"]) == ["q_b_proj"]
    assert set(resolve_targets(base, ["experts"])) == set()
    shapes = adapted_shapes(base, ["experts"])
    assert set(shapes) == {f"model.layers.1.mlp.{name}" for name in ON_EXPERTS}


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"dropout": 0.1}, "dropout"), ({"use_dora": True}, "use_dora"), ({"init": "eva"}, "init")],
)
def test_what_peft_does_not_know_on_experts_is_refused_by_name(
    changes: dict[str, Any], field: str, folders: dict[str, Path]
) -> None:
    base = load_base(BaseSettings(folders["qwen3_moe"]))
    with pytest.raises(RecipeError, match="experts") as refused:
        Trainable(base, recipe(rows(4, 320, 30), targets=("experts",), **changes), OpenGate())
    assert refused.value.field == field


def test_an_estimate_counts_the_matrices_of_each_expert(folders: dict[str, Path]) -> None:
    import transformers as tf

    config = tf.AutoConfig.from_pretrained(folders["qwen3_moe"])
    made = recipe(rows(4, 320, 30), targets=("experts",))
    found = estimate(config, made, longest_row=30)
    base = load_base(BaseSettings(folders["qwen3_moe"]))
    trained = Trainable(base, made, OpenGate())
    assert found.parameters == sum(one.numel() for one in trained.parameters())
