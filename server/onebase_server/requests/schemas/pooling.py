"""The wire models of requests that read texts: vectors, scores of pairs, and choices to decide among."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, JsonValue, Tag, model_validator

from onebase_server.requests.schemas.generation import MAX_CHOICE_CHARACTERS, MAX_PROMPT_TOKENS, AdapterFields
from onebase_server.requests.schemas.messages import Messages
from onebase_server.requests.schemas.openai import IGNORED, TokenList, prompt_kind
from onebase_server.requests.schemas.wire import BY_KIND, LIST, ONE, FieldError, JsonSchema, Name, Tolerant

MAX_INPUTS = 2048
MAX_DECISIONS = 1024
"""Largest number of choices to decide among."""

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
TokenLists = Annotated[list[TokenList], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
Input = Annotated[
    Annotated[Text, Tag("a-text")]
    | Annotated[Texts, Tag("some-texts")]
    | Annotated[TokenList, Tag("token-ids")]
    | Annotated[TokenLists, Tag("some-token-ids")],
    Discriminator(prompt_kind),
]
TextOrTexts = Annotated[Annotated[Text, ONE] | Annotated[Texts, LIST], BY_KIND]


class ReadingFields(Tolerant, AdapterFields):
    """Fields of all requests that read texts."""

    model: Name | None = Field(default=None, description="the base's by default")
    truncate_prompt_tokens: int | None = Field(
        default=None,
        ge=-1,
        le=MAX_PROMPT_TOKENS,
        description="keep the last so many; -1: as many as fit",
    )

    ignored: ClassVar = IGNORED
    neutral: ClassVar[dict[str, tuple[JsonValue, ...]]] = {
        "add_special_tokens": (True,),
        "mm_processor_kwargs": ({},),
        "truncation_side": ("left",),
    }


class InputFields(ReadingFields):
    """Texts, or their tokens."""

    input: Input


def inputs_of(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """Return the texts, or their tokens, one by one."""
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [[token for token in given if isinstance(token, int)]]
    return [one for one in given if not isinstance(one, int)]


class PoolingFields(ReadingFields):
    """Fields that say how a text becomes a vector."""

    pooling: Literal["last", "mean"] | None = Field(
        default=None, description="of the hidden states behind the last norm; last by default"
    )


class EmbeddingRequest(InputFields, PoolingFields):
    """Body of POST /v1/embeddings."""

    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1, description="keep the first so many numbers")
    normalize: bool | None = Field(default=None, description="to length 1; true by default")


class ClassifyRequest(ReadingFields):
    """Body of POST /classify; `model` is an adapter that classifies."""

    input: Input | None = None
    messages: Messages | None = Field(
        default=None, description="in place of input: a conversation, as the base's chat template writes it"
    )
    chat_template_kwargs: Annotated[JsonSchema, Field(max_length=64)] | None = None

    @model_validator(mode="after")
    def _check_input(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise FieldError("input", "give either input or messages")
        if self.messages is None and self.chat_template_kwargs:
            raise FieldError("chat_template_kwargs", "chat_template_kwargs goes with messages only")
        return self


def _text_of(value: Any) -> Any:
    """Return a document's text, also if it is written as Cohere's and Jina's clients may."""
    return value["text"] if isinstance(value, dict) and value.keys() == {"text"} else value


class RerankRequest(PoolingFields):
    """Body of POST /v1/rerank."""

    query: Text
    documents: Texts
    top_n: int | None = Field(default=None, ge=0, description="of the best; 0 is all")
    return_documents: bool | None = None

    neutral: ClassVar = ReadingFields.neutral | {
        "max_chunks_per_doc": (),
        "max_tokens_per_doc": (),
        "rank_fields": (["text"],),
        "priority": (0,),
    }
    reasons: ClassVar = {
        "max_chunks_per_doc": "send the parts of a document as documents",
        "max_tokens_per_doc": "truncate_prompt_tokens keeps the last so many tokens of each",
        "priority": "it is that of the API key",
    }

    @model_validator(mode="before")
    @classmethod
    def _take_texts(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("documents"), list):
            return {**value, "documents": [_text_of(one) for one in value["documents"]]}
        return value


class ScoreRequest(PoolingFields):
    """Body of POST /score: one text and others, or as many pairs as texts."""

    text_1: TextOrTexts
    text_2: TextOrTexts

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        one, other = len(self.first), len(self.second)
        if one not in (1, other):
            raise FieldError("text_1", f"there are {one} texts and {other} in text_2; give one, or as many")
        return self

    @property
    def first(self) -> list[str]:
        return [self.text_1] if isinstance(self.text_1, str) else self.text_1

    @property
    def second(self) -> list[str]:
        return [self.text_2] if isinstance(self.text_2, str) else self.text_2


ChoiceText = Annotated[str, Field(min_length=1, max_length=MAX_CHOICE_CHARACTERS)]


class DecideRequest(ReadingFields):
    """Body of POST /v1/decide: which of the choices comes next, and how likely each is."""

    prompt: Text | None = None
    messages: Messages | None = None
    choices: Annotated[list[ChoiceText], Field(min_length=2, max_length=MAX_DECISIONS, fail_fast=True)]
    ends: bool | None = Field(
        default=None,
        description="a choice is the whole answer: the end of the text is part of it; true with messages",
    )
    normalize: Literal["sum", "mean"] | None = Field(
        default=None,
        description="of its tokens' logprobs; sum by default",
    )
    prior: Annotated[Annotated[Text, ONE] | Annotated[Messages, LIST], BY_KIND] | None = Field(
        default=None,
        description="a prompt or messages that say nothing: a choice's logprob after them is taken off",
    )
    temperature: float | None = Field(
        default=None, gt=0, le=100, description="logprobs are divided by it before they become probabilities"
    )
    chat_template_kwargs: Annotated[JsonSchema, Field(max_length=64)] | None = None

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise FieldError("prompt", "give either prompt or messages")
        if self.prior is not None and isinstance(self.prior, str) != (self.prompt is not None):
            raise FieldError("prior", "is a text with prompt, and messages with messages")
        if self.messages is None and self.chat_template_kwargs:
            raise FieldError("chat_template_kwargs", "chat_template_kwargs goes with messages only")
        if len(set(self.choices)) < len(self.choices):
            twice = next(one for one in self.choices if self.choices.count(one) > 1)
            raise FieldError("choices", f"{twice[:60]!r} is there twice")
        return self
