"""A form with files that are read from disk as it is sent: its length is known, its content not in memory."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

import anyio.to_thread

CHUNK_BYTES: Final = 256 * 1024

Sent: TypeAlias = Callable[[int, int], object]
"""Called with the bytes that were taken so far and the bytes of the whole form."""


@dataclass(frozen=True)
class Multipart:
    """A `multipart/form-data` body (RFC 7578): text fields first, then each file under one field's name.

    The files are opened anew for each attempt to send it, so it can be sent again.
    """

    fields: Sequence[tuple[str, str]]
    files_field: str
    files: Sequence[Path]
    on_sent: Sent | None = None
    boundary: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def content_type(self) -> str:
        """The value of the header Content-Type."""
        return f"multipart/form-data; boundary={self.boundary}"

    @contextmanager
    def opened(self) -> Iterator[OpenForm]:
        """The form with its files open; they are closed at the end of the block.

        Raises:
            OSError: a file cannot be opened.
        """
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("rb")) for path in self.files]
            yield OpenForm(self, files)


class OpenForm:
    """One attempt to send a form: `length` in bytes, and its chunks, which can be taken once."""

    def __init__(self, form: Multipart, files: Sequence[BinaryIO]) -> None:
        self._form = form
        self._parts = [(_file_header(form, file), file, _size(file)) for file in files]
        self._start = b"".join(_field(form.boundary, name, value) for name, value in form.fields)
        self._end = f"--{form.boundary}--\r\n".encode()
        inside = sum(len(header) + size + 2 for header, _, size in self._parts)
        self.length = len(self._start) + inside + len(self._end)
        self._taken = 0

    def chunks(self) -> Iterator[bytes]:
        """The form, piece by piece.

        Raises:
            OSError, ValueError: a file cannot be read, or is shorter than it was.
        """
        for chunk in self._chunks():
            yield chunk
            self._report(chunk)

    def achunks(self) -> AsyncIterator[bytes]:
        """As `chunks`; the disk is read in another thread."""
        return _AsyncChunks(self._chunks(), self._report)

    def _chunks(self) -> Iterator[bytes]:
        yield self._start
        for header, file, size in self._parts:
            yield header
            yield from _content(file, size)
            yield b"\r\n"
        yield self._end

    def _report(self, chunk: bytes) -> None:
        self._taken += len(chunk)
        if self._form.on_sent is not None:
            self._form.on_sent(self._taken, self.length)


class _AsyncChunks:
    """A class, not an asynchronous generator: one that is left half-read needs no closing."""

    def __init__(self, chunks: Iterator[bytes], report: Callable[[bytes], None]) -> None:
        self._chunks = chunks
        self._report = report
        self._last: bytes | None = None

    def __aiter__(self) -> _AsyncChunks:
        return self

    async def __anext__(self) -> bytes:
        if self._last is not None:
            self._report(self._last)
        self._last = await anyio.to_thread.run_sync(next, self._chunks, None)
        if self._last is None:
            raise StopAsyncIteration
        return self._last


def _field(boundary: str, name: str, value: str) -> bytes:
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
    return f"{head}{value}\r\n".encode()


def _file_header(form: Multipart, file: BinaryIO) -> bytes:
    disposition = f'form-data; name="{form.files_field}"; filename="{_quoted(Path(file.name).name)}"'
    kind = "Content-Type: application/octet-stream"
    return f"--{form.boundary}\r\nContent-Disposition: {disposition}\r\n{kind}\r\n\r\n".encode()


def _quoted(filename: str) -> str:
    """As forms write a name that could end its quotes, or the header."""
    return filename.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


def _size(file: BinaryIO) -> int:
    size = file.seek(0, 2)
    file.seek(0)
    return size


def _content(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Exactly `size` bytes of the file: what was announced must come, no less and no more."""
    left = size
    while left:
        chunk = file.read(min(left, CHUNK_BYTES))
        if not chunk:
            raise ValueError(f"{file.name} became shorter while it was sent: send it when it is complete")
        left -= len(chunk)
        yield chunk
