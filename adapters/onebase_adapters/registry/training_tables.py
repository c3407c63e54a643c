"""The tables of training: files, jobs, and what jobs tell and keep. Files lie on one server's disk."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy import Double as DoubleType
from sqlalchemy.orm import Mapped, mapped_column

from onebase_adapters.registry.tables import ID, Table

_Json = JSON(none_as_null=True)


class TrainingFileRow(Table):
    """One uploaded file, or the curve of a job."""

    __tablename__ = "training_files"

    number: Mapped[int] = mapped_column(ID, primary_key=True)
    id: Mapped[str] = mapped_column(String, unique=True)
    tenant: Mapped[str] = mapped_column(String)
    server: Mapped[str] = mapped_column(String, index=True)
    purpose: Mapped[str] = mapped_column(String)
    filename: Mapped[str] = mapped_column(Text)
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[float] = mapped_column(DoubleType)


class TrainingJobRow(Table):
    """One job, of one tenant on one base; `server` is the one that has its files and runs it."""

    __tablename__ = "training_jobs"
    __table_args__ = (Index(None, "server", "state"),)

    number: Mapped[int] = mapped_column(ID, primary_key=True)
    id: Mapped[str] = mapped_column(String, unique=True)
    base_id: Mapped[str] = mapped_column(String)
    tenant: Mapped[str] = mapped_column(String)
    server: Mapped[str] = mapped_column(String)
    name: Mapped[str] = mapped_column(String)
    state: Mapped[str] = mapped_column(String)
    training_file: Mapped[str] = mapped_column(String, index=True)
    validation_file: Mapped[str | None] = mapped_column(String, index=True)
    activate: Mapped[str] = mapped_column(String)
    settings: Mapped[dict[str, Any]] = mapped_column(JSON)
    labels: Mapped[dict[str, str]] = mapped_column(JSON)
    created_at: Mapped[float] = mapped_column(DoubleType)
    started_at: Mapped[float | None] = mapped_column(DoubleType)
    finished_at: Mapped[float | None] = mapped_column(DoubleType)
    plan: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    progress: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    report: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    error_code: Mapped[str | None] = mapped_column(String)
    error_message: Mapped[str | None] = mapped_column(Text)
    error_param: Mapped[str | None] = mapped_column(String)
    saved_step: Mapped[int] = mapped_column(Integer, default=0)
    deaths: Mapped[int] = mapped_column(Integer, default=0)
    death_step: Mapped[int] = mapped_column(Integer, default=0)
    version: Mapped[str | None] = mapped_column(String)
    activated: Mapped[bool | None] = mapped_column()
    result_file: Mapped[str | None] = mapped_column(String)


class TrainingEventRow(Table):
    """One thing that a job told. `number` is what cursors and `Last-Event-ID` hold."""

    __tablename__ = "training_events"
    __table_args__ = (Index(None, "job", "number"),)

    number: Mapped[int] = mapped_column(ID, primary_key=True)
    job: Mapped[int] = mapped_column(ForeignKey("training_jobs.number", ondelete="CASCADE"))
    at: Mapped[float] = mapped_column(DoubleType)
    level: Mapped[str] = mapped_column(String)
    kind: Mapped[str] = mapped_column(String)
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any] | None] = mapped_column(_Json)


class CheckpointRow(Table):
    """A checkpoint that was written; whether its folder is still there, the job's server knows."""

    __tablename__ = "training_checkpoints"
    __table_args__ = (UniqueConstraint("job", "step"),)

    number: Mapped[int] = mapped_column(ID, primary_key=True)
    job: Mapped[int] = mapped_column(ForeignKey("training_jobs.number", ondelete="CASCADE"))
    step: Mapped[int] = mapped_column(Integer)
    path: Mapped[str] = mapped_column(Text)
    at: Mapped[float] = mapped_column(DoubleType)
    train_loss: Mapped[float | None] = mapped_column(DoubleType)
    valid_loss: Mapped[float | None] = mapped_column(DoubleType)
