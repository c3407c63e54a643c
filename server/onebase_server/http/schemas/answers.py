"""Types of the routes' answers, for the reference. Plain dicts on the wire, which mypy compares with them.

Nothing is validated on the way out, and no schema is made before somebody asks for the reference: `answer`
only notes a route's type, of which openapi.py makes the schema.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Generic, Literal, NotRequired, TypeVar

import msgspec
from pydantic import Field, WithJsonSchema
from typing_extensions import TypedDict

from onebase_adapters.proof.report import VersionReport
from onebase_adapters.registry import Activate
from onebase_engine.engine.messages import BaseInfo, Stats
from onebase_server.adapters.residency import MemoryUse

T = TypeVar("T")
Json = dict[str, Any]
Responses = dict[int | str, dict[str, Any]]
"""`responses` of a route, as FastAPI takes them."""
MODEL_REFUSED = (404, 409, 422, 507)
"""Statuses of errors of a request to a model, which may be an adapter that comes from the Hub first."""


class Described(dict[str, Any]):
    """One of a route's `responses`. kind: the type of its JSON, or None. event: that of what it streams."""

    def __init__(self, kind: Any, event: Any = None, **fields: Any) -> None:
        super().__init__(fields)
        self.kind = kind
        self.event = event


def refused(*statuses: int) -> Responses:
    """Return the `responses` of a route's errors, but for those that any route may send (see openapi.py)."""
    return {one: {} for one in statuses}


def answer(
    kind: Any,
    *errors: int,
    description: str = "Successful Response",
    status: int = 200,
    event: Any = None,
    also: tuple[str, ...] = (),
) -> Responses:
    """Return the `responses` of a route whose answer is JSON of this type.

    Args:
        errors: their statuses, as in `refused`.
        event: the type of what it streams as server-sent events, if it does.
        also: media types of the same, as text.
    """
    texts = also if event is None else ("text/event-stream", *also)
    content = {media_type: {"schema": {"type": "string"}} for media_type in texts}
    made: Responses = {status: Described(kind, event, description=description, content=content)}
    return made | refused(*errors)


def streamed_answer(kind: Any, event: Any) -> Responses:
    """Return the `responses` of a route for text, which answers in one piece, or by server-sent events."""
    told = "In one piece; or as it comes, by server-sent events"
    return answer(kind, *MODEL_REFUSED, description=told, event=event)


def written_out(schema: Json) -> Json:
    """Return a schema without `$defs`: each reference is replaced by what it means. None may refer to
    itself."""
    parts = schema.get("$defs", {})

    def whole(part: Any) -> Any:
        if isinstance(part, list):
            return [whole(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return whole(parts[part["$ref"].rpartition("/")[2]])
        return {key: whole(value) for key, value in part.items() if key != "$defs"}

    made: Json = whole(schema)
    return made


def _schema_of(struct: type[msgspec.Struct]) -> WithJsonSchema:
    return WithJsonSchema(written_out(msgspec.json.schema(struct)))


# ---- errors --------------------------------------------------------------------------------------

Told = Annotated[str, Field(description="what is wrong, and the way out")]
ErrorCode = Annotated[str | None, Field(description="stable, for programs")]
ErrorParam = Annotated[str | None, Field(description="the field of the request")]


class ErrorDetails(TypedDict):
    """Some errors have more fields, as their quota or the version that is active."""

    message: Told
    type: str
    param: ErrorParam
    code: ErrorCode


class Error(TypedDict):
    """Error of every route but Anthropic's."""

    error: ErrorDetails


class AnthropicErrorDetails(TypedDict):
    """Fields of an error that Anthropic's format has no place for."""

    error_code: ErrorCode
    param: NotRequired[ErrorParam]


class AnthropicErrorBody(TypedDict):
    type: str
    message: Told
    details: AnthropicErrorDetails


class AnthropicError(TypedDict):
    type: Literal["error"]
    request_id: str
    error: AnthropicErrorBody


# ---- lists and ends ------------------------------------------------------------------------------


class ListAnswer(TypedDict, Generic[T]):
    """A whole list."""

    object: Literal["list"]
    data: list[T]


class PageAnswer(TypedDict, Generic[T]):
    """A page of a list. The next one is that after `last_id`."""

    object: Literal["list"]
    data: list[T]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedAnswer(TypedDict):
    """Confirmation of a deletion."""

    id: str
    object: str
    deleted: Literal[True]


class CancelledAnswer(TypedDict):
    """Confirmation that a text will not be generated to its end."""

    id: str
    object: Literal["generation"]
    cancelled: Literal[True]


# ---- text ------------------------------------------------------------------------------------


class CalledFunction(TypedDict):
    name: str
    arguments: str
    """JSON, as text."""


class ToolCallAnswer(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class FlatLogprobs(TypedDict):
    """Parallel lists, with an entry for each token."""

    tokens: list[str]
    token_ids: list[int]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TokenLogprob(TypedDict):
    token: str
    logprob: float | None
    bytes: list[int]


class ChatTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatTokenLogprob]
    refusal: None


class GeneratedChoice(TypedDict):
    index: int
    text: str
    finish_reason: str | None
    logprobs: FlatLogprobs | None
    tool_calls: NotRequired[list[ToolCallAnswer]]


class WeightedAdapter(TypedDict):
    name: str
    weight: float


class GeneratedUsage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class GeneratedTiming(TypedDict):
    """Seconds: in the engine's queue, until the first token, and from the first token to the last."""

    queue_s: float
    ttft_s: float
    decode_s: float


class GeneratedSummary(TypedDict):
    adapter: str | list[WeightedAdapter] | None
    usage: GeneratedUsage
    timing: GeneratedTiming


class GeneratedAnswer(GeneratedSummary):
    """Answer of POST /generate."""

    id: str
    object: Literal["generation"]
    choices: list[GeneratedChoice]


class TgiToken(TypedDict):
    id: int
    text: str
    logprob: float | None
    special: bool


class TgiDetails(TypedDict):
    finish_reason: str
    generated_tokens: int
    input_length: int
    seed: int | None
    prefill: list[TgiToken]
    tokens: list[TgiToken]
    top_tokens: NotRequired[list[list[TgiToken]]]


class TgiAnswer(TypedDict):
    """Answer of POST /, one in a list."""

    generated_text: str
    details: NotRequired[TgiDetails]


class CachedTokens(TypedDict):
    cached_tokens: int


class OpenAIUsage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class PromptTokenLogprob(TypedDict):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptTokenLogprob] | None]
"""Log-probabilities of each prompt token, by token id."""


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: FlatLogprobs | None
    finish_reason: str | None
    prompt_logprobs: NotRequired[PromptLogprobs]
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


class CompletionAnswer(TypedDict):
    """Answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: OpenAIUsage


class ChatAnswerMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCallAnswer]]


class ChatChoice(TypedDict):
    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: NotRequired[list[int]]


class ChatAnswer(TypedDict):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: OpenAIUsage
    prompt_logprobs: NotRequired[PromptLogprobs]
    prompt_token_ids: NotRequired[list[int]]


# ---- texts that are read -----------------------------------------------------------------------


class EmbeddingAnswer(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """Numbers, or in base64 their bytes: fp32, little-endian."""


class EmbeddingsAnswer(TypedDict):
    """Answer of POST /v1/embeddings."""

    id: str
    object: Literal["list"]
    data: list[EmbeddingAnswer]
    model: str
    usage: OpenAIUsage


class LabelAnswer(TypedDict):
    label: str
    probs: list[float]
    num_classes: int


class TokenLabelAnswer(LabelAnswer):
    token: str
    token_id: int


class TextLabelAnswer(LabelAnswer):
    index: int


class TokenLabelsAnswer(TypedDict):
    index: int
    tokens: list[TokenLabelAnswer]


class ClassifyAnswer(TypedDict):
    """Answer of POST /classify."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[TextLabelAnswer] | list[TokenLabelsAnswer]
    usage: OpenAIUsage


class DocumentAnswer(TypedDict):
    text: str


class RankedAnswer(TypedDict):
    index: int
    relevance_score: float
    document: NotRequired[DocumentAnswer]


class RerankAnswer(TypedDict):
    """Answer of POST /v1/rerank."""

    id: str
    model: str
    results: list[RankedAnswer]
    usage: OpenAIUsage


class PairScore(TypedDict):
    index: int
    object: Literal["score"]
    score: float


class ScoreAnswer(TypedDict):
    """Answer of POST /score."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[PairScore]
    usage: OpenAIUsage


class OptionAnswer(TypedDict):
    index: int
    text: str
    probability: float
    logprob: float
    prior_logprob: float | None
    token_logprobs: list[float]


class DecisionAnswer(TypedDict):
    """Answer of POST /v1/decide."""

    id: str
    object: Literal["decision"]
    created: int
    model: str
    choice: str
    index: int
    choices: list[OptionAnswer]
    usage: OpenAIUsage


# ---- Anthropic ---------------------------------------------------------------------------------


class TextBlockAnswer(TypedDict):
    type: Literal["text"]
    text: str


class ToolUseAnswer(TypedDict):
    type: Literal["tool_use"]
    id: str
    name: str | None
    input: Json


class MessageUsage(TypedDict):
    """The prompt is the sum of three: what is new, what was put into the cache, what came from it."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageAnswerUsage(MessageUsage):
    service_tier: Literal["standard"]


class MessageAnswer(TypedDict):
    """Answer of POST /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlockAnswer | ToolUseAnswer]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageAnswerUsage


class TokenCountAnswer(TypedDict):
    """Answer of POST /v1/messages/count_tokens."""

    input_tokens: int


# ---- responses ---------------------------------------------------------------------------------


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Json]
    logprobs: NotRequired[list[ChatTokenLogprob]]


class InputText(TypedDict):
    type: Literal["input_text"]
    text: str


class MessageItemAnswer(TypedDict):
    id: str
    type: Literal["message"]
    status: str
    role: str
    content: list[OutputText | InputText]


class CallItemAnswer(TypedDict):
    id: str
    type: Literal["function_call"]
    status: str
    arguments: str
    call_id: str
    name: str


class CallOutputItemAnswer(TypedDict):
    id: str
    type: Literal["function_call_output"]
    status: str
    call_id: str
    output: str


class InputTokensDetails(CachedTokens):
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(TypedDict):
    reason: str


class ResponseText(TypedDict):
    format: Json
    verbosity: str


class ResponseReasoning(TypedDict):
    effort: str | None
    summary: None


class ResponseHead(TypedDict):
    """A response without its state: the fields of the request as they were read, and the output."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: NotRequired[int]
    output: list[MessageItemAnswer | CallItemAnswer]
    incomplete_details: IncompleteDetails | None
    model: str
    instructions: str | None
    previous_response_id: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    top_logprobs: int
    tools: list[Json]
    tool_choice: str | Json
    parallel_tool_calls: bool
    text: ResponseText
    reasoning: ResponseReasoning
    metadata: dict[str, str]
    store: bool
    truncation: Literal["disabled"]
    background: Literal[False]


class ResponseAnswer(ResponseHead):
    """Answer of POST /v1/responses."""

    status: Literal["completed", "incomplete"]
    error: None
    usage: ResponseUsage


class InputItemsAnswer(PageAnswer[MessageItemAnswer | CallItemAnswer | CallOutputItemAnswer]):
    """Items that a response answers."""


# ---- models and tokens -------------------------------------------------------------------------


class ModelAnswer(TypedDict):
    """The base, or an adapter: then `parent` is the base, and `root` the version."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None


class TokensAnswer(TypedDict):
    """Answer of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TextAnswer(TypedDict):
    """Answer of POST /detokenize."""

    prompt: str


class TokenizerAnswer(TypedDict):
    """Answer of GET /tokenizer_info."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


# ---- adapters ----------------------------------------------------------------------------------


class AdapterAnswer(TypedDict):
    """An adapter; what it is made of, and where it is, are its active version's."""

    object: Literal["adapter"]
    id: str
    name: str
    version: str | None
    active: bool
    state: str | None
    kinds: list[str]
    targets: list[str]
    rank: int | None
    alpha: float | None
    parameters: int | None
    bytes: int | None
    base: str
    tenant: str
    shared: bool
    pinned: bool
    tier: str | None
    versions: int
    created_at: float
    updated_at: float


class VersionProblem(TypedDict):
    code: str
    message: str


class ParentAnswer(TypedDict):
    """A version that another one was made of, or goes on from."""

    name: str
    version: str


class MergedAnswer(ParentAnswer):
    weight: float


class VersionSource(TypedDict):
    """Source of a version's files: `upload`, `hub`, `folder`, `training`, `checkpoint` or `merge`."""

    kind: str
    repo: NotRequired[str]
    revision: NotRequired[str]
    commit: NotRequired[str]
    subfolder: NotRequired[str]
    job: NotRequired[str]
    step: NotRequired[int]
    parent: NotRequired[ParentAnswer]
    method: NotRequired[str]
    density: NotRequired[float]
    sign: NotRequired[str]
    seed: NotRequired[int]
    parents: NotRequired[list[MergedAnswer]]


class VersionFileAnswer(TypedDict):
    name: str
    bytes: int
    sha256: str


class FilesBase(TypedDict):
    """Repository from which the base can be had."""

    name: str
    repo: str | None
    revision: str | None


class VersionFilesAnswer(TypedDict):
    """A version's files."""

    object: Literal["list"]
    version: str
    base: FilesBase
    data: list[VersionFileAnswer]


class VersionProgress(TypedDict):
    stage: str
    fraction: float | None


Report = Annotated[Mapping[str, Any], _schema_of(VersionReport)]


class VersionAnswer(TypedDict):
    """One version. While it is pulled, `version` is the pull's id."""

    object: Literal["adapter.version"]
    id: str
    name: str
    version: str
    state: str
    active: bool
    error: VersionProblem | None
    base: str
    source: VersionSource
    created_at: float
    created_by: str
    tenant: str
    progress: VersionProgress | None
    report: Report | None


class HistoryAnswer(TypedDict):
    """A change of the active version: what became active or inactive, when and by whom."""

    action: str
    version: str | None
    previous: str | None
    actor: str
    at: float


# ---- training ----------------------------------------------------------------------------------


class FileAnswer(TypedDict):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None
    expires_at: None
    sha256: str


class BatchProblem(TypedDict):
    code: str
    line: int | None
    message: str
    param: str | None


class BatchProblems(TypedDict):
    object: Literal["list"]
    data: list[BatchProblem]


class BatchCounts(TypedDict):
    total: int
    completed: int
    failed: int


class BatchUsage(TypedDict):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class BatchAnswer(TypedDict):
    id: str
    object: Literal["batch"]
    endpoint: str
    model: None
    errors: BatchProblems | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    usage: BatchUsage
    metadata: dict[str, str] | None
    waiting: str | None
    """Reason why nothing of it is computed now."""


class JobProblem(TypedDict):
    code: str
    message: str
    param: str | None


class JobStopAnswer(TypedDict):
    """Early end of a job."""

    step: int | None
    """Step after which the job ended; null until it has."""
    steps: int
    """Number of steps that were planned."""
    by: str
    """The id of the API key that asked; empty where none is needed."""
    at: int


class JobAnswer(TypedDict):
    """A training job. `hyperparameters` and `method` say what it was made with."""

    id: str
    object: Literal["fine_tuning.job"]
    model: str
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    fine_tuned_model: str | None
    organization_id: str
    result_files: list[str]
    status: str
    training_file: str
    validation_file: str | None
    hyperparameters: Json
    method: Json
    trained_tokens: int | None
    seed: int
    integrations: list[Json]
    metadata: dict[str, str]
    error: JobProblem | None
    name: str
    parent: ParentAnswer | None
    activate: Activate
    activated: bool | None
    """Whether requests for `name` get its version now."""
    version: str | None
    replaced: str | None
    """The digest of the version that was active until this one was activated."""
    progress: Mapping[str, Any] | None
    estimate: Json | None
    report: Json | None
    resumable: bool
    hold: bool
    """Whether it waits for a resume once its files are checked; false from then on."""
    stopped: JobStopAnswer | None


class JobEventAnswer(TypedDict):
    object: Literal["fine_tuning.job.event"]
    id: str
    created_at: int
    level: str
    message: str
    type: str
    data: Mapping[str, Any] | None


class CheckpointAnswer(TypedDict):
    object: Literal["fine_tuning.job.checkpoint"]
    id: str
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, float]
    step_number: int


# ---- keys, usage and audit -----------------------------------------------------------------------


class KeyAnswer(TypedDict):
    object: Literal["api_key"]
    id: str
    tenant: str
    name: str
    scopes: Sequence[str]
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None
    quotas: dict[str, int]
    priority: int


class NewKeyAnswer(KeyAnswer):
    key: str
    """The key itself; it is in this answer alone."""


class CallerAnswer(TypedDict):
    object: Literal["caller"]
    key: str
    """The key's id; "" where no keys are needed."""
    tenant: str
    scopes: Sequence[str]


class TenantAnswer(TypedDict):
    object: Literal["tenant"]
    tenant: str
    quotas: dict[str, int]
    adapters: int
    bytes: int
    training_seconds: float


class UsageRowAnswer(TypedDict):
    """Usage of one group, with those of `day`, `tenant`, `base` and `adapter` that the rows are grouped
    by."""

    day: NotRequired[str]
    tenant: NotRequired[str]
    base: NotRequired[str]
    adapter: NotRequired[str]
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    training_seconds: float
    training_tokens: int


class UsageAnswer(TypedDict):
    object: Literal["list"]
    group_by: list[str]
    data: list[UsageRowAnswer]


class AuditAnswer(TypedDict):
    object: Literal["audit.entry"]
    id: str
    at: float
    tenant: str
    key: str
    actor: str
    action: str
    target: str
    version: str | None
    base: str | None
    server: str
    request: str
    details: Mapping[str, Any]


# ---- the server ----------------------------------------------------------------------------------


class HealthAnswer(TypedDict):
    status: str
    engine: str


class ServerVersionAnswer(TypedDict):
    name: Literal["onebase"]
    version: str
    python: str


class EngineStatus(TypedDict):
    state: str
    restarts: int


class VerifierStatus(TypedDict):
    pid: int | None


class RouteSecretAnswer(TypedDict):
    """Answer of GET /route_secret: another one after each start of the server."""

    secret: str


class StatusAnswer(TypedDict):
    """Answer of GET /status: bytes, tokens and counts."""

    base: str
    engine: EngineStatus
    info: Annotated[Json, _schema_of(BaseInfo)] | None
    stats: Annotated[Json, _schema_of(Stats)] | None
    requests: int
    adapters: int
    host_memory: MemoryUse
    verifier: VerifierStatus


class PauseAnswer(TypedDict):
    status: Literal["paused", "resumed"]


class PausedAnswer(TypedDict):
    is_paused: bool


class WorldSizeAnswer(TypedDict):
    world_size: int


class ServerInfoAnswer(TypedDict):
    """The part of vLLM's configuration that its clients read."""

    vllm_config: dict[str, Json]
