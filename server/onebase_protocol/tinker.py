"""Answers of the routes that speak the Tinker API, as its client reads them. Results of forward passes and
samples are not here: they are sent as protocol buffers."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from onebase_protocol.common import Json, Sparse

RequestId = Annotated[str, Meta(description="id with which /api/v1/retrieve_future answers")]
IsoTime = Annotated[str, Meta(description="time as ISO 8601, in UTC")]


class ClientConfigAnswer(Sparse, frozen=True):
    """Flags of the client: those that are not its defaults."""

    sample_join_sampling_session: bool | None = None
    fwdbwd_max_chunk_bytes_count: int | None = None
    sample_max_concurrent_requests: int | None = None


class ClientDynamicConfigAnswer(Sparse, frozen=True):
    """Flags of the client that it reads again from time to time."""

    sample_cancel_enabled: bool | None = None


class HealthzAnswer(Sparse, frozen=True, kw_only=True):
    status: Annotated[str, Meta(extra_json_schema={"const": "ok"})]


class SupportedModel(Sparse, frozen=True, kw_only=True):
    """The base, under a name by which the client may ask for it."""

    model_name: str
    max_context_length: int
    trainable: bool
    sampleable: bool


class CapabilitiesAnswer(Sparse, frozen=True):
    supported_models: list[SupportedModel]


class SessionCreatedAnswer(Sparse, frozen=True, kw_only=True):
    type: Annotated[str, Meta(extra_json_schema={"const": "create_session"})]
    session_id: str
    info_message: str | None = None


class TypeAnswer(Sparse, frozen=True):
    """Confirmation, with the type of the request."""

    type: str


class TelemetryAnswer(Sparse, frozen=True):
    status: Annotated[str, Meta(extra_json_schema={"const": "accepted"})]


class FutureAnswer(Sparse, frozen=True):
    """Promise of a result."""

    request_id: RequestId
    model_id: str | None = None
    sample_sequence_ids: list[str] | None = None


class TryAgainAnswer(Sparse, frozen=True, kw_only=True):
    """The result is not there yet."""

    type: Annotated[str, Meta(extra_json_schema={"const": "try_again"})]
    request_id: str
    queue_state: Literal["active", "paused_capacity"]
    queue_state_reason: str | None = None


class RunData(Sparse, frozen=True):
    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None


class RunInfoAnswer(Sparse, frozen=True, kw_only=True):
    """A run's base, by the names that the client finds a tokenizer with, and its rank."""

    type: Annotated[str, Meta(extra_json_schema={"const": "get_info"})]
    model_data: RunData
    model_id: str
    is_lora: bool
    lora_rank: int
    model_name: str
    optimizer_config: Json


class SamplerCreatedAnswer(Sparse, frozen=True, kw_only=True):
    type: Annotated[str, Meta(extra_json_schema={"const": "create_sampling_session"})]
    sampling_session_id: str


class SamplerJoinedAnswer(Sparse, frozen=True, kw_only=True):
    type: Annotated[str, Meta(extra_json_schema={"const": "join_sampling_session"})]
    client_counter: int


class SamplerAnswer(Sparse, frozen=True):
    """A sampling session. `model_path`: what it was created from, unless it is the base or a step's
    weights; `live`: the digest of weights that were not proved."""

    sampler_id: str
    base_model: str
    model_path: str | None = None
    live: str | None = None


class WeightsInfoAnswer(Sparse, frozen=True, kw_only=True):
    """Facts about a checkpoint that a client needs to continue from it."""

    base_model: str
    is_lora: bool
    lora_rank: int
    train_unembed: bool
    train_mlp: bool
    train_attn: bool
    optimizer_config: Json


class LiveCheckpoint(Sparse, frozen=True, kw_only=True):
    """Weights that were saved under a name. `adapter` and `version`: those that it is proved as."""

    checkpoint_id: str
    checkpoint_type: Literal["training", "sampler", "external"]
    time: IsoTime
    tinker_path: str
    size_bytes: int | None = None
    public: bool
    user_metadata: dict[str, str] | None = None
    expires_at: IsoTime | None = None
    adapter: str | None = None
    version: str | None = None


class ExternalWeightsAnswer(Sparse, frozen=True):
    """Addresses of the files of external weights, by name, which are good until `expires`."""

    urls: dict[str, str]
    expires: IsoTime


class StoredCheckpoints(Sparse, frozen=True):
    """Named checkpoints of a tenant, and what they take."""

    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float


class StorageAnswer(Sparse, frozen=True):
    data: list[StoredCheckpoints]


class ClientAuditEntry(Sparse, frozen=True):
    """Entry of the audit log. `event`: its action, as in checkpoint_deleted."""

    timestamp: IsoTime
    event: str
    event_details: Json


class ClientAuditAnswer(Sparse, frozen=True):
    entries: list[ClientAuditEntry]


class Named(Sparse, frozen=True):
    name: str


class KeyUser(Sparse, frozen=True):
    email: str


class KeyDetails(Sparse, frozen=True):
    org_details: Named
    user_details: KeyUser


class ClientKeyAnswer(Sparse, frozen=True):
    """The caller's key. `name`: its id; `org_details`: its tenant. Keys have no user's address."""

    key_id: int
    name: str
    note: str
    details: KeyDetails


class PageCursor(Sparse, frozen=True):
    offset: int
    limit: int
    total_count: int


class LiveCheckpointsAnswer(Sparse, frozen=True):
    checkpoints: list[LiveCheckpoint]
    cursor: PageCursor | None = None


class LiveRun(Sparse, frozen=True, kw_only=True):
    """A training run: one model that clients train step by step."""

    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    corrupted: bool
    lora_rank: int
    last_request_time: IsoTime
    last_checkpoint: LiveCheckpoint | None = None
    last_sampler_checkpoint: LiveCheckpoint | None = None
    user_metadata: dict[str, str] | None = None


class LiveRunsAnswer(Sparse, frozen=True):
    training_runs: list[LiveRun]
    cursor: PageCursor


class SessionAnswer(Sparse, frozen=True):
    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str] | None = None
    display_name: str | None = None


class SessionsAnswer(Sparse, frozen=True):
    sessions: list[str]


class NothingAnswer(Sparse, frozen=True):
    """An empty object."""


class FutureResult(Sparse, frozen=True):
    """A result that is sent as JSON, with the fields of its kind; or `error`, with its `category`."""

    type: str | None = None
    model_id: str | None = None
    path: str | None = None
    sampling_session_id: str | None = None
    size_bytes: int | None = None
    metrics: dict[str, float] | None = None
    error: str | None = None
    category: Literal["user", "server", "unknown"] | None = None
