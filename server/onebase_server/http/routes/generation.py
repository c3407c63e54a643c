"""POST /generate, /v1/completions and /v1/chat/completions: text from the base or from any adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response

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
from onebase_server.http.guard import needs
from onebase_server.http.schemas.answers import (
    ChatAnswer,
    CompletionAnswer,
    GeneratedAnswer,
    TgiAnswer,
    streamed_answer,
)
from onebase_server.http.schemas.events import ChatEvent, CompletionEvent, GenerateEvent, TgiEvent
from onebase_server.http.schemas.generation import GenerateRequest
from onebase_server.http.schemas.openai import ChatRequest, CompletionRequest
from onebase_server.http.schemas.tgi import TgiRequest
from onebase_server.http.sse import EventStream, cancelled_when_gone, connection_abort, guarded
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

    Raises what Ticket.admit, Generation.start and `pieces` raise.
    """
    services.refuse_if_draining()
    ticket.admit(job.tokens_set_aside, job.choices)
    base = services.catalog.base_name
    spans = services.tracing.of_request(job, request.scope, base, stream=bool(stream))
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
    if stream:
        return EventStream(generation, guarded(view.events(generation), view.failure, view.closing))
    with cancelled_when_gone(request.receive, generation):
        choices = await generation.collect()
    return json_response(view.answer(generation, choices))
