"""Exports of an adapter next to PEFT's own merge, read back by transformers' and gguf's own readers."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.matrix import matrix
from tests.tiny import ADAPTERS, ARCHITECTURES, ATTENTION, INVOCATION, save_adapter, save_base
from tests.training.runs import talking_base
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

from onebase_adapters.export import comparison, gguf_lora, gguf_model, merged
from onebase_adapters.export.base_files import ExportError
from onebase_adapters.export.comparison import compare
from onebase_adapters.export.gguf_vocabulary import read_vocabulary
from onebase_engine.base.default_base import fetch_default_base
from onebase_engine.base.load import BaseSettings, load_base, rounded

ROWS = torch.arange(5, 45)[None]
TIED = ("lm_head", "embed_tokens")
BIASES = next(settings for settings in ADAPTERS if settings.get("lora_bias"))
MERGEABLE = [
    settings for settings in ADAPTERS if settings is not BIASES and "alora_invocation_tokens" not in settings
]


def half(folder: Path) -> Any:
    """A model in 16 bit."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ROWS).logits.float()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Bases in 16 bit, as they are published, by architecture."""

    @functools.cache
    def make(architecture: str) -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        half(save_base(architecture, folder / "fp32")).save_pretrained(folder / "base")
        return folder / "base"

    return make


@pytest.fixture(params=["llama", "qwen2", pytest.param("qwen3", marks=pytest.mark.full)])
def base(request: pytest.FixtureRequest, bases: Callable[[str], Path]) -> Path:
    return bases(request.param)


def adapter_of(base: Path, settings: dict[str, Any], folder: Path) -> Path:
    return save_adapter(half(base), settings, folder, seed=3)


def exported(export: Callable[..., Any], adapter: Path, target: Path, base: Path | str) -> Path:
    export(adapter, target, base=str(base), options={"name": "mine"}, progress=lambda stage, share: None)
    return target


def refused(export: Callable[..., Any], adapter: Path, target: Path, base: Path) -> str:
    with pytest.raises(ExportError) as error:
        exported(export, adapter, target, base)
    assert not target.exists()
    return str(error.value)


# ---- merged ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "kind"), matrix(["llama", "qwen2", "qwen3"], range(len(MERGEABLE)), usual=["llama"])
)
def test_a_merged_model_is_what_peft_computes_on_the_base_in_16_bit(
    bases: Callable[[str], Path], architecture: str, kind: int, tmp_path: Path
) -> None:
    base, settings = bases(architecture), MERGEABLE[kind]
    adapter = adapter_of(base, settings, tmp_path / "adapter")
    want_logits = logits(PeftModel.from_pretrained(half(base).float(), adapter))

    found = half(exported(merged.export, adapter, tmp_path / "merged", base))

    peft = PeftModel.from_pretrained(half(base), adapter)
    have = dict(found.named_parameters(remove_duplicate=False))
    if not any(name in settings["target_modules"] for name in TIED):
        # PEFT's merge changes both sides of a tied pair, and rounds an embedding's delta first.
        want = dict(peft.merge_and_unload().named_parameters(remove_duplicate=False))
        assert want.keys() == have.keys()
        assert [name for name in want if not torch.equal(want[name], have[name])] == []
    # No more than rounding the merged weights explains.
    assert (logits(found.float()) - want_logits).abs().max() < 0.03 * want_logits.abs().max()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_served_weights_are_those_that_a_server_computes_with(
    bases: Callable[[str], Path], quantization: Any, tmp_path: Path
) -> None:
    base = bases("llama")
    adapter = adapter_of(
        base, {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}, tmp_path / "a"
    )
    merged.export(
        adapter,
        tmp_path / "merged",
        base=str(base),
        options={"name": "mine", "quantization": quantization},
        progress=lambda stage, share: None,
    )
    found = load_file(tmp_path / "merged" / "model.safetensors")
    served = load_base(BaseSettings(folder=base, quantization=quantization))
    original, compared = load_file(base / "model.safetensors"), 0
    for name, module in served.named_modules():
        weight = f"{name}.weight"
        if not isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            continue
        if quantization == "nf4":
            wanted = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        else:
            state = module.state
            wanted = bnb.functional.int8_vectorwise_dequant(state.CB, state.SCB).to(torch.bfloat16)
        assert torch.equal(found[weight], original[weight]) is False
        if "q_proj" in name:
            assert not torch.equal(found[weight], wanted)  # the adapter is in it
            continue
        assert torch.equal(found[weight], wanted), name
        compared += 1
    assert compared > 4
    assert torch.equal(found["model.embed_tokens.weight"], original["model.embed_tokens.weight"])


def test_a_large_weight_is_rounded_in_inference_mode_as_out_of_it() -> None:
    settings = BaseSettings(folder=Path())
    weight = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        inside = rounded(weight.clone(), settings)
    assert torch.equal(inside.clone(), rounded(weight, settings))


def test_one_side_of_a_tied_pair_is_merged_alone(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("llama")
    adapter = adapter_of(base, {"r": 4, "target_modules": ["lm_head"]}, tmp_path / "adapter")

    found = load_file(exported(merged.export, adapter, tmp_path / "merged", base) / "model.safetensors")

    before = load_file(base / "model.safetensors")
    assert "lm_head.weight" not in before
    assert torch.equal(found["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(found["lm_head.weight"], before["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_base_in_shards_becomes_shards_of_the_same_names(base: Path, tmp_path: Path) -> None:
    half(base).save_pretrained(tmp_path / "base", max_shard_size="100KB")
    adapter = adapter_of(base, ADAPTERS[2], tmp_path / "adapter")

    found = exported(merged.export, adapter, tmp_path / "merged", tmp_path / "base")

    shards = sorted(file.name for file in (tmp_path / "base").glob("*.safetensors"))
    assert len(shards) > 3
    assert sorted(file.name for file in found.glob("*.safetensors")) == shards
    whole = half(exported(merged.export, adapter, tmp_path / "whole", base))
    assert torch.equal(logits(half(found)), logits(whole))


def test_what_no_merged_model_can_hold_is_refused(base: Path, tmp_path: Path) -> None:
    biased = adapter_of(base, BIASES, tmp_path / "biased")
    message = refused(merged.export, biased, tmp_path / "merged", base)
    assert message.startswith("lora_bias: the adapter adds a bias to model.layers.0.")
    assert message.endswith("export it as peft")


def test_a_base_that_is_stored_quantized_or_is_another_one_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, ADAPTERS[0], tmp_path / "adapter")
    rounded = shutil.copytree(base, tmp_path / "rounded")
    config = json.loads((rounded / "config.json").read_text())
    (rounded / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    assert "is stored quantized" in refused(merged.export, adapter, tmp_path / "merged", rounded)
    other = talking_base(tmp_path / "other")
    assert "does not fit the base other" in refused(merged.export, adapter, tmp_path / "merged", other)
    assert "is neither a folder" in refused(merged.export, adapter, tmp_path / "merged", tmp_path / "nothing")


def test_a_model_agrees_with_its_own_answers_and_less_with_those_of_another(tmp_path: Path) -> None:
    folder = talking_base(tmp_path / "base")
    model = half(folder)
    half(folder).save_pretrained(folder)
    prompt = [1, 50, 60, 70]
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0]
    with torch.inference_mode():
        said = model(tokens[None]).logits[0, 3:-1].float().log_softmax(-1)
    logprobs = said.gather(-1, tokens[4:, None])[:, 0].tolist()
    stages: list[str] = []

    def ask(answer: list[int]) -> dict[str, float]:
        return compare(
            folder, [(answer, 4, logprobs)], stage="here", progress=lambda stage, share: stages.append(stage)
        )

    own, other = ask(tokens.tolist()), ask([*prompt, *range(100, 112)])
    assert (own["tokens"], own["agreeing"]) == (12, 12)
    assert (own["replies"], own["whole"], other["replies"], other["whole"]) == (1, 1, 1, 0)
    assert own["largest"] < 1e-5
    assert other["agreeing"] < 6
    assert other["largest"] > 0.01
    assert stages == ["here"] * 4


def test_a_model_that_memory_has_no_room_for_is_not_read(
    bases: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "free_memory", lambda device: 1 << 10)
    with pytest.raises(ExportError, match="GB of memory, and 0"):
        compare(bases("llama"), [([1, 2], 1, [0.0])], stage="here", progress=lambda stage, share: None)


# ---- a LoRA in GGUF ----------------------------------------------------------------------------


def original_rows(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """A weight of llama.cpp's with its rows where transformers has them: written by the formula of the
    rotary embedding alone. llama.cpp turns neighbours 2i and 2i + 1, transformers i and i + half."""
    if config.model_type != "llama" or ("attn_q" not in name and "attn_k" not in name):
        return tensor
    heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
    size = tensor.shape[0] // heads
    order = [
        head * size + 2 * (place % (size // 2)) + place // (size // 2)
        for head in range(heads)
        for place in range(size)
    ]
    return tensor[order]


@pytest.mark.parametrize(
    "settings",
    [
        ADAPTERS[2],
        next(settings for settings in ADAPTERS if settings.get("use_rslora")),
        next(settings for settings in ADAPTERS if settings.get("rank_pattern")),
        {"r": 4, "lora_alpha": 0, "alpha_pattern": {"q_proj": -8}, "target_modules": ["q_proj", "v_proj"]},
    ],
    ids=["plain", "rslora", "ranks and alphas of their own", "an alpha of 0"],
)
def test_a_lora_in_gguf_adds_what_peft_adds(base: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    adapter = adapter_of(base, settings, tmp_path / "adapter")
    file = gguf.GGUFReader(exported(gguf_lora.export, adapter, tmp_path / "lora.gguf", base))

    fields = {name: field.contents() for name, field in file.fields.items()}
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in file.tensors}
    peft = PeftModel.from_pretrained(half(base), adapter).get_base_model()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)  # the same for all three
    seen = set()
    for name, module in peft.named_modules():
        if not hasattr(module, "lora_A") or "default" not in module.lora_A:
            continue
        own = names.get_name(name)
        a, b = tensors[f"{own}.weight.lora_a"], tensors[f"{own}.weight.lora_b"]
        scale = fields["adapter.lora.alpha"] / b.shape[1]  # as llama.cpp has it
        have = original_rows(own, b @ a * scale, peft.config)
        want = module.get_delta_weight("default").float()
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)
        seen |= {f"{own}.weight.lora_a", f"{own}.weight.lora_b"}
    assert seen == tensors.keys()
    assert (fields["general.type"], fields["adapter.type"], fields["general.name"]) == (
        "adapter",
        "lora",
        "mine",
    )
    assert fields["general.architecture"] == peft.config.model_type


def test_an_activated_lora_keeps_its_invocation_in_gguf_and_is_merged_into_nothing(
    base: Path, tmp_path: Path
) -> None:
    settings = {"r": 4, "target_modules": ATTENTION, "alora_invocation_tokens": INVOCATION}
    adapter = adapter_of(base, settings, tmp_path / "adapter")
    file = gguf.GGUFReader(exported(gguf_lora.export, adapter, tmp_path / "lora.gguf", base))
    field = file.fields["adapter.alora.invocation_tokens"]
    assert field.contents() == INVOCATION
    unsigned = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]
    assert field.types == unsigned, "llama.cpp refuses any other type of these tokens"
    for export in (merged.export, gguf_model.export):
        assert "alora_invocation_tokens" in refused(export, adapter, tmp_path / "whole", base)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"r": 4, "target_modules": ATTENTION, "use_dora": True}, "DoRA scales whole weights"),
        ({"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save replaces"),
        (
            {"r": 4, "target_modules": ["v_proj"], "trainable_token_indices": [3, 9]},
            "trainable_token_indices",
        ),
        (BIASES, "has no bias (lora_bias): export it as peft"),
    ],
    ids=["dora", "saved", "tokens", "bias"],
)
def test_what_a_lora_in_gguf_cannot_say_is_refused_with_what_can(
    base: Path, settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    adapter = adapter_of(base, settings, tmp_path / "adapter")
    message = refused(gguf_lora.export, adapter, tmp_path / "lora.gguf", base)
    assert reason in message
    assert "export it as" in message


@pytest.mark.parametrize("target", TIED)
def test_an_embedding_or_head_that_is_tied_is_no_lora_in_gguf(
    target: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases("qwen3")
    adapter = adapter_of(base, {"r": 4, "target_modules": [target]}, tmp_path / "adapter")
    message = refused(gguf_lora.export, adapter, tmp_path / "lora.gguf", base)
    assert "are one tensor in GGUF" in message


def test_an_embedding_that_is_not_tied_lies_in_gguf_the_other_way_round(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases("qwen2")
    adapter = adapter_of(base, {"r": 4, "target_modules": [*TIED]}, tmp_path / "adapter")
    file = gguf.GGUFReader(exported(gguf_lora.export, adapter, tmp_path / "lora.gguf", base))
    shapes = {tensor.name: tuple(tensor.data.shape) for tensor in file.tensors}
    assert shapes == {
        "token_embd.weight.lora_a": (320, 4),
        "token_embd.weight.lora_b": (128, 4),
        "output.weight.lora_a": (4, 128),
        "output.weight.lora_b": (320, 4),
    }


@pytest.mark.parametrize("export", [gguf_lora.export, gguf_model.export], ids=["lora", "model"])
def test_an_architecture_that_is_not_known_is_refused_by_name(
    export: Callable[..., Any], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases("gemma3")
    adapter = adapter_of(base, ADAPTERS[0], tmp_path / "adapter")
    message = refused(export, adapter, tmp_path / "out.gguf", base)
    assert message.startswith("Gemma3ForCausalLM is not among")


# ---- a whole model in GGUF ---------------------------------------------------------------------


FIRST_TOKENS = 600


def with_tokenizer(base: Path, folder: Path, **config: Any) -> Path:
    """The base with the first tokens of the default base's tokenizer, and room for them."""
    default = fetch_default_base()
    made = ARCHITECTURES["llama" if "llama" in str(base) else "qwen2" if "qwen2" in str(base) else "qwen3"]()
    made.vocab_size, made.initializer_range = FIRST_TOKENS + 3, 0.15
    for name, value in config.items():
        setattr(made, name, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(default / name, folder / name)
    tokenizer = json.loads((default / "tokenizer.json").read_text())
    model = tokenizer["model"]
    model["vocab"] = {text: number for text, number in model["vocab"].items() if number < FIRST_TOKENS}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize("settings", [ADAPTERS[2], ADAPTERS[8], ADAPTERS[4]], ids=["lora", "dora", "head"])
def test_transformers_reads_from_gguf_the_model_that_is_merged(
    base: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = with_tokenizer(base, tmp_path / "base")
    adapter = adapter_of(whole, settings, tmp_path / "adapter")
    exported(gguf_model.export, adapter, tmp_path / "model.gguf", whole)

    # Of Qwen 3, transformers reads no size of the heads from GGUF.
    known = {"config": AutoConfig.from_pretrained(whole)} if "qwen3" in str(base) else {}
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="model.gguf",
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        **known,
    )

    want = half(exported(merged.export, adapter, tmp_path / "merged", whole)).float()
    wanted, have = (dict(model.named_parameters(remove_duplicate=False)) for model in (want, read))
    assert [name for name in wanted if not torch.equal(wanted[name], have[name])] == []
    torch.testing.assert_close(logits(read), logits(want), rtol=1e-4, atol=1e-4)


def test_a_model_in_gguf_has_the_tokens_and_the_chat_template_of_its_base(tmp_path: Path) -> None:
    base = talking_base(tmp_path / "base")
    half(base).save_pretrained(base)
    adapter = adapter_of(base, ADAPTERS[0], tmp_path / "adapter")
    file = gguf.GGUFReader(exported(gguf_model.export, adapter, tmp_path / "model.gguf", base))
    fields = {name: field.contents() for name, field in file.fields.items()}

    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocabulary = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    assert fields["tokenizer.ggml.tokens"] == [vocabulary[number] for number in range(49152)]
    assert fields["tokenizer.ggml.token_type"][:17] == [3] * 17
    assert set(fields["tokenizer.ggml.token_type"][17:]) == {1}
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == (base / "chat_template.jinja").read_text()
    assert (fields["llama.block_count"], fields["llama.context_length"], fields["llama.vocab_size"]) == (
        2,
        512,
        49152,
    )


def test_llama_3s_frequencies_are_those_of_transformers(tmp_path: Path) -> None:
    rotary = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    base = with_tokenizer(Path("llama"), tmp_path / "base", rope_parameters=rotary)
    adapter = adapter_of(base, ADAPTERS[0], tmp_path / "adapter")
    file = gguf.GGUFReader(exported(gguf_model.export, adapter, tmp_path / "model.gguf", base))

    (factors,) = (one.data for one in file.tensors if one.name == "rope_freqs.weight")
    plain = 1.0 / 10000.0 ** (np.arange(0, 32, 2) / 32)
    own = half(base).model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(plain / factors, own, rtol=1e-5)
    assert len(set(factors.tolist())) > 3


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: gelu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type: dynamic",
        ),
    ],
    ids=["activation", "rotary"],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    base = with_tokenizer(Path("llama"), tmp_path / "base", **settings)
    adapter = adapter_of(base, ADAPTERS[0], tmp_path / "adapter")
    assert refused(gguf_model.export, adapter, tmp_path / "model.gguf", base).startswith(reason)


def test_a_window_that_llama_cpp_does_not_know_is_refused(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases("mistral")
    adapter = adapter_of(base, ADAPTERS[0], tmp_path / "adapter")
    message = refused(gguf_model.export, adapter, tmp_path / "model.gguf", base)
    assert message.startswith("sliding_window: ")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": {"byte_fallback": True}}, "no byte-level BPE"),
        ({"model": {"ignore_merges": True}}, "splits texts in a way that is not known"),
        ({"normalizer": {"type": "Lowercase"}}, "changes texts by Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits texts in a way that is not known"),
    ],
    ids=str,
)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(fetch_default_base() / name, tmp_path / name)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    whole["model"] |= change.get("model", {})
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(whole | {k: v for k, v in change.items() if k != "model"})
    )
    with pytest.raises(ExportError, match=reason):
        read_vocabulary(tmp_path, 49152)


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
SHARED = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
FIRST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"


@pytest.mark.parametrize(
    ("steps", "whole_words", "name"),
    [
        ([{"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True}], False, "smollm"),
        ([{**SPLIT, "pattern": {"Regex": FIRST + SHARED}}, BYTES], False, "qwen2"),
        ([{**SPLIT, "pattern": {"Regex": FIRST + "{1,3}" + SHARED}}, BYTES], True, "llama-bpe"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rules_to_split_texts_have_llama_cpps_names(
    steps: list[dict[str, Any]], whole_words: bool, name: str, tmp_path: Path
) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(fetch_default_base() / file, tmp_path / file)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    whole["model"]["ignore_merges"] = whole_words
    whole["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    assert read_vocabulary(tmp_path, 49152).rule == name


def test_an_adapter_that_is_cut_short_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, ADAPTERS[0], tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.popitem()
    save_file(tensors, file)
    assert "does not fit the base" in refused(merged.export, adapter, tmp_path / "merged", base)
