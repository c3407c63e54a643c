"""The wire models of POST /generate, and the limits and parts that the OpenAI routes share."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    JsonValue,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from onebase_edge.errors import InvalidRequestError
from onebase_engine.engine.messages import MAX_ADAPTER_TERMS, Grammar
from onebase_server.inference.json_schema import closed
from onebase_server.requests.schemas.messages import (
    CHOICE_OF_TOOLS,
    MAX_TOOLS,
    Messages,
    ToolChoice,
    ToolObject,
)
from onebase_server.requests.schemas.wire import (
    BY_KIND,
    LIST,
    OBJECT,
    ONE,
    FieldError,
    JsonSchema,
    Name,
    Typed,
    Wire,
    not_too_deep,
    validation_error,
)

MAX_N = 128
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_WEIGHT = 1000.0
MAX_PROMPTS = 64
MAX_PROMPT_TOKENS = 4_000_000
MAX_TOKENS = 1_000_000
MAX_CHOICES = 1024
MAX_CHOICE_CHARACTERS = 4096
MAX_GRAMMAR_CHARACTERS = 256 * 1024
MAX_MANY = 64
SEED_BITS = 63
MAX_ASKER = 512
"""Characters of a user's or a session's name that count."""

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def _few_entries(bias: Any) -> Any:
    """Refuse too many entries before they are looked at one by one."""
    if isinstance(bias, dict) and len(bias) > MAX_LOGIT_BIAS:
        raise ValueError(f"should have at most {MAX_LOGIT_BIAS} entries, and has {len(bias)}")
    return bias


Bias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_few_entries)]


class AdapterTerm(Wire):
    """One adapter of a weighted sum."""

    name: Name
    weight: float = Field(default=1.0, ge=-MAX_WEIGHT, le=MAX_WEIGHT)


AdapterTerms = Annotated[list[AdapterTerm], Field(min_length=1, max_length=MAX_ADAPTER_TERMS, fail_fast=True)]


def _of_an_object(text: str) -> str:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError("is no JSON object")
    not_too_deep(found)
    return text


SchemaText = Annotated[str, Field(max_length=MAX_GRAMMAR_CHARACTERS), AfterValidator(_of_an_object)]
SchemaOrText = Annotated[
    Annotated[SchemaText, ONE] | Annotated[JsonSchema, OBJECT],
    Discriminator(lambda value: (ONE if isinstance(value, str) else OBJECT).tag),
]
GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARACTERS)]
ChoiceText = Annotated[str, Field(min_length=1, max_length=MAX_CHOICE_CHARACTERS)]
ChoiceTexts = Annotated[list[ChoiceText], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]


class NamedSchema(Wire):
    """OpenAI's wrapping of a JSON schema. The text always keeps to it, whatever `strict` says."""

    name: Name | None = None
    description: str | None = None
    schema_: JsonSchema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Typed):
    """Form of the text: anything, a JSON object, or JSON that a schema describes."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    value: JsonSchema | None = Field(default=None, description="TGI's: the schema of a json_object")

    goes_with: ClassVar = {"json_schema": "json_schema"}

    @model_validator(mode="after")
    def _check_value(self) -> Self:
        if self.value is not None and self.type != "json_object":
            raise FieldError("value", "value goes with type json_object only")
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


class AdapterFields(Wire):
    """Adapter that answers, and the time that it may take."""

    timeout_s: float | None = Field(
        default=None, gt=0, description="seconds; then finish_reason is cancelled"
    )
    adapter: Annotated[Annotated[Name, ONE] | Annotated[AdapterTerms, LIST], BY_KIND] | None = None
    adapter_id: Name | None = Field(default=None, description="one adapter, as LoRAX and TGI call it")
    adapter_defaults: bool | None = Field(
        default=None, description="false: without the defaults that the adapter came with"
    )

    @model_validator(mode="after")
    def _check_adapter(self) -> Self:
        if self.adapter is not None and self.adapter_id is not None:
            raise FieldError("adapter_id", "adapter says it already; leave one out")
        return self

    @property
    def wanted_adapter(self) -> str | list[AdapterTerm] | None:
        """Adapter or weighted sum that is to answer, whichever field names it; None is the base."""
        return self.adapter_id if self.adapter is None else self.adapter


class SamplingBody(AdapterFields):
    """Sampling fields, which every route has under the same names.

    A null counts as "not given".
    """

    default_temperature: ClassVar[float] = 1.0
    """Temperature where neither the request nor its adapter's defaults say one."""

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
    stop: Annotated[Annotated[str, ONE] | Annotated[Stops, LIST], BY_KIND] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS, fail_fast=True)] | None = None
    min_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    max_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    ignore_eos: bool | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_N)
    stream: bool | None = None
    response_format: ResponseFormat | None = Field(default=None, description="what the text must be")
    guided_json: SchemaOrText | None = Field(default=None, description="a JSON schema that the text keeps to")
    guided_regex: GrammarText | None = Field(default=None, description="matches the whole text")
    guided_choice: ChoiceTexts | None = Field(default=None, description="the text is one of these")
    guided_grammar: GrammarText | None = Field(default=None, description="in Lark's notation, or GBNF")
    structured_outputs: StructuredOutputs | None = None
    user: Any = Field(
        default=None, description="who asks, as a text: a rollout answers each user by one version"
    )

    @property
    def asker(self) -> str | None:
        """User or session that the request names, for rollouts; None if it names neither."""
        return named_in("user", self.user)

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
        """Grammar of the text, whichever field describes it.

        Raises:
            FieldError: it is written in two ways, or it is too long.
        """
        given = self.grammars_by_field()
        found = [GrammarField(param, grammar) for param, grammar in given.items() if grammar is not None]
        if len(found) > 1:
            raise FieldError(found[1].param, f"{found[0].param} says what the text must be; leave one out")
        if not found:
            return None
        if len(found[0].grammar.text) > MAX_GRAMMAR_CHARACTERS:
            raise FieldError(found[0].param, f"has more than {MAX_GRAMMAR_CHARACTERS} characters")
        return found[0]

    def grammars_by_field(self) -> dict[str, Grammar | None]:
        """Return each field that can describe the text's form, with the grammar that it describes."""
        outputs, wanted = self.structured_outputs, self.response_format
        schema = wanted.json_schema.schema_ if wanted is not None and wanted.json_schema is not None else None
        given = {
            "response_format": _of_object(wanted) if wanted is not None else None,
            "response_format.json_schema.schema": of_schema(schema),
            "guided_json": of_schema(self.guided_json),
            "guided_regex": _of("regex", self.guided_regex),
            "guided_choice": _of_choice(self.guided_choice),
            "guided_grammar": _of("grammar", self.guided_grammar),
        }
        if outputs is not None:
            given |= {
                "structured_outputs.json": of_schema(outputs.json_),
                "structured_outputs.regex": _of("regex", outputs.regex),
                "structured_outputs.choice": _of_choice(outputs.choice),
                "structured_outputs.grammar": _of("grammar", outputs.grammar),
                "structured_outputs.json_object": ANY_OBJECT if outputs.json_object else None,
            }
        return given

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, whichever way they were written."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def named_in(field: str, value: Any) -> str | None:
    """Return what a field names, apart from what others do; None unless it is a text."""
    return f"{field}:{value[:MAX_ASKER]}" if isinstance(value, str) and value else None


@dataclass(frozen=True)
class GrammarField:
    """Grammar of a text, and the field that described it."""

    param: str
    grammar: Grammar


_SPECIAL_IN_REGEX = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~/]")
ANY_OBJECT = Grammar("json_schema", '{"type":"object"}')


def _of_object(wanted: ResponseFormat) -> Grammar | None:
    if wanted.type != "json_object":
        return None
    return ANY_OBJECT if wanted.value is None else of_schema(wanted.value)


def _of(kind: Literal["regex", "grammar"], text: str | None) -> Grammar | None:
    return None if text is None else Grammar(kind, text)


def of_schema(schema: JsonSchema | str | None) -> Grammar | None:
    if schema is None:
        return None
    return Grammar(
        "json_schema", json.dumps(closed(json.loads(schema) if isinstance(schema, str) else schema))
    )


def _of_choice(choices: Sequence[str] | None) -> Grammar | None:
    if choices is None:
        return None
    return Grammar("regex", "|".join(_SPECIAL_IN_REGEX.sub(r"\\\g<0>", choice) for choice in choices))


class ConversationFields(SamplingBody):
    """Fields of a request with messages, besides those for sampling.

    needs_budget: whether a thinking_token_budget that bounds nothing is refused.
    """

    needs_budget: ClassVar[bool] = True

    tools: Annotated[list[ToolObject], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], ONE]
            | Annotated[ToolChoice, CHOICE_OF_TOOLS, OBJECT],
            Discriminator(lambda value: (ONE if isinstance(value, str) else OBJECT).tag),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: (
        Annotated[dict[str, JsonValue], Field(max_length=64), BeforeValidator(not_too_deep)] | None
    ) = Field(default=None, description="more variables of the base's chat template")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(
        default=None, description="the answer continues where the last message ends"
    )
    thinking_token_budget: int | None = Field(
        default=None,
        ge=0,
        le=MAX_TOKENS,
        description="most tokens of the thought before an answer, which is then ended; refused where the "
        "base's chat template has no token that ends thoughts",
    )
    instruction: str | None = Field(
        default=None, description='one more message of the user, at the end; "": not even the adapter\'s own'
    )

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        names = [function["name"] for function in self.functions]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise FieldError("tools", f"{twice!r} is there twice")
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise FieldError("tool_choice", "there are no tools")
        for name in self.callable_names:
            if name not in names:
                raise FieldError("tool_choice", f"{name!r} is none of the tools")
        _ = self.tool_characters
        if self.calls_tools:
            if self.ignore_eos:
                raise FieldError("ignore_eos", "tools say where the text ends; leave one out")
            if self.grammar is not None and self.grammar.grammar.kind != "json_schema":
                raise FieldError(
                    self.grammar.param, "goes without tools; only JSON can be an answer beside them"
                )
        if self.continue_final_message and self.add_generation_prompt:
            raise FieldError("continue_final_message", "goes without add_generation_prompt")
        if self.continue_final_message and self.instruction:
            raise FieldError("continue_final_message", "goes without instruction")
        return self

    @property
    def functions(self) -> list[Any]:
        """Functions that the tools are."""
        return [tool["function"] for tool in self.tools or ()]

    @cached_property
    def tool_characters(self) -> int:
        """Length of the tools as JSON, in characters. Known once the request is validated."""
        return len(json.dumps(self.tools)) if self.tools else 0

    @property
    def calls_tools(self) -> bool:
        """Whether the answer may call a tool."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def must_call(self) -> bool:
        choice = self.tool_choice
        return choice == "required" if isinstance(choice, str | None) else choice.must_call

    @property
    def named_tool(self) -> str | None:
        """The one tool that is to be called, if it is named."""
        choice = self.tool_choice
        return choice.names[0] if not isinstance(choice, str | None) and choice.type == "function" else None

    @property
    def callable_names(self) -> list[str]:
        """Names of the tools that may be called."""
        choice = self.tool_choice
        if isinstance(choice, str | None):
            return [function["name"] for function in self.functions]
        return choice.names


class GenerateRequest(ConversationFields):
    """Body of POST /generate: a prompt or messages, an adapter or none, and how to sample."""

    default_tokens: ClassVar[int | None] = None
    """Limit of new tokens where neither the request nor its adapter says one; None: the server's."""

    prompt: str | None = None
    messages: Messages | None = None
    logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description="alternatives per token, besides the chosen one"
    )
    echo: bool | None = Field(default=None, description="begin the text with the prompt")

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        self.check_prompt()
        return self

    def check_prompt(self) -> None:
        """Raise FieldError unless there is a prompt or a conversation, with what goes with it."""
        if (self.prompt is None) == (self.messages is None):
            raise FieldError("prompt", "give either prompt or messages")
        if self.messages is None:
            for name in ConversationFields.model_fields.keys() - SamplingBody.model_fields.keys():
                if getattr(self, name):
                    raise FieldError(name, f"{name} goes with messages only")
        if self.echo and self.calls_tools:
            raise FieldError("echo", "echo goes without tools")


def _or_why_not(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Return the validated request, or the error that it alone gets."""
    try:
        return validate(value)
    except ValidationError as error:
        message, param = validation_error(error.errors())
        return InvalidRequestError(message, param=param)


class OneOfMany(GenerateRequest):
    """One request of POST /generate/many. Its prompt or messages may be those that all of them share."""

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        return self

    def about(self, prompt: str | None, messages: Messages | None) -> Self:
        """Return the request with the shared prompt or messages, if there are some.

        Raises FieldError.
        """
        if prompt is None and messages is None:
            shared: dict[str, Any] = {}
        elif self.prompt is not None or self.messages is not None:
            name = "messages" if self.prompt is None else "prompt"
            raise FieldError(name, "the requests share one; leave it out here, or leave that out")
        elif prompt is not None:
            shared = {"prompt": prompt + (self.instruction or ""), "instruction": None}
        else:
            shared = {"messages": messages}
        joined = self.model_copy(update=shared)
        joined.check_prompt()
        return joined


class GenerateManyRequest(Wire):
    """Body of POST /generate/many: bodies of POST /generate. What is wrong with one is its own error."""

    prompt: str | None = Field(default=None, description="text that all of them continue")
    messages: Messages | None = Field(default=None, description="conversation that all of them are about")
    stream: bool | None = Field(default=None, description="true by default; false: one answer, with all")
    requests: Annotated[
        list[Annotated[OneOfMany, WrapValidator(_or_why_not)]],
        Field(min_length=1, max_length=MAX_MANY, fail_fast=True),
    ]

    @model_validator(mode="after")
    def _check_shared(self) -> Self:
        if self.prompt is not None and self.messages is not None:
            raise FieldError("prompt", "give either prompt or messages")
        return self

    @property
    def bodies(self) -> list[GenerateRequest | InvalidRequestError]:
        """Requests in their order, each validated or refused."""
        return [self._body(one) for one in self.requests]

    def _body(self, one: OneOfMany | InvalidRequestError) -> GenerateRequest | InvalidRequestError:
        if isinstance(one, InvalidRequestError):
            return one
        try:
            return one.about(self.prompt, self.messages)
        except FieldError as error:
            return InvalidRequestError(f"{error.param}: {error}.", param=error.param)
