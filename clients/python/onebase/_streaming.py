"""Streams of pieces. What arrives is understood in one place; two thin classes read the network."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from contextlib import aclosing
from types import TracebackType

from . import _parse
from ._http import AsyncResponse, Response
from ._sse import SSEParser
from .errors import (
    APIConnectionError,
    APITimeoutError,
    ErrorDetail,
    InvalidResponseError,
    OneBaseError,
    StreamError,
)
from .types import Choice, Generation, Logprobs, Piece

_DONE = "[DONE]"


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
    """Bytes of a stream in, pieces out, and at the end the whole answer."""

    def __init__(self) -> None:
        self._parser = SSEParser()
        self._choices: dict[int, _ChoiceSoFar] = {}
        self._end: _parse.StreamEnd | None = None
        self.done = False

    def feed(self, chunk: bytes) -> Iterator[Piece]:
        """The pieces that `chunk` completes.

        Raises:
            StreamError: the server reports a failure, or sends what is no event of a stream.
        """
        try:
            for data in self._parser.feed(chunk):
                yield from self._event(data)
        except (InvalidResponseError, ValueError) as error:
            raise StreamError(ErrorDetail(str(error), code="invalid_stream")) from error

    def _event(self, data: str) -> Iterator[Piece]:
        if self.done:
            return
        if data == _DONE:
            self.done = True
            return
        event = _parse.stream_event(data)
        if isinstance(event, ErrorDetail):
            raise StreamError(event)
        if isinstance(event, Piece):
            self._choices.setdefault(event.index, _ChoiceSoFar()).add(event)
            yield event
        else:
            self._end = event

    def text(self, index: int) -> str:
        """What came so far of one choice."""
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


def _broken(error: OneBaseError) -> StreamError:
    code = "timeout" if isinstance(error, APITimeoutError) else "connection_lost"
    return StreamError(ErrorDetail(error.message, code=code))


class _BaseStream:
    """What Stream and AsyncStream share: the answer so far and the answer in the end."""

    def __init__(self) -> None:
        self._assembler = Assembler()
        self._result: Generation | None = None

    @property
    def text(self) -> str:
        """What has come so far of the first choice, also after a failure or an early end."""
        return self._assembler.text(0)

    @property
    def result(self) -> Generation:
        """The complete answer, with usage and timing, once the stream has been read to its end.

        Raises:
            RuntimeError: it has not.
        """
        if self._result is None:
            raise RuntimeError("the stream has not been read to its end: iterate over it, or call read()")
        return self._result


class Stream(_BaseStream):
    """An answer as it is written: `with client.stream(...) as stream: for piece in stream: ...`

    Leaving the `with` block closes the connection, and so ends the request on the server too if the
    answer was not complete.
    """

    def __init__(self, connect: Callable[[], Response]) -> None:
        super().__init__()
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
        """Read what is left, and give the complete answer.

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
            for chunk in response.chunks():
                yield from self._assembler.feed(chunk)
        except (APIConnectionError, APITimeoutError, InvalidResponseError) as error:
            if not self._assembler.done:
                raise _broken(error) from error
        finally:
            response.close()
        self._result = self._assembler.result()


class AsyncStream(_BaseStream):
    """As Stream: `async with client.stream(...) as stream: async for piece in stream: ...`"""

    def __init__(self, connect: Callable[[], Awaitable[AsyncResponse]]) -> None:
        super().__init__()
        self._connect = connect
        self._response: AsyncResponse | None = None
        self._pieces: AsyncGenerator[Piece, None] | None = None

    async def __aenter__(self) -> AsyncStream:
        if self._response is not None:
            raise RuntimeError("a stream can be entered once: call stream() again for another answer")
        self._response = await self._connect()
        self._pieces = self._read(self._response)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> AsyncGenerator[Piece, None]:
        if self._pieces is None:
            raise RuntimeError("open the stream first: `async with client.stream(...) as stream:`")
        return self._pieces

    async def read(self) -> Generation:
        """As Stream.read."""
        async for _ in self:
            pass
        return self.result

    async def close(self) -> None:
        """End the stream. Safe to call twice."""
        if self._pieces is not None:
            await self._pieces.aclose()
        if self._response is not None:
            await self._response.close()

    async def _read(self, response: AsyncResponse) -> AsyncGenerator[Piece, None]:
        try:
            async with aclosing(response.chunks()) as chunks:
                async for chunk in chunks:
                    for piece in self._assembler.feed(chunk):
                        yield piece
        except (APIConnectionError, APITimeoutError, InvalidResponseError) as error:
            if not self._assembler.done:
                raise _broken(error) from error
        finally:
            await response.close()
        self._result = self._assembler.result()
