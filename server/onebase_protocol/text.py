"""Generated text: OneBase's own answers and events, TGI's, and OpenAI's completions and chat.

What is made for each token is not frozen: it is filled in as the token is read.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from onebase_protocol.common import CachedTokens, OutputTokensDetails, Sparse, TrueOnly, shown_as
from onebase_protocol.errors import Error, ErrorDetails


class CancelledAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Confirmation that a text will not be generated to its end."""

    id: str
    object: Literal["generation"] = "generation"
    cancelled: TrueOnly = True


# ---- calls of tools ------------------------------------------------------------------------------


class CalledFunction(msgspec.Struct):
    name: str
    arguments: str
    """JSON, as text."""


class ToolCallAnswer(msgspec.Struct, kw_only=True):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class CallFunctionDelta(Sparse, frozen=True, kw_only=True):
    """Part of a called function. The first has its name; the arguments are parts of a text, which is JSON
    when whole."""

    name: str | None = None
    arguments: str


class CallDelta(Sparse, frozen=True, kw_only=True):
    """Part of a call. The first has its id."""

    index: int
    id: str | None = None
    type: Annotated[str | None, shown_as(type="string", const="function")] = None
    function: CallFunctionDelta


# ---- log-probabilities -----------------------------------------------------------------------------


class Logprobs(msgspec.Struct, frozen=True):
    """Natural-log probabilities, one entry per token in each sequence."""

    tokens: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    token_logprobs: tuple[float | None, ...] = ()
    """Log-probabilities of the tokens; None for the first token of an echoed prompt, which nothing
    precedes."""
    top_logprobs: tuple[dict[str, float] | None, ...] = ()
    text_offset: tuple[int, ...] = ()
    """Offset of each token in the text, in characters."""


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float | None
    bytes: list[int]


class ChatTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatTokenLogprob]
    refusal: None = None


class PromptTokenLogprob(msgspec.Struct):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptTokenLogprob] | None]
"""Log-probabilities of each prompt token, by token id."""

# ---- POST /generate ------------------------------------------------------------------------------


class GeneratedChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    finish_reason: str | None
    logprobs: Logprobs | None = None
    tool_calls: list[ToolCallAnswer] | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    """Thought before the text, of a base that thinks."""


class AdapterWeight(msgspec.Struct, frozen=True):
    """One term of a weighted sum of adapters."""

    name: str
    """An adapter's name, or `name@version`."""
    weight: float = 1.0


class Usage(msgspec.Struct, frozen=True):
    """The tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    """Over all choices."""
    cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""
    reasoning_tokens: int = 0
    """Completion tokens that are thoughts, with their marks."""


class Timing(msgspec.Struct, frozen=True):
    """Durations of a request's parts, in seconds, measured by the server."""

    queue_s: float
    """Waiting for a place in the batch."""
    ttft_s: float
    """Time from arrival to the first token."""
    decode_s: float
    """Time from the first token to the last."""


AdapterUsed = str | list[AdapterWeight] | None


class GeneratedAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of POST /generate."""

    id: str
    object: Literal["generation"] = "generation"
    choices: list[GeneratedChoice]
    adapter: AdapterUsed = None
    usage: Usage
    timing: Timing


class TextEvent(msgspec.Struct, frozen=True, kw_only=True):
    """New text of a choice, with its tokens where they are asked for."""

    id: str = ""
    index: int
    text: str
    reasoning: str | UnsetType = UNSET
    """New text of the thought before the choice's text."""
    tool_calls: list[CallDelta] | UnsetType = UNSET
    logprobs: Logprobs | UnsetType = UNSET


class ChoiceEnd(msgspec.Struct, frozen=True, kw_only=True):
    """End of a choice, with the reason."""

    id: str
    index: int
    text: Literal[""] = ""
    finish_reason: str


class GenerationEnd(msgspec.Struct, frozen=True, kw_only=True):
    """The last event but one; then comes `[DONE]`."""

    id: str
    done: TrueOnly = True
    adapter: AdapterUsed = None
    usage: Usage
    timing: Timing


GenerateEvent = TextEvent | ChoiceEnd | GenerationEnd | Error

# ---- POST /generate/many -------------------------------------------------------------------------

OfRequest = Annotated[int, Meta(description="which of the requests it is about, from 0")]


class ManyTextEvent(TextEvent, frozen=True, kw_only=True):
    """New text of a choice of one request."""

    request: OfRequest


class ManyChoiceEnd(ChoiceEnd, frozen=True, kw_only=True):
    """End of a choice of one request, with the reason."""

    request: OfRequest


class ManyGenerationEnd(GenerationEnd, frozen=True, kw_only=True):
    """The last event of one request. `[DONE]` comes after the last of all."""

    request: OfRequest


class ManyError(Error, frozen=True, kw_only=True):
    """The last event of a request that was refused or failed. The others continue."""

    request: OfRequest
    status: Annotated[int, Meta(description="that the error has at POST /generate")]


class OneOfManyAnswer(Sparse, frozen=True, kw_only=True):
    """The answer of one request, or the error that it alone has."""

    request: OfRequest
    status: Annotated[int, Meta(description="that it has at POST /generate")]
    answer: GeneratedAnswer | None = None
    error: ErrorDetails | None = None


class GenerateManyAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of POST /generate/many with `stream: false`, in the order of the requests."""

    object: Literal["list"] = "list"
    data: list[OneOfManyAnswer]


GenerateManyEvent = ManyTextEvent | ManyChoiceEnd | ManyGenerationEnd | ManyError

# ---- POST / --------------------------------------------------------------------------------------


class TgiToken(msgspec.Struct):
    id: int
    text: str
    logprob: float | None
    special: bool = False


class TgiEnd(msgspec.Struct):
    finish_reason: str
    generated_tokens: int
    input_length: int
    prompt_tokens: int
    """The same as `input_length`, by LoRAX's name."""
    seed: int | None


class TgiDetails(TgiEnd):
    prefill: list[TgiToken]
    tokens: list[TgiToken]
    top_tokens: list[list[TgiToken]] | UnsetType = UNSET


class TgiAnswer(msgspec.Struct):
    """Answer of POST /, one in a list."""

    generated_text: str
    details: TgiDetails | UnsetType = UNSET


class TgiTokenEvent(msgspec.Struct, kw_only=True):
    """A token; the last one has the whole text."""

    index: int
    token: TgiToken
    top_tokens: list[TgiToken] | UnsetType = UNSET
    generated_text: str | None
    details: TgiEnd | None


TgiEvent = TgiTokenEvent | Error

# ---- OpenAI --------------------------------------------------------------------------------------

Fingerprint = Annotated[
    str,
    Meta(description="what answered: `name@digest`, or such terms of a sum; of the base alone the `model`"),
]


class OpenAIUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: OutputTokensDetails


class CompletionChunkChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionChoice(CompletionChunkChoice):
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CompletionAnswer(msgspec.Struct, kw_only=True):
    """Answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: Fingerprint
    choices: list[CompletionChoice]
    usage: OpenAIUsage


class CompletionChunk(msgspec.Struct, kw_only=True):
    """A chunk of a completion. `usage`: with `stream_options`. After the last one comes `[DONE]`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: Fingerprint
    usage: OpenAIUsage | UnsetType | None = UNSET
    choices: list[CompletionChunkChoice]


class ChatAnswerMessage(msgspec.Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    """Thought before the content, of a base that thinks."""
    reasoning: str | UnsetType = UNSET
    """The same, by vLLM's name."""
    tool_calls: list[ToolCallAnswer] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | UnsetType = UNSET


class ChatAnswer(msgspec.Struct, kw_only=True):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: Fingerprint
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    choices: list[ChatChoice]
    usage: OpenAIUsage


class ChatDelta(Sparse, frozen=True):
    role: Annotated[str | None, shown_as(type="string", const="assistant")] = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    """A chunk of a chat answer. `usage`: with `stream_options`. After the last one comes `[DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: Fingerprint
    usage: OpenAIUsage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    choices: list[ChatChunkChoice]


CompletionEvent = CompletionChunk | Error
ChatEvent = ChatChunk | Error
