"""Take over jobs of other servers: their files in the store, and the change of the server that runs them.

A job belongs to `server`, which names itself in every write and is refused once the job is another's. Another
server may take it over when its server's lease has run out, or while it waits in the queue if it would start
sooner there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from sqlalchemy import ColumnElement, and_, delete, or_, select
from sqlalchemy.orm import Session

from onebase_adapters.registry.database import Database, clock, plain, referenced_blobs
from onebase_adapters.registry.errors import JobElsewhereError, UnknownJobError
from onebase_adapters.registry.jobs import event_row, job_record
from onebase_adapters.registry.records import (
    ENDED_STATES,
    OPEN_STATES,
    JobEvent,
    TakeableJob,
    TrainingJob,
    UnkeptJob,
)
from onebase_adapters.registry.servers import leases_of
from onebase_adapters.registry.tables import CheckpointRow, JobFileRow, TrainingJobRow

MOST_LOOKED_AT = 200
"""Largest number of other servers' jobs that one look considers, the oldest ones."""
_HOLD_OFF_SECONDS = 10.0
"""Seconds after the end of a lease in which only the server with most room may take over its jobs."""


class Takeovers:
    """Takeovers of one base's jobs. All methods block, may be called from any thread, and are one
    transaction. Raises RegistryBusyError, RegistryFullError and RegistryError like Registry."""

    def __init__(self, database: Database, base_id: str) -> None:
        self._database = database
        self._base_id = base_id

    # ---- from one server to another ----------------------------------------------------------

    def takeable(self, server: str, room: int) -> list[TakeableJob]:
        """Return jobs of other servers that this one, with room for so many trainers, may take; oldest
        first."""
        with self._database.read() as session:
            now, leases = clock(session), leases_of(session, self._base_id)
            row = TrainingJobRow
            lost = [name for name, (until, _) in leases.items() if until < now and name != server]
            busier = [name for name, (_, there) in leases.items() if there < room and name != server]
            rows = session.scalars(
                select(row)
                .where(
                    *self._scope(),
                    or_(
                        and_(row.server.in_(lost), row.state.in_(OPEN_STATES)),
                        and_(row.server.in_(busier), row.state == "queued"),
                    ),
                )
                # Lost ones first: else queued jobs that may not be taken would hide them.
                .order_by(row.server.in_(lost).desc(), row.number)
                .limit(MOST_LOOKED_AT)
            )
            return [
                TakeableJob(job.id, job.tenant, job.server, job.training_file, job.validation_file)
                for job in rows
                if _may_take(job, leases, server, room, now)
            ]

    def take_job(
        self, job_id: str, before: str, server: str, room: int, event_of: Callable[[TrainingJob], JobEvent]
    ) -> TrainingJob:
        """Transfer a job from the server `before` to this one, without what the store does not have of it.

        Args:
            event_of: returns the event, given the job as it is resumed.

        Raises JobElsewhereError: it cannot be taken over now.
        """
        with self._database.write_uncounted() as session:
            row = self._job(session, job_id)
            now, leases = clock(session), leases_of(session, self._base_id)
            open_there = row.server == before and row.state in OPEN_STATES
            if not open_there or not _may_take(row, leases, server, room, now):
                raise JobElsewhereError(f"Job {job_id} cannot be taken over now.")
            row.server = server
            row.saved_step = row.kept_step
            session.execute(
                delete(CheckpointRow).where(
                    CheckpointRow.job == row.number, CheckpointRow.step != row.kept_step
                )
            )
            if not row.kept_adapter:
                row.report = None
            if row.state == "running":
                # As by a death of its trainer: it may be what ended the server.
                row.deaths = row.deaths + 1 if row.saved_step <= row.death_step else 1
                row.death_step, row.state = row.saved_step, "queued"
            session.add(event_row(row.number, event_of(job_record(row))))
            session.flush()
            return job_record(row)

    # ---- what the store has of a job ---------------------------------------------------------

    def unkept(self, server: str, passing: Collection[str]) -> list[UnkeptJob]:
        """Return a server's unended or resumable jobs whose newest checkpoint or adapter is not in the store.

        passing: errors after which a failed job may be resumed.
        """
        row = TrainingJobRow
        query = (
            select(row.id, CheckpointRow.step, CheckpointRow.path, row.report.is_not(None))
            .join(CheckpointRow, and_(CheckpointRow.job == row.number, CheckpointRow.step == row.saved_step))
            .where(
                *self._scope(),
                row.server == server,
                or_(row.saved_step > row.kept_step, and_(row.report.is_not(None), ~row.kept_adapter)),
                or_(
                    row.state.not_in(ENDED_STATES),
                    and_(row.state == "failed", row.error_code.in_(list(passing))),
                ),
            )
            .order_by(row.number)
        )
        with self._database.read() as session:
            return [UnkeptJob(*found) for found in session.execute(query)]

    def keep(
        self, job_id: str, server: str, step: int, files: Mapping[str, str], *, adapter: bool
    ) -> dict[str, str]:
        """Record the files that the job resumes from after this step: blobs by their paths in its folder.

        They replace earlier ones. Returns the earlier files whose blobs nothing references any more, in the
        same form. Raises UnknownJobError; JobElsewhereError: another server has the job, or it has ended.
        """
        with self._database.write_uncounted() as session:
            row = self._job(session, job_id)
            if row.server != server or row.state in ("succeeded", "cancelled"):
                raise JobElsewhereError(f"Job {job_id} has ended here.")
            left = self._delete_files(session, row)
            session.add_all(JobFileRow(job=row.number, path=path, sha256=sha) for path, sha in files.items())
            row.kept_step, row.kept_adapter = step, adapter
            session.flush()
            return _unreferenced(session, left)

    def kept(self, job_id: str) -> dict[str, str]:
        """Return the blobs by their paths in the job's folder. Raises UnknownJobError."""
        with self._database.read() as session:
            number = self._job(session, job_id, lock=False).number
            return _paths(session, JobFileRow.job == number)

    def drop(self, job_id: str, server: str | None = None) -> dict[str, str]:
        """Drop a job's files from the store, because it has ended or does not resume from them.

        server: the job's server if the job is still open; None: the job has ended. Returns as `keep` does.

        Raises UnknownJobError; JobElsewhereError: another server has the job.
        """
        with self._database.write_uncounted() as session:
            row = self._job(session, job_id)
            if server is not None and row.server != server:
                raise JobElsewhereError(f"Job {job_id} is another server's.")
            left = self._delete_files(session, row)
            row.kept_step, row.kept_adapter = 0, False
            session.flush()
            return _unreferenced(session, left)

    def drop_ended(self, passing: Collection[str]) -> None:
        """Drop the files of all jobs that have ended for good, on any server. The store's sweep deletes the
        blobs."""
        row = TrainingJobRow
        ended = select(row.number).where(
            or_(
                row.state.in_(("succeeded", "cancelled")),
                and_(
                    row.state == "failed",
                    or_(row.error_code.is_(None), row.error_code.not_in(list(passing))),
                ),
            )
        )
        with self._database.write_uncounted() as session:
            session.execute(delete(JobFileRow).where(JobFileRow.job.in_(ended)))

    def _delete_files(self, session: Session, row: TrainingJobRow) -> dict[str, str]:
        of_job = JobFileRow.job == row.number
        files = _paths(session, of_job)
        session.execute(delete(JobFileRow).where(of_job))
        return files

    def _scope(self) -> tuple[ColumnElement[bool]]:
        return (TrainingJobRow.base_id == self._base_id,)

    def _job(self, session: Session, job_id: str, *, lock: bool = True) -> TrainingJobRow:
        query = select(TrainingJobRow).where(*self._scope(), TrainingJobRow.id == plain(job_id))
        row = session.scalar(query.with_for_update() if lock else query)
        if row is None:
            raise UnknownJobError(f"There is no job {job_id[:80]!r} on this base.")
        return row


def _may_take(
    row: TrainingJobRow, leases: Mapping[str, tuple[float, int]], server: str, room: int, now: float
) -> bool:
    """Return True if a server with so much room may take over the job of another."""
    lease = leases.get(row.server)
    if lease is None or room <= 0:
        return False
    until, room_there = lease
    others = (free for name, (end, free) in leases.items() if name != server and end >= now)
    has_most = room >= max(others, default=0)
    if until < now:
        return has_most or until + _HOLD_OFF_SECONDS < now
    return has_most and room > room_there and _is_movable(row)


def _is_movable(row: TrainingJobRow) -> bool:
    """Return True if a job in the queue can continue elsewhere without losing a step."""
    return row.state == "queued" and row.report is None and row.saved_step <= row.kept_step


def _paths(session: Session, where: ColumnElement[bool]) -> dict[str, str]:
    found = session.execute(select(JobFileRow.path, JobFileRow.sha256).where(where))
    return {row.path: row.sha256 for row in found}


def _unreferenced(session: Session, files: Mapping[str, str]) -> dict[str, str]:
    needed = referenced_blobs(session, set(files.values()))
    return {path: sha256 for path, sha256 in files.items() if sha256 not in needed}
