"""Gates: what a version has to pass before it answers under a name.

They are checked in the transaction that activates a version, or gives it a share of the requests, whoever
asks for that and on whichever server. A rollback passes none: its version was let in before. Checkpoints
under their own names pass none either. Approvals and evaluations belong to the version's row, so that neither
outlives it, and what has the same name later has none of them.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from statistics import NormalDist
from typing import Any

from msgspec import convert, to_builtins
from sqlalchemy import ColumnElement, delete, func, or_, select
from sqlalchemy.orm import Session

from onebase_adapters.registry import audit
from onebase_adapters.registry.database import Database, plain
from onebase_adapters.registry.errors import ApprovalError, GateError, RegistryError, UnknownGateError
from onebase_adapters.registry.tables import (
    AdapterRow,
    ApiKeyRow,
    ApprovalRow,
    AuditRow,
    EvaluationRow,
    GateRow,
    HistoryRow,
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
MOST_EVALUATIONS = 64
"""Largest number of evaluations of a version. Of each key the newest one is kept by what the version was
compared with and by metric."""
MOST_OF_KEY = 8
"""Largest number of those that one key has sent."""
MOST_MAKERS = 64
_APPROVES = ("adapters", "admin")
"""Scopes of which an approver's key has one."""
JOBS = "jobs"
"""Word for the evaluations of the server's own jobs among the evaluators of a gate."""
SERVER_SIGNER = "server"
"""Signer of the versions that this server trained."""
_SERVER_KINDS = ("training", "live", "checkpoint", "merge")
"""Kinds of versions that the server makes on its own base, whatever their config calls it."""
_CHECKPOINT = "checkpoint"
"""Kind of a job's checkpoint, whose name belongs to no other version."""
_WILDCARDS = "*?["
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
    evidence = _Evidence.of(session, adapter, version, askers)
    closed = [state for state in _states(evidence) if not state.passed]
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


def view(
    session: Session, adapter: AdapterRow, version: VersionRow, askers: Collection[str] = ()
) -> VersionGates:
    """Return the gates of a version, for the caller. askers: see `check`."""
    evidence = _Evidence.of(session, adapter, version, askers)
    states = _states(evidence)
    return VersionGates(
        version=version.digest,
        passed=all(state.passed for state in states),
        gates=tuple(states),
        refusal=_refusal(evidence.rules, version),
        approvals=tuple(
            VersionApproval(
                key=one.key,
                at=one.at,
                counts=not evidence.is_stale(one)
                and evidence.is_valid(one.key)
                and one.key not in version.makers,
            )
            for one in evidence.approvals
        ),
        evaluations=tuple(_evaluation(row) for row in evidence.evaluations),
    )


def approve(session: Session, adapter: AdapterRow, version: VersionRow, at: float) -> None:
    """Record that the caller approves the version, as it was evaluated until now. Raises ApprovalError."""
    if refusal := _refusal(_rules(session, adapter), version):
        raise ApprovalError(refusal)
    key = audit.current().key
    found = select(func.max(EvaluationRow.number)).where(EvaluationRow.version_id == version.id)
    newest = session.scalar(found) or 0
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
    data: str | None = None,
) -> None:
    """Record an evaluation of a version, in place of the one that the same key sent about the same other
    version by the same metric. Approvals from before it do not count any more, if it counts.

    Args:
        job: the job of this server that measured it; None: the caller did.
        data: SHA-256 (hex) of the file with the held-out rows, if it is known.

    Raises ApprovalError.
    """
    key = "" if job is not None else audit.current().key
    known = _evaluations(session, version)
    if job is None:
        _check_other(key, version, "evaluate", any_key=True)
        _check_sender(session, adapter, key)
    elif any(one.job == job and one.against == against for one in known):
        return  # its delivery was repeated
    row = EvaluationRow(
        version_id=version.id,
        against=against,
        metric=plain(metric),
        slices=[{**to_builtins(one), "slice": plain(one.slice)} for one in slices],
        key=key,
        job=job,
        data=data,
        at=at,
    )
    old = [] if job is not None else [one for one in known if _is_same_question(one, row)]
    _check_not_smaller(old, row)
    others = [one for one in known if one not in old]
    crowded = _too_many(others, key, job) or ()
    spare = [one for one in reversed(crowded) if one.against not in _references(session, adapter)]
    if crowded and not spare:
        if job is not None:
            return  # what is there decides, and its key cannot push it out
        raise ApprovalError(
            f"Version {version.digest[:12]} has {len(crowded)} evaluations that count already, and no more "
            f"are taken (of one key at most {MOST_OF_KEY}). Send one by the same metric as before."
        )
    session.add(row)
    session.flush()  # before the old ones go, so that its number is a new one
    for one in (*old, *spare[:1]):
        session.delete(one)
    session.flush()
    facts = {"against": against, "metric": row.metric, "slices": len(slices), "rows": _rows_of(row)}
    _note(session, "adapter.evaluated", adapter, version, facts | {"evaluation": row.number})


def _check_sender(session: Session, adapter: AdapterRow, key: str) -> None:
    """Raise ApprovalError if no rule takes evaluations of this key."""
    rules = _rules(session, adapter)
    if not _accepts(rules, key, None):
        raise ApprovalError(
            f"Key {key or '(none)'} may not evaluate under this name: the gates name the keys that may."
        )


def _is_same_question(one: EvaluationRow, other: EvaluationRow) -> bool:
    return (one.job, one.key, one.against, one.metric) == (None, other.key, other.against, other.metric)


def _check_not_smaller(known: Sequence[EvaluationRow], row: EvaluationRow) -> None:
    """Raise ApprovalError if an evaluation has fewer rows than those of which it would take the place."""
    most = max(map(_rows_of, known), default=0)
    if _rows_of(row) < most:
        raise ApprovalError(
            f"This key has evaluated the version on {most} rows by {row.metric}, and these are "
            f"{_rows_of(row)}: send at least as many."
        )


def _too_many(known: Sequence[EvaluationRow], key: str, job: str | None) -> Sequence[EvaluationRow] | None:
    """Return the evaluations of which one has to go for another one, or None if there is room."""
    own = [one for one in known if one.job is None and one.key == key]
    if job is None and len(own) >= MOST_OF_KEY:
        return own
    return known if len(known) >= MOST_EVALUATIONS else None


def _rows_of(row: EvaluationRow) -> int:
    return sum(int(one["rows"]) for one in row.slices)


def _evaluations(session: Session, version: VersionRow) -> list[EvaluationRow]:
    """Return a version's evaluations, the newest first."""
    rows = session.scalars(
        select(EvaluationRow)
        .where(EvaluationRow.version_id == version.id)
        .order_by(EvaluationRow.number.desc())
    )
    return list(rows)


def _refusal(rules: Sequence[GateRule], version: VersionRow) -> str:
    """Return why the caller cannot approve the version; "" if it can."""
    key = audit.current().key
    try:
        _check_other(key, version, "approve")
    except ApprovalError as error:
        return str(error)
    if version.state != "ready":
        return f"The version is {version.state}: approve it once it is ready."
    named = [rule for rule in rules if rule.approvers]
    if named and not any(key in rule.approvers for rule in named):
        return f"Key {key} may not approve under this name: the gates name the keys that may."
    return ""


def _check_other(key: str, version: VersionRow, act: str, *, any_key: bool = False) -> None:
    """Raise ApprovalError unless the key is another one than those that made the version."""
    if not key and not any_key:
        raise ApprovalError(
            "An approval needs an API key, and this server has none: make keys (onebase keys create)."
        )
    if key and key in version.makers:
        raise ApprovalError(f"Key {key} made this version, so another person's key has to {act} it.")


# ---- what the gates look at -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Evidence:
    """Rows that the gates of one version look at, as they are in one transaction.

    references: digests of the versions that it must not be worse than; None is the base. gone: those of them
    that were deleted. askers: keys that ask for its activation.
    """

    adapter: AdapterRow
    version: VersionRow
    askers: frozenset[str]
    rules: Sequence[GateRule]
    evaluations: Sequence[EvaluationRow]
    approvals: Sequence[ApprovalRow]
    keys: Mapping[str, ApiKeyRow]
    references: Sequence[str | None]
    gone: frozenset[str]
    now: float

    @classmethod
    def of(
        cls, session: Session, adapter: AdapterRow, version: VersionRow, askers: Collection[str] = ()
    ) -> _Evidence:
        everyone = _with_caller(askers)
        approvals = session.scalars(select(ApprovalRow).where(ApprovalRow.version_id == version.id)).all()
        people = {*everyone, *version.makers, *(one.key for one in approvals)}
        keys = session.scalars(
            select(ApiKeyRow).where(ApiKeyRow.tenant == adapter.tenant, ApiKeyRow.id.in_(people))
        )
        references = _references(session, adapter)
        there = session.scalars(
            select(VersionRow.digest).where(
                VersionRow.adapter_id == adapter.id, VersionRow.digest.in_([one for one in references if one])
            )
        )
        return cls(
            adapter,
            version,
            everyone,
            _rules(session, adapter) if version.source.get("kind") != _CHECKPOINT else (),
            _evaluations(session, version),
            approvals,
            {row.id: row for row in keys},
            references,
            frozenset(one for one in references if one) - frozenset(there),
            time.time(),
        )

    def is_valid(self, key: str) -> bool:
        """Return True if a key may approve now: it is neither revoked nor expired."""
        row = self.keys.get(key)
        return (
            row is not None
            and row.revoked_at is None
            and (row.expires_at is None or row.expires_at > self.now)
            and any(scope in _APPROVES for scope in row.scopes)
        )

    def is_stale(self, approval: ApprovalRow) -> bool:
        """Return True if an evaluation that counts has come after an approval."""
        return any(
            row.number > approval.evaluation and row.against in self.references and self._is_accepted(row)
            for row in self.evaluations
        )

    def _is_accepted(self, row: EvaluationRow) -> bool:
        return not self._is_own(row) and _accepts(self.rules, row.key, row.job)

    def _is_own(self, row: EvaluationRow) -> bool:
        return row.job is None and row.key in self.version.makers

    def counting(self, gate: EvaluationGate, against: str | None) -> list[EvaluationRow]:
        """Return the evaluations that count for a gate, beside one version."""
        return [
            row
            for row in self.evaluations
            if row.against == against
            and not self._is_own(row)
            and _is_evaluator(gate, row.key, row.job)
            and gate.metric in ("", row.metric)
            and gate.data in ("", row.data)
        ]

    def approvers(self, rule: GateRule) -> tuple[int, bool]:
        """Return the number of people whose approvals count for a rule, and whether others are stale."""
        barred = {*self.version.makers, *self.askers}
        people = {self._person(key) for key in barred}
        stale, approved = False, set()
        for row in self.approvals:
            if not self.is_valid(row.key) or not _may(row.key, rule.approvers):
                continue
            if row.key in barred or self._person(row.key) in people:
                continue
            if self.is_stale(row):
                stale = True
            else:
                approved.add(self._person(row.key))
        return len(approved), stale

    def _person(self, key: str) -> str:
        """Return what is known of a key's holder: the key's name, if it has one, else its id."""
        row = self.keys.get(key)
        return f"name {row.name}" if row is not None and row.name else key


def _references(session: Session, adapter: AdapterRow) -> list[str | None]:
    """Return the digests of the versions that another one must not be worse than: the active one, or the last
    one that was active, and the one that was let in last. [None], the base, if none ever was active.

    So neither deactivating nor deleting the active version, nor a rollback to a weak one, lowers the mark.
    """

    def newest(*conditions: ColumnElement[bool]) -> str | None:
        return session.scalar(
            select(HistoryRow.version)
            .where(HistoryRow.adapter_id == adapter.id, HistoryRow.version.is_not(None), *conditions)
            .order_by(HistoryRow.id.desc())
            .limit(1)
        )

    found = [adapter.active or newest(), newest(HistoryRow.action == "activate")]
    if not any(found):
        # The name is new, or one that was deleted: its history went with it, and is in the audit log only.
        found = [
            session.scalar(
                select(AuditRow.version)
                .where(
                    AuditRow.target == adapter.name,
                    AuditRow.tenant == adapter.tenant,
                    AuditRow.base_id == adapter.base_id,
                    AuditRow.action == "adapter.activated",
                )
                .order_by(AuditRow.number.desc())
                .limit(1)
            )
        ]
    return list(dict.fromkeys(one for one in found if one)) or [None]


def _rules(session: Session, adapter: AdapterRow) -> list[GateRule]:
    """Return the rules that apply to an adapter."""

    def may_match(column: Any, value: str) -> ColumnElement[bool]:
        return or_(column == value, *(column.contains(one) for one in _WILDCARDS))

    rows = session.scalars(
        select(GateRow)
        .where(may_match(GateRow.tenant, adapter.tenant), may_match(GateRow.name, adapter.name))
        .order_by(GateRow.id)
    )
    return [
        rule
        for rule in map(_rule, rows)
        if fnmatchcase(adapter.tenant, rule.tenant) and fnmatchcase(adapter.name, rule.name)
    ]


def _accepts(rules: Sequence[GateRule], key: str, job: str | None) -> bool:
    """Return True if an evaluation of this key, or of this job, is one that some rule looks at.

    Where none asks for an evaluation, those who may approve may also say what they measured.
    """
    gates = [rule.evaluation for rule in rules if rule.evaluation is not None]
    if gates:
        return any(_is_evaluator(gate, key, job) for gate in gates)
    asked = [rule for rule in rules if rule.approvals]
    return job is not None or not asked or any(_may(key, rule.approvers) for rule in asked)


def _is_evaluator(gate: EvaluationGate, key: str, job: str | None) -> bool:
    return _may(JOBS if job is not None else key, gate.evaluators)


def _may(key: str, named: Sequence[str]) -> bool:
    return not named or key in named


# ---- each gate -----------------------------------------------------------------------------------


def _states(evidence: _Evidence) -> list[GateState]:
    states: list[GateState] = []
    version = evidence.version
    for rule in evidence.rules:
        found: list[tuple[GateName, bool, str]] = []
        if rule.signature:
            found.append(("signature", *_signature(rule, version)))
        if rule.proof != "none":
            found.append(("proof", *_proof(rule, version)))
        if rule.evaluation is not None:
            found.append(("evaluation", *_evaluated(rule, rule.evaluation, evidence)))
        if rule.weights is not None:
            found.append(("weights", *_weights(rule.weights, version)))
        if rule.approvals:
            found.append(("approval", *_approved(rule, evidence)))
        states += [
            GateState(gate=gate, passed=passed, rule=rule.id, reason=reason) for gate, passed, reason in found
        ]
    return states


def _signature(rule: GateRule, version: VersionRow) -> tuple[bool, str]:
    report: Mapping[str, Any] = version.source.get("signature") or {}
    signer = str(report.get("signer") or "")
    # The server signs whatever its jobs train, so that no pattern stands for it: it has to be named.
    matches = (
        one == signer or (signer != SERVER_SIGNER and fnmatchcase(signer, one)) for one in rule.signature
    )
    if report.get("status") == "verified" and any(matches):
        return True, f"signed by {signer}."
    wanted = " or ".join("any signer but this server" if one == "*" else one for one in rule.signature)
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


def _evaluated(rule: GateRule, gate: EvaluationGate, evidence: _Evidence) -> tuple[bool, str]:
    """Return whether the version is not worse than each of its references, by all evaluations that count."""
    version, adapter = evidence.version, evidence.adapter
    good: list[str] = []
    bad: list[str] = []
    for against in evidence.references:
        if against == version.digest:
            good.append("it was let in before, and nothing has come since.")
            continue
        if against is None:
            beside = "the base"
        elif against == adapter.active:
            beside = f"the active version {against[:12]}"
        else:
            beside = f"version {against[:12]}, which was active before"
        rows = evidence.counting(gate, against)
        if not rows and against in evidence.gone:
            passed, reason = _replaces_deleted(rule, beside, evidence)
        elif not rows:
            passed, reason = False, _not_evaluated(gate, beside)
        else:
            passed, reason = _worst_of(gate, rows, beside)
        (good if passed else bad).append(reason)
    return not bad, " ".join(bad or good)


def _replaces_deleted(rule: GateRule, beside: str, evidence: _Evidence) -> tuple[bool, str]:
    needed = max(1, rule.approvals)
    approved, _ = evidence.approvers(rule)
    if approved >= needed:
        return True, f"{beside} and was deleted, and {approved} approved this one."
    return False, (
        f"it cannot be compared with {beside} and was deleted, so that {needed} "
        f"{'person' if needed == 1 else 'people'} must approve it. With another person's key: onebase "
        f"adapters approve {evidence.adapter.name}@{evidence.version.digest[:12]}"
    )


def _not_evaluated(gate: EvaluationGate, beside: str) -> str:
    conditions = [f"by {gate.metric}"] if gate.metric else []
    conditions += [f"on the file with SHA-256 {gate.data[:12]}"] if gate.data else []
    how = " ".join(["", *conditions])
    if gate.evaluators:
        jobs = " or a job" if JOBS in gate.evaluators else ""
        return (
            f"it was not evaluated beside {beside}{how} by a key that the gate names{jobs}. Have the holder "
            "of one evaluate it (onebase adapters evaluate)."
        )
    return (
        f"it was not evaluated beside {beside}{how}. Evaluate it with another key (onebase adapters "
        "evaluate), or train it by a job with held-out rows and a metric."
    )


def _worst_of(gate: EvaluationGate, rows: Sequence[EvaluationRow], beside: str) -> tuple[bool, str]:
    """Return the result of the evaluation that speaks most against the version, or of the newest if none
    does."""
    reasons = []
    for row in rows:
        slices = _evaluation(row).slices
        small = [one.slice or "rows without one" for one in slices if one.rows < gate.rows] * (
            len(slices) > 1
        )
        unjudged = f" Not judged alone, with fewer than {gate.rows} rows: {_first(small)}." if small else ""
        who = f" (by {row.job or row.key})" if len(rows) > 1 else ""
        if missing := _missing(gate, slices):
            return False, f"the evaluation beside {beside}{who} {missing}."
        if worst := _worst(gate, slices):
            return False, (
                f"by {row.metric} it may be worse than {beside} by more than {gate.margin:g} "
                f"(confidence {gate.confidence:g}){who}: {_first(worst)}. Evaluate it on more rows, or send "
                f"a better one.{unjudged}"
            )
        reasons.append(
            f"by {row.metric} it is not worse than {beside} in any slice that is judged.{unjudged}"
        )
    return True, reasons[0]


def _missing(gate: EvaluationGate, slices: Sequence[SliceScore]) -> str:
    """Return what an evaluation lacks, as the end of a sentence, or ""."""
    rows = sum(one.rows for one in slices)
    if rows < gate.total:
        return f"has {rows} rows, and {gate.total} are needed"
    large = {one.slice for one in slices if one.rows >= gate.rows}
    if lacking := [name for name in gate.slices if name not in large]:
        return f"needs {gate.rows} rows or more of each of these slices: {_first(lacking)}"
    return ""


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


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


def _approved(rule: GateRule, evidence: _Evidence) -> tuple[bool, str]:
    approved, stale = evidence.approvers(rule)
    if approved >= rule.approvals:
        return True, f"approved by {approved}."
    why = ", since it was evaluated again after an approval" if stale else ""
    return False, (
        f"{rule.approvals} {'person' if rule.approvals == 1 else 'people'} who neither made nor activate it "
        f"must approve it, and {approved} {'has' if approved == 1 else 'have'}{why}. With another person's "
        f"key: onebase adapters approve {evidence.adapter.name}@{evidence.version.digest[:12]}"
    )


def _evaluation(row: EvaluationRow) -> VersionEvaluation:
    return VersionEvaluation(
        against=row.against,
        metric=row.metric,
        slices=convert(tuple(row.slices), tuple[SliceScore, ...]),
        key=row.key,
        job=row.job,
        data=row.data,
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
