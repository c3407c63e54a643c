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


class ByteBudget:
    """Budget of bytes that all requests together may keep in memory."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.reserved = 0

    def reserve_bytes(self, size: int) -> bool:
        """Reserve so many bytes. Return False, and reserve nothing, if there is no room."""
        if self.reserved + size > self.most:
            return False
        self.reserved += size
        return True

    def release_bytes(self, size: int) -> None:
        self.reserved -= size


class WaitingRoom:
    """Requests that wait for a server, within a number of places and of bytes of their bodies.

    A tenant takes no more of either than is free, half of all where no other waits, so that there is room for
    the next one (dynamic thresholds, Choudhury and Hahne, IEEE/ACM Transactions on Networking 6, 1998).
    """

    def __init__(self, places: int, most: int) -> None:
        self._places = places
        self._most = most
        self._waiting: dict[str, list[int]] = {}
        """Sizes, in bytes, of the bodies of each tenant's requests."""

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def enter(self, tenant: str, size: int) -> bool:
        """Take a place for a body of so many bytes. Return False, and take none, if there is none."""
        mine = self._waiting.get(tenant, [])
        held = sum(map(sum, self._waiting.values()))
        if len(mine) >= self._places - len(self) or sum(mine) + size > self._most - held:
            return False
        self._waiting[tenant] = [*mine, size]
        return True

    def leave(self, tenant: str, size: int) -> None:
        mine = self._waiting[tenant]
        mine.remove(size)
        if not mine:
            del self._waiting[tenant]


class StreamRecord:
    """One stream: its transcript, and how many bytes of events were passed on, with their digest.

    Events are passed on once they are whole, so that a stream which breaks can be resumed, or end with an
    error."""

    def __init__(self, room: ByteBudget) -> None:
        self.transcript = bytearray()
        self.can_resume = True
        """Whether the whole transcript is kept, so that the stream can be resumed."""
        self._room = room
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
        self._room.release_bytes(len(self.transcript))
        self.transcript.clear()

    def _keep(self, lines: bytes) -> None:
        if not self.can_resume:
            return
        small = len(self.transcript) + len(lines) <= MOST_TRANSCRIPT
        if small and self._room.reserve_bytes(len(lines)):
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
