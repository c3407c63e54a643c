"""The wire models of the routes that speak the Tinker API.

The client sends `type` with many requests, which is not needed, and takes all of its fields from its own
models: those of a newer client that this server does not know are refused by name.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, JsonValue, model_validator

from onebase_server.requests.schemas.generation import MAX_PROMPT_TOKENS, TokenId
from onebase_server.requests.schemas.wire import FieldError, Tolerant

MAX_ID = 200
MAX_STOPS = 64
LEAST_TTL, MOST_TTL = 3600, 315_360_000
MOST_TOP = 1024
"""Largest number of most likely tokens at one place."""
LiveId = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
SequenceNumber = Annotated[int, Field(ge=0, lt=2**63)]
UserMetadata = Annotated[dict[str, JsonValue], Field(max_length=64)]
Ttl = Annotated[int, Field(ge=LEAST_TTL, le=MOST_TTL, description="seconds, from 1 hour to 10 years")]
CheckpointName = Annotated[str, Field(min_length=1, max_length=128)]
CheckpointPath = Annotated[str, Field(max_length=500, description="tinker://RUN/weights/NAME")]
SampledPath = Annotated[
    str,
    Field(
        max_length=500,
        description="tinker://RUN/sampler_weights/NAME, or tinker://adapters/sampler_weights/NAME[@VERSION]",
    ),
]
Chosen = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TinkerRequest(Tolerant):
    """A request of the client. Its `type` repeats what its route says."""

    ignored: ClassVar = frozenset({"type"})


class ClientConfigRequest(TinkerRequest):
    """Body of POST /api/v1/client/config."""

    sdk_version: Annotated[str, Field(max_length=100)]


class CreateSessionRequest(TinkerRequest):
    """Body of POST /api/v1/create_session."""

    tags: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=100, default_factory=list)]
    user_metadata: UserMetadata | None = None
    sdk_version: Annotated[str, Field(max_length=100)] = ""
    display_name: Annotated[str, Field(max_length=500)] | None = None
    project_id: Annotated[str, Field(max_length=MAX_ID)] | None = Field(
        default=None, description="not served: keys belong to tenants"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.project_id is not None:
            raise FieldError("project_id", "this server has tenants instead of projects. Leave it out")
        return self


class HeartbeatRequest(TinkerRequest):
    """Body of POST /api/v1/session_heartbeat."""

    session_id: LiveId


class FinishSessionRequest(TinkerRequest):
    """Body of POST /api/v1/sessions/{id}/finish."""

    ignored: ClassVar = frozenset({"type", "reason", "status", "detail"})


class LoraSettings(Tolerant):
    """Shape of a run's adapter."""

    rank: Annotated[int, Field(ge=1, le=4096)]
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerSettings(Tolerant):
    """Optimizer of a run."""

    neutral: ClassVar[dict[str, tuple[JsonValue, ...]]] = {"version": ()}
    reasons: ClassVar = {"version": "it belongs to another optimizer than adamw"}
    type: str = "adamw"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type != "adamw":
            raise FieldError("type", f"the optimizer {self.type[:40]!r} is not served. Use adamw")
        return self


class CreateModelRequest(TinkerRequest):
    """Body of POST /api/v1/create_model."""

    session_id: LiveId
    model_seq_id: SequenceNumber
    base_model: Annotated[str, Field(min_length=1, max_length=MAX_ID)]
    user_metadata: UserMetadata | None = None
    lora_config: LoraSettings
    optimizer_config: OptimizerSettings = OptimizerSettings()


class OfModelRequest(TinkerRequest):
    """Body of a request about one run."""

    model_id: LiveId


class AdamParams(Tolerant):
    """Settings of one optimizer step."""

    learning_rate: Chosen = 1e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Chosen = 1e-12
    weight_decay: Chosen = 0.0
    grad_clip_norm: Annotated[float, Field(allow_inf_nan=False)] = 0.0


class OptimStepRequest(TinkerRequest):
    """Body of POST /api/v1/optim_step."""

    ignored: ClassVar = frozenset({"type"})
    neutral: ClassVar[dict[str, tuple[JsonValue, ...]]] = {"optimizer_params": ()}
    reasons: ClassVar = {"optimizer_params": "the only optimizer is AdamW: send adam_params"}
    adam_params: AdamParams
    model_id: LiveId
    seq_id: SequenceNumber


class SaveWeightsRequest(TinkerRequest):
    """Body of POST /api/v1/save_weights."""

    model_id: LiveId
    path: CheckpointName
    seq_id: SequenceNumber
    ttl_seconds: Ttl | None = None
    overwrite: bool = False
    user_metadata: UserMetadata | None = None


class SaveExternalRequest(TinkerRequest):
    """Body of POST /api/v1/save_weights_external."""

    model_id: LiveId
    path: CheckpointName
    seq_id: SequenceNumber
    ttl_seconds: Ttl | None = None
    age_encryption_recipients: Annotated[
        list[Annotated[str, Field(max_length=2000)]],
        Field(
            max_length=10,
            default_factory=list,
            description="public keys of age or SSH, to which each file is encrypted",
        ),
    ]


class SaveForSamplerRequest(TinkerRequest):
    """Body of POST /api/v1/save_weights_for_sampler: a name, or the number of a sampling session."""

    model_id: LiveId
    path: CheckpointName | None = None
    sampling_session_seq_id: SequenceNumber | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    seq_id: SequenceNumber
    ttl_seconds: Ttl | None = None
    user_metadata: UserMetadata | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.path is None) == (self.sampling_session_seq_id is None):
            raise FieldError("path", "give either path or sampling_session_seq_id")
        return self


class LoadWeightsRequest(TinkerRequest):
    """Body of POST /api/v1/load_weights: into a run, or into a new one of a session."""

    model_id: LiveId | None = None
    seq_id: SequenceNumber | None = None
    session_id: LiveId | None = None
    model_seq_id: SequenceNumber | None = None
    base_model: Annotated[str, Field(max_length=MAX_ID)] | None = None
    user_metadata: UserMetadata | None = None
    path: CheckpointPath
    optimizer: bool
    optimizer_config: OptimizerSettings | None = None
    weights_access_token: Annotated[str, Field(max_length=1000)] | None = Field(
        default=None, description="not served: a checkpoint belongs to its tenant"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        of_model = self.model_id is not None and self.seq_id is not None
        of_session = self.session_id is not None and self.model_seq_id is not None
        if of_model == of_session:
            raise FieldError("model_id", "give either model_id and seq_id, or session_id and model_seq_id")
        if self.weights_access_token is not None:
            raise FieldError("weights_access_token", "only a tenant's own checkpoints are loaded")
        return self


class WeightsInfoRequest(TinkerRequest):
    """Body of POST /api/v1/weights_info."""

    ignored: ClassVar = frozenset({"type", "weights_access_token"})
    tinker_path: CheckpointPath


class CreateSamplingSessionRequest(TinkerRequest):
    """Body of POST /api/v1/create_sampling_session: a checkpoint's path, or the base."""

    session_id: LiveId
    sampling_session_seq_id: SequenceNumber
    base_model: Annotated[str, Field(max_length=MAX_ID)] | None = None
    model_path: SampledPath | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.base_model is None and self.model_path is None:
            raise FieldError("base_model", "give base_model or model_path")
        return self


class JoinSamplingSessionRequest(TinkerRequest):
    """Body of POST /api/v1/join_sampling_session."""

    sampling_session_id: LiveId


class InputChunk(Tolerant):
    """A part of a prompt."""

    type: str = "encoded_text"
    tokens: Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS, fail_fast=True)] | None = None
    neutral: ClassVar[dict[str, tuple[JsonValue, ...]]] = dict.fromkeys(
        ("data", "format", "expected_tokens", "location", "dmel", "override_dimensions"), ()
    )
    reasons: ClassVar = dict.fromkeys(neutral, "this server's bases read text alone. Send encoded_text")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type != "encoded_text" or self.tokens is None:
            raise FieldError("type", f"{self.type[:40]!r} is not served: bases read text alone")
        return self


class ModelInput(Tolerant):
    """A prompt, in parts."""

    chunks: Annotated[list[InputChunk], Field(max_length=10_000, fail_fast=True)]


class SamplingSettings(Tolerant):
    """Settings by which a sample is drawn."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    stop: str | list[Annotated[str, Field(min_length=1)]] | list[TokenId] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_k: int = -1
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.stop, list) and len(self.stop) > MAX_STOPS:
            raise FieldError("stop", f"there are more than {MAX_STOPS}")
        if self.stop == "":
            raise FieldError("stop", "an empty text stops at once. Leave it out")
        return self


class TargetTokens(Tolerant):
    """Ids of tokens at each place of a prompt after its first, [length - 1, K], dense or as CSR."""

    data: Annotated[list[int], Field(max_length=1_000_000, fail_fast=True)]
    dtype: Literal["int64"]
    shape: Annotated[list[int], Field(min_length=2, max_length=2)]
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class SampleRequest(TinkerRequest):
    """Body of POST /api/v1/asample."""

    num_samples: Annotated[int, Field(ge=1)] = 1
    prompt: ModelInput
    sampling_params: SamplingSettings
    base_model: Annotated[str, Field(max_length=MAX_ID)] | None = None
    model_path: CheckpointPath | None = None
    sampling_session_id: LiveId
    seq_id: SequenceNumber
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] = 0
    topk_sample_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] = 0
    target_prompt_logprobs: TargetTokens | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: Annotated[int, Field(ge=1)] | None = None
    record_stability_info: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.record_stability_info:
            raise FieldError(
                "record_stability_info",
                "it belongs to the loss stable_reinforce, which this server does not have. Train with "
                "importance_sampling, ppo, cispo or gspo",
            )
        if self.prompt_alt_tokens_k:
            raise FieldError(
                "prompt_alt_tokens_k",
                "draws from a prompt's own distributions are not served. Use topk_prompt_logprobs",
            )
        if self.prompt_logprobs_last_n is not None and not self.prompt_logprobs:
            raise FieldError("prompt_logprobs_last_n", "it goes with prompt_logprobs")
        return self

    @property
    def tokens(self) -> list[int]:
        """Tokens of the prompt."""
        return [token for chunk in self.prompt.chunks for token in chunk.tokens or ()]


class RetrieveFutureRequest(TinkerRequest):
    """Body of POST /api/v1/retrieve_future."""

    ignored: ClassVar = frozenset({"type", "allow_metadata_only", "model_id"})
    request_id: LiveId


class CancelFutureRequest(TinkerRequest):
    """Body of POST /api/v1/cancel_future."""

    request_id: LiveId


class TtlRequest(TinkerRequest):
    """Body of PUT /api/v1/training_runs/{id}/checkpoints/{id}/ttl; null keeps the checkpoint."""

    ttl_seconds: Ttl | None = None


class TelemetryRequest(TinkerRequest):
    """Body of POST /api/v1/telemetry, of which nothing is kept."""

    ignored: ClassVar = frozenset({"type", "events", "platform", "sdk_version", "session_id", "process_uuid"})
