"""What a row means, whatever its shape: a chat, a text, or a choice between two of them.

Messages and tools are as chat templates take them, checked one by one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onebase_adapters.training.data.records import RowError, parse_strict

Message = dict[str, Any]
"""role, content, and what the template may read: name, tool_calls, tool_call_id, reasoning_content."""

ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_MESSAGES = 4096

_KEYS = (
    "role",
    "content",
    "weight",
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "thinking",
)


def check_messages(value: Any, field: str) -> list[Message]:
    """Messages with texts as content. Unknown keys are left out, misspelled ones refused. Raises RowError."""
    if not isinstance(value, list):
        raise RowError(field, "must be a list of messages, each with role and content")
    if not value:
        raise RowError(field, "the list of messages is empty")
    if len(value) > MOST_MESSAGES:
        raise RowError(field, f"{len(value)} messages are too many: at most {MOST_MESSAGES}")
    return [_message(message, f"{field}[{index}]") for index, message in enumerate(value)]


def check_tools(value: Any, field: str) -> list[dict[str, Any]] | None:
    """Tools as OpenAI writes them: each {"type": "function", "function": {"name": ...}}; None for none.

    Raises RowError.
    """
    if not isinstance(value, list):
        raise RowError(field, "must be a list of tools")
    for index, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            wanted = '{"type": "function", "function": {"name": ...}}'
            raise RowError(f"{field}[{index}]", f"a tool is written {wanted}")
    return [_without_nulls(tool) for tool in value] or None


def _message(message: Any, field: str) -> Message:
    if not isinstance(message, dict):
        raise RowError(field, "a message is an object with role and content")
    given = {key: value for key, value in message.items() if value is not None}
    if given.get("tool_calls") == []:
        # Tables write this, and clients that fill in what a message lacks.
        del given["tool_calls"]
    _check_keys(given, field)
    role = given.get("role")
    if role is None:
        raise RowError(f"{field}.role", "missing")
    if role not in ROLES:
        raise RowError(f"{field}.role", f"{str(role)[:40]!r} is not a role: use {', '.join(ROLES)}")
    made: Message = {"role": role, "content": _content(given, field)}
    _take_weight(given, made, field)
    for key in ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking"):
        if key in given:
            if not isinstance(given[key], str):
                raise RowError(f"{field}.{key}", "must be a text")
            made[key] = given[key]
    if "tool_calls" in given:
        made["tool_calls"] = _tool_calls(given["tool_calls"], f"{field}.tool_calls", role)
    if role == "assistant" and not made["content"].strip() and not made.get("tool_calls"):
        raise RowError(f"{field}.content", "the reply is empty")
    return made


def _check_keys(given: Message, field: str) -> None:
    for key in given:
        near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.75) if key not in _KEYS else []
        if near and near[0] not in given:
            raise RowError(f"{field}.{key[:60]}", f"an unknown field: did you mean {near[0]}?")


def _content(given: Message, field: str) -> str:
    content = given.get("content")
    if content is None:
        if given.get("tool_calls"):
            return ""
        raise RowError(f"{field}.content", "missing")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"{field}.content", f"must be a text, not {type(content).__name__}")
    texts = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise RowError(
                f"{field}.content[{index}]", "only parts of type text, each with a text, can be learned"
            )
        texts.append(text)
    return "".join(texts)


def _take_weight(given: Message, made: Message, field: str) -> None:
    if "weight" not in given:
        return
    weight = given["weight"]
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"{field}.weight", "the weight is 0 (not learned) or 1")
    if weight and given["role"] != "assistant":
        raise RowError(f"{field}.weight", "only the assistant's messages can have weight 1")
    made["weight"] = int(weight)


def _tool_calls(value: Any, field: str, role: str) -> list[dict[str, Any]]:
    if role != "assistant":
        raise RowError(field, "only the assistant's messages have tool_calls")
    if not isinstance(value, list):
        raise RowError(field, "must be a list of calls")
    return [_tool_call(call, f"{field}[{index}]") for index, call in enumerate(value)]


def _tool_call(call: Any, field: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(field, 'a call is written {"function": {"name": ..., "arguments": ...}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        # OpenAI writes the arguments as JSON text; templates write them as JSON themselves.
        try:
            arguments = parse_strict(arguments)
        except RowError as error:
            raise RowError(f"{field}.function.arguments", error.reason) from None
    if not isinstance(arguments, dict):
        raise RowError(f"{field}.function.arguments", "must be an object")
    return {**_without_nulls(call), "function": {**_without_nulls(function), "arguments": arguments}}


def _without_nulls(value: Any) -> Any:
    """Tables fill in null for what a row lacks, which templates would write out."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value


@dataclass(frozen=True)
class Chat:
    """A conversation for the base's chat template. supervised: indices of the replies to learn, ascending."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None
    supervised: Sequence[int]


@dataclass(frozen=True)
class Text:
    """Plain text without a template. prompt None: everything is to be learned."""

    prompt: str | None
    reply: str


@dataclass(frozen=True)
class Choice:
    """Two replies to the same prompt."""

    chosen: Chat | Text
    rejected: Chat | Text


Parsed = Chat | Text | Choice


def make_chat(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, field: str, *, first: int = 0
) -> Chat:
    """A chat of which the replies from message `first` on are learned, except those of weight 0.

    Raises RowError for `field` if that leaves nothing.
    """
    plain, supervised = [], []
    for index, message in enumerate(messages):
        weight = message.get("weight", 1)
        plain.append({key: value for key, value in message.items() if key != "weight"})
        if message["role"] == "assistant" and index >= first and weight:
            supervised.append(index)
    if not supervised:
        replies = any(message["role"] == "assistant" for message in messages)
        why = "every reply has weight 0" if replies else "there is no message of the assistant"
        raise RowError(field, f"nothing to learn: {why}")
    return Chat(plain, tools, supervised)
