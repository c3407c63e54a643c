"""Responses that were given, for those who come back to them: in memory, within a limit."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from onebase_edge.errors import UnknownResponseError

OVERHEAD = 1000
"""Bytes that a response takes besides its texts, at most."""


@dataclass(frozen=True)
class KeptResponse:
    """A response and the items that it answers, both as JSON."""

    response: bytes
    input: bytes

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self.response) + len(self.input) + OVERHEAD


class _Shelf:
    """One tenant's, the least recently used first."""

    def __init__(self) -> None:
        self.kept: OrderedDict[str, KeptResponse] = OrderedDict()
        self.size = 0

    def put(self, response_id: str, kept: KeptResponse) -> None:
        """Store one whose id is not there."""
        self.kept[response_id] = kept
        self.size += kept.size

    def take(self, response_id: str) -> KeptResponse:
        """Raises KeyError."""
        kept = self.kept.pop(response_id)
        self.size -= kept.size
        return kept


class KeptResponses:
    """All tenants' responses, in `limit` bytes together.

    Whoever has most loses first, what was not used for longest. So nobody's go for others' while they take no
    more than an equal part.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._shelves: dict[str, _Shelf] = {}
        self.size = 0

    def keep(self, tenant: str, response_id: str, kept: KeptResponse) -> None:
        """Store it as the one used last, in place of one with this id. Drop it at once if it alone is over
        the limit."""
        shelf = self._shelves.get(tenant)
        if shelf is not None and response_id in shelf.kept:
            self._drop(tenant, response_id)
        self._shelves.setdefault(tenant, _Shelf()).put(response_id, kept)
        self.size += kept.size
        while self.size > self._limit:
            largest = max(self._shelves, key=lambda name: self._shelves[name].size)
            self._drop(largest, next(iter(self._shelves[largest].kept)))

    def find(self, tenant: str, response_id: str, param: str) -> KeptResponse:
        """One of the tenant's, which is the one used last from now on. Raises UnknownResponseError."""
        shelf = self._shelves.get(tenant)
        if shelf is None or response_id not in shelf.kept:
            raise UnknownResponseError(response_id, param)
        shelf.kept.move_to_end(response_id)
        return shelf.kept[response_id]

    def delete(self, tenant: str, response_id: str, param: str) -> None:
        """Raises UnknownResponseError."""
        self.find(tenant, response_id, param)
        self._drop(tenant, response_id)

    def _drop(self, tenant: str, response_id: str) -> None:
        shelf = self._shelves[tenant]
        self.size -= shelf.take(response_id).size
        if not shelf.kept:
            del self._shelves[tenant]
