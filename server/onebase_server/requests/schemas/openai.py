"""The wire models of the OpenAI-compatible routes.

Fields that would change the answer and are not served are refused by name; fields that change
nothing are accepted and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, JsonValue, Tag, model_validator

from onebase_server.requests.schemas.generation import (
    MAX_LOGPROBS,
    MAX_PROMPT_TOKENS,
    MAX_PROMPTS,
    ConversationFields,
    SamplingBody,
    TokenId,
    named_in,
)
from onebase_server.requests.schemas.messages import Messages
from onebase_server.requests.schemas.wire import FieldError, Name, Tolerant, Wire

TokenList = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
TokenLists = Annotated[list[TokenList], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
IGNORED = frozenset(
    {
        "user",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "service_tier",
        "store",
    }
)
"""Bookkeeping and hints of OpenAI's own service: the text is the same without them."""


def prompt_kind(prompt: Any) -> str:
    """Return which of the four kinds it is, by its first item: the others need not be tried."""
    if not isinstance(prompt, list):
        return "a-text"
    first = prompt[0] if prompt else 0
    return (
        "some-texts"
        if isinstance(first, str)
        else "some-token-ids"
        if isinstance(first, list)
        else "token-ids"
    )


UsageInStream = Literal["never", "last", "always"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Verbosity = Literal["low", "medium", "high"]


class StreamOptions(Wire):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Padding against traffic analysis; accepted, never sent."""
    continuous_usage_stats: bool | None = None
    """vLLM's: every chunk has the usage so far."""


DEFAULTS: dict[str, tuple[JsonValue, ...]] = {
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (-1,),
    "allowed_token_ids": (),
    "bad_words": ([],),
}
"""Values of vLLM's fields that its clients send although they are the defaults."""


class OpenAIRequest(Tolerant, SamplingBody):
    """Fields of OpenAI's routes for text."""

    model: Name
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = Field(default=None, description="vLLM's: of the prompt and of the answer")
    prompt_logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description="vLLM's: so many alternatives to each prompt token"
    )

    skip_special_tokens: bool | None = Field(
        default=None, description="vLLM's: whether special tokens are left out of the text; true by default"
    )

    safety_identifier: Any = Field(default=None, description="as `user`, which comes first")
    prompt_cache_key: Any = Field(default=None, description="a session, where no user is named: see `user`")

    ignored: ClassVar = IGNORED

    @property
    def asker(self) -> str | None:
        user = named_in("user", self.user) or named_in("user", self.safety_identifier)
        return user or named_in("session", self.prompt_cache_key)

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "stream_options goes with stream: true only")
        if self.prompt_logprobs is not None and self.stream:
            raise FieldError("prompt_logprobs", "prompt_logprobs goes without stream")
        return self

    @property
    def usage_in_stream(self) -> UsageInStream:
        """Place of the usage in a stream: nowhere, in its last chunk, or in every one."""
        options = self.stream_options
        if options is None or not options.include_usage:
            return "never"
        return "always" if options.continuous_usage_stats else "last"


class CompletionRequest(OpenAIRequest):
    """Body of POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("a-text")]
        | Annotated[Texts, Tag("some-texts")]
        | Annotated[TokenList, Tag("token-ids")]
        | Annotated[TokenLists, Tag("some-token-ids")],
        Discriminator(prompt_kind),
    ]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    add_special_tokens: bool | None = Field(
        default=None,
        description="vLLM's: whether a prompt that is text gets the tokens that the base expects around it; "
        "true by default",
    )

    neutral: ClassVar = DEFAULTS | {"suffix": ("",), "best_of": (1,)}
    reasons: ClassVar = {
        "suffix": "the base is not trained to fill in the middle; put everything into prompt",
        "best_of": "use n, which returns every completion",
    }

    @model_validator(mode="after")
    def _check_echo(self) -> Self:
        if self.prompt_logprobs is not None and self.echo and self.logprobs is not None:
            raise FieldError("prompt_logprobs", "echo with logprobs gives them too; leave one out")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


class ChatRequest(OpenAIRequest, ConversationFields):
    """Body of POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    reasoning_effort: Effort | None = Field(
        default=None,
        description="none switches thinking off where the base's chat template can; others change nothing "
        "where it does not ask for them",
    )

    verbosity: Verbosity | None = Field(default=None, description="changes nothing")

    neutral: ClassVar = DEFAULTS | {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "add_special_tokens": (False,),
        "echo": (False,),
        "best_of": (1,),
        "web_search_options": (),
        "moderation": (),
    }
    reasons: ClassVar = {
        "functions": "it is the older name of tools",
        "function_call": "it is the older name of tool_choice",
        "modalities": 'only ["text"] is served',
    }

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "top_logprobs goes with logprobs: true only")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise FieldError(
                "max_tokens", "give max_completion_tokens or max_tokens (its older name), not both"
            )
        if self.max_tokens == 0:
            raise FieldError("max_tokens", "a chat answer has at least one token")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
