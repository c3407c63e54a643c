"""What the registry hands out: adapters and jobs as plain values. Times are Unix seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from onebase_adapters.store.blobs import Blob, VersionFiles

State = Literal["pulling", "validating", "proving", "ready", "failed"]
Action = Literal["activate", "rollback", "deactivate"]

STATES: Final[tuple[State, ...]] = get_args(State)
UNFINISHED: Final[tuple[State, ...]] = ("pulling", "validating", "proving")

MODULES = "modules"
"""The long part of a report, one entry a module. Lists of adapters leave it out."""


class Unset:
    """The type of UNSET: tells "not given" from None, which means "nothing is active"."""

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset()


@dataclass(frozen=True)
class VersionError:
    """Why a version failed: a stable code and a sentence."""

    code: str
    message: str


@dataclass(frozen=True)
class VersionRecord:
    """One version of one adapter.

    `report`: what the proof found. In an AdapterRecord it lacks its `modules`, of which there may be
    hundreds; the registry's `version`, `versions` and `unfinished` give it whole. `proofs`: the packed
    adapters by the kernels that they were proved with after the version was ready.
    """

    tenant: str
    name: str
    digest: str
    state: State
    files: VersionFiles
    prepared: Blob | None
    report: Mapping[str, Any] | None = field(hash=False)
    source: Mapping[str, Any] = field(hash=False)
    error: VersionError | None
    created_at: float
    created_by: str
    finished_at: float | None
    proofs: Mapping[str, Blob] = field(default_factory=dict, hash=False)

    @property
    def finished(self) -> bool:
        return self.state not in UNFINISHED

    def packed_for(self, kernels: str) -> Blob | None:
        """The packed adapter that was proved with these kernels; None where none was."""
        first = (self.report or {}).get("proof", {}).get("kernels")
        return self.prepared if first == kernels else self.proofs.get(kernels)


@dataclass(frozen=True)
class AdapterRecord:
    """One name. `active`: the digest of the version that requests by name get; `versions`: newest first.

    `shared`: whether all tenants may use it and look at it. `activated_at`: when `active` became that.
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

    def version(self, digest: str) -> VersionRecord | None:
        """The version of this whole digest."""
        return next((version for version in self.versions if version.digest == digest), None)

    @property
    def active_version(self) -> VersionRecord | None:
        return None if self.active is None else self.version(self.active)


@dataclass(frozen=True)
class HistoryEntry:
    """One change of what is active: `version` from then on, `previous` until then; None: nothing."""

    action: Action
    version: str | None
    previous: str | None
    actor: str
    at: float


@dataclass(frozen=True)
class ForcedDeletion:
    """A deletion that ends the requests which use what was deleted. digest: None is every version."""

    tenant: str
    name: str
    digest: str | None


@dataclass(frozen=True)
class Changes:
    """What `Registry.changes` saw: the counter then, the adapters changed since, and the names of all
    adapters there are (`(tenant, name)`), so that one who follows can drop the others.

    Args:
        audited: number of the audit log's last entry then.
        forced: deletions by force since the entry that was named.
    """

    counter: int
    changed: tuple[AdapterRecord, ...]
    names: frozenset[tuple[str, str]]
    audited: int = 0
    forced: tuple[ForcedDeletion, ...] = ()


# ---- quotas and usage ------------------------------------------------------------------------


@dataclass(frozen=True)
class Quotas:
    """What a key or a tenant may ask for; None: no limit. All but the first three are a tenant's alone."""

    requests: int | None = None
    """Requests for text, in any 60 seconds."""
    tokens: int | None = None
    """Tokens of prompts and completions, in any 60 seconds."""
    rows: int | None = None
    """Completions at once: each of a request's prompts counts `n`."""
    adapters: int | None = None
    """Names, on all bases of the registry."""
    bytes: int | None = None
    """Of versions, as they were sent or trained, of files, and of the rows that unended jobs keep."""
    training_seconds: int | None = None
    """In a calendar month (UTC)."""
    jobs: int | None = None
    """Training jobs that have not ended: queued, running, held and paused ones, and failed ones that can be
    resumed."""

    def given(self) -> dict[str, int]:
        """The limits that there are."""
        return {name: limit for name, limit in vars(self).items() if limit is not None}


@dataclass(frozen=True)
class TenantRecord:
    """One tenant: its quotas, and what it has now of what is kept.

    adapters: names. bytes: of versions, of files and of the rows that unended jobs keep. training_seconds: in
    this calendar month (UTC).
    """

    tenant: str
    quotas: Quotas
    adapters: int
    bytes: int
    training_seconds: float


@dataclass(frozen=True, order=True)
class UsageKey:
    """Whose use it is, and when. day: 2026-11-26, in UTC. adapter: "" is the base; a sum is `a+b`."""

    tenant: str
    day: str
    base: str
    adapter: str


@dataclass
class Figures:
    """What was used. cached_tokens: those of prompt_tokens that the prefix cache had."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    training_seconds: float = 0.0
    training_tokens: int = 0

    def add(self, other: Figures) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


# ---- keys ------------------------------------------------------------------------------------

Scope = Literal["generate", "adapters", "train", "admin"]
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key. `id`: its public beginning; `sha256`: of the whole key."""

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
    """Of its requests among all that wait: the highest first."""

    def valid_at(self, now: float) -> bool:
        """Whether it may be used."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


# ---- audit -----------------------------------------------------------------------------------

AuditAction = Literal[
    "adapter.uploaded", "adapter.pulled", "adapter.loaded", "adapter.trained", "adapter.merged",
    "adapter.activated", "adapter.rolled_back", "adapter.deactivated", "adapter.pinned", "adapter.unpinned",
    "adapter.shared", "adapter.unshared", "adapter.version_deleted", "adapter.deleted", "file.added",
    "file.deleted", "job.created", "job.paused", "job.resumed", "job.stopped", "job.cancelled",
    "job.succeeded", "job.failed", "batch.created", "batch.cancelling", "batch.cancelled", "batch.completed",
    "batch.failed", "batch.expired", "key.created", "key.changed", "key.revoked", "tenant.changed",
]  # fmt: skip
AUDIT_ACTIONS: Final[tuple[AuditAction, ...]] = get_args(AuditAction)
AUDIT_KINDS: Final = tuple(dict.fromkeys(action.partition(".")[0] for action in AUDIT_ACTIONS))
"""What actions begin with: `adapter`, `file`, `job`, `batch`, `key`, `tenant`."""


@dataclass(frozen=True)
class AuditEntry:
    """One change, by whom.

    number: counts up. tenant: whose adapter, file, job, batch or key it is. key: the id of the API key that
    asked; "" where none is needed. actor: what acted for it, where that was no request. target: a name, or an
    id. version: a digest. base: its name. request: the id that came with the request.
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


# ---- training --------------------------------------------------------------------------------

JobState = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Purpose = Literal["fine-tune", "fine-tune-results", "batch", "batch_output"]
UPLOADED: Final[tuple[Purpose, ...]] = ("fine-tune", "batch")
"""What users send; the rest is what jobs and batches leave."""
Level = Literal["info", "warn", "error"]
EventKind = Literal["message", "metrics"]
Activate = Literal["always", "if_better", "if_better_than_base", "never"]

JOB_STATES: Final[tuple[JobState, ...]] = get_args(JobState)
OPEN_STATES: Final[tuple[JobState, ...]] = ("validating_files", "queued", "running")
"""A server has something to do for these."""
ENDED_STATES: Final[tuple[JobState, ...]] = ("succeeded", "failed", "cancelled")
RESUMABLE = frozenset(
    {
        "adapter_lost", "base_changed", "delivery_failed", "device_error", "disk_full",
        "insufficient_quota", "internal_error", "no_memory", "out_of_memory", "prepared_damaged",
        "proof_crashed", "proof_timeout", "store_unavailable", "trainer_died", "trainer_failed",
    }
)  # fmt: skip
"""Errors that may not happen again: the job can continue from its last checkpoint, or be delivered again."""


@dataclass(frozen=True)
class TrainingFile:
    """A file that jobs or batches read, or what they leave.

    server: the one that took it in. bytes: its size. sha256: the blob with its content.
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
class JobError:
    """Why a job failed: a stable code, a sentence, and the field or file that it is about."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class ParentVersion:
    """The version whose training a job goes on with. config, weights: the SHA-256 of its two files."""

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
    """What a job is made of. `settings`: the recipe as it was asked for; `server`: the one that runs it;
    `parent`: None: it begins with the base. `hold`: it waits for a word once its files are checked."""

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
    """A job is to end after this step, or the first one after it that it can, and to keep its best adapter.

    key: the id of the API key that asked, at the Unix time `at`; "" where none is needed.
    """

    step: int
    key: str
    at: float


@dataclass(frozen=True)
class TrainingJob(NewJob):
    """One job. `number` counts up in the order of creation.

    plan: the resolved recipe and its estimate, once the files are checked.
    progress: the newest figures of the run.
    report: what training found, once the adapter is written; what is left then is to deliver it.
    saved_step: of the newest checkpoint; 0 is none.
    deaths: of its trainers since the checkpoint `death_step`.
    version: the digest of what came out; `activated`: whether requests by name get it.
    key: the id of the API key that made it; "" where none is needed.
    stop: who asked it to end early.
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
        """Whether what is left is to deliver it."""
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
    """Of JobStop."""
    kept_step: int = 0
    """Of the checkpoint that the store has; 0 is none."""

    @property
    def is_movable(self) -> bool:
        """Whether it waits, and could go on elsewhere without losing a step."""
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
    """A job of which the store has not what it goes on from: its checkpoint in the folder `path`, and its
    adapter once it is trained."""

    id: str
    step: int
    path: str
    trained: bool


@dataclass(frozen=True)
class JobEvent:
    """What those who follow a job read.

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
    """A step that a job can go on from.

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
"""A server has something to do for these."""


@dataclass(frozen=True)
class BatchError:
    """What is wrong with a batch, or with a line of its file (counted from 1)."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True)
class NewBatch:
    """What a batch is made of. `server`: the one that runs it; `window`: as it was asked for, `24h`."""

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
class Batch(NewBatch):
    """One batch. `number` counts up in the order of creation.

    key: the id of the API key that made it; "" where none is needed.
    times: when it came into its states, by their names.
    total: its rows, once they are checked; completed, failed: those that have an answer.
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
    """What one process has let in of the quotas of one key or one tenant.

    kind: `key` or `tenant`; name: the key's id or the tenant's name. requests, tokens: (age in seconds,
    amount), of the last minute. rows: that run. age: seconds since all this was so.
    """

    kind: str
    name: str
    requests: tuple[tuple[float, int], ...]
    tokens: tuple[tuple[float, int], ...]
    rows: int
    age: float = 0.0
