"""The wire models of vLLM's routes about tokens."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from onebase_server.requests.schemas.generation import MAX_PROMPT_TOKENS, ConversationFields, TokenId
from onebase_server.requests.schemas.messages import MAX_TOOLS, Messages, ToolObject
from onebase_server.requests.schemas.wire import FieldError, JsonSchema, Name, Tolerant, Wire, rebuilt

_OF_MESSAGES = ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")


class TokenizeRequest(Tolerant):
    """Body of POST /tokenize: a prompt, or messages as the base's chat template writes them."""

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Annotated[list[ToolObject], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    chat_template_kwargs: Annotated[JsonSchema, Field(max_length=64)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="those that the base expects around a prompt; true unless it is messages"
    )
    return_token_strs: bool | None = None
    adapter_defaults: bool | None = Field(
        default=None, description="false: without the defaults that the adapter came with"
    )

    neutral: ClassVar = {"chat_template": (), "media_io_kwargs": ({},), "mm_processor_kwargs": ({},)}
    reasons: ClassVar = {"chat_template": "the base's own is used"}

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise FieldError("prompt", "give either prompt or messages")
        if self.messages is None:
            for name in _OF_MESSAGES:
                if getattr(self, name):
                    raise FieldError(name, f"{name} goes with messages only")
        elif self.add_special_tokens:
            raise FieldError(
                "add_special_tokens", "the chat template writes them; leave it out with messages"
            )
        return self

    def conversation(self) -> ConversationFields:
        """Return the fields that say how messages are written. Raises InvalidRequestError."""
        return rebuilt(ConversationFields, {name: getattr(self, name) for name in _OF_MESSAGES})


class DetokenizeRequest(Wire):
    """Body of POST /detokenize."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS, fail_fast=True)]
