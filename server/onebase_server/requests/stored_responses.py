"""Responses and conversations stored for later requests that refer to them: in memory, within a limit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from onebase_edge.errors import InvalidRequestError, UnknownConversationError, UnknownResponseError
from onebase_server.inference.generation import new_id

_CONVERSATION = "conversation/"
"""Beginning of the names under which conversations are stored, which no response has."""
OVERHEAD = 1000
"""Bytes that a response takes besides its texts, at most."""
_ID_OVERHEAD = 150
"""Bytes that the id of a conversation's item takes besides the item, about."""


@dataclass(frozen=True)
class StoredResponse:
    """A response and the items that it answers, or a conversation and its items, both as JSON."""

    response: bytes
    input: bytes
    ids: frozenset[str] = frozenset()
    """Ids of a conversation's items."""

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self.response) + len(self.input) + OVERHEAD + _ID_OVERHEAD * len(self.ids)


class _Shelf:
    """One tenant's responses, the least recently used first."""

    def __init__(self) -> None:
        self.responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self.size = 0

    def put(self, response_id: str, response: StoredResponse) -> None:
        """Store a response whose id is not there."""
        self.responses[response_id] = response
        self.size += response.size

    def pop_response(self, response_id: str) -> StoredResponse:
        """Remove and return a response. Raises KeyError."""
        response = self.responses.pop(response_id)
        self.size -= response.size
        return response


class StoredResponses:
    """All tenants' responses, in `limit` bytes together.

    The tenant with the most bytes loses its least recently used response first. So no tenant loses any to
    others while it has no more than an equal part.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._shelves: dict[str, _Shelf] = {}
        self.size = 0

    def store_response(self, tenant: str, response_id: str, response: StoredResponse) -> bool:
        """Store a response as the most recently used, in place of one with this id. Return False, with all
        as it was, if it alone is over the limit."""
        if response.size > self._limit:
            return False
        shelf = self._shelves.get(tenant)
        if shelf is not None and response_id in shelf.responses:
            self._drop(tenant, response_id)
        self._shelves.setdefault(tenant, _Shelf()).put(response_id, response)
        self.size += response.size
        while self.size > self._limit:
            largest = max(self._shelves, key=lambda name: self._shelves[name].size)
            self._drop(largest, next(iter(self._shelves[largest].responses)))
        return True

    def find(self, tenant: str, response_id: str, param: str) -> StoredResponse:
        """Return one of the tenant's responses and mark it as used. Raises UnknownResponseError."""
        shelf = self._shelves.get(tenant)
        if shelf is None or response_id not in shelf.responses:
            raise UnknownResponseError(response_id, param)
        shelf.responses.move_to_end(response_id)
        return shelf.responses[response_id]

    def delete(self, tenant: str, response_id: str, param: str) -> None:
        """Raises UnknownResponseError."""
        self.find(tenant, response_id, param)
        self._drop(tenant, response_id)

    def store_conversation(
        self, tenant: str, conversation_id: str, conversation: StoredResponse, param: str
    ) -> None:
        """Store a conversation as a response is stored. Raises InvalidRequestError, with all as it was, if it
        alone is over the limit. `param`: the request's field with what it is to have."""
        if not self.store_response(tenant, _CONVERSATION + conversation_id, conversation):
            raise self._too_large(param)

    def check_growth(self, conversation: StoredResponse, size: int) -> None:
        """Raise InvalidRequestError if a conversation would be over the limit with `size` bytes of input."""
        if conversation.size + size > self._limit:
            raise self._too_large("input")

    def _too_large(self, param: str) -> InvalidRequestError:
        return InvalidRequestError(
            f"{param}: the conversation would be larger than {self._limit} bytes, which is all that this "
            "server keeps (--response-memory). Begin a new one.",
            param=param,
            code="conversation_too_large",
        )

    def find_conversation(self, tenant: str, conversation_id: str, param: str) -> StoredResponse:
        """Return one of the tenant's conversations and mark it as used. Raises UnknownConversationError."""
        try:
            return self.find(tenant, _CONVERSATION + conversation_id, param)
        except UnknownResponseError:
            raise UnknownConversationError(conversation_id, param) from None

    def append_items(self, tenant: str, conversation_id: str, items: Mapping[str, bytes]) -> None:
        """Add items, as JSON by their ids, to a conversation; one whose id was added meanwhile gets another.
        Add nothing if the conversation was deleted meanwhile, or would be over the limit."""
        try:
            kept = self.find_conversation(tenant, conversation_id, "conversation")
        except UnknownConversationError:
            return
        added = {}
        for item_id, item in items.items():
            if item_id in kept.ids:
                item_id = new_id("item_")
                item = msgspec.json.encode(msgspec.json.decode(item) | {"id": item_id})
            added[item_id] = item
        before = [kept.input[1:-1]] if kept.input != b"[]" else []
        joined = b"[" + b",".join([*before, *added.values()]) + b"]"
        self.store_response(
            tenant,
            _CONVERSATION + conversation_id,
            StoredResponse(kept.response, joined, kept.ids.union(added)),
        )

    def delete_conversation(self, tenant: str, conversation_id: str, param: str) -> None:
        """Raises UnknownConversationError."""
        self.find_conversation(tenant, conversation_id, param)
        self._drop(tenant, _CONVERSATION + conversation_id)

    def _drop(self, tenant: str, response_id: str) -> None:
        shelf = self._shelves[tenant]
        self.size -= shelf.pop_response(response_id).size
        if not shelf.responses:
            del self._shelves[tenant]
