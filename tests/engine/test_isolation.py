"""A row's numbers are its own: bit for bit the same whatever happens around it."""

from __future__ import annotations

from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from peft import PeftModel
from tests.device import DEVICE
from tests.engine.harness import Lab, Request, requests, run, submission
from tests.oracle import greedy
from tests.tiny import load_folder, save_adapter, save_base

from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.base.view import view
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.drafts import MATCHED, Drafts
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.kv_cache import BlockPool
from onebase_engine.engine.model import ServedModel
from onebase_engine.engine.sequence import StepPlan
from onebase_engine.kernels import reference

Scores = list[list[protocol.ScoredToken]]
PRECISIONS = {
    "fp32": {"quantization": "none", "dtype": torch.float32},
    "nf4": {"quantization": "nf4", "dtype": torch.bfloat16},
    "int8": {"quantization": "int8", "dtype": torch.bfloat16},
}


@pytest.fixture(
    scope="module", params=["nf4", *(pytest.param(one, marks=pytest.mark.full) for one in ("fp32", "int8"))]
)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp(request.param)
    settings = BaseSettings(save_base("llama", folder / "base"), **PRECISIONS[request.param], device=DEVICE)
    return Lab.create(load_base(settings), folder)


def scored(engine: Engine, asked: list[Request], **changes: object) -> Scores:
    """Serve the requests together and return every token with its logprobs, floats as they are."""
    found: dict[str, list[protocol.ScoredToken]] = {}
    for i, request in enumerate(asked):
        message = submission(str(i), request)
        settings = {f: getattr(message.sampling, f) for f in message.sampling.__struct_fields__}
        sampling = protocol.Sampling(**{**settings, "logprobs": 4, **changes})
        engine.submit(
            protocol.Submit(
                id=message.id,
                prompt=message.prompt,
                sampling=sampling,
                adapters=message.adapters,
                tenant=message.tenant,
            )
        )
        if i % 3 == 0:
            engine.step()
    collect(engine, found)
    return [found[str(i)] for i in range(len(asked))]


def collect(engine: Engine, found: dict[str, list[protocol.ScoredToken]]) -> None:
    """Step until nothing is left to do; every token's logprobs go to `found`."""
    while True:
        for output in engine.take_outputs():
            assert output.error_message is None, output.error_message
            found.setdefault(output.id, []).extend(output.logprobs or [])
        if not engine.busy:
            return
        engine.step()


ASKED = requests(17, seed=3, longest=90)
LONGER = requests(17, seed=3, longest=40, tokens=24)


@pytest.fixture(scope="module")
def plain_longer(lab: Lab) -> Scores:
    """The same of LONGER, for which a tight engine has no room."""
    return scored(lab.engine(), LONGER)


@pytest.fixture(scope="module")
def plain(lab: Lab) -> Scores:
    """What the rows of ASKED get together, in an engine with room for all."""
    return scored(lab.engine(), ASKED)


def test_logprobs_are_bit_equal_alone_and_in_any_company(lab: Lab, plain: Scores) -> None:
    alone = [scored(lab.engine(), [request])[0] for request in ASKED[:6]]
    assert alone == plain[:6]
    assert scored(lab.engine(), ASKED[::-1])[::-1] == plain


def test_logprobs_are_bit_equal_under_any_chunking(lab: Lab, plain: Scores) -> None:
    for step_tokens in (7, 33, 512):
        assert scored(lab.engine(step_tokens=step_tokens), ASKED) == plain, step_tokens
    assert scored(lab.engine(step_tokens=1), ASKED[:4]) == plain[:4]


def test_logprobs_are_bit_equal_when_decodes_attend_in_groups(
    lab: Lab, plain: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "MAX_DECODE_CONTEXT", 150)
    assert scored(lab.engine(), ASKED) == plain


def test_decodes_are_grouped_so_that_one_long_row_does_not_lengthen_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "MAX_DECODE_CONTEXT", 100)
    assert reference._decode_groups([]) == []
    assert reference._decode_groups([25] * 4) == [(0, 4)]
    assert reference._decode_groups([25] * 5) == [(0, 4), (4, 5)]
    assert reference._decode_groups([10, 10, 500, 10, 10]) == [(0, 2), (2, 3), (3, 5)]


def test_logprobs_are_bit_equal_after_preemption(lab: Lab, plain_longer: Scores) -> None:
    tight = lab.engine(kv_blocks=52, block_size=2)
    assert scored(tight, LONGER) == plain_longer
    assert tight.scheduler.preemptions > 0


def test_logprobs_are_bit_equal_after_giving_a_place_to_another_tenant(lab: Lab, plain: Scores) -> None:
    asked = [replace(request, tenant=f"tenant {i // 6}") for i, request in enumerate(ASKED)]
    full = lab.engine(max_sequences=3)
    assert scored(full, asked) == plain
    assert full.scheduler.yielded > 0


def test_logprobs_are_bit_equal_with_and_without_prefix_hits(lab: Lab, plain: Scores) -> None:
    engine = lab.engine()
    assert scored(engine, ASKED) == plain
    assert engine.counters.cached_tokens == 0
    assert scored(engine, ASKED) == plain
    assert engine.counters.cached_tokens > 200


def test_logprobs_do_not_depend_on_which_slot_an_adapter_sits_in(lab: Lab, plain: Scores) -> None:
    engine = lab.engine(slots=3)
    shuffled = [Request((5, 6, 7), adapter, 2) for adapter in (14, 12, 9, 7, 5, 3)]
    run(engine, shuffled)
    assert scored(engine, ASKED) == plain


def test_sampled_text_is_a_function_of_request_and_seed(lab: Lab) -> None:
    settings = {"temperature": 0.9, "top_p": 0.95, "seed": 11}
    together = scored(lab.engine(), ASKED, **settings)
    assert scored(lab.engine(step_tokens=9), ASKED[:5], **settings) == together[:5]
    other = scored(lab.engine(), ASKED, **{**settings, "seed": 12})
    assert [s for s, o in zip(together, other, strict=True) if s != o]


def test_a_row_that_goes_on_from_its_tokens_says_what_it_would_have_said(lab: Lab) -> None:
    sampling = protocol.Sampling(seed=11, temperature=1.1, presence_penalty=0.6, max_tokens=24, logprobs=4)
    submit = protocol.Submit(
        id="x", prompt=list(range(3, 43)), sampling=sampling, adapters=[protocol.AdapterRef("digest1")], n=3
    )

    def rows(engine: Engine, asked: protocol.Submit) -> dict[int, list[protocol.ScoredToken]]:
        engine.submit(asked)
        found: dict[int, list[protocol.ScoredToken]] = {}
        while engine.busy:
            engine.step()
            for output in engine.take_outputs():
                assert output.error_message is None, output.error_message
                assert (output.cached_tokens or 0) <= len(asked.prompt)
                found.setdefault(output.choice, []).extend(output.logprobs or [])
        return found

    warm = lab.engine()
    whole = rows(warm, submit)
    for engine in (lab.engine(), lab.engine(step_tokens=9), warm):
        begun = {choice: [one.token for one in whole[choice][:made]] for choice, made in ((0, 5), (2, 20))}
        again = rows(engine, structs.replace(submit, resume_tokens=begun))
        assert again == {choice: whole[choice][len(tokens) :] for choice, tokens in begun.items()}


def test_a_row_goes_on_only_from_what_it_may_have_said(lab: Lab) -> None:
    engine = lab.engine()
    sampling = protocol.Sampling(max_tokens=4)
    for begun in ({0: [5] * 4}, {2: []}, {-1: []}, {0: [-1]}, {0: [10**6]}):
        engine.submit(protocol.Submit(id="x", prompt=[5, 6], sampling=sampling, n=2, resume_tokens=begun))
        (output,) = engine.take_outputs()
        assert output.error_code in ("cannot_go_on", "token_out_of_range"), begun
        assert not engine.busy


def test_prefix_blocks_are_shared_only_between_equal_adapters_and_tenants(lab: Lab) -> None:
    prompt = tuple(range(3, 83))
    engine = lab.engine()

    def cached(adapters: list[protocol.AdapterRef], tenant: str = "default") -> int | None:
        sampling = protocol.Sampling(temperature=0.0, max_tokens=1)
        engine.submit(
            protocol.Submit(id="x", prompt=list(prompt), sampling=sampling, adapters=adapters, tenant=tenant)
        )
        while engine.busy:
            engine.step()
        return engine.take_outputs()[0].cached_tokens

    one, half = protocol.AdapterRef("digest1"), protocol.AdapterRef("digest1", 0.5)
    assert cached([]) == 0
    assert cached([]) == 64, "a whole number of blocks, and at least one token is computed"
    assert cached([one]) == 0
    assert cached([half]) == 0
    assert cached([half, half]) == 64, "duplicates are summed"
    assert cached([one, protocol.AdapterRef("digest2", 0.0)]) == 64, "zeros are dropped"
    assert cached([one], tenant="other") == 0


def test_an_adapter_that_overflows_fails_alone(lab: Lab, plain: Scores, tmp_path: Path) -> None:
    engine = lab.engine()
    settings = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"]}
    for name, std in (("huge", 1e6), ("overflowing", 3e37)):
        folder = save_adapter(lab.base, settings, tmp_path / name, seed=1, std=std)
        engine.put_adapter(name, load_folder(lab.base, folder).weights)
        sampling = protocol.Sampling(temperature=0.0, max_tokens=200, ignore_eos=True)
        for i in range(2):
            engine.submit(
                protocol.Submit(
                    id=f"{name}{i}",
                    prompt=[5, 6, 7] * 9,
                    sampling=sampling,
                    adapters=[protocol.AdapterRef(name)],
                )
            )
    found: dict[str, list[protocol.ScoredToken]] = {}
    failed = set()
    for i, request in enumerate(ASKED):
        message = submission(str(i), request)
        sampling = protocol.Sampling(
            temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True, logprobs=4
        )
        engine.submit(
            protocol.Submit(id=str(i), prompt=message.prompt, sampling=sampling, adapters=message.adapters)
        )
    while engine.busy:
        engine.step()
        for output in engine.take_outputs():
            found.setdefault(output.id, []).extend(output.logprobs or [])
            if output.error_code:
                failed.add((output.id, output.error_code))
    assert [found[str(i)] for i in range(len(ASKED))] == plain
    assert {("overflowing0", "not_finite"), ("overflowing1", "not_finite")} <= failed
    assert all(name.startswith(("huge", "overflowing")) for name, _ in failed)
    assert scored(engine, ASKED) == plain, "nothing of it is left in blocks or slots"


def test_a_weighted_list_equals_pefts_concatenated_adapter(lab: Lab) -> None:
    model = PeftModel.from_pretrained(view(lab.base), lab.folders[0], adapter_name="a")
    model.load_adapter(lab.folders[1], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "mix", combination_type="cat")
    model.set_adapter("mix")
    prompts = [request.prompt for request in ASKED[:4]]
    engine = lab.engine()
    refs = [protocol.AdapterRef("digest0", 0.7), protocol.AdapterRef("digest1", -0.4)]
    sampling = protocol.Sampling(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
    for i, prompt in enumerate(prompts):
        engine.submit(protocol.Submit(id=str(i), prompt=list(prompt), sampling=sampling, adapters=refs))
        engine.submit(submission(f"neighbour{i}", ASKED[i]))
    found: dict[str, list[protocol.ScoredToken]] = {}
    collect(engine, found)
    for i, prompt in enumerate(prompts):
        if lab.base.dtype == torch.float32:
            # PEFT folds the weights into A and sums inside one product: equal up to rounding, so that
            # only without bf16 in between no near tie between two tokens can tip.
            assert [entry.token for entry in found[str(i)]] == greedy(model.eval(), list(prompt), 8)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt], device=DEVICE)).logits[0, -1].float()
        first = found[str(i)][0]
        assert first.logprob == pytest.approx(float(torch.log_softmax(logits, -1)[first.token]), abs=0.1)


def test_prompt_logprobs_are_those_of_one_forward_pass_and_skip_the_prefix_cache(lab: Lab) -> None:
    engine = lab.engine(step_tokens=20)
    prompt = list(ASKED[1].prompt)
    run(engine, [Request(tuple(prompt), 0, 1)])
    sampling = protocol.Sampling(temperature=0.0, max_tokens=1, prompt_logprobs=2)
    engine.submit(
        protocol.Submit(id="x", prompt=prompt, sampling=sampling, adapters=[protocol.AdapterRef("digest0")])
    )
    while engine.busy:
        engine.step()
    (output,) = engine.take_outputs()
    assert output.cached_tokens == 0
    assert output.prompt_logprobs is not None
    with torch.inference_mode():
        logits = lab.references[0](input_ids=torch.tensor([prompt], device=DEVICE)).logits[0].float().cpu()
    expected = torch.log_softmax(logits, dim=-1)
    assert [entry.token for entry in output.prompt_logprobs] == prompt[1:]
    found = torch.tensor([entry.logprob for entry in output.prompt_logprobs])
    wanted = expected[torch.arange(len(prompt) - 1), prompt[1:]]
    torch.testing.assert_close(
        found, wanted, atol=0.15 if lab.base.dtype == torch.bfloat16 else 1e-4, rtol=0.02
    )


def test_weights_that_are_unpacked_once_change_no_bit(lab: Lab, plain: Scores) -> None:
    engine = lab.engine(model=ServedModel(lab.base, 8, unpacked=True))
    assert scored(engine, ASKED) == plain


def eight(lab: Lab, **changes: int) -> Engine:
    """An engine that keeps keys and values in int8."""
    return lab.engine(model=ServedModel(lab.base, 8, kv_dtype=torch.int8), **changes)


def test_logprobs_over_an_int8_cache_are_as_much_a_rows_own(
    lab: Lab, plain_longer: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = eight(lab)
    expected = scored(engine, LONGER)
    assert expected != plain_longer, "they are rounded"
    assert scored(engine, LONGER) == expected, "after prefix hits"
    assert engine.counters.cached_tokens > 100
    assert scored(eight(lab, step_tokens=9), LONGER) == expected, "in other chunks"
    assert [scored(eight(lab), [request])[0] for request in LONGER[:3]] == expected[:3], "alone"
    guess(monkeypatch, texts_of(LONGER, expected))
    tight = eight(lab, kv_blocks=52, block_size=2, draft_tokens=5)
    assert scored(tight, LONGER) == expected, "after preemption, and where drafts were wrong"
    assert tight.scheduler.preemptions > 0
    check_drafted(tight)


# ---- prefixes in host memory ---------------------------------------------------------------

TIGHT = {"kv_blocks": 38, "block_size": 2, "host_blocks": 300}


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_logprobs_are_bit_equal_over_blocks_that_were_in_host_memory(
    lab: Lab, plain_longer: Scores, kv_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = LONGER[:8]

    def engine(**changes: int) -> Engine:
        return lab.engine(model=ServedModel(lab.base, 8, kv_dtype=kv_dtype), **changes)

    expected = plain_longer[:8] if kv_dtype is None else scored(engine(), asked)
    tight = engine(**TIGHT)
    assert scored(tight, asked) == expected, "the tokens of preempted rows come back"
    assert tight.scheduler.preemptions > 0
    assert tight.counters.restored_tokens > 0
    tight.counters.prompt_tokens = tight.counters.cached_tokens = 0
    assert scored(tight, asked) == expected
    monkeypatch.setattr(BlockPool, "take_moves", partialmethod(BlockPool.take_moves, least=0))
    short = engine(**TIGHT | {"host_blocks": 80, "draft_tokens": 5})
    guess(monkeypatch, texts_of(asked, expected))
    assert scored(short, asked) == expected, "where it is short too, and blocks go there as late as may be"
    for one in (tight, short):
        assert one.pool.free == one.pool.capacity
    assert short.stats().kv_blocks_on_host == 80
    assert short.counters.restored_tokens > 0
    slow, late = engine(**TIGHT), []
    slow.pool._most_back = 1
    whole = slow.pool.late
    slow.pool.late = lambda blocks: late.append(whole(blocks)) or late[-1]  # type: ignore[method-assign]
    assert scored(slow, asked) == expected, "where they come back one in a step"
    assert any(late)


def test_prompts_that_left_the_cache_are_not_computed_again(lab: Lab) -> None:
    prompts = [Request(tuple(range(first, first + 70)), None, 2) for first in (3, 80, 160)]
    computed = []
    for host_blocks in (0, 20):
        engine = lab.engine(kv_blocks=2 + 6, host_blocks=host_blocks)
        for request in (*prompts, *prompts):
            run(engine, [request])
        stats = engine.stats()
        computed.append(stats.prompt_tokens - stats.cached_tokens)
    assert computed == [6 * 70, 3 * 70 + 3 * 6]
    assert (stats.restored_tokens, stats.kv_blocks_on_host, stats.kv_blocks_host_total) == (3 * 64, 12, 20)


def test_blocks_in_host_memory_are_shared_only_between_equal_adapters_and_tenants(lab: Lab) -> None:
    engine = lab.engine(kv_blocks=12, host_blocks=100)
    one = Request(tuple(range(3, 73)), 0, 2)
    others = [replace(one, adapter=1), replace(one, tenant="other"), replace(one, adapter=None), one]
    run(engine, [one])
    for number, request in enumerate(others):
        run(engine, [Request(tuple(range(100 + number, 250 + number)), None, 2)])  # takes every block
        before = engine.counters.restored_tokens
        run(engine, [request])
        assert engine.counters.restored_tokens - before == (64 if request is one else 0), request


# ---- drafts --------------------------------------------------------------------------------

PENALIZED = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}


def guess(monkeypatch: pytest.MonkeyPatch, texts: list[list[int]]) -> None:
    """Make every draft one that goes on as one of the texts does, and every third one wrong somewhere."""

    def propose(
        self: Drafts, tokens: list[int], most: int, forced: list[int], *, drawing: bool = False
    ) -> list[int]:
        text = next((text for text in texts if text[: len(tokens)] == tokens), [])
        draft = text[len(tokens) : len(tokens) + most]
        if len(tokens) % 3 == 0 and len(draft) > 2:
            draft[len(tokens) % 5 % 3] += 1
        return draft

    monkeypatch.setattr(Drafts, "propose", propose)
    monkeypatch.setattr(Drafts, "worth", lambda self, rows, cost: 64)


def texts_of(asked: list[Request], found: list[list[protocol.ScoredToken]]) -> list[list[int]]:
    return [[*request.prompt, *(one.token for one in row)] for request, row in zip(asked, found, strict=True)]


def check_drafted(engine: Engine) -> None:
    assert engine.pool.free == engine.pool.capacity
    if engine.model.kernels.drafts:
        assert 0 < engine.counters.right_draft_tokens < engine.counters.draft_tokens


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"temperature": 0.7, "top_p": 0.9, "seed": 3}, id="sampled"),
        pytest.param({"temperature": 0.3, "seed": 3, "min_tokens": 9, "logit_bias": {7: 4.0}}, id="biased"),
        pytest.param({"temperature": 0.3, "seed": 3, **PENALIZED}, id="penalized"),
    ],
)
def test_tokens_and_logprobs_are_bit_equal_with_drafts_right_and_wrong(
    lab: Lab, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [replace(request, max_tokens=24) for request in ASKED]
    expected = scored(lab.engine(), asked, **settings)
    guess(monkeypatch, texts_of(asked, expected))
    engine = lab.engine(draft_tokens=5)
    assert scored(engine, asked, **settings) == expected
    if settings.keys() & PENALIZED.keys():
        assert not engine.counters.draft_tokens
    elif engine.model.kernels.drafts:
        assert engine.counters.steps < 24, "one step gives several tokens"
        check_drafted(engine)


def test_drafts_change_nothing_where_blocks_and_places_are_few(
    lab: Lab, plain_longer: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    guess(monkeypatch, texts_of(LONGER, plain_longer))
    tight = lab.engine(kv_blocks=52, block_size=2, draft_tokens=5, step_tokens=33)
    assert scored(tight, LONGER) == plain_longer
    assert tight.scheduler.preemptions > 0
    # Blocks that drafts were written to are somebody's prefix now.
    assert scored(tight, LONGER) == plain_longer
    check_drafted(tight)


def test_a_row_ends_within_a_draft_as_it_would_without(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [7, 8, 9, 10, 11, 12] * 5

    def ask(draft_tokens: int, sampling: protocol.Sampling) -> tuple[list[int], str | None, int | None]:
        engine = lab.engine(draft_tokens=draft_tokens)
        engine.submit(protocol.Submit(id="x", prompt=prompt, sampling=sampling))
        while engine.busy:
            engine.step()
        outputs = engine.take_outputs()
        tokens = [token for output in outputs for token in output.tokens]
        assert engine.counters.generated_tokens == len(tokens)
        return tokens, outputs[-1].finish, outputs[-1].stop_token

    whole, _, _ = ask(0, protocol.Sampling(temperature=0.0, max_tokens=40, ignore_eos=True))
    guess(monkeypatch, [prompt + whole])
    for count in range(1, 9):
        sampling = protocol.Sampling(temperature=0.0, max_tokens=count, ignore_eos=True)
        assert ask(6, sampling) == (whole[:count], "length", None)
    for stop in list(dict.fromkeys(whole))[:8]:
        sampling = protocol.Sampling(temperature=0.0, max_tokens=40, ignore_eos=True, stop_token_ids=[stop])
        assert ask(6, sampling) == (whole[: whole.index(stop) + 1], "stop", stop)


def test_a_step_that_fails_with_drafts_is_tried_without(
    lab: Lab, plain: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, expected = ASKED[:4], plain[:4]
    guess(monkeypatch, texts_of(asked, expected))
    engine = lab.engine(draft_tokens=5)
    whole, failures = engine._begin, 0

    def failing(plan: StepPlan, batch: Any) -> Any:
        nonlocal failures
        if any(segment.draft for segment in plan.decodes):
            failures += 1
            raise MemoryError("no memory for so many rows")
        return whole(plan, batch)

    monkeypatch.setattr(engine, "_begin", failing)
    assert scored(engine, asked) == expected
    assert failures or not engine.model.kernels.drafts


@given(tokens=st.lists(st.integers(0, 3), max_size=60), most=st.integers(0, 9), cut=st.integers(0, 60))
def test_a_draft_is_what_came_after_the_last_tokens_before(tokens: list[int], most: int, cut: int) -> None:
    drafts = Drafts()
    drafts.propose(tokens[:cut], most)
    found = drafts.propose(tokens, most)
    places = [end for end in range(MATCHED, len(tokens)) if tokens[end - MATCHED : end] == tokens[-MATCHED:]]
    text = list(tokens)
    for _ in range(most if places else 0):
        text.append(text[places[-1] + len(text) - len(tokens)])
    assert found == text[len(tokens) :]


COST = 0.15
"""Cost of a further row on the CPU."""


def test_drafts_are_left_out_where_they_do_not_pay() -> None:
    drafts = Drafts()
    assert drafts.worth(1, COST) >= drafts.worth(4, COST) >= drafts.worth(64, COST) == 0
    drafts.propose([1, 2, 3, 4, 1, 2, 3], 4)
    for _ in range(40):
        drafts.observe([9])
    assert drafts.worth(1, COST) == 0, "wrong ones"
    for _ in range(40):
        drafts.observe([4, 1, 2, 3])
    assert drafts.worth(16, COST) > 4, "right ones, although none was computed"


def test_drafts_are_longer_where_a_further_row_costs_little() -> None:
    drafts = Drafts()
    assert drafts.worth(16, 0.005) > drafts.worth(16, COST)
    assert drafts.misses(32, COST)
    assert not drafts.misses(32, 0.005)


def test_what_is_forced_is_tried_whatever_was_right_before() -> None:
    drafts = Drafts()
    for _ in range(40):
        drafts.propose([1, 2, 3, 4, 1, 2, 3], 4)
        drafts.observe([9])
    assert drafts.propose([1, 2, 3, 4, 1, 2, 3, 9], 4, [5, 6, 7, 8, 9]) == [5, 6, 7, 8]
    assert drafts.worth(64, COST) > 4
    drafts.observe([1])
    assert drafts.propose([1, 2, 3, 4, 1, 2, 3, 9, 1], 4) == []
    assert drafts.worth(1, COST) == 0
