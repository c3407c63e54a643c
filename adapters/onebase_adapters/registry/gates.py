"""Gates: what a version has to pass before it answers under a name.

They are checked in the transaction that activates a version, or gives it a share of the requests, whoever
asks for that and on whichever server. A rollback passes none: its version was let in before. Approvals and
evaluations belong to the version's row, so that neither outlives it, and what has the same name later has
none of them.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from statistics import NormalDist
from typing import Any

from msgspec import convert, to_builtins
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from onebase_adapters.registry import audit
from onebase_adapters.registry.database import Database, plain
from onebase_adapters.registry.errors import ApprovalError, GateError, RegistryError, UnknownGateError
from onebase_adapters.registry.tables import (
    AdapterRow,
    ApiKeyRow,
    ApprovalRow,
    EvaluationRow,
    GateRow,
    VersionRow,
)
from onebase_protocol.adapters import (
    EvaluationGate,
    GateName,
    GateRule,
    GateState,
    SliceScore,
    VersionApproval,
    VersionEvaluation,
    VersionGates,
)

MOST_RULES = 1000
MOST_EVALUATIONS = 16
"""Largest number of evaluations of a version that are kept, the newest."""
MOST_MAKERS = 64
_APPROVES = ("adapters", "admin")
"""Scopes of which an approver's key has one."""
_SERVER_KINDS = ("training", "live", "checkpoint", "merge")
"""Kinds of versions that the server makes on its own base, whatever their config calls it."""
_SHOWN = 3
_OTHER_FIELDS = ("object", "id", "tenant", "name", "created_at", "created_by")


class Gates:
    """Rules of a registry, for all bases. All methods block, and may be called from any thread.

    Raises RegistryBusyError, RegistryFullError and RegistryError like Registry.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self, tenant: str | None = None) -> list[GateRule]:
        """Return the rules, or those that apply to a tenant, by tenant and name."""
        with self._database.read() as session:
            rules = [_rule(row) for row in session.scalars(select(GateRow))]
        shown = (rule for rule in rules if tenant is None or fnmatchcase(tenant, rule.tenant))
        return sorted(shown, key=lambda rule: (rule.tenant, rule.name))

    def set(self, rule: GateRule, *, actor: str = "") -> GateRule:
        """Store a rule in place of the one with the same patterns, if there is one. Raises RegistryError if
        there are MOST_RULES others."""
        tenant, name = plain(rule.tenant), plain(rule.name)
        settings = {k: v for k, v in to_builtins(rule).items() if k not in _OTHER_FIELDS}
        with self._database.write() as (session, _):
            known = GateRow.tenant == tenant, GateRow.name == name
            row = session.scalar(select(GateRow).where(*known))
            before = None if row is None else dict(row.settings)
            if row is None:
                if (session.scalar(select(func.count()).select_from(GateRow)) or 0) >= MOST_RULES:
                    raise RegistryError(f"There are {MOST_RULES} rules already: delete one first.")
                row = GateRow(id=f"gate-{secrets.token_hex(8)}", tenant=tenant, name=name)
                session.add(row)
            row.settings, row.created_at, row.created_by = settings, time.time(), plain(actor)
            session.flush()
            details = {"name": name, **settings, "before": before}
            audit.note(session, "gate.set", tenant, row.id, actor=actor, details=details)
            return _rule(row)

    def delete(self, rule: str, *, actor: str = "") -> GateRule:
        """Delete a rule. Raises UnknownGateError."""
        with self._database.write() as (session, _):
            row = session.get(GateRow, plain(rule))
            if row is None:
                raise UnknownGateError(f"There is no gate {rule[:80]!r}.")
            found = _rule(row)
            session.delete(row)
            session.flush()
            details = {"name": row.name, **row.settings}
            audit.note(session, "gate.deleted", row.tenant, row.id, actor=actor, details=details)
            return found


def _rule(row: GateRow) -> GateRule:
    fields = {name: getattr(row, name) for name in _OTHER_FIELDS if name != "object"}
    return convert({**row.settings, **fields}, GateRule)


# ---- in a write transaction on the adapter -----------------------------------------------------


def check(session: Session, adapter: AdapterRow, version: VersionRow, askers: Collection[str] = ()) -> None:
    """Raise GateError unless the version passes all gates.

    askers: keys that ask for it besides the caller's; their approvals do not count.
    """
    closed = [state for state in _states(session, adapter, version, _with_caller(askers)) if not state.passed]
    if closed:
        reasons = " ".join(f"{state.gate.capitalize()}: {state.reason}" for state in closed)
        raise GateError(
            f"Version {version.digest[:12]} of {adapter.name!r} may not answer under this name. {reasons}",
            closed,
            version.digest,
        )


def use_up(session: Session, version: VersionRow) -> None:
    """Delete the approvals of a version that has become active: they were for this activation."""
    session.execute(delete(ApprovalRow).where(ApprovalRow.version_id == version.id))


def forget(session: Session, version: VersionRow) -> None:
    """Delete the approvals and evaluations of a version that begins anew."""
    use_up(session, version)
    session.execute(delete(EvaluationRow).where(EvaluationRow.version_id == version.id))


def note_maker(session: Session, version: VersionRow) -> None:
    """Record the caller's key as one that made the version. Its approval, if there is one, is void."""
    key = audit.current().key
    if not key or key in version.makers:
        return
    if len(version.makers) >= MOST_MAKERS:
        raise RegistryError(f"{MOST_MAKERS} keys have sent this version already. Use one of them.")
    version.makers = [*version.makers, key]
    session.flush()
    session.execute(delete(ApprovalRow).where(ApprovalRow.version_id == version.id, ApprovalRow.key == key))


def view(session: Session, adapter: AdapterRow, version: VersionRow) -> VersionGates:
    """Return the gates of a version, for the caller."""
    states = _states(session, adapter, version, _with_caller(()))
    newest = _newest(session, version)
    valid = _valid_keys(session, adapter.tenant)
    approvals = session.scalars(select(ApprovalRow).where(ApprovalRow.version_id == version.id))
    evaluations = session.scalars(
        select(EvaluationRow)
        .where(EvaluationRow.version_id == version.id)
        .order_by(EvaluationRow.number.desc())
    )
    return VersionGates(
        version=version.digest,
        passed=all(state.passed for state in states),
        gates=tuple(states),
        approvals=tuple(
            VersionApproval(
                key=one.key,
                at=one.at,
                counts=one.evaluation == newest and one.key in valid and one.key not in version.makers,
            )
            for one in approvals
        ),
        evaluations=tuple(_evaluation(row) for row in evaluations),
    )


def approve(session: Session, adapter: AdapterRow, version: VersionRow, at: float) -> None:
    """Record that the caller approves the version, as it was evaluated until now. Raises ApprovalError."""
    key = audit.current().key
    _check_other(key, version, "approve")
    if version.state != "ready":
        raise ApprovalError(f"The version is {version.state}: approve it once it is ready.")
    rules = [rule for rule in _rules(session, adapter) if rule.approvers]
    if rules and not any(key in rule.approvers for rule in rules):
        raise ApprovalError(f"Key {key} may not approve under this name: the gates name the keys that may.")
    newest = _newest(session, version)
    session.merge(ApprovalRow(version_id=version.id, key=key, evaluation=newest, at=at))
    session.flush()
    _note(session, "adapter.approved", adapter, version, {"evaluation": newest or None})


def disapprove(session: Session, adapter: AdapterRow, version: VersionRow) -> None:
    """Delete the caller's approval, if there is one."""
    row = session.get(ApprovalRow, (version.id, audit.current().key))
    if row is not None:
        session.delete(row)
        session.flush()
        _note(session, "adapter.disapproved", adapter, version, {})


def evaluate(
    session: Session,
    adapter: AdapterRow,
    version: VersionRow,
    against: str | None,
    metric: str,
    slices: Sequence[SliceScore],
    at: float,
    *,
    job: str | None = None,
) -> None:
    """Record an evaluation, the newest of a version. Approvals from before it do not count any more.

    job: the job of this server that measured it; None: the caller did. Raises ApprovalError.
    """
    key = "" if job is not None else audit.current().key
    if job is None:
        _check_other(key, version, "evaluate", any_key=True)
    elif session.scalar(
        select(EvaluationRow.number).where(
            EvaluationRow.version_id == version.id,
            EvaluationRow.job == job,
            EvaluationRow.against.is_not_distinct_from(against),
        )
    ):
        return  # its delivery was repeated
    row = EvaluationRow(
        version_id=version.id,
        against=against,
        metric=plain(metric),
        slices=[{**to_builtins(one), "slice": plain(one.slice)} for one in slices],
        key=key,
        job=job,
        at=at,
    )
    session.add(row)
    session.flush()
    old = select(EvaluationRow.number).where(EvaluationRow.version_id == version.id)
    kept = old.order_by(EvaluationRow.number.desc()).limit(MOST_EVALUATIONS)
    session.execute(
        delete(EvaluationRow).where(
            EvaluationRow.version_id == version.id, EvaluationRow.number.not_in(kept.scalar_subquery())
        )
    )
    rows = sum(one.rows for one in slices)
    facts = {"against": against, "metric": row.metric, "slices": len(slices), "rows": rows}
    _note(session, "adapter.evaluated", adapter, version, facts | {"evaluation": row.number})


def _check_other(key: str, version: VersionRow, act: str, *, any_key: bool = False) -> None:
    """Raise ApprovalError unless the key is another one than those that made the version."""
    if not key and not any_key:
        raise ApprovalError(
            "An approval needs an API key, and this server has none: make keys (onebase keys create)."
        )
    if key and key in version.makers:
        raise ApprovalError(f"Key {key} made this version, so another person's key has to {act} it.")


# ---- each gate -----------------------------------------------------------------------------------


def _states(
    session: Session, adapter: AdapterRow, version: VersionRow, askers: frozenset[str]
) -> list[GateState]:
    states: list[GateState] = []
    for rule in _rules(session, adapter):
        found: list[tuple[GateName, bool, str]] = []
        if rule.signature:
            found.append(("signature", *_signature(rule, version)))
        if rule.proof != "none":
            found.append(("proof", *_proof(rule, version)))
        if rule.evaluation is not None:
            found.append(("evaluation", *_evaluated(session, rule.evaluation, adapter, version)))
        if rule.weights is not None:
            found.append(("weights", *_weights(rule.weights, version)))
        if rule.approvals:
            found.append(("approval", *_approved(session, rule, adapter, version, askers)))
        states += [
            GateState(gate=gate, passed=passed, rule=rule.id, reason=reason) for gate, passed, reason in found
        ]
    return states


def _rules(session: Session, adapter: AdapterRow) -> list[GateRule]:
    """Return the rules that apply to an adapter."""
    rules = [_rule(row) for row in session.scalars(select(GateRow).order_by(GateRow.id))]
    return [
        rule
        for rule in rules
        if fnmatchcase(adapter.tenant, rule.tenant) and fnmatchcase(adapter.name, rule.name)
    ]


def _signature(rule: GateRule, version: VersionRow) -> tuple[bool, str]:
    report: Mapping[str, Any] = version.source.get("signature") or {}
    signer = str(report.get("signer") or "")
    if report.get("status") == "verified" and any(fnmatchcase(signer, one) for one in rule.signature):
        return True, f"signed by {signer}."
    wanted = " or ".join("any signer" if one == "*" else one for one in rule.signature)
    found = "it has none that was verified"
    if report.get("status") == "verified":
        found = f"it is signed by {signer}"
    return False, (
        f"a signature of {wanted} is needed, and {found}. Sign the files and send them again, to a server "
        "whose --signatures names the signer."
    )


def _proof(rule: GateRule, version: VersionRow) -> tuple[bool, str]:
    proof: Mapping[str, Any] = (version.report or {}).get("proof") or {}
    options: Mapping[str, Any] = version.source.get("options") or {}
    if not proof or not proof.get("base_unchanged", False):
        return False, "it has no whole proof. Send it again under this name, so that it is proved again."
    if not proof.get("modules_changed"):
        return False, "it changes nothing (allow_noop). Train it, or send another one."
    if options.get("any_base") and version.source.get("kind") not in _SERVER_KINDS:
        return False, "the name of its base was not checked (any_base). Correct its config and send it again."
    if rule.proof == "exact" and not proof.get("exact"):
        return False, (
            f"{proof.get('modules_exact', 0)} of {proof.get('modules_compared', 0)} modules have PEFT's own "
            "bits, and all are needed. Prove it on a server with --kernels torch."
        )
    return True, "proved" + (", bit for bit." if proof.get("exact") else ".")


def _weights(most: float, version: VersionRow) -> tuple[bool, str]:
    score = (version.report or {}).get("weight_score")
    if score is None:
        return False, "its weights have no score: it was proved before there was one. Send it again."
    if score > most:
        return False, (
            f"the score of its weights is {score:.3g}, and {most:g} is the most. Look at the warnings of its "
            "report; train it anew, or have an admin raise the limit."
        )
    return True, f"the score of its weights is {score:.3g}."


def _evaluated(
    session: Session, gate: EvaluationGate, adapter: AdapterRow, version: VersionRow
) -> tuple[bool, str]:
    against = f"the active version {adapter.active[:12]}" if adapter.active else "the base"
    rows = session.scalars(
        select(EvaluationRow)
        .where(
            EvaluationRow.version_id == version.id, EvaluationRow.against.is_not_distinct_from(adapter.active)
        )
        .order_by(EvaluationRow.number.desc())
    )
    for row in rows:
        made_here = row.job is not None
        if not made_here and (row.key in version.makers or not _may(row.key, gate.evaluators)):
            continue
        worst = _worst(gate, _evaluation(row).slices)
        if not worst:
            return True, f"by {row.metric} it is not worse than {against} in any slice."
        named = ", ".join(worst[:_SHOWN]) + (", ..." if len(worst) > _SHOWN else "")
        return False, (
            f"by {row.metric} it may be worse than {against} by more than {gate.margin:g} "
            f"(confidence {gate.confidence:g}): {named}. Evaluate it on more rows, or send a better one."
        )
    return False, (
        f"it was not evaluated beside {against}. Evaluate it with another key (onebase adapters evaluate), "
        "or train it by a job with held-out rows and a metric."
    )


def _may(key: str, named: Sequence[str]) -> bool:
    return not named or key in named


def _worst(gate: EvaluationGate, slices: Sequence[SliceScore]) -> list[str]:
    """Return the slices of which it is not sure enough that they are not worse, the worst first, in words."""
    total = SliceScore(
        slice="all rows",
        rows=sum(one.rows for one in slices),
        sum=sum(one.sum for one in slices),
        squares=sum(one.squares for one in slices),
    )
    judged = [total, *(one for one in slices if one.rows >= gate.rows and len(slices) > 1)]
    level = 1 - (1 - gate.confidence) / len(judged)
    lows = sorted((lowest_difference(one, level), one.slice) for one in judged)
    return [f"{name} at worst {low:+.3f}" for low, name in lows if low < -gate.margin]


def lowest_difference(score: SliceScore, confidence: float) -> float:
    """Return the lower confidence bound of a mean difference of paired scores.

    One more row is won and one more is lost, as Agresti and Min do for paired proportions
    (https://doi.org/10.1002/sim.2050): rows without any difference are not certainty.
    """
    rows = score.rows + 2
    mean = score.sum / rows
    variance = max(0.0, (score.squares + 2) / rows - mean**2) * rows / (rows - 1)
    return mean - NormalDist().inv_cdf(confidence) * math.sqrt(variance / rows)


def _approved(
    session: Session, rule: GateRule, adapter: AdapterRow, version: VersionRow, askers: frozenset[str]
) -> tuple[bool, str]:
    keys = {
        row.id: row for row in session.scalars(select(ApiKeyRow).where(ApiKeyRow.tenant == adapter.tenant))
    }
    newest = _newest(session, version)
    barred = {*version.makers, *askers}
    people = {_person(keys, key) for key in barred}
    stale, approved = False, set()
    for row in session.scalars(select(ApprovalRow).where(ApprovalRow.version_id == version.id)):
        if row.key not in _valid_keys(session, adapter.tenant) or not _may(row.key, rule.approvers):
            continue
        if row.key in barred or _person(keys, row.key) in people:
            continue
        if row.evaluation != newest:
            stale = True
        else:
            approved.add(_person(keys, row.key))
    if len(approved) >= rule.approvals:
        return True, f"approved by {len(approved)}."
    why = ", since it was evaluated again after an approval" if stale else ""
    return False, (
        f"{rule.approvals} {'person' if rule.approvals == 1 else 'people'} who neither made nor activate it "
        f"must approve it, and {len(approved)} {'has' if len(approved) == 1 else 'have'}{why}. With another "
        f"person's key: onebase adapters approve {adapter.name}@{version.digest[:12]}"
    )


def _person(keys: Mapping[str, ApiKeyRow], key: str) -> str:
    """Return what is known of a key's holder: the key's name, if it has one, else its id."""
    row = keys.get(key)
    return f"name {row.name}" if row is not None and row.name else key


def _valid_keys(session: Session, tenant: str) -> set[str]:
    """Return the ids of a tenant's keys that may approve now."""
    rows = session.scalars(
        select(ApiKeyRow).where(ApiKeyRow.tenant == tenant, ApiKeyRow.revoked_at.is_(None))
    )
    return {row.id for row in rows if any(scope in _APPROVES for scope in row.scopes)}


def _newest(session: Session, version: VersionRow) -> int:
    """Return the number of the version's newest evaluation, or 0."""
    found = select(func.max(EvaluationRow.number)).where(EvaluationRow.version_id == version.id)
    return session.scalar(found) or 0


def _evaluation(row: EvaluationRow) -> VersionEvaluation:
    return VersionEvaluation(
        against=row.against,
        metric=row.metric,
        slices=convert(tuple(row.slices), tuple[SliceScore, ...]),
        key=row.key,
        job=row.job,
        at=row.at,
    )


def _with_caller(askers: Collection[str]) -> frozenset[str]:
    return frozenset(key for key in (*askers, audit.current().key) if key)


def _note(
    session: Session, action: Any, adapter: AdapterRow, version: VersionRow, details: Mapping[str, Any]
) -> None:
    audit.note(
        session,
        action,
        adapter.tenant,
        adapter.name,
        version=version.digest,
        base_id=adapter.base_id,
        details=details,
    )
