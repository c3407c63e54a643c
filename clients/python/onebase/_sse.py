"""Server-sent events out of bytes, however the network cut them.

The format: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_EVENT_BYTES = 64 * 1024 * 1024
"""More than this without the end of an event is no event stream."""

_LINE_END = re.compile(rb"\r\n|\r|\n")


@dataclass(frozen=True)
class ServerEvent:
    """One event. `id` is the newest that the stream gave, with this event or before; "" if it gave none."""

    data: str
    name: str = "message"
    id: str = ""


class SSEParser:
    """Cuts a byte stream into events. Feed it what came; it keeps the incomplete rest.

    Comments and fields other than `data`, `event` and `id` are skipped.
    """

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._rest: list[bytes] = []
        self._data: list[bytes] = []
        self._name = self._id = ""
        self._size = 0
        self._first_line = True
        self._skip_newline = False

    def feed(self, chunk: bytes) -> list[str]:
        """The data of each event that `chunk` completes. Raises as `feed_events`."""
        return [event.data for event in self.feed_events(chunk)]

    def feed_events(self, chunk: bytes) -> list[ServerEvent]:
        """The events that `chunk` completes.

        Raises:
            ValueError: an event is over the size limit.
        """
        if not chunk:
            return []
        if self._skip_newline:
            chunk = chunk.removeprefix(b"\n")
        *ended, rest = _LINE_END.split(chunk)
        self._skip_newline = chunk.endswith(b"\r")
        events: list[ServerEvent] = []
        for line in ended:
            event = self._line(b"".join((*self._rest, line)))
            self._rest.clear()
            if event is not None:
                events.append(event)
        if rest:
            self._rest.append(rest)
            self._size += len(rest)
        if self._size > self._max_event_bytes:
            raise ValueError(f"an event of the stream is over {self._max_event_bytes} bytes")
        return events

    def _line(self, line: bytes) -> ServerEvent | None:
        """Take one whole line; the event if it was the blank line that ends one."""
        if self._first_line:
            self._first_line = False
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            return self._end_event()
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
        elif field == b"event":
            self._name = _text(value)
        elif field == b"id" and b"\0" not in value:
            self._id = _text(value)
        self._size = sum(map(len, self._data))
        return None

    def _end_event(self) -> ServerEvent | None:
        self._size = 0
        name, self._name = self._name or "message", ""
        if not self._data:
            return None
        data = _text(b"\n".join(self._data))
        self._data.clear()
        return ServerEvent(data, name, self._id)


def _text(value: bytes) -> str:
    return value.decode("utf-8", errors="replace")
