"""Texts that are read: vectors, classes, ranks, scores and decisions."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, UnsetType, field

from onebase_protocol.common import CachedTokens, Json, shown_as


class ReadingUsage(msgspec.Struct, frozen=True, kw_only=True):  # in the order in which vLLM sends it
    prompt_tokens: int
    total_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: CachedTokens = CachedTokens()

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache."""
        return self.prompt_tokens_details.cached_tokens


class EmbeddingAnswer(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    """Numbers, or in base64 their bytes: fp32, little-endian."""


class EmbeddingsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of POST /v1/embeddings."""

    object: Literal["list"] = "list"
    data: list[EmbeddingAnswer]
    model: str = ""
    usage: ReadingUsage
    id: str = ""


class TokenLabelAnswer(msgspec.Struct, frozen=True):
    token: str
    token_id: int
    label: str
    probs: list[float]
    num_classes: int


class TextLabelAnswer(msgspec.Struct, frozen=True):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class TokenLabelsAnswer(msgspec.Struct, frozen=True):
    index: int
    tokens: list[TokenLabelAnswer]


class ClassifyAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of POST /classify."""

    id: str = ""
    object: Literal["list"] = "list"
    created: int = 0
    model: str = ""
    data: Annotated[
        list[Json],
        shown_as(
            anyOf=[
                {"type": "array", "items": {"$ref": "#/$defs/TextLabelAnswer"}},
                {"type": "array", "items": {"$ref": "#/$defs/TokenLabelsAnswer"}},
            ]
        ),
    ]
    """A list of TextLabelAnswer, or for a classifier of tokens of TokenLabelsAnswer."""
    usage: ReadingUsage


class DocumentAnswer(msgspec.Struct, frozen=True):
    text: str


class RankedAnswer(msgspec.Struct, frozen=True):
    index: int
    relevance_score: float
    document: DocumentAnswer | UnsetType = UNSET


class RerankAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of POST /v1/rerank."""

    id: str = ""
    model: str = ""
    results: list[RankedAnswer]
    usage: ReadingUsage


class PairScore(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of POST /score."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[PairScore]
    usage: ReadingUsage


class Option(msgspec.Struct, frozen=True):
    """One of the choices of a decision."""

    index: int
    text: str
    probability: float
    """Among the choices."""
    logprob: float
    """Log-probability of the whole text after the prompt."""
    prior_logprob: float | None = None
    token_logprobs: tuple[float, ...] = ()


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """Probabilities of some choices to come next."""

    id: str = ""
    object: Literal["decision"] = "decision"
    created: int = 0
    model: str = ""
    choice: str
    """The likeliest."""
    index: int = 0
    options: tuple[Option, ...] = field(name="choices")
    """All of them, in the order in which they were sent."""
    usage: ReadingUsage
