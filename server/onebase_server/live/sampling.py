"""Promised samples: each is drawn once, in its turn, and its result outlives this process."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from onebase_adapters.registry import LiveRecords, LiveSample, LiveSampler, RegistryError
from onebase_edge.background import Backoff, Threads
from onebase_edge.errors import (
    ApiError,
    EngineRestartedError,
    InvalidRequestError,
    LoadingQueueFullError,
    QueueFullError,
    QuotaSpentError,
    ResultGoneError,
    SamplesFullError,
    UnauthenticatedError,
    UnavailableError,
    status_of,
)
from onebase_engine.engine.messages import Sampling, ScoredToken
from onebase_server.adapters.catalog import AdapterChoice
from onebase_server.adapters.residency import Residency
from onebase_server.inference.generation import GenerationRequest, GenerationRun, Prompt, UsageRecorder
from onebase_server.inference.stream import OutputPiece
from onebase_server.inference.tokenization import BaseTokenizer
from onebase_server.live.codec import (
    RefusedOperationError,
    SampledSequence,
    SampleResult,
    dense_cells,
    write_sample,
)
from onebase_server.processes.supervisor import EngineSupervisor
from onebase_server.requests.planner import Planner, check_prompts
from onebase_server.requests.request_log import RequestEntry, RequestLog
from onebase_server.storage.calls import storage_errors
from onebase_server.tenancy.access import Caller, KeyRing
from onebase_server.tenancy.quotas import Limiter, QuotaReservation

VERSIONS = "tinker://adapters/"
"""Beginning of the paths of versions of adapters."""
SAMPLE_ROUTE = "/api/v1/asample"
"""Path of the route that promises samples."""
MOST_OPEN = 10_000
"""Largest number of samples of one tenant that are promised and not there yet."""
MOST_RUNNING = 64
"""Largest number of requests for samples of one tenant that the engine has at once, and of its samples that
pause at once before they ask again for weights that cannot be had."""
KEPT_SECONDS = 3600.0
"""Seconds for which a result is kept, and weights that cannot be had are waited for."""
FORGET_SECONDS = 30.0
"""Pause, in seconds, between two looks for results that were kept for long enough."""
MOST_SCORED = 64_000_000
"""Largest size, in bytes, of the most likely tokens in one sample's result."""
_SCORE_BYTES = 8
_IN_MEMORY_SECONDS = 60.0
_AGAIN = Backoff(0.1, 5.0)
_PASSING = (EngineRestartedError, QueueFullError, QuotaSpentError, UnavailableError)
"""Errors after which a sample is tried again."""
_NO_WEIGHTS = ("adapter_unavailable", "store_unavailable")
"""Codes of errors for weights that cannot be had now."""
_CANCELLED = {"error": "The sample was cancelled.", "category": "user"}

Wanted = dict[int, list[int]]
"""Tokens whose log-probabilities are wanted, by place in the prompt."""

_log = logging.getLogger(__name__)


class PlaceTargets(msgspec.Struct, frozen=True):
    """Tokens whose log-probabilities are wanted at each place of a prompt after its first, [places, K].

    tokens: their ids, -1 where none is wanted: all, or those at `columns` of the rows that `crow` delimits.
    """

    tokens: list[int]
    shape: tuple[int, int]
    crow: list[int] | None = None
    columns: list[int] | None = None

    def cells(self) -> list[int]:
        """Return the places of `tokens` in the dense matrix. Raises InvalidRequestError."""
        if self.crow is None or self.columns is None:
            if len(self.tokens) != self.shape[0] * self.shape[1]:
                raise _bad_targets(f"has {len(self.tokens)} values and the shape {list(self.shape)}")
            return list(range(len(self.tokens)))
        try:
            cells = dense_cells("target_prompt_logprobs", self.shape, self.crow, self.columns)
        except RefusedOperationError as error:
            raise InvalidRequestError(error.message, param="target_prompt_logprobs") from error
        if len(cells) != len(self.tokens):
            raise _bad_targets("has another number of values than of columns")
        return cells

    def by_place(self) -> dict[int, list[int]]:
        """Return the wanted tokens by place in the prompt. Raises InvalidRequestError."""
        wanted: dict[int, list[int]] = {}
        for cell, token in zip(self.cells(), self.tokens, strict=True):
            if token >= 0:
                wanted.setdefault(cell // self.shape[1] + 1, []).append(token)
        return wanted


class SampleOrder(msgspec.Struct, frozen=True, kw_only=True):
    """Prompt and settings of a sample, which may be drawn again to the same bits.

    stops: texts that end a sequence; stop_tokens: tokens that do, besides the base's own unless `ignore_eos`.
    top, prompt_top: most likely tokens at each place. last_n: prompt tokens that are scored; None: all.
    """

    prompt: list[int]
    n: int
    seed: int
    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    stops: list[str] = []
    stop_tokens: list[int] = []
    ignore_eos: bool = False
    top: int = 0
    prompt_logprobs: bool = False
    prompt_top: int = 0
    last_n: int | None = None
    targets: PlaceTargets | None = None

    @property
    def scores_prompt(self) -> bool:
        """Return True if the prompt's tokens are scored in any way."""
        return self.prompt_logprobs or self.prompt_top > 0 or self.targets is not None


@dataclass(eq=False)
class _Open:
    """A sample that is in memory. `draw`: what draws it; `task`: what keeps the result of that."""

    sample: LiveSample
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    draw: asyncio.Task[bytes] | None = None
    task: asyncio.Task[None] | None = None


@dataclass
class _Waited:
    """A sample's waiting. `pauses`: seconds before each of its next tries; `is_missing`: whether it is the
    weights that it waits for; `missing`: seconds for which they could not be had, without those in which it
    waited for its turn to ask for them."""

    pauses: Iterator[float]
    is_missing: bool = False
    missing: float = 0.0


def _is_of_all(error: ApiError) -> bool:
    """Return True for an error that every other sample would get too."""
    if isinstance(error, LoadingQueueFullError):
        return False
    by_class = isinstance(error, QueueFullError | EngineRestartedError)
    return by_class or error.code == "registry_unavailable" or error.code.startswith("engine_")


class Samples:
    """The samples of one server. Called from one event loop.

    Args:
        choose: returns the weights that a sampler samples from; raises ApiError if they are gone.
        recorder: makes the recorder of a request's usage.
    """

    def __init__(
        self,
        records: LiveRecords,
        threads: Threads,
        server: str,
        *,
        planner: Planner,
        supervisor: EngineSupervisor,
        tokenizer: BaseTokenizer,
        reading: Threads,
        residency: Residency,
        keys: KeyRing,
        limiter: Limiter,
        choose: Callable[[LiveSampler], Awaitable[AdapterChoice]],
        recorder: Callable[[QuotaReservation, GenerationRequest, RequestEntry | None], UsageRecorder],
        log: RequestLog,
    ) -> None:
        self._records = records
        self._threads = threads
        self._server = server
        self._planner = planner
        self._supervisor = supervisor
        self._tokenizer = tokenizer
        self._reading = reading
        self._residency = residency
        self._keys = keys
        self._limiter = limiter
        self._choose = choose
        self._recorder = recorder
        self._log = log
        self._open: dict[str, _Open] = {}
        self._turns = WeakValueDictionary[str, asyncio.Semaphore]()
        self._pausing = WeakValueDictionary[tuple[str, str], asyncio.Semaphore]()
        self._turns_of_weights: dict[tuple[str, str, str | None], asyncio.Semaphore] = {}
        self._drawing: Counter[tuple[str, str, str | None]] = Counter()
        self._writer = _Writer(records, threads, server)
        self._all_open = asyncio.Event()
        """Set once the samples that earlier processes promised are drawn again."""

    async def promise(
        self,
        sample_id: str,
        sampler: LiveSampler,
        order: SampleOrder,
        caller: Caller,
        reservation: QuotaReservation,
    ) -> None:
        """Promise a sample: it will be drawn, also after a restart. Once promised, an id stays what it is.

        reservation: of the request, which the sample takes over.

        Raises InvalidRequestError, SamplesFullError, UnavailableError.
        """
        if sample_id in self._open:
            return
        if await self._read(caller.tenant, sample_id) is not None:
            return
        tokenizer = await self._tokenizer_of(sampler, caller)
        wanted = await self._wanted(order, caller, self._planner.base_of(tokenizer).vocab_size)
        if sample_id in self._open:  # it came again while this looked
            return
        self._request(order, wanted, caller, AdapterChoice(), tokenizer)
        mine = sum(
            one.sample.tenant == caller.tenant and not one.finished.is_set() for one in self._open.values()
        )
        if mine >= MOST_OPEN:
            raise SamplesFullError(mine, MOST_OPEN, 1.0)
        sample = LiveSample(
            sample_id, sampler.id, caller.tenant, caller.key, msgspec.msgpack.encode(order), time.time()
        )
        opened = self._open[sample_id] = _Open(sample)
        try:
            with storage_errors():
                await self._writer.write(sample)
        except BaseException:
            del self._open[sample_id]
            raise
        reservation.leave = _nothing
        self._begin(opened, self._draw(sampler, order, wanted, caller, reservation))

    async def result(self, tenant: str, sample_id: str, seconds: float) -> LiveSample | None:
        """Return a finished sample, within some seconds; None if it is not there by then. Raises
        ResultGoneError, UnavailableError."""
        try:
            async with asyncio.timeout(seconds):
                opened = self._open.get(sample_id)
                if opened is None or opened.sample.tenant != tenant:
                    found = await self._read(tenant, sample_id)
                    if found is not None and found.finished_at is not None:
                        return found
                    if found is not None:
                        await self._all_open.wait()
                    opened = self._open.get(sample_id)
                    if found is None or opened is None:
                        raise ResultGoneError(sample_id)
                await opened.finished.wait()
        except TimeoutError:
            return None
        if opened.sample.finished_at is None:
            raise UnavailableError(
                "The sample is not there yet, and its server is stopping. Ask again in a moment.",
                code="server_stopping",
                retry_after=5.0,
            )
        return opened.sample

    def cancel(self, tenant: str, sample_id: str) -> None:
        """End a sample, unless it is there already."""
        opened = self._open.get(sample_id)
        if opened is not None and opened.sample.tenant == tenant and opened.draw is not None:
            opened.draw.cancel()

    @property
    def samplers(self) -> set[str]:
        """Ids of the samplers with unfinished samples."""
        return {one.sample.sampler for one in self._open.values() if not one.finished.is_set()}

    async def resume(self) -> None:
        """Draw the samples that an earlier process of this server promised."""
        for sample in await self._unfinished():
            if sample.id in self._open or sample.request is None:
                continue
            opened = self._open[sample.id] = _Open(sample)
            self._begin(opened, self._resumed(sample))
        self._all_open.set()

    async def _unfinished(self) -> list[LiveSample]:
        """Return the unfinished samples of this server, once the registry answers."""
        for pause in _AGAIN.pauses():
            try:
                return await self._threads.run_blocking(self._records.open_samples, self._server)
            except RegistryError as failure:
                _log.error("the samples that were promised earlier wait for the registry: %s", failure)
            await asyncio.sleep(pause)
        raise AssertionError("pauses have no end")

    async def stop(self) -> None:
        """End all that run; the next process of this server draws them again."""
        self._writer.closed = True
        tasks: list[asyncio.Task[Any]] = []
        for opened in self._open.values():
            tasks += [one for one in (opened.draw, opened.task) if one is not None and not one.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def keep_tidy(self) -> None:
        """Forget for ever what was kept for long enough."""
        while True:
            await asyncio.sleep(FORGET_SECONDS)
            with suppress(RegistryError):
                await self.forget()

    async def forget(self) -> None:
        """Delete the results that were kept for long enough. Raises RegistryError."""
        now = time.time()
        for sample_id, opened in list(self._open.items()):
            finished = opened.sample.finished_at
            if finished is not None and finished < now - _IN_MEMORY_SECONDS:
                del self._open[sample_id]
        await self._threads.run_blocking(self._records.forget_samples, now - KEPT_SECONDS)

    async def _read(self, tenant: str, sample_id: str) -> LiveSample | None:
        with storage_errors():
            return await self._threads.run_blocking(self._records.sample, tenant, sample_id)

    # ---- drawing -----------------------------------------------------------------------------

    def _begin(self, opened: _Open, drawing: Coroutine[Any, Any, bytes]) -> None:
        loop = asyncio.get_running_loop()
        opened.draw = loop.create_task(drawing)
        opened.task = loop.create_task(self._finish(opened, opened.draw))

    async def _resumed(self, sample: LiveSample) -> bytes:
        """Return the message of a sample that an earlier process promised. Raises ApiError."""
        caller, sampler = await self._owner(sample)
        order = msgspec.msgpack.decode(sample.request or b"", type=SampleOrder)
        reservation = self._limiter.enter(caller, resumed=True)
        return await self._draw(sampler, order, await self._wanted(order, caller), caller, reservation)

    async def _owner(self, sample: LiveSample) -> tuple[Caller, LiveSampler]:
        """Return who asked for a sample, and of which sampler, once the registry answers. Raises ApiError."""
        for pause in _AGAIN.pauses():
            try:
                caller = await self._keys.caller_of(sample.key)
                with storage_errors():
                    read = self._records.sampler
                    return caller, await self._threads.run_blocking(read, sample.tenant, sample.sampler)
            except UnavailableError as error:
                _log.debug("sample %s waits for the registry: %s", sample.id, error)
            await asyncio.sleep(pause)
        raise AssertionError("pauses have no end")

    async def _finish(self, opened: _Open, drawn: Awaitable[bytes]) -> None:
        """Keep what comes of a sample, its error too."""
        try:
            finished = await self._outcome(opened.sample, drawn)
            for pause in _AGAIN.pauses():
                try:
                    await self._writer.write(finished)
                    break
                except RegistryError as failure:
                    _log.error("the result of sample %s waits for the registry: %s", finished.id, failure)
                await asyncio.sleep(pause)
            opened.sample = finished
        finally:
            if opened.sample.finished_at is None:  # the registry has it as unfinished
                self._open.pop(opened.sample.id, None)
            opened.finished.set()

    async def _outcome(self, sample: LiveSample, drawn: Awaitable[bytes]) -> LiveSample:
        """Return a sample with what came of it."""
        result, error = None, None
        try:
            result = await drawn
        except asyncio.CancelledError:
            if self._writer.closed:
                raise
            error = _CANCELLED
        except ApiError as refused:
            user = status_of(refused)[0] < 500 and not isinstance(refused, UnauthenticatedError)
            error = {"error": refused.message, "category": "user" if user else "server"}
        except Exception:
            _log.exception("sample %s failed", sample.id)
            error = {"error": "The server failed on this sample; its log says why.", "category": "server"}
        return replace(sample, request=None, result=result, error=error, finished_at=time.time())

    async def _draw(
        self,
        sampler: LiveSampler,
        order: SampleOrder,
        wanted: Wanted,
        caller: Caller,
        reservation: QuotaReservation,
    ) -> bytes:
        """Return the message of a sample, once the engine has room for it. Raises ApiError."""
        draw = partial(self._drawn, sampler, order, wanted, caller, reservation, time.monotonic())
        pausing = self._pausing.setdefault((caller.tenant, caller.key), asyncio.Semaphore(MOST_RUNNING))
        waited = _Waited(_AGAIN.pauses())
        try:
            async with self._turn_of_weights(caller, sampler.path):
                while (message := await self._in_turn(caller.tenant, draw, waited)) is None:
                    lost = time.monotonic()
                    async with pausing:
                        await asyncio.sleep(next(waited.pauses))
                    if waited.is_missing:
                        waited.missing += time.monotonic() - lost
                return message
        finally:
            reservation.sequences_ended()
            reservation.settle(0)

    @asynccontextmanager
    async def _turn_of_weights(self, caller: Caller, path: str | None) -> AsyncIterator[None]:
        """Wait until few enough of a key's samples of the same weights are drawn, or wait for them or for the
        key's quota."""
        same = (caller.tenant, caller.key, path)
        turn = self._turns_of_weights.setdefault(same, asyncio.Semaphore(MOST_RUNNING))
        self._drawing[same] += 1
        try:
            async with turn:
                yield
        finally:
            self._drawing[same] -= 1
            if not self._drawing[same]:  # each step of a run has weights of its own
                del self._drawing[same], self._turns_of_weights[same]

    async def _in_turn(
        self, tenant: str, draw: Callable[[], Awaitable[bytes]], waited: _Waited
    ) -> bytes | None:
        """Return the message of a sample in its tenant's turn; None if it waits for its weights or for its
        key's quota, while others take the turn.

        The turn is kept while the engine or the registry is waited for, so that few samples ask for them.

        Raises ApiError, also once the weights were missing for KEPT_SECONDS.
        """
        async with self._turns.setdefault(tenant, asyncio.Semaphore(MOST_RUNNING)):
            while True:
                try:
                    return await draw()
                except _PASSING as error:
                    _log.debug("a sample of %s waits: %s", tenant, error)
                    waited.is_missing = error.code in _NO_WEIGHTS
                    if waited.is_missing and waited.missing > KEPT_SECONDS:
                        raise
                    if not waited.is_missing:
                        waited.missing = 0.0
                    if not _is_of_all(error):
                        return None
                await asyncio.sleep(next(waited.pauses))

    async def _drawn(
        self,
        sampler: LiveSampler,
        order: SampleOrder,
        wanted: Wanted,
        caller: Caller,
        reservation: QuotaReservation,
        since: float,
    ) -> bytes:
        choice = await self._choose(sampler)
        own = await self._planner.parts_for(choice, caller.tenant, None)
        request = self._request(order, wanted, caller, choice, own.tokenizer)
        reservation.admit(request.reserved_tokens, request.choices)
        entry = self._log.begin(request, since=since, key=caller.key, route=SAMPLE_ROUTE)
        run = GenerationRun(
            self._supervisor,
            self._tokenizer,
            self._reading,
            request,
            recorder=self._recorder(reservation, request, entry),
            listeners=() if entry is None else (entry,),
        )
        try:
            await run.start(self._residency)
        except BaseException as error:
            if entry is not None:
                entry.not_started(error.code if isinstance(error, ApiError) else "cancelled")
            reservation.sequences_ended()
            reservation.settle(0)
            raise
        choices = await run.collect()
        scores = run.prompt_logprobs.get(0, [])
        return await self._reading.run_for(
            caller.tenant, lambda: write_sample(_result(order, choices, scores, run.usage.cached))
        )

    async def _tokenizer_of(self, sampler: LiveSampler, caller: Caller) -> BaseTokenizer:
        """Return the tokenizer of a sampler's version; the base's for others, and where there is none any
        more, which is found when it is drawn. Raises UnavailableError: it is being prepared again."""
        if sampler.path is None or not sampler.path.startswith(VERSIONS):
            return self._tokenizer
        try:
            return (await self._planner.parts_for(await self._choose(sampler), caller.tenant, None)).tokenizer
        except UnavailableError:
            raise
        except ApiError:
            return self._tokenizer

    async def _wanted(self, order: SampleOrder, caller: Caller, vocabulary: float = math.inf) -> Wanted:
        """Return the named tokens of a prompt, by place. Raises InvalidRequestError.

        vocabulary: number of tokens that there are, unless that was checked before.
        """
        _check_last(order)
        if order.targets is None:
            return {}
        length = len(order.prompt)
        return await self._reading.run_for(caller.tenant, _named, order.targets, length, vocabulary)

    def _request(
        self,
        order: SampleOrder,
        wanted: Wanted,
        caller: Caller,
        adapter: AdapterChoice,
        tokenizer: BaseTokenizer,
    ) -> GenerationRequest:
        """Return the request to the engine, with the adapter's tokenizer or the base's. Raises
        InvalidRequestError, UnavailableError."""
        base, length = self._planner.base_of(tokenizer), len(order.prompt)
        check_prompts([Prompt(order.prompt)], base, "prompt")
        self._planner.check_limits(order.n, None)
        room = base.max_length - length
        if order.max_tokens is not None and order.max_tokens > room:
            raise InvalidRequestError(
                f"sampling_params.max_tokens: {order.max_tokens} tokens after a prompt of {length} are more "
                f"than the base's {base.max_length}. Ask for {room} or fewer.",
                param="sampling_params.max_tokens",
                code="context_length_exceeded",
            )
        fits = min(room, max(1, base.kv_longest - length))
        places = order.n * (fits if order.max_tokens is None else order.max_tokens)
        _check_size("topk_sample_logprobs", order.top, places, "num_samples x max_tokens")
        _check_size("topk_prompt_logprobs", order.prompt_top, length, "tokens of the prompt")
        sampling = Sampling(
            temperature=order.temperature,
            top_k=max(order.top_k, 0),
            top_p=order.top_p,
            seed=order.seed,
            stop_token_ids=tuple(order.stop_tokens),
            end_token_ids=tokenizer.end_tokens,
            max_tokens=fits if order.max_tokens is None else order.max_tokens,
            ignore_eos=order.ignore_eos,
            logprobs=order.top,
            prompt_logprobs=order.prompt_top if order.scores_prompt else None,
            prompt_targets=wanted,
        )
        return GenerationRequest(
            id=f"sample-{time.monotonic_ns():x}",
            tenant=caller.tenant,
            priority=caller.priority,
            prompts=(Prompt(order.prompt),),
            sampling=sampling,
            adapter=adapter,
            tokenizer=None if tokenizer is self._tokenizer else tokenizer,
            n=order.n,
            stops=tuple(order.stops),
            token_ids=True,
            expected_tokens=sampling.max_tokens,
        )


class _Writer:
    """Writes samples to the registry, all that wait in one transaction. Once it is closed, a sample that is
    cancelled stays unfinished there."""

    def __init__(self, records: LiveRecords, threads: Threads, server: str) -> None:
        self.closed = False
        self._records = records
        self._threads = threads
        self._server = server
        self._waiting: list[tuple[LiveSample, asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None

    async def write(self, sample: LiveSample) -> None:
        """Write a sample; it is on the disk when this returns. Raises RegistryError."""
        written = asyncio.get_running_loop().create_future()
        self._waiting.append((sample, written))
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._write_all())
        await written

    async def _write_all(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            samples = [sample for sample, _ in batch]
            try:
                await self._threads.run_blocking(self._records.write_samples, samples, self._server)
            except BaseException as error:
                for _, written in batch:
                    if not written.done():
                        written.set_exception(error)
                if not isinstance(error, Exception):
                    raise
            else:
                for _, written in batch:
                    if not written.done():
                        written.set_result(None)


def _nothing() -> None:
    """Leave the reservation of a request to its sample."""


def _check_size(field: str, top: int, places: int, of: str) -> None:
    """Raise InvalidRequestError if the most likely tokens at so many places are too large a result."""
    most = MOST_SCORED // _SCORE_BYTES
    if top and places * (top + 1) > most:
        raise InvalidRequestError(
            f"{field}: {top} at each of {places} places ({of}) are more than a result holds: places x (top + "
            f"1) x {_SCORE_BYTES} bytes may be {MOST_SCORED}. Ask for {max(0, most // places - 1)} or fewer.",
            param=field,
        )


def _check_last(order: SampleOrder) -> None:
    """Raise InvalidRequestError for logprobs of more tokens than a prompt has."""
    after = len(order.prompt) - 1
    if order.last_n is not None and order.last_n > after:
        raise InvalidRequestError(
            f"prompt_logprobs_last_n: the prompt has {after} tokens after its first. Ask for so many or "
            "fewer.",
            param="prompt_logprobs_last_n",
        )


def _named(targets: PlaceTargets, length: int, vocabulary: float) -> Wanted:
    """Return the named tokens of a prompt of that length, by place. Raises InvalidRequestError."""
    if targets.shape[0] != length - 1:
        raise _bad_targets(f"has {targets.shape[0]} rows, and the prompt {length - 1} tokens to score")
    wanted = targets.by_place()
    if not wanted:
        raise _bad_targets("names no token")
    if max(targets.tokens) >= vocabulary:
        raise _bad_targets(f"names a token that is not in the vocabulary (0 to {vocabulary - 1})")
    return wanted


def _bad_targets(why: str) -> InvalidRequestError:
    return InvalidRequestError(f"target_prompt_logprobs: it {why}.", param="target_prompt_logprobs")


def _result(
    order: SampleOrder, choices: Sequence[OutputPiece], scores: Sequence[ScoredToken], cached: int
) -> SampleResult:
    sequences = [
        SampledSequence(
            tokens=choice.ids,
            logprobs=[0.0 if info.logprob is None else info.logprob for info in choice.tokens],
            stopped=choice.finish_reason == "stop",
            top=[list(info.top or ()) for info in choice.tokens] if order.top else None,
        )
        for choice in choices
    ]
    first = len(order.prompt) - (order.last_n or len(order.prompt))
    prompt, top = None, None
    if order.prompt_logprobs:
        prompt = [None, *(score.logprob for score in scores)]
        prompt[:first] = [None] * first
    if order.prompt_top:
        top = [[], *(list(score.top) for score in scores)]
        top[:first] = [[]] * first
    return SampleResult(
        sequences=sequences,
        cached=cached,
        prompt_logprobs=prompt,
        prompt_top=top,
        targets=None if order.targets is None else _targets(order.targets, scores),
        top_width=order.top,
        prompt_top_width=order.prompt_top,
    )


def _targets(targets: PlaceTargets, scores: Sequence[ScoredToken]) -> Mapping[str, Any]:
    """Return the log-probabilities of named tokens, in the order and the form of their ids."""
    values, width = [], targets.shape[1]
    left = {place: iter(score.named) for place, score in enumerate(scores)}
    for cell, token in zip(targets.cells(), targets.tokens, strict=True):
        values.append(next(left[cell // width]) if token >= 0 else 0.0)
    return {"shape": targets.shape, "values": values, "crow": targets.crow, "columns": targets.columns}
