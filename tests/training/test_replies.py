"""Replies generated in the middle of a run: right, the same in any batch, and leaving no trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import randomize, save_base
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

from onebase_adapters.base import BaseSettings, fingerprint, load_base
from onebase_adapters.training.replies import generate_replies, stop_ids
from onebase_adapters.view import peft_view

LENGTHS = [1, 30, 7, 3, 18, 30, 12, 5, 41]
LoadBase = Callable[..., nn.Module]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> LoadBase:
    """`load(architecture, quantization)`: each base is loaded once."""
    loaded: dict[tuple[str, str], nn.Module] = {}

    def _load(architecture: str = "llama", quantization: Any = "nf4") -> nn.Module:
        key = (architecture, quantization)
        if key not in loaded:
            folder = save_base(architecture, tmp_path_factory.mktemp(architecture))
            dtype = torch.float32 if quantization == "none" else torch.bfloat16
            loaded[key] = load_base(BaseSettings(folder=folder, quantization=quantization, dtype=dtype))
        return loaded[key]

    return _load


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = WordLevel({f"w{i}": i for i in range(320)} | {"unknown": 320}, unk_token="unknown")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w2", unk_token="unknown")


def adapted(base: nn.Module, seed: int = 1, **settings: Any) -> nn.Module:
    """PEFT's model of a random adapter on a view of the base."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["o_proj", "down_proj"], **settings)
    model: nn.Module = get_peft_model(peft_view(base), config)
    randomize(model, 0.1)
    return model


def prompts(lengths: list[int], seed: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (length,), generator=generator).tolist() for length in lengths]


def ids_of(reply: str) -> list[int]:
    return [int(word[1:]) for word in reply.split()]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3"])
def test_replies_are_those_of_transformers_own_generation(
    load: LoadBase, tokenizer: PreTrainedTokenizerFast, architecture: str
) -> None:
    model: Any = adapted(load(architecture, "none")).eval()
    asked = prompts(LENGTHS)
    replies = generate_replies(model, tokenizer, asked, 24)
    greedy = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=2, pad_token_id=0)
    for prompt, reply in zip(asked, replies, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy
        )
        generated = expected[0, len(prompt) :].tolist()
        assert ids_of(reply) == (generated[:-1] if generated[-1] == 2 else generated)
    assert len(set(replies)) == len(replies), "the model only repeats itself: nothing was tested"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_reply_does_not_depend_on_the_prompts_beside_it(
    load: LoadBase, tokenizer: PreTrainedTokenizerFast, quantization: str, threads: int
) -> None:
    model = adapted(load("llama", quantization))
    asked = prompts(LENGTHS)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = generate_replies(model, tokenizer, asked, 40)
        alone = [generate_replies(model, tokenizer, [prompt], 40)[0] for prompt in asked]
        in_parts = generate_replies(model, tokenizer, asked[::-1], 40, batch_tokens=150)
    finally:
        torch.set_num_threads(before)
    assert together == alone == in_parts[::-1]
    assert len({len(ids_of(reply)) for reply in together}) > 1 or len(set(together)) == len(together)


def test_a_reply_ends_before_any_of_the_ends_of_turn(
    load: LoadBase, tokenizer: PreTrainedTokenizerFast
) -> None:
    model: Any = adapted(load())
    whole = [ids_of(reply) for reply in generate_replies(model, tokenizer, prompts(LENGTHS), 20)]
    plain = model.get_base_model()
    plain.generation_config.eos_token_id = [2, whole[0][3]]
    assert stop_ids(model, tokenizer) == {2, whole[0][3]}
    cut = [ids_of(reply) for reply in generate_replies(model, tokenizer, prompts(LENGTHS), 20)]
    assert cut == [ids[: ids.index(whole[0][3])] if whole[0][3] in ids else ids for ids in whole]
    assert len(cut[0]) <= 3


def test_nothing_is_left_changed(load: LoadBase, tokenizer: PreTrainedTokenizerFast) -> None:
    base = load()
    before = fingerprint(base)
    model: Any = adapted(base).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    frozen = model.get_base_model().model.layers[0].mlp
    frozen.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    settings = model.config.to_dict(), model.get_base_model().generation_config.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replies = generate_replies(model, tokenizer, prompts([4, 9]), 5)
    assert all(ids_of(reply) for reply in replies)
    assert fingerprint(base) == before
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert (model.config.to_dict(), model.get_base_model().generation_config.to_dict()) == settings
    assert model.config._attn_implementation == "eager"
    assert model.get_base_model().is_gradient_checkpointing
    loss = model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_dropout_does_not_act_though_the_model_trains(
    load: LoadBase, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = adapted(load(), lora_dropout=0.5).train()
    asked = prompts([6, 6])
    assert generate_replies(model, tokenizer, asked, 8) == generate_replies(model, tokenizer, asked, 8)


def test_the_gate_is_passed_for_every_token_and_may_end_it_all(
    load: LoadBase, tokenizer: PreTrainedTokenizerFast
) -> None:
    class ToldError(Exception):
        pass

    passed, parts = [], []
    model: Any = adapted(load()).train()
    generate_replies(
        model, tokenizer, prompts([5]), 6, wait=lambda: passed.append(1), on_progress=parts.append
    )
    assert len(passed) >= 6
    assert parts == sorted(parts)
    assert parts[-1] == 1.0

    def stop() -> None:
        raise ToldError

    with pytest.raises(ToldError):
        generate_replies(model, tokenizer, prompts([5]), 6, wait=stop)
    assert model.training
    assert model.config._attn_implementation == "eager"


def test_the_context_of_the_base_is_not_exceeded(load: LoadBase, tokenizer: PreTrainedTokenizerFast) -> None:
    replies = generate_replies(adapted(load()), tokenizer, prompts([512, 509, 0, 600]), 9)
    assert [len(ids_of(reply)) for reply in replies] == [0, 3, 0, 0]


def test_the_replies_of_the_real_base_make_sense() -> None:
    from transformers import AutoTokenizer

    from onebase_adapters.default_base import DEFAULT_BASE, resolve_base

    folder: Path = resolve_base(DEFAULT_BASE).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = ["What is the capital of France?", "Reply with one word: what colour is the sky?"]
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]
    model = peft_view(load_base(BaseSettings(folder=folder)))
    replies = generate_replies(model, tokenizer, asked, 24)
    assert replies[0].startswith("The capital of France is Paris")
    assert "<|im_end|>" not in replies[1]
