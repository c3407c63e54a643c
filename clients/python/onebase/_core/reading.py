"""Texts that are read: the calls for vectors, classes, ranks and decisions, and what they answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from msgspec import ValidationError, convert

from onebase_protocol.common import Json
from onebase_protocol.reading import (
    ClassifyAnswer,
    EmbeddingsAnswer,
    RerankAnswer,
    TextLabelAnswer,
    TokenLabelsAnswer,
)

from ..errors import InvalidResponseError
from ..types import (
    AdapterSpec,
    Classification,
    Embeddings,
    Label,
    Messages,
    Ranked,
)
from .parse import unexpected
from .requests import Body, Call, adapter_body, encode, messages_body

Pooling: TypeAlias = Literal["last", "mean"]


def embed(
    texts: str | Sequence[str],
    adapter: AdapterSpec,
    pooling: Pooling,
    dimensions: int | None,
    normalize: bool,
) -> Call:
    body: Body = {"input": _texts("texts", texts), "pooling": pooling, "normalize": normalize}
    return _call("/v1/embeddings", adapter, body | {"dimensions": dimensions, "encoding_format": "float"})


def classify(texts: str | Sequence[str] | None, messages: Messages | None, adapter: AdapterSpec) -> Call:
    """Raises ValueError for neither or both of `texts` and `messages`."""
    if (texts is None) == (messages is None):
        raise ValueError("give either texts or messages (a conversation)")
    if texts is not None:
        return _call("/classify", adapter, {"input": _texts("texts", texts)})
    return _call("/classify", adapter, {"messages": messages_body(messages or ())})


def rerank(
    query: str, documents: Sequence[str], adapter: AdapterSpec, pooling: Pooling | None, top_n: int | None
) -> Call:
    body: Body = {"query": query, "documents": _texts("documents", documents), "top_n": top_n}
    return _call("/v1/rerank", adapter, body | {"pooling": pooling, "return_documents": False})


def decide(
    choices: Sequence[str],
    prompt: str | None,
    messages: Messages | None,
    adapter: AdapterSpec,
    ends: bool | None,
    normalize: Literal["sum", "mean"],
    prior: Messages | None,
    temperature: float,
) -> Call:
    """Raises ValueError for neither or both of `prompt` and `messages`."""
    if (prompt is None) == (messages is None):
        raise ValueError("give either prompt (text that goes on) or messages (a conversation to answer)")
    body: Body = {"choices": _texts("choices", choices), "ends": ends, "normalize": normalize}
    body["temperature"] = temperature
    if messages is None:
        return _call("/v1/decide", adapter, body | {"prompt": prompt, "prior": prior})
    said = None if prior is None else messages_body(prior)
    return _call("/v1/decide", adapter, body | {"messages": messages_body(messages), "prior": said})


def _call(path: str, adapter: AdapterSpec, body: Body) -> Call:
    return Call("POST", path, encode(body | {"adapter": adapter_body(adapter)}), idempotent=True)


def _texts(name: str, texts: str | Sequence[str]) -> list[str]:
    found = [texts] if isinstance(texts, str) else list(texts)
    if not found:
        raise ValueError(f"{name} is empty: give at least one text")
    return found


def embeddings(answer: EmbeddingsAnswer) -> Embeddings:
    """Return the vectors. Raises InvalidResponseError if they are not numbers."""
    vectors = [tuple(one.embedding) for one in answer.data if not isinstance(one.embedding, str)]
    if len(vectors) < len(answer.data):
        raise InvalidResponseError("the server's answer has vectors as text")
    return Embeddings(tuple(vectors), answer.usage)


def classifications(answer: ClassifyAnswer) -> tuple[Classification, ...]:
    """Return the class of each text, or those of its tokens. Raises InvalidResponseError."""
    try:
        return tuple(_classification(item) for item in answer.data)
    except ValidationError as error:
        raise unexpected(error) from error


def _classification(item: Json) -> Classification:
    if "tokens" not in item:
        found = convert(item, TextLabelAnswer)
        return Classification(Label(found.label, tuple(found.probs)))
    tokens = convert(item, TokenLabelsAnswer).tokens
    return Classification(None, tuple(Label(one.label, tuple(one.probs), one.token) for one in tokens))


def ranked(answer: RerankAnswer, documents: Sequence[str]) -> tuple[Ranked, ...]:
    """Return the documents that an answer ranks. Raises InvalidResponseError if it ranks others."""
    try:
        return tuple(Ranked(one.index, documents[one.index], one.relevance_score) for one in answer.results)
    except IndexError as error:
        raise InvalidResponseError("the server's answer ranks documents that were not sent") from error
