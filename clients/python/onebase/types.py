"""Requests and answers, as frozen dataclasses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypedDict


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
        """The message that says what came of the call."""
        return Message("tool", content, tool_call_id=self.id)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """`system`, `user`, `assistant` or `tool`, as the base's chat template knows them."""
    content: str
    tool_calls: Sequence[ToolCall] = ()
    """What an assistant's message calls."""
    tool_call_id: str | None = None
    """Which call a message of role `tool` answers."""


@dataclass(frozen=True)
class AdapterWeight:
    """One term of a weighted sum of adapters."""

    name: str
    """An adapter's name, or `name@version`."""
    weight: float = 1.0


AdapterSpec: TypeAlias = str | Mapping[str, float] | Sequence[AdapterWeight | Mapping[str, object]] | None
"""None is the base. `"acme"` or `"acme@3f2a..."` is one adapter; `"hub:org/repo@revision"` is pulled on first
use where the server's `--hub-allow` permits it. `{"acme": 0.7, "legal": 0.3}`, or a
sequence of AdapterWeight (or of the same as dicts), is the weighted sum of several."""

Messages: TypeAlias = str | Sequence[Message | Mapping[str, Any]]
"""A conversation; a plain string is one message from the user."""


class SamplingFields(TypedDict, total=False):
    """How tokens are chosen. A field that is left out has the server's default, given here."""

    temperature: float
    """1.0. 0 always takes the likeliest token; higher is more varied."""
    top_k: int
    """0, off. Choose among the k likeliest tokens only."""
    top_p: float
    """1.0, off. Choose among the likeliest tokens that together have this probability."""
    min_p: float
    """0, off. Drop tokens less likely than this fraction of the likeliest one."""
    repetition_penalty: float
    """1.0, off. Above 1 makes tokens of the prompt and the answer so far less likely."""
    presence_penalty: float
    """0, off. Subtracted from the logit of each token that the answer already has."""
    frequency_penalty: float
    """0, off. Subtracted once for each time the answer already has the token."""
    logit_bias: Mapping[int, float]
    """Added to the logits of these token ids."""
    seed: int | None
    """None, a new one each time. The same request and seed give the same text."""
    stop: str | Sequence[str]
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: Sequence[int]
    """Token ids that end the answer; they are not part of it."""
    min_tokens: int
    """0. No end before this many tokens."""
    max_tokens: int
    """256. No more tokens than this."""
    ignore_eos: bool
    """False. Go on after the end-of-sequence token."""
    n: int
    """1. How many answers to the same prompt."""
    logprobs: int | None
    """None, none. The log probability of each token, and those of this many alternatives."""
    echo: bool
    """False. Let the text begin with the prompt; with `logprobs`, also gives the prompt's."""
    schema: object
    """None, any text. The answer is JSON that keeps to this: a JSON schema, a pydantic model or a pydantic
    TypeAdapter. `Generation.parsed` is then the value, or the model's instance."""
    regex: str
    """None, any text. Matches the whole answer."""
    choices: Sequence[str]
    """None, any text. The answer is one of these."""
    grammar: str
    """None, any text. What the answer keeps to, in Lark's notation or GBNF."""
    tools: Sequence[Mapping[str, Any]]
    """None. Functions that the answer to a conversation may call, as OpenAI writes them:
    `{"type": "function", "function": {"name": ..., "description": ..., "parameters": a JSON schema}}`."""
    tool_choice: str | Mapping[str, Any]
    """`auto`. `required`: it calls at least one; `none`; or a tool, as `{"type": "function", "function":
    {"name": ...}}`."""
    parallel_tool_calls: bool
    """True. False: one call an answer at most."""
    chat_template_kwargs: Mapping[str, Any]
    """None. More variables of the base's chat template, such as `{"enable_thinking": False}`."""
    continue_final_message: bool
    """False. The answer goes on where the last message of the conversation ends."""
    timeout_s: float | None
    """None, none. Seconds after which the server ends the request by itself."""


@dataclass(frozen=True)
class Embeddings:
    """Vectors of texts."""

    vectors: tuple[tuple[float, ...], ...]
    """One of each text, in their order."""
    usage: Usage


@dataclass(frozen=True)
class Label:
    """What a classifier says of a text, or of one of its tokens."""

    label: str
    """The likeliest."""
    probabilities: tuple[float, ...]
    """Of all labels. Of a classifier with one label, how much it holds."""
    token: str | None = None


@dataclass(frozen=True)
class Classification:
    """What a classifier says of one text."""

    label: Label | None
    """None of a classifier of tokens."""
    tokens: tuple[Label, ...] = ()


@dataclass(frozen=True)
class Ranked:
    """A document, and how near it is to the query."""

    index: int
    """Its place among the documents that were sent."""
    text: str
    score: float


@dataclass(frozen=True)
class Option:
    """One of the choices of a decision."""

    text: str
    probability: float
    """Among the choices."""
    logprob: float
    """Of the whole text after the prompt."""
    prior_logprob: float | None = None


@dataclass(frozen=True)
class Decision:
    """How likely each of some choices is to come next."""

    choice: str
    """The likeliest."""
    options: tuple[Option, ...]
    """All of them, in the order in which they were sent."""
    usage: Usage


@dataclass(frozen=True)
class Logprobs:
    """Natural-log probabilities, one entry per token in each sequence."""

    tokens: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    token_logprobs: tuple[float | None, ...] = ()
    """None for the first token of an echoed prompt, which nothing precedes."""
    top_logprobs: tuple[Mapping[str, float] | None, ...] = ()
    text_offset: tuple[int, ...] = ()
    """Where each token begins in the text, in characters."""


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
    """What it calls, in order; `text` is what it says besides."""


@dataclass(frozen=True)
class Usage:
    """The tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    """Over all choices."""
    cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""


@dataclass(frozen=True)
class Timing:
    """Where a request's time went, in seconds, measured by the server."""

    queue_s: float
    """Waiting for a place in the batch."""
    ttft_s: float
    """From arrival to the first token."""
    decode_s: float
    """From the first token to the last."""


@dataclass(frozen=True)
class Generation:
    """A complete answer."""

    id: str
    choices: tuple[Choice, ...]
    adapter: str | tuple[AdapterWeight, ...] | None
    """What answered: None is the base, `name@digest` an exact version, a tuple a weighted sum."""
    usage: Usage
    timing: Timing
    schema: object = field(default=None, repr=False, compare=False)
    """As it was asked for."""

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """What the first choice calls."""
        return self.choices[0].tool_calls

    @property
    def parsed(self) -> Any:
        """What the first choice's JSON says: an instance of the pydantic model that was given as `schema`, or
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
        return Message("assistant", self.text, self.tool_calls)

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
    """Which of the `n` choices."""
    text: str
    finish_reason: str | None = None
    """Set on the last piece of a choice, whose text may be empty; see Choice."""
    logprobs: Logprobs | None = None
    tool_calls: tuple[ToolCallPart, ...] = ()


@dataclass(frozen=True)
class ToolCallPart:
    """More of a call: the first part of one has its id and name."""

    index: int
    """Which of the choice's calls."""
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Model:
    """Something that a request can name: the base, or an adapter on it."""

    id: str
    owned_by: str | None = None
    created: int | None = None
    """Unix time in seconds."""


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """What the server knows of an API key. Times are Unix seconds."""

    id: str
    """The public beginning of the key."""
    tenant: str
    name: str
    scopes: tuple[str, ...]
    """What it allows: `generate`, `adapters`, `train`, `admin`."""
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None
    """To the hour."""
    quotas: Mapping[str, int] = field(default_factory=dict, hash=False)
    """`requests` and `tokens` in any 60 seconds, `rows` at once; what is missing is not limited."""
    priority: int = 0
    """-10 to 10: requests of a higher one are served first."""


@dataclass(frozen=True, kw_only=True)
class NewApiKey(ApiKey):
    """A key that was just made."""

    key: str = field(repr=False)
    """The key itself, which nobody can read again."""


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """Whom keys belong to: what it may, and what it has."""

    tenant: str
    quotas: Mapping[str, int] = field(hash=False)
    """As those of a key, and `adapters`, `bytes`, `jobs`, and `training_seconds` in a month (UTC)."""
    adapters: int
    bytes: int
    """Of its versions, as they were sent or trained, of its files, and of the rows of unended jobs."""
    training_seconds: float
    """In this calendar month (UTC)."""


@dataclass(frozen=True, kw_only=True)
class TenantUsage:
    """What was used, by what was grouped. What was not is None, and summed."""

    day: str | None = None
    """In UTC, as 2026-11-26."""
    tenant: str | None = None
    base: str | None = None
    adapter: str | None = None
    """`""` is the base itself, `a+b` a sum of adapters."""
    requests: int
    prompt_tokens: int
    """With those that the prefix cache had."""
    cached_tokens: int
    """Those of `prompt_tokens` that the prefix cache had."""
    completion_tokens: int
    training_seconds: float
    training_tokens: int


@dataclass(frozen=True, kw_only=True)
class AuditEntry:
    """One change that somebody made on the server."""

    id: str
    at: float
    """Unix time in seconds."""
    tenant: str
    """Whose adapter, file, job or key it is."""
    key: str
    """The id of the API key that asked; empty where none is needed."""
    actor: str
    """What acted for it, where that was no request: `job ftjob-...`, `startup`."""
    action: str
    """Such as `adapter.activated`."""
    target: str
    """The adapter's name, or the id of the file, job or key."""
    version: str | None
    """The digest of the adapter's version."""
    base: str | None
    server: str
    request: str
    """The `X-Request-Id` that came with the request."""
    details: Mapping[str, object]


@dataclass(frozen=True)
class Health:
    """Whether the server can do its work right now."""

    ok: bool
    status: str
    """In a word or a sentence: `ok`, `ready`, `stopping`, ..."""
    engine: str | None = None
    """The state of the engine, such as `ready`, `loading` or `stalled`."""


@dataclass(frozen=True)
class ServerVersion:
    """What runs at the other end."""

    version: str
    details: Mapping[str, object]
    """Everything that the server said, its `version` included."""
