"""Rollouts in the registry: one at a time, sums of several servers, feedback, and how they end."""

from __future__ import annotations

from typing import TypeAlias

import pytest
from tests.adapters.registry.conftest import Open, files

from onebase_adapters.registry import (
    NotReadyError,
    Registry,
    RolloutAnswer,
    RolloutRecord,
    RolloutSide,
    RolloutStateError,
    StaleActivationError,
    UnknownVersionError,
)

HERE = ("default", "a")
Figure: TypeAlias = tuple[str, RolloutSide, str]
OLD, NEW = files("1").digest, files("2").digest


@pytest.fixture
def two(registry: Registry) -> Registry:
    """Two ready versions, of which the older one is active."""
    for number in ("1", "2"):
        both = files(number)
        registry.add_version("a", both.digest, both, {"kind": "upload"})
        registry.set_state(*HERE, both.digest, "ready")
    registry.activate(*HERE, OLD)
    return registry


def rollout(registry: Registry, name: str = "rollout-1", **changes: object) -> RolloutRecord:
    fields = {"candidate": NEW, "baseline": OLD, "percent": 10.0, "shadow": 0.0, **changes}
    made = RolloutRecord(
        id=name, tenant="default", name="a", state="running", settings={"by": "caller"},
        created_at=0.0, created_by="ob-1", **fields,  # type: ignore[arg-type]
    )  # fmt: skip
    return registry.start_rollout(made)


def test_a_rollout_is_part_of_its_adapter_while_it_runs(two: Registry, open_registry: Open) -> None:
    counter = two.change_counter()
    made = rollout(two)
    changed = open_registry().changes(counter).changed
    assert [one.rollout for one in changed] == [made]
    assert (made.candidate, made.baseline, made.percent) == (NEW, OLD, 10.0)
    grown = two.change_rollout(*HERE, percent=50.0)
    assert two.adapter(*HERE).rollout == grown
    assert (grown.percent, grown.shadow) == (50.0, 0.0)
    ended = two.end_rollout(*HERE, "rolled_back", "worse", actor="rollout-1")
    found = two.adapter(*HERE)
    assert (found.rollout, found.active) == (None, OLD)
    assert (ended.state, ended.reason, ended.ended_by) == ("rolled_back", "worse", "rollout-1")
    assert two.rollouts.of_adapter(*HERE, 5) == [ended]


def test_no_upload_from_before_its_start_or_its_end_becomes_active_by_itself(two: Registry) -> None:
    due = files("3")
    two.add_version("a", due.digest, due, {"kind": "upload"}, activates=True)
    two.set_state(*HERE, due.digest, "ready")
    rollout(two, candidate=due.digest)
    assert two.activate(*HERE, due.digest, if_due=True).active == OLD
    later = files("4")
    two.add_version("a", later.digest, later, {"kind": "upload"}, activates=True)
    two.set_state(*HERE, later.digest, "ready")
    two.end_rollout(*HERE, "rolled_back", "worse")
    for digest in (due.digest, later.digest):
        assert two.activate(*HERE, digest, if_due=True).active == OLD


def test_a_promotion_activates_and_ends_in_one_write_and_only_once(two: Registry) -> None:
    rollout(two)
    two.end_rollout(*HERE, "promoted", "better", rollout="rollout-1")
    found = two.adapter(*HERE)
    assert (found.active, found.rollout) == (NEW, None)
    with pytest.raises(RolloutStateError, match="No rollout"):
        two.end_rollout(*HERE, "rolled_back", "late", rollout="rollout-1")
    actions = [one.action for one in two.audit.entries(limit=3)]
    assert actions == ["adapter.activated", "rollout.promoted", "rollout.started"]


def test_what_cannot_be_compared_is_refused(two: Registry) -> None:
    with pytest.raises(RolloutStateError, match="is the active one"):
        rollout(two, candidate=OLD)
    with pytest.raises(StaleActivationError):
        rollout(two, baseline=NEW)
    with pytest.raises(UnknownVersionError):
        rollout(two, candidate="f" * 64)
    third = files("3")
    two.add_version("a", third.digest, third, {"kind": "upload"})
    with pytest.raises(NotReadyError):
        rollout(two, candidate=third.digest)
    rollout(two)
    with pytest.raises(RolloutStateError, match="runs already"):
        rollout(two, "rollout-2")


@pytest.mark.parametrize("how", ["activate", "deactivate", "other", "delete"])
def test_a_rollout_ends_when_what_it_compares_is_gone(two: Registry, how: str) -> None:
    third = files("3")
    two.add_version("a", third.digest, third, {"kind": "upload"})
    two.set_state(*HERE, third.digest, "ready")
    rollout(two)
    if how == "activate":
        two.activate(*HERE, NEW)
    elif how == "other":
        two.activate(*HERE, third.digest)
    elif how == "deactivate":
        two.deactivate(*HERE)
    else:
        two.delete_version(*HERE, NEW)
    (ended,) = two.rollouts.of_adapter(*HERE, 5)
    assert ended.state == ("promoted" if how == "activate" else "stopped")
    assert two.adapter(*HERE).rollout is None


def test_figures_of_several_servers_add_up_and_a_batch_counts_once(
    two: Registry, open_registry: Open
) -> None:
    rollout(two)
    one, other = two.rollouts, open_registry().rollouts
    key: Figure = ("rollout-1", "candidate", "requests")
    unknown: Figure = ("unknown", "active", "requests")
    one.add("first", 1, {key: 2.0}, [])
    other.add("second", 1, {key: 3.0, unknown: 1.0}, [])
    one.add("first", 1, {key: 2.0}, [])
    assert one.find("rollout-1").figures == {"candidate": {"requests": 5.0}}
    ended = two.end_rollout(*HERE, "rolled_back", "worse")
    other.add("second", 2, {key: 1.0}, [])
    assert ended.figures == one.find("rollout-1").figures == {"candidate": {"requests": 5.0}}
    (entry,) = two.audit.entries(limit=1)
    assert (entry.action, entry.version) == ("rollout.rolled_back", NEW)
    assert entry.details["figures"] == {"candidate": {"requests": 5.0}}


def test_feedback_is_of_the_tenant_that_was_answered_and_its_last_word_counts(two: Registry) -> None:
    rollout(two)
    answer = RolloutAnswer("default", "gen-1", "rollout-1", "candidate", 100.0)
    two.rollouts.add("first", 1, {}, [answer])
    assert two.rollouts.rate("other", "gen-1", 1.0) is None
    assert two.rollouts.rate("default", "gen-2", 1.0) is None
    for score in (1.0, 0.25):
        found = two.rollouts.rate("default", "gen-1", score)
        assert found is not None
        assert found[1]
    sums = two.rollouts.find("rollout-1").figures["candidate"]
    assert sums == {"feedback.n": 1.0, "feedback.sum": 0.25, "feedback.squares": 0.0625}
    two.end_rollout(*HERE, "rolled_back", "worse")
    found = two.rollouts.rate("default", "gen-1", 1.0)
    assert found is not None
    assert not found[1]
    two.rollouts.forget_answers(101.0)
    assert two.rollouts.rate("default", "gen-1", 1.0) is None


def test_feedback_adds_to_the_cluster_of_its_user_and_the_audit_log_holds_the_sums_of_all(
    two: Registry,
) -> None:
    rollout(two)
    answer = RolloutAnswer("default", "gen-1", "rollout-1", "candidate", 100.0, cluster=7)
    two.rollouts.add("first", 1, {}, [answer])
    for score in (1.0, 0.5):
        two.rollouts.rate("default", "gen-1", score)
    whole = {"feedback.n": 1.0, "feedback.sum": 0.5, "feedback.squares": 0.25}
    sums = two.rollouts.find("rollout-1").figures["candidate"]
    assert sums == whole | {"feedback.n.7": 1.0, "feedback.sum.7": 0.5}
    ended = two.end_rollout(*HERE, "rolled_back", "worse")
    assert ended.figures["candidate"] == sums
    assert two.audit.entries(limit=1)[0].details["figures"] == {"candidate": whole}


def test_an_answer_that_ends_after_its_rollout_can_still_be_rated_but_counts_for_nothing(
    two: Registry,
) -> None:
    rollout(two)
    two.end_rollout(*HERE, "rolled_back", "worse")
    late = RolloutAnswer("default", "gen-9", "rollout-1", "candidate", 100.0)
    two.rollouts.add("first", 1, {("rollout-1", "candidate", "requests"): 1.0}, [late])
    assert two.rollouts.find("rollout-1").figures == {}
    found = two.rollouts.rate("default", "gen-9", 0.5)
    assert found is not None
    assert not found[1]


def test_a_deleted_adapter_takes_its_rollouts_and_their_answers_along(two: Registry) -> None:
    rollout(two)
    answer = RolloutAnswer("default", "gen-1", "rollout-1", "candidate", 100.0)
    two.rollouts.add("first", 1, {("rollout-1", "candidate", "requests"): 1.0}, [answer])
    two.delete_adapter(*HERE)
    assert two.rollouts.of_adapter(*HERE, 5) == []
    assert two.rollouts.rate("default", "gen-1", 1.0) is None
    two.rollouts.add("first", 2, {("rollout-1", "candidate", "requests"): 1.0}, [answer])
    assert two.rollouts.rate("default", "gen-1", 1.0) is None
