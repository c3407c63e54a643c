"""One validated request, from submitting it to its last piece or vector: what all such routes share."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeVar

from msgspec.structs import replace as replaced

from onebase_edge.background import Threads
from onebase_edge.errors import (
    ClientGoneError,
    InvalidRequestError,
    OneBaseError,
    RateLimitError,
    RowFailedError,
    UnavailableError,
)
from onebase_engine.engine.grammars import BUDGET_SECONDS, COMPILE_BUDGET
from onebase_engine.engine.messages import Grammar, Pooling, RowOutput, Sampling, Submit, TokenLogprob
from onebase_protocol import text
from onebase_server.adapters.catalog import AdapterChoice
from onebase_server.adapters.residency import Lease, Residency
from onebase_server.inference.stream import Choice, Piece, TokenInfo, prompt_token_infos
from onebase_server.inference.tokenization import BaseTokenizer
from onebase_server.inference.tool_call_parser import CallFormat
from onebase_server.inference.transcript import Ended, Opening, Record, Transcript, line, refused
from onebase_server.processes.inflight import Inflight, prompt_tokens
from onebase_server.processes.supervisor import EngineSupervisor
from onebase_server.telemetry.measurements import Moments, Usage

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
class Job:
    """A request for the engine, to generate or to read texts, and its tenant. Choice `c` of prompt `p` has
    the index `p * n + c`."""

    id: str
    tenant: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    adapter: AdapterChoice = field(default_factory=AdapterChoice)
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
    priority: int = 0
    background: bool = False
    """Whether its sequences only use capacity that other requests leave free."""
    grammar: Grammar | None = None
    grammar_param: str = ""
    """The field of the request that says it."""
    token_ids: bool = False
    """Whether the answer has the token ids of the prompts and of the choices."""
    calls: CallFormat | None = None
    """Format of tool calls, if the answer may have any."""
    pooling: Pooling | None = None
    branches: tuple[tuple[int, ...], ...] = ()
    """Tokens after the prompt that are scored, for each choice."""
    goes_on: bool = False
    """See Inflight."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""

    @property
    def tells_prompt(self) -> bool:
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
    def tokens_set_aside(self) -> int:
        """Return the tokens that it reserves in a quota until it has ended."""
        given = sum(len(prompt.tokens) for prompt in self.prompts)
        branches = len(self.prompts) * sum(map(len, self.branches))
        return given + branches + self.choices * self.expected_tokens

    def parts(self, most: int) -> list[Job]:
        """Jobs that are the same together, with at most so many choices each. Of one that is only read."""
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
class Timing:
    """Seconds: in the engine's queue, until the first token, and from the first token to the last."""

    queue_s: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0

    def rounded(self) -> text.Timing:
        return text.Timing(*(round(value, 6) for value in vars(self).values()))


def new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(12)}"


def opening(job: Job) -> Opening:
    """Return the first record of a request's transcript."""
    sampling = job.sampling
    names = [f"{use.name}@{use.digest}" for use in job.adapter.uses]
    return Opening(
        id=job.id, created=job.created, seed=sampling.seed, max_tokens=sampling.max_tokens, adapters=names
    )


class Meter(Protocol):
    """Recorder of what a request uses."""

    def rows_ended(self) -> None:
        """Handle the end of its last sequence in the engine."""

    def used(self, usage: Usage, moments: Moments, finished: Counter[str]) -> None:
        """It is over. Called once, if it was submitted. finished: choices by how they ended, in vLLM's words:
        `stop`, `length`, `abort`, `error`."""

    @property
    def token_gap(self) -> Callable[[float], None]:
        """Return a function to be called with the seconds from each output of a sequence to its next."""


class Run:
    """A job with the engine, from its start to its end; `cancel` ends it early.

    Args:
        stream_limit: outputs per choice that may wait for a slow reader; None is for callers that are always
            read (answers in one piece).
        on_cut: called when a slow reader is cut off.
        begun: of each prompt, see Submit; None: nothing has begun.
        meter: told what it took: what its answer says, or what was computed if that was not read to its end.
    """

    def __init__(
        self,
        supervisor: EngineSupervisor,
        job: Job,
        stream_limit: int | None = None,
        on_cut: Callable[[], None] = lambda: None,
        *,
        meter: Meter,
        begun: Sequence[dict[int, list[int]]] | None = None,
    ) -> None:
        self.job = job
        self._meter = meter
        self._with_engine = self._with_reader = False
        self._metered = True
        self._supervisor = supervisor
        # The id of an answer that goes on was told by a client: another request may have it.
        self._id = job.id if begun is None else new_id("resumed-")
        submits = [
            self._submit(index, prompt, None if begun is None else begun[index])
            for index, prompt in enumerate(job.prompts)
        ]
        self._prompt_of = {submit.id: index for index, submit in enumerate(submits)}
        self._cached_known: set[int] = set()
        self.usage = Usage(prompt=sum(map(prompt_tokens, submits)))
        submits = [submit for submit in submits if submit.choices]
        limit = (stream_limit or 2**31) * job.choices
        self._inflight = Inflight(
            submits,
            limit,
            on_cut=on_cut,
            on_ended=self._rows_ended,
            on_gap=meter.token_gap,
            goes_on=job.goes_on,
        )
        self.moments = self._inflight.moments
        self._finished: Counter[str] = Counter()
        self._open = job.choices
        self._deadline: asyncio.TimerHandle | None = None
        self._lease: Lease | None = None

    async def start(self, residency: Residency) -> None:
        """Have the adapters loaded, then submit to the engine, which keeps them until the last row has ended.

        Raises UnavailableError, EngineRestartedError, QueueFullError, InvalidRequestError,
        AdapterDeletedError, CrashesEngineError.
        """
        if not self._inflight.submits:  # all was generated elsewhere
            self._with_reader, self._metered = True, False
            self._meter.rows_ended()
            return
        if self.job.adapter.uses:
            job = self.job
            self._lease = residency.lease(job.adapter.uses, on_revoked=self._fail, tenant=job.tenant)
            async with in_time(self.job.deadline):
                await self._lease.ready()
        self.moments.submitted = time.monotonic()
        try:
            self._supervisor.submit(self._inflight)
        except BaseException:
            self._release_adapters()
            raise
        self._with_engine = self._with_reader = True
        self._metered = False
        if self.job.deadline is not None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_at(self.job.deadline, self._supervisor.router.cancel, self._inflight)

    def _count_cached(self, output: RowOutput, prompt: int) -> None:
        """Count a prompt's cached tokens once: its other choices find in the cache what the first one
        computed."""
        if output.cached_tokens is not None and prompt not in self._cached_known:
            self._cached_known.add(prompt)
            self.usage.cached += output.cached_tokens

    def _release_adapters(self) -> None:
        if self._lease is not None:
            self._lease.release()

    def _rows_ended(self) -> None:
        self._release_adapters()
        self._with_engine = False
        self._meter.rows_ended()
        self._tell_meter()

    def leave(self) -> None:
        """Nobody reads it any more."""
        self._with_reader = False
        self._tell_meter()

    def _tell_meter(self) -> None:
        """Report the request's usage once neither the reader nor, unless all was read, the engine adds to
        it."""
        whole = not self._open
        if self._metered or self._with_reader or (self._with_engine and not whole):
            return
        self._metered = True
        left = self.job.choices - self._finished.total()
        if left:
            self._finished["error" if self._inflight.broken else "abort"] += left
        self._meter.used(self.usage if whole else self._inflight.computed, self.moments, self._finished)

    def cancel(self) -> None:
        """Cancel the request: the engine frees its sequences, and `pieces` raises ClientGoneError."""
        self._fail(ClientGoneError())

    def stop(self) -> bool:
        """Have the engine end the sequences early, with what there is as the answer. Return False if all have
        ended."""
        if not self._with_engine:
            return False
        self._supervisor.router.cancel(self._inflight)
        return True

    def _fail(self, error: OneBaseError) -> None:
        self._inflight.fail(error)
        self._supervisor.router.cancel(self._inflight)

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

    def _submit(self, index: int, prompt: Prompt, begun: dict[int, list[int]] | None) -> Submit:
        job, sampling = self.job, self.job.sampling
        if begun and all(begun.values()):  # then the prompt's were told
            sampling = replaced(sampling, prompt_logprobs=None)
        return Submit(
            id=f"{self._id}.{index}",
            prompt=prompt.tokens,
            sampling=sampling,
            adapters=list(job.adapter.refs),
            n=job.n,
            tenant=job.tenant,
            priority=job.priority,
            background=job.background,
            grammar=job.grammar,
            pooling=job.pooling,
            branches=[list(branch) for branch in job.branches],
            begun=begun,
        )


class Reading(Run):
    """A job that only reads texts."""

    async def outputs(self) -> list[RowOutput]:
        """The last output of each choice, in their order. Raises what `Generation.pieces` raises, and
        UnavailableError at the deadline."""
        found: dict[int, RowOutput] = {}
        with self._being_read():
            while self._open:
                for output in await self._inflight.take():
                    if output.finish == "error":
                        self._finished["error"] += 1
                        raise _row_error(output, self.job)
                    if output.finish == "cancelled":
                        raise UnavailableError(
                            "timeout_s: it was not computed in time. Send less at once, or raise timeout_s.",
                            code="timeout",
                            retry_after=1.0,
                        )
                    prompt = self._prompt_of[output.id]
                    self._count_cached(output, prompt)
                    found[prompt * self.job.n + output.choice] = output
                    self._finished["stop"] += 1
                    self._open -= 1
        return [found[index] for index in range(self.job.choices)]


class Generation(Run):
    """A job that generates. `pieces` yields what became certain, step by step.

    Args:
        transcript: what it goes on from; `job` is as it says.
        begun: what `begun_of` makes of it.
        telling: as which request of its stream it tells a transcript; None: it tells none.
    """

    def __init__(
        self,
        supervisor: EngineSupervisor,
        tokenizer: BaseTokenizer,
        threads: Threads,
        job: Job,
        stream_limit: int | None = None,
        on_cut: Callable[[], None] = lambda: None,
        *,
        meter: Meter,
        transcript: Transcript | None = None,
        begun: Sequence[dict[int, list[int]]] | None = None,
        telling: int | None = None,
    ) -> None:
        super().__init__(supervisor, job, stream_limit, on_cut, meter=meter, begun=begun)
        self._tokenizer = tokenizer
        self._threads = threads
        self._choices = [_choice(job, index, tokenizer) for index in range(job.choices)]
        self._transcript = transcript
        self._telling = telling
        self._told: list[Record] = []
        self.ended: Ended | None = None if transcript is None else transcript.ended
        """Figures of the answer's end, set with the last piece."""
        if transcript is None:
            self._tell(opening(job))
        self._echoed: set[int] = set()
        self._echo_tokens: dict[int, list[TokenInfo]] = {}
        """Tokens of each prompt that is echoed with its log-probabilities, by its number."""
        self.prompt_logprobs: dict[int, list[TokenLogprob]] = {}
        """Log-probabilities of each prompt's tokens but the first, by the prompt's number, if they were asked
        for."""

    def _tell(self, told: Record) -> None:
        if self._telling is not None:
            self._told.append(told)

    def take_told(self) -> bytes:
        """Return the transcript's line for the pieces since the last call; empty if there were none."""
        told, self._told = self._told, []
        return line(told, self._telling or 0) if told else b""

    @property
    def ended_at(self) -> int:
        """Time of the end in seconds since 1970; 0 while it runs."""
        return 0 if self.ended is None else self.ended.at

    @property
    def timing(self) -> Timing:
        """Return the durations up to now, or of the whole request if it has ended."""
        if self.ended is not None:
            return Timing(self.ended.queue_s, self.ended.ttft_s, self.ended.decode_s)
        moments = self.moments
        timing = Timing(queue_s=max(0.0, moments.begun - moments.submitted))
        if moments.first:
            timing.ttft_s = moments.first - moments.came
            timing.decode_s = moments.last - moments.first
        return timing

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Pieces of all choices, one list per engine step.

        Raises RowFailedError when the engine ends a row with an error, EngineRestartedError when it dies,
        CrashesEngineError when it dies under this request again, SlowReaderError and ClientGoneError.
        """
        with self._being_read():
            for number, made in enumerate([] if self._transcript is None else self._transcript.outputs):
                await self._read_echoed((int(one.id), one) for one in made)
                if pieces := [piece for one in made for piece in self._feed(one, int(one.id))]:
                    yield pieces
                if number % _AT_ONCE == 0:
                    await asyncio.sleep(0)
            while self._open:
                made = await self._inflight.take()
                if self._telling is not None:
                    self._tell([replaced(one, id=str(self._prompt_of[one.id])) for one in made])
                await self._read_echoed((self._prompt_of[one.id], one) for one in made)
                if pieces := [piece for one in made for piece in self._feed(one, self._prompt_of[one.id])]:
                    yield pieces
            if self.ended is None:
                self.ended = Ended(**vars(self.timing), at=int(time.time()))
                self._tell(self.ended)

    async def collect(self) -> list[Piece]:
        """The whole of each choice, in order."""
        whole = [Piece(index, "") for index in range(self.job.choices)]
        async for pieces in self.pieces():
            for piece in pieces:
                target = whole[piece.index]
                target.text += piece.text
                target.tokens += piece.tokens
                target.ids += piece.ids
                target.finish_reason, target.stop = piece.finish_reason, piece.stop
        return whole

    async def _read_echoed(self, outputs: Iterable[tuple[int, RowOutput]]) -> None:
        """Make the tokens of prompts whose log-probabilities have come, in a thread if they are many."""
        for prompt, output in outputs if self.job.echo else ():
            logprobs = output.prompt_logprobs
            if logprobs is None or prompt in self._echo_tokens:
                continue
            make = partial(
                prompt_token_infos, self.job.prompts[prompt].tokens, logprobs, self._tokenizer.pieces()
            )
            few = len(logprobs) <= _INLINE_TOKENS
            self._echo_tokens[prompt] = make() if few else await self.in_thread(make)

    async def in_thread(self, call: Callable[[], T]) -> T:
        """Return the result of work that would hold up the event loop, done in a thread in its tenant's
        turn."""
        return await self._threads.run_for(self.job.tenant, call)

    def _feed(self, output: RowOutput, prompt: int) -> list[Piece]:
        choice = self._choices[prompt * self.job.n + output.choice]
        if choice.finish_reason is not None:
            return []
        self._count_cached(output, prompt)
        if output.finish == "error":
            self._finished["error"] += 1
            raise _row_error(output, self.job)
        before = choice.completion_tokens
        piece = choice.feed(output)
        self.usage.completion += choice.completion_tokens - before
        if choice.finish_reason is not None:
            self._finished[_IN_VLLM.get(choice.finish_reason, choice.finish_reason)] += 1
            self._open -= 1
            if choice.stopped_here and output.finish is None:
                self._supervisor.router.cancel(self._inflight, output.id, output.choice)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs[prompt] = output.prompt_logprobs
        if self.job.echo:
            return self._with_echo(choice, prompt, output, piece)
        return [piece] if piece else []

    def _with_echo(self, choice: Choice, prompt: int, output: RowOutput, piece: Piece | None) -> list[Piece]:
        """Put the prompt before a choice's first piece, with its logprobs if they were asked for."""
        pieces = [piece] if piece else []
        if choice.index in self._echoed or (piece is None and output.prompt_logprobs is None):
            return pieces
        self._echoed.add(choice.index)
        source = self.job.prompts[prompt]
        tokens = self._echo_tokens.get(prompt, [])
        if self.job.sampling.prompt_logprobs is not None and not tokens:
            tokens = prompt_token_infos(source.tokens, [], self._tokenizer.pieces())
        return [Piece(choice.index, _echo_text(source, self._tokenizer), tokens), *pieces]


def _choice(job: Job, index: int, tokenizer: BaseTokenizer) -> Choice:
    offset = len(_echo_text(job.prompts[index // job.n], tokenizer)) if job.echo else 0
    return Choice(
        index,
        tokenizer.pieces(job.calls.format.shown if job.calls else frozenset()),
        job.stops,
        min_tokens=job.sampling.min_tokens,
        offset=offset,
        discard_tokens=job.scores_only,
        with_ids=job.token_ids,
    )


def _echo_text(prompt: Prompt, tokenizer: BaseTokenizer) -> str:
    return tokenizer.decode(prompt.tokens) if prompt.text is None else prompt.text


def begun_of(job: Job, transcript: Transcript, tokenizer: BaseTokenizer) -> list[dict[int, list[int]]]:
    """Return, for each prompt, the tokens of the choices that have not ended. A long transcript takes 0.1 s.

    Raises InvalidRequestError.
    """
    choices = [_choice(job, index, tokenizer) for index in range(job.choices)]
    tokens: list[list[int]] = [[] for _ in choices]
    over: set[int] = set()
    for output in transcript.all():
        index = int(output.id) * job.n + output.choice
        if index in over:
            continue
        if job.stops:
            choices[index].feed(output)
        tokens[index] += output.tokens
        if output.finish is not None or choices[index].stopped_here:
            over.add(index)
    if any(len(some) >= job.sampling.max_tokens for n, some in enumerate(tokens) if n not in over):
        raise refused("has more tokens than the request asks for")
    return [
        {n: tokens[p * job.n + n] for n in range(job.n) if p * job.n + n not in over}
        for p in range(len(job.prompts))
    ]


@contextlib.asynccontextmanager
async def in_time(deadline: float | None) -> AsyncIterator[None]:
    """Bounds waiting for an adapter. Raises UnavailableError at `deadline` (on the event loop's clock)."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError as error:
        raise UnavailableError(
            "adapter: it was not in memory before the request's time was over (timeout_s). It is still being "
            "loaded: send the request again in a moment, or raise timeout_s.",
            code="adapter_timeout",
            retry_after=2.0,
        ) from error


def _row_error(output: RowOutput, job: Job) -> OneBaseError:
    if output.error_code == "grammar_refused":
        message = f"{job.grammar_param}: {output.error_message}. Change it, or leave it out."
        return InvalidRequestError(message, param=job.grammar_param, code="grammar_refused")
    if output.error_code == "grammars_busy":
        message = f"{job.grammar_param}: {output.error_message}. Send the request again in a moment."
        return UnavailableError(message, code="grammars_busy", retry_after=output.retry_after or 5.0)
    if output.error_code == "grammar_limit":
        message = f"{job.grammar_param}: {output.error_message}. Use one of those, or send it again later."
        of = {"quota": "grammar_seconds", "limit": COMPILE_BUDGET, "of": "tenant"}
        return RateLimitError(message, of, retry_after=output.retry_after or BUDGET_SECONDS)
    return RowFailedError(
        output.error_message or "The engine ended this request with an error.",
        code=output.error_code or "engine_error",
        param=output.error_param,
    )
