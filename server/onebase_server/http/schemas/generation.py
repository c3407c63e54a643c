"""The wire models of POST /generate, and the limits and parts that the OpenAI routes share."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    model_validator,
)

from onebase_engine.engine.messages import Grammar

MAX_N = 128
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_ADAPTER_TERMS = 16
MAX_WEIGHT = 1000.0
MAX_MESSAGES = 1024
MAX_PROMPTS = 64
MAX_PROMPT_TOKENS = 4_000_000
MAX_TOKENS = 1_000_000
MAX_NAME = 200
MAX_CHOICES = 1024
MAX_CHOICE_CHARACTERS = 4096
MAX_GRAMMAR_CHARACTERS = 256 * 1024
SEED_BITS = 63
UNKNOWN_FIELD = "this server does not know this field. Remove it"

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]


def _few_entries(bias: Any) -> Any:
    """Before they are looked at one by one."""
    if isinstance(bias, dict) and len(bias) > MAX_LOGIT_BIAS:
        raise ValueError(f"should have at most {MAX_LOGIT_BIAS} entries, and has {len(bias)}")
    return bias


Bias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_few_entries)]


_ONE, _LIST = Tag("one-value"), Tag("a-list")
"""Parts of an error's location that name no field: they are no identifiers."""
_OBJECT = Tag("an-object")
_BY_KIND = Discriminator(lambda value: (_LIST if isinstance(value, list) else _ONE).tag)
"""A plain union would try both kinds, and collect an error for each item of a list under each."""


@cache
def _names(model: type[BaseModel]) -> frozenset[str]:
    """Of its fields, as they are written."""
    return frozenset(field.alias or name for name, field in model.model_fields.items())


class Wire(BaseModel):
    """Strict types, finite numbers, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, value: Any) -> Any:
        """At the first one: pydantic would collect an error for each of a hundred thousand."""
        if isinstance(value, dict):
            known = _names(cls)
            for key in value:
                if key not in known:
                    raise FieldError(str(key)[:MAX_NAME], UNKNOWN_FIELD)
        return value


class AdapterTerm(Wire):
    """One adapter of a weighted sum."""

    name: Name
    weight: float = Field(default=1.0, ge=-MAX_WEIGHT, le=MAX_WEIGHT)


AdapterTerms = Annotated[list[AdapterTerm], Field(min_length=1, max_length=MAX_ADAPTER_TERMS, fail_fast=True)]


def _of_an_object(text: str) -> str:
    try:
        whole = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise ValueError("is no JSON object")
    return text


JsonSchema = dict[str, JsonValue]
SchemaText = Annotated[str, Field(max_length=MAX_GRAMMAR_CHARACTERS), AfterValidator(_of_an_object)]
SchemaOrText = Annotated[
    Annotated[SchemaText, _ONE] | Annotated[JsonSchema, _OBJECT],
    Discriminator(lambda value: (_ONE if isinstance(value, str) else _OBJECT).tag),
]
GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARACTERS)]
ChoiceText = Annotated[str, Field(min_length=1, max_length=MAX_CHOICE_CHARACTERS)]
ChoiceTexts = Annotated[list[ChoiceText], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]


class NamedSchema(Wire):
    """OpenAI's wrapping of a JSON schema. It is always kept to, whatever `strict` says."""

    name: Name | None = None
    description: str | None = None
    schema_: JsonSchema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Wire):
    """What the text must be: anything, a JSON object, or JSON that a schema describes."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise FieldError("json_schema", "json_schema goes with type json_schema, and only with it")
        return self


class StructuredOutputs(Wire):
    """vLLM's newer way to write the guided_ fields. One of them is given."""

    json_: SchemaOrText | None = Field(default=None, alias="json")
    regex: GrammarText | None = None
    choice: ChoiceTexts | None = None
    grammar: GrammarText | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if not any((self.json_ is not None, self.regex, self.choice, self.grammar, self.json_object)):
            raise FieldError("json", "give one of json, regex, choice, grammar and json_object")
        return self


class SamplingFields(Wire):
    """How tokens are chosen: the fields that every route knows, under the same names.

    A null counts as "not given".
    """

    temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy; 1 by default")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=10_000_000, description="0 and -1 are off")
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: Bias | None = Field(
        default=None, description="token id (as text) to what is added to its logit"
    )
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: Annotated[Annotated[str, _ONE] | Annotated[Stops, _LIST], _BY_KIND] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS, fail_fast=True)] | None = None
    min_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    max_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    ignore_eos: bool | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_N)
    stream: bool | None = None
    timeout_s: float | None = Field(
        default=None, gt=0, description="seconds; then finish_reason is cancelled"
    )
    adapter: Annotated[Annotated[Name, _ONE] | Annotated[AdapterTerms, _LIST], _BY_KIND] | None = None
    response_format: ResponseFormat | None = Field(default=None, description="what the text must be")
    guided_json: SchemaOrText | None = Field(default=None, description="a JSON schema that the text keeps to")
    guided_regex: GrammarText | None = Field(default=None, description="matches the whole text")
    guided_choice: ChoiceTexts | None = Field(default=None, description="the text is one of these")
    guided_grammar: GrammarText | None = Field(default=None, description="in Lark's notation, or GBNF")
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _check_shared(self) -> Self:
        stops = [self.stop] if isinstance(self.stop, str) else []
        if any(not stop or len(stop) > MAX_STOP_CHARACTERS for stop in stops):
            raise FieldError("stop", f"a stop string has 1 to {MAX_STOP_CHARACTERS} characters")
        for key in self.logit_bias or {}:
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise FieldError(
                    "logit_bias", f'{key[:40]!r} is not a token id: keys are ids, as in {{"42": -5}}'
                )
        if self.min_tokens and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise FieldError("min_tokens", f"min_tokens is over max_tokens ({self.max_tokens})")
        if self.grammar is not None and self.ignore_eos:
            raise FieldError("ignore_eos", f"{self.grammar.param} says where the text ends; leave one out")
        return self

    @cached_property
    def grammar(self) -> GrammarField | None:
        """What the text must be, whichever way it was written.

        Raises:
            FieldError: it is written in two ways, or it is too long.
        """
        outputs, wanted = self.structured_outputs, self.response_format
        schema = wanted.json_schema.schema_ if wanted is not None and wanted.json_schema is not None else None
        given = {
            "response_format": _ANY_OBJECT if wanted is not None and wanted.type == "json_object" else None,
            "response_format.json_schema.schema": _of_schema(schema),
            "guided_json": _of_schema(self.guided_json),
            "guided_regex": _of("regex", self.guided_regex),
            "guided_choice": _of_choice(self.guided_choice),
            "guided_grammar": _of("grammar", self.guided_grammar),
        }
        if outputs is not None:
            given |= {
                "structured_outputs.json": _of_schema(outputs.json_),
                "structured_outputs.regex": _of("regex", outputs.regex),
                "structured_outputs.choice": _of_choice(outputs.choice),
                "structured_outputs.grammar": _of("grammar", outputs.grammar),
                "structured_outputs.json_object": _ANY_OBJECT if outputs.json_object else None,
            }
        found = [GrammarField(param, grammar) for param, grammar in given.items() if grammar is not None]
        if len(found) > 1:
            raise FieldError(found[1].param, f"{found[0].param} says what the text must be; leave one out")
        if not found:
            return None
        if len(found[0].grammar.text) > MAX_GRAMMAR_CHARACTERS:
            raise FieldError(found[0].param, f"has more than {MAX_GRAMMAR_CHARACTERS} characters")
        return found[0]

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, whichever way they were written."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass(frozen=True)
class GrammarField:
    """What a text must be, and the field that said so."""

    param: str
    grammar: Grammar


_SPECIAL_IN_REGEX = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~/]")
_ANY_OBJECT = Grammar("json_schema", '{"type":"object"}')


def _of(kind: Literal["regex", "grammar"], text: str | None) -> Grammar | None:
    return None if text is None else Grammar(kind, text)


def _of_schema(schema: JsonSchema | str | None) -> Grammar | None:
    if schema is None:
        return None
    return Grammar("json_schema", schema if isinstance(schema, str) else json.dumps(schema))


def _of_choice(choices: Sequence[str] | None) -> Grammar | None:
    if choices is None:
        return None
    return Grammar("regex", "|".join(_SPECIAL_IN_REGEX.sub(r"\\\g<0>", choice) for choice in choices))


class FieldError(ValueError):
    """A rule about one field that the field's type cannot express."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class TextPart(Wire):
    """A piece of a message's content. Only text can be served."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _drop_hints(cls, value: Any) -> Any:
        return _without_hints(value)


class Message(Wire):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, _ONE]
        | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True), _LIST],
        _BY_KIND,
    ]
    name: Annotated[str, Field(max_length=MAX_NAME)] | None = Field(
        default=None, description="of who speaks, for chat templates that write it"
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_extras(cls, value: Any) -> Any:
        """Clients send answers back with empty `refusal`, `tool_calls` and so on: they mean nothing."""
        value = _without_hints(value)
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if key in cls.model_fields or item not in (None, [])}

    def rendered(self) -> dict[str, str]:
        """What chat templates take. They know no `developer`: it is the newer word for `system`."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        role = "system" if self.role == "developer" else self.role
        named = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": "".join(parts)} | named


def _without_hints(value: Any) -> Any:
    """Without what says how to cache a message, which changes no text."""
    if isinstance(value, dict) and "cache_control" in value:
        return {key: item for key, item in value.items() if key != "cache_control"}
    return value


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class GenerateRequest(SamplingFields):
    """Body of POST /generate: a prompt or messages, an adapter or none, and how to sample."""

    prompt: str | None = None
    messages: Messages | None = None
    logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description="alternatives per token, besides the chosen one"
    )
    echo: bool | None = Field(default=None, description="begin the text with the prompt")

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise FieldError("prompt", "give either prompt or messages")
        return self


def validation_error(errors: Sequence[Any]) -> tuple[str, str | None]:
    """`(message, param)` for the most exact of pydantic's errors: the field, and the way out."""
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
    """`messages[0].content` from a location; union members' names are pydantic's and left out."""
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
    }


def _sentence(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ").replace("Input should", "should")
    value = error.get("input")
    shown = f" (it is {value!r})" if isinstance(value, int | float) and not isinstance(value, bool) else ""
    return f"{message}{shown}."
