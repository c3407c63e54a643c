"""/v1/conversations: items that responses continue from and add to, kept as responses are."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from fastapi import APIRouter, Path, Query, Request, Response

from onebase_edge.errors import AdapterNotFoundError, InvalidRequestError
from onebase_protocol.common import DeletedAnswer
from onebase_protocol.responses import AnyItemAnswer, ConversationAnswer, ConversationItemsAnswer
from onebase_server.http.answers import answer
from onebase_server.http.authorization import needs
from onebase_server.http.deps import (
    LONG_BODY,
    Calling,
    Provided,
    Services,
    StrictRoute,
    json_response,
    off_loop,
)
from onebase_server.http.routes.responses import page_of
from onebase_server.inference.generation import new_id
from onebase_server.requests.schemas.items import AnyItems, Items, kept_items
from onebase_server.requests.schemas.messages import MAX_MESSAGES
from onebase_server.requests.schemas.responses import Metadata
from onebase_server.requests.schemas.wire import Wire
from onebase_server.requests.stored_responses import StoredResponse
from onebase_server.tenancy.access import Caller

router = APIRouter(prefix="/v1/conversations", route_class=StrictRoute, tags=["openai"])
ConversationId = Annotated[str, Path(max_length=200)]
Json = dict[str, Any]
T = TypeVar("T")


class NewConversation(Wire):
    """Body of POST /v1/conversations."""

    items: AnyItems | None = None
    metadata: Metadata | None = None


class ConversationUpdate(Wire):
    """Body of POST /v1/conversations/{id}."""

    metadata: Metadata


class ItemsRequest(Wire):
    """Body of POST /v1/conversations/{id}/items."""

    items: Items


@router.post("", responses=answer(ConversationAnswer))
@needs("generate")
async def create_conversation(
    body: NewConversation, request: Request, services: Provided, caller: Calling
) -> Response:
    """Make a conversation, which may have its first items."""
    items = await off_loop(request, _added, [], body.items or [])
    made = ConversationAnswer(
        id=new_id("conv_"), created_at=int(time.time()), metadata=dict(body.metadata or {})
    )
    stored = StoredResponse(msgspec.json.encode(made), msgspec.json.encode(items), _ids(items))
    services.responses.store_conversation(caller.tenant, made.id, stored, "items")
    _find(services, caller, made.id)  # of a tenant that already has most, it may be the first to go
    return json_response(made)


@router.get("/{conversation_id}", responses=answer(ConversationAnswer, 404))
@needs("generate")
async def get_conversation(conversation_id: ConversationId, services: Provided, caller: Calling) -> Response:
    """Return a conversation without its items."""
    return Response(_find(services, caller, conversation_id).response, media_type="application/json")


@router.post("/{conversation_id}", responses=answer(ConversationAnswer, 404))
@needs("generate")
async def update_conversation(
    conversation_id: ConversationId, body: ConversationUpdate, services: Provided, caller: Calling
) -> Response:
    """Replace a conversation's metadata."""
    kept = _find(services, caller, conversation_id)
    before = msgspec.json.decode(kept.response, type=ConversationAnswer)
    made = msgspec.structs.replace(before, metadata=dict(body.metadata))
    stored = replace(kept, response=msgspec.json.encode(made))
    services.responses.store_conversation(caller.tenant, conversation_id, stored, "metadata")
    return json_response(made)


@router.delete("/{conversation_id}", responses=answer(DeletedAnswer, 404))
@needs("generate")
async def delete_conversation(
    conversation_id: ConversationId, services: Provided, caller: Calling
) -> Response:
    """Delete a conversation and its items; responses that it had stay."""
    services.responses.delete_conversation(caller.tenant, conversation_id, "conversation_id")
    return json_response(DeletedAnswer(id=conversation_id, object="conversation.deleted"))


@router.post("/{conversation_id}/items", responses=answer(ConversationItemsAnswer, 404))
@needs("generate")
async def create_items(
    conversation_id: ConversationId, body: ItemsRequest, services: Provided, caller: Calling
) -> Response:
    """Add items to the end of a conversation."""

    def add(items: list[Json]) -> tuple[list[Json], list[Json]]:
        added = _added(items, body.items)
        return [*items, *added], added

    added = await _change(services, caller, conversation_id, add)
    return json_response(ConversationItemsAnswer(**page_of(added, None, len(added), "asc")))


@router.get("/{conversation_id}/items", responses=answer(ConversationItemsAnswer, 404))
@needs("generate")
async def list_items(
    conversation_id: ConversationId,
    services: Provided,
    caller: Calling,
    after: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """List a conversation's items, newest first unless `order` is asc."""
    items = await _items(services, caller, _find(services, caller, conversation_id))
    return json_response(ConversationItemsAnswer(**page_of(items, after, limit, order)))


@router.get("/{conversation_id}/items/{item_id}", responses=answer(AnyItemAnswer, 404))
@needs("generate")
async def get_item(
    conversation_id: ConversationId, item_id: ConversationId, services: Provided, caller: Calling
) -> Response:
    """Return one item of a conversation."""
    items = await _items(services, caller, _find(services, caller, conversation_id))
    return json_response(items[_place(items, item_id)])


@router.delete("/{conversation_id}/items/{item_id}", responses=answer(ConversationAnswer, 404))
@needs("generate")
async def delete_item(
    conversation_id: ConversationId, item_id: ConversationId, services: Provided, caller: Calling
) -> Response:
    """Delete one item of a conversation, and return the conversation."""

    def remove(items: list[Json]) -> tuple[list[Json], None]:
        place = _place(items, item_id)
        return [*items[:place], *items[place + 1 :]], None

    await _change(services, caller, conversation_id, remove)
    return await get_conversation(conversation_id, services, caller)


def _find(services: Services, caller: Caller, conversation_id: str) -> StoredResponse:
    return services.responses.find_conversation(caller.tenant, conversation_id, "conversation_id")


async def _items(services: Services, caller: Caller, kept: StoredResponse) -> list[Json]:
    """Return the items of a conversation; long ones are read in a thread."""
    if len(kept.input) <= LONG_BODY:
        return _read(kept.input)
    return await services.reading.run_for(caller.tenant, _read, kept.input)


def _read(items: bytes) -> list[Json]:
    return msgspec.json.decode(items, type=list[Json])


async def _change(
    services: Services,
    caller: Caller,
    conversation_id: str,
    change: Callable[[list[Json]], tuple[list[Json], T]],
) -> T:
    """Store what `change` makes of the items, and return what else it does. A response that has added its
    own meanwhile loses nothing: the change is made once more."""

    def changed(kept: StoredResponse) -> tuple[StoredResponse, T]:
        made, more = change(_read(kept.input))
        return StoredResponse(kept.response, msgspec.json.encode(made), _ids(made)), more

    while True:
        kept = _find(services, caller, conversation_id)
        if len(kept.input) <= LONG_BODY:
            stored, result = changed(kept)
        else:
            stored, result = await services.reading.run_for(caller.tenant, changed, kept)
        if _find(services, caller, conversation_id) is kept:
            services.responses.store_conversation(caller.tenant, conversation_id, stored, "items")
            return result


def _ids(items: list[Json]) -> frozenset[str]:
    return frozenset(item["id"] for item in items)


def _added(before: list[Json], items: Items) -> list[Json]:
    """Return items as they are stored, each with an id that no other has. Raises InvalidRequestError."""
    count = len(before) + len(items)
    if count > MAX_MESSAGES:
        raise InvalidRequestError(
            f"items: the conversation would have {count}; the most is {MAX_MESSAGES}. Begin a new one.",
            param="items",
        )
    known = {item["id"] for item in before}
    made = kept_items(items)
    return [item | {"id": new_id("item_")} if item["id"] in known else item for item in made]


def _place(items: list[Json], item_id: str) -> int:
    for place, item in enumerate(items):
        if item["id"] == item_id:
            return place
    raise AdapterNotFoundError(
        f"item_id: the conversation has no item {item_id[:100]!r}.", param="item_id", code="item_not_found"
    )
