"""Rollouts: a version that answers a share of a name's requests, what its answers were like, and the end.

The share and the end are parts of an adapter, written in its transactions. Figures are sums, to which each
server adds what it has seen; they change nothing that a catalog follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from sqlalchemy import Insert, delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from onebase_adapters.registry import audit, gates
from onebase_adapters.registry.database import Database, plain, plain_json
from onebase_adapters.registry.errors import NotReadyError, RolloutStateError, UnknownRolloutError
from onebase_adapters.registry.records import (
    AuditAction,
    RolloutAnswer,
    RolloutFigures,
    RolloutRecord,
    RolloutSide,
    RolloutState,
    record_of,
)
from onebase_adapters.registry.tables import (
    AdapterRow,
    RolloutAnswerRow,
    RolloutFigureRow,
    RolloutRow,
    VersionRow,
)
from onebase_adapters.registry.usage import is_new_batch

RUNNING: RolloutState = "running"
_AUDITED: Mapping[RolloutState, AuditAction] = {
    "promoted": "rollout.promoted",
    "rolled_back": "rollout.rolled_back",
    "stopped": "rollout.stopped",
}
_AT_ONCE = 500
"""Largest number of rows that one statement writes."""


# ---- in a write transaction on the adapter -----------------------------------------------------


def start(
    session: Session, adapter: AdapterRow, candidate: VersionRow, rollout: RolloutRecord, at: float
) -> RolloutRecord:
    """Start a rollout. Raises RolloutStateError, NotReadyError; GateError if somebody would get its
    answers."""
    if adapter.rollout is not None:
        raise RolloutStateError(
            f"A rollout of {adapter.name!r} runs already, to version {adapter.rollout.candidate[:12]}: "
            "promote it or roll it back first."
        )
    if candidate.state != "ready":
        raise NotReadyError(
            f"Version {candidate.digest} of {adapter.name!r} is {candidate.state}: only a ready one can be "
            "rolled out.",
            candidate.state,
        )
    if adapter.active is None or candidate.digest == adapter.active:
        why = "no version is active" if adapter.active is None else "this version is the active one"
        raise RolloutStateError(
            f"A rollout compares a version with the active one, and of {adapter.name!r} {why}: "
            f"{'activate one first' if adapter.active is None else 'name another version'}."
        )
    if rollout.percent:
        gates.check(session, adapter, candidate)
    row = RolloutRow(
        id=rollout.id,
        adapter_id=adapter.id,
        candidate=candidate.digest,
        baseline=adapter.active,
        state=RUNNING,
        percent=rollout.percent,
        shadow=rollout.shadow,
        settings=plain_json(rollout.settings),
        created_at=at,
        created_by=plain(rollout.created_by),
    )
    session.add(row)
    settle(adapter)
    _saw(session, adapter)
    details = {"percent": row.percent, "shadow": row.shadow, "baseline": row.baseline, **row.settings}
    _note(session, "rollout.started", adapter, row, row.created_by, {"rollout": row.id, **details})
    return record(row, adapter)


def running(session: Session, adapter: AdapterRow, rollout: str | None = None) -> RolloutRow:
    """Return the adapter's running rollout. Raises RolloutStateError if none runs, or another."""
    found = adapter.rollout
    if found is None or rollout not in (None, found.id):
        raise RolloutStateError(f"No rollout of {adapter.name!r} runs: it has ended, or was never started.")
    return found


def change(
    session: Session, adapter: AdapterRow, percent: float | None, shadow: float | None
) -> RolloutRecord:
    """Change the shares of the rollout that runs. Raises RolloutStateError; GateError for a larger share."""
    row = running(session, adapter)
    if percent is not None and percent > row.percent:
        candidate = _candidate(session, adapter, row)
        if candidate is None:
            raise RolloutStateError(f"The candidate of the rollout of {adapter.name!r} was deleted.")
        gates.check(session, adapter, candidate, (row.created_by,))
    elif percent == 0 and row.percent:
        _use_up(session, adapter, row)
    before = {"percent": row.percent, "shadow": row.shadow}
    row.percent = row.percent if percent is None else percent
    row.shadow = row.shadow if shadow is None else shadow
    session.flush()
    facts = {"rollout": row.id, "percent": row.percent, "shadow": row.shadow, "before": before}
    _note(session, "rollout.changed", adapter, row, "", facts)
    return record(row, adapter)


def end(
    session: Session,
    adapter: AdapterRow,
    row: RolloutRow,
    state: RolloutState,
    reason: str,
    at: float,
    *,
    figures: RolloutFigures | None = None,
    facts: Mapping[str, object] | None = None,
    actor: str = "",
) -> RolloutRecord:
    """End a rollout, with the figures that led to it, and with further facts for the audit log.

    The approvals of a candidate that had a share of the requests are used up, unless it is promoted: they
    let it in once.
    """
    if state != "promoted" and row.percent:
        _use_up(session, adapter, row)
    row.figures = plain_json(figures_of(session, row.number) if figures is None else figures)
    row.state, row.reason, row.ended_at, row.ended_by = state, plain(reason), at, plain(actor)
    settle(adapter)
    _saw(session, adapter)
    sums = {side: _without_clusters(one) for side, one in row.figures.items()}
    known = {"rollout": row.id, "reason": row.reason, "baseline": row.baseline, "figures": sums}
    _note(session, _AUDITED[state], adapter, row, actor, {**known, **(facts or {})})
    return record(row, adapter)


def settle(adapter: AdapterRow) -> None:
    """Note that somebody chose which versions of the name answer, after all that are ready: none of them
    becomes active by itself any more. One that is not ready yet still does, unless the name is
    deactivated."""
    for version in adapter.versions:
        if version.state == "ready":
            version.activates = False


def _candidate(session: Session, adapter: AdapterRow, row: RolloutRow) -> VersionRow | None:
    return session.scalar(
        select(VersionRow).where(VersionRow.adapter_id == adapter.id, VersionRow.digest == row.candidate)
    )


def _use_up(session: Session, adapter: AdapterRow, row: RolloutRow) -> None:
    """Delete the approvals of a candidate whose share of the requests ends."""
    candidate = _candidate(session, adapter, row)
    if candidate is not None:
        gates.use_up(session, candidate)


def _without_clusters(sums: Mapping[str, float]) -> dict[str, float]:
    return {figure: value for figure, value in sums.items() if not figure.rpartition(".")[2].isdecimal()}


def active_changed(session: Session, adapter: AdapterRow, digest: str | None, actor: str, at: float) -> None:
    """End the running rollout, since the version that it compares with is active no more."""
    row = adapter.rollout
    if row is None:
        return
    promoted = digest == row.candidate
    state: RolloutState = "promoted" if promoted else "stopped"
    reason = "the candidate was activated" if promoted else "another version was activated, or none"
    end(session, adapter, row, state, reason, at, actor=actor)


def version_deleted(session: Session, adapter: AdapterRow, digest: str, actor: str, at: float) -> None:
    """End the running rollout if this version is its candidate."""
    if adapter.rollout is not None and adapter.rollout.candidate == digest:
        end(session, adapter, adapter.rollout, "stopped", "the candidate was deleted", at, actor=actor)


def _saw(session: Session, adapter: AdapterRow) -> None:
    """Write what has changed, and let the adapter know which rollout runs now."""
    session.flush()
    session.expire(adapter, ["rollout"])


def _note(
    session: Session,
    action: AuditAction,
    adapter: AdapterRow,
    row: RolloutRow,
    actor: str,
    details: Mapping[str, object],
) -> None:
    audit.note(
        session,
        action,
        adapter.tenant,
        adapter.name,
        version=row.candidate,
        base_id=adapter.base_id,
        actor=actor,
        details=details,
    )


def record(row: RolloutRow, adapter: AdapterRow) -> RolloutRecord:
    """Convert a row."""
    return record_of(
        RolloutRecord, row, tenant=adapter.tenant, name=adapter.name, figures=dict(row.figures or {})
    )


def figures_of(session: Session, number: int) -> dict[str, dict[str, float]]:
    """Return the sums of a rollout so far, by side and by figure."""
    found: dict[str, dict[str, float]] = {}
    for row in session.scalars(select(RolloutFigureRow).where(RolloutFigureRow.rollout == number)):
        found.setdefault(row.side, {})[row.figure] = row.value
    return found


# ---- apart from the adapter --------------------------------------------------------------------


class Rollouts:
    """Figures and answers of the rollouts of one base. All methods block, and may be called from any thread.

    Raises RegistryBusyError, RegistryFullError and RegistryError like Registry.
    """

    def __init__(self, database: Database, base_id: str) -> None:
        self._database = database
        self._base_id = base_id

    def of_adapter(self, tenant: str, name: str, limit: int) -> list[RolloutRecord]:
        """Return an adapter's rollouts, newest first; the one that runs has the figures of now."""
        with self._database.read() as session:
            rows = session.execute(
                select(RolloutRow, AdapterRow)
                .join(AdapterRow, AdapterRow.id == RolloutRow.adapter_id)
                .where(
                    AdapterRow.base_id == self._base_id,
                    AdapterRow.tenant == plain(tenant),
                    AdapterRow.name == plain(name),
                )
                .order_by(RolloutRow.number.desc())
                .limit(limit)
            )
            return [_with_figures(session, row, adapter) for row, adapter in rows]

    def find(self, rollout: str) -> RolloutRecord:
        """Return a rollout; the figures are those of now while it runs. Raises UnknownRolloutError."""
        with self._database.read() as session:
            found = session.execute(
                select(RolloutRow, AdapterRow)
                .join(AdapterRow, AdapterRow.id == RolloutRow.adapter_id)
                .where(RolloutRow.id == plain(rollout))
            ).one_or_none()
            if found is None:
                raise UnknownRolloutError(f"There is no rollout {rollout[:80]!r}.")
            return _with_figures(session, *found)

    def add(
        self,
        writer: str,
        batch: int,
        figures: Mapping[tuple[str, RolloutSide, str], float],
        answers: Sequence[RolloutAnswer],
    ) -> None:
        """Add figures, by rollout, side and name, to the sums of those that run, and keep answers.

        A batch whose outcome is unknown may be written again: it counts once. writer, batch: as in
        `UsageRecords.write`.
        """
        with self._database.write_uncounted() as session:
            if not is_new_batch(session, writer, batch):
                return
            ids = {key[0] for key in figures} | {answer.rollout for answer in answers}
            numbers, running = _numbers(session, ids)
            sums = [
                {"rollout": numbers[key[0]], "side": key[1], "figure": key[2], "value": figures[key]}
                for key in sorted(figures)
                if key[0] in running
            ]
            kept = [
                {
                    "tenant": plain(one.tenant), "id": plain(one.id), "rollout": numbers[one.rollout],
                    "side": one.side, "at": one.at, "score": None, "cluster": one.cluster,
                }
                for one in answers
                if one.rollout in numbers
            ]  # fmt: skip
            for begin in range(0, len(sums), _AT_ONCE):
                session.execute(_adding(session), sums[begin : begin + _AT_ONCE])
            for begin in range(0, len(kept), _AT_ONCE):
                session.execute(_keeping(session), kept[begin : begin + _AT_ONCE])

    def rate(self, tenant: str, answer: str, score: float) -> tuple[RolloutAnswer, bool] | None:
        """Set the score (0 to 1) of a tenant's answer; a later one takes the place of an earlier one.

        Returns the answer, and whether it counts: its rollout still runs. None if there is no such answer.
        """
        with self._database.write_uncounted() as session:
            found = session.get(RolloutAnswerRow, (plain(tenant), plain(answer)), with_for_update=True)
            if found is None:
                return None
            rollout = session.get_one(RolloutRow, found.rollout)
            before, found.score = found.score, score
            counts = rollout.state == RUNNING
            if counts:
                changes = {
                    "feedback.n": float(before is None),
                    "feedback.sum": score - (before or 0.0),
                    "feedback.squares": score**2 - (before or 0.0) ** 2,
                }
                if found.cluster is not None:
                    changes |= {
                        f"{name}.{found.cluster}": changes[name] for name in ("feedback.n", "feedback.sum")
                    }
                rows = [
                    {"rollout": rollout.number, "side": found.side, "figure": name, "value": value}
                    for name, value in sorted(changes.items())
                ]
                session.execute(_adding(session), rows)
            side = cast(RolloutSide, found.side)
            return RolloutAnswer(tenant, answer, rollout.id, side, found.at, score, found.cluster), counts

    def forget_answers(self, before: float) -> None:
        """Delete the answers that ended before that time (Unix seconds)."""
        with self._database.write_uncounted() as session:
            session.execute(delete(RolloutAnswerRow).where(RolloutAnswerRow.at < before))


def _with_figures(session: Session, row: RolloutRow, adapter: AdapterRow) -> RolloutRecord:
    figures = figures_of(session, row.number) if row.state == RUNNING else dict(row.figures or {})
    return record_of(RolloutRecord, row, tenant=adapter.tenant, name=adapter.name, figures=figures)


def _numbers(session: Session, ids: set[str]) -> tuple[dict[str, int], set[str]]:
    """Return the numbers of rollouts by id, and the ids of those that run. None of them changes until the
    transaction has ended."""
    query = select(RolloutRow.id, RolloutRow.number, RolloutRow.state).where(RolloutRow.id.in_(ids))
    rows = session.execute(query.order_by(RolloutRow.number).with_for_update()).all()
    return {row.id: row.number for row in rows}, {row.id for row in rows if row.state == RUNNING}


def _insert(session: Session, table: type) -> postgresql.Insert | sqlite.Insert:
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    made: postgresql.Insert | sqlite.Insert = dialect.insert(table)
    return made


def _adding(session: Session) -> Insert:
    insert = _insert(session, RolloutFigureRow)
    return insert.on_conflict_do_update(
        index_elements=["rollout", "side", "figure"],
        set_={"value": RolloutFigureRow.value + insert.excluded.value},
    )


def _keeping(session: Session) -> Insert:
    return _insert(session, RolloutAnswerRow).on_conflict_do_nothing(index_elements=["tenant", "id"])
