"""Gates of activations, and ways around them that must not work, on SQLite and on PostgreSQL."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from tests.adapters.registry.conftest import Open, add, blob, files

from onebase_adapters.registry import (
    ApprovalError,
    GateError,
    Origin,
    Registry,
    RegistryError,
    RolloutRecord,
    UnknownGateError,
    acting,
)
from onebase_adapters.registry.gates import lowest_difference
from onebase_protocol.adapters import EvaluationGate, GateRule, SliceScore

HERE = ("default", "a")
REPORT: dict[str, Any] = {
    "modules": [],
    "weight_score": 0.4,
    "proof": {"kernels": "torch", "base_unchanged": True, "modules_changed": 2, "exact": False},
}


def key(registry: Registry, name: str = "", tenant: str = "default", scope: str = "adapters") -> str:
    return registry.keys.create(tenant, [scope], name=name)[0].id


def send(registry: Registry, text: str, maker: str = "", *, name: str = "a", **source: Any) -> str:
    """A ready version that a key has sent. Returns its digest."""
    both = files(text)
    with acting(Origin(maker)):
        registry.add_version(name, both.digest, both, {"kind": "upload", **source}, actor=maker)
    registry.set_state("default", name, both.digest, "ready", report=REPORT, prepared=blob(text))
    return both.digest


def activate(registry: Registry, digest: str, by: str = "") -> str | None:
    with acting(Origin(by)):
        return registry.activate(*HERE, digest).active


def approve(registry: Registry, digest: str, by: str) -> None:
    with acting(Origin(by)):
        registry.approve(*HERE, digest)


def closed(registry: Registry, digest: str, by: str = "") -> dict[str, str]:
    """The gates that refuse an activation, with their reasons."""
    before = registry.adapter(*HERE)
    with pytest.raises(GateError) as caught:
        activate(registry, digest, by)
    after = registry.adapter(*HERE)
    assert (after.active, after.rollout) == (before.active, before.rollout), "nothing changes"
    return {state.gate: state.reason for state in caught.value.closed}


def scores(rows: int, wins: int, losses: int, name: str = "") -> SliceScore:
    return SliceScore(slice=name, rows=rows, sum=wins - losses, squares=wins + losses)


def evaluate(registry: Registry, digest: str, by: str, against: str | None, *slices: SliceScore) -> None:
    with acting(Origin(by)):
        registry.evaluate(*HERE, digest, against, "exact_match", slices)


# ---- rules ---------------------------------------------------------------------------------------


def test_rules_apply_to_tenants_and_names_that_match_and_a_new_one_replaces_its_like(
    registry: Registry, open_registry: Open
) -> None:
    first = registry.gates.set(GateRule(tenant="acme", name="support-*", approvals=1))
    second = registry.gates.set(GateRule(tenant="acme", name="support-*", approvals=2), actor="ann")
    registry.gates.set(GateRule(name="*", proof="proved"))
    assert second.id == first.id
    other = open_registry("base-2")
    assert [(rule.tenant, rule.approvals) for rule in other.gates.all()] == [("*", 0), ("acme", 2)]
    assert [rule.tenant for rule in registry.gates.all("acme")] == ["*", "acme"]
    assert [rule.tenant for rule in registry.gates.all("others")] == ["*"]
    assert registry.gates.delete(second.id) == second
    with pytest.raises(UnknownGateError):
        registry.gates.delete(second.id)
    found = [entry.action for entry in registry.audit.entries(limit=9)]
    assert found == ["gate.deleted", "gate.set", "gate.set", "gate.set"]


def test_all_rules_that_match_apply_and_each_closed_gate_says_how_to_open_it(registry: Registry) -> None:
    registry.gates.set(GateRule(name="a*", signature=("acme",), proof="exact"))
    registry.gates.set(GateRule(tenant="def*", weights=0.1, approvals=1, evaluation=EvaluationGate()))
    registry.gates.set(GateRule(name="A", signature=("nobody",)))
    digest = send(registry, "1")
    reasons = closed(registry, digest)
    assert set(reasons) == {"signature", "proof", "weights", "evaluation", "approval"}
    assert "--signatures" in reasons["signature"]
    assert "--kernels torch" in reasons["proof"]
    assert "0.4" in reasons["weights"]
    assert "onebase adapters approve a@" in reasons["approval"]


def test_a_version_that_passes_is_activated_and_none_is_asked_anything_without_rules(
    registry: Registry,
) -> None:
    one = send(registry, "1")
    assert activate(registry, one) == one
    registry.gates.set(GateRule(name="a", signature=("ac*",), proof="proved", weights=0.5))
    good = {"status": "verified", "signer": "acme"}
    two = send(registry, "2", signature=good)
    assert activate(registry, two) == two
    other = send(registry, "3", signature={"status": "refused", "signer": "acme"})
    assert list(closed(registry, other)) == ["signature"]


@pytest.mark.parametrize(
    ("source", "proof"),
    [
        ({}, {"modules_changed": 0}),
        ({}, {"base_unchanged": False}),
        ({"options": {"any_base": True}}, {}),
    ],
)
def test_a_proof_of_which_something_was_waived_is_none(
    registry: Registry, source: dict[str, Any], proof: dict[str, Any]
) -> None:
    registry.gates.set(GateRule(proof="proved"))
    both = files("1")
    registry.add_version("a", both.digest, both, {"kind": "upload", **source})
    report = {**REPORT, "proof": {**REPORT["proof"], **proof}}
    registry.set_state(*HERE, both.digest, "ready", report=report)
    assert list(closed(registry, both.digest)) == ["proof"]


# ---- four eyes -----------------------------------------------------------------------------------


def test_another_person_approves_and_whoever_made_it_cannot(registry: Registry) -> None:
    ann, ben = key(registry), key(registry)
    registry.gates.set(GateRule(approvals=1))
    digest = send(registry, "1", ann)
    with pytest.raises(ApprovalError, match="made this version"):
        approve(registry, digest, ann)
    with pytest.raises(ApprovalError, match="API key"):
        approve(registry, digest, "")
    assert list(closed(registry, digest, ann)) == ["approval"]
    approve(registry, digest, ben)
    assert activate(registry, digest, ann) == digest


def test_the_one_who_activates_is_not_the_one_who_approves(registry: Registry) -> None:
    ben, cid = key(registry), key(registry)
    registry.gates.set(GateRule(approvals=1))
    digest = send(registry, "1")
    approve(registry, digest, ben)
    assert list(closed(registry, digest, ben)) == ["approval"]
    assert activate(registry, digest, cid) == digest


def test_an_upload_that_a_gate_refused_is_not_activated_by_itself_once_it_is_approved(
    registry: Registry,
) -> None:
    ann, ben = key(registry), key(registry)
    registry.gates.set(GateRule(approvals=1))
    both = files("1")
    with acting(Origin(ann)):
        registry.add_version("a", both.digest, both, {"kind": "upload"}, activates=True)
    registry.set_state(*HERE, both.digest, "ready", report=REPORT, prepared=blob("1"))
    with acting(Origin(ann)), pytest.raises(GateError):
        registry.activate(*HERE, both.digest, if_due=True)
    assert not registry.version(*HERE, both.digest).activates
    approve(registry, both.digest, ben)
    with acting(Origin(ann)):
        assert registry.activate(*HERE, both.digest, if_due=True).active is None
    assert activate(registry, both.digest, ann) == both.digest


def test_keys_of_one_name_are_one_person(registry: Registry) -> None:
    ann, again, ben, twice = (key(registry, name) for name in ("ann", "ann", "ben", "ben"))
    registry.gates.set(GateRule(approvals=2))
    digest = send(registry, "1", ann)
    for approver in (again, ben, twice):
        approve(registry, digest, approver)
    assert "1 has" in closed(registry, digest, ann)["approval"]
    approve(registry, digest, key(registry, "cid"))
    assert activate(registry, digest, ann) == digest


def test_only_named_keys_approve_and_only_while_they_are_valid(registry: Registry) -> None:
    ann, ben, other = key(registry), key(registry), key(registry)
    stranger, reader = key(registry, tenant="others"), key(registry, scope="generate")
    registry.gates.set(GateRule(approvals=1))
    digest = send(registry, "1", ann)
    for approver in (other, stranger, reader, ben):
        approve(registry, digest, approver)
    registry.gates.set(GateRule(approvals=1, approvers=(ben, stranger, reader)))
    registry.keys.revoke(ben)
    assert "0 have" in closed(registry, digest, ann)["approval"]
    with pytest.raises(ApprovalError, match="may not approve"):
        approve(registry, digest, other)
    registry.gates.set(GateRule(approvals=1, approvers=(other,)))
    assert activate(registry, digest, ann) == digest


def test_an_approval_counts_until_its_key_expires(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, now = key(registry), time.time()
    ben = registry.keys.create("default", ["adapters"], expires_at=now + 3600)[0].id
    registry.gates.set(GateRule(approvals=1))
    digest = send(registry, "1", ann)
    approve(registry, digest, ben)
    monkeypatch.setattr("onebase_adapters.registry.gates.time.time", lambda: now + 3601)
    assert "0 have" in closed(registry, digest, ann)["approval"]
    assert [one.counts for one in registry.version_gates(*HERE, digest).approvals] == [False]
    monkeypatch.undo()
    assert activate(registry, digest, ann) == digest


def test_only_an_evaluation_that_counts_makes_approvals_stale(registry: Registry) -> None:
    ann, ben, cid = key(registry), key(registry), key(registry)
    rule = GateRule(approvals=1, approvers=(ben,), evaluation=EvaluationGate(evaluators=(ben,)))
    registry.gates.set(rule)
    digest = send(registry, "1", ann)
    evaluate(registry, digest, ben, None, scores(200, 100, 0))
    approve(registry, digest, ben)
    with pytest.raises(ApprovalError, match="the gates name the keys"):
        evaluate(registry, digest, cid, None, scores(1, 0, 0))
    with acting(Origin(ann)):
        registry.evaluate(*HERE, digest, None, "contains", [scores(5, 0, 5)], job="ftjob-1")
    assert [one.counts for one in registry.version_gates(*HERE, digest).approvals] == [True]
    assert activate(registry, digest, ann) == digest


def test_an_approval_can_be_withdrawn_and_is_good_for_one_activation(registry: Registry) -> None:
    ann, ben = key(registry), key(registry)
    one, two = send(registry, "1", ann), send(registry, "2", ann)
    activate(registry, one)
    registry.gates.set(GateRule(approvals=1))
    approve(registry, two, ben)
    with acting(Origin(ben)):
        gates = registry.approve(*HERE, two, approved=False)
    assert gates.approvals == ()
    closed(registry, two, ann)
    approve(registry, two, ben)
    activate(registry, two, ann)
    assert registry.rollback(*HERE).active == one, "going back passes no gate"
    assert "0 have" in closed(registry, two, ann)["approval"], "an old approval is not played again"
    assert registry.version_gates(*HERE, two).approvals == ()


def test_an_approval_is_of_one_content_and_dies_with_its_version(registry: Registry) -> None:
    ann, ben = key(registry), key(registry)
    registry.gates.set(GateRule(approvals=1))
    good = send(registry, "good", ann)
    approve(registry, good, ben)
    bad = send(registry, "bad", ann)
    closed(registry, bad, ann)
    registry.delete_adapter(*HERE)
    assert send(registry, "good", ann) == good
    closed(registry, good, ann)
    approve(registry, good, ben)
    registry.delete_version(*HERE, good)
    assert send(registry, "good", ann) == good
    closed(registry, good, ann)


def test_who_sends_the_same_content_again_made_it_too(registry: Registry) -> None:
    ann, ben = key(registry), key(registry)
    registry.gates.set(GateRule(approvals=1))
    digest = send(registry, "1", ann)
    approve(registry, digest, ben)
    send(registry, "1", ben)
    closed(registry, digest, ann)
    with pytest.raises(ApprovalError, match="made this version"):
        approve(registry, digest, ben)


def test_a_failed_version_that_begins_anew_loses_its_approvals_and_evaluations(registry: Registry) -> None:
    ann, ben = key(registry), key(registry)
    registry.gates.set(GateRule(approvals=1))
    digest = send(registry, "1", ann)
    approve(registry, digest, ben)
    evaluate(registry, digest, ben, None, scores(100, 50, 0))
    registry.reopen(*HERE, digest)
    registry.set_state(*HERE, digest, "failed", error=("not_finite", "NaN"))
    send(registry, "1", key(registry))
    gates = registry.version_gates(*HERE, digest)
    assert (gates.approvals, gates.evaluations) == ((), ())
    with pytest.raises(ApprovalError, match="made this version"):
        approve(registry, digest, ann)


def test_an_approval_from_before_a_new_evaluation_does_not_count(registry: Registry) -> None:
    ann, ben, cid = key(registry), key(registry), key(registry)
    registry.gates.set(GateRule(approvals=1))
    digest = send(registry, "1", ann)
    approve(registry, digest, ben)
    evaluate(registry, digest, cid, None, scores(100, 0, 60))
    assert "evaluated again" in closed(registry, digest, ann)["approval"]
    assert [one.counts for one in registry.version_gates(*HERE, digest).approvals] == [False]
    approve(registry, digest, ben)
    assert activate(registry, digest, ann) == digest


# ---- evaluation ----------------------------------------------------------------------------------


def test_each_slice_has_to_be_surely_not_worse_than_the_active_version(registry: Registry) -> None:
    ann, ben = key(registry), key(registry)
    one, two = send(registry, "1", ann), send(registry, "2", ann)
    activate(registry, one)
    registry.gates.set(GateRule(evaluation=EvaluationGate(margin=0.05, rows=30)))
    assert "not evaluated" in closed(registry, two)["evaluation"]
    evaluate(registry, two, ben, one, scores(10, 0, 0))
    assert "all rows at worst" in closed(registry, two)["evaluation"], "ten equal rows prove little"
    evaluate(registry, two, ben, one, scores(900, 30, 0, "en"), scores(100, 0, 20, "de"))
    assert "de at worst" in closed(registry, two)["evaluation"]
    evaluate(
        registry, two, ben, one, scores(900, 30, 0, "en"), scores(100, 9, 1, "de"), scores(5, 0, 2, "fr")
    )
    assert activate(registry, two) == two


def test_an_evaluation_beside_what_is_active_no_more_opens_nothing(registry: Registry) -> None:
    ann, ben = key(registry), key(registry)
    one, two, three = (send(registry, text, ann) for text in "123")
    activate(registry, one)
    evaluate(registry, three, ben, one, scores(1000, 10, 0))
    activate(registry, two)
    registry.gates.set(GateRule(evaluation=EvaluationGate()))
    assert "not evaluated" in closed(registry, three)["evaluation"]
    evaluate(registry, three, ben, two, scores(1000, 10, 0))
    assert activate(registry, three) == three


def test_who_made_a_version_cannot_evaluate_it_and_named_evaluators_alone_count(registry: Registry) -> None:
    ann, ben, cid = key(registry), key(registry), key(registry)
    digest = send(registry, "1", ann)
    with pytest.raises(ApprovalError, match="evaluate"):
        evaluate(registry, digest, ann, None, scores(1000, 10, 0))
    evaluate(registry, digest, ben, None, scores(1000, 10, 0))
    registry.gates.set(GateRule(evaluation=EvaluationGate(evaluators=(cid,))))
    with pytest.raises(ApprovalError, match="the gates name the keys"):
        evaluate(registry, digest, ben, None, scores(1001, 10, 0))
    assert "not evaluated" in closed(registry, digest)["evaluation"]
    evaluate(registry, digest, cid, None, scores(1000, 10, 0))
    assert activate(registry, digest) == digest


def test_a_jobs_own_evaluation_counts_once_however_often_it_is_delivered(registry: Registry) -> None:
    ann = key(registry)
    registry.gates.set(GateRule(evaluation=EvaluationGate(evaluators=("ob-other", "jobs"))))
    digest = send(registry, "1", ann, kind="training", job="ftjob-1")
    for _ in range(2):
        with acting(Origin(ann, actor="job ftjob-1")):
            registry.evaluate(*HERE, digest, None, "exact_match", [scores(1000, 10, 0)], job="ftjob-1")
    assert len(registry.version_gates(*HERE, digest).evaluations) == 1
    assert activate(registry, digest, ann) == digest


def test_a_job_counts_beside_named_evaluators_only_if_it_is_named(registry: Registry) -> None:
    ann, ben = key(registry), key(registry)
    registry.gates.set(GateRule(evaluation=EvaluationGate(evaluators=(ben,))))
    digest = send(registry, "1", ann)
    evaluate(registry, digest, ben, None, scores(1000, 0, 900))
    with acting(Origin(ann)):
        registry.evaluate(*HERE, digest, None, "contains", [scores(5000, 10, 0)], job="ftjob-1")
    assert "all rows at worst" in closed(registry, digest)["evaluation"]


def test_the_worst_evaluation_that_counts_decides_and_fewer_rows_take_no_ones_place(
    registry: Registry,
) -> None:
    ann, ben, cid = key(registry), key(registry), key(registry)
    registry.gates.set(GateRule(evaluation=EvaluationGate()))
    digest = send(registry, "1", ann)
    evaluate(registry, digest, ben, None, scores(1000, 0, 900))
    evaluate(registry, digest, cid, None, scores(5000, 100, 0))
    assert f"by {ben}" in closed(registry, digest)["evaluation"]
    with pytest.raises(ApprovalError, match="at least as many"):
        evaluate(registry, digest, ben, None, scores(999, 900, 0))
    evaluate(registry, digest, ben, None, scores(1000, 10, 0))
    assert len(registry.version_gates(*HERE, digest).evaluations) == 2
    assert activate(registry, digest) == digest


def test_a_key_pushes_out_no_evaluation_that_counts(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onebase_adapters.registry.gates.MOST_EVALUATIONS", 6)
    monkeypatch.setattr("onebase_adapters.registry.gates.MOST_OF_KEY", 4)
    ann, ben, cid, dan = (key(registry) for _ in range(4))
    registry.gates.set(GateRule(evaluation=EvaluationGate()))
    digest, other = send(registry, "1", ann), send(registry, "2", ann)

    def flood(by: str, against: str | None) -> None:
        for number in range(9):
            with acting(Origin(by)):
                registry.evaluate(*HERE, digest, against, f"metric {number}", [scores(1000, 10, 0)])

    evaluate(registry, digest, ben, None, scores(1000, 0, 900))
    with pytest.raises(ApprovalError, match="has 4 evaluations"):
        flood(cid, None)
    flood(dan, other)
    with pytest.raises(ApprovalError, match="has 6 evaluations"):
        flood(dan, None)
    with acting(Origin(ann)):
        registry.evaluate(*HERE, digest, None, "contains", [scores(1000, 10, 0)], job="ftjob-1")
    assert f"by {ben}" in closed(registry, digest)["evaluation"]
    assert len(registry.version_gates(*HERE, digest).evaluations) == 6


def test_a_gate_names_the_metric_the_slices_the_rows_and_the_file(registry: Registry) -> None:
    ann, ben, file = key(registry), key(registry), "a" * 64
    gate = EvaluationGate(metric="exact_match", slices=("de",), total=500, data=file)
    registry.gates.set(GateRule(evaluation=gate))
    digest = send(registry, "1", ann)

    def refused(metric: str, data: str | None, *slices: SliceScore) -> str:
        with acting(Origin(ben)):
            registry.evaluate(*HERE, digest, None, metric, slices, data=data)
        return closed(registry, digest)["evaluation"]

    assert "by exact_match on the file" in refused("contains", file, scores(900, 9, 0, "de"))
    assert "not evaluated" in refused("exact_match", None, scores(90, 9, 0, "de"))
    assert "500 are needed" in refused("exact_match", file, scores(90, 9, 0, "de"))
    assert "slices: de" in refused("exact_match", file, scores(900, 9, 0, "en"), scores(79, 0, 0, "de"))
    with acting(Origin(ben)):
        both = scores(900, 9, 0, "en"), scores(80, 0, 0, "de")
        registry.evaluate(*HERE, digest, None, "exact_match", both, data=file)
    assert activate(registry, digest) == digest


def test_the_default_rows_let_an_equal_version_pass_and_smaller_slices_are_named(registry: Registry) -> None:
    ann, ben = key(registry), key(registry)
    registry.gates.set(GateRule(evaluation=EvaluationGate()))
    digest = send(registry, "1", ann)
    slices = [scores(80, 0, 0, f"slice {number}") for number in range(20)]
    evaluate(registry, digest, ben, None, *slices, scores(79, 0, 0, "medical"))
    (state,) = registry.version_gates(*HERE, digest).gates
    assert state.passed
    assert "fewer than 80 rows: medical" in state.reason


@pytest.mark.parametrize("way", ["deactivate", "delete", "delete the name", "roll back", "all of them"])
def test_no_way_to_be_active_no_more_lowers_the_mark_of_the_evaluation(registry: Registry, way: str) -> None:
    ann, ben = key(registry), key(registry)
    weak, strong = send(registry, "weak", ann), send(registry, "strong", ann)
    activate(registry, weak)
    activate(registry, strong)
    registry.gates.set(GateRule(evaluation=EvaluationGate()))
    if way in ("roll back", "all of them"):
        registry.rollback(*HERE)
    if way in ("deactivate", "all of them"):
        registry.deactivate(*HERE)
    if way in ("delete", "all of them"):
        registry.delete_version(*HERE, strong)
    if way == "delete the name":
        registry.delete_adapter(*HERE)
    new = send(registry, "new", ann)
    for against in (None, *([] if way == "delete the name" else [weak])):
        evaluate(registry, new, ben, against, scores(1000, 500, 0))
    assert strong[:12] in closed(registry, new, ann)["evaluation"]
    if way in ("deactivate", "roll back"):
        evaluate(registry, new, ben, strong, scores(1000, 10, 0))
    else:
        approve(registry, new, ben)
    assert activate(registry, new, ann) == new


def test_what_was_let_in_last_comes_back_after_a_deactivation(registry: Registry) -> None:
    one = send(registry, "1")
    activate(registry, one)
    registry.gates.set(GateRule(evaluation=EvaluationGate()))
    registry.deactivate(*HERE)
    assert activate(registry, one) == one


def test_equal_versions_pass_and_worse_ones_do_not_as_often_as_the_confidence_says() -> None:
    """Versions that are worse by exactly the margin pass in about 5% of the draws, at a confidence of 95%."""
    draw, margin = random.Random(7), 0.1
    passed = 0
    for _ in range(2000):
        losses = sum(draw.random() < margin for _ in range(200))
        passed += lowest_difference(scores(200, 0, losses), 0.95) >= -margin
    assert passed <= 0.06 * 2000


# ---- rollouts ------------------------------------------------------------------------------------


def rollout(candidate: str, baseline: str, by: str, percent: float) -> RolloutRecord:
    return RolloutRecord(
        "rollout-1", *HERE, candidate, baseline, "running", percent, 10.0, {}, created_at=1.0, created_by=by
    )


def test_a_rollout_shares_requests_and_is_promoted_through_the_same_gates(registry: Registry) -> None:
    ann, ben, cid = key(registry), key(registry), key(registry)
    one, two = send(registry, "1", ann), send(registry, "2", ann)
    activate(registry, one)
    registry.gates.set(GateRule(approvals=1))
    with pytest.raises(GateError), acting(Origin(ann)):
        registry.start_rollout(rollout(two, one, ann, 10.0))
    with acting(Origin(ben)):
        registry.start_rollout(rollout(two, one, ben, 0.0))
        with pytest.raises(GateError):
            registry.change_rollout(*HERE, percent=5.0)
    approve(registry, two, ben)
    with pytest.raises(GateError), acting(Origin(actor="rollout rollout-1")):
        registry.end_rollout(*HERE, "promoted", "it is better")
    assert registry.adapter(*HERE).active == one
    running = registry.adapter(*HERE).rollout
    assert running is not None, "a promotion that is refused leaves the rollout as it was"
    approve(registry, two, cid)
    with acting(Origin(ann)):
        registry.change_rollout(*HERE, percent=5.0)
    registry.end_rollout(*HERE, "promoted", "it is better")
    assert registry.adapter(*HERE).active == two


@pytest.mark.parametrize("end", ["rolled_back", "stopped", "share"])
def test_a_rollout_that_had_a_share_and_is_not_promoted_uses_the_approval_up(
    registry: Registry, end: Any
) -> None:
    ann, ben, cid = key(registry), key(registry), key(registry)
    one, two = send(registry, "1", ann), send(registry, "2", ann)
    activate(registry, one)
    registry.gates.set(GateRule(approvals=1))
    approve(registry, two, ben)
    with acting(Origin(cid)):
        registry.start_rollout(rollout(two, one, cid, 50.0))
    if end == "share":
        registry.change_rollout(*HERE, percent=0.0)
    else:
        registry.end_rollout(*HERE, end, "it is worse")
    assert "0 have" in closed(registry, two, ann)["approval"]


def test_a_rollout_of_copies_leaves_the_approval(registry: Registry) -> None:
    ann, ben = key(registry), key(registry)
    one, two = send(registry, "1", ann), send(registry, "2", ann)
    activate(registry, one)
    registry.gates.set(GateRule(approvals=1))
    approve(registry, two, ben)
    registry.start_rollout(rollout(two, one, ann, 0.0))
    registry.end_rollout(*HERE, "stopped", "copies are enough")
    assert activate(registry, two, ann) == two


def test_a_checkpoint_under_its_own_name_passes_no_gate(registry: Registry) -> None:
    registry.gates.set(GateRule(approvals=1, proof="exact"))
    name = "a:ftjob-1:step-8"
    digest = send(registry, "1", key(registry), name=name, kind="checkpoint")
    assert registry.activate("default", name, digest).active == digest


def test_the_servers_own_signature_has_to_be_named(registry: Registry) -> None:
    digest = send(registry, "1", signature={"status": "verified", "signer": "server"})
    registry.gates.set(GateRule(signature=("*", "s*")))
    assert "any signer but this server" in closed(registry, digest)["signature"]
    registry.gates.set(GateRule(signature=("*", "server")))
    assert activate(registry, digest) == digest


def test_what_is_active_already_stays_and_deactivation_opens_no_other_way(registry: Registry) -> None:
    one, two = send(registry, "1"), send(registry, "2")
    activate(registry, one)
    registry.gates.set(GateRule(signature=("*",)))
    assert activate(registry, one) == one
    registry.deactivate(*HERE)
    closed(registry, two)
    assert registry.rollback(*HERE).active == one
    closed(registry, two)


def test_rules_are_bounded(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onebase_adapters.registry.gates.MOST_RULES", 2)
    for name in "ab":
        registry.gates.set(GateRule(name=name, proof="proved"))
    with pytest.raises(RegistryError, match="delete one"):
        registry.gates.set(GateRule(name="c", proof="proved"))
    registry.gates.set(GateRule(name="a", proof="exact"))
    digest = add(registry, "a", "1")
    with pytest.raises(GateError):
        registry.activate(*HERE, digest)
