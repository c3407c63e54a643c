"""Anthropic's messages, whole and as events."""

from __future__ import annotations

from typing import Literal

import msgspec

from onebase_protocol.common import Json
from onebase_protocol.errors import AnthropicError


class TextBlockAnswer(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class ToolUseAnswer(msgspec.Struct, tag_field="type", tag="tool_use"):
    id: str
    name: str | None
    input: Json


class ThinkingBlockAnswer(msgspec.Struct, tag_field="type", tag="thinking"):
    """A thought. signature: of its text."""

    thinking: str
    signature: str


BlockAnswer = ThinkingBlockAnswer | TextBlockAnswer | ToolUseAnswer


class ThinkingTokens(msgspec.Struct, frozen=True):
    thinking_tokens: int


class MessageUsage(msgspec.Struct):
    """The prompt is the sum of three: what is new, what was put into the cache, what came from it."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens


class MessageAnswerUsage(MessageUsage):
    service_tier: Literal["standard"] = "standard"


class MessageStopReason(msgspec.Struct):
    stop_reason: str
    stop_sequence: str | None


class MessageAnswer(msgspec.Struct, kw_only=True):
    """Answer of POST /v1/messages."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[BlockAnswer]
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: MessageAnswerUsage


class TokenCountAnswer(msgspec.Struct):
    """Answer of POST /v1/messages/count_tokens."""

    input_tokens: int


# ---- events --------------------------------------------------------------------------------------


class MessageStart(msgspec.Struct, tag_field="type", tag="message_start"):
    message: MessageAnswer


class BlockStart(msgspec.Struct, tag_field="type", tag="content_block_start"):
    index: int
    content_block: BlockAnswer


class TextDelta(msgspec.Struct, tag_field="type", tag="text_delta"):
    text: str


class ThinkingDelta(msgspec.Struct, tag_field="type", tag="thinking_delta"):
    thinking: str


class SignatureDelta(msgspec.Struct, tag_field="type", tag="signature_delta"):
    signature: str


class InputDelta(msgspec.Struct, tag_field="type", tag="input_json_delta"):
    partial_json: str


class BlockDelta(msgspec.Struct, tag_field="type", tag="content_block_delta"):
    index: int
    delta: TextDelta | InputDelta | ThinkingDelta | SignatureDelta


class BlockStop(msgspec.Struct, tag_field="type", tag="content_block_stop"):
    index: int


class MessageDelta(msgspec.Struct, tag_field="type", tag="message_delta"):
    delta: MessageStopReason
    usage: MessageUsage


class MessageStop(msgspec.Struct, tag_field="type", tag="message_stop"):
    pass


Event = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop
MessageEvent = Event | AnthropicError
