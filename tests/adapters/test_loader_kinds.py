"""Loading adapters of every kind from their files: what comes out, what acts, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.adapters.kinds import KINDS, peft_adapter
from tests.tiny import load_folder, save_base
from torch import nn

from onebase_adapters.format.canonical import CONFIG_FILE, WEIGHTS_FILE, AdapterFormatError
from onebase_adapters.proof.extract import extract
from onebase_adapters.proof.loader import load_adapter
from onebase_engine.base.layers import adaptable_layers
from onebase_engine.base.load import BaseSettings, base_tensors, fingerprint, load_base
from onebase_engine.base.view import peft_view
from onebase_engine.kernels.weights import LoraWeights, SavedModule, TokenRows, tensors_of

UNTRAINED = [
    "lora",
    "dora",
    "bias",
    "embedding dora",
    "saved norms",
    "saved embedding",
    "tokens",
]


@pytest.fixture(scope="module", params=["nf4", "int8", "none"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A base with a tied head."""
    folder = save_base("llama", tmp_path_factory.mktemp("base"))
    return load_base(BaseSettings(folder, quantization=request.param))


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_give_the_tensors_of_the_model_that_was_saved(
    base: nn.Module, kind: str, tmp_path: Path
) -> None:
    before, values = fingerprint(base), {n: t.clone() for n, t in base_tensors(base).items()}
    model = peft_adapter(base, kind, 1)
    loaded = load_folder(base, save(model, tmp_path))
    expected = extract(model, "default")
    assert loaded.weights.keys() == expected.keys() == {module.name for module in loaded.spec.modules}
    for name, module in expected.items():
        found = dict(tensors_of(loaded.weights[name]))
        assert type(module) is type(loaded.weights[name])
        assert found.keys() == dict(tensors_of(module)).keys()
        assert all(torch.equal(tensor, found[part]) for part, tensor in tensors_of(module)), name
    assert loaded.changed == len(expected)
    assert fingerprint(base) == before
    assert all(torch.equal(value, base_tensors(base)[name]) for name, value in values.items())


@pytest.mark.parametrize("kind", UNTRAINED)
def test_an_untrained_adapter_of_any_kind_is_refused_unless_allowed(
    base: nn.Module, kind: str, tmp_path: Path
) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 8, "lora_alpha": 16, **KINDS[kind]})
    folder = save(get_peft_model(peft_view(base), config), tmp_path)
    with pytest.raises(AdapterFormatError, match="changes anything") as refused:
        load_folder(base, folder)
    assert refused.value.code == "no_effect"
    allowed = load_adapter(base, folder / CONFIG_FILE, folder / WEIGHTS_FILE, 64, allow_noop=True)
    assert allowed.changed == 0
    assert allowed.weights


@pytest.mark.parametrize(
    ("kind", "part", "change"),
    [
        ("dora", "lora_magnitude_vector", 1.5),
        ("bias", "lora_B.bias", 1.0),
        ("saved norms", "model.norm.weight", 2.0),
        ("tokens", "trainable_tokens_delta", 2.0),
    ],
)
def test_one_changed_tensor_of_any_kind_is_enough(
    base: nn.Module, kind: str, part: str, change: float, tmp_path: Path
) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 8, "lora_alpha": 16, **KINDS[kind]})
    folder = save(get_peft_model(peft_view(base), config), tmp_path)
    tensors = load_file(folder / WEIGHTS_FILE)
    name = next(name for name in tensors if part in name)
    tensors[name] = tensors[name] * change + (part == "lora_B.bias")
    save_file(tensors, folder / WEIGHTS_FILE)
    assert load_folder(base, folder).changed >= 1


def test_a_tied_head_follows_the_tokens_of_its_embedding_and_shares_their_rows(
    base: nn.Module, tmp_path: Path
) -> None:
    loaded = load_folder(base, save(peft_adapter(base, "tokens", 1), tmp_path))
    rows, head = loaded.weights["model.embed_tokens"], loaded.weights["lm_head"]
    assert isinstance(rows, TokenRows)
    assert isinstance(head, TokenRows)
    assert rows.rows is head.rows
    assert rows.indices.tolist() == sorted(KINDS["tokens"]["trainable_token_indices"])
    lora = sum(w.a.nbytes + w.b.nbytes for w in loaded.weights.values() if isinstance(w, LoraWeights))
    assert loaded.bytes == rows.rows.nbytes + rows.indices.nbytes + lora


@pytest.mark.parametrize("tied", [True, False], ids=["ensure_weight_tying", "not tied"])
def test_a_saved_embedding_reaches_the_head_only_if_the_config_ties_them(
    base: nn.Module, tied: bool, tmp_path: Path
) -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=tied,
    )
    model: Any = get_peft_model(peft_view(base), config)
    with torch.no_grad():
        model.get_input_embeddings().modules_to_save["default"].weight.add_(1.0)
    loaded = load_folder(base, save(model, tmp_path))
    embedding = loaded.weights["model.embed_tokens"]
    assert isinstance(embedding, SavedModule)
    assert ("lm_head" in loaded.weights) is tied
    if tied:
        assert torch.equal(loaded.weights["lm_head"].weight, embedding.weight)  # type: ignore[union-attr]


def test_dora_whose_gain_overflows_is_refused(tmp_path: Path) -> None:
    base = load_base(BaseSettings(save_base("llama", tmp_path / "base"), quantization="none"))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(0.01)
    folder = save(peft_adapter(base, "dora", 1, std=1e-20), tmp_path)
    tensors = load_file(folder / WEIGHTS_FILE)
    name = next(name for name in tensors if "lora_magnitude_vector" in name)
    tensors[name] = torch.full_like(tensors[name], 3e38)
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterFormatError, match="magnitude") as refused:
        load_folder(base, folder)
    assert refused.value.code == "not_finite"


def test_layers_that_may_be_adapted_are_listed_with_their_kinds(base: nn.Module) -> None:
    layers = adaptable_layers(base)
    kinds = {kind: {name for name in layers if layers[name].kind == kind} for kind in ("norm", "embedding")}
    norms = {f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")}
    assert kinds == {"norm": {"model.norm", *norms}, "embedding": {"model.embed_tokens"}}
    assert layers["model.norm"].size_in == layers["model.norm"].size_out == 128
    assert layers["model.layers.0.mlp.up_proj"].size_out == 192
