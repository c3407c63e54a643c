"""Pieces of text as JSON: ours and OpenAI's, whole and streamed. Plain dicts: this is the hot path."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any

from onebase_server.generation.generation import Generation
from onebase_server.generation.stream import Piece, TokenInfo, Usage
from onebase_server.generation.tokenization import BaseTokenizer
from onebase_server.http.schemas.openai import UsageInStream
from onebase_server.http.sse import event

Json = dict[str, Any]


# ---- logprobs --------------------------------------------------------------------------------


def flat_logprobs(tokens: Sequence[TokenInfo], tokenizer: BaseTokenizer) -> Json:
    """Parallel lists, as in OpenAI's completions, and the token ids."""
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


class GenerationView(ABC):
    """One route's answers: whole, or as server-sent events."""

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self._tokenizer = tokenizer

    @abstractmethod
    def answer(self, generation: Generation, choices: Sequence[Piece]) -> Json:
        """The whole answer."""

    @abstractmethod
    def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """The answer as it comes, until the generation has ended. Raises what `Generation.pieces` raises."""


# ---- POST /generate --------------------------------------------------------------------------


class GenerateView(GenerationView):
    """Answers of POST /generate."""

    def answer(self, generation: Generation, choices: Sequence[Piece]) -> Json:
        wanted = generation.job.sampling.logprobs is not None
        return {
            "id": generation.job.id,
            "object": "generation",
            "choices": [
                {
                    "index": piece.index,
                    "text": piece.text,
                    "finish_reason": piece.finish_reason,
                    "logprobs": flat_logprobs(piece.tokens, self._tokenizer) if wanted else None,
                }
                for piece in choices
            ],
            **_summary(generation),
        }

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        job_id = generation.job.id
        async for pieces in generation.pieces():
            chunk = b""
            for piece in pieces:
                head: Json = {"id": job_id, "index": piece.index}
                if piece.text or piece.tokens:
                    data = {**head, "text": piece.text}
                    if piece.tokens:
                        data["logprobs"] = flat_logprobs(piece.tokens, self._tokenizer)
                    chunk += event(data)
                if piece.finish_reason:
                    chunk += event({**head, "text": "", "finish_reason": piece.finish_reason})
            yield chunk
        yield event({"id": job_id, "done": True, **_summary(generation)})


def _summary(generation: Generation) -> Json:
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


# ---- OpenAI ----------------------------------------------------------------------------------


class OpenAIView(GenerationView):
    """What the answers of both OpenAI routes share."""

    object: str
    chunk_object: str

    def __init__(self, tokenizer: BaseTokenizer, model: str, usage: UsageInStream) -> None:
        super().__init__(tokenizer)
        self._model = model
        self._created = int(time.time())
        self._usage = usage

    @abstractmethod
    def whole(self, piece: Piece, with_logprobs: bool) -> Json:
        """One choice of a whole answer."""

    @abstractmethod
    def opening(self, choices: int) -> list[Json]:
        """What a stream begins with, before any text."""

    @abstractmethod
    def part(self, piece: Piece, with_logprobs: bool) -> Json:
        """One choice's next text."""

    @abstractmethod
    def end(self, piece: Piece) -> Json:
        """How one choice ended."""

    def answer(self, generation: Generation, choices: Sequence[Piece]) -> Json:
        wanted = generation.job.sampling.logprobs is not None
        return {
            **self._head(generation, self.object),
            "choices": [self.whole(piece, wanted) for piece in choices],
            "usage": openai_usage(generation.usage),
        }

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        head = self._head(generation, self.chunk_object)
        if self._usage == "last":
            head["usage"] = None
        wanted = generation.job.sampling.logprobs is not None
        opening = self.opening(generation.job.choices)
        if self._usage == "always":
            head["usage"] = openai_usage(generation.usage)
        chunk = b"".join(event({**head, "choices": [choice]}) for choice in opening)
        async for pieces in generation.pieces():
            if self._usage == "always":
                head["usage"] = openai_usage(generation.usage)
            for piece in pieces:
                if piece.text or piece.tokens:
                    chunk += event({**head, "choices": [self.part(piece, wanted and bool(piece.tokens))]})
                if piece.finish_reason:
                    chunk += event({**head, "choices": [self.end(piece)]})
            yield chunk
            chunk = b""
        if self._usage != "never":
            yield event({**head, "choices": [], "usage": openai_usage(generation.usage)})

    def _head(self, generation: Generation, kind: str) -> Json:
        return {"id": generation.job.id, "object": kind, "created": self._created, "model": self._model}


def openai_usage(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


class CompletionView(OpenAIView):
    """Answers of POST /v1/completions."""

    object = "text_completion"
    chunk_object = "text_completion"

    def whole(self, piece: Piece, with_logprobs: bool) -> Json:
        return self.part(piece, with_logprobs) | {"finish_reason": piece.finish_reason}

    def opening(self, choices: int) -> list[Json]:
        return []

    def part(self, piece: Piece, with_logprobs: bool) -> Json:
        logprobs = flat_logprobs(piece.tokens, self._tokenizer) if with_logprobs else None
        return {"index": piece.index, "text": piece.text, "logprobs": logprobs, "finish_reason": None}

    def end(self, piece: Piece) -> Json:
        return {"index": piece.index, "text": "", "logprobs": None, "finish_reason": piece.finish_reason}


class ChatView(OpenAIView):
    """Answers of POST /v1/chat/completions."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, piece: Piece, with_logprobs: bool) -> Json:
        return {
            "index": piece.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": chat_logprobs(piece.tokens, self._tokenizer) if with_logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def opening(self, choices: int) -> list[Json]:
        """The role, once per choice."""
        delta = {"role": "assistant", "content": ""}
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(choices)
        ]

    def part(self, piece: Piece, with_logprobs: bool) -> Json:
        logprobs = chat_logprobs(piece.tokens, self._tokenizer) if with_logprobs else None
        delta = {"content": piece.text}
        return {"index": piece.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def end(self, piece: Piece) -> Json:
        return {"index": piece.index, "delta": {}, "logprobs": None, "finish_reason": piece.finish_reason}
