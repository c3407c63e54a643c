"""multipart/form-data, taken piece by piece: files go straight to disk, never whole into memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from onebase_server.background import Threads
from onebase_server.errors import ClientGoneError, InvalidRequestError, PayloadTooLargeError

MAX_FIELD_BYTES = 1000
MAX_PARTS = 8
MAX_HEADERS = 8
MAX_HEADER_BYTES = 4096
_FORM = b"multipart/form-data"
_BATCH_BYTES = 1 << 20
"""Read before a thread parses and writes it."""

Result = TypeVar("Result", covariant=True)
Write = Callable[[memoryview], None]


class FormReader(ABC, Generic[Result]):
    """Takes the body's pieces, in any number. For one thread at a time.

    Raises InvalidRequestError or PayloadTooLargeError as soon as something is wrong, and what writing the
    files raises. `close` in any case.

    Args:
        limit: bytes of the whole body; `option`: the server's option that sets it.
        how: one sentence that says what the form holds; ends every complaint.
    """

    def __init__(self, boundary: bytes, *, limit: int, option: str, how: str) -> None:
        self.fields: dict[str, bytes] = {}
        self._limit = limit
        self._option = option
        self._how = how
        self._size = 0
        self._parts = 0
        self._header: list[bytearray] = []
        self._write: Write = lambda data: None
        self._complete = False
        try:
            self._parser = MultipartParser(
                boundary, self._callbacks(), max_header_count=MAX_HEADERS, max_header_size=MAX_HEADER_BYTES
            )
        except FormParserError as error:
            raise self.malformed(str(error)) from error

    @abstractmethod
    def begin_part(self, field: str, filename: str | None) -> Write | None:
        """What takes the part's content: a file's writer or `plain_field(field)`; None: no such field."""

    @abstractmethod
    def result(self) -> Result:
        """What has come. Raises InvalidRequestError when something is missing."""

    @abstractmethod
    def close(self) -> None:
        """Remove what was not committed."""

    def feed(self, data: bytes) -> None:
        """The next piece of the body."""
        self._size += len(data)
        if self._size > self._limit:
            raise PayloadTooLargeError(self._limit, self._option)
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise self.malformed(str(error)) from error

    def finish(self) -> Result:
        """After the last piece. Raises InvalidRequestError."""
        if not self._complete:
            raise self.malformed("it ends before its last boundary")
        return self.result()

    def plain_field(self, field: str) -> Write:
        """Keeps a short field in `fields`."""
        if field in self.fields:
            raise InvalidRequestError(f"{field}: it is given twice. Give it once.", param=field)
        self.fields[field] = b""

        def write(data: memoryview) -> None:
            if len(self.fields[field]) + len(data) > MAX_FIELD_BYTES:
                raise InvalidRequestError(
                    f"{field}: it is over {MAX_FIELD_BYTES} bytes. Send less.", param=field
                )
            self.fields[field] += data

        return write

    def text(self, field: str) -> str:
        """A field as text. Raises InvalidRequestError when it is missing or is not UTF-8."""
        if field not in self.fields:
            raise InvalidRequestError(f"{field}: it is missing. {self._how}", param=field)
        try:
            return self.fields[field].decode()
        except UnicodeDecodeError as error:
            raise InvalidRequestError(f"{field}: it is not UTF-8.", param=field) from error

    def malformed(self, reason: str) -> InvalidRequestError:
        """The body cannot be read."""
        return malformed(f"{reason}. {self._how}")

    # ---- the parser's events -----------------------------------------------------------------

    def _callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin_part,
            "on_header_begin": lambda: self._header.extend((bytearray(), bytearray())),
            "on_header_field": lambda data, start, end: self._header[-2].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[-1].extend(data[start:end]),
            "on_headers_finished": self._begin_data,
            "on_part_data": lambda data, start, end: self._write(memoryview(data)[start:end]),
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise self.malformed(f"it has more than {MAX_PARTS} parts")
        self._header = []

    def _begin_data(self) -> None:
        pairs = zip(self._header[::2], self._header[1::2], strict=True)
        headers = {bytes(name).lower(): bytes(value) for name, value in pairs}
        kind, options = parse_options_header(headers.get(b"content-disposition", b"").decode("latin-1"))
        field = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or not field:
            raise self.malformed("a part has no Content-Disposition: form-data with a name")
        filename = options.get(b"filename")
        write = self.begin_part(field, None if filename is None else filename.decode("utf-8", "replace"))
        if write is None:
            raise InvalidRequestError(
                f"{field[:80]}: an upload has no such field. {self._how}", param=field[:80]
            )
        self._write = write

    def _end(self) -> None:
        self._complete = True


def is_form(content_type: bytes) -> bool:
    """Whether a body of this Content-Type is read as multipart/form-data."""
    return parse_options_header(content_type)[0] == _FORM


def boundary_of(request: Request, how: str = "") -> bytes | None:
    """The boundary of a multipart body; None when the body is something else. Raises InvalidRequestError."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != _FORM:
        return None
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise malformed(f"its Content-Type names no boundary. {how}")
    return boundary


def check_length(request: Request, limit: int, option: str) -> None:
    """Refuse a body by its announced length. Raises PayloadTooLargeError."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise PayloadTooLargeError(limit, option)


async def read_form(request: Request, form: FormReader[Result], threads: Threads) -> Result:
    """Feed the request's body to the form, a piece at a time, in threads.

    Raises ClientGoneError, and what the form raises.
    """
    batch = bytearray()
    try:
        async for chunk in request.stream():
            batch += chunk
            if len(batch) >= _BATCH_BYTES:
                await threads.run(form.feed, bytes(batch))
                batch.clear()
    except ClientDisconnect as error:
        raise ClientGoneError from error
    await threads.run(form.feed, bytes(batch))
    return form.finish()


def malformed(reason: str) -> InvalidRequestError:
    """A multipart body that cannot be read."""
    return InvalidRequestError(
        f"The multipart body cannot be read: {reason}".rstrip(), code="invalid_multipart"
    )
