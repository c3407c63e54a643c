"""Plain values that the registry returns: adapters, jobs, batches, keys. Times are Unix seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, TypeVar, cast, get_args

from onebase_adapters.store.blobs import AdapterFiles, Blob
from onebase_protocol.adapters import VersionFailure
from onebase_protocol.batches import BatchError
from onebase_protocol.training import Activate, TrainingFailure

State = Literal["pulling", "validating", "proving", "ready", "failed"]
Action = Literal["activate", "rollback", "deactivate"]

STATES: Final[tuple[State, ...]] = get_args(State)
UNFINISHED: Final[tuple[State, ...]] = ("pulling", "validating", "proving")

MODULES = "modules"
"""Field of a report that is long, with one entry for each module. Lists of adapters leave it out."""


class Unset:
    """Type of UNSET, which distinguishes "not given" from None, which means "nothing is active"."""

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset()
_Record = TypeVar("_Record")


def record_of(kind: type[_Record], row: object, **given: Any) -> _Record:
    """Return a record with the row's fields of the same names, but for those that are given."""
    taken = (one.name for one in fields(cast(Any, kind)) if one.init and one.name not in given)
    return kind(**{name: getattr(row, name) for name in taken}, **given)


@dataclass(frozen=True)
class VersionRecord:
    """One version of one adapter.

    `report`: result of the proof. In an AdapterRecord it lacks its `modules`, of which there may be
    hundreds; the registry's `version`, `versions` and `unfinished` return it whole. `proofs`: the packed
    adapters by the kernels that they were proved with after the version was ready.
    """

    tenant: str
    name: str
    digest: str
    state: State
    files: AdapterFiles
    prepared: Blob | None
    report: Mapping[str, Any] | None = field(hash=False)
    source: Mapping[str, Any] = field(hash=False)
    error: VersionFailure | None
    created_at: float
    created_by: str
    finished_at: float | None
    activates: bool = False
    """Whether it is still to become active once it is ready, as its upload asked."""
    proofs: Mapping[str, Blob] = field(default_factory=dict, hash=False)
    is_active: bool = field(default=False, compare=False)
    """Whether it was active when it was read."""

    @property
    def finished(self) -> bool:
        return self.state not in UNFINISHED

    def packed_for(self, kernels: str) -> Blob | None:
        """Return the packed adapter that was proved with these kernels, or None."""
        first = (self.report or {}).get("proof", {}).get("kernels")
        return self.prepared if first == kernels else self.proofs.get(kernels)


RolloutState = Literal["running", "promoted", "rolled_back", "stopped"]
RolloutSide = Literal["active", "candidate", "shadow"]
ROLLOUT_SIDES: Final[tuple[RolloutSide, ...]] = get_args(RolloutSide)
RolloutFigures = Mapping[str, Mapping[str, float]]
"""Sums over a rollout's requests, by side and by figure."""


@dataclass(frozen=True)
class RolloutRecord:
    """Rollout of one version, the candidate, under an adapter's name.

    `baseline`: digest of the version that was active when it began. `percent`: share of the requests that
    the candidate answers. `shadow`: percent of the active version's requests of which the candidate gets a
    copy. `settings`: further fields, as the server stored them. `figures`: those at its end; {} until then.
    """

    id: str
    tenant: str
    name: str
    candidate: str
    baseline: str
    state: RolloutState
    percent: float
    shadow: float
    settings: Mapping[str, Any] = field(hash=False)
    created_at: float
    created_by: str
    ended_at: float | None = None
    ended_by: str | None = None
    reason: str | None = None
    figures: RolloutFigures = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class RolloutAnswer:
    """Answer of a rollout, as it is kept for feedback. `at`: time of its end. `cluster`: that of its caller,
    where callers are divided."""

    tenant: str
    id: str
    rollout: str
    side: RolloutSide
    at: float
    score: float | None = None
    cluster: int | None = None


@dataclass(frozen=True)
class AdapterRecord:
    """One name. `active`: digest of the version that requests by name use; `versions`: newest first.

    `shared`: whether all tenants may use and see it. `activated_at`: time of the last change of `active`.
    `rollout`: the one that runs, if one does.
    """

    tenant: str
    name: str
    active: str | None
    pinned: bool
    shared: bool
    created_at: float
    updated_at: float
    activated_at: float | None
    versions: tuple[VersionRecord, ...]
    rollout: RolloutRecord | None = None

    def version(self, digest: str) -> VersionRecord | None:
        """Return the version of this whole digest, or None."""
        return next((version for version in self.versions if version.digest == digest), None)

    @property
    def active_version(self) -> VersionRecord | None:
        return None if self.active is None else self.version(self.active)


@dataclass(frozen=True)
class ForcedDeletion:
    """A deletion that ends the requests which use the deleted versions. digest: None is every version."""

    tenant: str
    name: str
    digest: str | None


@dataclass(frozen=True)
class Changes:
    """Result of `Registry.changes`: the counter, the adapters changed since, and the names of all adapters
    (`(tenant, name)`), so that a follower can drop the others.

    Args:
        audited: number of the audit log's last entry then.
        forced: forced deletions since the given entry.
    """

    counter: int
    changed: tuple[AdapterRecord, ...]
    names: frozenset[tuple[str, str]]
    audited: int = 0
    forced: tuple[ForcedDeletion, ...] = ()


# ---- quotas and usage ------------------------------------------------------------------------


@dataclass(frozen=True)
class Quotas:
    """Quotas of a key or a tenant; None: no limit. All but the first three apply to tenants alone."""

    requests: int | None = None
    """Requests for text, in any 60 seconds."""
    tokens: int | None = None
    """Tokens of prompts and completions, in any 60 seconds."""
    sequences: int | None = None
    """Completions at once: each of a request's prompts counts `n`."""
    adapters: int | None = None
    """Number of names, on all bases of the registry."""
    bytes: int | None = None
    """Bytes of versions, as they were sent or trained, of files, and of the rows that unended jobs keep."""
    training_seconds: int | None = None
    """Seconds of training in a calendar month (UTC)."""
    jobs: int | None = None
    """Training jobs that have not ended: queued, running, held and paused ones, and failed ones that can be
    resumed."""
    log_days: int | None = None
    """Days for which the servers' logs of requests keep those of the tenant; 0: none of them is kept."""

    def given(self) -> dict[str, int]:
        """Return the limits that are set, by name."""
        return {name: limit for name, limit in vars(self).items() if limit is not None}


@dataclass(frozen=True)
class TenantRecord:
    """One tenant: its quotas, and what it stores now.

    adapters: number of names. bytes: of versions, of files and of the rows that unended jobs keep.
    jobs: number of those that have not ended. training_seconds: in this calendar month (UTC).
    """

    tenant: str
    quotas: Quotas
    adapters: int
    bytes: int
    jobs: int
    training_seconds: float


@dataclass(frozen=True, order=True)
class UsageKey:
    """Key of a usage record. day: 2026-11-26, in UTC. adapter: "" is the base; a sum of adapters is `a+b`."""

    tenant: str
    day: str
    base: str
    adapter: str


@dataclass
class UsageFigures:
    """Usage figures. cached_tokens: the part of prompt_tokens found in the prefix cache."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    training_seconds: float = 0.0
    training_tokens: int = 0

    def add(self, other: UsageFigures) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


# ---- keys ------------------------------------------------------------------------------------

Scope = Literal["generate", "adapters", "train", "admin"]
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)


@dataclass(frozen=True)
class ApiKeyRecord:
    """Record of an API key. `id`: its public beginning; `sha256`: of the whole key."""

    id: str
    tenant: str
    name: str
    scopes: tuple[Scope, ...]
    sha256: str = field(repr=False)
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None
    quotas: Quotas = Quotas()
    priority: int = 0
    """Priority of its requests among all that wait: the highest first."""

    def valid_at(self, now: float) -> bool:
        """Return True if it may be used."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


# ---- audit -----------------------------------------------------------------------------------

AuditAction = Literal[
    "adapter.uploaded", "adapter.pulled", "adapter.loaded", "adapter.trained", "adapter.merged",
    "adapter.activated", "adapter.rolled_back", "adapter.deactivated", "adapter.pinned", "adapter.unpinned",
    "adapter.shared", "adapter.unshared", "adapter.refused", "adapter.signed", "adapter.version_deleted",
    "adapter.deleted", "file.added",
    "file.deleted", "job.created", "job.paused", "job.resumed", "job.stopped", "job.cancelled",
    "job.succeeded", "job.failed", "batch.created", "batch.cancelling", "batch.cancelled", "batch.completed",
    "batch.failed", "batch.expired", "run.created", "run.ended", "session.finished", "checkpoint.changed",
    "checkpoint.deleted", "key.created", "key.changed",
    "key.revoked", "tenant.changed",
    "adapter.approved", "adapter.disapproved", "adapter.evaluated",
    "gate.set", "gate.deleted", "gate.refused",
    "rollout.started", "rollout.changed", "rollout.promoted", "rollout.rolled_back", "rollout.stopped",
    "requests.erased",
]  # fmt: skip
AUDIT_ACTIONS: Final[tuple[AuditAction, ...]] = get_args(AuditAction)
AUDIT_KINDS: Final = tuple(dict.fromkeys(action.partition(".")[0] for action in AUDIT_ACTIONS))
"""Kinds of actions: the first parts of their names, as in `adapter.deleted`."""


@dataclass(frozen=True)
class AuditRecord:
    """One change, and its author.

    number: counts up. tenant: owner of the adapter, file, job, batch or key. key: the id of the caller's API
    key; "" where none is needed. actor: the actor on the caller's behalf if it was not a request. target: a
    name, or an id. version: a digest. base: its name. request: the id that came with the request.
    chain: see `onebase_protocol.access.audit_chain`.
    """

    number: int
    at: float
    tenant: str
    key: str
    actor: str
    action: AuditAction
    target: str
    version: str | None
    base: str | None
    server: str
    request: str
    details: Mapping[str, Any] = field(hash=False)
    base_id: str | None = None
    chain: str = ""


# ---- training --------------------------------------------------------------------------------

JobState = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Purpose = Literal["fine-tune", "fine-tune-results", "batch", "batch_output"]
UPLOADED: Final[tuple[Purpose, ...]] = ("fine-tune", "batch")
"""Purposes of files that users upload; jobs and batches write the others."""
Level = Literal["info", "warn", "error"]
EventKind = Literal["message", "metrics"]

JOB_STATES: Final[tuple[JobState, ...]] = get_args(JobState)
OPEN_STATES: Final[tuple[JobState, ...]] = ("validating_files", "queued", "running")
"""States in which a server must act on a job."""
ENDED_STATES: Final[tuple[JobState, ...]] = ("succeeded", "failed", "cancelled")
RESUMABLE = frozenset(
    {
        "adapter_lost", "base_changed", "delivery_failed", "device_error", "disk_full",
        "insufficient_quota", "internal_error", "no_memory", "out_of_memory", "prepared_damaged",
        "proof_crashed", "proof_timeout", "signature_missing", "signer_not_allowed", "store_unavailable",
        "trainer_died", "trainer_failed",
    }
)  # fmt: skip
"""Errors that may not happen again: the job can continue from its last checkpoint, or be delivered again."""


@dataclass(frozen=True)
class FileRecord:
    """A file that jobs or batches read or write.

    server: the one that received it. bytes: its size. sha256: the blob with its content.
    """

    id: str
    tenant: str
    server: str
    purpose: Purpose
    filename: str
    bytes: int
    created_at: float
    sha256: str


@dataclass(frozen=True)
class ParentVersion:
    """Version whose training a job continues. config, weights: the SHA-256 of its two files."""

    tenant: str
    name: str
    digest: str
    config: str
    weights: str

    @classmethod
    def of(cls, version: VersionRecord) -> ParentVersion:
        files = version.files
        config, weights = files.config.sha256, files.weights.sha256
        return cls(version.tenant, version.name, version.digest, config, weights)


@dataclass(frozen=True)
class NewJob:
    """Definition of a job. `settings`: the recipe as requested; `server`: the one that runs it; `parent`: the
    version that it continues, or None: it starts with the base. `hold`: it waits for a resume once its files
    are checked."""

    id: str
    tenant: str
    server: str
    name: str
    training_file: str
    validation_file: str | None
    activate: Activate
    settings: Mapping[str, Any] = field(hash=False)
    labels: Mapping[str, str] = field(hash=False)
    parent: ParentVersion | None = field(default=None, kw_only=True)
    hold: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class JobStop:
    """Request that a job ends after this step, or the first possible one after it, and stores its best
    adapter.

    key: the id of the caller's API key, at the Unix time `at`; "" where none is needed.
    """

    step: int
    key: str
    at: float


@dataclass(frozen=True)
class TrainingJob(NewJob):
    """One job. `number` counts up in the order of creation.

    plan: the resolved recipe and its estimate, once the files are checked.
    progress: the newest figures of the run.
    report: the result of training, once the adapter is written; only the delivery is left then.
    saved_step: of the newest checkpoint; 0 is none.
    deaths: of its trainers since the checkpoint `death_step`.
    version: the digest of the result; `activated`: whether requests by name use it.
    key: the id of the API key that made it; "" where none is needed.
    stop: the request to end early.
    """

    number: int
    state: JobState
    created_at: float
    started_at: float | None
    finished_at: float | None
    plan: Mapping[str, Any] | None = field(hash=False)
    progress: Mapping[str, Any] | None = field(hash=False)
    report: Mapping[str, Any] | None = field(hash=False)
    error: TrainingFailure | None
    saved_step: int
    deaths: int
    death_step: int
    version: str | None
    activated: bool | None
    result_file: str | None
    key: str = ""
    stop: JobStop | None = None

    @property
    def ended(self) -> bool:
        return self.state in ENDED_STATES

    @property
    def error_code(self) -> str | None:
        return self.error.code if self.error else None

    @property
    def trained(self) -> bool:
        """Whether only the delivery is left."""
        return self.report is not None


@dataclass(frozen=True)
class OpenJob:
    """The part of a TrainingJob that its server reads every second: without plan, progress and report."""

    id: str
    tenant: str
    state: JobState
    saved_step: int
    trained: bool
    last_step: int | None = None
    """Step of its JobStop."""
    kept_step: int = 0
    """Step of the checkpoint in the store; 0 is none."""

    @property
    def is_movable(self) -> bool:
        """Whether it waits, and could continue elsewhere without losing a step."""
        return self.state == "queued" and not self.trained and self.saved_step <= self.kept_step


@dataclass(frozen=True)
class TakeableJob:
    """A job of another server, `server`, that may be taken over, and the files that it needs."""

    id: str
    tenant: str
    server: str
    training_file: str
    validation_file: str | None


@dataclass(frozen=True)
class UnkeptJob:
    """A job whose newest state is not in the store: its checkpoint in the folder `path`, and its adapter once
    it is trained."""

    id: str
    step: int
    path: str
    trained: bool


@dataclass(frozen=True)
class JobEvent:
    """Event of a job, for those who follow it.

    data: figures, or more than the message holds.
    number: set by the registry. Of two events of a job the later one has the greater number.
    """

    at: float
    message: str
    level: Level = "info"
    kind: EventKind = "message"
    data: Mapping[str, Any] | None = field(default=None, hash=False)
    number: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoint that a job can resume from.

    path: the name of its folder. Losses are in nats a supervised token. number: set by the registry.
    """

    step: int
    path: str
    at: float
    train_loss: float | None
    valid_loss: float | None
    number: int = 0


# ---- batches ---------------------------------------------------------------------------------

BatchState = Literal[
    "validating", "in_progress", "finalizing", "cancelling", "completed", "failed", "expired", "cancelled"
]
BATCH_STATES: Final[tuple[BatchState, ...]] = get_args(BatchState)
OPEN_BATCHES: Final[tuple[BatchState, ...]] = ("validating", "in_progress", "finalizing", "cancelling")
"""States in which a server must act on a batch."""


@dataclass(frozen=True)
class NewBatch:
    """Definition of a batch. `server`: the one that runs it; `window`: as requested, `24h`."""

    id: str
    tenant: str
    server: str
    endpoint: str
    input_file: str
    window: str
    created_at: float
    expires_at: float
    labels: Mapping[str, str] | None = field(hash=False)


@dataclass(frozen=True)
class BatchRecord(NewBatch):
    """One batch. `number` counts up in the order of creation.

    key: the id of the API key that made it; "" where none is needed.
    times: when it entered its states, by their names.
    total: number of its requests, once they are checked; completed, failed: those that have an answer.
    usage: tokens, as `prompt`, `cached` and `completion`.
    """

    number: int
    key: str
    state: BatchState
    times: Mapping[str, float] = field(hash=False)
    total: int
    completed: int
    failed: int
    usage: Mapping[str, int] = field(hash=False)
    errors: tuple[BatchError, ...]
    output_file: str | None
    error_file: str | None

    @property
    def ended(self) -> bool:
        return self.state not in OPEN_BATCHES


# ---- servers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class OtherServer:
    """Another process on the registry.

    server: the id of its data folder. same_base: whether it serves this one's base. runs: whether it runs
    that folder's jobs. room: trainers that it could start. alive: whether its lease has not run out.
    """

    server: str
    same_base: bool
    runs: bool
    room: int
    alive: bool


@dataclass(frozen=True)
class QuotaUse:
    """Use of one key's or one tenant's quotas that one process has admitted.

    kind: `key` or `tenant`; name: the key's id or the tenant's name. requests, tokens: (age in seconds,
    amount), of the last minute. sequences: those that run. age: age of the figures, in seconds.
    """

    kind: str
    name: str
    requests: tuple[tuple[float, int], ...]
    tokens: tuple[tuple[float, int], ...]
    sequences: int
    age: float = 0.0
