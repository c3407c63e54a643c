"""POST /generate, /v1/completions and /v1/chat/completions: text from the base or from any adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from onebase_edge.errors import (
    ClientGoneError,
    OneBaseError,
    SlowReaderError,
    UnknownGenerationError,
    status_of,
)
from onebase_edge.sse import (
    DONE,
    EventStream,
    Merged,
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
    GenerateManyEvent,
    TgiAnswer,
    TgiEvent,
)
from onebase_server.http.answers import answer, streamed_answer
from onebase_server.http.authorization import NOT_ITS_FAULT, needs
from onebase_server.http.deps import (
    CALLER,
    Admitted,
    Calling,
    Provided,
    Services,
    StrictRoute,
    json_response,
    off_loop,
    told_of,
)
from onebase_server.http.views.generation import (
    INLINE_SCORES,
    ChatView,
    CompletionView,
    GenerateView,
    GenerationView,
    TgiView,
)
from onebase_server.inference.generation import Generation, Job, begun_of
from onebase_server.inference.stream import Piece
from onebase_server.inference.transcript import Transcript, line, refused
from onebase_server.inference.transcript import read as read_transcript
from onebase_server.requests.schemas.generation import GenerateManyRequest, GenerateRequest
from onebase_server.requests.schemas.openai import ChatRequest, CompletionRequest
from onebase_server.requests.schemas.tgi import TgiRequest
from onebase_server.telemetry.measurements import Moments, RequestMeasurements, Usage
from onebase_server.telemetry.traces import RequestSpans
from onebase_server.tenancy.access import Caller
from onebase_server.tenancy.quotas import Ticket
from onebase_server.tenancy.usage import UsageMeter

router = APIRouter(route_class=StrictRoute)


@router.post("/generate", tags=["generate"], responses=streamed_answer(GeneratedAnswer, GenerateEvent))
@needs("generate")
async def generate(
    body: GenerateRequest, request: Request, services: Provided, caller: Calling, ticket: Admitted
) -> Response:
    """Generate text from the base or from any adapter, in one piece or streamed as server-sent events."""
    services.refuse_if_draining()
    begun = await transcript_of(request, services, body.stream)
    job = await services.planner.generate(body, caller, begun)
    view = GenerateView(services.tokenizer)
    return await answer_job(request, services, ticket, job, view, body.stream, begun)


@router.post(
    "/generate/many",
    tags=["generate"],
    responses=answer(None, description="Events of all requests, as they come", event=GenerateManyEvent),
)
@needs("generate")
async def generate_many(
    body: GenerateManyRequest, request: Request, services: Provided, caller: Calling, ticket: Admitted
) -> Response:
    """Answer several requests over one connection, from one batch: each event says which of them it is
    about."""
    services.refuse_if_draining()
    services.planner.base()  # without an engine none of them runs: another server may have one
    ticket.give_back()  # each of them counts by itself
    told = told_of(request)
    lines = b"" if told is None else told.lines
    transcripts, order = (
        await services.reading.run_for(caller.tenant, read_transcript, lines) if lines else ({}, [])
    )
    if any(number >= len(body.bodies) for number in order):
        raise refused("is of another request")
    sources = []
    for number, one in enumerate(body.bodies):
        source = _Source(number, one, transcripts.get(number), told and told.seconds, order.count(number))
        sources.append(_events_of(source, request, services, caller))
    merged = Merged(sources, DONE, order)
    return EventStream(merged, merged.events(), services.settings.max_timeout, tells=told is not None)


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
    body: GenerateRequest | OneBaseError
    transcript: Transcript | None
    seconds: float | None
    again: int

    def told(self, generation: Generation | None, times: int) -> bytes:
        """Return the transcript's line before the events of that time, empty or not: it records the order."""
        if self.seconds is None or times <= self.again:
            return b""
        told = b"" if generation is None else generation.take_told()
        return told or line([], self.number)


async def _events_of(
    source: _Source, request: Request, services: Services, caller: Caller
) -> AsyncGenerator[bytes]:
    """Yield the events of one of several requests, its error too. Raises ClientGoneError, SlowReaderError."""
    view, times = GenerateView(services.tokenizer, source.number), 0
    body, transcript = source.body, source.transcript
    ticket = generation = None
    try:
        ticket = services.limiter.enter(caller, resumed=transcript is not None)
        if isinstance(body, OneBaseError):
            raise body
        job = await services.planner.generate(body, caller, transcript)
        if transcript is not None:
            job = await services.planner.resumed(job, transcript, source.seconds or 0.0)
        telling = None if source.seconds is None else source.number
        generation = await begin(
            request, services, ticket, job, stream=True, transcript=transcript, telling=telling
        )
        async for chunk in view.events(generation):
            times += 1
            yield source.told(generation, times) + chunk
        generation = None
    except (ClientGoneError, SlowReaderError):
        raise
    except OneBaseError as error:
        if transcript is not None and generation is None and not times:
            raise  # what was passed on of it cannot be made again here, or not now
        if ticket is not None and not times and status_of(error)[0] in NOT_ITS_FAULT:
            ticket.give_back()
        yield source.told(generation, times + 1) + view.failure(error)
    finally:
        if generation is not None:
            generation.cancel()
        if ticket is not None:
            ticket.close()


@router.post("/", tags=["tgi"], responses=streamed_answer(list[TgiAnswer], TgiEvent))
@needs("generate")
async def generate_text(
    body: TgiRequest, request: Request, services: Provided, caller: Calling, ticket: Admitted
) -> Response:
    """Generate text from the base or from any adapter, as Hugging Face's clients ask TGI for it."""
    services.refuse_if_draining()
    begun = await transcript_of(request, services, body.stream)
    job = await services.planner.generate(await off_loop(request, body.request), caller, begun)
    view = TgiView(services.tokenizer, body)
    return await answer_job(request, services, ticket, job, view, body.stream, begun)


@router.post("/v1/completions", tags=["openai"], responses=streamed_answer(CompletionAnswer, CompletionEvent))
@needs("generate")
async def complete(
    body: CompletionRequest, request: Request, services: Provided, caller: Calling, ticket: Admitted
) -> Response:
    """Complete one prompt or several; `model` is the base's name or an adapter's."""
    services.refuse_if_draining()
    begun = await transcript_of(request, services, body.stream)
    job = await services.planner.completion(body, caller, begun)
    view = CompletionView(services.tokenizer, body.model, body.usage_in_stream)
    return await answer_job(request, services, ticket, job, view, body.stream, begun)


@router.post("/v1/chat/completions", tags=["openai"], responses=streamed_answer(ChatAnswer, ChatEvent))
@needs("generate")
async def chat(
    body: ChatRequest, request: Request, services: Provided, caller: Calling, ticket: Admitted
) -> Response:
    """Generate the assistant's next message; `model` is the base's name or an adapter's."""
    services.refuse_if_draining()
    begun = await transcript_of(request, services, body.stream)
    job = await services.planner.chat(body, caller, begun)
    view = ChatView(services.tokenizer, body.model, body.usage_in_stream)
    return await answer_job(request, services, ticket, job, view, body.stream, begun)


def _uncounted(seconds: float) -> None:
    """Record nothing: sequences of batches are in no histogram."""


@dataclass(frozen=True)
class JobMeter:
    """Meter of one job: it reports to the quotas of its caller, the usage of its tenant and the metrics."""

    ticket: Ticket
    usage: UsageMeter
    measured: RequestMeasurements
    job: Job
    spans: RequestSpans | None = None

    def rows_ended(self) -> None:
        self.ticket.rows_ended()

    @property
    def token_gap(self) -> Callable[[float], None]:
        return _uncounted if self.job.background else self.measured.token_gap.observe

    def used(self, usage: Usage, moments: Moments, finished: Counter[str]) -> None:
        self.measured.ended(self.job, usage, moments, finished)
        if self.spans is not None:
            self.spans.ended(usage, moments, finished)
        self.ticket.settle(usage.prompt + usage.completion)
        names = [use.name for use in self.job.adapter.uses]
        self.usage.generated(self.job.tenant, names, usage)


async def transcript_of(request: Request, services: Services, stream: bool | None) -> Transcript | None:
    """Return the transcript of a stream that another server began; None for any other request.

    Raises InvalidRequestError.
    """
    told = told_of(request) if stream else None
    if told is None or not told.lines:
        return None
    caller: Caller = request.scope[CALLER]
    transcript = (await services.reading.run_for(caller.tenant, read_transcript, told.lines))[0].get(0)
    if transcript is None:
        raise refused("is of another request")
    return transcript


async def answer_job(
    request: Request,
    services: Services,
    ticket: Ticket,
    job: Job,
    view: GenerationView,
    stream: bool | None,
    transcript: Transcript | None,
) -> Response:
    """Run the job, and answer in one piece or streamed. transcript: what it was planned with.

    Raises what `begin` and Generation.pieces raise.
    """
    told = told_of(request) if stream else None
    if told is not None and transcript is not None:
        job = await services.planner.resumed(job, transcript, told.seconds)
    number = None if told is None else 0
    generation = await begin(
        request, services, ticket, job, stream=bool(stream), transcript=transcript, telling=number
    )
    if stream:
        events = guarded(view.events(generation), view.failure, view.closing)
        if told is not None:
            events = with_transcript(events, generation.take_told)
        return EventStream(generation, events, job.timeout_s or 0.0, tells=told is not None)
    with cancelled_when_gone(request.receive, generation):
        choices = await generation.collect()

    def whole() -> Response:
        return json_response(view.answer(generation, choices))

    if _scores(job, choices) <= INLINE_SCORES:
        return whole()
    return await services.reading.run_for(job.tenant, whole)


def _scores(job: Job, choices: Sequence[Piece]) -> int:
    """Return the number of tokens whose log-probabilities a whole answer has, alternatives included."""
    sampling, answered = job.sampling, sum(len(piece.tokens) for piece in choices)
    told = 0 if sampling.logprobs is None else answered * (1 + sampling.logprobs)
    if sampling.prompt_logprobs is None:
        return told
    prompts = sum(len(prompt.tokens) for prompt in job.prompts)
    return told + prompts * (1 + sampling.prompt_logprobs)


async def begin(
    request: Request,
    services: Services,
    ticket: Ticket,
    job: Job,
    *,
    stream: bool,
    transcript: Transcript | None = None,
    telling: int | None = None,
) -> Generation:
    """Start the job in the engine. Raises what Ticket.admit and Generation.start raise.

    transcript, telling: see Generation.
    """
    services.refuse_if_draining()
    begun = None
    if transcript is not None:
        begun = await services.reading.run_for(job.tenant, begun_of, job, transcript, services.tokenizer)
    ticket.admit(job.tokens_set_aside, job.choices)
    base = services.catalog.base_name
    spans = services.tracing.of_request(job, request.scope, base, stream=stream)
    generation = Generation(
        services.supervisor,
        services.tokenizer,
        services.reading,
        job,
        services.settings.stream_buffer if stream else None,
        on_cut=connection_abort(request.scope),
        meter=JobMeter(ticket, services.usage, services.measured, job, spans),
        transcript=transcript,
        begun=begun,
        telling=telling,
    )
    await generation.start(services.residency)
    services.running[job.tenant, job.id] = generation
    ticket.leave = generation.leave
    return generation
