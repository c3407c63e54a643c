"""Loading an adapter gives PEFT's matrices and scale, and never touches the base."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.tiny import load_folder
from torch import nn

from onebase_adapters.format.canonical import AdapterFormatError
from onebase_adapters.proof.loader import LoadedAdapter
from onebase_engine.base.load import base_tensors, fingerprint
from onebase_engine.base.view import view
from onebase_engine.kernels.weights import LoraWeights


def load(base: nn.Module, folder: Path) -> LoadedAdapter:
    return load_folder(base, folder)


def loras(loaded: LoadedAdapter) -> dict[str, LoraWeights]:
    assert all(isinstance(module, LoraWeights) for module in loaded.weights.values())
    return {name: module for name, module in loaded.weights.items() if isinstance(module, LoraWeights)}


@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_loading_writes_to_no_tensor_of_the_base(
    kind: str, bases: dict[str, nn.Module], save_adapter: Any
) -> None:
    base = bases[kind]
    names = [name for name, _ in base.named_modules()]
    before, values = fingerprint(base), {n: t.clone() for n, t in base_tensors(base).items()}
    load(base, save_adapter(target_modules=["q_proj", "down_proj", "lm_head", "embed_tokens"]))
    assert fingerprint(base) == before
    after = base_tensors(base)
    assert all(torch.equal(value, after[name]) for name, value in values.items())
    assert [name for name, _ in base.named_modules()] == names
    assert not any(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True, "r": 12},
        {
            "rank_pattern": {"o_proj": 4, "layers.1.mlp.up_proj": 16},
            "alpha_pattern": {"down_proj": 5, "layers.0.self_attn.q_proj": 3},
            "use_rslora": True,
        },
        {"target_modules": ["lm_head", "embed_tokens", "v_proj"], "lora_alpha": 3},
    ],
    ids=["plain", "rslora", "patterns", "head and embedding"],
)
def test_matrices_and_scales_are_peft_s_own(
    base: nn.Module, save_adapter: Any, fields: dict[str, Any]
) -> None:
    folder = save_adapter(**fields)
    loaded = load(base, folder)
    tree: Any = PeftModel.from_pretrained(view(base), str(folder))
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in tree.named_modules()
        if hasattr(module, "base_layer")
    }
    assert loaded.weights.keys() == layers.keys() == {m.name for m in loaded.spec.modules}
    for name, layer in layers.items():
        weights = loras(loaded)[name]
        if "default" in layer.lora_A:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        else:
            a, b = layer.lora_embedding_A["default"].T, layer.lora_embedding_B["default"]
        assert torch.equal(weights.a, a)
        assert torch.equal(weights.b, b)
        assert weights.scale == layer.scaling["default"]
        assert weights.a.dtype == weights.b.dtype == torch.float32


def test_scales_are_alpha_by_rank_or_by_its_root(base: nn.Module, save_adapter: Any) -> None:
    plain = loras(load(base, save_adapter(r=16, lora_alpha=8)))
    assert {w.scale for w in plain.values()} == {8 / 16}
    folder = save_adapter(r=16, lora_alpha=8, use_rslora=True, rank_pattern={"q_proj": 4})
    rslora = loras(load(base, folder))
    assert rslora["model.layers.0.self_attn.q_proj"].scale == 8 / math.sqrt(4)
    assert rslora["model.layers.0.self_attn.k_proj"].scale == 8 / math.sqrt(16)


def test_bytes_are_those_of_the_fp32_matrices(base: nn.Module, save_adapter: Any) -> None:
    loaded = load(base, save_adapter(r=8, target_modules=["q_proj"]))
    assert loaded.spec.parameters == 2 * (8 * 128 + 128 * 8)
    assert loaded.bytes == 4 * loaded.spec.parameters


def test_half_precision_files_give_the_values_they_hold(base: nn.Module, save_adapter: Any) -> None:
    folder = save_adapter(target_modules=["q_proj"])
    path = folder / "adapter_model.safetensors"
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(path).items()}
    save_file(tensors, path)
    weights = loras(load(base, folder))["model.layers.1.self_attn.q_proj"]
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    assert torch.equal(weights.a, tensors[key].float())


def test_an_untrained_b_of_zeros_is_refused(base: nn.Module, save_adapter: Any) -> None:
    folder = save_adapter()
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    zeros = {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in tensors.items()}
    save_file(zeros, path)
    with pytest.raises(AdapterFormatError, match="changes anything") as refused:
        load(base, folder)
    assert refused.value.code == "no_effect"
    one = next(key for key in tensors if "lora_B" in key)
    save_file({**zeros, one: tensors[one]}, path)
    assert load(base, folder).weights


def test_a_scale_of_zero_is_refused(base: nn.Module, save_adapter: Any, edit_config: Any) -> None:
    folder = save_adapter()
    edit_config(folder, lora_alpha=0)
    with pytest.raises(AdapterFormatError) as refused:
        load(base, folder)
    assert refused.value.code == "no_effect"


def test_a_matrix_that_its_scale_makes_infinite_is_refused(
    base: nn.Module, save_adapter: Any, edit_config: Any
) -> None:
    folder = save_adapter(target_modules=["q_proj"])
    path = folder / "adapter_model.safetensors"
    save_file({k: t.sign() * 1e38 if "lora_B" in k else t for k, t in load_file(path).items()}, path)
    edit_config(folder, lora_alpha=1000)
    with pytest.raises(AdapterFormatError, match="overflows") as refused:
        load(base, folder)
    assert refused.value.code == "not_finite"


def test_two_adapters_loaded_in_turn_do_not_meet(base: nn.Module, save_adapter: Any) -> None:
    first, second = save_adapter(seed=1), save_adapter(seed=2, r=4)
    alone = loras(load(base, first))
    load(base, second)
    again = loras(load(base, first))
    assert all(torch.equal(alone[name].b, again[name].b) for name in alone)
