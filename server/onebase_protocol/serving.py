"""Models, health and figures of a server, and what vLLM's clients ask it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from onebase_protocol.common import Json, shown_as


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """Something that a request can name: the base, or an adapter. Then `parent` is the base, and `root` the
    version."""

    id: str
    object: Literal["model"] = "model"
    type: Literal["model"] = "model"
    display_name: str = ""
    created_at: Annotated[str | None, shown_as(type="string", format="date-time")] = None
    """The same as `created`; it, `type` and `display_name` are Anthropic's."""
    created: Annotated[int | None, shown_as(type="integer")] = None
    """Unix time in seconds."""
    owned_by: Annotated[str | None, shown_as(type="string")] = None
    root: str = ""
    parent: str | None = None
    max_model_len: int | None = None
    """Largest number of tokens of a prompt with its answer."""


class HealthAnswer(msgspec.Struct, frozen=True):
    status: str
    engine: str


class ServerVersionAnswer(msgspec.Struct, frozen=True, kw_only=True):
    name: Literal["onebase"] = "onebase"
    version: str
    python: str


class EngineStatus(msgspec.Struct, frozen=True):
    state: str
    restarts: int


class VerifierStatus(msgspec.Struct, frozen=True):
    pid: int | None


class LoadPoint(msgspec.Struct, frozen=True, kw_only=True):
    """Load of a server over some time, which ends `at`. Answers to probes and of /status do not count."""

    at: float
    """Unix time in seconds."""
    seconds: float
    answers: int
    errors: int
    """Answers with a status of 500 or more, and answers that broke off after they had begun."""
    requests: int
    """Requests that had their first token, without those of batches."""
    first_token_p50: float | None
    """Median time to the first token in seconds, within the bucket of a histogram. None if no request had
    one."""
    first_token_p95: float | None
    generated_tokens: int
    prompt_tokens: int
    running: int
    """Sequences running at its end."""
    waiting: int
    cpu: float | None = None
    """Part of the processor time that the machine, or the server's container, used: 0 to 1. None if it cannot
    be read."""
    memory_used: int | None = None
    """Bytes of memory in use at its end, without the cache of files."""
    gpu: float | None = None
    """Part of the time in which the GPU computed in the last minute, 0 to 1."""
    gpu_memory_used: int | None = None
    """Bytes of the GPU's memory in use at its end, by all processes."""


class MachineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Load of the machine that a server runs on. What cannot be read is None."""

    cpu: float | None
    """Part of the processor time used in the last seconds, 0 to 1."""
    cpu_cores: float | None
    """Cores that the server may use; a container may have a part of one."""
    memory_used: int | None
    """Bytes in use, without the cache of files."""
    memory_total: int | None
    """Bytes that the server may use."""
    gpu: float | None
    """Part of the last moments in which the GPU computed, 0 to 1."""
    gpu_name: str | None
    gpu_memory_used: int | None
    """Bytes in use by all processes."""
    gpu_memory_total: int | None
    missing: dict[str, str] = {}
    """Reasons by what cannot be read: `cpu`, `memory`, `gpu`."""


class QueueWait(msgspec.Struct, frozen=True, kw_only=True):
    """Time that a tenant's requests waited in the engine's queue in the last hour, in seconds."""

    tenant: str
    requests: int
    p50: float | None
    """Median, within the bucket of a histogram. None if no request began."""
    p95: float | None


class TenantLoadPoint(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of a tenant that ended in some time, which ends `at`. Rows of batches do not count."""

    at: float
    """Unix time in seconds."""
    seconds: float
    requests: int
    errors: int
    """Requests that ended with an error of the server."""
    prompt_tokens: int
    generated_tokens: int
    first_token_p50: float | None
    """Median time to the first token in seconds, within the bucket of a histogram. None if no request had
    one."""
    first_token_p95: float | None
    queue_p50: float | None
    """Median wait in the engine's queue in seconds. None if no request began."""
    queue_p95: float | None


class TenantLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Load of one tenant on one server in the last hours, as long as it has run."""

    object: Literal["list"] = "list"
    tenant: str
    adapter: str | None
    """Adapter whose requests alone are counted, "" being the base; None for all."""
    started_at: float
    """Start of the server, in Unix seconds."""
    last_hour: TenantLoadPoint
    data: tuple[TenantLoadPoint, ...]
    """One point each five minutes, the oldest first. The last is of the time since then."""


class LoadHistory(msgspec.Struct, frozen=True, kw_only=True):
    """Load of one server in the last hours, as long as it has run."""

    object: Literal["list"] = "list"
    version: str
    """Version of OneBase that the server runs."""
    started_at: float
    """Unix time in seconds."""
    last_hour: LoadPoint
    machine: MachineLoad
    tenants: tuple[QueueWait, ...] = ()
    """Waits of tenants that had requests in the last hour, those who waited longest (p95) first."""
    data: tuple[LoadPoint, ...]
    """One point a minute, the oldest first."""


class RouteSecretAnswer(msgspec.Struct, frozen=True):
    """Answer of GET /route_secret: another one after each start of the server."""

    secret: str


class PauseAnswer(msgspec.Struct, frozen=True):
    status: Literal["paused", "resumed"]


class PausedAnswer(msgspec.Struct, frozen=True):
    is_paused: bool


class WorldSizeAnswer(msgspec.Struct, frozen=True):
    world_size: int


class ServerInfoAnswer(msgspec.Struct, frozen=True):
    """The part of vLLM's configuration that its clients read."""

    vllm_config: dict[str, Json]


class TokensAnswer(msgspec.Struct, frozen=True):
    """Answer of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TextAnswer(msgspec.Struct, frozen=True):
    """Answer of POST /detokenize."""

    prompt: str


class TokenizerAnswer(msgspec.Struct, frozen=True):
    """Answer of GET /tokenizer_info."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
