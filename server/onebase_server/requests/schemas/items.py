"""The wire models of what a response continues from: messages, calls of functions, and their results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator

from onebase_edge.errors import InvalidRequestError
from onebase_server.inference.generation import new_id
from onebase_server.requests.schemas.messages import (
    MAX_MESSAGES,
    MAX_TOOLS,
    ChatMessage,
    FunctionCall,
    FunctionName,
)
from onebase_server.requests.schemas.wire import (
    BY_KIND,
    LIST,
    MAX_NAME,
    ONE,
    Wire,
    check_type,
    of_type,
    validation_error,
)

Json = dict[str, Any]
ItemId = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
Status = Literal["in_progress", "completed", "incomplete"]
_HINTS = frozenset({"annotations", "logprobs", "prompt_cache_breakpoint", "phase", "created_by"})
"""Fields of answers that clients send back, and that change no text."""


def _without_hints(value: Any) -> Any:
    """Return the object without hints and without nulls, which mean that a field is not given."""
    if not isinstance(value, dict):
        return value
    return {key: item for key, item in value.items() if key not in _HINTS and item is not None}


class Part(Wire):
    """A piece of a message's content. Only text can be served."""

    type: Literal["input_text", "output_text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _check_kind(cls, value: Any) -> Any:
        check_type(value, "input_text", "output_text", otherwise="only text is (input_text, output_text)")
        return _without_hints(value)


Content = Annotated[
    Annotated[str, ONE] | Annotated[list[Part], Field(max_length=MAX_MESSAGES, fail_fast=True), LIST],
    BY_KIND,
]


def _text(content: str | list[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class _Item(Wire):
    id: ItemId | None = None
    status: Status | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_hints(cls, value: Any) -> Any:
        return _without_hints(value)


class MessageItem(_Item):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    def kept(self) -> Json:
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        made: list[Json] = [
            {"type": "output_text", "text": text, "annotations": []}
            if self.role == "assistant"
            else {"type": "input_text", "text": text}
            for text in parts
        ]
        return {
            "id": self.id or new_id("msg_"),
            "type": "message",
            "status": self.status or "completed",
            "role": self.role,
            "content": made,
        }


CUSTOM_INPUT = "input"
"""Argument of the function that a custom tool is for the model: its free text."""


def _full_name(name: str, namespace: str | None) -> str:
    """Return the name by which the chat template knows a function."""
    return name if namespace is None else f"{namespace}.{name}"


class CallItem(FunctionCall, _Item):
    """A function call of the model."""

    type: Literal["function_call"]
    call_id: ItemId
    arguments: str
    namespace: FunctionName | None = None

    @property
    def function(self) -> Json:
        return {"name": _full_name(self.name, self.namespace), "arguments": self.arguments}

    def kept(self) -> Json:
        kept = {
            "id": self.id or new_id("fc_"),
            "type": "function_call",
            "status": self.status or "completed",
            "arguments": self.arguments,
            "call_id": self.call_id,
            "name": self.name,
        }
        return kept if self.namespace is None else kept | {"namespace": self.namespace}


class CustomCallItem(_Item):
    """A call of a custom tool: a function with free text as its input."""

    type: Literal["custom_tool_call"]
    call_id: ItemId
    name: FunctionName
    input: str
    namespace: FunctionName | None = None

    @property
    def function(self) -> Json:
        arguments = json.dumps({CUSTOM_INPUT: self.input}, ensure_ascii=False)
        return {"name": _full_name(self.name, self.namespace), "arguments": arguments}

    def kept(self) -> Json:
        kept = {
            "id": self.id or new_id("ctc_"),
            "type": "custom_tool_call",
            "status": self.status or "completed",
            "input": self.input,
            "call_id": self.call_id,
            "name": self.name,
        }
        return kept if self.namespace is None else kept | {"namespace": self.namespace}


class CallOutputItem(_Item):
    """Result of a call."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: ItemId
    output: Content

    def kept(self) -> Json:
        return {
            "id": self.id or new_id("fco_"),
            "type": self.type,
            "status": self.status or "completed",
            "call_id": self.call_id,
            "output": _text(self.output),
        }


class ReasoningPart(Wire):
    type: Literal["reasoning_text", "text", "summary_text"]
    text: str


Reasoning = Annotated[list[ReasoningPart], Field(max_length=MAX_MESSAGES, fail_fast=True)]


class ReasoningItem(_Item):
    """Thought before an answer. One that is encrypted, or summarized, cannot be read here."""

    type: Literal["reasoning"]
    summary: Reasoning | None = None
    content: Reasoning | None = None
    encrypted_content: str | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or ())

    def kept(self) -> Json:
        shown: Json = {
            "id": self.id or new_id("rs_"),
            "type": "reasoning",
            "status": self.status or "completed",
            "summary": [part.model_dump() for part in self.summary or ()],
        }
        if self.content is not None:
            shown["content"] = [part.model_dump() for part in self.content]
        return shown


_KINDS = (
    "message",
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
    "reasoning",
)


def _kind(value: Any) -> Any:
    """Return the type of an item; a message need not say that it is one, and results have one shape."""
    kind = value.get("type") or "message" if isinstance(value, dict) else "message"
    return "function_call_output" if kind == "custom_tool_call_output" else kind


Item = Annotated[
    Annotated[MessageItem, Tag("a-message")]
    | Annotated[CallItem, Tag("a-function_call")]
    | Annotated[CustomCallItem, Tag("a-custom_tool_call")]
    | Annotated[CallOutputItem, Tag("a-function_call_output")]
    | Annotated[ReasoningItem, Tag("a-reasoning")],
    Discriminator(lambda value: f"a-{_kind(value)}"),
    of_type(*_KINDS, otherwise=f"only {', '.join(_KINDS)} are"),
]
AnyItem = MessageItem | CallItem | CustomCallItem | CallOutputItem | ReasoningItem
AnyItems = Annotated[list[Item], Field(max_length=MAX_MESSAGES, fail_fast=True)]
Items = Annotated[AnyItems, Field(min_length=1)]
_ITEMS: TypeAdapter[list[AnyItem]] = TypeAdapter(list[Item])


def items_again(kept: Sequence[Json], param: str = "previous_response_id") -> list[AnyItem]:
    """Return the items of a stored response, or of a conversation, which `param` names.

    Raises InvalidRequestError if nothing can follow them.
    """
    try:
        return _ITEMS.validate_python(kept)
    except ValidationError as error:
        reason, _ = validation_error(error.errors())
        raise InvalidRequestError(
            f"{param}: nothing can follow what it names ({reason}) Name what was before it.",
            param=param,
        ) from error


def kept_items(items: Sequence[AnyItem]) -> list[Json]:
    """Return the items as they are stored and shown: each has an id of its own."""
    ids: set[str] = set()
    made = []
    for item in items:
        shown = item.kept()
        if shown["id"] in ids:
            shown["id"] = new_id("item_")
        ids.add(shown["id"])
        made.append(shown)
    return made


def conversation(instructions: str | None, items: Sequence[AnyItem]) -> list[ChatMessage]:
    """Return the items as messages: calls stand in the assistant's message before them.

    Raises InvalidRequestError.
    """
    if len(items) > MAX_MESSAGES:
        raise _refused(
            f"the conversation has {len(items)} items; the most is {MAX_MESSAGES}. Begin a new one"
        )
    turns: list[Json] = [] if instructions is None else [{"role": "system", "content": instructions}]
    called: set[str] = set()
    thought = ""
    for item in items:
        if isinstance(item, ReasoningItem):
            thought += item.text
        elif isinstance(item, MessageItem):
            turns.append({"role": item.role, "content": _text(item.content)})
        elif isinstance(item, CallOutputItem):
            if item.call_id not in called:
                raise _refused(
                    f"call_id {item.call_id[:80]!r} of a {item.type} belongs to no "
                    f"{item.type.removesuffix('_output')} before it. Send that too, or the response that has "
                    "it as previous_response_id"
                )
            turns.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id})
        else:
            called.add(item.call_id)
            if not turns or turns[-1]["role"] != "assistant" or thought:
                turns.append({"role": "assistant", "content": ""})
            call = {"id": item.call_id, "function": item.function}
            turns[-1].setdefault("tool_calls", []).append(call)
            if len(turns[-1]["tool_calls"]) > MAX_TOOLS:
                raise _refused(f"over {MAX_TOOLS} calls follow each other. Send fewer")
        if thought and not isinstance(item, ReasoningItem):
            if turns[-1]["role"] == "assistant":  # others have none: a thought that was cut answers nothing
                turns[-1]["reasoning_content"] = thought
            thought = ""
    if not turns:
        raise _refused("has no message, call or result, so that there is nothing to answer")
    return [ChatMessage.model_validate(turn) for turn in turns]


def _refused(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"input: {reason}.", param="input")
