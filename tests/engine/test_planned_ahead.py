"""The next step is planned while an accelerator computes one; here the CPU's kernels stand in for it.

Nothing that a row gets may change: its text is that of an engine that plans one step after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.harness import Lab
from tests.tiny import ADAPTERS, save_base

from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.engine import engine as engine_module
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.batch import Packer, StepBatch
from onebase_engine.engine.drafts import Drafts
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.sequence import StepPlan

ENDS = list(range(5, 320, 9))
"""Tokens with which texts end: one of nine."""


@dataclass(frozen=True)
class Asked:
    """One request. `at`: the step before which it comes, `cancelled`: so many steps later it is cancelled."""

    prompt: tuple[int, ...]
    adapter: int | None
    sampling: protocol.Sampling
    n: int
    tenant: str
    background: bool
    at: int
    cancelled: int | None


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen3_5", marks=pytest.mark.full)])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("ahead")
    settings = BaseSettings(
        save_base(request.param, folder / "base"), quantization="nf4", dtype=torch.bfloat16
    )
    return Lab.create(load_base(settings), folder)


@pytest.fixture
def fills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each step that was packed while another was computed, and then computed as it was."""
    found: list[int] = []
    fill = Packer.fill

    def counted(batch: Any, plan: Any) -> None:
        found.append(len(plan.segments))
        fill(batch, plan)

    monkeypatch.setattr(Packer, "fill", staticmethod(counted))
    return found


def ahead(engine: Engine) -> Engine:
    engine._async_scheduling = True
    return engine


def serve(engine: Engine, asked: list[Asked]) -> dict[str, list[Any]]:
    """Of each choice its tokens, logprobs, and how it ended."""
    found: dict[str, list[Any]] = {}
    step = 0
    engine._compute_apart = None  # type: ignore[assignment, method-assign]  # no step may fail
    while engine.busy or step <= max(one.at for one in asked):
        for number, one in enumerate(asked):
            if one.at == step:
                refs = [] if one.adapter is None else [protocol.AdapterRef(f"digest{one.adapter}")]
                engine.submit(
                    protocol.Submit(
                        id=str(number),
                        prompt=list(one.prompt),
                        sampling=one.sampling,
                        adapters=refs,
                        n=one.n,
                        tenant=one.tenant,
                        background=one.background,
                    )
                )
            if one.cancelled is not None and one.at + one.cancelled == step:
                engine.cancel(protocol.Cancel(str(number)))
        engine.step()
        for output in engine.take_outputs():
            got = found.setdefault(f"{output.id}/{output.choice}", [[], [], None, output.prompt_logprobs])
            got[0] += output.tokens
            got[1] += output.logprobs or []
            got[2] = output.finish
            assert output.error_message is None, output.error_message
        step += 1
        assert step < 3000, "the engine makes no progress"
    assert engine.pool.free == engine.pool.capacity
    assert engine.slots.used == 0
    assert not engine.scheduler.sequences
    return found


SAMPLINGS = st.builds(
    protocol.Sampling,
    temperature=st.sampled_from([0.0, 1.0, 1.0]),
    top_p=st.sampled_from([1.0, 0.9]),
    seed=st.integers(0, 5),
    max_tokens=st.integers(1, 30),
    stop_token_ids=st.sampled_from([[], ENDS]),
    logprobs=st.sampled_from([None, None, None, 2]),
    prompt_logprobs=st.sampled_from([None, None, None, 0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    ignore_eos=st.just(True),
    thought=st.sampled_from([None, None, protocol.ThoughtBudget(3, 310)]),
)
REQUESTS = st.builds(
    Asked,
    prompt=st.builds(
        lambda first, length: tuple((first * 60 + place * place) % 313 + 3 for place in range(length)),
        st.integers(0, 2),
        st.sampled_from([1, 2, 17, 33, 60]),
    ),
    adapter=st.sampled_from([None, *range(len(ADAPTERS))]),
    sampling=SAMPLINGS,
    n=st.sampled_from([1, 1, 1, 2]),
    tenant=st.sampled_from(["a", "b"]),
    background=st.sampled_from([False, False, True]),
    at=st.integers(0, 12),
    cancelled=st.sampled_from([None, None, None, 0, 1, 7]),
)
ENGINES = st.sampled_from(
    [
        {},
        {"step_tokens": 20, "slots": 2},
        {"kv_blocks": 26, "block_size": 4, "host_blocks": 40, "max_sequences": 8},
        {"kv_blocks": 60, "block_size": 2, "max_sequences": 6, "draft_tokens": 4},
        {"draft_tokens": 5},
        {"max_sequences": 2},
    ]
)


@given(asked=st.lists(REQUESTS, min_size=1, max_size=14), changes=ENGINES)
@settings(max_examples=25, deadline=None)
def test_rows_get_the_same_whether_steps_are_planned_ahead(
    lab: Lab, asked: list[Asked], changes: dict[str, int]
) -> None:
    if "kv_blocks" in changes:
        most = (changes["kv_blocks"] - 2) * changes["block_size"]
        asked = [one for one in asked if len(one.prompt) + one.sampling.max_tokens <= most]
    if not asked:
        return
    expected = serve(lab.engine(), asked)
    got = serve(ahead(lab.engine(**changes)), asked)
    assert got.keys() == expected.keys()
    for key, found in got.items():
        number = int(key.split("/")[0])
        if asked[number].cancelled is None:
            assert found == expected[key]
        else:
            length = min(len(found[0]), len(expected[key][0]))
            assert found[0][:length] == expected[key][0][:length]


@given(asked=st.lists(REQUESTS, min_size=1, max_size=6), changes=ENGINES)
@settings(max_examples=15, deadline=None)
def test_a_batch_that_goes_on_in_place_is_what_packing_its_step_makes(
    lab: Lab, asked: list[Asked], changes: dict[str, int]
) -> None:
    most = (changes.get("kv_blocks", 1000) - 2) * changes.get("block_size", 4)
    asked = [one for one in asked if len(one.prompt) + one.sampling.max_tokens <= most]
    if not asked:
        return
    engine = lab.engine(**changes)
    packer = engine._packer
    advance = packer.advance

    def compared(plan: StepPlan) -> StepBatch | None:
        batch, last = advance(plan), packer._last
        if batch is None:
            return None
        made = packer.pack(plan, engine.slots.slot_of)
        packer._last = last
        assert made.contexts.runs is None
        for one, other in ((batch, made), (batch.contexts, made.contexts)):
            for name, array in vars(one).items():
                if isinstance(array, np.ndarray):
                    assert np.array_equal(array, getattr(other, name)), name
        assert (batch.token_map, batch.logit_map) == (made.token_map, made.logit_map)
        assert all(one is other for one, other in zip(batch.sampled, made.sampled, strict=True))
        assert not batch.scored
        assert not made.scored
        assert not batch.pooled
        assert not made.pooled
        return batch

    packer.advance = compared  # type: ignore[method-assign]
    serve(engine, asked)


@pytest.mark.parametrize("count", [1, 3])
def test_most_steps_of_a_few_rows_go_on_in_the_same_batch(
    lab: Lab, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[StepPlan] = []
    pack = Packer.pack
    monkeypatch.setattr(Packer, "pack", lambda *given: packed.append(given[1]) or pack(*given))
    engine = lab.engine(block_size=16)
    if engine.model.state_bytes:
        pytest.skip("recurrent states have other places in each step")
    sampling = protocol.Sampling(temperature=0.0, max_tokens=32, ignore_eos=True)
    serve(engine, [Asked((5, 6, 7 + i), i, sampling, 1, "a", False, 0, None) for i in range(count)])
    assert engine.counters.steps == 32
    assert len(packed) == 2 + 2  # the prompts, the first step after them, and two ends of blocks
    assert all(len(plan.segments) == count for plan in packed)


def test_a_step_is_packed_while_the_one_before_is_computed_until_a_row_comes_or_ends(
    lab: Lab, fills: list[int]
) -> None:
    sampling = protocol.Sampling(temperature=0.0, max_tokens=20, ignore_eos=True)
    asked = [Asked((5, 6, 7 + i), i, sampling, 1, "a", False, 4 * i, None) for i in range(3)]
    engine = ahead(lab.engine())
    expected = serve(lab.engine(), asked)
    assert serve(engine, asked) == expected
    # But for the first step of all, each that computes is one that was planned ahead; a row that comes is
    # in the second step from then.
    assert fills == [1] * 4 + [2] * 4 + [3] * 11 + [2] * 5 + [1] * 4
    assert engine.counters.steps == len(fills) + 1


def test_a_tenant_is_charged_for_no_step_that_a_row_which_ended_was_planned_in(lab: Lab) -> None:
    charged, ends = list[float](), list(range(320))
    for engine in (lab.engine(), ahead(lab.engine())):
        for name, stops in (("long", []), ("short", ends), ("cancelled", [])):
            sampling = protocol.Sampling(max_tokens=9, ignore_eos=True, stop_token_ids=stops)
            engine.submit(protocol.Submit(id=name, prompt=[5, 6], sampling=sampling))
        tenant = engine.scheduler.waiting.flow(engine.scheduler.sequences[0]).tenant
        before = tenant.counter
        engine.step()
        engine.cancel(protocol.Cancel("cancelled"))
        while engine.busy:
            engine.step()
        charged.append(tenant.counter - before)
    assert charged == [3 * 2 + 2 * (9 + 1 + 1)] * 2


def test_who_comes_does_not_wait_for_a_step_of_the_background_that_was_planned_before(lab: Lab) -> None:
    engine = ahead(lab.engine())
    sampling = protocol.Sampling(max_tokens=9, ignore_eos=True)
    engine.submit(protocol.Submit(id="batch", prompt=[5] * 300, sampling=sampling, background=True))
    for _ in range(2):
        engine.step()
    engine.take_outputs()
    engine.submit(protocol.Submit(id="chat", prompt=[5, 6], sampling=sampling))
    engine.step()
    assert [output.id for output in engine.take_outputs()] == ["chat"]


@pytest.mark.parametrize("changes", [{"max_sequences": 3}, {"slots": 1}, {"kv_blocks": 2 + 3}])
def test_a_row_that_ends_gives_its_place_and_nobody_else_does(lab: Lab, changes: dict[str, int]) -> None:
    """Its place, slot and blocks are there for the step that is planned while its last token is drawn."""
    engine = ahead(lab.engine(**changes))

    def ask(name: str, most: int, adapter: int | None, tenant: str) -> None:
        sampling = protocol.Sampling(max_tokens=most, ignore_eos=True)
        refs = [] if adapter is None or "slots" not in changes else [protocol.AdapterRef(f"digest{adapter}")]
        one = protocol.Submit(id=name, prompt=[5], sampling=sampling, adapters=refs, tenant=tenant)
        engine.submit(one)

    for name, most, adapter in (("a", 8, 0), ("b", 14, None), ("c", 14, None)):
        ask(name, most, adapter, "flood")
    for _ in range(7):
        engine.step()
    ask("d", 2, 1, "other")
    engine.take_outputs()
    engine.step()
    engine.step()
    outputs = engine.take_outputs()
    assert [output.id for output in outputs if output.finish] == ["a"]
    assert [output.id for output in outputs if output.id in "cd"] == ["c", "c", "d"]
    while engine.busy:
        engine.step()
    assert engine.stats().preemptions == engine.scheduler.yielded == 0
    assert engine.pool.free == engine.pool.capacity


def test_a_step_that_cannot_be_packed_ahead_is_packed_when_it_begins(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = protocol.Sampling(seed=3, max_tokens=9, ignore_eos=True)
    asked = [Asked((5, 6 + i), None, sampling, 1, "a", False, 0, None) for i in range(2)]
    expected, pack, failures = serve(lab.engine(), asked), Packer.pack, 0

    def failing(self: Packer, plan: Any, slot_of: Any) -> Any:
        nonlocal failures
        if any(segment.sequence.drawing for segment in plan.segments):
            failures += 1
            raise MemoryError("no memory for so many rows")
        return pack(self, plan, slot_of)

    monkeypatch.setattr(Packer, "pack", failing)
    assert serve(ahead(lab.engine()), asked) == expected
    assert failures == 8


@pytest.mark.parametrize("lab", ["llama", "qwen3_5"], indirect=True)
def test_drafts_that_pay_are_looked_for_when_the_last_token_is_known(lab: Lab) -> None:
    sampling = protocol.Sampling(
        temperature=0.0, max_tokens=60, ignore_eos=True, logit_bias={9: 50.0, 11: 50.0}
    )
    asked = [Asked((9, 11, 9, 11, 9, 11), None, sampling, 1, "a", False, 0, None)]
    plain, drafting = lab.engine(), ahead(lab.engine(draft_tokens=5))
    assert serve(drafting, asked) == serve(plain, asked)
    if drafting.model.kernels.drafts:
        assert drafting.counters.right_draft_tokens > 20
        assert drafting.counters.steps < plain.counters.steps


@pytest.mark.parametrize("lab", ["llama"], indirect=True)
def test_drafts_do_not_take_a_step_beyond_the_rows_from_which_on_it_is_dearer(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = protocol.Sampling(
        temperature=0.0, max_tokens=40, ignore_eos=True, logit_bias={9: 50.0, 11: 50.0}
    )
    asked = [Asked((9, 11, 9, 11, 9, 11), None, sampling, 1, name, False, 0, None) for name in "ab"]
    engine = lab.engine(draft_tokens=5)
    if not engine.model.kernels.drafts:
        pytest.skip("these kernels have no drafts")
    monkeypatch.setattr(
        engine.scheduler, "limits", replace(engine.scheduler.limits, draft_cost=0.005, draft_rows=5)
    )
    rows: list[int] = []
    pack = engine._packer.pack

    def noted(plan: Any, slot_of: Any) -> Any:
        if not plan.prefills:
            rows.append(sum(segment.length for segment in plan.decodes))
        return pack(plan, slot_of)

    monkeypatch.setattr(engine._packer, "pack", noted)
    assert serve(engine, asked) == serve(lab.engine(), asked)
    assert max(rows) == 5


@pytest.mark.parametrize("lab", ["llama"], indirect=True)
def test_rows_whose_drafts_do_not_pay_learn_when_they_would(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = protocol.Sampling(temperature=0.0, max_tokens=40, ignore_eos=True)
    asked = [Asked((9, 11, 9, 11, 9, 11), None, sampling, 1, "a", False, 0, None)]
    learned: list[list[float]] = []
    for engine in (lab.engine(draft_tokens=5), ahead(lab.engine(draft_tokens=5))):
        if not engine.model.kernels.drafts:
            pytest.skip("these kernels have no drafts")
        known: list[float] = []
        observe = Drafts.observe

        def noted(self: Drafts, drawn: Any, known: list[float] = known, observe: Any = observe) -> None:
            observe(self, drawn)
            known.append(self.right)

        with monkeypatch.context() as patch:
            patch.setattr(Drafts, "misses", lambda self, rows, cost: True)
            patch.setattr(Drafts, "observe", noted)
            serve(engine, asked)
        learned.append(known)
    assert learned[0] == learned[1]
    assert len(set(learned[0])) > 1


def test_what_the_caller_does_meanwhile_is_done_once_a_step_before_it_is_waited_for(lab: Lab) -> None:
    engine, order = ahead(lab.engine()), list[str]()
    draw = engine.model.kernels.draw

    def noted(*args: Any) -> Any:
        order.append("begun")
        read = draw(*args)
        return lambda: order.append("read") or read()

    engine.model.kernels = type("Noted", (), {"draw": staticmethod(noted)})()  # type: ignore[assignment]
    engine.submit(
        protocol.Submit(id="x", prompt=[5], sampling=protocol.Sampling(max_tokens=2, ignore_eos=True))
    )
    for _ in range(3):
        engine.step(lambda: order.append("meanwhile"))
    assert order == ["begun", "meanwhile", "read"] * 2 + ["meanwhile"]


@pytest.mark.parametrize("kind", ["scored", "pooled"])
def test_what_the_caller_does_meanwhile_waits_for_no_scores_and_no_hidden_states(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    engine, order = ahead(lab.engine()), list[str]()

    def noted(whole: Any) -> Any:
        return lambda *args: order.append("read") or whole(*args)

    for name in ("score_tokens", "_exactly"):
        monkeypatch.setattr(engine_module, name, noted(getattr(engine_module, name)))
    scores = 0 if kind == "scored" else None
    pooling = protocol.Pooling("last") if kind == "pooled" else None
    sampling = protocol.Sampling(max_tokens=1, prompt_logprobs=scores)
    engine.submit(protocol.Submit(id="x", prompt=[5, 6], sampling=sampling, pooling=pooling))
    engine.step(lambda: order.append("meanwhile"))
    assert order == ["meanwhile", "read"]
    assert not engine.busy


def failing_reads(engine: Engine, which: set[int]) -> None:
    """Have these reads of drawn tokens fail, from 1."""
    draw, reads = engine.model.kernels.draw, 0

    def failing(logits: Any, draws: Any, allowed: Any) -> Any:
        read = draw(logits, draws, allowed)

        def fails() -> Any:
            nonlocal reads
            reads += 1
            if reads in which:
                raise torch.OutOfMemoryError("out of luck")
            return read()

        return fails

    engine.model.kernels = type("Failing", (), {"draw": staticmethod(failing)})()  # type: ignore[assignment]


def test_tokens_that_cannot_be_read_are_read_again_where_there_is_more_memory(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = protocol.Sampling(seed=3, max_tokens=9, ignore_eos=True)
    asked = [Asked((5, 6 + i), None, sampling, 1, "a", False, 0, None) for i in range(2)]
    expected, engine = serve(lab.engine(), asked), ahead(lab.engine())
    failing_reads(engine, {3, 4, 5})  # all rows of a step, then each alone
    given = list[bool]()
    monkeypatch.setattr(engine.model, "release_memory", lambda: given.append(True))
    assert serve(engine, asked) == expected
    assert given == [True]


def test_tokens_that_can_never_be_read_end_their_rows_and_no_others(lab: Lab) -> None:
    engine = ahead(lab.engine())
    failing_reads(engine, set(range(3, 9)))
    sampling = protocol.Sampling(temperature=0.0, max_tokens=9, ignore_eos=True)
    for name in "ab":
        engine.submit(protocol.Submit(id=name, prompt=[5, 6], sampling=sampling))
    for _ in range(3):
        engine.step()
    engine.submit(protocol.Submit(id="c", prompt=[5, 6], sampling=sampling))
    outputs = engine.take_outputs()
    while engine.busy:
        engine.step()
        outputs += engine.take_outputs()
    ends = {output.id: output.error_code for output in outputs if output.finish}
    assert ends == {"a": "step_failed", "b": "step_failed", "c": None}
    assert engine.counters.failed_steps == 1, "an engine whose steps all fail is to end"
    assert engine.pool.free == engine.pool.capacity
