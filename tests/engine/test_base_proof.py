"""The bare base is proved at its first start: what does not answer as its own forward pass is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tests.device import DEVICE
from tests.tiny import save_base, save_model

from onebase_adapters.proof.texts import regrets, tie_of
from onebase_engine.base.load import BaseSettings, UnsupportedBaseError, load_base
from onebase_engine.engine import attention, base_proof
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.batch import Packer, StepBatch
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.model import ServedModel
from onebase_engine.engine.scheduler import SchedulerLimits

_BERT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "is_decoder": True,
    "pad_token_id": 1,
    "initializer_range": 0.15,
}

WRONG: dict[str, Callable[[], Any]] = {
    "roberta": lambda: tf.RobertaConfig(**_BERT),
    "roberta-prelayernorm": lambda: tf.RobertaPreLayerNormConfig(**_BERT),
    "xlm-roberta": lambda: tf.XLMRobertaConfig(**_BERT),
    "xlm-roberta-xl": lambda: tf.XLMRobertaXLConfig(**_BERT),
    "camembert": lambda: tf.CamembertConfig(**_BERT),
    "data2vec-text": lambda: tf.Data2VecTextConfig(**_BERT),
}
"""Types that load, and number positions from the padding token's id on."""


def save_doge(folder: Path) -> Path:
    """Save a model of the type that adds a learned bias to scores, as a mask; returns the folder."""
    sizes = {name: value for name, value in _BERT.items() if name != "is_decoder"}
    config = tf.DogeConfig(**sizes, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.A)  # zeros at first
    model.save_pretrained(folder)
    return folder


def engine_on(base: torch.nn.Module, **settings: Any) -> Engine:
    model = ServedModel(base, 1, **settings)
    limits = SchedulerLimits(max_sequences=4, step_tokens=256, max_length=256)
    return Engine(base, name="base", limits=limits, kv_blocks=40, slots=1, model=model)


def loaded(folder: Path, quantization: Any = "nf4") -> torch.nn.Module:
    dtype = torch.float32 if quantization == "none" else torch.bfloat16
    return load_base(BaseSettings(folder, quantization=quantization, dtype=dtype, device=DEVICE))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sound base with a window, capped scores and an embedding that is scaled."""
    return save_base("gemma2", tmp_path_factory.mktemp("proof") / "gemma")


@pytest.mark.parametrize("kind", WRONG)
def test_a_base_that_numbers_positions_in_its_own_way_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    base = loaded(save_model(WRONG[kind](), tmp_path / "base"))
    with pytest.raises(UnsupportedBaseError, match=rf"\({kind}\).* nats off those of its own forward pass"):
        base_proof.prove_base(engine_on(base), base)


def test_the_reference_of_an_adapters_proof_numbers_positions_itself(tmp_path: Path) -> None:
    base = loaded(save_model(WRONG["roberta"](), tmp_path / "base"), "none")
    prompt = [(7 * token + 3) % 320 for token in range(45)]
    engine = engine_on(base)
    sampling = protocol.Sampling(temperature=0.0, max_tokens=16, ignore_eos=True)
    engine.submit(protocol.Submit(id="text", prompt=prompt, sampling=sampling))
    served: list[int] = []
    while engine.busy:
        engine.step()
        served += [token for output in engine.take_outputs() for token in output.tokens]
    assert max(regrets(base, prompt, served)) > tie_of(torch.float32)


def test_a_base_that_gives_attention_a_mask_of_its_own_is_refused(tmp_path: Path) -> None:
    base = loaded(save_doge(tmp_path / "base"), "none")
    with pytest.raises(UnsupportedBaseError, match=r"DogeForCausalLM .* a mask of its own"):
        ServedModel(base, 1)


def test_a_forward_pass_that_ignores_which_logits_are_kept_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = loaded(save_base("llama", tmp_path / "base"))
    forward = tf.LlamaForCausalLM.forward

    def of_every_token(self: Any, *args: Any, logits_to_keep: object = 0, **more: Any) -> Any:
        return forward(self, *args, **more)

    monkeypatch.setattr(tf.LlamaForCausalLM, "forward", of_every_token)
    with pytest.raises(UnsupportedBaseError, match="does not know logits_to_keep"):
        ServedModel(base, 1)


def test_the_proof_alone_finds_logits_of_other_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = loaded(save_base("llama", tmp_path / "base"), "none")  # quantized, its forward pass is fused
    engine = engine_on(base)
    forward = tf.LlamaForCausalLM.forward

    def of_every_token(self: Any, *args: Any, logits_to_keep: object = 0, **more: Any) -> Any:
        return forward(self, *args, **more)

    monkeypatch.setattr(tf.LlamaForCausalLM, "forward", of_every_token)
    with pytest.raises(UnsupportedBaseError, match=r"\(llama\).* nats off"):
        base_proof.prove_base(engine, base)


def test_the_proof_alone_finds_a_mask_that_was_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = attention.paged_attention

    def without_mask(*states: Any, attention_mask: object, **options: Any) -> Any:
        return apply(*states, attention_mask=None, **options)

    monkeypatch.setattr(attention, "paged_attention", without_mask)
    base = loaded(save_doge(tmp_path / "base"), "none")
    with pytest.raises(UnsupportedBaseError, match=r"\(doge\).* nats off"):
        base_proof.prove_base(engine_on(base), base)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=["kv-as-the-base", "kv-int8"])
def test_a_sound_base_passes(gemma: Path, quantization: str, kv_dtype: torch.dtype | None) -> None:
    base = loaded(gemma, quantization)
    base_proof.prove_base(engine_on(base, kv_dtype=kv_dtype), base)


def test_a_sound_base_passes_where_rows_have_room_for_a_few_tokens_only(gemma: Path) -> None:
    base = loaded(gemma)
    engine = Engine(base, name="base", limits=SchedulerLimits(1, 4, 9, 0), kv_blocks=5, slots=1)
    base_proof.prove_base(engine, base)


def test_attention_that_forgets_the_window_is_refused(gemma: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = attention.PagedAttention.forward

    def everything(self: Any, module: Any, q: Any, k: Any, v: Any, options: dict[str, Any]) -> torch.Tensor:
        return forward(self, module, q, k, v, {**options, "sliding_window": None})

    monkeypatch.setattr(attention.PagedAttention, "forward", everything)
    base = loaded(gemma)
    with pytest.raises(UnsupportedBaseError, match=r"\(gemma2\)"):
        base_proof.prove_base(engine_on(base), base)


@pytest.mark.parametrize("window", [30, 70, 150])
def test_a_window_is_proved_that_is_longer_than_the_texts(
    window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tf.AutoConfig.from_pretrained(save_base("gemma2", tmp_path / "gemma"))
    config.sliding_window = window
    base = loaded(save_model(config, tmp_path / "base"))
    base_proof.prove_base(engine_on(base), base)
    forward = attention.PagedAttention.forward

    def everything(self: Any, module: Any, q: Any, k: Any, v: Any, options: dict[str, Any]) -> torch.Tensor:
        return forward(self, module, q, k, v, {**options, "sliding_window": None})

    monkeypatch.setattr(attention.PagedAttention, "forward", everything)
    with pytest.raises(UnsupportedBaseError, match=r"\(gemma2\)"):
        base_proof.prove_base(engine_on(base), base)


@pytest.mark.parametrize("chunk", [30, 150])
def test_chunks_are_proved_even_if_they_are_longer_than_the_texts(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tf.AutoConfig.from_pretrained(save_base("llama4", tmp_path / "llama4"))
    config.attention_chunk_size = chunk
    base = loaded(save_model(config, tmp_path / "base"))
    base_proof.prove_base(engine_on(base), base)
    monkeypatch.setattr(attention, "chunk_of", lambda module: None)
    with pytest.raises(UnsupportedBaseError, match=r"\(llama4_text\)"):
        base_proof.prove_base(engine_on(base), base)


def test_rows_that_a_module_counts_as_one_text_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = loaded(save_base("llama4", tmp_path / "base"))
    monkeypatch.setattr(attention.RowPositions, "attach", lambda self, model: None)
    with pytest.raises(UnsupportedBaseError, match=r"\(llama4_text\)"):
        base_proof.prove_base(engine_on(base), base)


@pytest.mark.parametrize("kind", ["gemma3n", "gemma4", "granite_swa", "youtu"])
def test_a_base_with_another_kind_of_attention_is_proved(kind: str, tmp_path: Path) -> None:
    base = loaded(save_base(kind, tmp_path / "base"))
    base_proof.prove_base(engine_on(base), base)


def test_attention_that_forgets_the_sinks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = attention.PagedAttention.forward

    def without(self: Any, module: Any, q: Any, k: Any, v: Any, options: dict[str, Any]) -> torch.Tensor:
        return forward(self, module, q, k, v, {**options, "s_aux": None})

    monkeypatch.setattr(attention.PagedAttention, "forward", without)
    base = loaded(save_base("granite_swa", tmp_path / "base"))
    with pytest.raises(UnsupportedBaseError, match=r"\(granite_swa\)"):
        base_proof.prove_base(engine_on(base), base)


def test_what_is_wrong_only_where_tokens_are_decoded_is_refused(
    gemma: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = attention.PagedAttention.forward

    def odd(self: Any, module: Any, q: Any, k: Any, v: Any, options: dict[str, Any]) -> torch.Tensor:
        decodes = q.shape[-2] <= 2
        return forward(self, module, q * (1.35 if decodes else 1.0), k, v, options)

    monkeypatch.setattr(attention.PagedAttention, "forward", odd)
    base = loaded(gemma)
    with pytest.raises(UnsupportedBaseError, match=r"worst: .* at token (7[2-9]|4[6-9]|5[0-3]) of"):
        base_proof.prove_base(engine_on(base), base)


def test_texts_that_see_each_other_in_a_batch_are_refused(
    gemma: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = Packer.pack

    def mixed(self: Packer, *given: Any) -> StepBatch:
        batch = pack(self, *given)
        batch.contexts.tables[:] = batch.contexts.tables[:, :1]
        return batch

    monkeypatch.setattr(Packer, "pack", mixed)
    base = loaded(gemma)
    with pytest.raises(UnsupportedBaseError, match=r"worst: .* in text 2"):
        base_proof.prove_base(engine_on(base), base)


def test_a_base_is_proved_at_its_first_start_and_again_only_with_other_settings(
    gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEBASE_CACHE", str(tmp_path))
    settings = BaseSettings(gemma, device=DEVICE)
    base = load_base(settings)
    engine = engine_on(base)

    def read() -> int:
        before = engine.counters.prompt_tokens
        base_proof.prove_once(engine, base, settings, "nf4")
        return engine.counters.prompt_tokens - before

    assert read() == sum(base_proof.LENGTHS)
    assert read() == 0
    base_proof.prove_once(engine, base, settings, "bf16")
    assert engine.counters.prompt_tokens == 2 * sum(base_proof.LENGTHS)
    weights = gemma / "model.safetensors"
    weights.touch()
    assert read() == sum(base_proof.LENGTHS)


def test_a_base_that_failed_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEBASE_CACHE", str(tmp_path / "cache"))
    settings = BaseSettings(save_model(WRONG["roberta"](), tmp_path / "base"), device=DEVICE)
    base = load_base(settings)
    engine = engine_on(base)
    for _ in range(2):
        with pytest.raises(UnsupportedBaseError, match="roberta"):
            base_proof.prove_once(engine, base, settings, "nf4")
