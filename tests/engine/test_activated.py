"""Activated LoRA: PEFT's texts, and a cache that adapters share with the base up to their invocation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.device import DEVICE
from tests.engine.harness import Lab, Request, run
from tests.tiny import ATTENTION, MLP, load_folder, save_adapter, save_base

from onebase_adapters.proof.texts import activation, activation_options, regrets, tie_of
from onebase_engine.base.chat import last_occurrence
from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.model import ServedModel
from onebase_engine.kernels.reference import ReferenceKernels

CHECK, RATE = (41, 42, 41), (77,)
SETTINGS: list[dict[str, Any]] = [
    {"r": 8, "lora_alpha": 16, "target_modules": [*ATTENTION, *MLP], "alora_invocation_tokens": [*CHECK]},
    {"r": 4, "lora_alpha": 12, "target_modules": ATTENTION, "alora_invocation_tokens": [*RATE]},
    {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
    {"r": 4, "lora_alpha": 3, "target_modules": [*ATTENTION, "lm_head"], "alora_invocation_tokens": [*CHECK]},
]
CHECKER, RATER, PLAIN, OTHER = range(4)
TEXT = tuple(token for token in range(100, 200) if token % 7)
"""A conversation of 86 tokens."""
ASKED = (9, 8, 7)


def lab_of(architecture: str, folder: Path) -> Lab:
    settings = BaseSettings(save_base(architecture, folder / "base"), quantization="nf4", device=DEVICE)
    base = load_base(settings)
    folders = [save_adapter(base, one, folder / f"{i}", seed=i + 1) for i, one in enumerate(SETTINGS)]
    loaded = [load_folder(base, one) for one in folders]
    return Lab(base, folders, [one.reference for one in loaded], [one.weights for one in loaded])


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return lab_of("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=["gemma3", "qwen3_5"])
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A base some of whose layers have a window, or keep a recurrent state."""
    return lab_of(request.param, tmp_path_factory.mktemp(request.param))


PROMPTS = {
    "at the end": (*TEXT, *CHECK),
    "before an instruction": (*TEXT, *CHECK, *ASKED),
    "at the very start": (*CHECK, *TEXT[:40]),
    "alone": CHECK,
    "twice": (*TEXT[:30], *CHECK, *TEXT[30:60], *CHECK, *ASKED),
    "overlapping itself": (*TEXT[:20], 41, 42, 41, 42, 41, *ASKED),
    "cut short": (*TEXT[:20], 41, 42),
    "nowhere": TEXT,
    "where a block begins": (*TEXT[:48], *CHECK, *ASKED),
    "where a block ends": (*TEXT[:47], *CHECK, *ASKED),
}


def submit(
    engine: Engine,
    prompt: tuple[int, ...],
    adapter: int | None,
    name: str = "x",
    tokens: int = 6,
    **more: Any,
) -> None:
    refs = [] if adapter is None else [protocol.AdapterRef(f"digest{adapter}")]
    sampling = more.pop("sampling", {})
    engine.submit(
        protocol.Submit(
            id=name,
            prompt=list(prompt),
            sampling=protocol.Sampling(
                **{"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, "logprobs": 2} | sampling
            ),
            adapters=refs,
            **more,
        )
    )


def outputs(engine: Engine) -> list[protocol.SequenceOutput]:
    found = []
    while engine.busy:
        engine.step()
        found += engine.take_outputs()
    assert not [one.error_message for one in found if one.error_message]
    return found


def ask(
    engine: Engine, prompt: tuple[int, ...], adapter: int | None, **more: Any
) -> tuple[int, list[protocol.ScoredToken]]:
    """The number of cached tokens, and each token with its logprobs."""
    submit(engine, prompt, adapter, **more)
    found = outputs(engine)
    scores = [score for output in found for score in output.logprobs or []]
    return next(one.cached_tokens for one in found if one.cached_tokens is not None), scores


@pytest.mark.parametrize("step_tokens", [96, 17, 5])
def test_wherever_a_prompt_invokes_it_texts_are_pefts(lab: Lab, step_tokens: int) -> None:
    asked = [Request(prompt, CHECKER, 8, at) for at, prompt in enumerate(PROMPTS.values())]
    asked += [Request(asked[0].prompt, adapter, 8) for adapter in (None, RATER, PLAIN, OTHER)]
    texts = run(lab.engine(step_tokens=step_tokens), asked)
    assert not lab.disagreements(asked, texts)
    of_base = [Request(one.prompt, None, 8) for one in asked]
    activated = [title for title in PROMPTS if title not in ("cut short", "nowhere")]
    changed = [a != b for a, b in zip(texts, map(lab.expected, of_base), strict=True)]
    assert [title for title, one in zip(PROMPTS, changed, strict=False) if one] == activated


def test_windows_and_recurrent_states_change_nothing_of_it(other: Lab) -> None:
    asked = [Request(prompt, CHECKER, 6, at) for at, prompt in enumerate(PROMPTS.values())]
    asked += [Request(asked[0].prompt, adapter, 6, at=20) for adapter in (None, RATER, PLAIN, OTHER)]
    for changes in ({}, {"step_tokens": 7}):
        assert not other.disagreements(asked, run(other.engine(**changes), asked)), changes


def test_by_the_reference_kernels_texts_are_pefts_too(lab: Lab) -> None:
    asked = [Request(prompt, CHECKER, 5) for prompt in PROMPTS.values()]
    model = ServedModel(lab.base, 8, kernels=ReferenceKernels(tiled=True))
    assert not lab.disagreements(asked, run(lab.engine(model=model), asked))


def test_what_is_generated_invokes_nothing_as_in_pefts_generate(lab: Lab) -> None:
    for prompt in (TEXT, (*TEXT[:40], *CHECK, *TEXT[40:])):
        begun = [*ASKED, *CHECK, *ASKED]
        engine = lab.engine()
        submit(engine, prompt, CHECKER, tokens=len(begun) + 6, resume_tokens={0: begun})
        text = [token for output in outputs(engine) for token in output.tokens]
        reference = lab.references[CHECKER]
        found = regrets(reference, list(prompt), [*begun, *text])[len(begun) :]
        assert max(found) <= tie_of(torch.bfloat16), "PEFT says the same after these tokens"


def test_the_branches_of_a_prompt_are_scored_from_its_own_invocation_on(lab: Lab) -> None:
    branches = [[5, 6], [*CHECK, 5]]
    for prompt in (TEXT, (*TEXT, *CHECK)):
        engine = lab.engine()
        submit(engine, prompt, CHECKER, tokens=0, n=2, branches=branches, sampling={"prompt_logprobs": 0})
        got = {one.choice: [s.logprob for s in one.prompt_logprobs or []] for one in outputs(engine)}
        model: Any = lab.references[CHECKER]
        for choice, branch in enumerate(branches):
            ids = [*prompt, *branch]
            options = activation_options(activation(model, list(prompt)), 0, len(ids))
            with torch.inference_mode():
                logits = model(torch.tensor([ids]), use_cache=False, **options).logits[0].float()
            scores = logits.log_softmax(1)[len(prompt) - 1 : -1].gather(1, torch.tensor(branch)[:, None])
            np.testing.assert_allclose(got[choice], scores[:, 0], atol=0.1)


# ---- the cache -----------------------------------------------------------------------------------


def test_base_and_adapters_reuse_each_others_blocks_up_to_the_invocation_in_both_directions(lab: Lab) -> None:
    check, rate = (*TEXT, *CHECK, *ASKED), (*TEXT, *RATE)
    fresh = {one: ask(lab.engine(), *one) for one in [(check, CHECKER), (rate, RATER), (check, None)]}
    whole = len(TEXT) // 16 * 16
    engine = lab.engine()
    assert ask(engine, TEXT, None)[0] == 0
    for prompt, adapter in ((check, CHECKER), (rate, RATER), (check, None)):
        cached, scores = ask(engine, prompt, adapter)
        assert cached == whole, adapter
        assert scores == fresh[prompt, adapter][1], "the bits are those without the cache"
    engine = lab.engine()
    assert ask(engine, check, CHECKER) == (0, fresh[check, CHECKER][1])
    assert ask(engine, check, None) == (whole, fresh[check, None][1]), "from the adapter to the base"
    assert ask(engine, rate, RATER) == (whole, fresh[rate, RATER][1])
    assert ask(engine, check, CHECKER) == (whole, fresh[check, CHECKER][1])


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33, 45, 46, 47, 48])
def test_a_block_that_an_invocation_falls_into_is_computed_again(lab: Lab, length: int) -> None:
    prompt = (*TEXT[:length], *CHECK, *TEXT[length : length + 40])
    fresh = ask(lab.engine(), prompt, CHECKER)[1]
    engine = lab.engine()
    bare = ask(engine, prompt, None)[1]
    assert ask(engine, prompt, CHECKER) == (length // 16 * 16, fresh)
    again, scores = ask(engine, prompt, CHECKER)
    assert (again, scores) == ((len(prompt) - 1) // 16 * 16, fresh), "its own blocks are cached as well"
    assert ask(engine, prompt, None)[1] == bare
    assert ask(engine, prompt, OTHER)[0] == length // 16 * 16, "not those of another adapter"
    assert ask(engine, prompt, PLAIN)[0] == 0


def test_blocks_behind_an_earlier_invocation_are_not_those_of_a_prompt_with_a_later_one(lab: Lab) -> None:
    first = (*TEXT[:20], *CHECK, *TEXT[20:60])
    later = (*first, *CHECK, *ASKED)
    fresh = ask(lab.engine(), later, CHECKER)[1]
    engine = lab.engine()
    ask(engine, first, CHECKER)
    assert ask(engine, later, CHECKER) == (16, fresh), "from the second invocation on it acts"
    assert ask(engine, (*later, *TEXT), None)[0] == len(first) // 16 * 16


def test_blocks_before_an_invocation_stay_with_their_tenant(lab: Lab) -> None:
    engine = lab.engine()
    prompt = (*TEXT, *CHECK)
    assert ask(engine, TEXT, None, tenant="a")[0] == 0
    assert ask(engine, prompt, CHECKER, tenant="b")[0] == 0
    assert ask(engine, prompt, CHECKER, tenant="a")[0] == 80
    assert ask(engine, prompt, CHECKER, tenant="c")[0] == 0


def test_a_prompt_that_does_not_invoke_it_is_the_bases_in_text_and_cache(lab: Lab) -> None:
    engine = lab.engine(slots=1)
    bare = ask(engine, TEXT, None)[1]
    assert ask(engine, TEXT, CHECKER) == (80, bare)
    assert engine.slots.slot_of == {}, "it takes no slot"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"step_tokens": 9}, id="chunks of nine tokens"),
        pytest.param({"kv_blocks": 50, "block_size": 4, "max_sequences": 8}, id="preemption"),
        pytest.param({"kv_blocks": 20, "host_blocks": 60}, id="blocks in host memory"),
        pytest.param({"draft_tokens": 5}, id="drafts"),
        pytest.param({"slots": 1}, id="one slot"),
    ],
)
def test_no_bit_changes_in_any_company_or_step(lab: Lab, changes: dict[str, int]) -> None:
    asked = [((*TEXT[:cut], *CHECK, *ASKED), CHECKER) for cut in (30, 60, 86)]
    asked += [((*TEXT[:60], *RATE), RATER), (TEXT[:60], None), ((*TEXT[:60], *CHECK), OTHER)]
    asked += [((*TEXT[:60], *CHECK), PLAIN)]
    alone = [ask(lab.engine(), prompt, adapter, tokens=20)[1] for prompt, adapter in asked]
    engine = lab.engine(**changes)
    for _ in range(2):
        for number, (prompt, adapter) in enumerate(asked):
            submit(engine, prompt, adapter, name=str(number), tokens=20)
            engine.step()
        found: dict[str, list[protocol.ScoredToken]] = {}
        while engine.busy or engine._outputs:
            for output in engine.take_outputs():
                assert output.error_message is None
                found.setdefault(output.id, []).extend(output.logprobs or [])
            if engine.busy:
                engine.step()
        assert [found[str(number)] for number in range(len(asked))] == alone


def test_by_the_reference_kernels_no_bit_changes_either(lab: Lab) -> None:
    def engine(**changes: int) -> Engine:
        return lab.engine(model=ServedModel(lab.base, 8, kernels=ReferenceKernels(tiled=True)), **changes)

    prompt = (*TEXT[:40], *CHECK, *ASKED)
    fresh, bare = ask(engine(), prompt, CHECKER)[1], ask(engine(), prompt, None)[1]
    chunked = engine(step_tokens=9)
    for adapter, scores, cached in ((None, bare, 0), (CHECKER, fresh, 32), (None, bare, 32)):
        assert ask(chunked, prompt, adapter) == (cached, scores)
    assert ask(chunked, prompt, CHECKER, tenant="other") == (0, fresh)


@pytest.mark.parametrize("reference", [False, True], ids=["the device's kernels", "the reference"])
def test_one_that_overflows_fails_alone_and_leaves_the_bases_blocks_whole(
    lab: Lab, tmp_path: Path, reference: bool
) -> None:
    settings = {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"],
        "alora_invocation_tokens": [*CHECK],
    }
    folder = save_adapter(lab.base, settings, tmp_path / "overflowing", seed=1, std=3e37)
    kernels = {"kernels": ReferenceKernels(tiled=True)} if reference else {}
    text, prompt = TEXT[:50], (*TEXT[:50], *CHECK, *ASKED)
    expected = [
        ask(lab.engine(model=ServedModel(lab.base, 8, **kernels)), *one)[1]
        for one in ((text, None), (prompt, CHECKER))
    ]
    engine = lab.engine(model=ServedModel(lab.base, 8, **kernels))
    engine.put_adapter("digest9", load_folder(lab.base, folder).weights)
    for number, (asked, adapter) in enumerate([(prompt, 9), (text, None), (prompt, CHECKER)]):
        submit(engine, asked, adapter, name=str(number))
    failed = []
    found: dict[str, list[protocol.ScoredToken]] = {}
    while engine.busy:
        engine.step()
        for output in engine.take_outputs():
            found.setdefault(output.id, []).extend(output.logprobs or [])
            failed += [(output.id, output.error_code)] if output.error_code else []
    assert failed == [("0", "not_finite")]
    assert [found["1"], found["2"]] == expected
    assert ask(engine, text, None) == (48, expected[0]), "nothing of it is left in blocks"
    assert ask(engine, prompt, CHECKER)[1] == expected[1]


def test_a_recurrent_state_before_the_invocation_is_shared_and_changes_no_bit(other: Lab) -> None:
    prompt = (*TEXT, *CHECK, *ASKED)
    fresh, bare = ask(other.engine(), prompt, CHECKER)[1], ask(other.engine(), prompt, None)[1]
    engine = other.engine()
    assert ask(engine, prompt, CHECKER) == (0, fresh)
    cached, scores = ask(engine, prompt, None)
    assert (cached, scores) == (80, bare)
    assert ask(engine, (*TEXT, *RATE), RATER)[0] == 80
    cached, scores = ask(engine, prompt, CHECKER)
    assert cached == 80
    assert scores == fresh
    assert ask(engine, prompt, CHECKER, tenant="other")[0] == 0


def test_vectors_are_pefts_hidden_states_from_the_invocation_on(lab: Lab) -> None:
    model: Any = lab.references[CHECKER]
    for prompt in ((*TEXT, *CHECK, *ASKED), TEXT):
        options = activation_options(activation(model, list(prompt)), 0, len(prompt))
        with torch.inference_mode():
            output = model(
                torch.tensor([prompt]), use_cache=False, output_hidden_states=True, **options
            ).hidden_states[-1][0]
        engine = lab.engine()
        vectors = []
        for kind in ("last", "mean", "last"):
            submit(engine, prompt, CHECKER, tokens=0, pooling=protocol.Pooling(kind))
            (answer,) = [one for one in outputs(engine) if one.vector]
            vectors.append(np.frombuffer(answer.vector or b"", dtype="<f4"))
        assert np.array_equal(vectors[0], vectors[2]), "with the cache too"
        np.testing.assert_allclose(vectors[0], output[-1].float(), atol=0.15)
        np.testing.assert_allclose(vectors[1], output.float().mean(0), atol=0.05)


def test_twenty_judges_of_one_conversation_compute_its_tokens_once(lab: Lab) -> None:
    judges, text = 20, TEXT[:80]
    computed = {}
    for adapter in (CHECKER, PLAIN):
        engine = lab.engine()
        for number in range(judges):
            engine.put_adapter(f"digest{10 + number}", lab.weights[adapter])
        ask(engine, (*text, 3), None, tokens=1)
        before = engine.counters.prompt_tokens - engine.counters.cached_tokens
        for number in range(judges):
            submit(engine, (*text, *CHECK, *ASKED), 10 + number, name=str(number), tokens=1)
        outputs(engine)
        computed[adapter] = engine.counters.prompt_tokens - engine.counters.cached_tokens - before
    assert computed == {CHECKER: judges * len((*CHECK, *ASKED)), PLAIN: judges * len((*text, *CHECK, *ASKED))}


@pytest.mark.parametrize(
    ("tokens", "wanted", "found"),
    [
        ([1, 2, 1, 2, 3], [1, 2], 2),
        ([1], [1], 0),
        ([1], [1, 1], None),
        ([], [1], None),
        ([1, 2], [2, 1], None),
    ],
)
def test_the_last_occurrence_counts(tokens: list[int], wanted: list[int], found: int | None) -> None:
    assert last_occurrence(tokens, wanted) == found
