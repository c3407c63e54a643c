"""Adapters of every kind in one engine: from prepared files, beside large ranks, and when they overflow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tests.device import DEVICE
from tests.engine.harness import Lab, Request, requests, run, submission
from tests.tiny import ADAPTERS, ATTENTION, load_folder, save_adapter, save_base, save_model
from torch import nn

from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.kv_cache import Sight
from onebase_engine.engine.model import ServedModel
from onebase_engine.kernels.weights import composable, weights_bytes
from onebase_engine.lora.packed_adapter import read_packed_adapter, write_packed_adapter

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"quantization": "none", "dtype": torch.float32},
    "nf4": {"quantization": "nf4", "dtype": torch.bfloat16},
    "int8": {"quantization": "int8", "dtype": torch.bfloat16},
}
ASKED = requests(17, seed=5)


@pytest.fixture(scope="module", params=["fp32", "nf4", pytest.param("int8", marks=pytest.mark.full)])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp(request.param)
    settings = BaseSettings(save_base("qwen3", folder / "base"), **PRECISIONS[request.param], device=DEVICE)
    return Lab.create(load_base(settings), folder)


def scored(engine: Engine, asked: list[Request]) -> tuple[dict[str, list[Any]], dict[str, str | None]]:
    """Serve the requests together: every row's tokens with their logprobs, and the codes of failures."""
    for i, request in enumerate(asked):
        message = submission(str(i), request)
        sampling = protocol.Sampling(
            temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True, logprobs=2
        )
        engine.submit(
            protocol.Submit(id=str(i), prompt=message.prompt, sampling=sampling, adapters=message.adapters)
        )
    found: dict[str, list[Any]] = {str(i): [] for i in range(len(asked))}
    errors: dict[str, str | None] = {}
    while engine.busy:
        engine.step()
        for output in engine.take_outputs():
            found[output.id] += output.logprobs or []
            if output.error_code is not None:
                errors[output.id] = output.error_code
    return found, errors


@pytest.fixture(scope="module")
def quiet(lab: Lab) -> dict[str, list[Any]]:
    """What the rows of ASKED get among themselves."""
    found, errors = scored(lab.engine(), ASKED)
    assert not errors
    return found


def test_prepared_files_serve_the_same_bits_as_the_weights_that_were_proved(
    lab: Lab, quiet: dict[str, list[Any]], tmp_path: Path
) -> None:
    stored = []
    for i, weights in enumerate(lab.weights):
        write_packed_adapter(tmp_path / str(i), weights, base_id="b")
        stored.append(read_packed_adapter(tmp_path / str(i), base_id="b"))
        assert weights_bytes(stored[-1]) == weights_bytes(weights)
    assert scored(replace(lab, weights=stored).engine(), ASKED) == (quiet, {})


def test_the_first_eight_compose_and_the_others_are_refused_by_name(lab: Lab) -> None:
    assert [composable(weights) for weights in lab.weights] == [True] * 8 + [False] * (len(ADAPTERS) - 8)
    engine = lab.engine()
    for i in range(len(ADAPTERS)):
        refs = [protocol.AdapterRef(f"digest{i}", 0.5)]
        sampling = protocol.Sampling(temperature=0.0, max_tokens=1)
        engine.submit(protocol.Submit(id=str(i), prompt=[5], sampling=sampling, adapters=refs))
    while engine.busy:
        engine.step()
    refused = {int(out.id): out.error_code for out in engine.take_outputs() if out.error_code}
    assert refused == dict.fromkeys(range(8, len(ADAPTERS)), "adapter_not_composable")


def test_a_large_rank_changes_no_bit_of_its_neighbours_and_equals_peft(
    lab: Lab, quiet: dict[str, list[Any]], tmp_path: Path
) -> None:
    settings = {"r": 256, "lora_alpha": 256, "target_modules": ATTENTION}
    folder = save_adapter(lab.base, settings, tmp_path / "large", seed=9, std=0.02)
    loaded = load_folder(lab.base, folder, max_rank=256)
    with_large = Lab(
        lab.base, lab.folders, [*lab.references, loaded.reference], [*lab.weights, loaded.weights]
    )
    large = [Request(request.prompt, len(ADAPTERS), 6, request.at) for request in ASKED[:3]]
    together, errors = scored(with_large.engine(), [*ASKED, *large])
    assert not errors
    assert {name: rows for name, rows in together.items() if int(name) < len(ASKED)} == quiet
    texts = run(with_large.engine(), [*ASKED, *large])
    assert texts[len(ASKED) :] == [with_large.expected(request) for request in large]


SURVIVES = ("embedding", "tokens")
"""The first norm divides infinitely large embeddings away."""
BROKEN: dict[str, dict[str, Any]] = {
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "bias": {"target_modules": ["q_proj", "down_proj"], "lora_bias": True},
    "norm": {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj"], "modules_to_save": ["model.embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6, 7]},
}


def test_an_adapter_of_any_kind_that_overflows_fails_alone(
    lab: Lab, quiet: dict[str, list[Any]], tmp_path: Path
) -> None:
    for kind, modules in BROKEN.items():
        settings = {"r": 4, "lora_alpha": 4, **modules}
        folder = save_adapter(lab.base, settings, tmp_path / kind, seed=1, std=1e36)
        engine = lab.engine()
        engine.put_adapter(f"digest{len(ADAPTERS)}", load_folder(lab.base, folder).weights)
        broken = [Request((5, 6, 7) * 9, len(ADAPTERS), 20) for _ in range(2)]
        found, errors = scored(engine, [*ASKED, *broken])
        assert {name: rows for name, rows in found.items() if int(name) < len(ASKED)} == quiet, kind
        failing = () if kind in SURVIVES else (str(len(ASKED)), str(len(ASKED) + 1))
        assert errors == dict.fromkeys(failing, "not_finite"), kind
        assert scored(engine, ASKED)[0] == quiet, f"{kind}: nothing of it is left in blocks or slots"


@pytest.mark.parametrize("kind", [tf.DeepseekV2Config, tf.DeepseekV3Config])
def test_dense_layers_of_what_may_be_a_mixture_are_served(kind: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    latent = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32}
    config = kind(
        **sizes, **latent, num_key_value_heads=4, v_head_dim=64, vocab_size=320, first_k_dense_replace=2,
        initializer_range=0.15, max_position_embeddings=512,
    )  # fmt: skip
    base = load_base(BaseSettings(save_model(config, tmp_path / "base"), device=DEVICE))
    folder = save_adapter(base, {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION}, tmp_path / "a", 1)
    loaded = load_folder(base, folder)
    lab = Lab(base, [folder], [loaded.reference], [loaded.weights])
    prompts = [tuple(range(5 + at, 40 + 9 * at)) for at in range(4)]
    asked = [Request(prompt, adapter, 12) for prompt in prompts for adapter in (None, 0)]
    assert not lab.disagreements(asked, run(lab.engine(step_tokens=30), asked))


def test_layers_that_share_keys_and_values_take_memory_once(tmp_path: Path) -> None:
    base = load_base(BaseSettings(save_base("gemma4", tmp_path / "base"), device=DEVICE))
    model = ServedModel(base, 1)
    # Of four layers the first two have keys and values of their own: two heads of 32 numbers, and one of 64.
    assert model.kv_bytes_per_token == 2 * (2 * (32 + 32) + 1 * (64 + 64))
    model.allocate_kv(10, 16)
    cache = model._attention.cache
    assert cache is not None
    assert cache.layers.keys() == {0, 1}
    # A block is of either layer, which take as much of it.
    assert sum(part.nbytes for part in cache.by_block) == 160 * model.kv_bytes_per_token / 2


@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=["kv-as-the-base", "kv-int8"])
def test_rows_with_a_window_keep_no_more_blocks_than_it_has(
    kv_dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """Two rows of 300 tokens in a cache that could hold one."""
    base = load_base(BaseSettings(save_base("mistral", tmp_path / "base"), device=DEVICE))
    lab = Lab(base, [], [], [])
    asked = [Request(tuple(range(5 + at, 25 + at)), None, 280, at) for at in range(2)]
    model = ServedModel(base, 8, kv_dtype=kv_dtype)
    engine = lab.engine(kv_blocks=24, model=model)
    texts = run(engine, asked)
    assert engine.scheduler.preemptions == 0
    assert engine.pool.free == engine.pool.capacity
    if kv_dtype is None:
        assert not lab.disagreements(asked, texts)
    alone = [run(lab.engine(model=ServedModel(base, 8, kv_dtype=kv_dtype)), [one])[0] for one in asked]
    assert texts == alone


def test_layers_are_grouped_by_what_they_see_unless_no_sequence_is_longer(tmp_path: Path) -> None:
    windows = {}
    for name in ("mistral", "gemma3", "llama", "granite_swa", "gemma4", "gemma3n"):
        base = load_base(BaseSettings(save_base(name, tmp_path / name)))
        windows[name] = [group.sight.window for group in ServedModel(base, 1).groups]
        assert [group.sight for group in ServedModel(base, 1, max_length=24).groups] == [Sight()], name
    one, two = [24], [None, 24]
    assert windows == {
        "mistral": one, "gemma3": one, "llama": [None], "granite_swa": two, "gemma4": two, "gemma3n": two,
    }  # fmt: skip


def test_the_base_is_untouched_by_loading_and_serving_every_kind(lab: Lab) -> None:
    engine = lab.engine(slots=2)
    run(engine, ASKED)
    engine.check_base()
    assert not any(parameter.requires_grad for parameter in lab.base.parameters())
    assert not any(isinstance(module, nn.ModuleDict) for module in lab.base.modules())
