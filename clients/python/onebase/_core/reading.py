"""Texts that are read: the calls for vectors, classes, ranks and decisions, and what they answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from ..types import (
    AdapterSpec,
    Classification,
    Decision,
    Embeddings,
    Label,
    Messages,
    Option,
    Ranked,
    Usage,
)
from .parse import Json
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


def parse_embeddings(value: Json) -> Embeddings:
    vectors = tuple(tuple(map(float, item["embedding"])) for item in value["data"])
    return Embeddings(vectors, _usage(value))


def parse_classifications(value: Json) -> tuple[Classification, ...]:
    return tuple(
        Classification(
            _label(item) if "label" in item else None,
            tuple(_label(token) for token in item.get("tokens") or ()),
        )
        for item in value["data"]
    )


def ranked_of(documents: Sequence[str]) -> Callable[[Json], tuple[Ranked, ...]]:
    """A function that reads an answer about these documents."""

    def parse(value: Json) -> tuple[Ranked, ...]:
        found = ((item["index"], item["relevance_score"]) for item in value["results"])
        return tuple(Ranked(index, documents[index], float(score)) for index, score in found)

    return parse


def parse_decision(value: Json) -> Decision:
    options = tuple(
        Option(item["text"], item["probability"], item["logprob"], item.get("prior_logprob"))
        for item in value["choices"]
    )
    return Decision(value["choice"], options, _usage(value))


def _label(item: Json) -> Label:
    return Label(item["label"], tuple(item["probs"]), item.get("token"))


def _usage(value: Json) -> Usage:
    usage = value["usage"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return Usage(usage["prompt_tokens"], 0, cached)
