"""Pieces of text as JSON: ours and OpenAI's, whole and streamed. Plain dicts: this is the hot path."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any

from onebase_edge.errors import OneBaseError, error_body, status_of
from onebase_edge.sse import DONE, event
from onebase_server.inference.generation import Generation, Job
from onebase_server.inference.stream import Piece, TokenInfo
from onebase_server.inference.tokenization import BaseTokenizer
from onebase_server.inference.tool_call_parser import CallDelta, Said, answer_reader
from onebase_server.requests.schemas.openai import UsageInStream
from onebase_server.requests.schemas.tgi import TgiRequest
from onebase_server.telemetry.measurements import Usage

Json = dict[str, Any]


# ---- logprobs --------------------------------------------------------------------------------


def flat_logprobs(tokens: Sequence[TokenInfo], tokenizer: BaseTokenizer) -> Json:
    """Return parallel lists, as in OpenAI's completions, and the token ids."""
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
    """Return one object per token, as in OpenAI's chat completions."""
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

    closing = DONE
    """Bytes at the end of a stream."""

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self._tokenizer = tokenizer

    @abstractmethod
    def answer(self, generation: Generation, choices: Sequence[Piece]) -> Json | list[Json]:
        """Return the whole answer."""

    @abstractmethod
    def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """Yield the answer as it comes, until the generation has ended. Raises what `Generation.pieces`
        raises."""

    def failure(self, error: OneBaseError) -> bytes:
        """Return the event of an error after the first event."""
        return event(error_body(error))


# ---- calls of tools ----------------------------------------------------------------------------


class _Readers:
    """Parsers of the choices in one answer."""

    def __init__(self, job: Job) -> None:
        self._readers = [answer_reader(job.calls, f"{job.id}.{index}") for index in range(job.choices)]

    def read(self, piece: Piece) -> Said:
        """Return the text and the calls that are certain with a piece."""
        return self._readers[piece.index].feed(piece.text, end=piece.finish_reason is not None)

    def finish_reason(self, piece: Piece) -> str | None:
        return self._readers[piece.index].finish_reason(piece.finish_reason)


def _call_delta(delta: CallDelta) -> Json:
    """Return a part of a call as OpenAI streams it: the first one has the call's id and name."""
    function: Json = {} if delta.name is None else {"name": delta.name}
    function["arguments"] = delta.arguments
    begun = {} if delta.id is None else {"id": delta.id, "type": "function"}
    return {"index": delta.index, **begun, "function": function}


def whole_calls(deltas: Sequence[CallDelta]) -> list[Json]:
    """Return the calls that all their parts make up."""
    calls: list[Json] = []
    for delta in deltas:
        if delta.id is not None:
            function = {"name": delta.name, "arguments": ""}
            calls.append({"id": delta.id, "type": "function", "function": function})
        calls[delta.index]["function"]["arguments"] += delta.arguments
    return calls


# ---- POST /generate --------------------------------------------------------------------------


class GenerateView(GenerationView):
    """Answers of POST /generate; with `request`, events of that one of POST /generate/many."""

    def __init__(self, tokenizer: BaseTokenizer, request: int | None = None) -> None:
        super().__init__(tokenizer)
        self._of: Json = {} if request is None else {"request": request}

    def failure(self, error: OneBaseError) -> bytes:
        if not self._of:
            return super().failure(error)
        return event({**self._of, "status": status_of(error)[0], **error_body(error)})

    def answer(self, generation: Generation, choices: Sequence[Piece]) -> Json:
        readers = _Readers(generation.job)
        return {
            "id": generation.job.id,
            "object": "generation",
            "choices": [self._whole(piece, generation, readers) for piece in choices],
            **_summary(generation),
        }

    def _whole(self, piece: Piece, generation: Generation, readers: _Readers) -> Json:
        job = generation.job
        said = readers.read(piece)
        made: Json = {
            "index": piece.index,
            "text": said.content,
            "finish_reason": readers.finish_reason(piece),
            "logprobs": None
            if job.sampling.logprobs is None
            else flat_logprobs(piece.tokens, self._tokenizer),
        }
        if job.calls is not None:
            made["tool_calls"] = whole_calls(said.calls)
        return made

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        job_id = generation.job.id
        readers = _Readers(generation.job)
        async for pieces in generation.pieces():
            chunk = b""
            for piece in pieces:
                head: Json = {**self._of, "id": job_id, "index": piece.index}
                said = readers.read(piece)
                if said.content or said.calls or piece.tokens:
                    data: Json = {**head, "text": said.content}
                    if said.calls:
                        data["tool_calls"] = [_call_delta(delta) for delta in said.calls]
                    if piece.tokens:
                        data["logprobs"] = flat_logprobs(piece.tokens, self._tokenizer)
                    chunk += event(data)
                if piece.finish_reason:
                    reason = readers.finish_reason(piece)
                    chunk += event({**head, "text": "", "finish_reason": reason})
            if chunk:
                yield chunk
        yield event({**self._of, "id": job_id, "done": True, **_summary(generation)})


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


# ---- POST / ----------------------------------------------------------------------------------


class TgiView(GenerationView):
    """Answers of POST /, token by token where they stream."""

    closing = b""

    def __init__(self, tokenizer: BaseTokenizer, body: TgiRequest) -> None:
        super().__init__(tokenizer)
        self._begun = body.inputs if body.parameters.return_full_text else ""
        self._details = bool(body.parameters.details)
        self._seed = body.parameters.seed
        self._top = body.parameters.top_n_tokens or 0

    def answer(self, generation: Generation, choices: Sequence[Piece]) -> list[Json]:
        (piece,) = choices
        made: Json = {"generated_text": self._begun + piece.text}
        if self._details:
            tokens = [self._token(info, self._tokenizer.token_text(info.token)) for info in piece.tokens]
            made["details"] = {**self._ended(piece, generation), "prefill": [], "tokens": tokens}
            if self._top:
                made["details"]["top_tokens"] = [self._top_tokens(info) for info in piece.tokens]
        return [made]

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        text, index = self._begun, 0
        async for pieces in generation.pieces():
            chunk = b""
            for piece in pieces:
                text += piece.text
                for info in piece.tokens:
                    index += 1
                    last = info is piece.tokens[-1]
                    made: Json = {"index": index, "token": self._token(info, piece.text if last else "")}
                    if self._top:
                        made["top_tokens"] = self._top_tokens(info)
                    ended = last and piece.finish_reason is not None
                    details = self._ended(piece, generation) if ended else None
                    chunk += event({**made, "generated_text": text if ended else None, "details": details})
                if piece.finish_reason is not None and not piece.tokens:
                    chunk += self._end(piece, generation, index + 1, text)
            if chunk:
                yield chunk

    def _end(self, piece: Piece, generation: Generation, index: int, text: str) -> bytes:
        """Return the event of the token that ended the text."""
        token = {"id": 0, "text": piece.text, "logprob": 0.0, "special": True}
        ended = {"generated_text": text, "details": self._ended(piece, generation)}
        return event({"index": index, "token": token, **ended})

    def _ended(self, piece: Piece, generation: Generation) -> Json:
        reason = "length" if piece.finish_reason != "stop" else "eos_token"
        return {
            "finish_reason": "stop_sequence" if piece.stop is not None else reason,
            "generated_tokens": generation.usage.completion,
            "input_length": generation.usage.prompt,
            "seed": self._seed,
        }

    def _token(self, info: TokenInfo, text: str) -> Json:
        return {"id": info.token, "text": text, "logprob": info.logprob, "special": False}

    def _top_tokens(self, info: TokenInfo) -> list[Json]:
        name = self._tokenizer.token_text
        return [
            {"id": token, "text": name(token), "logprob": logprob, "special": False}
            for token, logprob in info.top or ()
        ]


# ---- OpenAI ----------------------------------------------------------------------------------


class OpenAIView(GenerationView):
    """Common parts of the answers of OpenAI's routes."""

    object: str
    chunk_object: str

    def __init__(self, tokenizer: BaseTokenizer, model: str, usage: UsageInStream) -> None:
        super().__init__(tokenizer)
        self._model = model
        self._usage = usage

    @abstractmethod
    def whole(self, piece: Piece, readers: _Readers, with_logprobs: bool) -> Json:
        """Return one choice of a whole answer."""

    @abstractmethod
    def opening(self, choices: int) -> list[Json]:
        """Return the choices of the first chunks of a stream, before any text."""

    @abstractmethod
    def part(self, piece: Piece, said: Said, with_logprobs: bool) -> Json:
        """Return the choice of a chunk with what is new of one choice."""

    @abstractmethod
    def end(self, piece: Piece, reason: str | None) -> Json:
        """Return the choice of a chunk that ends one choice."""

    def answer(self, generation: Generation, choices: Sequence[Piece]) -> Json:
        wanted = generation.job.sampling.logprobs is not None
        readers = _Readers(generation.job)
        made = [self.whole(piece, readers, wanted) for piece in choices]
        if generation.job.token_ids:
            for choice, piece in zip(made, choices, strict=True):
                self._add_ids(choice, piece, generation)
        return {
            **self._head(generation, self.object),
            **self._prompt_ids(generation),
            **self._prompt_scores(generation, made),
            "choices": made,
            "usage": openai_usage(generation.usage),
        }

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        head = self._head(generation, self.chunk_object)
        if self._usage == "last":
            head["usage"] = None
        wanted = generation.job.sampling.logprobs is not None
        readers = _Readers(generation.job)
        opening = self.opening(generation.job.choices)
        if self._usage == "always":
            head["usage"] = openai_usage(generation.usage)
        begun = head | self._prompt_ids(generation)
        chunk = b"".join(event({**begun, "choices": [choice]}) for choice in opening)
        async for pieces in generation.pieces():
            if self._usage == "always":
                head["usage"] = openai_usage(generation.usage)
            for piece in pieces:
                said = readers.read(piece)
                if said.content or said.calls or piece.tokens or piece.ids:
                    first = Said(said.content, said.calls[:1])
                    part = self.part(piece, first, wanted and bool(piece.tokens))
                    if piece.ids:
                        self._add_ids(part, piece, generation)
                    chunk += event({**head, "choices": [part]})
                for call in said.calls[1:]:  # as OpenAI does: clients read one call of a chunk
                    part = self.part(Piece(piece.index, ""), Said("", [call]), False)
                    chunk += event({**head, "choices": [part]})
                if piece.finish_reason:
                    reason = readers.finish_reason(piece)
                    chunk += event({**head, "choices": [self.end(piece, reason)]})
            if chunk:
                yield chunk
            chunk = b""
        if self._usage != "never":
            yield event({**head, "choices": [], "usage": openai_usage(generation.usage)})

    def _prompt_ids(self, generation: Generation) -> Json:
        """Return the fields of an answer's head about its prompt, if token ids are asked for."""
        return {}

    def _prompt_scores(self, generation: Generation, choices: Sequence[Json]) -> Json:
        """Add the prompt's log-probabilities to the choices, or return them for the answer.

        They are in vLLM's form: of each prompt token its own, and those of alternatives, by token id.
        """
        return {}

    def _scores_of(self, generation: Generation, prompt: int) -> list[Json | None]:
        name = self._tokenizer.token_text
        made: list[Json | None] = [None]
        for one in generation.prompt_logprobs.get(prompt, ()):
            ranks = {token: rank for rank, (token, _) in enumerate(one.top, 1)}
            values = {one.token: one.logprob, **dict(one.top)}
            made.append(
                {
                    str(token): {"logprob": value, "rank": ranks.get(token), "decoded_token": name(token)}
                    for token, value in values.items()
                }
            )
        return made

    def _add_ids(self, choice: Json, piece: Piece, generation: Generation) -> None:
        """Add the token ids, as vLLM does."""
        choice["token_ids"] = piece.ids

    def _head(self, generation: Generation, kind: str) -> Json:
        job = generation.job
        return {"id": job.id, "object": kind, "created": job.created, "model": self._model}


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

    def __init__(self, tokenizer: BaseTokenizer, model: str, usage: UsageInStream) -> None:
        super().__init__(tokenizer, model, usage)
        self._told: set[int] = set()
        """Choices whose prompt's token ids were sent."""

    def _prompt_scores(self, generation: Generation, choices: Sequence[Json]) -> Json:
        if generation.job.tells_prompt:
            for number, choice in enumerate(choices):
                choice["prompt_logprobs"] = self._scores_of(generation, number // generation.job.n)
        return {}

    def _add_ids(self, choice: Json, piece: Piece, generation: Generation) -> None:
        super()._add_ids(choice, piece, generation)
        if piece.index not in self._told:
            self._told.add(piece.index)
            choice["prompt_token_ids"] = generation.job.prompts[piece.index // generation.job.n].tokens

    def whole(self, piece: Piece, readers: _Readers, with_logprobs: bool) -> Json:
        made = self.part(piece, Said(piece.text, []), with_logprobs)
        return made | {"finish_reason": piece.finish_reason}

    def opening(self, choices: int) -> list[Json]:
        return []

    def part(self, piece: Piece, said: Said, with_logprobs: bool) -> Json:
        logprobs = flat_logprobs(piece.tokens, self._tokenizer) if with_logprobs else None
        return {"index": piece.index, "text": said.content, "logprobs": logprobs, "finish_reason": None}

    def end(self, piece: Piece, reason: str | None) -> Json:
        return {"index": piece.index, "text": "", "logprobs": None, "finish_reason": reason}


class ChatView(OpenAIView):
    """Answers of POST /v1/chat/completions."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _prompt_ids(self, generation: Generation) -> Json:
        job = generation.job
        return {"prompt_token_ids": job.prompts[0].tokens} if job.token_ids else {}

    def _prompt_scores(self, generation: Generation, choices: Sequence[Json]) -> Json:
        return {"prompt_logprobs": self._scores_of(generation, 0)} if generation.job.tells_prompt else {}

    def whole(self, piece: Piece, readers: _Readers, with_logprobs: bool) -> Json:
        said = readers.read(piece)
        message: Json = {"role": "assistant", "content": said.content, "refusal": None}
        if said.calls:
            message |= {"content": said.content or None, "tool_calls": whole_calls(said.calls)}
        return {
            "index": piece.index,
            "message": message,
            "logprobs": chat_logprobs(piece.tokens, self._tokenizer) if with_logprobs else None,
            "finish_reason": readers.finish_reason(piece),
        }

    def opening(self, choices: int) -> list[Json]:
        """Return the role, once per choice."""
        delta = {"role": "assistant", "content": ""}
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(choices)
        ]

    def part(self, piece: Piece, said: Said, with_logprobs: bool) -> Json:
        logprobs = chat_logprobs(piece.tokens, self._tokenizer) if with_logprobs else None
        delta: Json = {"content": said.content} if said.content or not said.calls else {}
        if said.calls:
            delta["tool_calls"] = [_call_delta(call) for call in said.calls]
        return {"index": piece.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def end(self, piece: Piece, reason: str | None) -> Json:
        return {"index": piece.index, "delta": {}, "logprobs": None, "finish_reason": reason}
