"""What the registry hands out about training: plain values. Times are Unix seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

JobState = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Purpose = Literal["fine-tune", "fine-tune-results"]
Level = Literal["info", "warn", "error"]
EventKind = Literal["message", "metrics"]
Activate = Literal["always", "if_better", "never"]

JOB_STATES: Final[tuple[JobState, ...]] = get_args(JobState)
OPEN_STATES: Final[tuple[JobState, ...]] = ("validating_files", "queued", "running")
"""A server has something to do for these."""
ENDED_STATES: Final[tuple[JobState, ...]] = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class TrainingFile:
    """A file on the disk of one server. `bytes`: its size."""

    id: str
    tenant: str
    server: str
    purpose: Purpose
    filename: str
    bytes: int
    created_at: float


@dataclass(frozen=True)
class JobError:
    """Why a job failed: a stable code, a sentence, and the field or file that it is about."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class NewJob:
    """What a job is made of. `settings`: the recipe as it was asked for; `server`: the one that runs it."""

    id: str
    tenant: str
    server: str
    name: str
    training_file: str
    validation_file: str | None
    activate: Activate
    settings: Mapping[str, Any] = field(hash=False)
    labels: Mapping[str, str] = field(hash=False)


@dataclass(frozen=True)
class TrainingJob(NewJob):
    """One job. `number` counts up in the order of creation.

    plan: the resolved recipe and its estimate, once the files are checked.
    progress: the newest figures of the run.
    report: what training found, once the adapter is written; what is left then is to deliver it.
    saved_step: of the newest checkpoint; 0 is none.
    deaths: how often the trainer has died since the checkpoint `death_step`.
    version: the digest of what came out; `activated`: whether requests by name get it.
    """

    number: int
    state: JobState
    created_at: float
    started_at: float | None
    finished_at: float | None
    plan: Mapping[str, Any] | None = field(hash=False)
    progress: Mapping[str, Any] | None = field(hash=False)
    report: Mapping[str, Any] | None = field(hash=False)
    error: JobError | None
    saved_step: int
    deaths: int
    death_step: int
    version: str | None
    activated: bool | None
    result_file: str | None

    @property
    def ended(self) -> bool:
        return self.state in ENDED_STATES

    @property
    def trained(self) -> bool:
        """Whether what is left is to deliver it."""
        return self.report is not None


@dataclass(frozen=True)
class OpenJob:
    """What a server looks at again and again of a job that is not over; fields as TrainingJob's."""

    id: str
    tenant: str
    state: JobState
    saved_step: int
    trained: bool


@dataclass(frozen=True)
class NewEvent:
    """Something to be told about a job. `data`: figures, or more than the message holds."""

    at: float
    message: str
    level: Level = "info"
    kind: EventKind = "message"
    data: Mapping[str, Any] | None = field(default=None, hash=False)


@dataclass(frozen=True)
class TrainingEvent(NewEvent):
    """`number` counts up: of two events of a job the later one has the greater."""

    number: int = 0


@dataclass(frozen=True)
class NewCheckpoint:
    """A place to go on from. path: its folder's name. Losses in nats a supervised token."""

    step: int
    path: str
    at: float
    train_loss: float | None
    valid_loss: float | None


@dataclass(frozen=True)
class Checkpoint(NewCheckpoint):
    number: int = 0
