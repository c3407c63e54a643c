"""The wire models of /v1/responses: OpenAI's newer way to ask for an answer."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    PrivateAttr,
    model_validator,
)

from onebase_engine.engine.messages import Grammar
from onebase_server.requests.schemas.generation import (
    ANY_OBJECT,
    MAX_LOGPROBS,
    MAX_TOKENS,
    ConversationFields,
    of_schema,
)
from onebase_server.requests.schemas.items import CUSTOM_INPUT, Items, MessageItem
from onebase_server.requests.schemas.messages import (
    MAX_TOOLS,
    FunctionName,
    tool_of,
)
from onebase_server.requests.schemas.openai import DEFAULTS, IGNORED, OpenAIRequest, Verbosity
from onebase_server.requests.schemas.wire import (
    BY_KIND,
    LIST,
    MAX_NAME,
    OBJECT,
    ONE,
    UNKNOWN_FIELD,
    FieldError,
    JsonSchema,
    Name,
    Typed,
    Wire,
    check_type,
    not_too_deep,
    of_type,
)

MAX_METADATA = 16
LOGPROBS = "message.output_text.logprobs"
_DEFAULTS_OF_TOOLS: dict[str, JsonValue] = {
    "async": False,
    "defer_loading": False,
    "allowed_callers": ["direct"],
}


_RUN_AT_OPENAI = frozenset({"web_search", "web_search_preview", "tool_search", "image_generation"})
"""Tools that OpenAI's service runs by itself, which nothing in the answer need make use of."""


def _tools_of_the_caller(tools: Any) -> Any:
    """Return a list of tools with those of its namespaces in their places, each with its namespace.

    Tools that OpenAI's service runs are left out if there are others: a model may leave each of them alone.
    """
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        return tools
    flat: list[Any] = []
    for tool in tools:
        inner = tool.get("tools") if isinstance(tool, dict) and tool.get("type") == "namespace" else None
        if isinstance(inner, list) and all(isinstance(one, dict) for one in inner):
            flat += [{**one, "namespace": tool.get("name")} for one in inner]
        else:
            flat.append(tool)
    own = [tool for tool in flat if not isinstance(tool, dict) or tool.get("type") not in _RUN_AT_OPENAI]
    return own or flat


_CUSTOM_SCHEMA: dict[str, JsonValue] = {
    "type": "object",
    "properties": {CUSTOM_INPUT: {"type": "string"}},
    "required": [CUSTOM_INPUT],
    "additionalProperties": False,
}
"""Parameters of the function that the model sees in the place of a custom tool."""


def _function_of_custom(tool: dict[str, Any]) -> dict[str, Any]:
    """Return the function that a custom tool is for the model: one with a text. Raises FieldError."""
    form = tool.get("format")
    kind = form.get("type") if isinstance(form, dict) else form
    if kind not in (None, "text") or (isinstance(form, dict) and form.keys() - {"type"}):
        raise FieldError(
            "format", "only free text is served ({'type': 'text'}): describe the form in the description"
        )
    rest = {key: value for key, value in tool.items() if key != "format"}
    return {**rest, "type": "function", "parameters": _CUSTOM_SCHEMA, "strict": True}


def _a_flat_function(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool in the form for chat templates, with its namespace if it has one, and whether it is a
    custom one. Raises FieldError."""
    check_type(tool, "function", "custom", otherwise="only tools of type 'function' and 'custom' are")
    if tool.get("type") == "custom":
        for field in ("parameters", "strict"):
            if tool.get(field) is not None:
                raise FieldError(field, "goes with a tool of type 'function'")
        return _a_flat_function(_function_of_custom(tool)) | {"custom": True}
    known = {"name", "description", "parameters", "strict"}
    function = {}
    for key, value in tool.items():
        if key in known:
            function[key] = value
        elif key not in ("type", "namespace") and value is not None and _DEFAULTS_OF_TOOLS.get(key) != value:
            raise FieldError(key[:MAX_NAME], UNKNOWN_FIELD)
    namespace, name = tool.get("namespace"), function.get("name")
    if namespace is None:
        return tool_of(function, "")
    if not isinstance(namespace, str):
        raise FieldError("namespace", "must be a text")
    function["name"] = f"{namespace}.{name}" if isinstance(name, str) else name
    return tool_of(function, "") | {"namespace": namespace}


FlatTool = Annotated[dict[str, JsonValue], BeforeValidator(not_too_deep), AfterValidator(_a_flat_function)]


FlatTools = Annotated[list[FlatTool], Field(max_length=MAX_TOOLS, fail_fast=True)]


class FlatNamedTool(Wire):
    type: Literal["function", "custom"]
    name: FunctionName


class FlatToolChoice(Typed):
    """Choice of tools: one that must be called, or several of which any may be."""

    type: Literal["function", "custom", "allowed_tools"]
    name: FunctionName | None = None
    mode: Literal["auto", "required"] | None = None
    tools: (
        Annotated[list[FlatNamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)] | None
    ) = None

    goes_with: ClassVar = {"mode": "allowed_tools", "tools": "allowed_tools"}

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if (self.name is None) != (self.type == "allowed_tools"):
            raise FieldError("name", "name goes with type function or custom, and only with them")
        return self

    @property
    def must_call(self) -> bool:
        return self.mode != "auto"

    @property
    def names(self) -> list[str]:
        """Names of the tools that may be called."""
        return [tool.name for tool in self.tools or ()] if self.name is None else [self.name]


_CHOICE_OF_TOOLS = of_type(
    "function", "custom", "allowed_tools", otherwise="only function, custom and allowed_tools are"
)


class TextFormat(Typed):
    """Form of the text: anything, a JSON object, or JSON that a schema describes."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: str | None = None
    schema_: JsonSchema | None = Field(default=None, alias="schema")
    strict: bool | None = None

    goes_with: ClassVar = {"schema_": "json_schema"}


class TextConfig(Wire):
    format: TextFormat | None = None
    verbosity: Verbosity | None = Field(default=None, description="changes nothing")


class Reasoning(Wire):
    """Amount of thinking, if the base's chat template knows of it. Thoughts are sent whole."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
"""Values of `include`. All but the first are about items that no answer has."""


def _few_entries(metadata: Any) -> Any:
    """Refuse too many entries before they are looked at one by one."""
    if isinstance(metadata, dict) and len(metadata) > MAX_METADATA:
        raise ValueError(f"should have at most {MAX_METADATA} entries, and has {len(metadata)}")
    return metadata


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    BeforeValidator(_few_entries),
]


_OTHER_WORDS = {
    "prompt_logprobs": "/v1/chat/completions has it",
    "max_tokens": "it is called max_output_tokens here",
    "response_format": "it is called text.format here",
    "n": "a response has one answer; send the request several times",
    "return_token_ids": "/v1/chat/completions has them",
}
"""Fields of the other routes, and what to do here."""


def _leave_out_other_words(schema: dict[str, Any]) -> None:
    """Remove these fields from the schema that the reference at /docs shows."""
    for name in _OTHER_WORDS:
        del schema["properties"][name]


class ConversationReference(Wire):
    """A conversation of /v1/conversations."""

    id: Name


class ResponsesRequest(OpenAIRequest, ConversationFields):
    """Body of POST /v1/responses."""

    model_config = ConfigDict(json_schema_extra=_leave_out_other_words)

    input: Annotated[Annotated[str, ONE] | Annotated[Items, LIST], BY_KIND]
    instructions: str | None = None
    previous_response_id: Name | None = Field(
        default=None, description="a stored response: the input continues after its input and its output"
    )
    conversation: (
        Annotated[
            Annotated[Name, ONE] | Annotated[ConversationReference, OBJECT],
            Discriminator(lambda value: (OBJECT if isinstance(value, dict) else ONE).tag),
        ]
        | None
    ) = Field(
        default=None,
        description="one of /v1/conversations: the input continues it, and is added to it with the output",
    )
    max_output_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    tools: Annotated[FlatTools, BeforeValidator(_tools_of_the_caller)] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], ONE]
            | Annotated[FlatToolChoice, _CHOICE_OF_TOOLS, OBJECT],
            Discriminator(lambda value: (ONE if isinstance(value, str) else OBJECT).tag),
        ]
        | None
    ) = None  # type: ignore[assignment]  # whoever reads it asks its properties
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: Annotated[list[Includable], Field(max_length=16, fail_fast=True)] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    store: bool | None = Field(default=None, description="keep it, to be gone on from; true by default")
    metadata: Metadata | None = None

    _namespaces: dict[str, str] = PrivateAttr(default_factory=dict)
    _customs: set[str] = PrivateAttr(default_factory=set)

    ignored: ClassVar = IGNORED | {"max_tool_calls", "prompt_cache_options", "client_metadata"}
    neutral: ClassVar = DEFAULTS | {
        "truncation": ("disabled",),
        "background": (False,),
        "background_options": (),
        "context_management": ([],),
        "prompt": (),
        "moderation": (),
        "image": (),
        "access_programs": (),
    }
    reasons: ClassVar = {
        "truncation": "only 'disabled' is served, so shorten the input",
        "background": "the answer comes with the request; use stream",
        "context_management": "shorten the input",
        "prompt": "send its text as instructions",
    }

    @model_validator(mode="after")
    def _check_response(self) -> Self:
        for tool, function in zip(self.tools or (), self.functions, strict=True):
            namespace = tool.pop("namespace", None)
            if tool.pop("custom", False):
                self._customs.add(function["name"])
            if isinstance(namespace, str):
                self._namespaces[function["name"]] = namespace
        for name, hint in _OTHER_WORDS.items():
            value = getattr(self, name)
            if value is not None and value is not False and (name, value) != ("n", 1):
                raise FieldError(name, hint)
        if self.conversation is not None and self.previous_response_id is not None:
            raise FieldError("conversation", "previous_response_id is given too: leave one out")
        return self

    def grammars_by_field(self) -> dict[str, Grammar | None]:
        wanted = self.text.format if self.text is not None else None
        return {
            "text.format": ANY_OBJECT if wanted is not None and wanted.type == "json_object" else None,
            "text.format.schema": of_schema(wanted.schema_ if wanted is not None else None),
            **super().grammars_by_field(),
        }

    @property
    def namespaces(self) -> Mapping[str, str]:
        """Namespaces of functions, by the function's name with its namespace before it."""
        return self._namespaces

    @property
    def customs(self) -> Set[str]:
        """Names of functions that are custom tools, with their namespaces before them."""
        return self._customs

    @property
    def conversation_id(self) -> str | None:
        reference = self.conversation
        return reference.id if isinstance(reference, ConversationReference) else reference

    @property
    def items(self) -> Items:
        if isinstance(self.input, str):
            return [MessageItem(role="user", content=self.input)]
        return self.input

    @property
    def token_limit(self) -> int | None:
        return self.max_output_tokens

    @property
    def logprob_count(self) -> int | None:
        """Number of the likeliest tokens to return besides; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.top_logprobs or LOGPROBS in (self.include or ()) else None

    @property
    def reasoning_effort(self) -> str | None:
        return self.reasoning.effort if self.reasoning is not None else None
