"""What a base's config alone says of it is what its start would say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from tests.tiny import ARCHITECTURES, COMPOSITES, save_model

from onebase_engine.base.load import BaseSettings, base_bytes, load_base, parameter_count
from onebase_engine.engine.base_check import check_base
from onebase_engine.engine.model import ServedModel

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "an encoder-decoder": (tf.T5Config, "encoder-decoder"),
    "an encoder": (tf.BertConfig, "no causal language model"),
    "a mixture": (lambda: tf.JetMoeConfig(num_hidden_layers=2), "a mixture's experts in a way"),
    "indices": (tf.DeepseekV32Config, "indexed_attention"),
    "a mask": (lambda: tf.DogeConfig(num_hidden_layers=2), "mask of its own"),
    "looks ahead": (tf.PaliGemmaConfig, "not causal"),
    "attention of its own": (tf.BloomConfig, "brings its own attention"),
}


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3"])
def test_sizes_are_those_of_the_loaded_base(kind: str, tmp_path: Path) -> None:
    found = check_base(ARCHITECTURES[kind]())
    base = load_base(BaseSettings(save_model(ARCHITECTURES[kind](), tmp_path)))
    assert found.refusal is None
    assert found.parameters == parameter_count(base)
    assert found.memory["nf4"] == pytest.approx(base_bytes(base), rel=0.02)
    assert found.kv_bytes_per_token == ServedModel(base, 1).kv_bytes_per_token
    assert found.kv_bytes_per_old_token == ServedModel(base, 1).kv_bytes_per_old_token
    assert sum(found.layers.values()) == 2
    assert found.context == 512


def test_a_composite_is_counted_without_its_tower() -> None:
    found = check_base(COMPOSITES["gemma3"]())
    assert found.refusal is None
    assert (found.model_type, found.text_type) == ("gemma3", "gemma3_text")
    assert found.left_out.keys() == {"model.vision_tower", "model.multi_modal_projector"}
    assert found.parameters is not None
    assert found.parameters < sum(found.left_out.values()) + found.parameters
    assert found.notes == ()


def test_a_published_size_is_checked_without_its_memory() -> None:
    found = check_base(tf.Mistral3Config())
    assert found.refusal is None
    assert found.parameters is not None
    assert found.parameters > 20e9
    mixture = check_base(tf.Qwen3MoeConfig(num_hidden_layers=48, num_experts=128))
    assert mixture.refusal is None
    assert mixture.parameters is not None
    assert mixture.parameters > 30e9
    assert mixture.memory["nf4"] < 18.5e9


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_served_is_told_with_the_reason(kind: str) -> None:
    make, reason = REFUSED[kind]
    found = check_base(make())
    assert found.refusal is not None
    assert reason in found.refusal


def test_files_that_are_quantized_leave_one_choice() -> None:
    config = ARCHITECTURES["llama"]()
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    found = check_base(config)
    assert (found.stored, list(found.memory)) == ("int8", ["int8"])


def test_a_layer_that_nf4_cannot_hold_on_a_cpu_is_named() -> None:
    config = ARCHITECTURES["llama"]()
    config.intermediate_size = 200
    (note,) = check_base(config).notes
    assert "model.layers.0.mlp.down_proj (200)" in note
