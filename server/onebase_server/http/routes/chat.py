"""POST /v1/chat/completions, as OpenAI defines it."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response

from onebase_server.http.deps import Provided, StrictRoute, json_response
from onebase_server.http.schemas.openai import ChatRequest
from onebase_server.http.sse import EventStream, cancelled_when_gone, guarded
from onebase_server.http.views.generation import ChatWire, openai_answer, openai_events

router = APIRouter(prefix="/v1", route_class=StrictRoute, tags=["openai"])


@router.post("/chat/completions")
async def chat(body: ChatRequest, request: Request, services: Provided) -> Response:
    """The assistant's next words; `model` is the base's name or an adapter's."""
    services.refuse_if_draining()
    job = await services.planner.chat(body)
    generation = await services.begin(job, streamed=bool(body.stream))
    wire, created = ChatWire(services.tokenizer), int(time.time())
    if body.stream:
        events = openai_events(generation, wire, body.model, created, body.include_usage)
        return EventStream(generation, guarded(events))
    with cancelled_when_gone(request, generation):
        choices = await generation.collect()
    return json_response(openai_answer(generation, choices, wire, body.model, created))
