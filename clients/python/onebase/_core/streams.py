"""Streams: events of a server become an answer, or the events of a job."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Final

from msgspec.structs import astuple

from onebase_protocol.text import GenerationEnd

from ..errors import APITimeoutError, ErrorDetail, InvalidResponseError, OneBaseError, StreamError
from ..training_types import TrainingEvent, TrainingJobInfo
from ..types import Choice, Generation, Logprobs, Piece, ToolCall
from . import training
from .parse import adapter_used, decode, stream_event
from .requests import Call
from .retry import ReconnectBackoff

_END_OF_ANSWER: Final = "[DONE]"
_END_OF_JOB: Final = "done"

# ---- an answer ---------------------------------------------------------------------------------------


class _ChoiceSoFar:
    """One choice as it grows."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.thoughts: list[str] = []
        self.logprobs: list[Logprobs] = []
        self.finish_reason: str | None = None
        self.calls: list[ToolCall] = []

    def add(self, piece: Piece) -> None:
        self.texts.append(piece.text)
        self.thoughts.append(piece.reasoning)
        if piece.logprobs is not None:
            self.logprobs.append(piece.logprobs)
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason
        for part in piece.tool_calls:
            if part.id is not None and part.name is not None:
                self.calls.append(ToolCall(part.id, part.name, ""))
            if part.index >= len(self.calls):
                raise InvalidResponseError(
                    f"the stream continues with call {part.index}, which did not begin"
                )
            call = self.calls[part.index]
            self.calls[part.index] = replace(call, arguments=call.arguments + part.arguments)

    def complete(self, index: int) -> Choice:
        if self.finish_reason is None:
            raise InvalidResponseError(f"the stream ended without the end of choice {index}")
        logprobs = _joined(self.logprobs)
        text, thought = "".join(self.texts), "".join(self.thoughts)
        return Choice(index, text, self.finish_reason, logprobs, tuple(self.calls), thought)


def _joined(parts: list[Logprobs]) -> Logprobs | None:
    if not parts:
        return None
    return Logprobs(*(tuple(chain.from_iterable(lists)) for lists in zip(*map(astuple, parts), strict=True)))


class Assembler:
    """Makes pieces of the events of a stream, and at the end the whole answer."""

    def __init__(self) -> None:
        self._choices: dict[int, _ChoiceSoFar] = {}
        self._end: GenerationEnd | None = None
        self.done = False

    def read_piece(self, data: str) -> Piece | None:
        """Return the piece in an event, or None.

        Raises:
            StreamError: the server reports a failure, or sends something else than a stream of an answer.
        """
        if self.done:
            return None
        if data == _END_OF_ANSWER:
            self.done = True
            return None
        try:
            event = stream_event(data)
        except InvalidResponseError as error:
            raise StreamError(ErrorDetail(str(error), code="invalid_stream")) from error
        if isinstance(event, ErrorDetail):
            raise StreamError(event)
        if isinstance(event, GenerationEnd):
            self._end = event
            return None
        try:
            self._choices.setdefault(event.index, _ChoiceSoFar()).add(event)
        except InvalidResponseError as error:
            raise StreamError(ErrorDetail(str(error), code="invalid_stream")) from error
        return event

    def text(self, index: int) -> str:
        """Return the text of one choice so far."""
        choice = self._choices.get(index)
        return "".join(choice.texts) if choice else ""

    def result(self) -> Generation:
        """Return the whole answer.

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
        return Generation(end.id, choices, adapter_used(end), end.usage, end.timing)


def broken(error: OneBaseError) -> StreamError:
    """Return the error of a stream that failed with `error` after it had begun."""
    code = "timeout" if isinstance(error, APITimeoutError) else "connection_lost"
    if isinstance(error, InvalidResponseError):
        code = "invalid_stream"
    return StreamError(ErrorDetail(error.message, code=code))


class AnswerView:
    """A streamed answer: what has come so far, and the whole in the end."""

    def __init__(self, schema: object = None) -> None:
        self._schema = schema
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
    """Position in a stream of a job's events: the last event, and how often the stream broke since.

    Args:
        after: The id of the event after which the stream begins, or None.
        known: Whether the server has already reported the job, so that a failed first attempt is repeated.
    """

    def __init__(self, job_id: str, after: str | None, known: bool) -> None:
        self.last_id = after
        self.job: TrainingJobInfo | None = None
        self._job_id = job_id
        self._known = known
        self._backoff = ReconnectBackoff()

    @property
    def done(self) -> bool:
        return self.job is not None

    def call(self) -> Call:
        return training.stream_events(self._job_id, self.last_id)

    def begin(self) -> None:
        """Record that the server has answered."""
        self._known = True

    def read_event(self, name: str, data: str) -> TrainingEvent | None:
        """Return the event of the job in an event of this name, or None if there is no new one.

        Raises:
            InvalidResponseError: this is not an event of a job.
        """
        if name == _END_OF_JOB:
            self.job = decode(data, TrainingJobInfo)
            return None
        found = decode(data, TrainingEvent)
        if found.id == self.last_id:
            return None
        # Set before the event is handed out: a reader who stops there has had it.
        self.last_id = found.id
        self._backoff.reset()
        return found

    def silent(self) -> None:
        """Record that the read timeout passed without an event: the job is quiet, but the server is there."""
        self._backoff.reset()

    def delay(self, error: OneBaseError | None) -> float:
        """Return the seconds until the next attempt, after `error` or a stream that ended too early.

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
