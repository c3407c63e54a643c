"""Errors in answers: in OpenAI's format, and in Anthropic's on its routes."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from onebase_protocol.common import Sparse

Message = Annotated[str, Meta(description="what is wrong, and the way out")]
ErrorCode = Annotated[str | None, Meta(description="stable, for programs")]
ErrorParam = Annotated[str | None, Meta(description="the field of the request")]


class ErrorDetails(msgspec.Struct, frozen=True):
    """Some errors have more fields, as their quota or the version that is active."""

    message: Message
    type: str
    param: ErrorParam
    code: ErrorCode


class Error(msgspec.Struct, frozen=True):
    """Error of every route but Anthropic's."""

    error: ErrorDetails


class AnthropicErrorDetails(Sparse, frozen=True):
    """Fields of an error that Anthropic's format has no place for."""

    error_code: ErrorCode
    param: ErrorParam | msgspec.UnsetType = msgspec.UNSET


class AnthropicErrorBody(msgspec.Struct, frozen=True):
    type: str
    message: Message
    details: AnthropicErrorDetails


class AnthropicError(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["error"] = "error"
    error: AnthropicErrorBody
    request_id: str
