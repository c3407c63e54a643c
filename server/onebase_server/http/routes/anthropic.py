"""POST /v1/messages and its count of tokens, as Anthropic's clients ask for them."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Request, Response

from onebase_protocol.messages import MessageAnswer, MessageEvent, TokenCountAnswer
from onebase_server.http.answers import answer, streamed_answer
from onebase_server.http.authorization import needs
from onebase_server.http.deps import Admitted, Calling, Provided, StrictRoute, json_response, off_loop
from onebase_server.http.routes.generation import answer_generation, transcript_of
from onebase_server.http.routes.models import find_model
from onebase_server.http.views.anthropic import MessageView
from onebase_server.inference.generation import new_id
from onebase_server.requests.schemas.anthropic import ConversationRequest, MessagesRequest
from onebase_server.requests.schemas.generation import AdapterFields

router = APIRouter(prefix="/v1/messages", route_class=StrictRoute, tags=["anthropic"])


@router.post("", responses=streamed_answer(MessageAnswer, MessageEvent))
@needs("generate")
async def create_message(
    body: MessagesRequest, request: Request, services: Provided, caller: Calling, reservation: Admitted
) -> Response:
    """Generate the assistant's next message; `model` is the base's name or an adapter's."""
    services.refuse_if_draining()
    services.planner.check_model(caller.tenant, body.model, body)
    format = await services.planner.thought_format(caller, body.model, body)
    chat = await off_loop(request, body.chat, format)
    transcript = await transcript_of(request, services, body.stream)
    engine_request = replace(await services.planner.chat(chat, caller, transcript), id=new_id("msg_"))
    own = engine_request.tokenizer or services.tokenizer
    view = MessageView(own, body.model, request.scope, hides_thoughts=body.hides_thoughts)
    return await answer_generation(
        request, services, reservation, engine_request, view, body.stream, transcript
    )


@router.post("/count_tokens", responses=answer(TokenCountAnswer, 404))
@needs("generate")
async def count_tokens(
    body: ConversationRequest, request: Request, services: Provided, caller: Calling
) -> Response:
    """Count the tokens of a message's prompt; nothing is generated."""
    services.refuse_if_draining()
    find_model(services, caller, body.model)
    fields = AdapterFields(adapter_defaults=body.adapter_defaults)
    format = await services.planner.thought_format(caller, body.model, fields)
    chat = await off_loop(request, body.chat, format)
    own = await services.planner.parts_of(caller.tenant, body.model, fields)
    tokens = await services.planner.chat_tokens(
        caller.tenant, chat, chat.messages, chat.reasoning_effort, own
    )
    return json_response(TokenCountAnswer(len(tokens)))
