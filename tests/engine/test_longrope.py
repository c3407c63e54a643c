"""Bases whose rotary frequencies transformers chooses by the longest row of a pass (Phi-3 with 128k, dynamic
NTK)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from tests.engine.harness import Request, run
from tests.oracle import greedy
from tests.tiny import save_model
from torch import nn

from onebase_engine.base.load import BaseSettings, UnsupportedBaseError, fingerprint, load_base
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.messages import EngineConfig
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_server.processes import engine as process

SHORT = 64


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    config = tf.Phi3Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        original_max_position_embeddings=SHORT,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": SHORT,
        },
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("longrope")
    tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return load_base(BaseSettings(folder, quantization="none", dtype=torch.float32))


def test_serving_writes_nothing_to_the_base_and_gives_transformers_own_text(base: nn.Module) -> None:
    before = fingerprint(base)
    plain = tf.AutoModelForCausalLM.from_pretrained(
        base.config._name_or_path, dtype=torch.float32, attn_implementation="eager"
    )
    engine = Engine(base, name="tiny", limits=SchedulerLimits(4, 32, SHORT), kv_blocks=40)
    asked = [Request(tuple(range(3, 20)), None, 8), Request(tuple(range(40, 90)), None, SHORT - 50)]
    assert run(engine, asked) == [greedy(plain, list(r.prompt), r.max_tokens) for r in asked]
    assert fingerprint(base) == before


def test_even_a_pass_beyond_the_short_frequencies_leaves_the_base_as_it_was(base: nn.Module) -> None:
    before = fingerprint(base)
    with torch.inference_mode():
        base(input_ids=torch.arange(3, 3 + 2 * SHORT)[None])
    assert fingerprint(base) == before


def test_frequencies_that_grow_with_the_length_are_those_of_short_rows_for_all(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = tf.Qwen2Config(
        **sizes,
        vocab_size=320,
        num_key_value_heads=2,
        max_position_embeddings=SHORT,
        initializer_range=0.15,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    )
    grown = load_base(
        BaseSettings(save_model(config, tmp_path / "base"), quantization="none", dtype=torch.float32)
    )
    before = fingerprint(grown)
    with torch.inference_mode():
        grown(input_ids=torch.arange(3, 3 + 2 * SHORT)[None])
    assert fingerprint(grown) == before
    assert process._max_length(EngineConfig(base_folder="x"), grown) == SHORT
    plain = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    engine = Engine(grown, name="tiny", limits=SchedulerLimits(4, 32, SHORT), kv_blocks=40)
    asked = [Request(tuple(range(3, 20)), None, 8), Request(tuple(range(40, 90)), None, SHORT - 50)]
    assert run(engine, asked) == [greedy(plain, list(r.prompt), r.max_tokens) for r in asked]


def test_rows_end_where_the_frequencies_would_switch_for_all_of_a_step(base: nn.Module) -> None:
    assert process._max_length(EngineConfig(base_folder="x"), base) == SHORT
    assert process._max_length(EngineConfig(base_folder="x", max_length=50), base) == 50
    with pytest.raises(UnsupportedBaseError, match="longrope"):
        process._max_length(EngineConfig(base_folder="x", max_length=SHORT + 1), base)
