"""From rows of training to records, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from onebase_adapters.registry.errors import RegistryError
from onebase_adapters.registry.mapping import plain
from onebase_adapters.registry.training_records import (
    ENDED_STATES,
    JOB_STATES,
    Activate,
    Checkpoint,
    EventKind,
    JobError,
    JobState,
    Level,
    NewEvent,
    NewJob,
    Purpose,
    TrainingEvent,
    TrainingFile,
    TrainingJob,
)
from onebase_adapters.registry.training_tables import (
    CheckpointRow,
    TrainingEventRow,
    TrainingFileRow,
    TrainingJobRow,
)

_FACTS = frozenset(
    {
        "plan", "progress", "report", "saved_step", "deaths", "death_step", "version", "activated",
        "result_file",
    }
)  # fmt: skip


def file_of(row: TrainingFileRow) -> TrainingFile:
    return TrainingFile(
        row.id,
        row.tenant,
        row.server,
        cast(Purpose, row.purpose),
        row.filename,
        row.bytes,
        row.created_at,
    )


def job_row(job: NewJob, base_id: str, now: float) -> TrainingJobRow:
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
        created_at=now,
        saved_step=0,
        deaths=0,
        death_step=0,
    )


def job_of(row: TrainingJobRow) -> TrainingJob:
    error = None
    if row.error_code is not None:
        error = JobError(row.error_code, row.error_message or "", row.error_param)
    return TrainingJob(
        id=row.id,
        tenant=row.tenant,
        server=row.server,
        name=row.name,
        training_file=row.training_file,
        validation_file=row.validation_file,
        activate=cast(Activate, row.activate),
        settings=row.settings,
        labels=row.labels,
        number=row.number,
        state=cast(JobState, row.state),
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        plan=row.plan,
        progress=row.progress,
        report=row.report,
        error=error,
        saved_step=row.saved_step,
        deaths=row.deaths,
        death_step=row.death_step,
        version=row.version,
        activated=row.activated,
        result_file=row.result_file,
    )


def set_facts(row: TrainingJobRow, state: JobState | None, facts: Mapping[str, Any], now: float) -> None:
    """Write fields of TrainingJob into its row. An error leaves with any other state."""
    error: JobError | None = None
    for name, value in facts.items():
        if name == "error":
            error = value
        elif name in _FACTS:
            setattr(row, name, plain_json(value))
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


def event_row(job: int, event: NewEvent) -> TrainingEventRow:
    return TrainingEventRow(
        job=job,
        at=event.at,
        level=event.level,
        kind=event.kind,
        message=plain(event.message),
        data=None if event.data is None else plain_json(event.data),
    )


def event_of(row: TrainingEventRow) -> TrainingEvent:
    return TrainingEvent(
        at=row.at,
        message=row.message,
        level=cast(Level, row.level),
        kind=cast(EventKind, row.kind),
        data=row.data,
        number=row.number,
    )


def checkpoint_of(row: CheckpointRow) -> Checkpoint:
    return Checkpoint(row.step, row.path, row.at, row.train_loss, row.valid_loss, row.number)


def plain_json(value: Any) -> Any:
    """JSON that every database takes: plain texts, and null for numbers that are not finite."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, float):
        return value if value - value == 0.0 else None
    if isinstance(value, Mapping):
        return {plain(str(key)): plain_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(part) for part in value]
    return value
