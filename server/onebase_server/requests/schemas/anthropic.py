"""The wire models of Anthropic's Messages API, each of which is a chat request in other words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from onebase_edge.errors import InvalidRequestError
from onebase_server.inference.thoughts import ThoughtFormat
from onebase_server.requests.schemas.generation import (
    MAX_GRAMMAR_CHARACTERS,
    MAX_TOKENS,
    GrammarField,
    SamplingBody,
    Stops,
)
from onebase_server.requests.schemas.messages import MAX_MESSAGES, MAX_TOOLS, FunctionName, a_function
from onebase_server.requests.schemas.openai import ChatRequest
from onebase_server.requests.schemas.wire import (
    BY_KIND,
    LIST,
    MAX_NAME,
    ONE,
    FieldError,
    JsonSchema,
    Name,
    Tolerant,
    Typed,
    Wire,
    of_type,
    rebuilt,
)

Json = dict[str, Any]
CallId = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
_BETWEEN_TURNS = "\n\n"
"""Separator of what one side says in turns that follow each other: to templates they are one."""
_FAILED = "Error: "
"""Prefix of the result of a tool that failed: templates have no other place for it."""


# ---- what is said ------------------------------------------------------------------------------


class _Block(Tolerant):
    ignored: ClassVar = frozenset({"cache_control"})


class TextBlock(_Block):
    type: Literal["text"]
    text: str

    neutral: ClassVar = {"citations": ([],)}


class ToolUseBlock(_Block):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    id: CallId
    name: FunctionName
    input: JsonSchema

    neutral: ClassVar = {"caller": ({"type": "direct"},), "toolset_name": ()}

    def rendered(self) -> Json:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.input}}


class ThinkingBlock(_Block):
    """Thought before an answer of the assistant. The signature is not checked."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(_Block):
    """Thought that only another model can read."""

    type: Literal["redacted_thinking"]
    data: str


_ONLY_TEXT = of_type("text", otherwise="only text is")
TextBlocks = Annotated[list[Annotated[TextBlock, _ONLY_TEXT]], Field(max_length=MAX_MESSAGES, fail_fast=True)]
TextOrBlocks = Annotated[Annotated[str, ONE] | Annotated[TextBlocks, LIST], BY_KIND]


def _text(content: str | Sequence[object]) -> str:
    """Return a text as it is, and of blocks all that is text."""
    if isinstance(content, str):
        return content
    return "".join(block.text for block in content if isinstance(block, TextBlock))


class ToolResultBlock(_Block):
    """Result of a tool."""

    type: Literal["tool_result"]
    tool_use_id: CallId
    content: TextOrBlocks | None = None
    is_error: bool | None = None

    neutral: ClassVar = {"toolset_name": ()}

    @property
    def text(self) -> str:
        return (_FAILED if self.is_error else "") + _text(self.content or "")


def _type_of(value: Any) -> Any:
    """Return the type of a block; for anything else, the type whose error is the clearest."""
    found = value.get("type", "text") if isinstance(value, dict) else getattr(value, "type", "text")
    return found if isinstance(found, str) else "text"


_THOUGHTS = ("thinking", "redacted_thinking")
_BLOCKS = ("text", "tool_use", "tool_result", *_THOUGHTS)
AnyBlock = Annotated[
    Annotated[TextBlock, Tag("block-text")]
    | Annotated[ToolUseBlock, Tag("block-tool_use")]
    | Annotated[ToolResultBlock, Tag("block-tool_result")]
    | Annotated[ThinkingBlock, Tag("block-thinking")]
    | Annotated[RedactedThinkingBlock, Tag("block-redacted_thinking")],
    Discriminator(lambda value: f"block-{_type_of(value)}"),
    of_type(*_BLOCKS, otherwise=f"only {', '.join(_BLOCKS)} are"),
]
AnyBlocks = Annotated[list[AnyBlock], Field(max_length=MAX_MESSAGES, fail_fast=True)]
_SPOKEN_BY: dict[str, tuple[str, ...]] = {
    "user": ("tool_result", "text"),
    "assistant": ("text", "tool_use"),
    "system": ("text",),
}
"""The blocks of each role, in the order in which templates write them. The assistant's thoughts may stand
anywhere."""


class Turn(Wire):
    """One turn of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[Annotated[str, ONE] | Annotated[AnyBlocks, LIST], BY_KIND]

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        order, last = _SPOKEN_BY[self.role], 0
        for index, block in enumerate(self.blocks):
            if self.role == "assistant" and block.type in _THOUGHTS:
                continue
            if block.type not in order:
                raise FieldError(
                    f"content[{index}].type", f"{block.type!r} is no part of what the {self.role} says"
                )
            place = order.index(block.type)
            if place < last:
                raise FieldError(
                    f"content[{index}]", f"a {block.type} comes before each {order[last]} of its message"
                )
            last = place
        return self

    @property
    def blocks(
        self,
    ) -> Sequence[TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock]:
        return () if isinstance(self.content, str) else self.content

    @property
    def calls(self) -> list[ToolUseBlock]:
        return [block for block in self.blocks if isinstance(block, ToolUseBlock)]

    @property
    def results(self) -> list[tuple[int, ToolResultBlock]]:
        """Results of tools, with their places among the blocks."""
        return [(at, block) for at, block in enumerate(self.blocks) if isinstance(block, ToolResultBlock)]

    @property
    def thought(self) -> str:
        return _BETWEEN_TURNS.join(
            block.thinking for block in self.blocks if isinstance(block, ThinkingBlock)
        )

    def messages(self, called: dict[str, str]) -> Iterator[Json]:
        """Yield the turn as OpenAI's messages. called: the names of tools by the ids of their calls."""
        for _, result in self.results:
            known = {"tool_call_id": result.tool_use_id, "name": called[result.tool_use_id]}
            yield {"role": "tool", "content": result.text, **known}
        text, calls = _text(self.content), [call.rendered() for call in self.calls]
        if text or calls or not self.results:
            made = {"role": self.role, "content": text} | ({"tool_calls": calls} if calls else {})
            yield made | ({"reasoning_content": self.thought} if self.thought else {})


# ---- tools -------------------------------------------------------------------------------------

_FIELD_OF = {
    "function.name": "name",
    "function.description": "description",
    "function.strict": "strict",
    "function.parameters": "input_schema",
}


class Tool(_Block):
    """A function that may be called, which OpenAI's clients write otherwise."""

    name: str
    description: str | None = None
    input_schema: JsonSchema
    strict: bool | None = None
    type: Literal["custom"] | None = None

    ignored: ClassVar = _Block.ignored | {"eager_input_streaming"}
    neutral: ClassVar = {
        "allowed_callers": (["direct"],),
        "defer_loading": (False,),
        "input_examples": ([],),
    }
    reasons: ClassVar = {"input_examples": "put them into the description"}

    @cached_property
    def function(self) -> Json:
        """The function in OpenAI's form. Raises FieldError."""
        parts = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        try:
            return a_function({"type": "function", "function": {**parts, "strict": self.strict}})
        except FieldError as error:
            raise FieldError(_FIELD_OF[error.param], str(error)) from error

    @model_validator(mode="after")
    def _check_function(self) -> Self:
        _ = self.function
        return self


class MessageToolChoice(Typed):
    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None

    goes_with: ClassVar = {"name": "tool"}

    def chat_fields(self) -> Json:
        """Return the choice as fields of OpenAI's chat request."""
        named = {"type": "function", "function": {"name": self.name}}
        choice = {"any": "required", "tool": named}.get(self.type, self.type)
        alone = {"parallel_tool_calls": False} if self.disable_parallel_tool_use else {}
        return {"tool_choice": choice, **alone}


# ---- what the answer is to be ------------------------------------------------------------------


class OutputFormat(Wire):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    schema_: JsonSchema = Field(alias="schema")

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if len(json.dumps(self.schema_)) > MAX_GRAMMAR_CHARACTERS:
            raise FieldError("schema", f"has more than {MAX_GRAMMAR_CHARACTERS} characters")
        return self


class OutputConfig(Tolerant):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="changes nothing where the base's chat template does not ask for it"
    )
    format: OutputFormat | None = None


class ThinkingConfig(Typed):
    """Whether to think before the answer."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = Field(
        default=None,
        ge=1,
        le=MAX_TOKENS,
        description="most tokens of the thought; changes nothing where the base's chat template has no token "
        "that ends thoughts",
    )
    display: Literal["summarized", "omitted"] | None = Field(
        default=None, description="omitted: the thought's text is not sent"
    )


class ContextManagement(Wire):
    """Edits of a conversation. Those of thoughts change nothing: the base's chat template drops old ones."""

    edits: list[JsonSchema] | None = None

    @model_validator(mode="after")
    def _check_edits(self) -> Self:
        for index, edit in enumerate(self.edits or ()):
            if not str(edit.get("type")).startswith("clear_thinking_"):
                raise FieldError(
                    f"edits[{index}].type", "only edits of thinking (clear_thinking_...) are served"
                )
        return self


class _Chat(ChatRequest):
    """A chat request that came as another one. schema_param: the field of that one which held its schema."""

    needs_budget: ClassVar[bool] = False
    schema_param: str | None = None

    @cached_property
    def grammar(self) -> GrammarField | None:
        found = super().grammar
        if found is None or self.response_format is None or self.schema_param is None:
            return found
        return replace(found, param=self.schema_param)


def _of_one_side(messages: Sequence[Json]) -> list[list[Json]]:
    """Group the messages that are one turn to templates. A tool's message begins another, and so does one
    after a call."""
    groups: list[list[Json]] = []
    for message in messages:
        last = groups[-1][-1] if groups else {}
        if last.get("role") == message["role"] != "tool" and "tool_calls" not in last:
            groups[-1].append(message)
        else:
            groups.append([message])
    return groups


def _joined(messages: Sequence[Json]) -> Json:
    joined = dict(messages[-1])
    for key in ("content", "reasoning_content"):
        if parts := [part for message in messages if (part := message.get(key))]:
            joined[key] = _BETWEEN_TURNS.join(parts)
    return joined


def _threads_not_served() -> InvalidRequestError:
    """Return the refusal of a conversation that the server is to keep.

    Anthropic's clients know it by its code, and send the whole conversation instead.
    """
    error = InvalidRequestError(
        "thread: this server keeps no conversations. Send all messages, without thread.",
        param="thread",
        code="thread_unsupported_request",
    )
    error.details = {"unsupported": ["thread"]}
    return error


class ConversationRequest(Tolerant):
    """Body of POST /v1/messages/count_tokens, whose fields POST /v1/messages has too."""

    model: Name
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: TextOrBlocks | None = None
    tools: (
        Annotated[
            list[Annotated[Tool, of_type("custom", otherwise="only tools of your own are")]],
            Field(max_length=MAX_TOOLS, fail_fast=True),
        ]
        | None
    ) = None
    tool_choice: MessageToolChoice | None = None
    thinking: ThinkingConfig | None = Field(
        default=None, description="disabled by default, where the base's chat template has a switch"
    )
    context_management: ContextManagement | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(default=None, description="older than output_config.format")
    chat_template_kwargs: Annotated[JsonSchema, Field(max_length=64)] | None = Field(
        default=None, description="this server's: more variables of the base's chat template"
    )

    metadata: Any = Field(default=None, description="its user_id: see `user`")

    ignored: ClassVar = frozenset({"cache_control", "service_tier", "user_profile_id"})
    neutral: ClassVar = {
        "container": (),
        "diagnostics": (),
        "inference_geo": (),
        "mcp_servers": ([],),
        "speed": ("standard",),
    }

    thread: JsonSchema | None = Field(default=None, description="a conversation that is kept: refused")
    adapter_defaults: bool | None = Field(
        default=None, description="false: without the defaults that the adapter came with"
    )

    @model_validator(mode="after")
    def _check_conversation(self) -> Self:
        called: set[str] = set()
        for index, turn in enumerate(self.messages):
            for place, result in turn.results:
                if result.tool_use_id not in called:
                    raise FieldError(
                        f"messages[{index}].content[{place}].tool_use_id",
                        "is the id of no tool_use before it",
                    )
            called |= {call.id for call in turn.calls}
        last, param = self.messages[-1], f"messages[{len(self.messages) - 1}]"
        if last.role == "assistant":
            if last.calls:
                raise FieldError(param, "calls a tool: a message with its tool_result comes next")
            if not _text(last.content).strip():
                raise FieldError(param, "is empty: there is nothing to continue. Leave it out")
        if self.output_format is not None and self.output_config is not None and self.output_config.format:
            raise FieldError("output_format", "output_config says what the text must be; leave one out")
        return self

    def chat(self, format: ThoughtFormat | None) -> ChatRequest:
        """Return the same request as OpenAI's clients write it.

        format: of the base's thoughts, if it thinks.

        Raises InvalidRequestError.
        """
        if self.thread is not None:
            raise _threads_not_served()
        return rebuilt(_Chat, self._chat_fields(format))

    def _chat_fields(self, format: ThoughtFormat | None) -> Json:
        fields: Json = {"model": self.model, "messages": self._chat_messages()}
        if self.messages[-1].role == "assistant":
            fields["continue_final_message"] = True
        if self.tools is not None:
            fields["tools"] = [tool.function for tool in self.tools]
        if self.tool_choice is not None:
            fields |= self.tool_choice.chat_fields()
        if self.output_config is not None:
            fields["reasoning_effort"] = self.output_config.effort
        options = dict(self.chat_template_kwargs or {})
        thinks = self.thinking is not None and self.thinking.type != "disabled"
        switch = None if format is None else format.switch
        effort = fields.get("reasoning_effort")
        named = thinks and effort is not None and switch is not None and switch.name == "reasoning_effort"
        if switch is not None and thinks != switch.default and not named:
            options.setdefault(switch.name, switch.on if thinks else switch.off)
        budget = self.thinking.budget_tokens if self.thinking is not None and thinks else None
        if format is not None and format.budget is not None and budget is not None:
            options.setdefault(format.budget, budget)
        # Whether the prompt opens the thought is known when it is there; here, whether a token ends thoughts.
        if format is not None and budget is not None and format.bounded(budget, opened=True) is not None:
            fields["thinking_token_budget"] = budget
        return fields | {"chat_template_kwargs": options} | self._format_fields()

    @property
    def hides_thoughts(self) -> bool:
        """Return True if the answer's thought is to have no text."""
        return self.thinking is not None and self.thinking.display == "omitted"

    def _chat_messages(self) -> list[Json]:
        system = _text(self.system or "")
        said: list[Json] = [{"role": "system", "content": system}] if system else []
        called: dict[str, str] = {}
        for turn in self.messages:
            said += turn.messages(called)
            called |= {call.id: call.name for call in turn.calls}
        return [_joined(group) for group in _of_one_side(said)]

    def _format_fields(self) -> Json:
        within = self.output_config.format if self.output_config is not None else None
        wanted = within or self.output_format
        if wanted is None:
            return {}
        return {
            "response_format": {"type": "json_schema", "json_schema": {"schema": wanted.schema_}},
            "schema_param": "output_config.format.schema" if within else "output_format.schema",
        }


_NAMES_HERE = {"stop": "stop_sequences", "response_format": "output_config.format"}


class MessagesRequest(ConversationRequest, SamplingBody):
    """Body of POST /v1/messages, with the sampling fields of POST /generate besides."""

    max_tokens: int = Field(ge=1, le=MAX_TOKENS)
    stop_sequences: Stops | None = None

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for name, here in _NAMES_HERE.items():
            if getattr(self, name) is not None:
                raise FieldError(name, f"is called {here} here")
        if self.n not in (None, 1):
            raise FieldError("n", "a message is one answer. Send the request again for another")
        return self

    def _chat_fields(self, format: ThoughtFormat | None) -> Json:
        given = {name: getattr(self, name) for name in SamplingBody.model_fields.keys() - {"stream"}}
        if self.user is None and isinstance(self.metadata, dict):
            given["user"] = self.metadata.get("user_id")
        return given | {"stop": self.stop_sequences} | super()._chat_fields(format)
