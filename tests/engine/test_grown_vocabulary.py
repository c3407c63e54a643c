"""Adapters trained after `resize_token_embeddings`: proved, and served as PEFT does on the resized base."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.engine.harness import Lab, Request, requests, run, submission
from tests.oracle import greedy
from tests.tiny import load_folder, randomize, save_adapter, save_base
from torch import nn
from transformers import AutoModelForCausalLM

from onebase_adapters.format.canonical import CONFIG_FILE, WEIGHTS_FILE, AdapterFormatError
from onebase_adapters.proof.verifier import Verifier
from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.engine import Engine
from onebase_engine.kernels.weights import MOST_NEW_TOKENS, SavedModule, TokenRows, vocabulary_of
from onebase_engine.lora.packed_adapter import read_packed_adapter

WORDS = 320
"""Number of tokens of the base."""
GROWN = 323
BOTH = ["embed_tokens", "lm_head"]
NEW = [320, 321, 322]
HOW: dict[str, dict[str, Any]] = {
    "saved": {"modules_to_save": BOTH},
    "not trained": {},
    "tokens": {"trainable_token_indices": {"embed_tokens": [5, *NEW]}},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [5, *NEW], "lm_head": [5, *NEW]}},
    "tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}
"""Ways in which people train new tokens, and PEFT saves them."""


@dataclass(frozen=True)
class Trained:
    """An adapter's folder, and PEFT's own model of it on a base that was resized before."""

    folder: Path
    peft: nn.Module


@dataclass(frozen=True)
class Bench:
    """A base, as it was saved and as it is served."""

    source: Path
    served: nn.Module

    def resized(self, words: int) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.source, dtype=torch.float32, attn_implementation="eager"
        )
        model.resize_token_embeddings(words, mean_resizing=False)
        return model.eval().requires_grad_(False)

    def train(self, folder: Path, how: str, words: int = GROWN, seed: int = 3) -> Trained:
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM", **HOW[how])
        base = self.resized(words)
        # What is resized is random, and PEFT saves it: the base that it is loaded on may have any rows.
        model = get_peft_model(base, config)
        randomize(model, 0.1)
        model.save_pretrained(folder)
        torch.manual_seed(seed + 1)
        return Trained(folder, PeftModel.from_pretrained(self.resized(words), str(folder)).eval())


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma2"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A base with a tied head, one without, and one with scaled embeddings and capped logits; in fp32."""
    source = save_base(request.param, tmp_path_factory.mktemp("base"))
    settings = BaseSettings(source, quantization="none", dtype=torch.float32)
    return Bench(source, load_base(settings))


def served(bench: Bench, trained: list[Trained], neighbours: Lab | None = None, **settings: Any) -> Engine:
    others = [] if neighbours is None else list(neighbours.weights)
    weights = [load_folder(bench.served, one.folder).weights for one in trained]
    return Lab(bench.served, [], [], [*others, *weights]).engine(**settings)


def scored(engine: Engine, request: Request, top: int = 3) -> list[protocol.ScoredToken]:
    message = submission("one", request)
    sampling = protocol.Sampling(
        temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True, logprobs=top, prompt_logprobs=top
    )
    engine.submit(
        protocol.Submit(id="one", prompt=message.prompt, sampling=sampling, adapters=message.adapters)
    )
    found: list[protocol.ScoredToken] = []
    while engine.busy:
        engine.step()
        for output in engine.take_outputs():
            assert output.error_message is None, output.error_message
            found += [*(output.prompt_logprobs or []), *(output.logprobs or [])]
    return found


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("words", [GROWN, 301])
def test_logprobs_are_those_of_peft_on_the_resized_base(
    bench: Bench, how: str, words: int, tmp_path: Path
) -> None:
    if words < WORDS and "tokens" in how:
        pytest.skip("its tokens are beyond")
    trained = bench.train(tmp_path, how, words)
    prompt = (5, words - 1, 17, words - 2, 200)
    request = Request(prompt, 0, 6)
    found = scored(served(bench, [trained]), request, top=words)
    text = greedy(trained.peft, list(prompt), 6)
    with torch.inference_mode():
        logits = trained.peft(torch.tensor([[*prompt, *text]])).logits[0].double()
    expected = logits.log_softmax(-1)
    assert [one.token for one in found] == [*prompt[1:], *text]
    for place, one in enumerate(found):
        assert one.logprob == pytest.approx(float(expected[place, one.token]), abs=2e-4)
        values = dict(one.top)
        assert sorted(values) == list(range(words))
        got = torch.tensor([values[token] for token in range(words)], dtype=torch.float64)
        assert torch.allclose(got, expected[place], atol=2e-4)


@pytest.fixture(scope="module")
def lab(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Adapters of other kinds on the base."""
    return Lab.create(bench.served, tmp_path_factory.mktemp("others"))


@pytest.mark.parametrize("how", ["saved", "tokens of both"])
def test_neighbours_keep_their_bits_and_never_see_the_new_tokens(
    bench: Bench, lab: Lab, how: str, tmp_path: Path
) -> None:
    mine, count = bench.train(tmp_path / "mine", how), len(lab.weights)
    asked = requests(count + 2, seed=7)
    alone = run(lab.engine(), asked)
    own = [Request((7, token, 9), count, 8, at=token % 4) for token in NEW]
    engine = served(bench, [mine], lab)
    texts = run(engine, [*asked, *own])
    assert texts[: len(asked)] == alone
    assert texts[len(asked) :] == [greedy(mine.peft, list(one.prompt), 8) for one in own]
    sampled = [protocol.AdapterRef(f"digest{one}") for one in range(count)]
    hot = protocol.Sampling(temperature=50.0, max_tokens=20, ignore_eos=True, seed=1)
    for name, adapters in [("base", []), *((ref.digest, [ref]) for ref in sampled), ("mine", [count])]:
        refs = [protocol.AdapterRef(f"digest{count}")] if name == "mine" else adapters
        engine.submit(protocol.Submit(id=name, prompt=[5, 6], sampling=hot, adapters=refs, n=4))
    drawn: dict[str, set[int]] = {}
    while engine.busy:
        engine.step()
        for output in engine.take_outputs():
            drawn.setdefault(output.id, set()).update(output.tokens)
    assert max(drawn.pop("mine")) < GROWN
    assert max(max(tokens) for tokens in drawn.values()) < WORDS


def test_ids_are_refused_to_whoever_does_not_have_them(bench: Bench, tmp_path: Path) -> None:
    engine = served(bench, [bench.train(tmp_path / "a", "saved"), bench.train(tmp_path / "b", "saved", 301)])
    mine, smaller = [protocol.AdapterRef("digest0")], [protocol.AdapterRef("digest1")]
    short = protocol.Sampling(max_tokens=1, temperature=0.0)
    for name, adapters, prompt, sampling in (
        ("base", [], [322], short),
        ("bias", [], [5], protocol.Sampling(max_tokens=1, logit_bias={320: 1.0})),
        ("mine", mine, [322], protocol.Sampling(max_tokens=1, logit_bias={320: 5.0}, stop_token_ids=(321,))),
        ("beyond", mine, [323], short),
        ("smaller", smaller, [301], short),
        ("fits", smaller, [300], short),
    ):
        engine.submit(protocol.Submit(id=name, prompt=prompt, sampling=sampling, adapters=adapters))
    refused = {}
    while engine.busy:
        engine.step()
    for output in engine.take_outputs():
        refused[output.id] = (output.error_code, output.error_param)
    assert refused == {
        "base": ("token_out_of_range", "prompt"),
        "bias": ("token_out_of_range", "logit_bias"),
        "beyond": ("token_out_of_range", "prompt"),
        "smaller": ("token_out_of_range", "prompt"),
        "mine": (None, None),
        "fits": (None, None),
    }


def test_its_own_end_tokens_stop_it_and_penalties_drafts_and_min_tokens_reach_them(
    bench: Bench, tmp_path: Path
) -> None:
    trained = bench.train(tmp_path, "saved")
    engine = served(bench, [trained], draft_tokens=4)
    favoured = {322: 1000.0}

    def text(**settings: Any) -> tuple[list[int], Any, Any]:
        sampling = protocol.Sampling(temperature=0.0, max_tokens=6, logit_bias=favoured, **settings)
        engine.submit(
            protocol.Submit(
                id="one", prompt=[5, 6, 7], sampling=sampling, adapters=[protocol.AdapterRef("digest0")]
            )
        )
        tokens, last = list[int](), None
        while engine.busy:
            engine.step()
            for last in engine.take_outputs():
                tokens += last.tokens
        assert last is not None
        return tokens, last.finish, last.stop_token

    assert text() == ([322] * 6, "length", None)
    assert text(end_token_ids=(322,)) == ([322], "stop", 322)
    assert text(end_token_ids=(322,), ignore_eos=True) == ([322] * 6, "length", None)
    tokens, finish, _ = text(end_token_ids=(322,), min_tokens=2)
    assert (len(tokens), tokens[-1], finish) == (3, 322, "stop")
    assert 322 not in tokens[:2]
    assert len(set(text(frequency_penalty=2000.0)[0])) == 6


def test_rows_that_are_the_bases_take_no_memory(bench: Bench, tmp_path: Path) -> None:
    rows = load_folder(bench.served, bench.train(tmp_path / "few", "tokens").folder)
    whole = load_folder(bench.served, bench.train(tmp_path / "all", "saved").folder)
    embedding = rows.weights["model.embed_tokens"]
    assert isinstance(embedding, TokenRows)
    assert embedding.indices.tolist() == [5, *NEW]
    assert isinstance(whole.weights["model.embed_tokens"], SavedModule)
    assert vocabulary_of(rows.weights) == vocabulary_of(whole.weights) == GROWN
    assert rows.bytes < whole.bytes / 10


def test_a_version_is_proved_in_nf4_and_its_file_serves(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = save_base("qwen2", tmp_path / "base")
    base = load_base(BaseSettings(source, quantization="nf4", dtype=torch.bfloat16))
    bench, verifier = Bench(source, base), Verifier(base, max_rank=64, base_id="b")
    for how in HOW:
        folder, packed = tmp_path / how, tmp_path / f"{how}.packed"
        bench.train(folder, how)
        proven = verifier.prove(
            folder / CONFIG_FILE,
            folder / WEIGHTS_FILE,
            packed,
            probes=[[5, 6, 7]],
            probe_tokens=6,
            allow_noop=False,
            on_progress=lambda stage, fraction: None,
        )
        assert proven.report.vocabulary == GROWN
        assert proven.report.proof.texts == 2  # one of them with the new tokens
        assert proven.report.proof.exact
        weights = read_packed_adapter(packed, proven.sha256, base_id="b")
        assert vocabulary_of(weights) == GROWN


def test_a_row_that_is_served_wrong_is_found(bench: Bench, tmp_path: Path) -> None:
    from onebase_adapters.proof.modules import ModuleProver
    from onebase_adapters.proof.report import ProofError

    loaded = load_folder(bench.served, bench.train(tmp_path, "tokens of both").folder)
    prover = ModuleProver(bench.served)
    assert prover.prove(loaded.reference, loaded.weights).exact
    for name in ("model.embed_tokens", "lm_head"):
        rows = loaded.weights[name]
        assert isinstance(rows, TokenRows)
        wrong = rows.rows.clone()
        wrong[-1] += 0.5
        changed = TokenRows(rows.indices, wrong, rows.words)
        with pytest.raises(ProofError):
            prover.prove(loaded.reference, {**loaded.weights, name: changed})


def config_with(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **fields}))


def refusal(bench: Bench, folder: Path) -> AdapterFormatError:
    with pytest.raises(AdapterFormatError) as refused:
        load_folder(bench.served, folder)
    return refused.value


def test_rows_behind_the_last_token_are_left_out(bench: Bench, tmp_path: Path) -> None:
    trained = bench.train(tmp_path, "saved", 384)
    assert load_folder(bench.served, tmp_path).spec.words == 384
    tokens = [{"id": 320, "content": "<|im_start|>", "special": True}, {"id": 321, "content": "<|im_end|>"}]
    config_with(tmp_path, onebase_tokenizer={"tokens": tokens, "end_tokens": [321]})
    loaded = load_folder(bench.served, tmp_path)
    assert loaded.spec.words == 322
    assert loaded.spec.tokens is not None
    assert [token.content for token in loaded.spec.tokens.tokens] == ["<|im_start|>", "<|im_end|>"]
    engine = Lab(bench.served, [], [], [loaded.weights]).engine()
    found = scored(engine, Request((5, 321, 17), 0, 2), top=322)
    with torch.inference_mode():
        logits = trained.peft(torch.tensor([[5, 321, 17]])).logits[0, :, :322].double().log_softmax(-1)
    assert found[0].logprob == pytest.approx(float(logits[0, 321]), abs=2e-4)


def test_what_does_not_fit_is_refused_with_the_sizes_and_the_way_out(bench: Bench, tmp_path: Path) -> None:
    folder = bench.train(tmp_path / "a", "saved").folder
    tokens = [{"id": 320 + place, "content": f"<|{place}|>"} for place in range(4)]
    config_with(folder, onebase_tokenizer={"tokens": tokens})
    error = refusal(bench, folder)
    assert error.code == "bad_tokenizer"
    assert "323" in str(error)
    assert "resize_token_embeddings" in str(error)
    config_with(folder, onebase_tokenizer={"problem": "its merges differ"})
    assert refusal(bench, folder).code == "bad_tokenizer"

    folder = bench.train(tmp_path / "b", "saved", WORDS + MOST_NEW_TOKENS + 1).folder
    assert str(MOST_NEW_TOKENS) in str(refusal(bench, folder))

    folder = bench.train(tmp_path / "c", "not trained").folder
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors["base_model.model.model.embed_tokens.weight"][7] += 1
    save_file(tensors, folder / WEIGHTS_FILE)
    assert "base's own tokens" in str(refusal(bench, folder))
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, folder / WEIGHTS_FILE)
    assert "lm_head" in str(refusal(bench, folder))

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    get_peft_model(bench.resized(GROWN), config).save_pretrained(tmp_path / "d")
    error = refusal(bench, tmp_path / "d")
    assert error.code == "unsupported_kind"
    assert "trainable_token_indices" in str(error)


def test_tokens_without_rows_are_dropped_with_a_warning(bench: Bench, tmp_path: Path) -> None:
    folder = save_adapter(bench.served, {"r": 4, "target_modules": ["q_proj"]}, tmp_path, seed=1)
    config_with(folder, onebase_tokenizer={"tokens": [{"id": 320, "content": "<pad>"}]})
    spec = load_folder(bench.served, folder).spec
    assert (spec.words, spec.tokens) == (0, None)
    assert any("<pad>" in warning for warning in spec.warnings)


def test_a_base_whose_layers_look_tokens_up_takes_no_new_ones(tmp_path: Path) -> None:
    source = save_base("gemma4", tmp_path / "base")
    bench = Bench(source, load_base(BaseSettings(source, quantization="none", dtype=torch.float32)))
    error = refusal(bench, bench.train(tmp_path / "a", "saved").folder)
    assert error.code == "unsupported_kind"
    assert "323" in str(error)
