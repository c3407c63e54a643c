"""Streams: bytes become server-sent events, and events become an answer or the events of a job.

httpx2 has a reader of server-sent events too. SSEParser does what that one does not: an asynchronous stream
that is left early closes all its generators at once (`EventSource` leaves `aiter_text` to the garbage
collector, which trio reports as a ResourceWarning); a byte order mark is skipped; fields without data make
no event.

The format: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ..errors import APITimeoutError, ErrorDetail, InvalidResponseError, OneBaseError, StreamError
from ..training_types import TrainingEvent, TrainingJobInfo
from ..types import Choice, Generation, Logprobs, Piece
from . import training
from .parse import StreamEnd, parse, stream_event
from .requests import Call
from .retry import Backoff

MAX_EVENT_BYTES: Final = 64 * 1024 * 1024
"""A server that sends more than this without the end of an event sends no events."""

_LINE_END: Final = re.compile(rb"\r\n|\r|\n")
_END_OF_ANSWER: Final = "[DONE]"
_END_OF_JOB: Final = "done"


@dataclass(frozen=True)
class ServerEvent:
    """One event. `id` is the newest id of the stream so far, "" if it had none."""

    data: str
    name: str = "message"
    id: str = ""


class SSEParser:
    """Cuts a stream of bytes into events, and keeps the incomplete rest.

    Comments, and fields other than `data`, `event` and `id`, are skipped.
    """

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._rest: list[bytes] = []
        self._data: list[bytes] = []
        self._name = self._id = ""
        self._size = 0
        self._first_line = True
        self._skip_newline = False

    def feed(self, chunk: bytes) -> list[ServerEvent]:
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
        """Take one whole line. Gives the event if this is the blank line that ends it."""
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


# ---- an answer ---------------------------------------------------------------------------------------


class _ChoiceSoFar:
    """One choice as it grows."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.logprobs: list[Logprobs] = []
        self.finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        self.texts.append(piece.text)
        if piece.logprobs is not None:
            self.logprobs.append(piece.logprobs)
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason

    def complete(self, index: int) -> Choice:
        if self.finish_reason is None:
            raise InvalidResponseError(f"the stream ended without the end of choice {index}")
        return Choice(index, "".join(self.texts), self.finish_reason, _joined(self.logprobs))


def _joined(parts: list[Logprobs]) -> Logprobs | None:
    if not parts:
        return None
    return Logprobs(
        tuple(token for part in parts for token in part.tokens),
        tuple(token for part in parts for token in part.token_ids),
        tuple(value for part in parts for value in part.token_logprobs),
        tuple(top for part in parts for top in part.top_logprobs),
        tuple(offset for part in parts for offset in part.text_offset),
    )


class Assembler:
    """Makes pieces of the bytes of a stream, and at the end the whole answer."""

    def __init__(self) -> None:
        self._parser = SSEParser()
        self._choices: dict[int, _ChoiceSoFar] = {}
        self._end: StreamEnd | None = None
        self.done = False

    def feed(self, chunk: bytes) -> Iterator[Piece]:
        """The pieces that `chunk` completes.

        Raises:
            StreamError: the server reports a failure, or sends something else than a stream of an answer.
        """
        try:
            for event in self._parser.feed(chunk):
                yield from self._take(event.data)
        except (InvalidResponseError, ValueError) as error:
            raise StreamError(ErrorDetail(str(error), code="invalid_stream")) from error

    def _take(self, data: str) -> Iterator[Piece]:
        if self.done:
            return
        if data == _END_OF_ANSWER:
            self.done = True
            return
        event = stream_event(data)
        if isinstance(event, ErrorDetail):
            raise StreamError(event)
        if isinstance(event, Piece):
            self._choices.setdefault(event.index, _ChoiceSoFar()).add(event)
            yield event
        else:
            self._end = event

    def text(self, index: int) -> str:
        """The text of one choice so far."""
        choice = self._choices.get(index)
        return "".join(choice.texts) if choice else ""

    def result(self) -> Generation:
        """The whole answer.

        Raises:
            StreamError: the stream stopped before its end.
        """
        if self._end is None or not self._choices:
            raise StreamError(
                ErrorDetail("the stream stopped before the answer was complete", code="connection_lost")
            )
        try:
            choices = tuple(self._choices[index].complete(index) for index in sorted(self._choices))
        except InvalidResponseError as error:
            raise StreamError(ErrorDetail(str(error), code="invalid_stream")) from error
        end = self._end
        return Generation(end.id, choices, end.adapter, end.usage, end.timing)


def broken(error: OneBaseError) -> StreamError:
    """The error of a stream whose connection failed with `error`."""
    code = "timeout" if isinstance(error, APITimeoutError) else "connection_lost"
    return StreamError(ErrorDetail(error.message, code=code))


class AnswerView:
    """A streamed answer: what has come so far, and the whole in the end."""

    def __init__(self) -> None:
        self._assembler = Assembler()
        self._result: Generation | None = None

    @property
    def text(self) -> str:
        """The text of the first choice so far, also after a failure or an early end."""
        return self._assembler.text(0)

    @property
    def result(self) -> Generation:
        """The complete answer, with usage and timing.

        Raises:
            RuntimeError: the stream has not been read to its end.
        """
        if self._result is None:
            raise RuntimeError("the stream has not been read to its end: iterate over it, or call read()")
        return self._result


# ---- the events of a job -----------------------------------------------------------------------------


class EventPosition:
    """How far a stream of a job's events is: which event came last, and how often it broke since.

    Args:
        after: The id of the event after which the stream begins, or None.
        known: Whether the server has already reported the job, so that a failed first attempt is repeated.
    """

    def __init__(self, job_id: str, after: str | None, known: bool) -> None:
        self.last_id = after
        self.job: TrainingJobInfo | None = None
        self._job_id = job_id
        self._known = known
        self._backoff = Backoff()
        self._parser = SSEParser()

    @property
    def done(self) -> bool:
        return self.job is not None

    def call(self) -> Call:
        return training.stream_events(self._job_id, self.last_id)

    def begin(self) -> None:
        """There is a connection. An event that the connection before left unfinished comes again."""
        self._known = True
        self._parser = SSEParser()

    def feed(self, chunk: bytes) -> Iterator[TrainingEvent]:
        """The events that `chunk` completes.

        Raises:
            InvalidResponseError: these are not the events of a job.
        """
        try:
            events = self._parser.feed(chunk)
        except ValueError as error:
            raise InvalidResponseError(str(error)) from error
        for event in events:
            yield from self._take(event)

    def _take(self, event: ServerEvent) -> Iterator[TrainingEvent]:
        if self.done:
            return
        content = event.data.encode()
        if event.name == _END_OF_JOB:
            self.job = parse(content, training.parse_job)
            return
        found = parse(content, training.parse_event)
        if found.id == self.last_id:
            return
        # Set before the event is handed out: a reader who stops there has had it.
        self.last_id = found.id
        self._backoff.reset()
        yield found

    def silent(self) -> None:
        """The read timeout passed without an event: the job is quiet, but the server is there."""
        self._backoff.reset()

    def delay(self, error: OneBaseError | None) -> float:
        """Seconds until the next attempt, after `error` or a stream that ended too early.

        Raises:
            OneBaseError: another attempt cannot help, or there were enough.
        """
        if error is not None and not self._known:
            raise error
        return self._backoff.delay(error, self.call())


class EventsView:
    """A stream of a job's events: how far it is."""

    def __init__(self, job_id: str, after: str | None, known: bool) -> None:
        self._position = EventPosition(job_id, after, known)

    @property
    def last_id(self) -> str | None:
        """The id of the newest event that was handed out. Another stream can begin `after` it."""
        return self._position.last_id

    @property
    def job(self) -> TrainingJobInfo | None:
        """The job as it ended. None until the stream has been read to its end."""
        return self._position.job
