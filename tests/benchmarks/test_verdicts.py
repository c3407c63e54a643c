"""The figures and the leak verdict: they must say what the samples and snapshots hold, and nothing kinder."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.figures import Run, equal_texts, summarize
from bench.report import percentile
from bench.soak import Answer, ContractError, Plan, Planner, ProcessStats, Snapshot, check, compare
from bench.stream import Sample

MIB = 2**20
IDLE = Snapshot(
    {"rows_running": 0, "rows_waiting": 0, "kv_blocks_free": 10, "kv_blocks_total": 10, "preemptions": 3},
    [ProcessStats(1, "api", 100 * MIB, 15), ProcessStats(2, "engine", 900 * MIB, 7)],
)


def changed(**counters: int) -> Snapshot:
    return replace(IDLE, counters=IDLE.counters | counters)


def with_engine(**values: int) -> Snapshot:
    return replace(IDLE, processes=[IDLE.processes[0], replace(IDLE.processes[1], **values)])


def test_an_idle_server_that_gave_everything_back_does_not_leak() -> None:
    assert compare(IDLE, with_engine(rss=930 * MIB), 64 * MIB) == []


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (changed(kv_blocks_free=9), "not idle"),
        (changed(rows_running=1), "not idle"),
        (changed(rows_waiting=1), "not idle"),
        (changed(requests=1), "not idle"),
        (changed(kv_blocks_total=9, kv_blocks_free=9), "kv_blocks_total went from 10 to 9"),
        (changed(restarts=1), "restarts went from None to 1"),
        (with_engine(rss=965 * MIB), "engine grew by 65 MiB"),
        (with_engine(descriptors=8), "engine has 8 descriptors, had 7"),
        (with_engine(pid=3), "processes are not the same"),
    ],
)
def test_each_kind_of_leak_is_named(after: Snapshot, message: str) -> None:
    assert any(message in leak for leak in compare(IDLE, after, 64 * MIB))


@pytest.mark.parametrize(("share", "value"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.0, 1)])
def test_percentiles_are_by_nearest_rank(share: float, value: int) -> None:
    assert percentile(range(100, 0, -1), share) == value


def sample(ttft: float, text: str = "") -> Sample:
    return Sample(started=0.0, ttft=ttft, ended=ttft + 6.3, tokens=64, text=text)


def test_throughput_is_the_median_of_rounds_and_latency_is_over_all_streams() -> None:
    runs = [Run("x", "mixed", n, speed, [sample(n)]) for n, speed in ((1, 10.0), (2, 500.0), (3, 30.0))]
    figures = summarize(runs)["mixed"]["x"]
    assert figures.tokens_per_second == 30.0
    assert (figures.ttft_p50, figures.ttft_p99) == (2, 3)
    assert figures.tpot_p50 == pytest.approx(0.1)


def test_texts_are_compared_stream_by_stream_within_a_round() -> None:
    runs = [
        Run("x", "single", 1, 1.0, [sample(1, "a"), sample(1, "b")]),
        Run("peft", "single", 1, 1.0, [sample(1, "b"), sample(1, "b")]),
        Run("x", "single", 2, 1.0, [sample(1, "c")]),
    ]
    assert equal_texts(runs, "x", "peft") == {"single": (1, 2)}


def answer(text: str, finish: str, tokens: int) -> Answer:
    return Answer({0: text}, {0: finish}, {"completion_tokens": tokens})


BODY = {"prompt": "p", "max_tokens": 4, "ignore_eos": True}


@pytest.mark.parametrize(
    ("plan", "wrong"),
    [
        (Plan(BODY), answer("a", "length", 3)),
        (Plan(BODY | {"ignore_eos": False}), answer("a", "length", 5)),
        (Plan(BODY | {"n": 2}), answer("a", "length", 8)),
        (Plan(BODY), answer("a", "cancelled", 4)),
        (Plan(BODY), answer("a", "error", 4)),
        (Plan(BODY, text=("b",)), answer("a", "length", 4)),
    ],
)
def test_an_answer_that_breaks_the_contract_fails_the_soak(plan: Plan, wrong: Answer) -> None:
    check(answer("a", "length", 4), Plan(BODY, text=("a",)))
    with pytest.raises(ContractError):
        check(wrong, plan)


def test_the_soak_asks_for_every_kind_of_thing() -> None:
    planner = Planner(["a0", "a1", "a2"], seed=0)
    plans = [planner.plan() for _ in range(500)]
    fields = {name for plan in plans for name in plan.body}
    assert {"messages", "adapter", "n", "stop", "logprobs", "echo", "seed", "timeout_s"} <= fields
    assert {type(plan.body.get("adapter")) for plan in plans} == {type(None), str, list}
    assert any(not plan.valid for plan in plans)
    assert any(plan.leave_after_events is not None for plan in plans)
    assert any(plan.leave_after_seconds is not None for plan in plans)
