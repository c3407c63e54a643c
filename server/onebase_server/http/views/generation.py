"""Pieces of text as answers: ours, TGI's and OpenAI's, whole and streamed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from msgspec import UNSET
from msgspec.structs import asdict

from onebase_edge.errors import ApiError, error_body, status_of
from onebase_edge.sse import DONE, event
from onebase_protocol import text
from onebase_protocol.common import CachedTokens, Json, OutputTokensDetails
from onebase_server.inference.generation import GenerationRequest, GenerationRun
from onebase_server.inference.stream import OutputPiece, TokenInfo
from onebase_server.inference.tokenization import BaseTokenizer
from onebase_server.inference.tool_call_parser import Said, ToolCallDelta, answer_reader
from onebase_server.requests.schemas.openai import UsageInStream
from onebase_server.requests.schemas.tgi import TgiRequest
from onebase_server.telemetry.measurements import TokenUsage

INLINE_SCORES = 2_000
"""Largest number of log-probabilities that are written on the event loop (about 5 ms); more are written in a
thread."""


# ---- logprobs --------------------------------------------------------------------------------


def flat_logprobs(tokens: Sequence[TokenInfo], tokenizer: BaseTokenizer) -> text.Logprobs:
    """Return parallel lists, as in OpenAI's completions, and the token ids."""
    name = tokenizer.token_text
    return text.Logprobs(
        tuple(name(info.token) for info in tokens),
        tuple(info.token for info in tokens),
        tuple(info.logprob for info in tokens),
        tuple(_top_by_name(info, tokenizer) for info in tokens),
        tuple(info.offset for info in tokens),
    )


def _top_by_name(info: TokenInfo, tokenizer: BaseTokenizer) -> dict[str, float] | None:
    if info.top is None:
        return None
    names = {tokenizer.token_text(token): value for token, value in info.top}
    if info.logprob is not None:
        names.setdefault(tokenizer.token_text(info.token), info.logprob)
    return names


def chat_logprobs(tokens: Sequence[TokenInfo], tokenizer: BaseTokenizer) -> list[text.ChatTokenLogprob]:
    """Return one object per token, as in OpenAI's chat completions."""

    def described(token: int, logprob: float | None) -> tuple[str, float | None, list[int]]:
        raw = tokenizer.token_bytes(token)
        return raw.decode("utf-8", "replace"), logprob, list(raw)

    return [
        text.ChatTokenLogprob(
            *described(info.token, info.logprob),
            [text.TokenLogprob(*described(token, value)) for token, value in info.top or ()],
        )
        for info in tokens
    ]


class GenerationView(ABC):
    """One route's answers: whole, or as server-sent events."""

    closing = DONE
    """Bytes at the end of a stream."""

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self._tokenizer = tokenizer

    @abstractmethod
    def answer(self, generation: GenerationRun, choices: Sequence[OutputPiece]) -> Any:
        """Return the whole answer, which is encoded as it is."""

    @abstractmethod
    def events(self, generation: GenerationRun) -> AsyncIterator[bytes]:
        """Yield the answer as it comes, until the generation has ended. Raises what `GenerationRun.pieces`
        raises."""

    def failure(self, error: ApiError) -> bytes:
        """Return the event of an error after the first event."""
        return event(error_body(error))


async def _event(generation: GenerationRun, piece: OutputPiece, make: Callable[[], Any]) -> bytes:
    """Return the event of what `make` returns for a piece, made in a thread if the piece has many
    log-probabilities: those of a prompt."""
    if sum(1 + len(info.top or ()) for info in piece.tokens) <= INLINE_SCORES:
        return event(make())
    return await generation.in_thread(lambda: event(make()))


# ---- calls of tools ----------------------------------------------------------------------------


class _Readers:
    """Parsers of the choices in one answer."""

    def __init__(self, job: GenerationRequest) -> None:
        self._readers = [answer_reader(job.calls, f"{job.id}.{index}") for index in range(job.choices)]

    def read(self, piece: OutputPiece) -> Said:
        """Return the text and the calls that are certain with a piece."""
        return self._readers[piece.index].feed(piece.text, end=piece.finish_reason is not None)

    def finish_reason(self, piece: OutputPiece) -> str | None:
        return self._readers[piece.index].finish_reason(piece.finish_reason)


def _call_delta(delta: ToolCallDelta) -> text.CallDelta:
    """Return a part of a call as OpenAI streams it: the first one has the call's id and name."""
    return text.CallDelta(
        index=delta.index,
        id=delta.id,
        type=None if delta.id is None else "function",
        function=text.CallFunctionDelta(name=delta.name, arguments=delta.arguments),
    )


def whole_calls(deltas: Sequence[ToolCallDelta]) -> list[text.ToolCallAnswer]:
    """Return the calls that all their parts make up."""
    calls: list[text.ToolCallAnswer] = []
    for delta in deltas:
        if delta.id is not None:
            calls.append(text.ToolCallAnswer(id=delta.id, function=text.CalledFunction(delta.name or "", "")))
        calls[delta.index].function.arguments += delta.arguments
    return calls


# ---- POST /generate --------------------------------------------------------------------------


class GenerateView(GenerationView):
    """Answers of POST /generate; with `request`, events of that one of POST /generate/many."""

    def __init__(self, tokenizer: BaseTokenizer, request: int | None = None) -> None:
        super().__init__(tokenizer)
        many = request is not None
        self._of: Json = {"request": request} if many else {}
        self._text = text.ManyTextEvent if many else text.TextEvent
        self._choice_end = text.ManyChoiceEnd if many else text.ChoiceEnd
        self._end = text.ManyGenerationEnd if many else text.GenerationEnd

    def failure(self, error: ApiError) -> bytes:
        if not self._of:
            return super().failure(error)
        return event({**self._of, "status": status_of(error)[0], **error_body(error)})

    def answer(self, generation: GenerationRun, choices: Sequence[OutputPiece]) -> text.GeneratedAnswer:
        readers = _Readers(generation.request)
        made = [self._whole(piece, generation, readers) for piece in choices]
        return text.GeneratedAnswer(id=generation.request.id, choices=made, **_summary(generation))

    def _whole(
        self, piece: OutputPiece, generation: GenerationRun, readers: _Readers
    ) -> text.GeneratedChoice:
        job = generation.request
        said = readers.read(piece)
        told = job.sampling.logprobs is not None
        return text.GeneratedChoice(
            piece.index,
            said.content,
            readers.finish_reason(piece),
            flat_logprobs(piece.tokens, self._tokenizer) if told else None,
            UNSET if job.calls is None else whole_calls(said.calls),
            piece.reasoning or UNSET,
        )

    async def events(self, generation: GenerationRun) -> AsyncIterator[bytes]:
        job_id = generation.request.id
        readers = _Readers(generation.request)
        async for pieces in generation.pieces():
            chunk = b""
            for piece in pieces:
                said = readers.read(piece)
                if said.content or said.calls or piece.reasoning or piece.tokens:
                    chunk += await _event(
                        generation, piece, partial(self._text_event, generation, piece, said)
                    )
                if piece.finish_reason:
                    reason = readers.finish_reason(piece) or ""
                    chunk += event(
                        self._choice_end(**self._of, id=job_id, index=piece.index, finish_reason=reason)
                    )
            if chunk:
                yield chunk
        yield event(self._end(**self._of, id=job_id, **_summary(generation)))

    def _text_event(self, generation: GenerationRun, piece: OutputPiece, said: Said) -> Any:
        return self._text(
            **self._of,
            id=generation.request.id,
            index=piece.index,
            text=said.content,
            reasoning=piece.reasoning or UNSET,
            tool_calls=[_call_delta(delta) for delta in said.calls] or UNSET,
            logprobs=flat_logprobs(piece.tokens, self._tokenizer) if piece.tokens else UNSET,
        )


def _summary(generation: GenerationRun) -> Json:
    usage = generation.usage
    return {
        "adapter": generation.request.adapter.label,
        "usage": text.Usage(usage.prompt, usage.completion, usage.cached, usage.reasoning),
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

    def answer(self, generation: GenerationRun, choices: Sequence[OutputPiece]) -> list[text.TgiAnswer]:
        (piece,) = choices
        made = text.TgiAnswer(self._begun + piece.text)
        if self._details:
            name = self._tokenizer.token_text
            tokens = [text.TgiToken(info.token, name(info.token), info.logprob) for info in piece.tokens]
            made.details = text.TgiDetails(
                **asdict(self._ended(piece, generation)), prefill=[], tokens=tokens
            )
            if self._top:
                made.details.top_tokens = [self._top_tokens(info) for info in piece.tokens]
        return [made]

    async def events(self, generation: GenerationRun) -> AsyncIterator[bytes]:
        said, index = self._begun, 0
        async for pieces in generation.pieces():
            chunk = b""
            for piece in pieces:
                said += piece.text
                for info in piece.tokens:
                    index += 1
                    last = info is piece.tokens[-1]
                    ended = last and piece.finish_reason is not None
                    made = text.TgiTokenEvent(
                        index=index,
                        token=text.TgiToken(info.token, piece.text if last else "", info.logprob),
                        generated_text=said if ended else None,
                        details=self._ended(piece, generation) if ended else None,
                    )
                    if self._top:
                        made.top_tokens = self._top_tokens(info)
                    chunk += event(made)
                if piece.finish_reason is not None and not piece.tokens:
                    token = text.TgiToken(0, piece.text, 0.0, special=True)  # that ended the text
                    details = self._ended(piece, generation)
                    made = text.TgiTokenEvent(
                        index=index + 1, token=token, generated_text=said, details=details
                    )
                    chunk += event(made)
            if chunk:
                yield chunk

    def _ended(self, piece: OutputPiece, generation: GenerationRun) -> text.TgiEnd:
        reason = "length" if piece.finish_reason != "stop" else "eos_token"
        usage = generation.usage
        reason = "stop_sequence" if piece.stop is not None else reason
        return text.TgiEnd(reason, usage.completion, usage.prompt, usage.prompt, self._seed)

    def _top_tokens(self, info: TokenInfo) -> list[text.TgiToken]:
        name = self._tokenizer.token_text
        return [text.TgiToken(token, name(token), logprob) for token, logprob in info.top or ()]


# ---- OpenAI ----------------------------------------------------------------------------------


class OpenAIView(GenerationView):
    """Common parts of the answers of OpenAI's routes."""

    chunk: type[text.CompletionChunk] | type[text.ChatChunk]

    def __init__(self, tokenizer: BaseTokenizer, model: str, usage: UsageInStream) -> None:
        super().__init__(tokenizer)
        self._model = model
        self._usage = usage

    @abstractmethod
    def opening(self, generation: GenerationRun) -> list[Any]:
        """Return the first chunks of a stream, before any text."""

    @abstractmethod
    def part(self, piece: OutputPiece, said: Said, with_logprobs: bool) -> Any:
        """Return the choice of a chunk with what is new of one choice."""

    @abstractmethod
    def end(self, piece: OutputPiece, reason: str | None) -> Any:
        """Return the choice of a chunk that ends one choice."""

    async def events(self, generation: GenerationRun) -> AsyncIterator[bytes]:
        head: Json = self._head(generation)
        if self._usage == "last":
            head["usage"] = None
        readers = _Readers(generation.request)
        if self._usage == "always":
            head["usage"] = openai_usage(generation.usage)

        def chunk_of(choice: Any) -> bytes:
            return event(self.chunk(**head, choices=[choice]))

        chunk = b"".join(
            event(self.chunk(**head, **self.prompt_ids(generation), choices=[choice]))
            for choice in self.opening(generation)
        )
        async for pieces in generation.pieces():
            if self._usage == "always":
                head["usage"] = openai_usage(generation.usage)
            for piece in pieces:
                said = readers.read(piece)
                if said.content or said.calls or piece.reasoning or piece.tokens or piece.ids:
                    first = Said(said.content, said.calls[:1])
                    make = partial(self._chunk, generation, head, piece, first)
                    chunk += await _event(generation, piece, make)
                for call in said.calls[1:]:  # as OpenAI does: clients read one call of a chunk
                    chunk += chunk_of(self.part(OutputPiece(piece.index, ""), Said("", [call]), False))
                if piece.finish_reason:
                    chunk += chunk_of(self.end(piece, readers.finish_reason(piece)))
            if chunk:
                yield chunk
            chunk = b""
        if self._usage != "never":
            yield event(self.chunk(**head | {"usage": openai_usage(generation.usage)}, choices=[]))

    def _chunk(self, generation: GenerationRun, head: Json, piece: OutputPiece, said: Said) -> Any:
        """Return the chunk with what is new of one choice."""
        wanted = generation.request.sampling.logprobs is not None
        part = self.part(piece, said, wanted and bool(piece.tokens))
        if piece.ids:
            self.add_ids(part, piece, generation)
        return self.chunk(**head, choices=[part])

    def prompt_ids(self, generation: GenerationRun) -> Json:
        """Return the fields of an answer's head about its prompt, if token ids are asked for."""
        return {}

    def scores_of(self, generation: GenerationRun, prompt: int) -> text.PromptLogprobs:
        """Return a prompt's log-probabilities in vLLM's form: of each token its own, and those of
        alternatives, by token id."""
        name = self._tokenizer.token_text
        made: text.PromptLogprobs = [None]
        for one in generation.prompt_logprobs.get(prompt, ()):
            ranks = {token: rank for rank, (token, _) in enumerate(one.top, 1)}
            values = {one.token: one.logprob, **dict(one.top)}
            made.append(
                {
                    str(token): text.PromptTokenLogprob(value, ranks.get(token), name(token))
                    for token, value in values.items()
                }
            )
        return made

    def add_ids(self, choice: Any, piece: OutputPiece, generation: GenerationRun) -> None:
        """Add the token ids, as vLLM does."""
        choice.token_ids = piece.ids

    def _head(self, generation: GenerationRun) -> Json:
        job = generation.request
        # Of the base too: TGI's client reads no answer without one.
        fingerprint = job.adapter.version_label or self._model
        return {
            "id": job.id,
            "created": job.created,
            "model": self._model,
            "system_fingerprint": fingerprint,
        }


def openai_usage(usage: TokenUsage) -> text.OpenAIUsage:
    total, thoughts = usage.prompt + usage.completion, OutputTokensDetails(usage.reasoning)
    return text.OpenAIUsage(usage.prompt, usage.completion, total, CachedTokens(usage.cached), thoughts)


class CompletionView(OpenAIView):
    """Answers of POST /v1/completions."""

    chunk = text.CompletionChunk

    def __init__(self, tokenizer: BaseTokenizer, model: str, usage: UsageInStream) -> None:
        super().__init__(tokenizer, model, usage)
        self._told: set[int] = set()
        """Choices whose prompt's token ids were sent."""

    def answer(self, generation: GenerationRun, choices: Sequence[OutputPiece]) -> text.CompletionAnswer:
        job, made = generation.request, []
        for number, piece in enumerate(choices):
            choice = text.CompletionChoice(piece.index, piece.text, None, piece.finish_reason)
            if job.sampling.logprobs is not None:
                choice.logprobs = flat_logprobs(piece.tokens, self._tokenizer)
            if job.token_ids:
                self.add_ids(choice, piece, generation)
            if job.reports_prompt:
                choice.prompt_logprobs = self.scores_of(generation, number // job.n)
            made.append(choice)
        usage = openai_usage(generation.usage)
        return text.CompletionAnswer(**self._head(generation), choices=made, usage=usage)

    def add_ids(self, choice: Any, piece: OutputPiece, generation: GenerationRun) -> None:
        super().add_ids(choice, piece, generation)
        if piece.index not in self._told:
            self._told.add(piece.index)
            choice.prompt_token_ids = generation.request.prompts[piece.index // generation.request.n].tokens

    def opening(self, generation: GenerationRun) -> list[Any]:
        return []

    def part(self, piece: OutputPiece, said: Said, with_logprobs: bool) -> text.CompletionChunkChoice:
        logprobs = flat_logprobs(piece.tokens, self._tokenizer) if with_logprobs else None
        return text.CompletionChunkChoice(piece.index, said.content, logprobs)

    def end(self, piece: OutputPiece, reason: str | None) -> text.CompletionChunkChoice:
        return text.CompletionChunkChoice(piece.index, "", None, reason)


class ChatView(OpenAIView):
    """Answers of POST /v1/chat/completions."""

    chunk = text.ChatChunk

    def answer(self, generation: GenerationRun, choices: Sequence[OutputPiece]) -> text.ChatAnswer:
        job, readers = generation.request, _Readers(generation.request)
        made = []
        for piece in choices:
            said = readers.read(piece)
            message = text.ChatAnswerMessage(content=said.content)
            if piece.reasoning:
                message.reasoning_content = message.reasoning = piece.reasoning
            if said.calls:
                message.content, message.tool_calls = said.content or None, whole_calls(said.calls)
            logprobs = self._logprobs(piece) if job.sampling.logprobs is not None else None
            choice = text.ChatChoice(piece.index, message, logprobs, readers.finish_reason(piece))
            if job.token_ids:
                self.add_ids(choice, piece, generation)
            made.append(choice)
        head = {**self._head(generation), **self.prompt_ids(generation)}
        answer = text.ChatAnswer(**head, choices=made, usage=openai_usage(generation.usage))
        if job.reports_prompt:
            answer.prompt_logprobs = self.scores_of(generation, 0)
        return answer

    def prompt_ids(self, generation: GenerationRun) -> Json:
        job = generation.request
        return {"prompt_token_ids": job.prompts[0].tokens} if job.token_ids else {}

    def opening(self, generation: GenerationRun) -> list[Any]:
        """Return the role, once per choice."""
        delta = text.ChatDelta("assistant", "")
        return [text.ChatChunkChoice(index, delta) for index in range(generation.request.choices)]

    def part(self, piece: OutputPiece, said: Said, with_logprobs: bool) -> text.ChatChunkChoice:
        thought = piece.reasoning or None
        content = said.content if said.content or not (said.calls or thought) else None
        calls = [_call_delta(call) for call in said.calls] or None
        logprobs = self._logprobs(piece) if with_logprobs else None
        return text.ChatChunkChoice(
            piece.index, text.ChatDelta(None, content, thought, thought, calls), logprobs
        )

    def end(self, piece: OutputPiece, reason: str | None) -> text.ChatChunkChoice:
        return text.ChatChunkChoice(piece.index, text.ChatDelta(), None, reason)

    def _logprobs(self, piece: OutputPiece) -> text.ChatLogprobs:
        return text.ChatLogprobs(chat_logprobs(piece.tokens, self._tokenizer))
