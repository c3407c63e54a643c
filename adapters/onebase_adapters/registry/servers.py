"""Servers that share a registry: their leases, their room for trainers, and the use of quotas they admit.

A server's process renews a lease. A server whose lease has run out counts as dead: others take over what it
ran. All times are those of the database's clock, so that servers need not agree on theirs. Where that clock
went back by more than a lease, an earlier lease has run out; a live server renews it at once.

A process's id is `<lock>.<random>`, where the lock is that of its data folder. Among the processes that run
jobs under one server's id, live ones have the same lock: an earlier one with this lock is dead, and one with
another lock has a copy of the data folder.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Insert, delete, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from onebase_adapters.registry.database import Database, clock, plain
from onebase_adapters.registry.errors import ServerIdInUseError
from onebase_adapters.registry.records import OtherServer, QuotaUse
from onebase_adapters.registry.tables import ChangeCounter, QuotaUseRow, ServerRow

USE_SECONDS = 60.0
"""Time, in seconds, for which the use that a process has admitted counts."""
_KEPT_SECONDS = 30 * 86400.0
"""Time, in seconds, after which a dead process is forgotten; nobody owns its work then, and it may be
cancelled."""


class ServerRecords:
    """Processes of servers on one registry, each under an id of its own.

    All methods block, and may be called from any thread. Raises RegistryBusyError, RegistryFullError and
    RegistryError like Registry.
    """

    def __init__(self, database: Database, base_id: str) -> None:
        self._database = database
        self._base_id = base_id

    def renew(self, process: str, server: str, *, runs: bool, room: int, seconds: float) -> list[OtherServer]:
        """Renew the lease of a process for so many seconds. Returns the other processes, dead ones too.

        Args:
            server: the id of its data folder. runs: whether it runs that folder's jobs.
            room: trainers that it could start now.

        Raises ServerIdInUseError: a live process with another lock runs jobs under this server's id.
        """
        with self._database.write_uncounted() as session:
            if runs:
                _check_alone(session, process, server)
            now = clock(session)
            values = {
                "id": process, "server": server, "base_id": self._base_id, "runs": runs, "room": room,
                "at": now, "until": now + seconds,
            }  # fmt: skip
            session.execute(upserting(session, ServerRow, ("id",)), [values])
            others = session.scalars(select(ServerRow).where(ServerRow.id != process)).all()
            if any(row.until < now - _KEPT_SECONDS for row in others):
                session.execute(delete(ServerRow).where(ServerRow.until < now - _KEPT_SECONDS))
            return [
                OtherServer(
                    row.server,
                    row.base_id == self._base_id,
                    row.runs,
                    row.room,
                    _until(row.at, row.until, now) >= now,
                )
                for row in others
                if row.until >= now - _KEPT_SECONDS
            ]

    def leave(self, process: str) -> None:
        """End the lease of a process that stops: what it ran may be taken over at once."""
        with self._database.write_uncounted() as session:
            now = clock(session)
            session.execute(update(ServerRow).where(ServerRow.id == process).values(until=now, room=0))

    # ---- quotas ------------------------------------------------------------------------------

    def share_use(
        self, process: str, own: Collection[QuotaUse], since: float
    ) -> tuple[float, list[tuple[str, QuotaUse]]]:
        """Write the use that this process has admitted, and read what others have written since a time.

        Each written use replaces the one before. Returns the database's time, and the others' uses with the
        processes that admitted them; their ages are as of that time.
        """
        if not own:
            with self._database.read() as session:
                return _uses(session, process, since)
        with self._database.write_uncounted() as session:
            now = clock(session)
            # In one order, so that two processes never wait for each other.
            values = [_values(process, use, now) for use in sorted(own, key=lambda use: (use.kind, use.name))]
            session.execute(upserting(session, QuotaUseRow, ("process", "kind", "name")), values)
            return _uses(session, process, since)

    def forget_use(self) -> None:
        """Delete uses that no longer count."""
        with self._database.write_uncounted() as session:
            session.execute(delete(QuotaUseRow).where(QuotaUseRow.at < clock(session) - 2 * USE_SECONDS))


def leases_of(session: Session, base_id: str) -> dict[str, tuple[float, int]]:
    """Return the end of the lease, and the room, of each server of a base that runs jobs."""
    rows = session.execute(
        select(ServerRow.server, ServerRow.at, ServerRow.until, ServerRow.room).where(
            ServerRow.base_id == base_id, ServerRow.runs
        )
    )
    leases: dict[str, tuple[float, int]] = {}
    now = clock(session)
    for server, at, end, room in rows:
        until = _until(at, end, now)
        leases[server] = max(leases.get(server, (until, room)), (until, room))
    return leases


def _check_alone(session: Session, process: str, server: str) -> None:
    """Raise ServerIdInUseError if a live process with another lock runs jobs under the server's id.

    A process whose own lease has not run out keeps it.
    """
    own = session.get(ServerRow, process)
    if own is not None and own.runs and _until(own.at, own.until, now := clock(session)) >= now:
        return
    session.execute(select(ChangeCounter.id).with_for_update())  # else two that begin at once miss each other
    now = clock(session)
    query = select(ServerRow).where(ServerRow.server == server, ServerRow.runs).order_by(ServerRow.at.desc())
    for row in session.scalars(query):
        if _lock_of(row.id) != _lock_of(process) and _until(row.at, row.until, now) >= now:
            raise ServerIdInUseError(server, row.at)


def _lock_of(process: str) -> str:
    return process.partition(".")[0]


def _until(at: float, until: float, now: float) -> float:
    """Return the end of a lease that was renewed at `at`; 0 if the clock went back too far since."""
    return until if at <= now + max(0.0, until - at) else 0.0


def _uses(session: Session, process: str, since: float) -> tuple[float, list[tuple[str, QuotaUse]]]:
    now = clock(session)
    rows = session.scalars(select(QuotaUseRow).where(QuotaUseRow.process != process, QuotaUseRow.at >= since))
    return now, [(row.process, _use(row, now - row.at)) for row in rows]


def _values(process: str, use: QuotaUse, now: float) -> dict[str, Any]:
    held = {"requests": use.requests, "tokens": use.tokens, "sequences": use.sequences}
    return {"process": process, "kind": use.kind, "name": plain(use.name), "at": now, "use": held}


def _use(row: QuotaUseRow, older: float) -> QuotaUse:
    """Convert a row. older: seconds since it was written."""
    aged = {
        rate: tuple((age + older, amount) for age, amount in row.use.get(rate) or ())
        for rate in ("requests", "tokens")
    }
    return QuotaUse(row.kind, row.name, **aged, sequences=int(row.use.get("sequences") or 0), age=older)


def upserting(session: Session, table: Any, key: Sequence[str]) -> Insert:
    """Return an insert that replaces the row with this key."""
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    insert: postgresql.Insert | sqlite.Insert = dialect.insert(table)
    columns = [column.name for column in table.__table__.columns if column.name not in key]
    return insert.on_conflict_do_update(
        index_elements=list(key), set_={name: insert.excluded[name] for name in columns}
    )
