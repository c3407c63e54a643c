"""Who is answered by which version, and what figures prove: stable shares, and intervals that hold at all
times."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from onebase_adapters.registry import RolloutRecord
from onebase_protocol.adapters import RolloutJudge, RolloutRules
from onebase_server.adapters.rollout_rules import (
    RequestUnit,
    RolloutSettings,
    chooses_candidate,
    cluster_of,
    compare,
    decide,
    is_refusal,
    observe,
    position,
)


def rollout(
    percent: float = 10.0, *, name: str = "rollout-1", by: str = "caller", **figures: object
) -> RolloutRecord:
    return RolloutRecord(
        id=name, tenant="default", name="a", candidate="b" * 64, baseline="a" * 64, state="running",
        percent=percent, shadow=0.0, settings={"by": by, "rules": {}}, created_at=0.0, created_by="",
        figures=figures,  # type: ignore[arg-type]
    )  # fmt: skip


def unit(user: str, request: str = "") -> RequestUnit:
    return RequestUnit(f"user:{user}", request)


# ---- shares -------------------------------------------------------------------------------------


@given(
    name=some.text(max_size=40), user=some.text(max_size=80), percents=some.tuples(*[some.floats(0, 100)] * 2)
)
def test_a_user_stays_on_its_side_and_a_larger_share_moves_nobody_back(
    name: str, user: str, percents: tuple[float, float]
) -> None:
    small, large = sorted(percents)
    sides = [chooses_candidate(rollout(one, name=name), unit(user)) for one in (small, small, large)]
    assert sides[0] == sides[1]
    assert sides[2] >= sides[0]
    assert 0.0 <= position(name, user) < 1.0
    assert not chooses_candidate(rollout(0.0, name=name), unit(user))
    assert chooses_candidate(rollout(100.0, name=name), unit(user))


@pytest.mark.parametrize("percent", [1.0, 10.0, 50.0])
def test_the_share_of_users_is_the_share_that_was_asked_for(percent: float) -> None:
    users = 20_000
    chosen = sum(chooses_candidate(rollout(percent), unit(f"user-{one}")) for one in range(users))
    expected = users * percent / 100
    assert abs(chosen - expected) < 5 * math.sqrt(expected)


def test_a_small_share_has_users_of_all_clusters() -> None:
    one = rollout(2.0)
    users = [user for user in (unit(f"user-{n}") for n in range(30_000)) if chooses_candidate(one, user)]
    assert len({cluster_of(one, user) for user in users}) == 64


def test_another_rollout_tries_other_users() -> None:
    users = [unit(f"user-{one}") for one in range(2000)]
    first, second = (
        {one.caller for one in users if chooses_candidate(rollout(20.0, name=name), one)}
        for name in ("rollout-1", "rollout-2")
    )
    assert 0.1 < len(first & second) / len(first) < 0.3


def test_requests_can_be_divided_instead_of_callers() -> None:
    of_one = {chooses_candidate(rollout(50.0), unit("ann", str(n))) for n in range(50)}
    of_each = {chooses_candidate(rollout(50.0, by="request"), unit("ann", str(n))) for n in range(50)}
    assert (len(of_one), len(of_each)) == (1, 2)


# ---- figures ------------------------------------------------------------------------------------


def sums(**values: list[float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric, some_values in values.items():
        for value in some_values:
            for figure, amount in observe(metric, value).items():
                found[figure] = found.get(figure, 0.0) + amount
    return found


def verdict(metric: str, active: list[float], candidate: list[float], **rules: float) -> str:
    figures = {"active": sums(**{metric: active}), "candidate": sums(**{metric: candidate})}
    found = compare(figures, RolloutSettings(RolloutRules(**rules), by="request"))  # type: ignore[arg-type]
    return next(one.verdict for one in found if one.metric == metric)


def test_ten_failures_out_of_ten_are_worse_and_nine_say_nothing() -> None:
    assert verdict("errors", [0.0] * 90, [1.0] * 10) == "worse"
    assert verdict("errors", [0.0] * 90, [1.0] * 9) == "undecided"


def test_one_failure_of_ten_is_no_proof_and_no_failure_of_ten_is_none_either() -> None:
    assert verdict("errors", [0.0] * 90, [1.0] + [0.0] * 9) == "undecided"
    assert verdict("errors", [0.0] * 90, [0.0] * 10) == "undecided"
    assert verdict("errors", [0.0] * 9000, [0.0] * 1000) == "not_worse"


def test_what_is_faster_or_liked_more_is_better() -> None:
    noise = random.Random(1)
    slow, fast = ([math.log(base) + noise.gauss(0, 0.3) for _ in range(2000)] for base in (0.2, 0.1))
    assert verdict("first_token", slow, fast) == "better"
    assert verdict("first_token", fast, slow) == "worse"
    assert verdict("feedback", [0.2, 0.4] * 200, [0.8, 1.0] * 200) == "better"
    assert verdict("feedback", [0.8, 1.0] * 200, [0.2, 0.4] * 200) == "worse"


def test_times_are_shown_in_seconds_and_their_difference_as_a_ratio() -> None:
    figures = {
        "active": sums(first_token=[math.log(0.1)] * 50),
        "candidate": sums(first_token=[math.log(0.2)] * 50),
    }
    found = next(
        one for one in compare(figures, RolloutSettings(RolloutRules())) if one.metric == "first_token"
    )
    assert found.active.mean == pytest.approx(0.1)
    assert found.worse_by == pytest.approx(1.0)


@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_equal_versions_are_hardly_ever_told_apart_however_often_one_looks(rate: float) -> None:
    """The confidence holds for all looks together: an interval for one look would be wrong far more often."""
    draw, wrong, runs = random.Random(7), 0, 200
    rules = RolloutSettings(RolloutRules(requests=100, confidence=0.9, errors=0.0), by="request")
    for _ in range(runs):
        counts = {
            "active": {"errors.n": 0.0, "errors.sum": 0.0},
            "candidate": {"errors.n": 0.0, "errors.sum": 0.0},
        }
        for number in range(600):
            side = counts["candidate" if number % 2 else "active"]
            side["errors.n"] += 1
            side["errors.sum"] += draw.random() < rate
            if number % 10 == 9 and compare(counts, rules)[0].verdict in ("worse", "better"):
                wrong += 1
                break
    assert wrong <= 0.1 * runs


def clustered_verdicts(
    draw: random.Random, users: int, percent: float, *, slower: float = 0.0, rounds: int = 20
) -> set[str]:
    """Verdicts on the time to the first token while users come back, each with a speed of its own."""
    one = rollout(percent, name=str(draw.random()))
    speeds = {unit(str(user)): draw.gauss(0, 0.7) for user in range(users)}
    weights = [draw.paretovariate(2) for _ in speeds]
    settings = RolloutSettings(RolloutRules(requests=300, confidence=0.9))
    verdicts: set[str] = set()
    figures: dict[Any, dict[str, float]] = {"active": {}, "candidate": {}}
    for _ in range(rounds):
        for user in draw.choices(list(speeds), weights, k=2 * users):
            chosen = chooses_candidate(one, user)
            side = figures["candidate" if chosen else "active"]
            value = speeds[user] + slower * chosen + draw.gauss(0, 0.3)
            for figure, amount in observe("first_token", value).items():
                keys = (figure, f"{figure}.{cluster_of(one, user)}")
                for key in keys:
                    side[key] = side.get(key, 0.0) + amount
        found = next(one for one in compare(figures, settings) if one.metric == "first_token")
        verdicts.add(found.verdict)
    return verdicts


@pytest.mark.parametrize(("users", "percent"), [(30, 10.0), (120, 50.0), (500, 10.0)])
def test_equal_versions_are_not_told_apart_by_the_users_whom_each_happens_to_have(
    users: int, percent: float
) -> None:
    """Each user's requests depend on each other, and all of them are on one side."""
    draw, runs = random.Random(11), 40
    wrong = sum(bool({"worse", "better"} & clustered_verdicts(draw, users, percent)) for _ in range(runs))
    assert wrong <= 0.1 * runs


def test_a_slower_candidate_is_found_out_among_users_of_different_speeds() -> None:
    assert "worse" in clustered_verdicts(random.Random(12), 600, 50.0, slower=1.2, rounds=10)


def test_few_users_decide_nothing_however_many_requests_they_send() -> None:
    few = {f"errors.n.{one}": 200.0 for one in range(9)}
    figures: Any = {
        "active": sums(errors=[0.0] * 1800) | few,
        "candidate": sums(errors=[1.0] * 1800) | few | {f"errors.sum.{one}": 200.0 for one in range(9)},
    }
    by_caller = RolloutSettings(RolloutRules())
    assert compare(figures, by_caller)[0].verdict == "undecided"
    assert "groups of users: 9 of 30" in decide(rollout(**figures), by_caller).waits_for
    for side in figures.values():
        side["errors.n.9"] = 1.0
    assert compare(figures, by_caller)[0].verdict == "worse"


def test_copies_count_in_the_division_of_the_error() -> None:
    figures: Any = {"active": sums(errors=[0.0] * 400), "candidate": sums(errors=[0.0] * 400)}
    narrow, wide = (
        compare(figures, RolloutSettings(rules, by="request"))[0]
        for rules in (RolloutRules(judge=None, refusals=None), RolloutRules(judge=None, feedback=None))
    )
    assert wide.high is not None
    assert narrow.high is not None
    assert wide.high > narrow.high, "refusals are compared of copies too, feedback is not"


# ---- decisions ----------------------------------------------------------------------------------


def settings(**rules: object) -> RolloutSettings:
    return RolloutSettings(RolloutRules(**rules), by="request", promote=True)  # type: ignore[arg-type]


def test_a_candidate_is_promoted_after_its_requests_if_no_metric_is_open() -> None:
    noise = random.Random(2)

    def side(n: int) -> dict[str, float]:
        times = [math.log(0.1) + noise.gauss(0, 0.2) for _ in range(n)]
        return sums(errors=[0.0] * n, refusals=[0.0] * n, first_token=times, per_token=times)

    few = decide(rollout(active=side(900), candidate=side(299)), settings())
    assert (few.state, few.waits_for[0]) == (None, "requests: 299 of 300")
    enough = rollout(active=side(2700), candidate=side(600))
    assert decide(enough, settings()).state == "promoted"
    assert decide(enough, RolloutSettings(rules=RolloutRules())).state is None
    scored = rollout(active=side(2700) | sums(feedback=[1.0]), candidate=side(600))
    assert decide(scored, settings()).waits_for == ("not decided: feedback",)
    assert decide(scored, settings(feedback=None)).state == "promoted"


def test_a_candidate_is_not_promoted_past_a_judge_that_says_nothing() -> None:
    same: Any = {side: sums(errors=[0.0] * 2000) for side in ("active", "candidate")}
    asked = replace(settings(), judge=RolloutJudge(adapter="polite"))
    silent = decide(rollout(**same), asked)
    assert (silent.state, silent.waits_for) == (None, ("judge: no answer of polite yet",))
    assert decide(rollout(**same), replace(settings(judge=None), judge=asked.judge)).state == "promoted"
    heard: Any = {side: one | sums(judge=[1.0] * 2000) for side, one in same.items()}
    assert decide(rollout(**heard), asked).state == "promoted"


def test_a_copy_that_fails_rolls_back_too_and_a_margin_of_none_never_does() -> None:
    figures: dict[str, Any] = {"active": sums(errors=[0.0] * 200), "shadow": sums(errors=[1.0] * 30)}
    found = decide(rollout(**figures), settings())
    assert found.state == "rolled_back"
    assert found.reason.startswith("errors of copies: worse by ")
    assert decide(rollout(**figures), settings(errors=None)).state is None


def test_a_candidate_whose_clients_leave_is_not_promoted() -> None:
    same: Any = {side: sums(errors=[0.0] * 2000) for side in ("active", "candidate")}
    assert decide(rollout(**same), settings()).state == "promoted"
    same["candidate"]["aborted"] = 400.0
    left = decide(rollout(**same), settings())
    assert left.state is None
    assert left.waits_for == (
        "clients left 16.7% of the candidate's answers, and 0% of the active version's",
    )


def test_without_requests_of_the_active_version_nothing_is_decided() -> None:
    alone = rollout(100.0, candidate=sums(errors=[1.0] * 500))
    assert decide(alone, settings()).waits_for[0] == "no requests of the active version"


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("\u201cI\u2019m unable to do this\u201d", True),
        ("Sure. Cats purr, and I cannot say why." + "x" * 10, True),
        ("The capital is Paris." + " It is large." * 40 + " I cannot say more.", False),
    ],
)
def test_a_refusal_is_known_by_how_it_begins(text: str, refuses: bool) -> None:
    assert is_refusal(text, ()) == refuses
    assert is_refusal("No can do.", ("no can do",))
