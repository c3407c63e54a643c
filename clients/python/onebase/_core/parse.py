"""The server's JSON as typed results.

Unknown fields are ignored, so that an old client works with a new server. A missing field raises.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from ..errors import ErrorDetail, InvalidResponseError
from ..types import (
    AdapterWeight,
    Choice,
    Generation,
    Health,
    Logprobs,
    Model,
    Piece,
    ServerVersion,
    Timing,
    ToolCall,
    ToolCallPart,
    Usage,
)

T = TypeVar("T")
Json: TypeAlias = Mapping[str, Any]


def parse(body: bytes, build: Callable[[Json], T]) -> T:
    """Return what `build` makes of a JSON object.

    Raises:
        InvalidResponseError: it is no JSON object, or lacks a field.
    """
    return _build(_object(body), build)


def _object(body: bytes | str) -> Json:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidResponseError(f"the server's answer is not JSON: {body[:80]!r}") from error
    if not isinstance(value, dict):
        raise InvalidResponseError(f"the server's answer is not a JSON object: {body[:80]!r}")
    return value


def _build(value: Json, build: Callable[[Json], T]) -> T:
    try:
        return build(value)
    except KeyError as error:
        raise InvalidResponseError(f"the server's answer has no field {error.args[0]!r}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidResponseError(f"the server's answer has a field of the wrong type: {error}") from error


def flat(kind: type[T], value: Json, *, optional: bool = False, **others: Any) -> T:
    """A dataclass from the fields of the same names. `others` are fields whose value is given here instead.

    Args:
        optional: Whether a field may be missing. It then has its default.

    Raises:
        KeyError: a field is missing.
    """
    names = [item.name for item in dataclasses.fields(kind)]  # type: ignore[arg-type]  # T is a dataclass
    if optional:
        names = [name for name in names if value.get(name) is not None or name in others]
    return kind(**{name: others[name] if name in others else value[name] for name in names})


def parent_of(value: Json) -> str | None:
    """`name@version` of what a job, or a version's source, says that training went on from."""
    parent = value.get("parent")
    return None if parent is None else f"{parent['name']}@{parent['version']}"


@dataclass(frozen=True)
class Page(Generic[T]):
    """One page of a list. `last` is the id after which the next page begins, None if there is none."""

    items: tuple[T, ...]
    last: str | None


def page_of(build: Callable[[Json], T]) -> Callable[[Json], Page[T]]:
    """A function that makes a page of its JSON, given one that makes an item."""

    def made(value: Json) -> Page[T]:
        data = value["data"]
        last = data[-1]["id"] if data and value.get("has_more") else None
        return Page(tuple(build(item) for item in data), last)

    return made


def generation(value: Json) -> Generation:
    choices = tuple(
        Choice(
            item["index"],
            item["text"],
            item["finish_reason"],
            _logprobs(item.get("logprobs")),
            tuple(_tool_call(call) for call in item.get("tool_calls") or ()),
        )
        for item in value["choices"]
    )
    if not choices:
        raise ValueError("choices is empty")
    return Generation(
        value["id"],
        choices,
        _adapter_used(value.get("adapter")),
        usage(value["usage"]),
        timing(value["timing"]),
    )


def _tool_call(value: Json) -> ToolCall:
    return ToolCall(value["id"], value["function"]["name"], value["function"]["arguments"])


def usage(value: Json) -> Usage:
    return Usage(value["prompt_tokens"], value["completion_tokens"], value.get("cached_tokens", 0))


def timing(value: Json) -> Timing:
    return Timing(float(value["queue_s"]), float(value["ttft_s"]), float(value["decode_s"]))


def _adapter_used(value: Any) -> str | tuple[AdapterWeight, ...] | None:
    if value is None or isinstance(value, str):
        return value
    return tuple(AdapterWeight(term["name"], term["weight"]) for term in value)


def _logprobs(value: Json | None) -> Logprobs | None:
    if value is None:
        return None
    return Logprobs(
        tuple(value["tokens"]),
        tuple(value["token_ids"]),
        tuple(value["token_logprobs"]),
        tuple(value["top_logprobs"]),
        tuple(value["text_offset"]),
    )


def models(value: Json) -> tuple[Model, ...]:
    return tuple(model(item) for item in value["data"])


def model(value: Json) -> Model:
    return Model(value["id"], value.get("owned_by"), value.get("created"))


def version(value: Json) -> ServerVersion:
    return ServerVersion(value["version"], dict(value))


def health(status: int, body: bytes) -> Health:
    """The answer of /health or /ready. Their status 503 is an answer too."""
    try:
        value = _object(body)
    except InvalidResponseError:
        value = {}
    ok = status == 200
    said = value.get("status") or ("ok" if ok else error_detail(status, body).message)
    return Health(ok, str(said), _optional_text(value.get("engine")))


def error_detail(status: int, body: bytes) -> ErrorDetail:
    """The error in a body, in OpenAI's shape. A body of another shape is quoted."""
    try:
        answer = _object(body)
        version = answer.get("version")
        digest = version.get("version") if isinstance(version, dict) else None
        return dataclasses.replace(stream_error(answer["error"]), version=_optional_text(digest))
    except (InvalidResponseError, KeyError):
        text = body.decode("utf-8", errors="replace").strip()[:200]
        return ErrorDetail(f"the server answered {status}" + (f": {text}" if text else " with no body"))


def stream_error(error: Any) -> ErrorDetail:
    """One `error` object."""
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return ErrorDetail(f"the server reports an error of unknown shape: {str(error)[:200]}")
    names = ("type", "param", "code", "current")
    return ErrorDetail(error["message"], *(_optional_text(error.get(name)) for name in names))


def _optional_text(value: object) -> str | None:
    return None if value is None else str(value)


class StreamEnd:
    """The last event of a stream that went well."""

    def __init__(self, value: Json) -> None:
        self.id: str = value["id"]
        self.adapter = _adapter_used(value.get("adapter"))
        self.usage = usage(value["usage"])
        self.timing = timing(value["timing"])


def stream_event(data: str) -> Piece | StreamEnd | ErrorDetail:
    """One event of a stream (any but `[DONE]`).

    Raises:
        InvalidResponseError: it is none of the events that a stream has.
    """
    value = _object(data)
    if "error" in value:
        return stream_error(value["error"])
    return _build(value, StreamEnd) if value.get("done") else _build(value, _piece)


def _piece(value: Json) -> Piece:
    calls = tuple(
        ToolCallPart(
            part["index"], part["function"]["arguments"], part.get("id"), part["function"].get("name")
        )
        for part in value.get("tool_calls") or ()
    )
    logprobs = _logprobs(value.get("logprobs"))
    return Piece(value["index"], value["text"], value.get("finish_reason"), logprobs, calls)
