"""Requests and answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypedDict

from onebase_protocol.access import ApiKey, AuditEntry, CallerAnswer, NewApiKey, Tenant, TenantUsage
from onebase_protocol.reading import Decision, Option, ReadingUsage
from onebase_protocol.request_log import (
    LogErased,
    LoggedAdapter,
    LoggedAnswer,
    LoggedRequest,
    Replay,
    ReplayedChoice,
)
from onebase_protocol.serving import Model
from onebase_protocol.text import AdapterWeight, Logprobs, Timing, Usage

__all__ = [
    "AdapterSpec",
    "AdapterWeight",
    "ApiKey",
    "AuditEntry",
    "CallerAnswer",
    "Choice",
    "Classification",
    "Decision",
    "Embeddings",
    "Generation",
    "Health",
    "Label",
    "LogErased",
    "LoggedAdapter",
    "LoggedAnswer",
    "LoggedRequest",
    "Logprobs",
    "Message",
    "Messages",
    "Model",
    "NewApiKey",
    "Option",
    "Piece",
    "Ranked",
    "Replay",
    "ReplayedChoice",
    "SamplingFields",
    "ServerVersion",
    "Tenant",
    "TenantUsage",
    "Timing",
    "ToolCall",
    "ToolCallPart",
    "Usage",
]


@dataclass(frozen=True)
class ToolCall:
    """A function that the answer calls: run it, and append its result as a message of role `tool`."""

    id: str
    name: str
    arguments: str
    """JSON of an object, cut off where the answer ended within it: by max_tokens or a stop string."""

    @property
    def values(self) -> dict[str, Any]:
        """The arguments by name.

        Raises:
            ValueError: the answer ended before they did.
        """
        made: dict[str, Any] = json.loads(self.arguments)
        return made

    def result(self, content: str) -> Message:
        """Return the message that says what came of the call."""
        return Message("tool", content, tool_call_id=self.id)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """`system`, `user`, `assistant` or `tool`, as the base's chat template knows them."""
    content: str
    tool_calls: Sequence[ToolCall] = ()
    """Calls of an assistant's message."""
    tool_call_id: str | None = None
    """Id of the call that a message of role `tool` answers."""
    reasoning: str = ""
    """Thought before an assistant's content, for bases whose chat template writes it again."""


AdapterSpec: TypeAlias = str | Mapping[str, float] | Sequence[AdapterWeight | Mapping[str, object]] | None
"""An adapter, a weighted sum of several, or None for the base. `"acme"` or `"acme@3f2a..."` is one adapter;
`"hub:org/repo@revision"` is pulled on first use where the server's `--hub-allow` permits it. `{"acme": 0.7,
"legal": 0.3}`, or a sequence of AdapterWeight (or of the same as dicts), is a sum."""

Messages: TypeAlias = str | Sequence[Message | Mapping[str, Any]]
"""A conversation; a plain string is one message from the user."""


class SamplingFields(TypedDict, total=False):
    """Settings for choosing tokens. A field that is missing has the server's default, given here."""

    temperature: float
    """Sampling temperature: 0 always takes the likeliest token, higher is more varied (default: 1.0)."""
    top_k: int
    """Number of likeliest tokens to choose among (default: 0, off)."""
    top_p: float
    """Least joint probability of the likeliest tokens to choose among (default: 1.0, off)."""
    min_p: float
    """Least probability of a token, as a fraction of the likeliest one's (default: 0, off)."""
    repetition_penalty: float
    """Penalty of tokens in the prompt and the answer so far: above 1 makes them less likely (default: 1.0,
    off)."""
    presence_penalty: float
    """Penalty subtracted from the logit of each token that the answer already has (default: 0, off)."""
    frequency_penalty: float
    """Penalty subtracted once for each time the answer already has the token (default: 0, off)."""
    logit_bias: Mapping[int, float]
    """Added to the logits of these token ids."""
    seed: int | None
    """Seed of the sampling (default: None, a new one each time). The same request and seed give the same
    text."""
    stop: str | Sequence[str]
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: Sequence[int]
    """Token ids that end the answer; they are not part of it."""
    min_tokens: int
    """Least number of tokens before the answer may end (default: 0)."""
    max_tokens: int
    """Largest number of tokens in the answer (default: 256)."""
    adapter_defaults: bool
    """Whether the defaults that came with the adapter apply, which are then those of the fields here, of the
    system message and of others (default: True)."""
    ignore_eos: bool
    """Whether to continue after the end-of-sequence token (default: False)."""
    n: int
    """Number of answers to the same prompt (default: 1)."""
    logprobs: int | None
    """Number of alternatives whose log-probabilities are returned with each token's own (default: None, not
    even the token's own)."""
    echo: bool
    """Whether the text begins with the prompt, and with `logprobs` has the prompt's too (default: False)."""
    schema: object
    """Schema of a JSON answer: a JSON schema, a pydantic model or a pydantic TypeAdapter (default: None, any
    text). `Generation.parsed` is then the value, or the model's instance."""
    regex: str
    """Regular expression that the whole answer matches (default: None, any text)."""
    choices: Sequence[str]
    """Texts of which the answer is one (default: None, any text)."""
    grammar: str
    """Grammar of the answer, in Lark's notation or GBNF (default: None, any text)."""
    tools: Sequence[Mapping[str, Any]]
    """Functions that the answer to a conversation may call, as OpenAI writes them (default: None): `{"type":
    "function", "function": {"name": ..., "description": ..., "parameters": a JSON schema}}`."""
    tool_choice: str | Mapping[str, Any]
    """Choice of tools: `auto`, `none`, `required` (at least one call), or one tool as `{"type": "function",
    "function": {"name": ...}}` (default: `auto`)."""
    parallel_tool_calls: bool
    """Whether an answer may have several calls (default: True)."""
    chat_template_kwargs: Mapping[str, Any]
    """Further variables of the base's chat template, such as `{"enable_thinking": False}` (default: None)."""
    thinking_token_budget: int
    """Largest number of tokens of the thought before an answer, which is then ended (default: None, as many
    as `max_tokens` allows). Refused where the base has no token that ends thoughts."""
    continue_final_message: bool
    """Whether the answer continues the last message of the conversation (default: False)."""
    instruction: str
    """One more message of the user at the end of the conversation (default: the adapter's own, or none)."""

    timeout_s: float | None
    """Time, in seconds, after which the server ends the request by itself (default: None, no limit)."""
    user: str
    """Person or session that asks (default: None). During a rollout each is answered by one version."""


@dataclass(frozen=True)
class Embeddings:
    """Vectors of texts."""

    vectors: tuple[tuple[float, ...], ...]
    """One of each text, in their order."""
    usage: ReadingUsage


@dataclass(frozen=True)
class Label:
    """Result of a classifier for a text, or for one of its tokens."""

    label: str
    """The likeliest."""
    probabilities: tuple[float, ...]
    """Probabilities of all labels. For a classifier with one label, how much it holds."""
    token: str | None = None


@dataclass(frozen=True)
class Classification:
    """Result of a classifier for one text."""

    label: Label | None
    """Label of the text; None for a classifier of tokens."""
    tokens: tuple[Label, ...] = ()


@dataclass(frozen=True)
class Ranked:
    """A document, and how near it is to the query."""

    index: int
    """Index among the documents that were sent."""
    text: str
    score: float


@dataclass(frozen=True)
class Choice:
    """One answer to the prompt."""

    index: int
    text: str
    finish_reason: str
    """`stop` (its natural end, or a stop string or token), `tool_calls`, `length` (max_tokens, or no room
    left), `cancelled` or `error`."""
    logprobs: Logprobs | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls of the answer, in order; `text` is what it says besides."""
    reasoning: str = ""
    """Thought before the text, if the base thinks."""


@dataclass(frozen=True)
class Generation:
    """A complete answer."""

    id: str
    choices: tuple[Choice, ...]
    adapter: str | tuple[AdapterWeight, ...] | None
    """Adapter that answered: None is the base, `name@digest` an exact version, a tuple a weighted sum."""
    usage: Usage
    timing: Timing
    schema: object = field(default=None, repr=False, compare=False)
    """Schema that the request gave."""

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text

    @property
    def reasoning(self) -> str:
        """The thought before the first choice's text; empty if the base does not think."""
        return self.choices[0].reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Calls of the first choice."""
        return self.choices[0].tool_calls

    @property
    def parsed(self) -> Any:
        """Value of the first choice's JSON: an instance of the pydantic model that was given as `schema`, or
        dicts, lists, strings and numbers.

        Raises:
            ValueError: it is not whole, since it ended by max_tokens, by a stop string or by the time; or
                it was not asked for by a `schema` and is no JSON; or the model refuses it by a rule that
                JSON schemas do not have.
        """
        choice = self.choices[0]
        if choice.finish_reason != "stop":
            raise ValueError(f"the answer is not whole ({choice.finish_reason!r}): raise max_tokens")
        try:
            value = json.loads(choice.text)
        except ValueError as error:
            reason = "no schema was given" if self.schema is None else "a stop string or echo changed it"
            raise ValueError(f"the answer is no JSON ({reason}): {error}") from error
        for method in ("model_validate_json", "validate_json"):
            validate = getattr(self.schema, method, None)
            if callable(validate):
                return validate(choice.text)
        return value

    @property
    def message(self) -> Message:
        """The first choice as the assistant's turn, ready to be appended to the conversation."""
        return Message("assistant", self.text, self.tool_calls, reasoning=self.reasoning)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first of each choice, per second of decoding; None when there are none."""
        tokens = self.usage.completion_tokens - len(self.choices)
        if tokens <= 0 or self.timing.decode_s <= 0:
            return None
        return tokens / self.timing.decode_s


@dataclass(frozen=True)
class Piece:
    """A part of one choice's text, as it streams."""

    index: int
    """Index among the `n` choices."""
    text: str
    finish_reason: str | None = None
    """Reason of the end, on the last piece of a choice, whose text may be empty; see Choice."""
    logprobs: Logprobs | None = None
    tool_calls: tuple[ToolCallPart, ...] = ()
    reasoning: str = ""
    """Part of the thought, which comes before all text."""


@dataclass(frozen=True)
class ToolCallPart:
    """Next part of a call; the first part of each has its id and name."""

    index: int
    """Index among the choice's calls."""
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Health:
    """Whether the server can do its work right now."""

    ok: bool
    status: str
    """State in a word or a sentence: `ok`, `ready`, `stopping`, ..."""
    engine: str | None = None
    """The state of the engine, such as `ready`, `loading` or `stalled`."""


@dataclass(frozen=True)
class ServerVersion:
    """Version of the server."""

    version: str
    details: Mapping[str, object]
    """Everything that the server said, its `version` included."""
