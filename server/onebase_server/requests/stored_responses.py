"""Responses and conversations stored for later requests that refer to them: in memory, within a limit."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from onebase_edge.errors import UnknownConversationError, UnknownResponseError

_CONVERSATION = "conversation/"
"""Beginning of the names under which conversations are stored, which no response has."""
OVERHEAD = 1000
"""Bytes that a response takes besides its texts, at most."""


@dataclass(frozen=True)
class StoredResponse:
    """A response and the items that it answers, or a conversation and its items, both as JSON."""

    response: bytes
    input: bytes

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self.response) + len(self.input) + OVERHEAD


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

    def store_response(self, tenant: str, response_id: str, response: StoredResponse) -> None:
        """Store a response as the most recently used, in place of one with this id. One that alone is over
        the limit is dropped at once."""
        shelf = self._shelves.get(tenant)
        if shelf is not None and response_id in shelf.responses:
            self._drop(tenant, response_id)
        self._shelves.setdefault(tenant, _Shelf()).put(response_id, response)
        self.size += response.size
        while self.size > self._limit:
            largest = max(self._shelves, key=lambda name: self._shelves[name].size)
            self._drop(largest, next(iter(self._shelves[largest].responses)))

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

    def store_conversation(self, tenant: str, conversation_id: str, conversation: StoredResponse) -> None:
        """Store a conversation as a response is stored."""
        self.store_response(tenant, _CONVERSATION + conversation_id, conversation)

    def find_conversation(self, tenant: str, conversation_id: str, param: str) -> StoredResponse:
        """Return one of the tenant's conversations and mark it as used. Raises UnknownConversationError."""
        try:
            return self.find(tenant, _CONVERSATION + conversation_id, param)
        except UnknownResponseError:
            raise UnknownConversationError(conversation_id, param) from None

    def append_items(self, tenant: str, conversation_id: str, items: bytes) -> None:
        """Add a list of items, as JSON, to a conversation; nothing if it was deleted meanwhile."""
        try:
            kept = self.find_conversation(tenant, conversation_id, "conversation")
        except UnknownConversationError:
            return
        lists = [one[1:-1] for one in (kept.input, items) if one != b"[]"]
        joined = StoredResponse(kept.response, b"[" + b",".join(lists) + b"]")
        self.store_conversation(tenant, conversation_id, joined)

    def delete_conversation(self, tenant: str, conversation_id: str, param: str) -> None:
        """Raises UnknownConversationError."""
        self.find_conversation(tenant, conversation_id, param)
        self._drop(tenant, _CONVERSATION + conversation_id)

    def _drop(self, tenant: str, response_id: str) -> None:
        shelf = self._shelves[tenant]
        self.size -= shelf.pop_response(response_id).size
        if not shelf.responses:
            del self._shelves[tenant]
