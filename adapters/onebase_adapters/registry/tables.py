"""Tables of the registry. A test compares them with those that the migrations make.

`adapters` and `versions` belong to one tenant and one base; blobs are shared by all. `previous_versions` is
the stack that a rollback pops; a deleted version leaves it automatically.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    false,
    select,
)
from sqlalchemy import Double as DoubleType
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, mapped_column, relationship

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}

# SQLite counts up rows by itself only for a key declared INTEGER.
ID = BigInteger().with_variant(Integer(), "sqlite")
_Json = JSON(none_as_null=True)


class Table(DeclarativeBase):
    """The base class of all tables."""

    metadata = MetaData(naming_convention=NAMING)


class ChangeCounter(Table):
    """One row. Each write increases it first, and so waits for the writes before it."""

    __tablename__ = "change_counter"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(BigInteger)


class IdentityRow(Table):
    """One row: the registry's identity, which distinguishes several registries."""

    __tablename__ = "identity"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    value: Mapped[str] = mapped_column(String)


class BaseRow(Table):
    """A base that some server on this registry has served; for people who look at the database."""

    __tablename__ = "bases"

    id: Mapped[str] = mapped_column(String, primary_key=True)
    name: Mapped[str] = mapped_column(Text)


class ApiKeyRow(Table):
    """One API key, as a hash. Rows stay when a key is revoked or has expired."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String, primary_key=True)
    tenant: Mapped[str] = mapped_column(String)
    name: Mapped[str] = mapped_column(Text)
    scopes: Mapped[list[str]] = mapped_column(JSON)
    sha256: Mapped[str] = mapped_column(String)
    created_at: Mapped[float] = mapped_column(DoubleType)
    expires_at: Mapped[float | None] = mapped_column(DoubleType)
    revoked_at: Mapped[float | None] = mapped_column(DoubleType)
    last_used_at: Mapped[float | None] = mapped_column(DoubleType)
    quotas: Mapped[dict[str, int]] = mapped_column(JSON, default=dict, server_default="{}")
    priority: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    changed: Mapped[int] = mapped_column(BigInteger, index=True)


class TenantRow(Table):
    """A tenant's quotas. A tenant that never had any has no row."""

    __tablename__ = "tenants"

    tenant: Mapped[str] = mapped_column(String, primary_key=True)
    quotas: Mapped[dict[str, int]] = mapped_column(JSON)
    changed: Mapped[int] = mapped_column(BigInteger, index=True)


class UsageRow(Table):
    """Usage of one adapter by one tenant in one day (UTC, as 2026-11-26). adapter: "" is the base."""

    __tablename__ = "usage"

    tenant: Mapped[str] = mapped_column(String, primary_key=True)
    day: Mapped[str] = mapped_column(String, primary_key=True, index=True)
    base: Mapped[str] = mapped_column(String, primary_key=True)
    adapter: Mapped[str] = mapped_column(String, primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    cached_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)
    training_seconds: Mapped[float] = mapped_column(DoubleType)
    training_tokens: Mapped[int] = mapped_column(BigInteger)


class UsageWriterRow(Table):
    """A server process that writes usage, and its newest batch, so that a repeated one counts once."""

    __tablename__ = "usage_writers"

    id: Mapped[str] = mapped_column(String, primary_key=True)
    batch: Mapped[int] = mapped_column(BigInteger)
    at: Mapped[float] = mapped_column(DoubleType)


class LogKeyRow(Table):
    """The key of the hashes in a tenant's request log."""

    __tablename__ = "request_log_keys"

    tenant: Mapped[str] = mapped_column(String, primary_key=True)
    key: Mapped[bytes] = mapped_column(LargeBinary)


class LogErasureRow(Table):
    """An erasure that every server applies to its request log. user: a keyed hash; None: everything."""

    __tablename__ = "request_log_erasures"

    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    tenant: Mapped[str] = mapped_column(String, index=True)
    user: Mapped[str | None] = mapped_column(String)
    at: Mapped[float] = mapped_column(DoubleType)


class ServerRow(Table):
    """One process of a server, which renews its lease while it lives. Times are the database's clock's.

    server: the id of its data folder, to which jobs and batches belong. runs: whether it runs them.
    room: trainers that it could start. at: when it last renewed the lease; until: when that runs out.
    """

    __tablename__ = "servers"

    id: Mapped[str] = mapped_column(String, primary_key=True)
    server: Mapped[str] = mapped_column(String, index=True)
    base_id: Mapped[str] = mapped_column(String)
    runs: Mapped[bool] = mapped_column()
    room: Mapped[int] = mapped_column(Integer)
    at: Mapped[float] = mapped_column(DoubleType)
    until: Mapped[float] = mapped_column(DoubleType)


class QuotaUseRow(Table):
    """Use of one key's or one tenant's quota that one process of a server has admitted, as of `at`.

    kind: `key` or `tenant`. use: as `quotas.AccountUse`.
    """

    __tablename__ = "quota_use"

    process: Mapped[str] = mapped_column(String, primary_key=True)
    kind: Mapped[str] = mapped_column(String, primary_key=True)
    name: Mapped[str] = mapped_column(String, primary_key=True)
    at: Mapped[float] = mapped_column(DoubleType, index=True)
    use: Mapped[dict[str, Any]] = mapped_column(JSON)


class AuditRow(Table):
    """One change by somebody. The database refuses to change or delete a row."""

    __tablename__ = "audit"
    __table_args__ = (Index(None, "tenant", "number"), Index(None, "target", "number"))

    number: Mapped[int] = mapped_column(ID, primary_key=True)
    at: Mapped[float] = mapped_column(DoubleType)
    tenant: Mapped[str] = mapped_column(String)
    key: Mapped[str] = mapped_column(String)
    actor: Mapped[str] = mapped_column(String)
    action: Mapped[str] = mapped_column(String)
    target: Mapped[str] = mapped_column(String)
    version: Mapped[str | None] = mapped_column(String)
    base_id: Mapped[str | None] = mapped_column(String)
    server: Mapped[str] = mapped_column(String)
    request: Mapped[str] = mapped_column(String)
    details: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    chain: Mapped[str] = mapped_column(String)


class HistoryRow(Table):
    """One change of an adapter's active version; kept when the version is deleted."""

    __tablename__ = "history"
    __table_args__ = (Index(None, "adapter_id", "id"),)

    id: Mapped[int] = mapped_column(ID, primary_key=True)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"))
    action: Mapped[str] = mapped_column(String)
    version: Mapped[str | None] = mapped_column(String)
    previous: Mapped[str | None] = mapped_column(String)
    actor: Mapped[str] = mapped_column(String)
    at: Mapped[float] = mapped_column(DoubleType)


class AdapterRow(Table):
    """One name of one tenant on one base."""

    __tablename__ = "adapters"
    __table_args__ = (UniqueConstraint("base_id", "tenant", "name"),)

    id: Mapped[int] = mapped_column(ID, primary_key=True)
    base_id: Mapped[str] = mapped_column(String)
    tenant: Mapped[str] = mapped_column(String)
    name: Mapped[str] = mapped_column(String)
    active: Mapped[str | None] = mapped_column(String)
    pinned: Mapped[bool] = mapped_column(default=False)
    shared: Mapped[bool] = mapped_column(default=False, server_default=false())
    created_at: Mapped[float] = mapped_column(DoubleType)
    updated_at: Mapped[float] = mapped_column(DoubleType)
    changed: Mapped[int] = mapped_column(BigInteger)
    switched_at: Mapped[float | None] = column_property(
        select(HistoryRow.at)
        .where(HistoryRow.adapter_id == id)
        .order_by(HistoryRow.id.desc())
        .limit(1)
        .correlate_except(HistoryRow)
        .scalar_subquery()
    )
    """Time of the last change of the active version, in Unix seconds."""

    versions: Mapped[list[VersionRow]] = relationship(
        back_populates="adapter",
        order_by="VersionRow.id.desc()",
        cascade="all, delete-orphan",
        passive_deletes=True,
    )
    rollout: Mapped[RolloutRow | None] = relationship(
        primaryjoin="and_(RolloutRow.adapter_id == AdapterRow.id, RolloutRow.state == 'running')",
        viewonly=True,
        uselist=False,
        lazy="joined",
    )
    """Rollout that runs, if one does."""


class RolloutRow(Table):
    """One rollout of a version under an adapter's name. A row stays when it has ended, with its figures.

    settings: the rules and the rest of what was asked for. figures: those that led to its end.
    """

    __tablename__ = "rollouts"
    __table_args__ = (Index(None, "adapter_id", "state"),)

    number: Mapped[int] = mapped_column(ID, primary_key=True)
    id: Mapped[str] = mapped_column(String, unique=True)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"))
    candidate: Mapped[str] = mapped_column(String)
    baseline: Mapped[str] = mapped_column(String)
    state: Mapped[str] = mapped_column(String)
    percent: Mapped[float] = mapped_column(DoubleType)
    shadow: Mapped[float] = mapped_column(DoubleType)
    settings: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[float] = mapped_column(DoubleType)
    created_by: Mapped[str] = mapped_column(String)
    ended_at: Mapped[float | None] = mapped_column(DoubleType)
    ended_by: Mapped[str | None] = mapped_column(String)
    reason: Mapped[str | None] = mapped_column(Text)
    figures: Mapped[dict[str, Any] | None] = mapped_column(_Json)


class RolloutFigureRow(Table):
    """One sum over the requests of one side of a rollout, on all servers."""

    __tablename__ = "rollout_figures"

    rollout: Mapped[int] = mapped_column(
        ForeignKey("rollouts.number", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    side: Mapped[str] = mapped_column(String, primary_key=True)
    figure: Mapped[str] = mapped_column(String, primary_key=True)
    value: Mapped[float] = mapped_column(DoubleType)


class RolloutAnswerRow(Table):
    """One answer of a rollout, for the feedback that may come. It holds no text."""

    __tablename__ = "rollout_answers"

    tenant: Mapped[str] = mapped_column(String, primary_key=True)
    id: Mapped[str] = mapped_column(String, primary_key=True)
    rollout: Mapped[int] = mapped_column(ForeignKey("rollouts.number", ondelete="CASCADE"), index=True)
    side: Mapped[str] = mapped_column(String)
    at: Mapped[float] = mapped_column(DoubleType, index=True)
    score: Mapped[float | None] = mapped_column(DoubleType)
    cluster: Mapped[int | None] = mapped_column(Integer)


class VersionRow(Table):
    """One content under one name."""

    __tablename__ = "versions"
    __table_args__ = (UniqueConstraint("adapter_id", "digest"),)

    id: Mapped[int] = mapped_column(ID, primary_key=True)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"))
    digest: Mapped[str] = mapped_column(String)
    state: Mapped[str] = mapped_column(String, index=True)
    config_sha256: Mapped[str] = mapped_column(String, index=True)
    config_size: Mapped[int] = mapped_column(BigInteger)
    weights_sha256: Mapped[str] = mapped_column(String, index=True)
    weights_size: Mapped[int] = mapped_column(BigInteger)
    prepared_sha256: Mapped[str | None] = mapped_column(String, index=True)
    prepared_size: Mapped[int | None] = mapped_column(BigInteger)
    report: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    modules: Mapped[list[Any] | None] = mapped_column(_Json, deferred=True)
    source: Mapped[dict[str, Any]] = mapped_column(JSON)
    error_code: Mapped[str | None] = mapped_column(String)
    error_message: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[float] = mapped_column(DoubleType)
    created_by: Mapped[str] = mapped_column(String)
    makers: Mapped[list[str]] = mapped_column(JSON, default=list)
    """Ids of the keys that sent this content under this name, or asked for it."""
    finished_at: Mapped[float | None] = mapped_column(DoubleType)
    activates: Mapped[bool] = mapped_column(default=False)
    """Whether it is still to become active once it is ready, as its upload asked."""

    adapter: Mapped[AdapterRow] = relationship(back_populates="versions")
    proofs: Mapped[list[ProofRow]] = relationship(
        lazy="selectin", cascade="all, delete-orphan", passive_deletes=True
    )


class ProofRow(Table):
    """A proof of a version with kernels other than those that made it ready. While `until` is set it is a
    claim, also for the first proof: the time at which another server may prove, unless the claim is
    renewed."""

    __tablename__ = "proofs"
    __table_args__ = (UniqueConstraint("version_id", "kernels"),)

    number: Mapped[int] = mapped_column(ID, primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("versions.id", ondelete="CASCADE"))
    kernels: Mapped[str] = mapped_column(String)
    server: Mapped[str] = mapped_column(String)
    until: Mapped[float | None] = mapped_column(DoubleType)
    prepared_sha256: Mapped[str | None] = mapped_column(String, index=True)
    prepared_size: Mapped[int | None] = mapped_column(BigInteger)
    report: Mapped[dict[str, Any] | None] = mapped_column(_Json)


class GateRow(Table):
    """One rule of what an activation has to pass, for all bases. settings: the other fields of GateRule."""

    __tablename__ = "gates"
    __table_args__ = (UniqueConstraint("tenant", "name"),)

    id: Mapped[str] = mapped_column(String, primary_key=True)
    tenant: Mapped[str] = mapped_column(String)
    name: Mapped[str] = mapped_column(String)
    settings: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[float] = mapped_column(DoubleType)
    created_by: Mapped[str] = mapped_column(String)


class ApprovalRow(Table):
    """One key's approval of a version, which the next activation uses up. evaluation: number of the version's
    newest evaluation then, 0 without one."""

    __tablename__ = "approvals"

    version_id: Mapped[int] = mapped_column(
        ForeignKey("versions.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    key: Mapped[str] = mapped_column(String, primary_key=True)
    evaluation: Mapped[int] = mapped_column(BigInteger)
    at: Mapped[float] = mapped_column(DoubleType)


class EvaluationRow(Table):
    """One evaluation of a version beside another one. against: that one's digest, None for the base. key: ""
    for a job of a server. data: SHA-256 (hex) of the file with the held-out rows, if it is known."""

    __tablename__ = "evaluations"

    number: Mapped[int] = mapped_column(ID, primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("versions.id", ondelete="CASCADE"), index=True)
    against: Mapped[str | None] = mapped_column(String)
    metric: Mapped[str] = mapped_column(String)
    slices: Mapped[list[Any]] = mapped_column(JSON)
    key: Mapped[str] = mapped_column(String)
    job: Mapped[str | None] = mapped_column(String)
    data: Mapped[str | None] = mapped_column(String)
    at: Mapped[float] = mapped_column(DoubleType)


class PreviousRow(Table):
    """One entry of an adapter's stack: the version that was active before a later activation."""

    __tablename__ = "previous_versions"

    id: Mapped[int] = mapped_column(ID, primary_key=True)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"), index=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("versions.id", ondelete="CASCADE"), index=True)


class TrainingFileRow(Table):
    """One uploaded file, or the output of a job or a batch."""

    __tablename__ = "training_files"

    number: Mapped[int] = mapped_column(ID, primary_key=True)
    id: Mapped[str] = mapped_column(String, unique=True)
    tenant: Mapped[str] = mapped_column(String)
    server: Mapped[str] = mapped_column(String)
    purpose: Mapped[str] = mapped_column(String)
    filename: Mapped[str] = mapped_column(Text)
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[float] = mapped_column(DoubleType)
    sha256: Mapped[str] = mapped_column(String, index=True)


class TrainingJobRow(Table):
    """One job, of one tenant on one base; `server` is the one that runs it."""

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
    key: Mapped[str | None] = mapped_column(String)
    parent: Mapped[dict[str, str] | None] = mapped_column(_Json)
    hold: Mapped[bool] = mapped_column(default=False, server_default=false())
    stop: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    kept_step: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    kept_adapter: Mapped[bool] = mapped_column(default=False, server_default=false())


class JobFileRow(Table):
    """One file that a job needs to continue on any server: its path in the job's folder, and its blob."""

    __tablename__ = "job_files"

    job: Mapped[int] = mapped_column(ForeignKey("training_jobs.number", ondelete="CASCADE"), primary_key=True)
    path: Mapped[str] = mapped_column(String, primary_key=True)
    sha256: Mapped[str] = mapped_column(String, index=True)


class BatchRow(Table):
    """One batch, of one tenant on one base; `server` is the one that runs it. times: by its states' names."""

    __tablename__ = "batches"
    __table_args__ = (Index(None, "server", "state"), Index(None, "tenant", "number"))

    number: Mapped[int] = mapped_column(ID, primary_key=True)
    id: Mapped[str] = mapped_column(String, unique=True)
    base_id: Mapped[str] = mapped_column(String)
    tenant: Mapped[str] = mapped_column(String)
    key: Mapped[str] = mapped_column(String)
    server: Mapped[str] = mapped_column(String)
    state: Mapped[str] = mapped_column(String)
    endpoint: Mapped[str] = mapped_column(String)
    input_file: Mapped[str] = mapped_column(String, index=True)
    window: Mapped[str] = mapped_column(String)
    labels: Mapped[dict[str, str] | None] = mapped_column(_Json)
    created_at: Mapped[float] = mapped_column(DoubleType)
    expires_at: Mapped[float] = mapped_column(DoubleType)
    times: Mapped[dict[str, float]] = mapped_column(JSON, default=dict)
    total: Mapped[int] = mapped_column(Integer, default=0)
    completed: Mapped[int] = mapped_column(Integer, default=0)
    failed: Mapped[int] = mapped_column(Integer, default=0)
    usage: Mapped[dict[str, int]] = mapped_column(JSON, default=dict)
    errors: Mapped[list[dict[str, Any]] | None] = mapped_column(_Json)
    output_file: Mapped[str | None] = mapped_column(String)
    error_file: Mapped[str | None] = mapped_column(String)


class TrainingEventRow(Table):
    """One event of a job. `number` is what cursors and `Last-Event-ID` hold."""

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
    """A checkpoint that was written; only the job's server knows whether its folder still exists."""

    __tablename__ = "training_checkpoints"
    __table_args__ = (UniqueConstraint("job", "step"),)

    number: Mapped[int] = mapped_column(ID, primary_key=True)
    job: Mapped[int] = mapped_column(ForeignKey("training_jobs.number", ondelete="CASCADE"))
    step: Mapped[int] = mapped_column(Integer)
    path: Mapped[str] = mapped_column(Text)
    at: Mapped[float] = mapped_column(DoubleType)
    train_loss: Mapped[float | None] = mapped_column(DoubleType)
    valid_loss: Mapped[float | None] = mapped_column(DoubleType)


class LiveSessionRow(Table):
    """A session of a client that trains step by step. details: what the client says of it."""

    __tablename__ = "live_sessions"

    id: Mapped[str] = mapped_column(String, primary_key=True)
    tenant: Mapped[str] = mapped_column(String, index=True)
    key: Mapped[str] = mapped_column(String)
    server: Mapped[str] = mapped_column(String)
    created_at: Mapped[float] = mapped_column(DoubleType)
    seen_at: Mapped[float] = mapped_column(DoubleType, index=True)
    finished_at: Mapped[float | None] = mapped_column(DoubleType)
    details: Mapped[dict[str, Any]] = mapped_column(JSON)


class LiveSamplerRow(Table):
    """A sampling session: the weights that its samples come from. path: those of a checkpoint; None: the
    base. clients: number of clients besides its first one."""

    __tablename__ = "live_samplers"

    id: Mapped[str] = mapped_column(String, primary_key=True)
    session: Mapped[str] = mapped_column(String, index=True)
    base_id: Mapped[str] = mapped_column(String)
    tenant: Mapped[str] = mapped_column(String)
    server: Mapped[str] = mapped_column(String, index=True)
    base_model: Mapped[str] = mapped_column(Text)
    path: Mapped[str | None] = mapped_column(String)
    created_at: Mapped[float] = mapped_column(DoubleType)
    clients: Mapped[int] = mapped_column(Integer, default=0)


class LiveSampleRow(Table):
    """A promised sample. request: its body and seed, until it is there. result: what the client gets; error:
    why there is none."""

    __tablename__ = "live_samples"

    id: Mapped[str] = mapped_column(String, primary_key=True)
    sampler: Mapped[str] = mapped_column(String, index=True)
    base_id: Mapped[str] = mapped_column(String)
    tenant: Mapped[str] = mapped_column(String)
    key: Mapped[str] = mapped_column(String)
    server: Mapped[str] = mapped_column(String, index=True)
    request: Mapped[bytes | None] = mapped_column(LargeBinary)
    result: Mapped[bytes | None] = mapped_column(LargeBinary)
    error: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    created_at: Mapped[float] = mapped_column(DoubleType)
    finished_at: Mapped[float | None] = mapped_column(DoubleType, index=True)
