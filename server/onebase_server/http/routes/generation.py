"""POST /generate, /v1/completions and /v1/chat/completions: text from the base or from any adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Path, Request, Response

from onebase_edge.cross_site import ADAPTER_HEADER
from onebase_edge.errors import (
    ApiError,
    ClientGoneError,
    SlowReaderError,
    UnknownGenerationError,
    error_body,
    status_of,
)
from onebase_edge.request_id import request_id
from onebase_edge.sse import (
    DONE,
    EventStream,
    MergedEvents,
    cancelled_when_gone,
    connection_abort,
    guarded,
    with_transcript,
)
from onebase_protocol.text import (
    CancelledAnswer,
    ChatAnswer,
    ChatEvent,
    CompletionAnswer,
    CompletionEvent,
    GeneratedAnswer,
    GenerateEvent,
    GenerateManyAnswer,
    GenerateManyEvent,
    OneOfManyAnswer,
    TgiAnswer,
    TgiEvent,
)
from onebase_server.http.answers import answer, streamed_answer
from onebase_server.http.authorization import NOT_ITS_FAULT, needs
from onebase_server.http.deps import (
    ARRIVED,
    CALLER,
    Admitted,
    Calling,
    Provided,
    Services,
    StrictRoute,
    json_response,
    off_loop,
    resume_state_of,
)
from onebase_server.http.views.generation import (
    INLINE_SCORES,
    ChatView,
    CompletionView,
    GenerateView,
    GenerationView,
    TgiView,
)
from onebase_server.inference.generation import GenerationRequest, GenerationRun, resume_tokens_of
from onebase_server.inference.stream import OutputPiece
from onebase_server.inference.transcript import Transcript, line, refused
from onebase_server.inference.transcript import read as read_transcript
from onebase_server.requests.request_log import RequestEntry, part_sizes
from onebase_server.requests.rollouts import Observation
from onebase_server.requests.schemas.generation import GenerateManyRequest, GenerateRequest
from onebase_server.requests.schemas.openai import ChatRequest, CompletionRequest
from onebase_server.requests.schemas.tgi import TgiRequest
from onebase_server.telemetry.measurements import RequestMeasurements, RequestTimestamps, TokenUsage
from onebase_server.telemetry.traces import RequestSpans
from onebase_server.tenancy.access import Caller
from onebase_server.tenancy.pacing import charged
from onebase_server.tenancy.quotas import QuotaReservation
from onebase_server.tenancy.usage import TenantUsageRecorder

router = APIRouter(route_class=StrictRoute)
_SIZES = "onebase_sizes"
"""Key of the sizes, in a request's scope, of the several requests of its body."""
_BROKEN = "onebase_broken"
"""Key of a request's scope, which is set once its answer was counted as broken."""


@router.post("/generate", tags=["generate"], responses=streamed_answer(GeneratedAnswer, GenerateEvent))
@needs("generate")
async def generate(
    body: GenerateRequest, request: Request, services: Provided, caller: Calling, reservation: Admitted
) -> Response:
    """Generate text from the base or from any adapter, in one piece or streamed as server-sent events."""
    services.refuse_if_draining()
    transcript = await transcript_of(request, services, body.stream)
    engine_request = await services.planner.generate(body, caller, transcript)
    view = GenerateView(engine_request.tokenizer or services.tokenizer)
    return await answer_generation(
        request, services, reservation, engine_request, view, body.stream, transcript
    )


@router.post(
    "/generate/many", tags=["generate"], responses=streamed_answer(GenerateManyAnswer, GenerateManyEvent)
)
@needs("generate")
async def generate_many(
    body: GenerateManyRequest, request: Request, services: Provided, caller: Calling, reservation: Admitted
) -> Response:
    """Answer several requests over one connection, from one batch, whether they are about one conversation or
    not: each event says which of them it is about."""
    services.refuse_if_draining()
    services.planner.base()  # without an engine none of them runs: another server may have one
    reservation.refund_request()  # each of them counts by itself
    reservation.brings_others = True
    resume_state = None if body.stream is False else resume_state_of(request)
    lines = b"" if resume_state is None else resume_state.lines
    transcripts, order = (
        await services.reading.run_for(caller.tenant, read_transcript, lines) if lines else ({}, [])
    )
    if any(number >= len(body.requests) for number in order):
        raise refused("is of another request")
    sources = [
        _Source(
            number, one, transcripts.get(number), resume_state and resume_state.seconds, order.count(number)
        )
        for number, one in enumerate(body.bodies)
    ]
    if body.stream is False:
        return await _all_answers(sources, request, services, caller)
    merged = MergedEvents([_events_of(source, request, services, caller) for source in sources], DONE, order)
    return EventStream(
        merged, merged.events(), services.settings.max_timeout, with_transcript=resume_state is not None
    )


@router.post("/generate/{id}/cancel", tags=["generate"], responses=answer(CancelledAnswer, 404))
@needs("generate")
async def cancel(id: Annotated[str, Path(max_length=200)], services: Provided, caller: Calling) -> Response:
    """End a text that is being generated, one of several in a stream too: it ends with what there is, and the
    finish reason `cancelled`. `id` is the id of any answer or event with text."""
    generation = services.running.get((caller.tenant, id))
    if generation is None or not generation.stop():
        raise UnknownGenerationError(id)
    return json_response(CancelledAnswer(id=id))


@dataclass(frozen=True)
class _Source:
    """One of several requests.

    Args:
        seconds: since it came first; None if it sends no transcript.
        again: number of lines that the transcript it came with has of it.
    """

    number: int
    body: GenerateRequest | ApiError
    transcript: Transcript | None
    seconds: float | None
    again: int

    def transcript_line(self, generation: GenerationRun | None, times: int) -> bytes:
        """Return the transcript's line before the events of that time, empty or not: it records the order."""
        if self.seconds is None or times <= self.again:
            return b""
        transcript = b"" if generation is None else generation.take_transcript()
        return transcript or line([], self.number)


async def _events_of(
    source: _Source, request: Request, services: Services, caller: Caller
) -> AsyncGenerator[bytes]:
    """Yield the events of one of several requests, its error too. Raises ClientGoneError, SlowReaderError."""
    view, times = GenerateView(services.tokenizer, source.number), 0
    transcript = source.transcript
    reservation = generation = None
    try:
        reservation = services.limiter.enter(caller, resumed=transcript is not None)
        engine_request = await _planned(source, services, caller)
        if transcript is not None:
            engine_request = await services.planner.resumed(engine_request, transcript, source.seconds or 0.0)
        if engine_request.tokenizer is not None:
            view = GenerateView(engine_request.tokenizer, source.number)
        transcript_number = None if source.seconds is None else source.number
        generation = await begin(
            request,
            services,
            reservation,
            engine_request,
            stream=True,
            transcript=transcript,
            transcript_number=transcript_number,
            number=source.number,
        )
        async for chunk in view.events(generation):
            times += 1
            yield source.transcript_line(generation, times) + chunk
        generation = None
    except (ClientGoneError, SlowReaderError):
        raise
    except ApiError as error:
        if transcript is not None and generation is None and not times:
            raise  # what was passed on of it cannot be made again here, or not now
        if not times:
            _refund(reservation, error)
        _note_broken(request, services, error)
        yield source.transcript_line(generation, times + 1) + view.failure(error)
    finally:
        if generation is not None:
            generation.cancel()
        if reservation is not None:
            reservation.close()


async def _planned(source: _Source, services: Services, caller: Caller) -> GenerationRequest:
    if isinstance(source.body, ApiError):
        raise source.body
    return await charged(services.planner.generate(source.body, caller, source.transcript))


def _note_broken(request: Request, services: Services, error: ApiError) -> None:
    """Count an answer that has a status of success and fails now; once, however many of its requests fail."""
    if status_of(error)[0] >= 500 and not request.scope.get(_BROKEN):
        request.scope[_BROKEN] = True
        services.measured.broken_answers += 1


def _refund(reservation: QuotaReservation | None, error: ApiError) -> None:
    if reservation is not None and status_of(error)[0] in NOT_ITS_FAULT:
        reservation.refund_request()


async def _all_answers(
    sources: Sequence[_Source], request: Request, services: Services, caller: Caller
) -> Response:
    """Answer several requests in one piece. Raises ClientGoneError, which ends all of them."""
    answers: dict[int, OneOfManyAnswer] = {}

    async def answered(source: _Source) -> AsyncGenerator[bytes]:
        answers[source.number] = await _answer_of(source, request, services, caller)
        yield b""

    merged = MergedEvents([answered(source) for source in sources], b"")
    with cancelled_when_gone(request.receive, merged):
        async for _ in merged.events():
            pass
    return json_response(GenerateManyAnswer(data=[answers[source.number] for source in sources]))


async def _answer_of(
    source: _Source, request: Request, services: Services, caller: Caller
) -> OneOfManyAnswer:
    """Return what became of one of several requests. Raises ClientGoneError."""
    reservation = generation = None
    try:
        reservation = services.limiter.enter(caller)
        engine_request = await _planned(source, services, caller)
        view = GenerateView(engine_request.tokenizer or services.tokenizer)
        run = generation = await begin(
            request, services, reservation, engine_request, stream=False, number=source.number
        )
        choices = await run.collect()
        generation = None

        def whole() -> Any:  # encoded, which takes as long as making it
            return msgspec.Raw(msgspec.json.encode(view.answer(run, choices)))

        few = _scores(engine_request, choices) <= INLINE_SCORES
        answer = whole() if few else await services.reading.run_for(caller.tenant, whole)
        return OneOfManyAnswer(request=source.number, status=200, answer=answer)
    except ClientGoneError:
        raise
    except ApiError as error:
        _refund(reservation, error)
        _note_broken(request, services, error)
        details: Any = error_body(error)["error"]  # with fields of its own for some errors
        return OneOfManyAnswer(request=source.number, status=status_of(error)[0], error=details)
    finally:
        if generation is not None:
            generation.cancel()
        if reservation is not None:
            reservation.close()


@router.post("/", tags=["tgi"], responses=streamed_answer(list[TgiAnswer], TgiEvent))
@needs("generate")
async def generate_text(
    body: TgiRequest, request: Request, services: Provided, caller: Calling, reservation: Admitted
) -> Response:
    """Generate text from the base or from any adapter, as Hugging Face's clients ask TGI for it."""
    services.refuse_if_draining()
    transcript = await transcript_of(request, services, body.stream)
    engine_request = await services.planner.generate(
        await off_loop(request, body.request), caller, transcript
    )
    view = TgiView(engine_request.tokenizer or services.tokenizer, body)
    return await answer_generation(
        request, services, reservation, engine_request, view, body.stream, transcript
    )


@router.post("/v1/completions", tags=["openai"], responses=streamed_answer(CompletionAnswer, CompletionEvent))
@needs("generate")
async def complete(
    body: CompletionRequest, request: Request, services: Provided, caller: Calling, reservation: Admitted
) -> Response:
    """Complete one prompt or several; `model` is the base's name or an adapter's."""
    services.refuse_if_draining()
    transcript = await transcript_of(request, services, body.stream)
    engine_request = await services.planner.completion(body, caller, transcript)
    view = CompletionView(engine_request.tokenizer or services.tokenizer, body.model, body.usage_in_stream)
    return await answer_generation(
        request, services, reservation, engine_request, view, body.stream, transcript
    )


@router.post("/v1/chat/completions", tags=["openai"], responses=streamed_answer(ChatAnswer, ChatEvent))
@needs("generate")
async def chat(
    body: ChatRequest, request: Request, services: Provided, caller: Calling, reservation: Admitted
) -> Response:
    """Generate the assistant's next message; `model` is the base's name or an adapter's."""
    services.refuse_if_draining()
    transcript = await transcript_of(request, services, body.stream)
    engine_request = await services.planner.chat(body, caller, transcript)
    view = ChatView(engine_request.tokenizer or services.tokenizer, body.model, body.usage_in_stream)
    return await answer_generation(
        request, services, reservation, engine_request, view, body.stream, transcript
    )


def _uncounted(seconds: float) -> None:
    """Record nothing: sequences of batches are in no histogram."""


@dataclass(frozen=True)
class RequestUsageRecorder:
    """Recorder of one request: it reports to its caller's quotas, its tenant's usage and the metrics.

    payer: tenant in whose usage it counts, if that is not the request's own.
    """

    reservation: QuotaReservation
    usage: TenantUsageRecorder
    measured: RequestMeasurements
    request: GenerationRequest
    spans: RequestSpans | None = None
    observation: Observation | None = None
    entry: RequestEntry | None = None
    payer: str | None = None

    def sequences_ended(self) -> None:
        self.reservation.sequences_ended()

    @property
    def token_gap(self) -> Callable[[float], None]:
        return _uncounted if self.request.background else self.measured.token_gap.observe

    def used(self, usage: TokenUsage, timestamps: RequestTimestamps, finished: Counter[str]) -> None:
        self.measured.ended(self.request, usage, timestamps, finished)
        if self.spans is not None:
            self.spans.ended(usage, timestamps, finished)
        if self.observation is not None:
            self.observation.ended(usage, timestamps, finished)
        if self.entry is not None:
            self.entry.ended(usage.completion, finished)
        self.reservation.settle(usage.prompt + usage.completion)
        names = [use.name for use in self.request.adapter.uses]
        self.usage.generated(self.payer or self.request.tenant, names, usage)


async def transcript_of(request: Request, services: Services, stream: bool | None) -> Transcript | None:
    """Return the transcript of a stream that another server began; None for any other request.

    Raises InvalidRequestError.
    """
    resume_state = resume_state_of(request) if stream else None
    if resume_state is None or not resume_state.lines:
        return None
    caller: Caller = request.scope[CALLER]
    transcript = (await services.reading.run_for(caller.tenant, read_transcript, resume_state.lines))[0].get(
        0
    )
    if transcript is None:
        raise refused("is of another request")
    return transcript


async def answer_generation(
    request: Request,
    services: Services,
    reservation: QuotaReservation,
    engine_request: GenerationRequest,
    view: GenerationView,
    stream: bool | None,
    transcript: Transcript | None,
) -> Response:
    """Run the request, and answer in one piece or streamed. transcript: what it was planned with.

    Raises what `begin` and GenerationRun.pieces raise.
    """
    resume_state = resume_state_of(request) if stream else None
    if resume_state is not None and transcript is not None:
        engine_request = await services.planner.resumed(engine_request, transcript, resume_state.seconds)
    number = None if resume_state is None else 0
    generation = await begin(
        request,
        services,
        reservation,
        engine_request,
        stream=bool(stream),
        transcript=transcript,
        transcript_number=number,
    )
    if stream:

        def failure(error: ApiError) -> bytes:
            _note_broken(request, services, error)
            return view.failure(error)

        events = guarded(view.events(generation), failure, view.closing)
        if resume_state is not None:
            events = with_transcript(events, generation.take_transcript)
        streamed = EventStream(
            generation, events, engine_request.timeout_s or 0.0, with_transcript=resume_state is not None
        )
        return _labelled(streamed, engine_request)
    with cancelled_when_gone(request.receive, generation):
        choices = await generation.collect()

    def whole() -> Response:
        return _labelled(json_response(view.answer(generation, choices)), engine_request)

    if _scores(engine_request, choices) <= INLINE_SCORES:
        return whole()
    return await services.reading.run_for(engine_request.tenant, whole)


def _labelled(response: Response, engine_request: GenerationRequest) -> Response:
    """Add the header with the version that answers, which the answers of some routes have no place for."""
    if (label := engine_request.adapter.version_label) is not None:
        response.headers[ADAPTER_HEADER] = label.encode("ascii", "backslashreplace").decode()
    return response


def _scores(engine_request: GenerationRequest, choices: Sequence[OutputPiece]) -> int:
    """Return the number of tokens whose log-probabilities a whole answer has, alternatives included."""
    sampling, answered = engine_request.sampling, sum(len(piece.tokens) for piece in choices)
    count = 0 if sampling.logprobs is None else answered * (1 + sampling.logprobs)
    if sampling.prompt_logprobs is None:
        return count
    prompts = sum(len(prompt.tokens) for prompt in engine_request.prompts)
    return count + prompts * (1 + sampling.prompt_logprobs)


async def begin(
    request: Request,
    services: Services,
    reservation: QuotaReservation,
    engine_request: GenerationRequest,
    *,
    stream: bool,
    transcript: Transcript | None = None,
    transcript_number: int | None = None,
    number: int | None = None,
    since: float | None = None,
) -> GenerationRun:
    """Start a request in the engine. Raises what QuotaReservation.admit and GenerationRun.start raise.

    transcript, transcript_number: see GenerationRun. number: of one request among several in the body.
    since: time (monotonic) since when the server has the request's texts; None: since it arrived.
    """
    services.refuse_if_draining()
    since = request.scope[ARRIVED] if since is None else since
    resume_tokens = None
    if transcript is not None:
        resume_tokens = await services.reading.run_for(
            engine_request.tenant, resume_tokens_of, engine_request, transcript, services.tokenizer
        )
    reservation.admit(engine_request.reserved_tokens, engine_request.choices)
    base = services.catalog.base_name
    spans = services.tracing.of_request(engine_request, request.scope, base, stream=stream)
    observation = None if transcript is not None else services.rollouts.observe(engine_request, since)
    entry = await _logged(request, services, engine_request, since, stream=stream, number=number)
    generation = GenerationRun(
        services.supervisor,
        services.tokenizer,
        services.reading,
        engine_request,
        services.settings.stream_buffer if stream else None,
        on_cut=connection_abort(request.scope),
        recorder=RequestUsageRecorder(
            reservation,
            services.usage,
            services.measured,
            engine_request,
            spans,
            observation,
            entry,
            payer=request.scope[CALLER].tenant,
        ),
        transcript=transcript,
        resume_tokens=resume_tokens,
        transcript_number=transcript_number,
        listeners=[one for one in (observation, entry) if one is not None],
    )
    try:
        await generation.start(services.residency)
    except BaseException as error:
        if observation is not None and isinstance(error, ApiError):
            observation.not_started(error)
        if entry is not None:
            entry.not_started(error.code if isinstance(error, ApiError) else "cancelled")
        raise
    services.running[engine_request.tenant, engine_request.id] = generation
    reservation.leave = generation.leave
    return generation


async def _logged(
    request: Request,
    services: Services,
    engine_request: GenerationRequest,
    since: float,
    *,
    stream: bool,
    number: int | None,
) -> RequestEntry | None:
    """Return the request's entry in the log, if there is one."""
    log = services.request_log
    if log.mode == "off":
        return None
    caller: Caller = request.scope[CALLER]
    body = await request.body()
    return log.begin(
        engine_request,
        since=since,
        key=caller.key,
        request_id=request_id(request.scope),
        route=request.scope["path"],
        stream=stream,
        body=(body, number),
        body_size=await _part_size(request, body, number, services, caller),
    )


async def _part_size(
    request: Request, body: bytes, number: int | None, services: Services, caller: Caller
) -> int:
    """Return the size, in bytes, of one of the several requests of a body; 0 where the body is of one. The
    body is looked through once, in a thread."""
    if number is None or services.request_log.mode != "text":
        return 0
    sizes: list[int] | None = request.scope.get(_SIZES)
    if sizes is None:
        sizes = request.scope[_SIZES] = await services.reading.run_for(caller.tenant, part_sizes, body)
    return sizes[number]
