"""The wire models of a conversation: its messages, and the tools that an answer may call."""

from __future__ import annotations

import json
import math
import re
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, JsonValue, model_validator
from pydantic_core import from_json

from onebase_server.requests.schemas.wire import (
    BY_KIND,
    LIST,
    MAX_NAME,
    OBJECT,
    ONE,
    FieldError,
    JsonSchema,
    Typed,
    Wire,
    check_type,
    not_too_deep,
    of_type,
)

MAX_MESSAGES = 1024
MAX_TOOLS = 128
MAX_FUNCTION_NAME = 128
MAX_SCHEMA_CHARACTERS = 256 * 1024

ONLY_FUNCTIONS = "only tools of type 'function' are"

FunctionName = Annotated[str, Field(min_length=1, max_length=MAX_FUNCTION_NAME)]
_FUNCTION_NAME = re.compile(rf"[A-Za-z0-9_.:/-]{{1,{MAX_FUNCTION_NAME}}}")


class TextPart(Wire):
    """A piece of a message's content. Only text can be served."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _drop_hints(cls, value: Any) -> Any:
        return without_hints(
            check_type(value, "text", otherwise="only text is; images, sound and files are not")
        )


def _no_number(name: str) -> Any:
    raise ValueError(name)


def _a_number(text: str) -> float:
    """Read a number. Raises ValueError for one that is too large."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def object_or_its_beginning(text: str) -> dict[str, Any] | None:
    """Return the object that a JSON text is, or of one that was cut, as far as it goes; None for any other
    text."""
    try:
        try:
            found = json.loads(text or "{}", parse_constant=_no_number, parse_float=_a_number)
        except json.JSONDecodeError as error:
            if error.msg.startswith("Extra data"):
                return None
            found = from_json(text, allow_inf_nan=False, allow_partial="trailing-strings")
            json.dumps(found, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class FunctionCall(Wire):
    """Function call of an assistant.

    arguments: JSON of an object, as text like OpenAI's or as it is. A text that `max_tokens` cut is taken as
    far as it goes: agents send such calls back.
    """

    name: FunctionName
    arguments: Annotated[
        Annotated[str, ONE] | Annotated[JsonSchema, OBJECT],
        Discriminator(lambda value: (ONE if isinstance(value, str) else OBJECT).tag),
    ] = ""

    @cached_property
    def values(self) -> dict[str, Any]:
        """The arguments by name. Raises FieldError."""
        given = self.arguments
        found = object_or_its_beginning(given) if isinstance(given, str) else given
        if found is None:
            raise FieldError("arguments", "is no JSON object")
        try:
            made: dict[str, Any] = not_too_deep(found)
        except ValueError as error:
            raise FieldError("arguments", str(error)) from error
        return made

    @model_validator(mode="after")
    def _check_arguments(self) -> Self:
        _ = self.values
        return self


class ChatToolCall(Wire):
    id: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    type: Literal["function"] = "function"
    function: FunctionCall

    @model_validator(mode="before")
    @classmethod
    def _drop_place(cls, value: Any) -> Any:
        """Drop the place in the list, which clients that put streamed calls together leave in them."""
        return (
            {key: item for key, item in value.items() if key != "index"} if isinstance(value, dict) else value
        )

    def rendered(self) -> dict[str, Any]:
        """Return the call in the form for chat templates, which write the arguments as JSON themselves."""
        named = {} if self.id is None else {"id": self.id}
        function = {"name": self.function.name, "arguments": self.function.values}
        return named | {"type": self.type, "function": function}


class ChatMessage(Wire):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Annotated[str, ONE] | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True), LIST],
        BY_KIND,
    ]
    name: Annotated[str, Field(max_length=MAX_NAME)] | None = Field(
        default=None, description="of who speaks, for chat templates that write it"
    )
    tool_calls: Annotated[list[ChatToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: Annotated[str, Field(max_length=MAX_NAME)] | None = Field(
        default=None, description="which call a message of role tool answers"
    )
    reasoning_content: str | None = Field(
        default=None,
        description="the thought before an assistant's content, for chat templates that write it",
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_extras(cls, value: Any) -> Any:
        """Drop empty `refusal`, `audio` and so on: clients send answers back with them, and they mean
        nothing."""
        value = without_hints(value)
        if not isinstance(value, dict):
            return value
        kept = {key: item for key, item in value.items() if key in cls.model_fields or item not in (None, [])}
        if "reasoning" in kept:  # vLLM's name of it, which answers have besides
            thought = kept.pop("reasoning")
            kept["reasoning_content"] = kept.get("reasoning_content") or thought
        if kept.get("content") is None and (kept.get("tool_calls") or kept.get("reasoning_content")):
            kept["content"] = ""
        return kept

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise FieldError("tool_calls", "only the assistant's messages have tool_calls")
        if self.tool_call_id is not None and self.role != "tool":
            raise FieldError("tool_call_id", "only messages of role tool have a tool_call_id")
        if self.reasoning_content and self.role != "assistant":
            raise FieldError("reasoning_content", "only the assistant's messages have reasoning_content")
        return self

    @property
    def is_of_tools(self) -> bool:
        """Whether it calls a tool, or is a tool's answer."""
        return bool(self.tool_calls) or self.role == "tool"

    def rendered(self) -> dict[str, Any]:
        """Return the message in the form for chat templates, which know `developer` as `system`, its older
        word."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        role = "system" if self.role == "developer" else self.role
        made: dict[str, Any] = {"role": role, "content": "".join(parts)}
        for key in ("name", "tool_call_id"):
            if getattr(self, key) is not None:
                made[key] = getattr(self, key)
        if self.reasoning_content:
            made["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            made["tool_calls"] = [call.rendered() for call in self.tool_calls]
        return made


def without_hints(value: Any) -> Any:
    """Return the object without hints on how to cache a message, which change no text."""
    if isinstance(value, dict) and "cache_control" in value:
        return {key: item for key, item in value.items() if key != "cache_control"}
    return value


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


def a_function(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool in the form for chat templates, and with `strict`. Raises FieldError."""
    check_type(tool, "function", otherwise=ONLY_FUNCTIONS)
    function = tool.get("function")
    if not isinstance(function, dict):
        raise FieldError("function", 'must be an object, as in {"name": ..., "parameters": {...}}')
    return tool_of(function, "function.")


def tool_of(function: dict[str, Any], within: str) -> dict[str, Any]:
    """Return the tool that a function is. within: what stands before its fields' names in errors."""
    name = function.get("name")
    if not isinstance(name, str) or not _FUNCTION_NAME.fullmatch(name):
        raise FieldError(f"{within}name", f"must be 1 to {MAX_FUNCTION_NAME} letters, digits and _ - . : /")
    if not isinstance(function.get("description"), str | None):
        raise FieldError(f"{within}description", "must be a text")
    if not isinstance(function.get("strict"), bool | None):
        raise FieldError(f"{within}strict", "must be true or false")
    schema = function.get("parameters")
    if not isinstance(schema, dict | None) or (schema and schema.get("type", "object") != "object"):
        raise FieldError(f"{within}parameters", "must be the JSON schema of an object")
    if len(json.dumps(schema)) > MAX_SCHEMA_CHARACTERS:
        raise FieldError(f"{within}parameters", f"has more than {MAX_SCHEMA_CHARACTERS} characters")
    kept = {key: value for key, value in function.items() if value is not None}
    return {"type": "function", "function": kept}


ToolObject = Annotated[dict[str, JsonValue], BeforeValidator(not_too_deep), AfterValidator(a_function)]


class FunctionChoice(Wire):
    name: FunctionName


class NamedTool(Wire):
    type: Literal["function"]
    function: FunctionChoice


class AllowedTools(Wire):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class ToolChoice(Typed):
    """OpenAI's choice of tools: one that must be called, or several of which any may be."""

    type: Literal["function", "allowed_tools"]
    function: FunctionChoice | None = None
    allowed_tools: AllowedTools | None = None

    goes_with: ClassVar = {"function": "function", "allowed_tools": "allowed_tools"}

    @property
    def must_call(self) -> bool:
        return self.allowed_tools is None or self.allowed_tools.mode == "required"

    @property
    def names(self) -> list[str]:
        """Names of the tools that may be called."""
        if self.function is not None:
            return [self.function.name]
        return [tool.function.name for tool in self.allowed_tools.tools] if self.allowed_tools else []


CHOICE_OF_TOOLS = of_type("function", "allowed_tools", otherwise="only function and allowed_tools are")
