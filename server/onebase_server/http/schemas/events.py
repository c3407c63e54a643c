"""Types of the events of streamed answers, for the reference: plain dicts on the wire, as in answers.py."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from onebase_server.http.schemas.answers import (
    AnthropicError,
    CallItemAnswer,
    ChatLogprobs,
    ChatTokenLogprob,
    Error,
    ErrorDetails,
    FlatLogprobs,
    GeneratedSummary,
    JobAnswer,
    JobEventAnswer,
    MessageAnswer,
    MessageItemAnswer,
    MessageUsage,
    OpenAIUsage,
    OutputText,
    ResponseHead,
    ResponseUsage,
    TextBlockAnswer,
    TgiToken,
    ToolUseAnswer,
)

# ---- calls of tools ------------------------------------------------------------------------------


class CallFunctionDelta(TypedDict):
    """Part of a called function. The first has its name; the arguments are parts of a text, which is JSON
    when whole."""

    name: NotRequired[str]
    arguments: str


class CallDelta(TypedDict):
    """Part of a call. The first has its id."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CallFunctionDelta


# ---- POST /generate ------------------------------------------------------------------------------


class TextEvent(TypedDict):
    """New text of a choice, with its tokens where they are asked for."""

    id: str
    index: int
    text: str
    tool_calls: NotRequired[list[CallDelta]]
    logprobs: NotRequired[FlatLogprobs]


class ChoiceEnd(TypedDict):
    """End of a choice, with the reason."""

    id: str
    index: int
    text: Literal[""]
    finish_reason: str


class GenerationEnd(GeneratedSummary):
    """The last event but one; then comes `[DONE]`."""

    id: str
    done: Literal[True]


GenerateEvent = TextEvent | ChoiceEnd | GenerationEnd | Error

# ---- POST /generate/many -------------------------------------------------------------------------


class _OfRequest(TypedDict):
    request: Annotated[int, Field(description="which of the requests it is about, from 0")]


class ManyTextEvent(TextEvent, _OfRequest):
    """New text of a choice of one request."""


class ManyChoiceEnd(ChoiceEnd, _OfRequest):
    """End of a choice of one request, with the reason."""


class ManyGenerationEnd(GenerationEnd, _OfRequest):
    """The last event of one request. `[DONE]` comes after the last of all."""


class ManyError(Error, _OfRequest):
    """The last event of a request that was refused or failed. The others continue."""

    status: Annotated[int, Field(description="that the error has at POST /generate")]


GenerateManyEvent = ManyTextEvent | ManyChoiceEnd | ManyGenerationEnd | ManyError

# ---- POST / --------------------------------------------------------------------------------------


class TgiEnd(TypedDict):
    finish_reason: str
    generated_tokens: int
    input_length: int
    seed: int | None


class TgiTokenEvent(TypedDict):
    """A token; the last one has the whole text."""

    index: int
    token: TgiToken
    top_tokens: NotRequired[list[TgiToken]]
    generated_text: str | None
    details: TgiEnd | None


TgiEvent = TgiTokenEvent | Error

# ---- OpenAI --------------------------------------------------------------------------------------


class CompletionChunkChoice(TypedDict):
    index: int
    text: str
    logprobs: FlatLogprobs | None
    finish_reason: str | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


class CompletionChunk(TypedDict):
    """A chunk of a completion. `usage`: with `stream_options`. After the last one comes `[DONE]`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: NotRequired[OpenAIUsage | None]


class ChatDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    tool_calls: NotRequired[list[CallDelta]]


class ChatChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: NotRequired[list[int]]


class ChatChunk(TypedDict):
    """A chunk of a chat answer. `usage`: with `stream_options`. After the last one comes `[DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[OpenAIUsage | None]
    prompt_token_ids: NotRequired[list[int]]


CompletionEvent = CompletionChunk | Error
ChatEvent = ChatChunk | Error

# ---- responses -----------------------------------------------------------------------------------


class ResponseState(ResponseHead):
    """A response while it is generated."""

    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ErrorDetails | None
    usage: ResponseUsage | None


class ResponseEvent(TypedDict):
    """Any event of a response; `type` says which, and with it what else it has, as in OpenAI's reference."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
        "response.output_item.added",
        "response.output_item.done",
        "response.content_part.added",
        "response.content_part.done",
        "response.output_text.delta",
        "response.output_text.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
    ]
    sequence_number: int
    response: NotRequired[ResponseState]
    output_index: NotRequired[int]
    content_index: NotRequired[int]
    item_id: NotRequired[str]
    item: NotRequired[MessageItemAnswer | CallItemAnswer]
    part: NotRequired[OutputText]
    delta: NotRequired[str]
    text: NotRequired[str]
    logprobs: NotRequired[list[ChatTokenLogprob]]
    arguments: NotRequired[str]
    name: NotRequired[str]


# ---- Anthropic -----------------------------------------------------------------------------------


class MessageStart(TypedDict):
    type: Literal["message_start"]
    message: MessageAnswer


class BlockStart(TypedDict):
    type: Literal["content_block_start"]
    index: int
    content_block: TextBlockAnswer | ToolUseAnswer


class TextDelta(TypedDict):
    type: Literal["text_delta"]
    text: str


class InputDelta(TypedDict):
    type: Literal["input_json_delta"]
    partial_json: str


class BlockDelta(TypedDict):
    type: Literal["content_block_delta"]
    index: int
    delta: TextDelta | InputDelta


class BlockStop(TypedDict):
    type: Literal["content_block_stop"]
    index: int


class MessageStopReason(TypedDict):
    stop_reason: str
    stop_sequence: str | None


class MessageDelta(TypedDict):
    type: Literal["message_delta"]
    delta: MessageStopReason
    usage: MessageUsage


class MessageStop(TypedDict):
    type: Literal["message_stop"]


MessageEvent = (
    MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | AnthropicError
)

# ---- training jobs -------------------------------------------------------------------------------

JobEvent = JobEventAnswer | JobAnswer
"""Events of a job's stream; the last one, `event: done`, is the job."""
