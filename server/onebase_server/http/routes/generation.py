"""POST /generate, /v1/completions and /v1/chat/completions: text from the base or from any adapter."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from onebase_server.generation.generation import Generation, Job
from onebase_server.http.deps import Calling, Provided, Services, StrictRoute, json_response
from onebase_server.http.guard import needs
from onebase_server.http.schemas.generation import GenerateRequest
from onebase_server.http.schemas.openai import ChatRequest, CompletionRequest
from onebase_server.http.sse import EventStream, cancelled_when_gone, connection_abort, guarded
from onebase_server.http.views.generation import ChatView, CompletionView, GenerateView, GenerationView

router = APIRouter(route_class=StrictRoute)


@router.post("/generate", tags=["generate"])
@needs("generate")
async def generate(body: GenerateRequest, request: Request, services: Provided, caller: Calling) -> Response:
    """Text from the base or from any adapter, in one piece or streamed as server-sent events."""
    services.refuse_if_draining()
    job = await services.planner.generate(body, caller)
    return await _answer(request, services, job, GenerateView(services.tokenizer), body.stream)


@router.post("/v1/completions", tags=["openai"])
@needs("generate")
async def complete(
    body: CompletionRequest, request: Request, services: Provided, caller: Calling
) -> Response:
    """Completions of one prompt or several; `model` is the base's name or an adapter's."""
    services.refuse_if_draining()
    job = await services.planner.completion(body, caller)
    view = CompletionView(services.tokenizer, body.model, body.include_usage)
    return await _answer(request, services, job, view, body.stream)


@router.post("/v1/chat/completions", tags=["openai"])
@needs("generate")
async def chat(body: ChatRequest, request: Request, services: Provided, caller: Calling) -> Response:
    """The assistant's next words; `model` is the base's name or an adapter's."""
    services.refuse_if_draining()
    job = await services.planner.chat(body, caller)
    view = ChatView(services.tokenizer, body.model, body.include_usage)
    return await _answer(request, services, job, view, body.stream)


async def _answer(
    request: Request, services: Services, job: Job, view: GenerationView, stream: bool | None
) -> Response:
    """Run the job, in one piece or streamed. Raises what Generation.start and `pieces` raise."""
    services.refuse_if_draining()
    generation = Generation(
        services.supervisor,
        services.tokenizer,
        job,
        services.settings.stream_buffer if stream else None,
        on_cut=connection_abort(request.scope),
    )
    await generation.start(services.residency)
    if stream:
        return EventStream(generation, guarded(view.events(generation)))
    with cancelled_when_gone(request.receive, generation):
        choices = await generation.collect()
    return json_response(view.answer(generation, choices))
