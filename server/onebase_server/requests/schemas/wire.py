"""Common parts of all wire models: strict types, and errors that name a field."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationError,
    model_validator,
)

from onebase_edge.errors import InvalidRequestError

MAX_NAME = 200
UNKNOWN_FIELD = "this server does not know this field. Remove it"

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
MAX_DEPTH = 64


def not_too_deep(value: Any) -> Any:
    """Return a value that can be walked level by level, such as by a chat template. Raises ValueError."""
    level, depth = [value], 0
    while level:
        level = [
            part
            for one in level
            if isinstance(one, dict | list)
            for part in (one.values() if isinstance(one, dict) else one)
        ]
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"is nested more than {MAX_DEPTH} deep")
    return value


JsonSchema = Annotated[dict[str, JsonValue], BeforeValidator(not_too_deep)]

ONE, LIST = Tag("one-value"), Tag("a-list")
"""Parts of an error's location that name no field: they are no identifiers."""
OBJECT = Tag("an-object")
BY_KIND = Discriminator(lambda value: (LIST if isinstance(value, list) else ONE).tag)
"""Discriminator of a list and one value. A plain union would try both kinds, and collect an error for each
item of a list under each."""


class FieldError(ValueError):
    """A rule about one field that the field's type cannot express."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


@cache
def _names(model: type[BaseModel]) -> frozenset[str]:
    """Return the names of a model's fields, as they are written."""
    return frozenset(field.alias or name for name, field in model.model_fields.items())


class Wire(BaseModel):
    """Strict types, finite numbers, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, value: Any) -> Any:
        """Refuse the first unknown field: pydantic would collect an error for each of a hundred thousand.

        A field that is null is not given: clients write what newer servers of others know.
        """
        if not isinstance(value, dict):
            return value
        known, kept = _names(cls), {}
        for key, item in value.items():
            if key in known:
                kept[key] = item
            elif item is not None:
                raise FieldError(str(key)[:MAX_NAME], UNKNOWN_FIELD)
        return kept


class Typed(Wire):
    """An object whose `type` says which of its other fields it has."""

    type: str
    goes_with: ClassVar[dict[str, str]] = {}
    """Fields, and the type that each of them goes with."""

    @model_validator(mode="after")
    def _check_fields_of_type(self) -> Self:
        for name, kind in self.goes_with.items():
            if (self.type == kind) != (getattr(self, name) is not None):
                shown = type(self).model_fields[name].alias or name
                raise FieldError(shown, f"{shown} goes with type {kind}, and only with it")
        return self


class Tolerant(Wire):
    """Model that accepts fields of other servers if they change nothing here, and refuses by name those that
    would."""

    ignored: ClassVar[frozenset[str]] = frozenset()
    """Fields that change nothing, whatever they say."""
    neutral: ClassVar[dict[str, tuple[JsonValue, ...]]] = {}
    """Fields that are not served, with the values that change nothing; null never does."""
    reasons: ClassVar[dict[str, str]] = {}
    """Advice for such fields: what to do instead."""

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept: dict[str, Any] = {}
        for key, item in value.items():
            if key in _names(cls):
                kept[key] = item
            elif key in cls.ignored or item is None or item in cls.neutral.get(key, ()):
                continue
            elif key in cls.neutral:
                hint = cls.reasons.get(key, "leave it out")
                raise FieldError(key, f"this server does not support {key} here: {hint}")
            else:
                raise FieldError(key[:MAX_NAME], UNKNOWN_FIELD)
        return kept


def check_type(value: Any, *served: str, otherwise: str) -> Any:
    """Return the value, unless it is an object that says it is of another type. Raises FieldError."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind is not None and kind not in served:
        shown = repr(kind[:40]) if isinstance(kind, str) else type(kind).__name__
        raise FieldError("type", f"{shown} is not served: {otherwise}")
    return value


def of_type(*served: str, otherwise: str) -> BeforeValidator:
    """Return a validator that refuses objects of other types by name, before anything else in them is looked
    at."""
    return BeforeValidator(lambda value: check_type(value, *served, otherwise=otherwise))


Model = TypeVar("Model", bound=Wire)


def rebuilt(model: type[Model], values: dict[str, Any]) -> Model:
    """Return a model made of another one's values, with the same names where they can be wrong.

    Raises InvalidRequestError.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        message, param = validation_error(error.errors())
        raise InvalidRequestError(message, param=param) from error


def validation_error(errors: Sequence[Any]) -> tuple[str, str | None]:
    """Return `(message, param)` for the most exact of pydantic's errors: the field, and what to change."""
    first = max(errors, key=lambda error: len(error["loc"]))
    path = [part for part in first["loc"] if part != "body"]
    param = _param(path)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        param = f"{param}.{cause.param}" if param else cause.param
        return f"{param}: {cause}.", param
    if first["type"] == "json_invalid":
        return f"The body is not valid JSON: {first.get('ctx', {}).get('error', 'it cannot be read')}.", None
    if not path:
        return "The body must be a JSON object, sent with Content-Type: application/json.", None
    return f"{param}: {_sentence(first)}", param


def _param(path: Sequence[str | int]) -> str | None:
    """Return `messages[0].content` for a location; union members' names are pydantic's and left out."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _is_field_name(part):
            text += f".{part}" if text else part
    return text or None


def _is_field_name(part: str) -> bool:
    return part.isidentifier() and part not in {
        "str",
        "int",
        "float",
        "bool",
        "Message",
        "TextPart",
        "AdapterTerm",
        "dict",
        "list",
    }


_SENTENCES = {
    "missing": "is missing",
    "string_type": "must be a text",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "finite_number": "must be a finite number",
    "too_short": "has too few entries. Send at least {min_length}.",
    "too_long": "has more than the {max_length} entries that are taken. Send fewer.",
    "string_too_short": "is too short: it has at least {min_length} characters.",
    "string_too_long": "is too long: it has at most {max_length} characters.",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
}
"""Text of an error in a request, by the kind of pydantic's error."""


def _plain(value: Any) -> Any:
    """Return 2 for 2.0: pydantic makes the limits of numbers floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _sentence(error: Any) -> str:
    context = {name: _plain(value) for name, value in error.get("ctx", {}).items()}
    if error["type"] == "too_long" and not context["max_length"]:
        return "is not served: leave it out, or empty."
    message = _SENTENCES.get(error["type"], "").format_map(context)
    if message.endswith("."):
        return message
    if not message:
        message = str(error["msg"]).removeprefix("Value error, ").replace("Input should", "must")
    value = error.get("input")
    shown = f" (it is {value!r})" if isinstance(value, int | float) and not isinstance(value, bool) else ""
    return f"{message}{shown}."
