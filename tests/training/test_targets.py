"""Targets by group and by name, on every architecture, against what PEFT then wraps."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import transformers as tf
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tests.tiny import save_base
from torch import nn

from onebase_engine.base.layers import empty_base, whole_class
from onebase_engine.base.load import BaseSettings, load_base
from onebase_training.recipe import RecipeError
from onebase_training.trainable import resolve_targets, target_layers

SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OPT = {
    "vocab_size": 320,
    "hidden_size": 128,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "word_embed_proj_dim": 64,
}

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**SIZES),
    "phi3": lambda: tf.Phi3Config(**SIZES),
    "neox": lambda: tf.GPTNeoXConfig(**SIZES),
    "falcon": lambda: tf.FalconConfig(**SIZES),
    "mixtral": lambda: tf.MixtralConfig(**SIZES),
    "opt": lambda: tf.OPTConfig(**OPT, num_attention_heads=4),
    "gemma3 with eyes": lambda: tf.Gemma3Config(
        text_config={**SIZES, "head_dim": 32, "num_key_value_heads": 4},
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
        },
    ),
    "gpt2": lambda: tf.GPT2Config(n_layer=1, n_embd=64, n_head=4),
}

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
SELECTIONS = [
    ("llama", ["attention"], ATTENTION, 8),
    ("llama", ["mlp"], MLP, 6),
    ("llama", ["all-linear"], ATTENTION | MLP, 14),
    ("llama", ["all-linear", "lm_head"], ATTENTION | MLP | {"lm_head"}, 15),
    ("llama", ["mlp", "q_proj"], MLP | {"q_proj"}, 8),
    ("phi3", ["attention"], {"qkv_proj", "o_proj"}, 4),
    ("phi3", ["mlp"], {"gate_up_proj", "down_proj"}, 4),
    ("neox", ["attention"], {"query_key_value", "dense"}, 4),
    ("neox", ["mlp"], {"dense_h_to_4h", "dense_4h_to_h"}, 4),
    ("falcon", ["all-linear"], {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}, 8),
    ("mixtral", ["all-linear"], ATTENTION, 8),
    ("opt", ["attention"], {"q_proj", "k_proj", "v_proj", "out_proj"}, 8),
    ("opt", ["mlp"], {"fc1", "fc2"}, 4),
]


def build(architecture: str) -> nn.Module:
    """The model on meta: nothing is allocated."""
    model: nn.Module = empty_base(CONFIGS[architecture]())
    return model


def wrapped(model: nn.Module, names: list[str]) -> set[str]:
    """The layers on which PEFT puts LoRA for these names."""
    with init_empty_weights():
        peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=names))
    tree = peft.get_base_model()
    return {name for name, module in tree.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize(("architecture", "targets", "names", "layers"), SELECTIONS)
def test_a_selection_means_these_names_and_peft_wraps_exactly_its_layers(
    architecture: str, targets: list[str], names: set[str], layers: int
) -> None:
    model = build(architecture)
    chosen = target_layers(model, targets)
    assert len(chosen) == layers
    assert set(resolve_targets(model, targets)) == names
    assert wrapped(model, resolve_targets(model, targets)) == set(chosen)


def test_layers_of_other_senses_are_left_alone_though_they_have_the_same_names() -> None:
    config = CONFIGS["gemma3 with eyes"]()
    model = empty_base(config, whole_class(config))
    assert any("vision" in name and name.endswith("q_proj") for name, _ in model.named_modules())
    chosen = set(target_layers(model, ["q_proj"]))
    assert len(chosen) == 2
    assert all("language_model" in name for name in chosen)
    assert wrapped(model, resolve_targets(model, ["q_proj"])) == chosen


def test_one_layer_is_named_in_full() -> None:
    model = build("llama")
    name = "model.layers.1.self_attn.q_proj"
    assert list(target_layers(model, ["layers.1.self_attn.q_proj"])) == [name]
    assert resolve_targets(model, ["layers.1.self_attn.q_proj"]) == [name]
    assert wrapped(model, [name]) == {name}


def test_quantized_layers_are_linear_layers(tmp_path: Path) -> None:
    base = load_base(BaseSettings(folder=save_base("llama", tmp_path)))
    assert type(base.get_submodule("model.layers.0.self_attn.q_proj")) is bnb.nn.Linear4bit
    assert set(resolve_targets(base, ["all-linear"])) == ATTENTION | MLP


@pytest.mark.parametrize(
    ("architecture", "target", "words"),
    [
        ("llama", "qproj", ["qproj", "attention (k_proj, o_proj, q_proj, v_proj)", "mlp (", "lm_head"]),
        ("llama", "proj", ["not a linear layer"]),
        ("llama", "q.proj", ["not a linear layer"]),
        ("llama", "embed_tokens", ["of type Embedding"]),
        ("phi3", "q_proj", ["qkv_proj"]),
        ("mixtral", "mlp", ["no linear layers of that kind", "experts"]),
        ("gpt2", "all-linear", ["no linear layers", "Conv1D"]),
    ],
)
def test_a_target_that_means_no_layer_is_refused_with_those_that_exist(
    architecture: str, target: str, words: list[str]
) -> None:
    with pytest.raises(RecipeError) as refusal:
        resolve_targets(build(architecture), ["attention", target] if architecture != "gpt2" else [target])
    assert refusal.value.field == "targets"
    for word in words:
        assert word in str(refusal.value)
