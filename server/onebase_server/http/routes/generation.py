"""POST /generate, /v1/completions and /v1/chat/completions: text from the base or from any adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response

from onebase_server.access import Caller
from onebase_server.errors import ClientGoneError, OneBaseError, SlowReaderError, status_of
from onebase_server.generation.generation import Generation, Job
from onebase_server.generation.stream import Moments, Usage
from onebase_server.http.deps import (
    Admitted,
    Calling,
    Provided,
    Services,
    StrictRoute,
    json_response,
    off_loop,
)
from onebase_server.http.guard import NOT_ITS_FAULT, needs
from onebase_server.http.schemas.answers import (
    ChatAnswer,
    CompletionAnswer,
    GeneratedAnswer,
    TgiAnswer,
    answer,
    streamed_answer,
)
from onebase_server.http.schemas.events import (
    ChatEvent,
    CompletionEvent,
    GenerateEvent,
    GenerateManyEvent,
    TgiEvent,
)
from onebase_server.http.schemas.generation import GenerateManyRequest, GenerateRequest
from onebase_server.http.schemas.openai import ChatRequest, CompletionRequest
from onebase_server.http.schemas.tgi import TgiRequest
from onebase_server.http.sse import (
    DONE,
    EventStream,
    Merged,
    cancelled_when_gone,
    connection_abort,
    guarded,
)
from onebase_server.http.views.generation import (
    ChatView,
    CompletionView,
    GenerateView,
    GenerationView,
    TgiView,
)
from onebase_server.measurements import RequestMeasurements
from onebase_server.quotas import Ticket
from onebase_server.traces import RequestSpans
from onebase_server.usage import UsageMeter

router = APIRouter(route_class=StrictRoute)


@router.post("/generate", tags=["generate"], responses=streamed_answer(GeneratedAnswer, GenerateEvent))
@needs("generate")
async def generate(
    body: GenerateRequest, request: Request, services: Provided, caller: Calling, ticket: Admitted
) -> Response:
    """Text from the base or from any adapter, in one piece or streamed as server-sent events."""
    services.refuse_if_draining()
    job = await services.planner.generate(body, caller)
    return await answer_job(request, services, ticket, job, GenerateView(services.tokenizer), body.stream)


@router.post(
    "/generate/many",
    tags=["generate"],
    responses=answer(None, description="Events of all requests, as they come", event=GenerateManyEvent),
)
@needs("generate")
async def generate_many(
    body: GenerateManyRequest, request: Request, services: Provided, caller: Calling, ticket: Admitted
) -> Response:
    """Several requests over one connection, from one batch: each event says which of them it is about."""
    services.refuse_if_draining()
    ticket.give_back()  # each of them counts by itself
    sources = [_events_of(number, one, request, services, caller) for number, one in enumerate(body.bodies)]
    merged = Merged(sources, DONE)
    return EventStream(merged, merged.events(), services.settings.max_timeout)


async def _events_of(
    number: int,
    body: GenerateRequest | OneBaseError,
    request: Request,
    services: Services,
    caller: Caller,
) -> AsyncGenerator[bytes]:
    """Of one of several requests, its error too. Raises ClientGoneError, SlowReaderError."""
    view, begun = GenerateView(services.tokenizer, number), False
    ticket = generation = None
    try:
        ticket = services.limiter.enter(caller)
        if isinstance(body, OneBaseError):
            raise body
        job = await services.planner.generate(body, caller)
        generation = await begin(request, services, ticket, job, stream=True)
        async for chunk in view.events(generation):
            begun = True
            yield chunk
        generation = None
    except (ClientGoneError, SlowReaderError):
        raise
    except OneBaseError as error:
        if ticket is not None and not begun and status_of(error)[0] in NOT_ITS_FAULT:
            ticket.give_back()
        yield view.failure(error)
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
    """Text from the base or from any adapter, as Hugging Face's clients ask TGI for it."""
    services.refuse_if_draining()
    job = await services.planner.generate(await off_loop(request, body.request), caller)
    view = TgiView(services.tokenizer, body)
    return await answer_job(request, services, ticket, job, view, body.stream)


@router.post("/v1/completions", tags=["openai"], responses=streamed_answer(CompletionAnswer, CompletionEvent))
@needs("generate")
async def complete(
    body: CompletionRequest, request: Request, services: Provided, caller: Calling, ticket: Admitted
) -> Response:
    """Completions of one prompt or several; `model` is the base's name or an adapter's."""
    services.refuse_if_draining()
    job = await services.planner.completion(body, caller)
    view = CompletionView(services.tokenizer, body.model, body.usage_in_stream)
    return await answer_job(request, services, ticket, job, view, body.stream)


@router.post("/v1/chat/completions", tags=["openai"], responses=streamed_answer(ChatAnswer, ChatEvent))
@needs("generate")
async def chat(
    body: ChatRequest, request: Request, services: Provided, caller: Calling, ticket: Admitted
) -> Response:
    """The assistant's next words; `model` is the base's name or an adapter's."""
    services.refuse_if_draining()
    job = await services.planner.chat(body, caller)
    view = ChatView(services.tokenizer, body.model, body.usage_in_stream)
    return await answer_job(request, services, ticket, job, view, body.stream)


def _uncounted(seconds: float) -> None:
    """Rows of batches are in no histogram."""


@dataclass(frozen=True)
class JobMeter:
    """What one job takes, for the quotas of its caller, the usage of its tenant and the metrics."""

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


async def answer_job(
    request: Request,
    services: Services,
    ticket: Ticket,
    job: Job,
    view: GenerationView,
    stream: bool | None,
) -> Response:
    """Run the job, in one piece or streamed.

    Raises what `begin` and Generation.pieces raise.
    """
    generation = await begin(request, services, ticket, job, stream=bool(stream))
    if stream:
        events = guarded(view.events(generation), view.failure, view.closing)
        return EventStream(generation, events, job.timeout_s or 0.0)
    with cancelled_when_gone(request.receive, generation):
        choices = await generation.collect()
    return json_response(view.answer(generation, choices))


async def begin(
    request: Request, services: Services, ticket: Ticket, job: Job, *, stream: bool
) -> Generation:
    """The job, with the engine. Raises what Ticket.admit and Generation.start raise."""
    services.refuse_if_draining()
    ticket.admit(job.tokens_set_aside, job.choices)
    base = services.catalog.base_name
    spans = services.tracing.of_request(job, request.scope, base, stream=stream)
    generation = Generation(
        services.supervisor,
        services.tokenizer,
        job,
        services.settings.stream_buffer if stream else None,
        on_cut=connection_abort(request.scope),
        meter=JobMeter(ticket, services.usage, services.measured, job, spans),
    )
    await generation.start(services.residency)
    ticket.leave = generation.leave
    return generation
