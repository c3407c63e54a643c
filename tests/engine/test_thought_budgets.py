"""Budgets of thoughts: the token that ends a thought is generated where its budget is spent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.device import DEVICE
from tests.engine.harness import Lab
from tests.tiny import save_base

from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.sampling import forced_end
from onebase_engine.engine.sequence import AdapterMix, DraftedSequence, SequenceState

PROMPT = [5, 6, 7, 8] * 5
END = 300
TOKENS = 20


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("thoughts")
    settings = BaseSettings(save_base("llama", folder / "base"), quantization="nf4", device=DEVICE)
    return Lab.create(load_base(settings), folder)


def submit(engine: Engine, name: str, adapter: int | None, **sampling: Any) -> None:
    given = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True} | sampling
    refs = [] if adapter is None else [protocol.AdapterRef(f"digest{adapter}")]
    resumed = given.pop("resumed", None)
    engine.submit(
        protocol.Submit(
            id=name,
            prompt=PROMPT,
            sampling=protocol.Sampling(**given),
            adapters=refs,
            resume_tokens=None if resumed is None else {0: resumed},
        )
    )


def texts(engine: Engine) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    while engine.busy:
        engine.step()
        for output in engine.take_outputs():
            assert output.error_message is None, output.error_message
            found.setdefault(output.id, []).extend(output.tokens)
    return found


def text(engine: Engine, adapter: int | None, **sampling: Any) -> list[int]:
    submit(engine, "x", adapter, **sampling)
    return texts(engine)["x"]


def budget(tokens: int, end: int = END, begin: int | None = None) -> protocol.ThoughtBudget:
    return protocol.ThoughtBudget(tokens, end, begin)


@pytest.mark.parametrize("adapter", [None, 0, 1])
@pytest.mark.parametrize("spent", [0, 1, 7])
def test_a_thought_ends_when_its_budget_is_spent_and_the_text_goes_on_from_there(
    lab: Lab, adapter: int | None, spent: int
) -> None:
    free = text(lab.engine(), adapter)
    assert END not in free
    got = text(lab.engine(), adapter, thought=budget(spent))
    assert got[: spent + 1] == [*free[:spent], END]
    assert len(got) == TOKENS
    begun = got[: spent + 1]
    assert text(lab.engine(), adapter, resumed=begun) == got[spent + 1 :], "as if it had ended by itself"


def test_a_thought_that_ends_in_time_is_left_alone(lab: Lab) -> None:
    free = text(lab.engine(), None)
    assert text(lab.engine(), None, thought=budget(3, end=free[2])) == free
    assert text(lab.engine(), None, thought=budget(TOKENS)) == free
    assert text(lab.engine(), None, thought=budget(3, begin=END - 1)) == free, "there is no thought at all"


def test_the_budget_begins_behind_the_token_that_begins_the_thought(lab: Lab) -> None:
    free = text(lab.engine(), None)
    first = free.index(free[1])
    got = text(lab.engine(), None, thought=budget(4, begin=free[1]))
    assert got[: first + 6] == [*free[: first + 5], END]


@pytest.mark.parametrize(
    "changes",
    [{}, {"draft_tokens": 5}, {"step_tokens": 7}, {"kv_blocks": 30, "block_size": 4, "max_sequences": 4}],
    ids=["steps", "drafts", "chunks", "preemption"],
)
@pytest.mark.parametrize("ahead", [False, True])
def test_a_budget_changes_no_neighbour_and_no_company_changes_it(
    lab: Lab, changes: dict[str, int], ahead: bool
) -> None:
    asked: list[tuple[int | None, dict[str, Any]]] = [
        (None, {"thought": budget(4)}),
        (0, {"thought": budget(6), "temperature": 1.0, "seed": 3}),
        (1, {}),
        (None, {"temperature": 1.0, "seed": 9}),
        (0, {"thought": budget(9)}),
    ]
    alone = {str(n): text(lab.engine(), adapter, **one) for n, (adapter, one) in enumerate(asked)}
    engine = lab.engine(**changes)
    engine._async_scheduling = ahead
    for number, (adapter, one) in enumerate(asked):
        submit(engine, str(number), adapter, **one)
    assert texts(engine) == alone


def test_a_stream_that_goes_on_elsewhere_spends_the_rest_of_its_budget(lab: Lab) -> None:
    whole = text(lab.engine(), 0, thought=budget(6))
    for cut in (2, 6, 7, 12):
        rest = text(lab.engine(), 0, thought=budget(6), resumed=whole[:cut])
        assert rest == whole[cut:], cut


def test_the_end_of_a_thought_has_its_own_log_probability(lab: Lab) -> None:
    engine = lab.engine()
    submit(engine, "x", None, thought=budget(2), logprobs=0)
    scores = []
    while engine.busy:
        engine.step()
        scores += [score for output in engine.take_outputs() for score in output.logprobs or []]
    assert scores[2].token == END
    assert torch.isfinite(torch.tensor(scores[2].logprob))


def test_a_token_that_the_base_does_not_have_is_refused(lab: Lab) -> None:
    engine = lab.engine()
    submit(engine, "x", None, thought=budget(2, end=1 << 20))
    (refused,) = engine.take_outputs()
    assert (refused.error_code, refused.error_param) == ("token_out_of_range", "thinking_token_budget")


@pytest.mark.parametrize("begin", [None, 9])
def test_the_context_of_a_draft_is_not_copied_once_its_thought_can_end_no_more(
    begin: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = protocol.Sampling(thought=budget(4, begin=begin))

    def drafted(answer: list[int]) -> DraftedSequence:
        whole = SequenceState("x", 0, PROMPT, sampling, AdapterMix(), arrival=0, arrived_at=0.0)
        whole.tokens = [*PROMPT, *answer]
        return DraftedSequence(whole, (1,))

    begun = [] if begin is None else [begin]
    assert forced_end(drafted([*begun, 1, 1, 1])) == END
    copied: list[int] = []
    read = DraftedSequence.tokens.fget
    monkeypatch.setattr(DraftedSequence, "tokens", property(lambda one: copied.append(1) or read(one)))
    assert forced_end(drafted([1])) is forced_end(drafted([*begun, *[1] * 20])) is None
    assert not copied


def test_a_text_that_has_too_few_tokens_is_not_ended_by_the_end_of_its_thought(lab: Lab) -> None:
    free = text(lab.engine(), None)
    thought, least = budget(3), {"min_tokens": 10, "stop_token_ids": [END]}
    assert text(lab.engine(), None, thought=thought, **least) == free
    assert text(lab.engine(), None, thought=budget(10), **least)[:11] == [*free[:10], END]
