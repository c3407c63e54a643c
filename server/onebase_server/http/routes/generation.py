"""POST /generate."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from onebase_server.http.deps import Provided, StrictRoute, json_response
from onebase_server.http.schemas.generation import GenerateRequest
from onebase_server.http.sse import EventStream, cancelled_when_gone, guarded
from onebase_server.http.views.generation import generate_answer, generate_events

router = APIRouter(route_class=StrictRoute, tags=["generate"])


@router.post("/generate")
async def generate(body: GenerateRequest, request: Request, services: Provided) -> Response:
    """Text from the base or from any adapter, in one piece or streamed as server-sent events."""
    services.refuse_if_draining()
    job = await services.planner.generate(body)
    generation = await services.begin(job, streamed=bool(body.stream))
    if body.stream:
        return EventStream(generation, guarded(generate_events(generation, services.tokenizer)))
    with cancelled_when_gone(request, generation):
        choices = await generation.collect()
    return json_response(generate_answer(generation, choices, services.tokenizer))
