"""Replies generated in the middle of a run: right, the same in any batch, and leaving no trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from tests.engine.harness import Request, run
from tests.tiny import ARCHITECTURES, load_folder, randomize, save_base
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

from onebase_adapters.proof.extract import extract
from onebase_engine.base.load import BaseSettings, UnsupportedBaseError, fingerprint, load_base
from onebase_engine.base.view import peft_view
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_engine.kernels.weights import AdapterWeights
from onebase_training.checkpoint import write_adapter
from onebase_training.replies import generate_replies, stop_ids

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


def weights(model: nn.Module) -> AdapterWeights:
    return extract(model, "default")


def prompts(lengths: list[int], seed: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (length,), generator=generator).tolist() for length in lengths]


def ids_of(reply: str) -> list[int]:
    return [int(word[1:]) for word in reply.split()]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3"])
def test_replies_are_those_of_transformers_own_generation(
    load: LoadBase, tokenizer: PreTrainedTokenizerFast, architecture: str
) -> None:
    base = load(architecture, "none")
    model: Any = adapted(base).eval()
    asked = prompts(LENGTHS)
    replies = generate_replies(base, weights(model), tokenizer, asked, 24)
    greedy = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=2, pad_token_id=0)
    for prompt, reply in zip(asked, replies, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy
        )
        generated = expected[0, len(prompt) :].tolist()
        assert ids_of(reply) == (generated[:-1] if generated[-1] == 2 else generated)
    assert len(set(replies)) == len(replies), "the model only repeats itself: nothing was tested"


@pytest.mark.parametrize(
    ("quantization", "threads"),
    [
        ("nf4", 2),
        *(pytest.param(*one, marks=pytest.mark.full) for one in (("nf4", 1), ("int8", 1), ("int8", 2))),
    ],
)
def test_a_reply_does_not_depend_on_the_prompts_beside_it(
    load: LoadBase, tokenizer: PreTrainedTokenizerFast, quantization: str, threads: int
) -> None:
    base = load("llama", quantization)
    adapter = weights(adapted(base))
    asked = prompts(LENGTHS)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = generate_replies(base, adapter, tokenizer, asked, 40)
        alone = [generate_replies(base, adapter, tokenizer, [prompt], 40)[0] for prompt in asked]
        in_parts = generate_replies(base, adapter, tokenizer, asked[::-1], 40, batch_tokens=150)
    finally:
        torch.set_num_threads(before)
    assert together == alone == in_parts[::-1]
    assert len({len(ids_of(reply)) for reply in together}) > 1 or len(set(together)) == len(together)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_replies_are_those_that_the_written_adapter_gives_in_serving_token_by_token(
    load: LoadBase, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, use_dora: bool
) -> None:
    base = load()
    model: Any = adapted(base, use_dora=use_dora).train()
    asked = prompts(LENGTHS)
    replies = generate_replies(base, weights(model), tokenizer, asked, 24)
    bare = generate_replies(base, None, tokenizer, asked, 24)
    write_adapter(model, tmp_path / "adapter", base="b", commit=None, card=str)
    # Prefilled in other chunks, among rows of another version and of the base.
    engine = Engine(
        base, name="tiny", limits=SchedulerLimits(12, 48, 512), kv_blocks=60, eos_ids=frozenset({2})
    )
    engine.put_adapter("digest0", load_folder(base, tmp_path / "adapter").weights)
    engine.put_adapter("digest1", weights(adapted(base, seed=9)))
    requests = [
        Request(prompt, adapter, 24, at=number, ignore_eos=False)
        for number, prompt in enumerate(asked)
        for adapter in (0, None, 1)
    ]
    served = [[token for token in tokens if token != 2] for tokens in run(engine, requests)]
    assert [ids_of(reply) for reply in replies] == served[::3]
    assert [ids_of(reply) for reply in bare] == served[1::3]
    assert replies != bare


def test_a_reply_ends_before_any_of_the_ends_of_turn(
    load: LoadBase, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    base: Any = load()
    adapter = weights(adapted(base))
    whole = [ids_of(reply) for reply in generate_replies(base, adapter, tokenizer, prompts(LENGTHS), 20)]
    monkeypatch.setattr(base.generation_config, "eos_token_id", [whole[0][3]])
    monkeypatch.setattr(base.config, "eos_token_id", None)
    assert stop_ids(base, tokenizer) == {2, whole[0][3]}
    cut = [ids_of(reply) for reply in generate_replies(base, adapter, tokenizer, prompts(LENGTHS), 20)]
    assert cut == [ids[: ids.index(whole[0][3])] if whole[0][3] in ids else ids for ids in whole]
    assert len(cut[0]) <= 3


def test_nothing_is_left_changed(load: LoadBase, tokenizer: PreTrainedTokenizerFast) -> None:
    base = load()
    before = fingerprint(base)
    model: Any = adapted(base).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" in name}
    modes = {name: module.training for name, module in model.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replies = generate_replies(base, weights(model), tokenizer, prompts([4, 9]), 5)
    assert all(ids_of(reply) for reply in replies)
    assert fingerprint(base) == before
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    loss = model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_dropout_does_not_act_though_the_model_trains(
    load: LoadBase, tokenizer: PreTrainedTokenizerFast
) -> None:
    base = load()
    adapter = weights(adapted(base, lora_dropout=0.5).train())
    plain = weights(adapted(base))
    asked = prompts([6, 6])
    replies = generate_replies(base, adapter, tokenizer, asked, 8)
    assert replies == generate_replies(base, plain, tokenizer, asked, 8)


def test_the_gate_is_passed_between_layers_and_may_end_it_all(
    load: LoadBase, tokenizer: PreTrainedTokenizerFast
) -> None:
    class ToldError(Exception):
        pass

    passed: list[int] = []
    parts: list[float] = []
    base = load()
    adapter = weights(adapted(base))

    def reply(wait: Callable[[], None]) -> list[str]:
        return generate_replies(
            base, adapter, tokenizer, prompts([5, 0, 3]), 60, wait=wait, on_progress=parts.append
        )

    replies = reply(lambda: passed.append(1))
    longest = max(len(ids_of(text)) for text in replies)
    assert len(passed) >= 2 * longest, "the base has two layers"
    assert parts == sorted(parts)
    assert parts[-1] == 1.0

    def stop() -> None:
        passed.append(1)
        if len(passed) % 3 == 0:
            raise ToldError

    with pytest.raises(ToldError):
        reply(stop)
    assert reply(lambda: None) == replies


def test_the_context_of_the_base_is_not_exceeded(load: LoadBase, tokenizer: PreTrainedTokenizerFast) -> None:
    base = load()
    adapter = weights(adapted(base))
    replies = generate_replies(base, adapter, tokenizer, prompts([512, 509, 0, 600]), 9)
    assert [len(ids_of(reply)) for reply in replies] == [0, 3, 0, 0]


def test_a_base_that_trains_but_cannot_be_served_gives_no_replies_and_says_what_to_leave_out(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(ARCHITECTURES, "diffllama", lambda: tf.DiffLlamaConfig(**sizes, **heads))
    base = load_base(BaseSettings(folder=save_base("diffllama", tmp_path)))
    with pytest.raises(UnsupportedBaseError, match=r"sample_prompts.*more than once.*leave them out"):
        generate_replies(base, None, tokenizer, prompts([4]), 5)


def test_an_adapter_that_overflows_ends_its_replies_and_not_the_run(
    load: LoadBase, tokenizer: PreTrainedTokenizerFast
) -> None:
    base = load()
    model = adapted(base)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(3e38)
    assert generate_replies(base, weights(model), tokenizer, prompts([4, 9]), 5) == ["", ""]


def test_the_replies_of_the_real_base_make_sense() -> None:
    from transformers import AutoTokenizer

    from onebase_engine.base.default_base import DEFAULT_BASE, resolve_base

    folder: Path = resolve_base(DEFAULT_BASE).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = ["What is the capital of France?", "Reply with one word: what colour is the sky?"]
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]
    replies = generate_replies(load_base(BaseSettings(folder=folder)), None, tokenizer, asked, 24)
    assert replies[0].startswith("The capital of France is Paris")
    assert "<|im_end|>" not in replies[1]


def test_what_ends_the_trials_of_the_kernels_ends_the_replies_too(
    load: LoadBase, tokenizer: PreTrainedTokenizerFast
) -> None:
    class ToldError(Exception):
        pass

    class Told:
        passed = 0

        def wait(self) -> None:
            self.passed += 1
            if self.passed == 7:
                raise ToldError

    with pytest.raises(ToldError):
        generate_replies(load(), None, tokenizer, prompts([70]), 20, wait=Told().wait)
