"""The server's JSON as typed results: the structs of `onebase_protocol`, or what the SDK makes of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Final, TypeAlias, TypeVar

import msgspec
from msgspec import convert

from onebase_protocol.text import GeneratedAnswer, GenerationEnd, TextEvent

from ..errors import ErrorDetail, InvalidResponseError
from ..types import AdapterWeight, Choice, Generation, Health, Piece, ServerVersion, ToolCall, ToolCallPart

T = TypeVar("T")
Json: TypeAlias = Mapping[str, Any]


_MISSING: Final = re.compile(r"Object missing required field `(\w+)`")


def decode(body: bytes | str, kind: type[T]) -> T:
    """Return an answer of this type. Unknown fields are ignored, so that an old client works with a new
    server.

    Raises:
        InvalidResponseError: it is another JSON, or none.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise unexpected(error) from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidResponseError(f"the server's answer is not JSON: {body[:80]!r}") from error


def unexpected(error: msgspec.ValidationError) -> InvalidResponseError:
    """Return the error for JSON that is not of the type that was asked for."""
    said = str(error)
    if said.startswith("Expected `object`") and "$" not in said:
        return InvalidResponseError("the server's answer is not a JSON object")
    missing = _MISSING.match(said)
    if missing:
        return InvalidResponseError(f"the server's answer has no field {missing[1]!r}{said[missing.end() :]}")
    return InvalidResponseError(f"the server's answer has a field of the wrong type: {said}")


def generation(answer: GeneratedAnswer, schema: object) -> Generation:
    """Return an answer with the schema that the request gave. Raises InvalidResponseError."""
    if not answer.choices:
        raise InvalidResponseError("the server's answer has a field of the wrong type: choices is empty")
    choices = tuple(
        Choice(
            choice.index,
            choice.text,
            choice.finish_reason or "",
            choice.logprobs,
            tuple(
                ToolCall(call.id, call.function.name, call.function.arguments)
                for call in choice.tool_calls or ()
            ),
            choice.reasoning or "",
        )
        for choice in answer.choices
    )
    return Generation(answer.id, choices, adapter_used(answer), answer.usage, answer.timing, schema)


def adapter_used(answer: GeneratedAnswer | GenerationEnd) -> str | tuple[AdapterWeight, ...] | None:
    used = answer.adapter
    return used if used is None or isinstance(used, str) else tuple(used)


def version(value: dict[str, Any]) -> ServerVersion:
    """Return the version that a server says. Raises InvalidResponseError."""
    if not isinstance(value.get("version"), str):
        raise InvalidResponseError("the server's answer has no field 'version'")
    return ServerVersion(value["version"], value)


def health(status: int, body: bytes) -> Health:
    """Return the answer of /health or /ready. Their status 503 is an answer too."""
    try:
        value = decode(body, dict[str, Any])
    except InvalidResponseError:
        value = {}
    ok = status == 200
    said = value.get("status") or ("ok" if ok else error_detail(status, body).message)
    return Health(ok, str(said), _optional_text(value.get("engine")))


def error_detail(status: int, body: bytes) -> ErrorDetail:
    """Return the error in a body, in OpenAI's shape. A body of another shape is quoted."""
    try:
        answer = decode(body, dict[str, Any])
        version = answer.get("version")
        digest = version.get("version") if isinstance(version, dict) else None
        return dataclasses.replace(stream_error(answer["error"]), version=_optional_text(digest))
    except (InvalidResponseError, KeyError):
        text = body.decode("utf-8", errors="replace").strip()[:200]
        return ErrorDetail(f"the server answered {status}" + (f": {text}" if text else " with no body"))


def stream_error(error: Any) -> ErrorDetail:
    """Parse one `error` object."""
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return ErrorDetail(f"the server reports an error of unknown shape: {str(error)[:200]}")
    names = ("type", "param", "code", "current")
    return ErrorDetail(error["message"], *(_optional_text(error.get(name)) for name in names))


def _optional_text(value: object) -> str | None:
    return None if value is None else str(value)


def stream_event(data: str) -> Piece | GenerationEnd | ErrorDetail:
    """Return one event of a stream (any but `[DONE]`).

    Raises:
        InvalidResponseError: it is none of the events that a stream has.
    """
    value = decode(data, dict[str, Any])
    if "error" in value:
        return stream_error(value["error"])
    try:
        if value.get("done"):
            return convert(value, GenerationEnd)
        said = convert(value, TextEvent)
    except msgspec.ValidationError as error:
        raise unexpected(error) from error
    calls = tuple(
        ToolCallPart(part.index, part.function.arguments, part.id, part.function.name)
        for part in said.tool_calls or ()
    )
    return Piece(
        said.index,
        said.text,
        value.get("finish_reason"),
        said.logprobs or None,
        calls,
        said.reasoning or "",
    )
