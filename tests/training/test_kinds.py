"""Every kind of adapter that a recipe can ask for: it trains, is saved small, is served as it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tests.matrix import matrix
from tests.rows import owned
from tests.training.runs import recipe_for, samples, tiny_base, trainer

from onebase_adapters.proof.loader import load_adapter
from onebase_engine.base.load import BaseSettings, fingerprint, load_base
from onebase_engine.base.view import view
from onebase_engine.kernels.reference import ReferenceKernels
from onebase_engine.kernels.weights import AdapterWeights, tensors_of
from onebase_engine.lora.module import StepRows
from onebase_engine.lora.slots import AdapterSlots, wrap_layers
from onebase_training.batches import pack
from onebase_training.checkpoint import write_adapter
from onebase_training.recipe import RecipeError

REPEATED = ("attention", "mlp and the head", "gaussian", "random B", "patterns")
"""Kinds that differ from others in what is tested elsewhere too: `make check` alone tries them."""
KINDS: dict[str, dict[str, Any]] = {
    "all linear layers": {},
    "attention": {"targets": ["attention"], "r": 4},
    "mlp and the head": {"targets": ["mlp", "lm_head"], "r": 4},
    "everything": {"targets": ["all-linear", "lm_head"], "r": 4},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True, "r": 4},
    "gaussian": {"init": "gaussian"},
    "random B": {"init": "false"},
    "EVA": {"init": "eva", "r": 4, "targets": ["attention", "lm_head"]},
    "dropout": {"dropout": 0.2},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 9}},
    "LoRA+": {"lora_plus_ratio": 4},
    "paged": {"optimizer": "paged_adamw"},
    "paged 8-bit": {"optimizer": "paged_adamw_8bit", "r": 32},
}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    """A base whose head is a matrix of its own, in fp32."""
    exact = {"dtype": torch.float32, "compute_dtype": torch.float32}
    return tiny_base(tmp_path_factory.mktemp("untied"), "qwen2", **exact)


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        pytest.param(
            *row.values, id=row.id, marks=pytest.mark.full if row.values[0] in REPEATED else row.marks
        )
        for row in matrix(KINDS, ["tied", "untied"])
    ],
)
def test_it_learns_and_the_server_loads_what_was_trained(
    kind: str, head: str, exact_base: torch.nn.Module, untied: torch.nn.Module, tmp_path: Path
) -> None:
    base = exact_base if head == "tied" else untied
    before = fingerprint(base)
    data = samples(16)
    recipe = recipe_for(data, epochs=5, max_steps=20, learning_rate=1e-2, **KINDS[kind])
    batch = pack(data.rows, range(8), 1000, packing=True)
    run = trainer(base, recipe, data, tmp_path, eva=batch)
    state = run.run_steps()
    assert state.losses[-1][1] < 0.6 * state.losses[0][1]
    size = write_adapter(
        run.trainable.model, tmp_path / "adapter", base="b", commit=None, card=lambda size: f"# {size}\n"
    )
    parameters = run.trainable.parameters()
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert size < 4 * sum(parameter.numel() for parameter in parameters) + 100_000
    loaded = load_adapter(
        base,
        tmp_path / "adapter" / "adapter_config.json",
        tmp_path / "adapter" / "adapter_model.safetensors",
        max_rank=64,
    )
    assert fingerprint(base) == before
    _assert_same(run.trainable.weights(), loaded.weights)
    with run.trainable.evaluating():
        packed = batch[0].tensors(torch.device("cpu"))
        trained = run.trainable.logits(packed)[packed.owner == 0]
    row = batch[0].samples[0]
    places = torch.from_numpy(np.flatnonzero(row.supervised) - 1)
    ids = torch.from_numpy(row.ids.astype(np.int64))[None]
    served = _served_logits(base, loaded.weights, ids, places)
    torch.testing.assert_close(trained, served, atol=1e-3, rtol=1e-3)
    plain = PeftModel.from_pretrained(view(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        peft = plain(input_ids=ids, logits_to_keep=places, use_cache=False).logits[0]
    torch.testing.assert_close(trained, peft, atol=1e-3, rtol=1e-3)


def _assert_same(trained: AdapterWeights, loaded: AdapterWeights) -> None:
    """What replies of a run are generated with is what the files give, bit for bit."""
    assert trained.keys() == loaded.keys()
    for name, module in trained.items():
        parts, others = dict(tensors_of(module)), dict(tensors_of(loaded[name]))
        assert parts.keys() == others.keys()
        assert all(torch.equal(tensor, others[part]) for part, tensor in parts.items()), name
        assert getattr(module, "scale", 1) == getattr(loaded[name], "scale", 1)


def _served_logits(
    base: torch.nn.Module, weights: Any, ids: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """Of the server's own layers, with the version in slot 1."""
    tree: Any = view(base)
    rows = StepRows()
    adapter_slots = AdapterSlots(wrap_layers(tree, rows, ReferenceKernels(), slots=2), 2, torch.device("cpu"))
    adapter_slots.load(1, weights)
    rows.tokens = owned([1] * ids.shape[1])
    rows.logits = owned([1] * len(places))
    with torch.inference_mode():
        logits: torch.Tensor = tree(input_ids=ids, logits_to_keep=places, use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_other_bases_train_too(quantization: Any, base_folder: Path, base: Any, tmp_path: Path) -> None:
    other = load_base(BaseSettings(folder=base_folder, quantization=quantization))
    before, data = fingerprint(other), samples(16)
    recipe = recipe_for(data, epochs=5, max_steps=20, learning_rate=1e-2)
    state = trainer(other, recipe, data, tmp_path).run_steps()
    assert state.losses[-1][1] < 0.6 * state.losses[0][1]
    assert fingerprint(other) == before


def test_an_unknown_layer_is_refused_with_those_that_exist(base: torch.nn.Module, tmp_path: Path) -> None:
    data = samples(4)
    with pytest.raises(RecipeError, match=r"wq.*q_proj"):
        trainer(base, recipe_for(data, targets=["wq"]), data, tmp_path)
