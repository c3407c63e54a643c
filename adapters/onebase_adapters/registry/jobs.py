"""Training files and jobs in the registry: their requests, their progress and their events."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

from sqlalchemy import ColumnElement, and_, delete, func, or_, select
from sqlalchemy.orm import Session

from onebase_adapters.registry import audit
from onebase_adapters.registry.audit import Origin
from onebase_adapters.registry.database import Database, plain, plain_json, referenced_blobs
from onebase_adapters.registry.errors import (
    BatchElsewhereError,
    FileInUseError,
    JobElsewhereError,
    JobStateError,
    RegistryError,
    UnknownFileError,
    UnknownJobError,
)
from onebase_adapters.registry.quotas import check_adapters, check_bytes, check_jobs, check_training
from onebase_adapters.registry.records import (
    ENDED_STATES,
    JOB_STATES,
    OPEN_BATCHES,
    OPEN_STATES,
    UPLOADED,
    AuditAction,
    Checkpoint,
    EventKind,
    FileRecord,
    JobEvent,
    JobState,
    JobStop,
    Level,
    NewJob,
    OpenJob,
    ParentVersion,
    TrainingJob,
    record_of,
)
from onebase_adapters.registry.tables import (
    AdapterRow,
    BatchRow,
    CheckpointRow,
    IdentityRow,
    JobFileRow,
    TrainingEventRow,
    TrainingFileRow,
    TrainingJobRow,
)
from onebase_protocol.training import TrainingFailure

PARENT_FILES = ("parent_config", "parent_weights")
"""Files in a job's folder of the version whose training it continues."""
_FACTS = frozenset(
    {
        "plan", "progress", "report", "saved_step", "deaths", "death_step", "version", "activated",
        "result_file", "hold", "stop",
    }
)  # fmt: skip


class TrainingRecords:
    """Jobs of one base, and files. All methods block, may be called from any thread, and are one transaction.

    A job belongs to one server, which alone runs it: the one that made it, until another takes it over
    (`takeovers`). Any server on the registry may move a job's state (pause, cancel, resume); the owner
    follows the registry. The owner names itself in what it writes of its run, and is refused once it has
    lost the job.

    Raises RegistryBusyError, RegistryFullError and RegistryError like Registry.
    """

    def __init__(self, database: Database, base_id: str) -> None:
        self._database = database
        self._base_id = base_id

    def registry_id(self) -> str:
        """Return the registry's identity, the same for every base and every server."""
        with self._database.read() as session:
            return session.scalars(select(IdentityRow.value)).one()

    # ---- files -------------------------------------------------------------------------------

    def add_file(self, file: FileRecord) -> FileRecord:
        """Register a file, whose blob must already be in the store.

        A known file gets the new content: the curve of a job that is delivered twice. Raises QuotaError for
        a file that a user uploads.
        """
        with self._database.write_uncounted() as session:
            check_owner(session)
            known = session.scalar(select(TrainingFileRow).where(TrainingFileRow.id == file.id))
            if known is not None:
                known.bytes, known.sha256 = file.bytes, file.sha256
            else:
                if file.purpose in UPLOADED:
                    check_bytes(session, file.tenant, file.bytes)
                session.add(
                    TrainingFileRow(
                        id=file.id,
                        tenant=file.tenant,
                        server=file.server,
                        purpose=file.purpose,
                        filename=plain(file.filename),
                        bytes=file.bytes,
                        created_at=file.created_at,
                        sha256=file.sha256,
                    )
                )
                details = {"filename": file.filename, "bytes": file.bytes, "purpose": file.purpose}
                audit.note(session, "file.added", file.tenant, file.id, details=details)
        return file

    def files(
        self,
        tenant: str,
        *,
        purposes: Collection[str] | None = None,
        sha256: str | None = None,
        after: str | None = None,
        limit: int,
        oldest_first: bool = False,
    ) -> list[FileRecord]:
        """Return the files of these purposes and of this content, newest first unless `oldest_first`.

        Raises UnknownFileError for `after`.
        """
        number = TrainingFileRow.number
        with self._database.read() as session:
            query = select(TrainingFileRow).where(TrainingFileRow.tenant == tenant)
            if purposes is not None:
                query = query.where(TrainingFileRow.purpose.in_([plain(purpose) for purpose in purposes]))
            if sha256 is not None:
                query = query.where(TrainingFileRow.sha256 == plain(sha256))
            if after is not None:
                place = find_file(session, tenant, after).number
                query = query.where(number > place if oldest_first else number < place)
            query = query.order_by(number if oldest_first else number.desc()).limit(limit)
            return [_file_record(row) for row in session.scalars(query)]

    def file(self, tenant: str, file_id: str) -> FileRecord:
        """Return a file. Raises UnknownFileError."""
        with self._database.read() as session:
            return _file_record(find_file(session, tenant, file_id))

    def delete_file(self, tenant: str, file_id: str, passing: Collection[str] = ()) -> set[str]:
        """Delete a file that no job and no batch needs. Returns its blob if nothing references that any more.

        Args:
            passing: errors after which a failed job may be resumed, and needs its files.

        Raises UnknownFileError, FileInUseError.
        """
        with self._database.write_uncounted() as session:
            row = find_file(session, tenant, file_id, lock=True)
            user = session.scalar(
                select(TrainingJobRow.id).where(
                    or_(TrainingJobRow.training_file == row.id, TrainingJobRow.validation_file == row.id),
                    or_(
                        TrainingJobRow.state.not_in(ENDED_STATES),
                        and_(TrainingJobRow.state == "failed", TrainingJobRow.error_code.in_(passing)),
                    ),
                )
            )
            if user is not None:
                raise FileInUseError(f"File {row.id} is in use: job {user} needs it.", user)
            batch = session.scalar(
                select(BatchRow.id).where(BatchRow.input_file == row.id, BatchRow.state.in_(OPEN_BATCHES))
            )
            if batch is not None:
                raise FileInUseError(f"File {row.id} is in use: batch {batch} needs it.", batch)
            blobs = {row.sha256}
            audit.note(session, "file.deleted", row.tenant, row.id, details={"filename": row.filename})
            session.delete(row)
            session.flush()
            return blobs - referenced_blobs(session, blobs)

    # ---- jobs --------------------------------------------------------------------------------

    def add_job(self, job: NewJob, event: JobEvent) -> TrainingJob:
        """Add a job in state `validating_files`, with its first event.

        Raises UnknownFileError; QuotaError if the tenant may not train, or may not have the job, its rows or
        its adapter.
        """
        with self._database.write_uncounted() as session:
            check_training(session, job.tenant)
            names = select(AdapterRow.id).where(
                AdapterRow.base_id == self._base_id,
                AdapterRow.tenant == job.tenant,
                AdapterRow.name == job.name,
            )
            files = sorted({job.training_file, job.validation_file or job.training_file})
            for file_id in files:  # locked before the tenant's quotas, by whoever locks both
                find_file(session, job.tenant, file_id, lock=True)
            if session.scalar(names) is None:
                check_adapters(session, job.tenant)
            check_jobs(session, job.tenant, files)
            row = _job_row(job, self._base_id, time.time())
            row.key = audit.current().key
            session.add(row)
            session.flush()
            session.add(event_row(row.number, event))
            if job.parent is not None:  # they outlive the version, wherever the job runs
                blobs = zip(PARENT_FILES, (job.parent.config, job.parent.weights), strict=True)
                session.add_all(JobFileRow(job=row.number, path=path, sha256=sha) for path, sha in blobs)
            asked = ("training_file", "validation_file", "activate")
            parent = None if job.parent is None else f"{job.parent.name}@{job.parent.digest}"
            details = {name: getattr(row, name) for name in asked} | {
                "parent": parent,
                "hold": row.hold or None,
            }
            self._note(session, "job.created", row, details)
            return job_record(row)

    def job(self, tenant: str, job_id: str) -> TrainingJob:
        """Return a job. Raises UnknownJobError."""
        with self._database.read() as session:
            return job_record(self._job(session, job_id, tenant))

    def jobs(
        self, tenant: str, *, after: str | None = None, limit: int, labels: Mapping[str, str] | None = None
    ) -> list[TrainingJob]:
        """Return jobs, newest first, with all of `labels`. Raises UnknownJobError for `after`."""
        with self._database.read() as session:
            query = select(TrainingJobRow).where(*self._scope(tenant))
            if after is not None:
                query = query.where(TrainingJobRow.number < self._job(session, after, tenant).number)
            for key, value in (labels or {}).items():
                query = query.where(_has_label(session, plain(key), plain(value)))
            rows = session.scalars(query.order_by(TrainingJobRow.number.desc()).limit(limit))
            return [job_record(row) for row in rows]

    def training_rates(self, limit: int) -> list[float]:
        """Return the FLOP/s that the newest succeeded jobs of this base trained with, newest first, of any
        tenant."""
        row = TrainingJobRow
        with self._database.read() as session:
            found = session.execute(
                select(row.plan, row.report)
                .where(
                    *self._scope(), row.state == "succeeded", row.report.is_not(None), row.plan.is_not(None)
                )
                .order_by(row.number.desc())
                .limit(limit)
            )
            rates = [_rate(plan, report) for plan, report in found]
        return [rate for rate in rates if rate]

    def open_jobs(self, server: str) -> list[OpenJob]:
        """Return a server's open jobs, oldest first."""
        row = TrainingJobRow
        with self._database.read() as session:
            rows = session.execute(
                select(
                    row.id,
                    row.tenant,
                    row.state,
                    row.saved_step,
                    row.report.is_not(None),
                    row.stop,
                    row.kept_step,
                )
                .where(*self._scope(), row.server == server, row.state.in_(OPEN_STATES))
                .order_by(row.number)
            )
            return [
                OpenJob(
                    id, tenant, cast(JobState, state), saved, trained, stop["step"] if stop else None, kept
                )
                for id, tenant, state, saved, trained, stop, kept in rows
            ]

    def job_ends(self, server: str) -> dict[str, tuple[JobState, str | None]]:
        """Return state and error code of all jobs of one server by their ids, on any base and of any
        tenant."""
        with self._database.read() as session:
            rows = session.execute(
                select(TrainingJobRow.id, TrainingJobRow.state, TrainingJobRow.error_code).where(
                    TrainingJobRow.server == server
                )
            )
            return {row[0]: (cast(JobState, row[1]), row[2]) for row in rows}

    def counts(self) -> dict[str, int]:
        """Return the number of jobs of this base in each state."""
        with self._database.read() as session:
            rows = session.execute(
                select(TrainingJobRow.state, func.count())
                .where(*self._scope())
                .group_by(TrainingJobRow.state)
            )
            return {row[0]: row[1] for row in rows}

    def move(
        self,
        job_id: str,
        state: JobState,
        among: Collection[JobState],
        event: JobEvent | None = None,
        *,
        while_delivered: bool = True,
        server: str | None = None,
        **facts: Any,
    ) -> TrainingJob:
        """Change a job's state, if it is one of `among`, and other fields of TrainingJob with it.

        Args:
            while_delivered: also when it is running and has its report already.
            server: the one that runs the job, if that is the caller.
        Raises UnknownJobError, JobElsewhereError; JobStateError when it is in another state.
        """
        with self._database.write_uncounted() as session:
            row = self._own_job(session, job_id, server)
            delivered = row.state == "running" and row.report is not None
            if row.state not in among or (delivered and not while_delivered):
                raise JobStateError(f"Job {job_id} is {row.state}.", row.state)
            before = cast(JobState, row.state)
            if "stop" in facts and row.stop is not None:
                if before == state:
                    return job_record(row)  # asked for twice at once: it is the first who stopped it
                facts["stop"] = row.stop
            _set_facts(row, state, facts, time.time())
            if event is not None:
                session.add(event_row(row.number, event))
            session.flush()
            action: AuditAction | None = "job.stopped" if "stop" in facts else _audited(before, state)
            if action is not None:
                self._note(session, action, row, {"code": row.error_code, "activated": row.activated})
            return job_record(row)

    def note(
        self,
        job_id: str,
        events: Sequence[JobEvent] = (),
        checkpoints: Iterable[Checkpoint] = (),
        *,
        server: str | None = None,
        **facts: Any,
    ) -> None:
        """Add a run's events and checkpoints; `facts`: fields of TrainingJob.

        Raises UnknownJobError, JobElsewhereError.
        """
        with self._database.write_uncounted() as session:
            row = self._own_job(session, job_id, server)
            session.add_all(event_row(row.number, event) for event in events)
            for checkpoint in checkpoints:
                session.execute(
                    delete(CheckpointRow).where(
                        CheckpointRow.job == row.number, CheckpointRow.step == checkpoint.step
                    )
                )
                session.add(_checkpoint_row(row.number, checkpoint))
                row.saved_step = max(row.saved_step, checkpoint.step)
            _set_facts(row, None, facts, time.time())

    # ---- what jobs said ----------------------------------------------------------------------

    def events(self, job: TrainingJob, *, before: int | None = None, limit: int) -> list[JobEvent]:
        """Return events, newest first, older than the event of number `before`."""
        number = TrainingEventRow.number
        with self._database.read() as session:
            query = select(TrainingEventRow).where(TrainingEventRow.job == job.number)
            if before is not None:
                query = query.where(number < before)
            return [_event_record(row) for row in session.scalars(query.order_by(number.desc()).limit(limit))]

    def events_since(self, job: TrainingJob, after: int, limit: int) -> list[JobEvent]:
        """Return events, oldest first, newer than the event of number `after`."""
        number = TrainingEventRow.number
        with self._database.read() as session:
            query = select(TrainingEventRow).where(TrainingEventRow.job == job.number, number > after)
            return [_event_record(row) for row in session.scalars(query.order_by(number).limit(limit))]

    def checkpoints(self, job: TrainingJob) -> list[Checkpoint]:
        """Return all checkpoints that were written, newest first."""
        with self._database.read() as session:
            rows = session.scalars(
                select(CheckpointRow)
                .where(CheckpointRow.job == job.number)
                .order_by(CheckpointRow.step.desc())
            )
            return [_checkpoint_record(row) for row in rows]

    def _note(
        self, session: Session, action: AuditAction, row: TrainingJobRow, details: Mapping[str, Any]
    ) -> None:
        """Add an entry to the audit log. A server's own actions on a job are attributed to its creator."""
        origin = audit.current()
        if origin == Origin() and action in ("job.succeeded", "job.failed"):
            origin = Origin(row.key or "", actor=f"job {row.id}")
        kept = {name: value for name, value in details.items() if value is not None}
        audit.note(
            session,
            action,
            row.tenant,
            row.id,
            version=row.version,
            base_id=row.base_id,
            origin=origin,
            details={"adapter": row.name, **kept},
        )

    def _scope(self, tenant: str | None = None) -> list[ColumnElement[bool]]:
        conditions = [TrainingJobRow.base_id == self._base_id]
        return conditions if tenant is None else [*conditions, TrainingJobRow.tenant == tenant]

    def _job(
        self, session: Session, job_id: str, tenant: str | None = None, *, lock: bool = False
    ) -> TrainingJobRow:
        query = select(TrainingJobRow).where(*self._scope(tenant), TrainingJobRow.id == plain(job_id))
        row = session.scalar(query.with_for_update() if lock else query)
        if row is None:
            raise UnknownJobError(f"There is no job {job_id[:80]!r} on this base.")
        return row

    def _own_job(self, session: Session, job_id: str, server: str | None) -> TrainingJobRow:
        """Return a locked job for a change by `server`; None: by any caller. Raises JobElsewhereError."""
        row = self._job(session, job_id, lock=True)
        if server is not None and row.server != server:
            raise JobElsewhereError(f"Job {job_id} is run by another server now.")
        return row


def _has_label(session: Session, key: str, value: str) -> ColumnElement[bool]:
    """Return the condition that a job has a label."""
    labels = TrainingJobRow.labels
    if session.get_bind().dialect.name != "sqlite":
        found: ColumnElement[bool] = labels[key].as_string() == value
        return found
    # SQLite's paths compare a key as it is written in JSON, where it may be escaped.
    each = func.json_each(labels).table_valued("key", "value")
    return select(1).select_from(each).where(each.c.key == key, each.c.value == value).exists()


_MOVES: Mapping[JobState, AuditAction] = {
    "paused": "job.paused",
    "cancelled": "job.cancelled",
    "succeeded": "job.succeeded",
    "failed": "job.failed",
}


def _audited(before: JobState, after: JobState) -> AuditAction | None:
    """Return the audit log's action for a change of state; None for a server's intermediate steps."""
    if before == after or (before, after) == ("validating_files", "paused"):
        return None
    if after in OPEN_STATES:
        return None if before in OPEN_STATES else "job.resumed"
    return _MOVES[after]


def find_file(session: Session, tenant: str, file_id: str, *, lock: bool = False) -> TrainingFileRow:
    """Return a tenant's file. Raises UnknownFileError."""
    query = select(TrainingFileRow).where(
        TrainingFileRow.tenant == tenant, TrainingFileRow.id == plain(file_id)
    )
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise UnknownFileError(f"There is no file {file_id[:80]!r}.")
    return row


def check_owner(session: Session, *, running: bool = False) -> None:
    """Check, in a write transaction, that the server which delivers a job or a batch still owns it.

    Args:
        running: check also that a job was not stopped meanwhile.

    Raises JobElsewhereError, BatchElsewhereError; JobStateError for a job that does not run any more.
    """
    owned = audit.current().owned
    if owned is None:
        return
    name, server = owned
    row, error = (
        (BatchRow, BatchElsewhereError) if name.startswith("batch_") else (TrainingJobRow, JobElsewhereError)
    )
    found = session.execute(
        select(row.server, row.state).where(row.id == plain(name)).with_for_update()
    ).first()
    if found is None:
        return
    owner, state = found
    if owner != server:
        raise error(f"{name} is run by another server now.")
    if running and row is TrainingJobRow and state != "running":
        raise JobStateError(f"Job {name} is {state}.", state)


# From rows to records and back


def _file_record(row: TrainingFileRow) -> FileRecord:
    return record_of(FileRecord, row)


def _job_row(job: NewJob, base_id: str, now: float) -> TrainingJobRow:
    return TrainingJobRow(
        id=job.id,
        base_id=base_id,
        tenant=job.tenant,
        server=job.server,
        name=job.name,
        state="validating_files",
        training_file=job.training_file,
        validation_file=job.validation_file,
        activate=job.activate,
        settings=plain_json(job.settings),
        labels={plain(key): plain(value) for key, value in job.labels.items()},
        parent=None if job.parent is None else vars(job.parent),
        hold=job.hold,
        created_at=now,
        saved_step=0,
        deaths=0,
        death_step=0,
    )


def job_record(row: TrainingJobRow) -> TrainingJob:
    error = None
    if row.error_code is not None:
        error = TrainingFailure(row.error_code, row.error_message or "", row.error_param)
    return record_of(
        TrainingJob,
        row,
        error=error,
        key=row.key or "",
        parent=None if row.parent is None else ParentVersion(**row.parent),
        stop=None if row.stop is None else JobStop(**row.stop),
    )


def _set_facts(row: TrainingJobRow, state: JobState | None, facts: Mapping[str, Any], now: float) -> None:
    """Write fields of TrainingJob into its row. Any other state clears the error."""
    error: TrainingFailure | None = None
    for name, value in facts.items():
        if name == "error":
            error = value
        elif name in _FACTS:
            setattr(row, name, plain_json(vars(value) if isinstance(value, JobStop) else value))
        else:
            raise RegistryError(f"{name!r} is no fact that a job's row takes.")
    if state is None:
        return
    if state not in JOB_STATES:
        raise RegistryError(f"{state!r} is no state of a job: those are {', '.join(JOB_STATES)}.")
    row.state = state
    row.error_code = error.code if error else None
    row.error_message = plain(error.message) if error else None
    row.error_param = error.param if error else None
    row.finished_at = now if state in ENDED_STATES else None
    if state == "running" and row.started_at is None:
        row.started_at = now


def event_row(job: int, event: JobEvent) -> TrainingEventRow:
    return TrainingEventRow(
        job=job,
        at=event.at,
        level=event.level,
        kind=event.kind,
        message=plain(event.message),
        data=None if event.data is None else plain_json(event.data),
    )


def _event_record(row: TrainingEventRow) -> JobEvent:
    return JobEvent(
        at=row.at,
        message=row.message,
        level=cast(Level, row.level),
        kind=cast(EventKind, row.kind),
        data=row.data,
        number=row.number,
    )


def _checkpoint_row(job: int, checkpoint: Checkpoint) -> CheckpointRow:
    return CheckpointRow(
        job=job,
        step=checkpoint.step,
        path=checkpoint.path,
        at=checkpoint.at,
        train_loss=checkpoint.train_loss,
        valid_loss=checkpoint.valid_loss,
    )


def _checkpoint_record(row: CheckpointRow) -> Checkpoint:
    return Checkpoint(row.step, row.path, row.at, row.train_loss, row.valid_loss, row.number)


def _rate(plan: Mapping[str, Any], report: Mapping[str, Any]) -> float:
    """Return a finished job's FLOP/s; 0 if it did not train long enough to tell."""
    work, seconds = plan.get("estimate", {}).get("flops_per_token", 0), report.get("seconds", 0.0)
    return float(report.get("tokens", 0) * work / seconds) if seconds >= 1 else 0.0
