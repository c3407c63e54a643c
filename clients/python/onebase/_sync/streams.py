# Generated from _async/streams.py by tools/generate_sync.py; do not edit.
"""Streams over a connection: an answer piece by piece, and the events of a job."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from types import TracebackType

from .._core.requests import Call
from .._core.streams import AnswerView, EventsView, broken
from ..errors import APIConnectionError, APIStatusError, APITimeoutError, InvalidResponseError, OneBaseError
from ..training_types import TrainingEvent
from ..types import Generation, Piece
from .http import Response


class Stream(AnswerView):
    """An answer as it is written: `with client.stream(...) as stream: for piece in stream: ...`

    Leaving the `with` block closes the connection. If the answer was not complete, that also ends the
    request on the server.
    """

    def __init__(self, connect: Callable[[], Response], schema: object = None) -> None:
        super().__init__(schema)
        self._connect = connect
        self._response: Response | None = None
        self._pieces: Generator[Piece, None, None] | None = None

    def __enter__(self) -> Stream:
        if self._response is not None:
            raise RuntimeError("a stream can be entered once: call stream() again for another answer")
        self._response = self._connect()
        self._pieces = self._read(self._response)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Piece]:
        if self._pieces is None:
            raise RuntimeError("open the stream first: `with client.stream(...) as stream:`")
        return self._pieces

    def read(self) -> Generation:
        """Read the rest, and give the complete answer.

        Raises:
            StreamError: the stream failed.
        """
        for _ in self:
            pass
        return self.result

    def close(self) -> None:
        """End the stream. Safe to call twice."""
        if self._pieces is not None:
            self._pieces.close()
        if self._response is not None:
            self._response.close()

    def _read(self, response: Response) -> Generator[Piece, None, None]:
        # Read past [DONE] to the end of the body: only then can the connection be used again.
        try:
            with closing(response.events()) as events:
                for event in events:
                    piece = self._assembler.read_piece(event.data)
                    if piece is not None:
                        yield piece
        except (APIConnectionError, APITimeoutError, InvalidResponseError) as error:
            if not self._assembler.done:
                raise broken(error) from error
        finally:
            response.close()
        self._result = replace(self._assembler.result(), schema=self._schema)


class EventStream(EventsView):
    """A job's events as they happen, the oldest first: `for event in job.stream_events(): ...`

    It ends with the job. While the job is paused, nothing comes. A connection that breaks is made again after
    the last event, for about a minute of failed attempts: no event is lost and none comes twice. To end it
    earlier, leave its `with` block or call `close`.

    Raises, while iterating: OneBaseError, see `onebase.errors`.
    """

    def __init__(
        self,
        open: Callable[[Call], Response],
        job_id: str,
        after: str | None,
        *,
        known: bool = False,
    ) -> None:
        super().__init__(job_id, after, known)
        self._open = open
        self._events = self._read()

    def __iter__(self) -> Iterator[TrainingEvent]:
        return self._events

    def __next__(self) -> TrainingEvent:
        return next(self._events)

    def __enter__(self) -> EventStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the stream. The job continues. Safe to call twice."""
        self._events.close()

    def _read(self) -> Generator[TrainingEvent, None, None]:
        position = self._position
        while not position.done:
            lost: OneBaseError | None = None
            try:
                with closing(self._connected()) as events:
                    for event in events:
                        yield event
            except (APIConnectionError, APITimeoutError, APIStatusError) as error:
                lost = error
            if not position.done:
                time.sleep(position.delay(lost))

    def _connected(self) -> Generator[TrainingEvent, None, None]:
        """Yield the events of one connection."""
        response = self._open(self._position.call())
        try:
            self._position.begin()
            with closing(response.events()) as events:
                for event in events:
                    found = self._position.read_event(event.event, event.data)
                    if found is not None:
                        yield found
                    if self._position.done:
                        return
        except APITimeoutError:
            self._position.silent()
            raise
        finally:
            response.close()
