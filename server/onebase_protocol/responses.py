"""OpenAI's responses, whole and as events.

The server builds them up as dicts, item by item, since an item's fields come in another order while it is
generated than in a stored response; these structs describe both.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from onebase_protocol.common import CachedTokens, FalseOnly, Json, OutputTokensDetails, PageAnswer
from onebase_protocol.errors import ErrorDetails
from onebase_protocol.text import ChatTokenLogprob


class OutputText(msgspec.Struct, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Json]
    logprobs: list[ChatTokenLogprob] | UnsetType = UNSET


class InputText(msgspec.Struct, tag_field="type", tag="input_text"):
    text: str


class MessageItemAnswer(msgspec.Struct, tag_field="type", tag="message"):
    id: str
    status: str
    role: str
    content: list[OutputText | InputText]


class CallItemAnswer(msgspec.Struct, tag_field="type", tag="function_call"):
    id: str
    status: str
    arguments: str
    call_id: str
    name: str


class CustomCallItemAnswer(msgspec.Struct, tag_field="type", tag="custom_tool_call"):
    id: str
    status: str
    input: str
    call_id: str
    name: str


class CustomCallOutputItemAnswer(msgspec.Struct, tag_field="type", tag="custom_tool_call_output"):
    id: str
    status: str
    call_id: str
    output: str


class CallOutputItemAnswer(msgspec.Struct, tag_field="type", tag="function_call_output"):
    id: str
    status: str
    call_id: str
    output: str


class ReasoningText(msgspec.Struct, tag_field="type", tag="reasoning_text"):
    text: str


class ReasoningItemAnswer(msgspec.Struct, tag_field="type", tag="reasoning"):
    """A thought. It is whole, and has no summary."""

    id: str
    status: str
    summary: list[Json]
    content: list[ReasoningText] | UnsetType = UNSET


OutputItemAnswer = MessageItemAnswer | CallItemAnswer | CustomCallItemAnswer | ReasoningItemAnswer


class InputTokensDetails(CachedTokens, frozen=True, kw_only=True):
    cache_write_tokens: int


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct):
    reason: str


class ResponseText(msgspec.Struct):
    format: Json
    verbosity: str


class ResponseReasoning(msgspec.Struct):
    effort: str | None
    summary: None


class ResponseConversation(msgspec.Struct, frozen=True):
    id: str


class ConversationAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of /v1/conversations: a conversation without its items."""

    id: str
    object: Literal["conversation"] = "conversation"
    created_at: int
    metadata: dict[str, str]


class ResponseHead(msgspec.Struct, kw_only=True):
    """A response without its state: the fields of the request as they were read, and the output."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | UnsetType = UNSET
    output: list[OutputItemAnswer]
    incomplete_details: IncompleteDetails | None
    model: str
    instructions: str | None
    previous_response_id: str | None
    conversation: ResponseConversation | UnsetType = UNSET
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
    background: FalseOnly


class ResponseAnswer(ResponseHead, kw_only=True):
    """Answer of POST /v1/responses."""

    status: Literal["completed", "incomplete"]
    error: None
    usage: ResponseUsage


class InputTokensAnswer(msgspec.Struct, frozen=True):
    """Answer of POST /v1/responses/input_tokens."""

    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"


AnyItemAnswer = OutputItemAnswer | CallOutputItemAnswer | CustomCallOutputItemAnswer


class InputItemsAnswer(PageAnswer[AnyItemAnswer], frozen=True, kw_only=True):
    """Items that a response answers."""


class ConversationItemsAnswer(PageAnswer[AnyItemAnswer], frozen=True, kw_only=True):
    """Items of a conversation."""


class ResponseState(ResponseHead, kw_only=True):
    """A response while it is generated."""

    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ErrorDetails | None
    usage: ResponseUsage | None


class ResponseEvent(msgspec.Struct, kw_only=True):
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
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
    ]
    sequence_number: int
    response: ResponseState | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    item: OutputItemAnswer | UnsetType = UNSET
    part: OutputText | ReasoningText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: list[ChatTokenLogprob] | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
