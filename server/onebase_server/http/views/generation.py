"""Pieces of text as JSON: ours and OpenAI's, whole and streamed. Plain dicts: this is the hot path."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from onebase_server.generation.choice import Piece, TokenInfo
from onebase_server.generation.generation import Generation, Usage
from onebase_server.generation.tokenization import BaseTokenizer
from onebase_server.http.sse import event

Json = dict[str, Any]


# ---- logprobs --------------------------------------------------------------------------------


def flat_logprobs(tokens: Sequence[TokenInfo], tokenizer: BaseTokenizer) -> Json:
    """Parallel lists, as in OpenAI's completions, and the ids besides."""
    name = tokenizer.token_text
    return {
        "tokens": [name(info.token) for info in tokens],
        "token_ids": [info.token for info in tokens],
        "token_logprobs": [info.logprob for info in tokens],
        "top_logprobs": [_top_by_name(info, tokenizer) for info in tokens],
        "text_offset": [info.offset for info in tokens],
    }


def _top_by_name(info: TokenInfo, tokenizer: BaseTokenizer) -> dict[str, float] | None:
    if info.top is None:
        return None
    names = {tokenizer.token_text(token): value for token, value in info.top}
    if info.logprob is not None:
        names.setdefault(tokenizer.token_text(info.token), info.logprob)
    return names


def chat_logprobs(tokens: Sequence[TokenInfo], tokenizer: BaseTokenizer) -> Json:
    """One object per token, as in OpenAI's chat completions."""
    content = []
    for info in tokens:
        entry = _chat_token(info.token, info.logprob, tokenizer)
        entry["top_logprobs"] = [_chat_token(token, value, tokenizer) for token, value in info.top or ()]
        content.append(entry)
    return {"content": content, "refusal": None}


def _chat_token(token: int, logprob: float | None, tokenizer: BaseTokenizer) -> Json:
    raw = tokenizer.token_bytes(token)
    return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}


# ---- POST /generate --------------------------------------------------------------------------


def generate_summary(generation: Generation) -> Json:
    usage = generation.usage
    return {
        "adapter": generation.job.adapter.label,
        "usage": {
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.completion,
            "cached_tokens": usage.cached,
        },
        "timing": generation.timing.rounded(),
    }


def generate_answer(generation: Generation, choices: Sequence[Piece], tokenizer: BaseTokenizer) -> Json:
    wanted = generation.job.sampling.logprobs is not None
    return {
        "id": generation.job.id,
        "object": "generation",
        "choices": [
            {
                "index": piece.index,
                "text": piece.text,
                "finish_reason": piece.finish_reason,
                "logprobs": flat_logprobs(piece.tokens, tokenizer) if wanted else None,
            }
            for piece in choices
        ],
        **generate_summary(generation),
    }


async def generate_events(generation: Generation, tokenizer: BaseTokenizer) -> AsyncIterator[bytes]:
    job_id = generation.job.id
    async for pieces in generation.pieces():
        chunk = b""
        for piece in pieces:
            if piece.text or piece.tokens:
                data: Json = {"id": job_id, "index": piece.index, "text": piece.text}
                if piece.tokens:
                    data["logprobs"] = flat_logprobs(piece.tokens, tokenizer)
                chunk += event(data)
            if piece.finish_reason:
                end = {"id": job_id, "index": piece.index, "text": "", "finish_reason": piece.finish_reason}
                chunk += event(end)
        yield chunk
    yield event({"id": job_id, "done": True, **generate_summary(generation)})


# ---- OpenAI ----------------------------------------------------------------------------------


def openai_usage(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


class CompletionWire:
    """Answers of POST /v1/completions."""

    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self._tokenizer = tokenizer

    def whole(self, piece: Piece, with_logprobs: bool) -> Json:
        return self.part(piece, piece.text, with_logprobs) | {"finish_reason": piece.finish_reason}

    def opening(self, choices: int) -> list[Json]:
        return []

    def part(self, piece: Piece, text: str, with_logprobs: bool) -> Json:
        logprobs = flat_logprobs(piece.tokens, self._tokenizer) if with_logprobs else None
        return {"index": piece.index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def end(self, piece: Piece) -> Json:
        return {"index": piece.index, "text": "", "logprobs": None, "finish_reason": piece.finish_reason}


class ChatWire:
    """Answers of POST /v1/chat/completions."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self._tokenizer = tokenizer

    def whole(self, piece: Piece, with_logprobs: bool) -> Json:
        return {
            "index": piece.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": chat_logprobs(piece.tokens, self._tokenizer) if with_logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def opening(self, choices: int) -> list[Json]:
        """The role, once per choice, before its text."""
        delta = {"role": "assistant", "content": ""}
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(choices)
        ]

    def part(self, piece: Piece, text: str, with_logprobs: bool) -> Json:
        logprobs = chat_logprobs(piece.tokens, self._tokenizer) if with_logprobs else None
        return {"index": piece.index, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": None}

    def end(self, piece: Piece) -> Json:
        return {"index": piece.index, "delta": {}, "logprobs": None, "finish_reason": piece.finish_reason}


OpenAIWire = CompletionWire | ChatWire


def openai_answer(
    generation: Generation, choices: Sequence[Piece], wire: OpenAIWire, model: str, created: int
) -> Json:
    """`created` is in seconds since 1970."""
    wanted = generation.job.sampling.logprobs is not None
    return {
        "id": generation.job.id,
        "object": wire.object,
        "created": created,
        "model": model,
        "choices": [wire.whole(piece, wanted) for piece in choices],
        "usage": openai_usage(generation.usage),
    }


async def openai_events(
    generation: Generation, wire: OpenAIWire, model: str, created: int, include_usage: bool
) -> AsyncIterator[bytes]:
    head: Json = {"id": generation.job.id, "object": wire.chunk_object, "created": created, "model": model}
    if include_usage:
        head["usage"] = None
    wanted = generation.job.sampling.logprobs is not None
    chunk = b"".join(event({**head, "choices": [choice]}) for choice in wire.opening(generation.job.choices))
    async for pieces in generation.pieces():
        for piece in pieces:
            if piece.text or piece.tokens:
                chunk += event(
                    {**head, "choices": [wire.part(piece, piece.text, wanted and bool(piece.tokens))]}
                )
            if piece.finish_reason:
                chunk += event({**head, "choices": [wire.end(piece)]})
        yield chunk
        chunk = b""
    if include_usage:
        yield event({**head, "choices": [], "usage": openai_usage(generation.usage)})
