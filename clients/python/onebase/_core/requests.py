"""The requests: what a caller asks becomes a Call, not yet sent."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias
from urllib.parse import quote

from ..types import AdapterSpec, AdapterWeight, Message, Messages, SamplingFields

Body: TypeAlias = dict[str, object]
Sent: TypeAlias = Callable[[int, int], object]
"""Called with the bytes that were sent so far, and the bytes of the whole form."""

_ALWAYS: Final = frozenset({429, 503})
_FROM_A_PROXY: Final = frozenset({502, 504})
_PAGE: Final = 100
_ON_THE_WIRE: Final = {
    "schema": "guided_json",
    "regex": "guided_regex",
    "choices": "guided_choice",
    "grammar": "guided_grammar",
}


@dataclass(frozen=True)
class UploadForm:
    """A form with files. They are read from disk while it is sent, and opened again for each attempt."""

    fields: Mapping[str, str]
    files_field: str
    """The name of the field under which every file is sent."""
    files: Sequence[Path]
    on_sent: Sent | None = None


@dataclass(frozen=True)
class Call:
    """One HTTP request, not yet sent."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    body: bytes | UploadForm | None = None
    """JSON, or a form with files."""
    idempotent: bool = False
    """Whether doing it twice has the effect of doing it once. Every GET is so without this flag."""
    answer_statuses: frozenset[int] = frozenset()
    """Error statuses that are an answer, not a failure."""
    headers: tuple[tuple[str, str], ...] = ()
    """Headers in addition to those of every request."""

    @property
    def repeatable(self) -> bool:
        """Return True if it may be sent again even if the first one may have been acted on."""
        return self.method == "GET" or self.idempotent

    @property
    def retry_statuses(self) -> frozenset[int]:
        """Error statuses after which it may be sent again.

        The server answers 429 and 503 before any work: its queue is full or a quota used up, or its engine
        starts, drains or restarts. 502 and 504 come from a proxy, which cannot know whether the server began.
        """
        return _ALWAYS | _FROM_A_PROXY if self.repeatable else _ALWAYS


HEALTH: Final = Call("GET", "/health", answer_statuses=frozenset({503}))
READY: Final = Call("GET", "/ready", answer_statuses=frozenset({503}))
VERSION: Final = Call("GET", "/version")
MODELS: Final = Call("GET", "/v1/models")


def model(model_id: str) -> Call:
    """Return the call for one model."""
    return Call("GET", f"/v1/models/{quote(model_id, safe='@')}")


def generate(
    prompt: str | None,
    messages: Messages | None,
    adapter: AdapterSpec,
    sampling: SamplingFields,
    *,
    stream: bool,
) -> Call:
    """Return the call for one generation.

    Raises:
        TypeError: an unknown sampling field, or a value that JSON cannot carry.
        ValueError: neither or both of `prompt` and `messages`; a number that is not finite.
    """
    if (prompt is None) == (messages is None):
        raise ValueError("give either prompt (text to continue) or messages (a conversation to answer)")
    body: Body = {"prompt": prompt} if messages is None else {"messages": messages_body(messages)}
    body["adapter"] = adapter_body(adapter)
    body |= sampling_body(sampling)
    body["stream"] = stream
    return Call("POST", "/generate", encode(body))


def messages_body(messages: Messages) -> list[Body]:
    """Return a conversation as JSON; a plain string is one message from the user."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not messages:
        raise ValueError("messages is empty: give at least one, such as Message('user', 'Hello')")
    return [_message(item) if isinstance(item, Message) else dict(item) for item in messages]


def _message(message: Message) -> Body:
    body: Body = {"role": message.role, "content": message.content}
    if message.tool_calls:
        body["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.reasoning:
        body["reasoning_content"] = message.reasoning
    if message.tool_call_id is not None:
        body["tool_call_id"] = message.tool_call_id
    return body


def adapter_body(adapter: AdapterSpec) -> object:
    """Return `adapter` as the server reads it: null, a name, or a weighted list."""
    if adapter is None or isinstance(adapter, str):
        return adapter
    terms = _terms(adapter)
    if not terms:
        raise ValueError("adapter is an empty sum: give None for the base")
    return terms


def _terms(adapter: Mapping[str, float] | Sequence[AdapterWeight | Mapping[str, object]]) -> list[Body]:
    if isinstance(adapter, Mapping):
        return [{"name": name, "weight": weight} for name, weight in adapter.items()]
    return [
        {"name": term.name, "weight": term.weight} if isinstance(term, AdapterWeight) else dict(term)
        for term in adapter
    ]


def sampling_body(sampling: SamplingFields) -> Body:
    """Return the sampling fields as JSON; what was left out stays out."""
    unknown = sampling.keys() - SamplingFields.__annotations__.keys()
    if unknown:
        known = ", ".join(SamplingFields.__annotations__)
        raise TypeError(f"unknown field {sorted(unknown)[0]!r}; there are: {known}")
    body: Body = dict(sampling)
    if "logit_bias" in sampling:
        body["logit_bias"] = {str(token): bias for token, bias in sampling["logit_bias"].items()}
    for name in ("stop", "stop_token_ids", "choices", "tools"):
        value = body.get(name)
        if isinstance(value, Sequence) and not isinstance(value, str):
            body[name] = list(value)
    if body.get("schema") is not None:
        body["schema"] = schema_body(body["schema"])
    return {_ON_THE_WIRE.get(name, name): value for name, value in body.items()}


def schema_body(schema: object) -> object:
    """Return a JSON schema as JSON: as it was given, or that of a pydantic model or TypeAdapter.

    Raises:
        TypeError: it is none of these.
    """
    for method in ("model_json_schema", "json_schema"):
        describe = getattr(schema, method, None)
        if callable(describe):
            return describe()
    if not isinstance(schema, Mapping):
        given = type(schema).__name__
        raise TypeError(f"schema is a {given}: give a dict, a pydantic model or a pydantic TypeAdapter")
    return dict(schema)


def encode(body: Body) -> bytes:
    """Return a body as JSON.

    Raises:
        TypeError, ValueError: a value cannot be sent; the message names its field.
    """
    try:
        return _json(body)
    except (TypeError, ValueError):
        for name, value in body.items():
            _check(name, value)
        raise


def _check(name: str, value: object) -> None:
    try:
        _json(value)
    except ValueError as error:
        raise ValueError(f"{name} cannot be sent: {error}") from error
    except TypeError as error:
        raise TypeError(f"{name} cannot be sent: {error}") from error


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def page_size(limit: int | None, had: int) -> int:
    """Return how many items to ask for next after `had` items; 0 when there are enough.

    Raises:
        ValueError: the limit is below 1.
    """
    if limit is None:
        return _PAGE
    if limit < 1:
        raise ValueError(f"limit is {limit}: it must be 1 or more; None gives all")
    return min(_PAGE, limit - had)
