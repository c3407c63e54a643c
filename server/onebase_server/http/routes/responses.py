"""/v1/responses: OpenAI's newer way to ask for an answer, and what was answered."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Path, Query, Request, Response

from onebase_edge.errors import InvalidRequestError, NotServedError
from onebase_protocol.common import DeletedAnswer
from onebase_protocol.responses import InputItemsAnswer, InputTokensAnswer, ResponseAnswer, ResponseEvent
from onebase_server.http.answers import answer, streamed_answer
from onebase_server.http.authorization import needs
from onebase_server.http.deps import (
    LONG_BODY,
    Admitted,
    Calling,
    Provided,
    Services,
    StrictRoute,
    json_response,
    off_loop,
)
from onebase_server.http.routes.generation import answer_generation, transcript_of
from onebase_server.http.routes.models import find_model
from onebase_server.http.views.responses import ResponseView
from onebase_server.requests.schemas.items import Items, conversation, items_again, kept_items
from onebase_server.requests.schemas.messages import ChatMessage
from onebase_server.requests.schemas.responses import ResponsesRequest
from onebase_server.requests.stored_responses import StoredResponse
from onebase_server.tenancy.access import Caller

router = APIRouter(prefix="/v1/responses", route_class=StrictRoute, tags=["openai"])
ResponseId = Annotated[str, Path(max_length=200)]


@router.post("", responses=streamed_answer(ResponseAnswer, ResponseEvent))
@needs("generate")
async def respond(
    body: ResponsesRequest, request: Request, services: Provided, caller: Calling, reservation: Admitted
) -> Response:
    """Generate the model's answer: text, or calls of functions; `model` is the base's name or an
    adapter's."""
    services.refuse_if_draining()
    responses = services.responses
    conversation_id = body.conversation_id
    if conversation_id is not None and caller.background:
        raise InvalidRequestError(
            "conversation: requests of a batch keep nothing. Send the items as input.", param="conversation"
        )
    items, messages, added = await _conversation_of(body, request, services, caller)
    transcript = await transcript_of(request, services, body.stream)
    engine_request = await services.planner.response(body, messages, caller, transcript)
    loop = asyncio.get_running_loop()  # a long answer is written in a thread

    def keep(response: dict[str, Any]) -> None:
        if caller.background or (body.store is False and conversation_id is None):
            return
        asked = kept_items(items)
        if body.store is not False:
            made = StoredResponse(msgspec.json.encode(response), msgspec.json.encode(asked))
            loop.call_soon_threadsafe(responses.store_response, caller.tenant, response["id"], made)
        if conversation_id is not None:
            new = [*asked[-added:], *response["output"]]
            grown = {item["id"]: msgspec.json.encode(item) for item in new}
            loop.call_soon_threadsafe(responses.append_items, caller.tenant, conversation_id, grown)

    view = ResponseView(engine_request.tokenizer or services.tokenizer, body, keep)
    return await answer_generation(
        request, services, reservation, engine_request, view, body.stream, transcript
    )


@router.post("/input_tokens", responses=answer(InputTokensAnswer, 404))
@needs("generate")
async def count_input_tokens(
    body: ResponsesRequest, request: Request, services: Provided, caller: Calling
) -> Response:
    """Count the tokens of a response's prompt; nothing is generated."""
    services.refuse_if_draining()
    services.planner.check_model(caller.tenant, body.model, body)
    find_model(services, caller, body.model)
    _, messages, _ = await _conversation_of(body, request, services, caller)
    count = await services.planner.input_tokens(caller.tenant, body, messages)
    return json_response(InputTokensAnswer(count))


async def _conversation_of(
    body: ResponsesRequest, request: Request, services: Services, caller: Caller
) -> tuple[Items, list[ChatMessage], int]:
    """Return what is to be answered, with what was said before it, and how many items of it are new.

    Raises InvalidRequestError, UnknownResponseError, UnknownConversationError.
    """
    before = None
    if body.conversation_id is not None:
        before = services.responses.find_conversation(caller.tenant, body.conversation_id, "conversation")
        services.responses.check_growth(before, await off_loop(request, _size, body.items))
    if body.previous_response_id is not None:
        before = services.responses.find(caller.tenant, body.previous_response_id, "previous_response_id")
    if before is None or len(before.input) + len(before.response) <= LONG_BODY:
        return await off_loop(request, _conversation, body, before)
    return await services.reading.run_for(caller.tenant, _conversation, body, before)


def _size(items: Items) -> int:
    return len(msgspec.json.encode(kept_items(items)))


def _conversation(
    body: ResponsesRequest, before: StoredResponse | None
) -> tuple[Items, list[ChatMessage], int]:
    """Return what is to be answered, as items and as messages, and how many items are new.

    Raises InvalidRequestError.
    """
    items = body.items
    if before is not None:
        said = msgspec.json.decode(before.input) + msgspec.json.decode(before.response).get("output", [])
        param = "previous_response_id" if body.conversation_id is None else "conversation"
        items = [*items_again(said, param), *items]
    return items, conversation(body.instructions, items), len(body.items)


@router.post("/compact", include_in_schema=False)
@needs("generate")
async def compact(caller: Calling) -> Response:
    """Refuse to summarize a conversation: this server has no model of its own for that."""
    raise NotServedError(
        "A conversation is not compacted here: a model would have to write its items anew, and which one is "
        "yours to choose. Ask for a summary with POST /v1/responses, and begin the next conversation with it."
    )


@router.get("/{response_id}", responses=answer(ResponseAnswer, 404))
@needs("generate")
async def get_response(
    response_id: ResponseId, services: Provided, caller: Calling, stream: bool = False
) -> Response:
    """Return a stored response."""
    if stream:
        raise InvalidRequestError(
            "stream: a stored response is sent in one piece. Leave stream out.", param="stream"
        )
    kept = services.responses.find(caller.tenant, response_id, "response_id")
    return Response(kept.response, media_type="application/json")


@router.delete("/{response_id}", responses=answer(DeletedAnswer, 404))
@needs("generate")
async def delete_response(response_id: ResponseId, services: Provided, caller: Calling) -> Response:
    """Delete a stored response; those that continue from it stay."""
    services.responses.delete(caller.tenant, response_id, "response_id")
    return json_response(DeletedAnswer(id=response_id, object="response"))


@router.get("/{response_id}/input_items", responses=answer(InputItemsAnswer, 404))
@needs("generate")
async def list_input_items(
    response_id: ResponseId,
    services: Provided,
    caller: Calling,
    after: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """List the items that a response answers, those of earlier turns included, newest first unless `order` is
    asc."""
    kept = services.responses.find(caller.tenant, response_id, "response_id")
    return json_response(InputItemsAnswer(**page_of(msgspec.json.decode(kept.input), after, limit, order)))


def page_of(items: list[dict[str, Any]], after: str | None, limit: int, order: str) -> dict[str, Any]:
    """Return the fields of one page of items. Raises InvalidRequestError."""
    if order == "desc":
        items = items[::-1]
    begin = 0
    if after is not None:
        begin = 1 + next((index for index, item in enumerate(items) if item["id"] == after), len(items))
        if begin > len(items):
            raise InvalidRequestError(
                f"after: {after!r} is none of the items. Take last_id of the page before.", param="after"
            )
    shown = items[begin : begin + limit]
    return {
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": begin + limit < len(items),
    }
