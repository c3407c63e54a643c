"""One validated request, from submitting it to its last piece or vector: what all such routes share."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from msgspec.structs import replace as replaced

from onebase_edge.background import Threads
from onebase_edge.errors import (
    ApiError,
    ClientGoneError,
    InvalidRequestError,
    QuotaSpentError,
    SequenceFailedError,
    UnavailableError,
)
from onebase_engine.engine.grammars import BUDGET_SECONDS, COMPILE_BUDGET
from onebase_engine.engine.messages import Grammar, Pooling, Sampling, ScoredToken, SequenceOutput, Submit
from onebase_protocol import text
from onebase_server.adapters.catalog import AdapterChoice
from onebase_server.adapters.residency import Lease, Residency
from onebase_server.adapters.rollout_rules import RequestUnit
from onebase_server.inference.stream import ChoiceDecoder, OutputPiece, TokenInfo, prompt_token_infos
from onebase_server.inference.thoughts import Thinking
from onebase_server.inference.tokenization import BaseTokenizer
from onebase_server.inference.tool_call_parser import CallFormat
from onebase_server.inference.transcript import AnswerEnd, Opening, Record, Transcript, line, refused
from onebase_server.processes.inflight import Inflight, prompt_tokens
from onebase_server.processes.supervisor import EngineSupervisor
from onebase_server.telemetry.measurements import RequestTimestamps, TokenUsage

T = TypeVar("T")
_IN_VLLM = {"cancelled": "abort"}
_INLINE_TOKENS = 500
"""Longest prompt, in tokens, whose text is told by token on the event loop (about 5 ms)."""
_AT_ONCE = 64
"""Outputs of a transcript that are read while others wait."""


@dataclass(frozen=True)
class Prompt:
    """A prompt's token ids, and its text as the caller wrote it (None: written as ids)."""

    tokens: list[int]
    text: str | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """Request to the engine, to generate or to read texts, and its tenant. Choice `c` of prompt `p` has
    the index `p * n + c`."""

    id: str
    tenant: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    adapter: AdapterChoice = field(default_factory=AdapterChoice)
    tokenizer: BaseTokenizer | None = field(default=None, compare=False, repr=False)
    """Tokenizer of the adapter; None: the base's."""
    n: int = 1
    stops: tuple[str, ...] = ()
    echo: bool = False
    scores_only: bool = False
    """max_tokens 0 with echo: the engine makes one token, which is not shown."""
    timeout_s: float | None = None
    deadline: float | None = None
    """Time at which `timeout_s` ends, on the event loop's clock. It counts from the request's arrival."""
    expected_tokens: int = 0
    """Tokens reserved in the quota for each choice: `max_tokens`, or the default estimate."""
    has_default_limit: bool = False
    """Whether `max_tokens` is not the request's own and yet less than what fits."""
    priority: int = 0
    background: bool = False
    """Whether its sequences only use capacity that other requests leave free."""
    grammar: Grammar | None = None
    grammar_param: str = ""
    """Field of the request that gives the grammar."""
    token_ids: bool = False
    """Whether the answer has the token ids of the prompts and of the choices."""
    special_tokens: bool = False
    """Whether the names of special tokens are part of the text."""
    calls: CallFormat | None = None
    """Format of tool calls, if the answer may have any."""
    thinking: Thinking | None = None
    """Thought before the answer, if the base thinks."""
    pooling: Pooling | None = None
    branches: tuple[tuple[int, ...], ...] = ()
    """Tokens after the prompt that are scored, for each choice."""
    is_continuation: bool = False
    """See Inflight."""
    unit: RequestUnit | None = None
    """Keys by which rollouts divide requests; None: the active version answers it."""
    user: str | None = None
    """User whom the request names; None if it names none."""
    said: Sequence[Any] | None = field(default=None, compare=False, repr=False)
    """Messages of the conversation that it answers, for a rollout's judge; None: no judge reads it, or its
    prompt is no conversation."""
    plan_with: Callable[[AdapterChoice], Awaitable[GenerationRequest]] | None = field(
        default=None, compare=False, repr=False
    )
    """Function that plans the same request with another version, on a request that may get a copy."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""

    @property
    def reports_prompt(self) -> bool:
        """Return True if the answer has the prompt's logprobs, and not as a part of its text."""
        in_text = self.echo and self.sampling.logprobs is not None
        return self.sampling.prompt_logprobs is not None and not in_text

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.n

    @property
    def generates(self) -> bool:
        """Return False if it only reads texts: for vectors, classes or scores."""
        return self.pooling is None and not self.branches

    @property
    def reserved_tokens(self) -> int:
        """Return the tokens that it reserves in a quota until it has ended."""
        given = sum(len(prompt.tokens) for prompt in self.prompts)
        branches = len(self.prompts) * sum(map(len, self.branches))
        return given + branches + self.choices * self.expected_tokens

    def parts(self, most: int) -> list[GenerationRequest]:
        """Split a request that only reads into requests of at most so many choices each."""
        if self.choices <= most:
            return [self]
        parts = []
        for first in range(0, self.choices, most):
            part, some = replace(self, id=f"{self.id}.{first}"), slice(first, first + most)
            if self.branches:
                branches = self.branches[some]
                parts.append(replace(part, branches=branches, n=len(branches)))
            else:
                parts.append(replace(part, prompts=self.prompts[some]))
        return parts


@dataclass
class RequestTiming:
    """Seconds: in the engine's queue, until the first token, and from the first token to the last."""

    queue_s: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0

    def rounded(self) -> text.Timing:
        return text.Timing(*(round(value, 6) for value in vars(self).values()))


def new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(12)}"


def opening(request: GenerationRequest) -> Opening:
    """Return the first record of a request's transcript."""
    sampling = request.sampling
    names = [f"{use.name}@{use.digest}" for use in request.adapter.uses]
    return Opening(
        id=request.id,
        created=request.created,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        adapters=names,
    )


class UsageRecorder(Protocol):
    """Receiver of the usage of one request."""

    def sequences_ended(self) -> None:
        """Handle the end of its last sequence in the engine."""

    def used(self, usage: TokenUsage, timestamps: RequestTimestamps, finished: Counter[str]) -> None:
        """Handle the end of the request. Called once, if it was submitted. finished: choices by how they
        ended, in vLLM's words: `stop`, `length`, `abort`, `error`."""

    @property
    def token_gap(self) -> Callable[[float], None]:
        """Return a function to be called with the seconds from each output of a sequence to its next."""


class AnswerListener(Protocol):
    """Listener to the text of one request as it is made."""

    def heard(self, piece: OutputPiece) -> None:
        """Handle a piece of one choice."""

    def failed(self, code: str | None) -> None:
        """Handle the error with which the engine ends a choice."""


class RequestRun:
    """Run of one request in the engine, from its start to its end; `cancel` ends it early.

    Args:
        stream_limit: outputs per choice that may wait for a slow reader; None is for callers that are always
            read (answers in one piece).
        on_cut: called when a slow reader is cut off.
        resume_tokens: resume state of each prompt, see Submit; None for a new request.
        recorder: receives its usage: that of its answer, or of what was computed if the answer was not read
            to its end.
    """

    def __init__(
        self,
        supervisor: EngineSupervisor,
        request: GenerationRequest,
        stream_limit: int | None = None,
        on_cut: Callable[[], None] = lambda: None,
        *,
        recorder: UsageRecorder,
        resume_tokens: Sequence[dict[int, list[int]]] | None = None,
    ) -> None:
        self.request = request
        self._recorder = recorder
        self._with_engine = self._with_reader = False
        self._usage_recorded = True
        self._supervisor = supervisor
        # The id of a resumed answer came from a client: another request may have it.
        self._id = request.id if resume_tokens is None else new_id("resumed-")
        submits = [
            self._submit(index, prompt, None if resume_tokens is None else resume_tokens[index])
            for index, prompt in enumerate(request.prompts)
        ]
        self._prompt_of = {submit.id: index for index, submit in enumerate(submits)}
        self._cached_known: set[int] = set()
        self.usage = TokenUsage(prompt=sum(map(prompt_tokens, submits)))
        submits = [submit for submit in submits if submit.choices]
        limit = (stream_limit or 2**31) * request.choices
        self._inflight = Inflight(
            submits,
            limit,
            on_cut=on_cut,
            on_ended=self._sequences_ended,
            on_gap=recorder.token_gap,
            is_continuation=request.is_continuation,
        )
        self.timestamps = self._inflight.timestamps
        self._finished: Counter[str] = Counter()
        self._open = request.choices
        self._deadline: asyncio.TimerHandle | None = None
        self._lease: Lease | None = None

    async def start(self, residency: Residency) -> None:
        """Have the adapters loaded, then submit to the engine, which keeps them until the last sequence has
        ended.

        Raises UnavailableError, EngineRestartedError, QueueFullError, InvalidRequestError,
        AdapterDeletedError, CrashesEngineError.
        """
        if not self._inflight.submits:  # all was generated elsewhere
            self._with_reader, self._usage_recorded = True, False
            self._recorder.sequences_ended()
            return
        if self.request.adapter.uses:
            request = self.request
            self._lease = residency.lease(request.adapter.uses, on_revoked=self._fail, tenant=request.tenant)
            async with in_time(self.request.deadline):
                await self._lease.ready()
        self.timestamps.submitted = time.monotonic()
        try:
            self._supervisor.submit(self._inflight)
        except BaseException:
            self._release_adapters()
            raise
        self._with_engine = self._with_reader = True
        self._usage_recorded = False
        if self.request.deadline is not None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_at(
                self.request.deadline, self._supervisor.client.cancel, self._inflight
            )

    def _count_cached(self, output: SequenceOutput, prompt: int) -> None:
        """Count a prompt's cached tokens once: its other choices find in the cache what the first one
        computed."""
        if output.cached_tokens is not None and prompt not in self._cached_known:
            self._cached_known.add(prompt)
            self.usage.cached += output.cached_tokens

    def _release_adapters(self) -> None:
        if self._lease is not None:
            self._lease.release()

    def _sequences_ended(self) -> None:
        self._release_adapters()
        self._with_engine = False
        self._recorder.sequences_ended()
        self._record_usage()

    def leave(self) -> None:
        """Note that nobody reads it any more."""
        self._with_reader = False
        self._record_usage()

    def _record_usage(self) -> None:
        """Report the request's usage once neither the reader nor, unless all was read, the engine adds to
        it."""
        whole = not self._open
        if self._usage_recorded or self._with_reader or (self._with_engine and not whole):
            return
        self._usage_recorded = True
        left = self.request.choices - self._finished.total()
        if left:
            self._finished["error" if self._inflight.broken else "abort"] += left
        self._recorder.used(self.usage if whole else self._inflight.computed, self.timestamps, self._finished)

    def cancel(self) -> None:
        """Cancel the request: the engine frees its sequences, and `pieces` raises ClientGoneError."""
        self._fail(ClientGoneError())

    def stop(self) -> bool:
        """Have the engine end the sequences early, with what there is as the answer. Return False if all have
        ended."""
        if not self._with_engine:
            return False
        self._supervisor.client.cancel(self._inflight)
        return True

    def _fail(self, error: ApiError) -> None:
        self._inflight.fail(error)
        self._supervisor.client.cancel(self._inflight)

    @contextlib.contextmanager
    def _being_read(self) -> Iterator[None]:
        """Cancel sequences that still run when reading ends, whatever the reason."""
        try:
            yield
        finally:
            if self._deadline is not None:
                self._deadline.cancel()
            if self._open:
                self.cancel()
            self.leave()

    def _submit(self, index: int, prompt: Prompt, resume_tokens: dict[int, list[int]] | None) -> Submit:
        request, sampling = self.request, self.request.sampling
        if resume_tokens and all(resume_tokens.values()):  # then the prompt's have been sent
            sampling = replaced(sampling, prompt_logprobs=None)
        return Submit(
            id=f"{self._id}.{index}",
            prompt=prompt.tokens,
            sampling=sampling,
            adapters=list(request.adapter.refs),
            n=request.n,
            tenant=request.tenant,
            priority=request.priority,
            background=request.background,
            grammar=request.grammar,
            pooling=request.pooling,
            branches=[list(branch) for branch in request.branches],
            resume_tokens=resume_tokens,
        )


class Reading(RequestRun):
    """Run of a request that only reads texts."""

    async def outputs(self) -> list[SequenceOutput]:
        """Return the last output of each choice, in order. Raises what `GenerationRun.pieces` raises, and
        UnavailableError at the deadline."""
        found: dict[int, SequenceOutput] = {}
        with self._being_read():
            while self._open:
                for output in await self._inflight.next_outputs():
                    if output.finish == "error":
                        self._finished["error"] += 1
                        raise _sequence_error(output, self.request)
                    if output.finish == "cancelled":
                        raise UnavailableError(
                            "timeout_s: it was not computed in time. Send less at once, or raise timeout_s.",
                            code="timeout",
                            retry_after=1.0,
                        )
                    prompt = self._prompt_of[output.id]
                    self._count_cached(output, prompt)
                    found[prompt * self.request.n + output.choice] = output
                    self._finished["stop"] += 1
                    self._open -= 1
        return [found[index] for index in range(self.request.choices)]


class GenerationRun(RequestRun):
    """Run of a request that generates. `pieces` yields its text, step by step.

    Args:
        transcript: transcript that it resumes from; `request` agrees with it.
        resume_tokens: result of `resume_tokens_of` for the transcript.
        transcript_number: number of the request in the transcript of its stream; None: it records none.
        listeners: hear what it makes, before the reader does.
    """

    def __init__(
        self,
        supervisor: EngineSupervisor,
        tokenizer: BaseTokenizer,
        threads: Threads,
        request: GenerationRequest,
        stream_limit: int | None = None,
        on_cut: Callable[[], None] = lambda: None,
        *,
        recorder: UsageRecorder,
        transcript: Transcript | None = None,
        resume_tokens: Sequence[dict[int, list[int]]] | None = None,
        transcript_number: int | None = None,
        listeners: Sequence[AnswerListener] = (),
    ) -> None:
        super().__init__(
            supervisor, request, stream_limit, on_cut, recorder=recorder, resume_tokens=resume_tokens
        )
        tokenizer = request.tokenizer or tokenizer
        self._tokenizer = tokenizer
        self._threads = threads
        self._choices = [_choice(request, index, tokenizer) for index in range(request.choices)]
        self._listeners = listeners
        self._transcript = transcript
        self._transcript_number = transcript_number
        self._on_cut = on_cut
        self._records: list[Record] = []
        self.ended: AnswerEnd | None = None if transcript is None else transcript.ended
        """Figures of the answer's end, set with the last piece."""
        if transcript is None:
            self._record(opening(request))
        self._echoed: set[int] = set()
        self._echo_tokens: dict[int, list[TokenInfo]] = {}
        """Tokens of each prompt that is echoed with its log-probabilities, by its number."""
        self.prompt_logprobs: dict[int, list[ScoredToken]] = {}
        """Log-probabilities of each prompt's tokens but the first, by the prompt's number, if they were asked
        for."""

    def _record(self, record: Record) -> None:
        if self._transcript_number is not None:
            self._records.append(record)

    def take_transcript(self) -> bytes:
        """Return the transcript's line for the pieces since the last call; empty if there were none."""
        record, self._records = self._records, []
        return line(record, self._transcript_number or 0) if record else b""

    def hand_over(self) -> None:
        """Drop the connection of a stream that records a transcript: another server resumes it."""
        if self._transcript_number is not None:
            self._on_cut()

    @property
    def ended_at(self) -> int:
        """Time of the end in seconds since 1970; 0 while it runs."""
        return 0 if self.ended is None else self.ended.at

    @property
    def timing(self) -> RequestTiming:
        """Return the durations up to now, or of the whole request if it has ended."""
        if self.ended is not None:
            return RequestTiming(self.ended.queue_s, self.ended.ttft_s, self.ended.decode_s)
        timestamps = self.timestamps
        timing = RequestTiming(queue_s=max(0.0, timestamps.started - timestamps.submitted))
        if timestamps.first:
            timing.ttft_s = timestamps.first - timestamps.arrived
            timing.decode_s = timestamps.last - timestamps.first
        return timing

    async def pieces(self) -> AsyncIterator[list[OutputPiece]]:
        """Yield the pieces of all choices, one list per engine step.

        Raises SequenceFailedError when the engine ends a sequence with an error, EngineRestartedError when it
        dies, CrashesEngineError when it dies under this request again, SlowReaderError and ClientGoneError.
        """
        with self._being_read():
            for number, made in enumerate([] if self._transcript is None else self._transcript.outputs):
                await self._read_echoed((int(one.id), one) for one in made)
                if pieces := [piece for one in made for piece in self._feed(one, int(one.id))]:
                    yield pieces
                if number % _AT_ONCE == 0:
                    await asyncio.sleep(0)
            while self._open:
                made = await self._inflight.next_outputs()
                if self._transcript_number is not None:
                    self._record([replaced(one, id=str(self._prompt_of[one.id])) for one in made])
                await self._read_echoed((self._prompt_of[one.id], one) for one in made)
                if pieces := [piece for one in made for piece in self._feed(one, self._prompt_of[one.id])]:
                    yield pieces
            if self.ended is None:
                self.ended = AnswerEnd(**vars(self.timing), at=int(time.time()))
                self._record(self.ended)

    async def collect(self) -> list[OutputPiece]:
        """Return the whole of each choice, in order."""
        whole = [OutputPiece(index, "") for index in range(self.request.choices)]
        async for pieces in self.pieces():
            for piece in pieces:
                target = whole[piece.index]
                target.text += piece.text
                target.reasoning += piece.reasoning
                target.tokens += piece.tokens
                target.ids += piece.ids
                target.finish_reason, target.stop = piece.finish_reason, piece.stop
        return whole

    async def _read_echoed(self, outputs: Iterable[tuple[int, SequenceOutput]]) -> None:
        """Make the tokens of prompts whose log-probabilities have come, in a thread if they are many."""
        for prompt, output in outputs if self.request.echo else ():
            logprobs = output.prompt_logprobs
            if logprobs is None or prompt in self._echo_tokens:
                continue
            make = partial(
                prompt_token_infos, self.request.prompts[prompt].tokens, logprobs, self._tokenizer.pieces()
            )
            few = len(logprobs) <= _INLINE_TOKENS
            self._echo_tokens[prompt] = make() if few else await self.in_thread(make)

    async def in_thread(self, call: Callable[[], T]) -> T:
        """Return the result of work that would hold up the event loop, done in a thread in its tenant's
        turn."""
        return await self._threads.run_for(self.request.tenant, call)

    def _feed(self, output: SequenceOutput, prompt: int) -> list[OutputPiece]:
        choice = self._choices[prompt * self.request.n + output.choice]
        if choice.finish_reason is not None:
            return []
        self._count_cached(output, prompt)
        if output.finish == "error":
            self._finished["error"] += 1
            for listener in self._listeners:
                listener.failed(output.error_code)
            raise _sequence_error(output, self.request)
        before, thought = choice.completion_tokens, choice.reasoning_tokens
        piece = choice.feed(output)
        if piece is not None:
            for listener in self._listeners:
                listener.heard(piece)
        self.usage.completion += choice.completion_tokens - before
        self.usage.reasoning += choice.reasoning_tokens - thought
        if choice.finish_reason is not None:
            self._finished[_IN_VLLM.get(choice.finish_reason, choice.finish_reason)] += 1
            self._open -= 1
            if choice.stopped_here and output.finish is None:
                self._supervisor.client.cancel(self._inflight, output.id, output.choice)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs[prompt] = output.prompt_logprobs
        if self.request.echo:
            return self._with_echo(choice, prompt, output, piece)
        return [piece] if piece else []

    def _with_echo(
        self, choice: ChoiceDecoder, prompt: int, output: SequenceOutput, piece: OutputPiece | None
    ) -> list[OutputPiece]:
        """Put the prompt before a choice's first piece, with its logprobs if they were asked for."""
        pieces = [piece] if piece else []
        if choice.index in self._echoed or (piece is None and output.prompt_logprobs is None):
            return pieces
        self._echoed.add(choice.index)
        source = self.request.prompts[prompt]
        tokens = self._echo_tokens.get(prompt, [])
        if self.request.sampling.prompt_logprobs is not None and not tokens:
            tokens = prompt_token_infos(source.tokens, [], self._tokenizer.pieces())
        return [OutputPiece(choice.index, _echo_text(source, self._tokenizer), tokens=tokens), *pieces]


def _shown(request: GenerationRequest, tokenizer: BaseTokenizer) -> frozenset[int]:
    """Return the special tokens whose names are part of the text."""
    if request.special_tokens:
        return tokenizer.special
    formats = [made.format.shown for made in (request.calls, request.thinking) if made is not None]
    return frozenset().union(*formats)


def _choice(request: GenerationRequest, index: int, tokenizer: BaseTokenizer) -> ChoiceDecoder:
    offset = len(_echo_text(request.prompts[index // request.n], tokenizer)) if request.echo else 0
    thinking = request.thinking
    return ChoiceDecoder(
        index,
        tokenizer.pieces(_shown(request, tokenizer)),
        request.stops,
        min_tokens=request.sampling.min_tokens,
        offset=offset,
        discard_tokens=request.scores_only,
        with_ids=request.token_ids,
        thought=None
        if thinking is None
        else thinking.format.reader(thinking, calls=request.calls is not None),
    )


def _echo_text(prompt: Prompt, tokenizer: BaseTokenizer) -> str:
    return tokenizer.decode(prompt.tokens) if prompt.text is None else prompt.text


def resume_tokens_of(
    request: GenerationRequest, transcript: Transcript, tokenizer: BaseTokenizer
) -> list[dict[int, list[int]]]:
    """Return, for each prompt, the tokens of the choices that have not ended. A long transcript takes 0.1 s.

    Raises InvalidRequestError.
    """
    choices = [_choice(request, index, request.tokenizer or tokenizer) for index in range(request.choices)]
    tokens: list[list[int]] = [[] for _ in choices]
    over: set[int] = set()
    for output in transcript.all():
        index = int(output.id) * request.n + output.choice
        if index in over:
            continue
        if request.stops:
            choices[index].feed(output)
        tokens[index] += output.tokens
        if output.finish is not None or choices[index].stopped_here:
            over.add(index)
    if any(len(some) >= request.sampling.max_tokens for n, some in enumerate(tokens) if n not in over):
        raise refused("has more tokens than the request asks for")
    return [
        {n: tokens[p * request.n + n] for n in range(request.n) if p * request.n + n not in over}
        for p in range(len(request.prompts))
    ]


@contextlib.asynccontextmanager
async def in_time(deadline: float | None) -> AsyncIterator[None]:
    """Bound the waiting for an adapter. Raises UnavailableError at `deadline` (on the event loop's clock)."""
    try:
        async with asyncio.timeout_at(deadline) as limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise UnavailableError(
            "adapter: it was not in memory before the request's time was over (timeout_s). It is still being "
            "loaded: send the request again in a moment, or raise timeout_s.",
            code="adapter_timeout",
            retry_after=2.0,
        ) from error


def _sequence_error(output: SequenceOutput, request: GenerationRequest) -> ApiError:
    if output.error_code == "grammar_refused":
        message = f"{request.grammar_param}: {output.error_message}. Change it, or leave it out."
        return InvalidRequestError(message, param=request.grammar_param, code="grammar_refused")
    if output.error_code == "grammars_busy":
        message = f"{request.grammar_param}: {output.error_message}. Send the request again in a moment."
        return UnavailableError(message, code="grammars_busy", retry_after=output.retry_after or 5.0)
    if output.error_code == "grammar_limit":
        message = (
            f"{request.grammar_param}: {output.error_message}. Use one of those, or send it again later."
        )
        of = {"quota": "grammar_seconds", "limit": COMPILE_BUDGET, "of": "tenant"}
        return QuotaSpentError(message, of, retry_after=output.retry_after or BUDGET_SECONDS)
    return SequenceFailedError(
        output.error_message or "The engine ended this request with an error.",
        code=output.error_code or "engine_error",
        param=output.error_param,
    )
