"""Hybrids: layers that keep a recurrent state, next to layers that attend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from tests.device import DEVICE
from tests.engine.harness import Lab, Request, requests, run, submission
from tests.tiny import HYBRIDS, load_folder, save_adapter, save_base

from onebase_engine.base.load import BaseSettings, UnsupportedBaseError, load_base
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.base_proof import prove_base
from onebase_engine.engine.drafts import Drafts
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.model import ServedModel
from onebase_engine.engine.recurrence import Recurrence, StatePool
from onebase_engine.kernels.reference import ReferenceKernels

PRECISIONS = {
    "nf4": {"quantization": "nf4", "dtype": torch.bfloat16},
    "fp32": {"quantization": "none", "dtype": torch.float32},
}
EVERYWHERE = {
    "qwen3_5": "in_proj_qkv in_proj_z in_proj_a in_proj_b out_proj down_proj q_proj",
    "olmo_hybrid": "k_proj v_proj a_proj b_proj g_proj o_proj up_proj q_proj",
    "granite_h": "in_proj q_proj input_linear output_linear v_proj",
    "falcon_h1": "in_proj k_proj gate_proj lm_head o_proj",
    "bamba": "in_proj q_proj down_proj v_proj",
    "nemotron_h": "in_proj q_proj up_proj v_proj",
    "mamba2": "lm_head in_proj",
    "falcon_mamba": "x_proj in_proj",
    "lfm2": "in_proj out_proj w1 w2 v_proj",
}
"""Layers for which an adapter is trained, by architecture."""


@pytest.fixture(
    scope="module",
    params=[*((one, "nf4") for one in HYBRIDS), ("qwen3_5", "fp32"), ("granite_h", "fp32")],
    ids=lambda param: "-".join(param),
)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    architecture, precision = request.param
    return made(architecture, precision, tmp_path_factory)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return made("qwen3_5", "nf4", tmp_path_factory)


def made(architecture: str, precision: str, folders: pytest.TempPathFactory) -> Lab:
    """Make a random hybrid with three adapters: on all kinds of layers, with DoRA, and on one kind."""
    folder = folders.mktemp(f"{architecture}-{precision}")
    path = save_base(architecture, folder / "base")
    base = load_base(BaseSettings(path, **PRECISIONS[precision], device=DEVICE))
    targets = EVERYWHERE[architecture].split()
    kinds: list[dict[str, Any]] = [
        {"r": 8, "lora_alpha": 16, "target_modules": targets},
        {"r": 4, "lora_alpha": 8, "target_modules": targets, "use_dora": True},
        {"r": 4, "lora_alpha": 12, "target_modules": targets[-1:]},
    ]
    paths = [save_adapter(base, kind, folder / f"a{i}", seed=i + 1) for i, kind in enumerate(kinds)]
    loaded = [load_folder(base, path) for path in paths]
    return Lab(base, paths, [one.reference for one in loaded], [one.weights for one in loaded])


def asked_of(count: int, seed: int, **changes: int) -> list[Request]:
    return [
        replace(one, adapter=(None, 0, 1, 2)[number % 4])
        for number, one in enumerate(requests(count, seed, **changes))
    ]


ASKED = asked_of(8, seed=7, longest=70, tokens=12)


def test_rows_of_a_mixed_batch_equal_peft_alone_token_for_token(lab: Lab) -> None:
    engine = lab.engine()
    texts = run(engine, ASKED)
    assert not lab.disagreements(ASKED, texts)
    assert engine.pool.free == engine.pool.capacity
    longer = [replace(ASKED[0], adapter=one, max_tokens=40) for one in (None, 0, 1, 2)]
    assert len({tuple(lab.expected(one)) for one in longer}) == 4
    engine.check_base()


# ---- a row's bits are its own -------------------------------------------------------------------

Scores = list[list[protocol.ScoredToken]]


def scored(engine: Engine, asked: list[Request], *, apart: bool = False) -> Scores:
    """Serve the requests together, or one after the other, and return every token with its logprobs."""
    found: dict[str, list[protocol.ScoredToken]] = {str(number): [] for number in range(len(asked))}
    for number, request in enumerate(asked):
        message = submission(str(number), request)
        engine.submit(structs.replace(message, sampling=structs.replace(message.sampling, logprobs=2)))
        while engine.busy and (apart or number % 3 == 0):
            collect(engine, found)
            if not apart:
                break
    while engine.busy:
        collect(engine, found)
    return list(found.values())


def collect(engine: Engine, found: dict[str, list[protocol.ScoredToken]]) -> None:
    engine.step()
    for output in engine.take_outputs():
        assert output.error_message is None, output.error_message
        found[output.id] += output.logprobs or []


@pytest.fixture(scope="module")
def plain(lab: Lab) -> Scores:
    """What the rows of ASKED get one by one."""
    return [scored(lab.engine(), [request])[0] for request in ASKED]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"step_tokens": 7}, id="chunks-of-seven-tokens"),
        pytest.param({"step_tokens": 512}, id="whole-prompts", marks=pytest.mark.full),
        pytest.param({"kv_blocks": 56, "block_size": 2}, id="preemption"),
        pytest.param({"state_places": 5}, id="places-for-two-rows"),
    ],
)
def test_logprobs_are_bit_equal_alone_and_in_any_step(
    lab: Lab, plain: Scores, changes: dict[str, int]
) -> None:
    engine = lab.engine(**changes)
    assert scored(engine, ASKED) == plain
    assert engine.scheduler.preemptions > 0 or "kv_blocks" not in changes


def test_a_prefix_whose_state_was_kept_is_not_computed_again_and_changes_no_bit(lab: Lab) -> None:
    prompt = tuple(range(3, 103))
    asked = [Request(prompt + tail, adapter, 6) for adapter in (None, 0) for tail in ((), (5,), (7, 9, 11))]
    plain = [scored(lab.engine(), [one])[0] for one in asked]
    engine = lab.engine()
    assert scored(engine, asked, apart=True) == plain
    assert engine.counters.cached_tokens == 2 * (96 + 96), "two of three, for the base and for an adapter"


# ---- states that are kept -----------------------------------------------------------------------


def cached(
    engine: Engine, prompt: list[int], tenant: str = "default", tokens: int = 1
) -> tuple[int, list[int]]:
    """Return how many tokens of a prompt were not computed, and the text that follows."""
    sampling = protocol.Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    engine.submit(protocol.Submit(id="one", prompt=prompt, sampling=sampling, tenant=tenant))
    found, text = 0, list[int]()
    while engine.busy:
        engine.step()
        for output in engine.take_outputs():
            assert output.error_message is None
            found += output.cached_tokens or 0
            text += output.tokens
    return found, text


def test_a_conversation_goes_on_from_the_state_behind_its_last_answer(qwen: Lab) -> None:
    engine = qwen.engine()
    prompt = list(range(3, 90))
    _, text = cached(engine, prompt, tokens=30)
    assert cached(engine, [*prompt, *text, 4, 5, 6])[0] == (len(prompt) + 29) // 16 * 16


def test_what_two_prompts_share_is_kept_for_the_third(qwen: Lab) -> None:
    engine = qwen.engine()
    shared = list(range(3, 70))
    found = [cached(engine, [*shared, *[number] * 40])[0] for number in (101, 102, 103)]
    assert found == [0, 0, 64]


def test_states_are_shared_neither_between_tenants_nor_between_adapters(qwen: Lab) -> None:
    engine = qwen.engine()
    prompt = list(range(3, 90))
    assert [cached(engine, prompt, tenant)[0] for tenant in ("a", "b", "a")] == [0, 0, 80]
    (request,) = [Request(tuple(prompt), 0, 1)]
    scored(engine, [request])
    assert engine.counters.cached_tokens == 80


def test_states_of_prefixes_leave_when_running_rows_need_their_places(qwen: Lab) -> None:
    engine = qwen.engine(state_places=5)
    first = [5] * 90
    for prompt in (first, *([number] * 90 for number in (6, 7, 8, 9))):
        cached(engine, prompt)
    states = engine.scheduler._states
    assert states is not None
    assert states.snapshots <= 3
    assert cached(engine, first)[0] == 0, "the oldest has left"
    assert cached(engine, first)[0] == 80
    run(engine, ASKED)
    assert engine.pool.free == engine.pool.capacity


def test_choices_of_one_prompt_start_from_the_state_behind_it(qwen: Lab) -> None:
    engine = qwen.engine()
    sampling = protocol.Sampling(temperature=1.0, max_tokens=4, ignore_eos=True, seed=1)
    engine.submit(protocol.Submit(id="n", prompt=list(range(3, 103)), sampling=sampling, n=4))
    found = []
    while engine.busy:
        engine.step()
        found += [one.cached_tokens for one in engine.take_outputs() if one.cached_tokens is not None]
    assert sorted(found) == [0, 96, 96, 96]


def test_a_step_that_fails_is_computed_again_from_the_states_before_it(
    qwen: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [replace(one, at=0) for one in ASKED[:5]]
    texts = run(qwen.engine(), asked)
    engine, forward = qwen.engine(), ServedModel._forward
    fails = iter([number % 11 == 3 for number in range(10_000)])

    def broken(self: ServedModel, *given: Any) -> torch.Tensor:
        logits = forward(self, *given)  # the states are written, and then something goes wrong
        if next(fails):
            raise RuntimeError("a device's fault")
        return logits

    monkeypatch.setattr(ServedModel, "_forward", broken)
    assert run(engine, asked) == texts


def test_a_base_whose_state_is_lost_between_steps_is_refused_at_its_first_start(
    qwen: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prove_base(qwen.engine(step_tokens=64), qwen.base) < 0.2
    monkeypatch.setattr(StatePool, "share", lambda self, place: 0)
    engine = qwen.engine(step_tokens=64)
    states = engine.scheduler._states
    assert states is not None
    monkeypatch.setattr(states, "release", lambda place: None)
    monkeypatch.setattr(type(engine.scheduler), "_advance_state", lambda self, states, sequence: None)
    with pytest.raises(UnsupportedBaseError, match="cannot be proved"):
        prove_base(engine, qwen.base)


# ---- drafts -------------------------------------------------------------------------------------


def draft_from(patch: pytest.MonkeyPatch, texts: list[list[int]], right: list[int]) -> None:
    """Let drafts go on as the texts do, with so many right tokens, in turns by the length of the text."""

    def propose(
        self: Drafts, tokens: list[int], most: int, forced: list[int], *, drawing: bool = False
    ) -> list[int]:
        text = next((text for text in texts if text[: len(tokens)] == tokens), [])
        draft, place = text[len(tokens) : len(tokens) + most], right[len(tokens) % len(right)]
        if place < len(draft):
            draft[place] ^= 1
        return draft

    patch.setattr(Drafts, "propose", propose)
    patch.setattr(Drafts, "worth", lambda self, rows, cost: 64)


def texts_of(asked: list[Request], found: Scores) -> list[list[int]]:
    return [[*one.prompt, *(token.token for token in row)] for one, row in zip(asked, found, strict=True)]


@pytest.mark.parametrize(
    ("right", "changes"),
    [
        pytest.param([0], {}, id="none-is-right", marks=pytest.mark.full),
        pytest.param([0, 1, 2, 3], {}, id="some-are-right", marks=pytest.mark.full),
        pytest.param([5], {}, id="all-are-right", marks=pytest.mark.full),
        pytest.param([0, 1, 2], {"block_size": 2}, id="blocks-of-two-tokens"),
        pytest.param([3, 0, 1], {"state_places": 5}, id="places-for-two-rows"),
    ],
)
def test_logprobs_are_bit_equal_with_drafts(
    lab: Lab,
    plain: Scores,
    right: list[int],
    changes: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draft_from(monkeypatch, texts_of(ASKED, plain), right)
    engine = lab.engine(draft_tokens=5, **changes)
    assert scored(engine, ASKED) == plain
    assert scored(engine, ASKED) == plain, "what drafts were written to is somebody's prefix now"
    assert engine.pool.free == engine.pool.capacity
    if engine.model.kernels.drafts:
        drafted, were_right = engine.counters.draft_tokens, engine.counters.right_draft_tokens
        assert drafted > 0
        assert (were_right > 0) == (max(right) > 0)
        assert (were_right < drafted) == (min(right) < 5)


def test_drafts_change_no_bit_where_blocks_are_few(qwen: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asked_of(12, seed=7, longest=70, tokens=24)
    plain = scored(qwen.engine(), asked)
    draft_from(monkeypatch, texts_of(asked, plain), [0, 1, 2])
    engine = qwen.engine(draft_tokens=5, kv_blocks=56, block_size=2)
    assert scored(engine, asked) == plain
    assert engine.scheduler.preemptions > 0
    assert engine.counters.right_draft_tokens > 0 or not engine.model.kernels.drafts


@pytest.fixture(scope="module")
def drafting(qwen: Lab) -> tuple[Engine, Scores]:
    """An engine for drafts, and what the first rows of ASKED get without them."""
    engine = qwen.engine(draft_tokens=7)
    if not engine.model.kernels.drafts:
        pytest.skip("these kernels have no drafts")
    return engine, [scored(qwen.engine(), [one])[0] for one in ASKED[:3]]


@settings(max_examples=30)
@given(data=st.data(), right=st.lists(st.integers(0, 7), min_size=1, max_size=9))
def test_wherever_drafts_are_wrong_and_texts_end_no_bit_changes(
    drafting: tuple[Engine, Scores], data: st.DataObject, right: list[int]
) -> None:
    engine, plain = drafting
    lengths = data.draw(st.tuples(*(st.integers(1, len(row)) for row in plain)))
    tenant = str(engine.counters.steps)  # without what was kept
    asked = [
        replace(one, max_tokens=length, tenant=tenant) for one, length in zip(ASKED[:3], lengths, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        draft_from(patch, texts_of(ASKED[:3], plain), right)
        found = scored(engine, asked)
    assert found == [row[:length] for row, length in zip(plain, lengths, strict=True)]


def test_with_drafts_a_conversation_goes_on_from_the_state_behind_its_last_answer(
    qwen: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = list(range(3, 90))
    _, text = cached(qwen.engine(), prompt, tokens=60)
    _, following = cached(qwen.engine(), [*prompt, *text, 4, 5, 6], tokens=9)
    for right in range(6):
        draft_from(monkeypatch, [[*prompt, *text]], [right])
        engine = qwen.engine(draft_tokens=5)
        assert cached(engine, prompt, tokens=60)[1] == text
        if engine.model.kernels.drafts and right == 5:
            assert engine.counters.steps == 2 + 10, "drafts go past the ends of blocks"
        end = (len(prompt) + 59) // 16 * 16
        assert cached(engine, [*prompt, *text, 4, 5, 6], tokens=9) == (end, following)


def test_a_text_that_repeats_itself_takes_fewer_steps_with_drafts(qwen: Lab) -> None:
    sampling = protocol.Sampling(
        temperature=0.0, max_tokens=60, ignore_eos=True, logit_bias={9: 50.0, 11: 50.0}
    )
    found, steps = [], []
    for engine in (qwen.engine(), qwen.engine(draft_tokens=7)):
        engine.submit(protocol.Submit(id="one", prompt=[9, 11] * 5, sampling=sampling))
        while engine.busy:
            engine.step()
        found.append([token for one in engine.take_outputs() for token in one.tokens])
        steps.append(engine.counters.steps)
    assert found[0] == found[1]
    if engine.model.kernels.drafts:
        assert engine.counters.right_draft_tokens > 30
        assert 2 * steps[1] < steps[0]


def test_drafts_change_no_bit_over_the_reference(qwen: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReferenceKernels, "drafts", True)
    asked = ASKED[:3]

    def engine(**changes: int) -> Engine:
        return qwen.engine(model=ServedModel(qwen.base, 8, kernels=ReferenceKernels()), **changes)

    plain = scored(engine(), asked)
    draft_from(monkeypatch, texts_of(asked, plain), [0, 2, 1])
    drafting = engine(draft_tokens=3)
    assert scored(drafting, asked) == plain
    assert 0 < drafting.counters.right_draft_tokens < drafting.counters.draft_tokens


def test_a_step_whose_states_cannot_be_rewound_is_computed_again_without_drafts(
    qwen: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [replace(one, at=0) for one in ASKED[:5]]
    plain = scored(qwen.engine(), asked)
    engine, rewind = qwen.engine(draft_tokens=5), Recurrence.rewind
    draft_from(monkeypatch, texts_of(asked, plain), [0, 1, 2])
    fails = iter([number % 3 == 1 for number in range(10_000)])

    def broken(self: Recurrence, *given: Any) -> None:
        rewind(self, *given)
        if next(fails):
            raise MemoryError("no memory for the kept inputs")

    monkeypatch.setattr(Recurrence, "rewind", broken)
    assert scored(engine, asked) == plain
    assert not engine.counters.failed_steps


# ---- the pool -----------------------------------------------------------------------------------


@st.composite
def operations(draw: st.DrawFn) -> list[tuple[str, int]]:
    kinds = st.sampled_from(["allocate", "release", "share", "publish", "find", "forget"])
    return draw(st.lists(st.tuples(kinds, st.integers(0, 9)), max_size=80))


@given(places=st.integers(2, 7), steps=operations())
def test_a_place_is_free_snapshot_or_held_and_never_two_of_these(
    places: int, steps: list[tuple[str, int]]
) -> None:
    pool, held = StatePool(places), list[int]()
    kept: dict[bytes, int] = {}
    for kind, number in steps:
        key = bytes([number])
        if kind == "allocate":
            if set(held) == set(range(1, places)):
                with pytest.raises(RuntimeError, match="no place"):
                    pool.allocate()
                continue
            place = pool.allocate()
            assert place not in {0, *held}
            held.append(place)
            kept = {one: where for one, where in kept.items() if where != place}
        elif kind == "release" and held:
            pool.release(held.pop(number % len(held)))
        elif kind == "share" and held:
            held.append(pool.share(held[number % len(held)]))
        elif kind == "publish" and held:
            place = held[number % len(held)]
            if place not in kept.values():
                pool.publish(place, key)
                kept.setdefault(key, place)
        elif kind == "forget":
            pool.forget(key)
            kept.pop(key, None)
        elif kind == "find":
            assert pool.longest([key]) == ((1, kept[key]) if key in kept else (0, 0))
        assert pool.snapshots == len(kept)


def test_a_question_whether_a_state_is_kept_is_no_use_of_it() -> None:
    pool = StatePool(3)
    for key in (b"older", b"newer"):
        pool.publish(place := pool.allocate(), key)
        pool.release(place)
    assert pool.holds(b"older")
    assert not pool.holds(b"another")
    pool.allocate()
    assert not pool.holds(b"older"), "the least recently used one"
    assert pool.holds(b"newer")
