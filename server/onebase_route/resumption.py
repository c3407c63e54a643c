"""State of a stream that the route keeps, so that another server can resume it."""

from __future__ import annotations

import re
from hashlib import blake2b

from onebase_edge.forwarded import MARK, MOST_TRANSCRIPT

MOST_EVENT = 16 << 20
"""Largest size, in bytes, of one event that is held until it is whole."""
_LINES = re.compile(rb"^: onebase [^\n]*\n", re.MULTILINE)


class DiffersError(Exception):
    """A server has made other events of a transcript than those that were passed on."""


class SharedBudget:
    """Amount of something, such as bytes of memory, that tenants reserve parts of.

    A tenant reserves no more than is free, half of all where no other has any, so that there is room for the
    next one (dynamic thresholds, Choudhury and Hahne, IEEE/ACM Transactions on Networking 6, 1998).
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.reserved = 0
        self._parts: dict[str, int] = {}

    def reserve(self, tenant: str, amount: int) -> bool:
        """Reserve the amount. Return False, and reserve nothing, if the tenant may not have so much more."""
        part = self._parts.get(tenant, 0)
        if part + amount > self.most - self.reserved:
            return False
        if amount:
            self._parts[tenant] = part + amount
            self.reserved += amount
        return True

    def release(self, tenant: str, amount: int) -> None:
        if not amount:
            return
        self.reserved -= amount
        self._parts[tenant] -= amount
        if not self._parts[tenant]:
            del self._parts[tenant]


class WaitingRoom:
    """Requests that wait for a server, within a number of places and of bytes of their bodies."""

    def __init__(self, places: int, most: int) -> None:
        self._places = SharedBudget(places)
        self._bytes = SharedBudget(most)

    def __len__(self) -> int:
        return self._places.reserved

    def enter(self, tenant: str, size: int) -> bool:
        """Take a place for a body of so many bytes. Return False, and take none, if there is none."""
        if not self._places.reserve(tenant, 1):
            return False
        if not self._bytes.reserve(tenant, size):
            self._places.release(tenant, 1)
            return False
        return True

    def leave(self, tenant: str, size: int) -> None:
        self._places.release(tenant, 1)
        self._bytes.release(tenant, size)


class StreamRecord:
    """One stream: its transcript, and how many bytes of events were passed on, with their digest.

    Events are passed on once they are whole, so that a stream which breaks can be resumed, or end with an
    error. The transcript counts towards the tenant's part of the memory."""

    def __init__(self, room: SharedBudget, tenant: str) -> None:
        self.transcript = bytearray()
        self.can_resume = True
        """Whether the whole transcript is kept, so that the stream can be resumed."""
        self._room = room
        self._tenant = tenant
        self._rest = bytearray()
        self._in_line = False
        """Whether the beginning of the current line was passed on."""
        self._passed = self._passed_before = 0
        self._digest = blake2b(digest_size=16)
        self._again = 0
        """Number of bytes that the resuming server has yet to repeat."""
        self._digest_again = blake2b(digest_size=16)

    @property
    def has_grown(self) -> bool:
        """Whether the server that has the stream now has added an event to it."""
        return self._passed > self._passed_before

    def read(self, piece: bytes) -> bytes:
        """Return the events that this piece completes and that were not passed on. Raises DiffersError."""
        looked_at = max(0, len(self._rest) - 1)
        self._rest += piece
        if not self.can_resume and not self._again:
            return self._without_lines()
        end = self._rest.rfind(b"\n\n", looked_at) + 2
        if end < 2:
            if len(self._rest) > MOST_EVENT:
                if self._again:  # among the events that were passed on is none so long
                    raise DiffersError
                self.give_up()
            return b""
        whole = bytes(self._rest[:end])
        del self._rest[:end]
        if MARK in whole:
            self._keep(b"".join(_LINES.findall(whole)))
            whole = _LINES.sub(b"", whole)
        return self._new(whole)

    def end(self) -> bytes:
        """Return the rest of a stream that has ended by itself. Raises DiffersError."""
        left = self._new(_LINES.sub(b"", bytes(self._rest)))
        if self._again:
            raise DiffersError
        return left

    def begin_again(self) -> None:
        """Expect another server's stream, from its first event on."""
        self._rest.clear()
        self._again, self._digest_again = self._passed, blake2b(digest_size=16)
        self._passed_before = self._passed

    def give_up(self) -> None:
        """Drop the transcript: the stream will not be resumed."""
        self.can_resume = False
        self._room.release(self._tenant, len(self.transcript))
        self.transcript.clear()

    def _keep(self, lines: bytes) -> None:
        if not self.can_resume:
            return
        small = len(self.transcript) + len(lines) <= MOST_TRANSCRIPT
        if small and self._room.reserve(self._tenant, len(lines)):
            self.transcript += lines
        else:
            self.give_up()

    def _new(self, events: bytes) -> bytes:
        if self._again:
            known, events = events[: self._again], events[self._again :]
            self._digest_again.update(known)
            self._again -= len(known)
            if not self._again and self._digest_again.digest() != self._digest.digest():
                raise DiffersError
        self._digest.update(events)
        self._passed += len(events)
        return events

    def _without_lines(self) -> bytes:
        """Return all bytes but lines of the transcript, and hold back a possible beginning of one."""
        data, begun = bytes(self._rest), b""
        if self._in_line:
            line = data.find(b"\n") + 1 or len(data)
            begun, data = data[:line], data[line:]
        last = data.rfind(b"\n") + 1
        tail = data[last:]
        held = len(tail) if tail and (tail.startswith(MARK) or MARK.startswith(tail)) else 0
        self._rest = bytearray(data[len(data) - held :])
        passed = begun + _LINES.sub(b"", data[: len(data) - held])
        if passed:
            self._in_line = not held and not passed.endswith(b"\n")
        return passed
