"""The one base: how much it takes, what is refused, and that nothing writes to it."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from bitsandbytes.functional import dequantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from onebase_engine.base.layers import empty_base
from onebase_engine.base.load import (
    BaseSettings,
    UnsupportedBaseError,
    base_bytes,
    base_tensors,
    check_servable,
    estimate_memory,
    fingerprint,
    import_bitsandbytes,
    load_base,
    parameter_count,
    quantize_nf4,
)

LLAMA_8B = tf.LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(
    ("quantization", "dtype", "gigabytes"),
    [("none", torch.float32, 32.1), ("int8", torch.bfloat16, 9.1), ("nf4", torch.bfloat16, 5.7)],
)
def test_llama_8b_is_estimated_without_its_weights(
    quantization: Any, dtype: torch.dtype, gigabytes: float
) -> None:
    estimate = estimate_memory(empty_base(LLAMA_8B), quantization, dtype=dtype)
    assert estimate.parameters == 8_030_261_248
    assert estimate.total == pytest.approx(gigabytes * 1e9, rel=0.02)


@pytest.mark.parametrize(
    ("quantization", "settings"),
    [
        ("nf4", {}),
        ("nf4", {"blocksize": 128}),
        ("nf4", {"double_quant": False}),
        ("nf4", {"blocksize": 128, "double_quant": False}),
        ("int8", {}),
        ("none", {}),
        ("none", {"dtype": torch.float32}),
    ],
)
def test_the_estimate_is_what_a_loaded_base_takes_to_the_byte(
    load: Any, quantization: Any, settings: dict[str, Any]
) -> None:
    model = load(quantization, **settings)
    estimate = estimate_memory(empty_base(model.config), quantization, **settings)
    assert (estimate.total, estimate.parameters) == (base_bytes(model), parameter_count(model))


def test_tied_embeddings_are_counted_once(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    config = tf.LlamaConfig(vocab_size=64, num_hidden_layers=1, tie_word_embeddings=True, **sizes)
    tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = load_base(BaseSettings(folder=tmp_path))
    estimate = estimate_memory(empty_base(model.config), "nf4")
    assert (estimate.total, estimate.parameters) == (base_bytes(model), parameter_count(model))


@pytest.fixture(scope="module")
def own_quantize() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """bitsandbytes' own kernel for the CPU, which it no longer calls in a process that works on a base."""
    import_bitsandbytes()
    import bitsandbytes._ops as registry
    import bitsandbytes.backends.default.ops as ops

    kernels: dict[str, Any] = {}
    spec = importlib.util.spec_from_file_location(f"{ops.__name__}_again", str(ops.__file__))
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{ops.__file__} cannot be loaded again")
    again = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "register_kernel", lambda name, _: lambda f: kernels.setdefault(name, f))
        spec.loader.exec_module(again)
    found: Callable[..., tuple[torch.Tensor, torch.Tensor]] = kernels["bitsandbytes::quantize_4bit"]
    return found


@settings(max_examples=60)
@given(
    count=st.integers(1, 300) | st.integers(131_000, 131_200) | st.integers(262_000, 530_000),
    blocksize=st.sampled_from([32, 64, 128, 4096]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    scale=st.sampled_from([1e-30, 0.02, 300.0]),
    seed=st.integers(0, 1000),
)
def test_weights_are_quantized_to_the_bits_that_bitsandbytes_gives(
    own_quantize: Any, count: int, blocksize: int, dtype: torch.dtype, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(count, generator=generator) * scale).to(dtype)
    weight[count // 3 : count // 2] = 0
    packed, absmax = own_quantize(weight, blocksize, "nf4", torch.uint8)
    ours, ours_absmax = quantize_nf4(weight, blocksize)
    assert torch.equal(ours, packed)
    assert torch.equal(ours_absmax, absmax)


def test_bitsandbytes_quantizes_by_that_kernel() -> None:
    import_bitsandbytes()
    weight = torch.randn(64, 64)
    from bitsandbytes.functional import quantize_4bit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bucketize", None)
        packed, _ = quantize_4bit(weight, quant_type="nf4")
    assert torch.equal(packed, quantize_nf4(weight, 64)[0])


@pytest.mark.parametrize("blocksize", [64, 128])
def test_all_linear_layers_but_the_head_are_quantized_at_the_blocksize(load: Any, blocksize: int) -> None:
    model = load("nf4", blocksize=blocksize)
    states = [m.weight.quant_state for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert len(states) == 14
    assert {(s.blocksize, s.nested, s.quant_type) for s in states} == {(blocksize, True, "nf4")}
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (tf.T5Config(), "encoder-decoder"),
        (tf.BartConfig(), "encoder-decoder"),
        (tf.DeepseekV32Config(), "indexed_attention, whose state OneBase does not know"),
        (tf.BertConfig(), "decoder-only"),
        (tf.CLIPConfig(), "no causal language model"),
        (tf.Gemma4UnifiedAssistantConfig(), "drafts for another model"),
        (tf.FalconConfig(), "brings its own attention"),
        (tf.BloomConfig(), "brings its own attention"),
        (tf.MptConfig(), "brings its own attention"),
        (tf.XGLMConfig(), "brings its own attention"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_base_that_cannot_be_paged_is_refused_in_a_sentence(config: Any, reason: str) -> None:
    with pytest.raises(UnsupportedBaseError, match=reason) as refused:
        check_servable(config)
    assert type(config).__name__ in str(refused.value)


@pytest.mark.parametrize(
    "config",
    [
        tf.LlamaConfig(),
        tf.MistralConfig(),
        tf.Qwen2Config(),
        tf.Qwen3Config(),
        tf.Gemma2Config(),
        tf.Gemma3TextConfig(),
        tf.Phi3Config(),
        tf.Gemma3nTextConfig(),
        tf.Gemma4TextConfig(num_kv_shared_layers=18),
        tf.GraniteSWAConfig(),
        tf.StableLmConfig(),
        tf.BioGptConfig(),
        tf.DeepseekV3Config(num_hidden_layers=2, first_k_dense_replace=2),
        tf.Llama4TextConfig(num_hidden_layers=4, moe_layers=[]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_decoders_with_attention_in_each_layer_are_taken(config: Any) -> None:
    check_servable(config)


SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_experts_that_are_computed_in_a_way_of_their_own_are_refused_before_weights_are_read(
    quantization: Any, tmp_path: Path
) -> None:
    tf.JetMoeConfig(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedBaseError, match=r"\d% of its weights.*\d x \d.*Choose a mixture"):
        load_base(BaseSettings(tmp_path, quantization=quantization))


@pytest.mark.parametrize(
    "config",
    [tf.Gemma3Config(), tf.GPT2Config(), tf.OPTConfig(), tf.GotOcr2Config()],
    ids=lambda value: type(value).__name__,
)
def test_convolutions_positions_and_transposed_layers_are_no_experts(config: Any) -> None:
    check_servable(config)


def test_a_base_that_stays_plain_is_not_passed_off_as_quantized(tmp_path: Path) -> None:
    config = tf.GPT2Config(vocab_size=64, n_positions=64, n_embd=64, n_layer=1, n_head=2)
    tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    load_base(BaseSettings(tmp_path))
    with pytest.raises(UnsupportedBaseError, match=r"blocksize 128 leaves .*Choose blocksize 64"):
        load_base(BaseSettings(tmp_path, blocksize=128))


def test_weights_that_the_cpu_kernel_would_read_wrongly_are_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {**SMALL, "hidden_size": 96, "intermediate_size": 192}
    tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedBaseError, match=r"q_proj has 96 inputs.*blocksize 64.*divides it \(32\)"):
        load_base(BaseSettings(tmp_path))
    name = "model.layers.0.mlp.up_proj"
    weight: Any = load_base(BaseSettings(tmp_path, blocksize=32)).get_submodule(name).weight
    exact = tf.LlamaForCausalLM.from_pretrained(tmp_path).get_submodule(name).weight
    error = dequantize_4bit(weight, weight.quant_state).float() - exact
    assert error.square().mean() < 0.02 * exact.square().mean()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedBaseError, match="holds no base"):
        load_base(BaseSettings(folder=tmp_path))
    (tmp_path / "config.json").write_text(tf.LlamaConfig(num_hidden_layers=1).to_json_string())
    with pytest.raises(UnsupportedBaseError, match="cannot load"):
        load_base(BaseSettings(folder=tmp_path))


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_forwards_change_neither_the_base_nor_its_answers(
    load: Any, quantization: Any, tokens: torch.Tensor
) -> None:
    model = load(quantization)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    before, values = fingerprint(model), {n: t.clone() for n, t in base_tensors(model).items()}
    with torch.inference_mode():
        first = model(tokens).logits
        for length in (1, 2, 8, 24, 1):
            model(tokens[:, :length])
        again = model(tokens).logits
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)
    assert fingerprint(model) == before
    after = base_tensors(model)
    assert all(torch.equal(value, after[name]) for name, value in values.items())


def test_a_write_to_any_tensor_shows_in_the_fingerprint(load: Any) -> None:
    model = load("nf4")
    for name, tensor in base_tensors(model).items():
        before = fingerprint(model)
        tensor.add_(0)
        assert fingerprint(model) != before, name


def test_an_8_bit_base_logs_nothing_in_a_forward(
    bases: dict[str, nn.Module], tokens: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="bitsandbytes"), torch.inference_mode():
        bases["int8"](tokens)
        logging.getLogger("bitsandbytes.autograd._functions").warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


@pytest.mark.parametrize("blocksize", [64, 128])
def test_no_4_bit_layer_may_repack_its_weight(load: Any, blocksize: int) -> None:
    flags = [
        module.support_avx512bf16_for_cpu
        for module in load("nf4", blocksize=blocksize).modules()
        if hasattr(module, "support_avx512bf16_for_cpu")
    ]
    assert flags == [False] * 14


def _stored(folder: Path, **how: Any) -> Path:
    """Save a small base whose weights are quantized by transformers; returns the folder."""
    plain = folder / "plain"
    tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)).to(torch.bfloat16).save_pretrained(plain)
    config = tf.BitsAndBytesConfig(**how)
    model = tf.AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "stored")
    return folder / "stored"


def test_files_in_int8_are_served_in_int8_exactly_and_never_as_nf4(tmp_path: Path) -> None:
    stored = _stored(tmp_path, load_in_8bit=True)
    for quantization in ("nf4", "none"):
        with pytest.raises(UnsupportedBaseError, match=r"to int8 already.*--quantization int8, or choose"):
            load_base(BaseSettings(stored, quantization=quantization))
    base = load_base(BaseSettings(stored, quantization="int8"))
    own = base_tensors(load_base(BaseSettings(tmp_path / "plain", quantization="int8")))
    found = base_tensors(base)
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name]) for name in own)
    # A threshold would choose columns by all rows of a batch.
    assert {layer.state.threshold for layer in base.modules() if hasattr(layer, "state")} == {0.0}


def test_files_in_nf4_are_served_in_nf4_and_computed_as_the_settings_say(tmp_path: Path) -> None:
    stored = _stored(tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float16")
    with pytest.raises(UnsupportedBaseError, match=r"to nf4 already.*--quantization nf4"):
        load_base(BaseSettings(stored, quantization="int8"))
    with pytest.raises(UnsupportedBaseError, match=r"blocks of 64.*--blocksize is 128"):
        load_base(BaseSettings(stored, blocksize=128))
    base = load_base(BaseSettings(stored))
    assert {layer.compute_dtype for layer in base.modules() if hasattr(layer, "compute_dtype")} == {
        torch.bfloat16
    }


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "fp4"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"bits": 2}, "a format without a name"),
    ],
)
def test_files_in_a_format_that_is_not_read_are_refused_by_its_name(
    stored: dict[str, Any], name: str, tmp_path: Path
) -> None:
    config = tf.LlamaConfig(**SMALL)
    config.quantization_config = stored
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedBaseError, match=rf"LlamaConfig hold weights in {name}.*plain weights"):
        load_base(BaseSettings(tmp_path))


def test_a_mixture_that_no_machine_holds_is_checked_without_its_memory() -> None:
    check_servable(tf.DeepseekV3Config(num_hidden_layers=4, n_routed_experts=1 << 20))
    with pytest.raises(UnsupportedBaseError, match=r"of its weights outside linear layers.*mixture"):
        check_servable(tf.JetMoeConfig(num_hidden_layers=4, num_local_experts=1 << 20))


def test_a_config_of_which_no_model_can_be_made_is_refused_by_its_type(tmp_path: Path) -> None:
    config = tf.LlamaConfig(**SMALL)
    config.hidden_act = "none of these"
    with pytest.raises(UnsupportedBaseError, match=r"LlamaConfig \(llama\) \(KeyError.*Choose a base whose"):
        check_servable(config)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    with pytest.raises(UnsupportedBaseError, match="no base that transformers knows"):
        load_base(BaseSettings(tmp_path))


@pytest.mark.parametrize("field", ["num_hidden_layers", "max_position_embeddings", "hidden_size", "head_dim"])
def test_a_size_below_zero_is_refused_by_the_name_of_its_field(field: str) -> None:
    config = tf.LlamaConfig(**SMALL)
    setattr(config, field, -1)
    with pytest.raises(UnsupportedBaseError, match=rf"LlamaConfig.{field} is -1, and no size"):
        check_servable(config)


def test_files_that_hold_other_tensors_than_the_config_says_are_refused_by_its_type(tmp_path: Path) -> None:
    tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    tf.LlamaConfig(**{**SMALL, "hidden_size": 128}).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedBaseError, match=r"cannot load .* \(LlamaConfig\)"):
        load_base(BaseSettings(tmp_path))


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_files_that_lack_a_tensor_are_refused_instead_of_served_with_random_numbers(
    quantization: Any, name: str, tmp_path: Path
) -> None:
    tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UnsupportedBaseError, match=rf"lack 1 of the tensors of LlamaForCausalLM, {name} among"
    ):
        load_base(BaseSettings(tmp_path, quantization=quantization))
