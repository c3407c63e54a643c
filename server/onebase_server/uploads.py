"""Two files and some fields as multipart/form-data, straight into the store: never whole in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from onebase_adapters.content import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE, VersionFiles
from onebase_adapters.store import BlobWriter, Store
from onebase_server.background import Threads
from onebase_server.errors import ClientGoneError, InvalidRequestError, PayloadTooLargeError
from onebase_server.settings import SettingsError, parse_bool

MAX_CONFIG_BYTES = 1 << 20
MAX_FIELD_BYTES = 1000
MAX_PARTS = 8
MAX_HEADERS = 8
MAX_HEADER_BYTES = 4096
FLAGS = ("activate", "allow_noop", "any_base")
_FILES_FIELD = "files"
_BATCH_BYTES = 1 << 20
"""Read before a thread parses, hashes and writes it."""
_HOW = (
    f"Send a field name and two parts called {_FILES_FIELD}, with file names {' and '.join(ADAPTER_FILES)}."
)


@dataclass(frozen=True)
class Upload:
    """What one upload brought: the fields, the config as it was sent, and the blobs once committed."""

    name: str
    flags: dict[str, bool]
    config: bytes
    commit: Callable[[], VersionFiles]
    """Makes the files part of the store; call it in a thread. Raises StoreFullError, StoreError."""


class Form:
    """Takes the body's pieces, in any number, and writes both files as they come. For one thread at a time.

    Raises InvalidRequestError or PayloadTooLargeError as soon as something is wrong, StoreFullError,
    StoreError. `close` in any case: what was not committed is gone then.
    """

    def __init__(self, store: Store, boundary: bytes, limit: int) -> None:
        self._store = store
        self._limit = limit
        self._size = 0
        self._parts = 0
        self._fields: dict[str, bytes] = {}
        self._config = bytearray()
        self._writers: dict[str, BlobWriter] = {}
        self._header: list[bytearray] = []
        self._disposition: bytes | None = None
        self._write: Callable[[memoryview], None] = lambda data: None
        self._complete = False
        try:
            self._parser = MultipartParser(
                boundary, self._callbacks(), max_header_count=MAX_HEADERS, max_header_size=MAX_HEADER_BYTES
            )
        except FormParserError as error:
            raise _malformed(str(error)) from error

    def feed(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._limit:
            raise PayloadTooLargeError(self._limit, "--max-upload")
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _malformed(str(error)) from error

    def finish(self) -> Upload:
        """What has come. Raises InvalidRequestError when something is missing."""
        if not self._complete:
            raise _malformed("it ends before its last boundary")
        missing = [name for name in ADAPTER_FILES if name not in self._writers]
        if missing:
            raise InvalidRequestError(f"files: {missing[0]} is missing. {_HOW}", param=_FILES_FIELD)
        if "name" not in self._fields:
            raise InvalidRequestError(f"name: it is missing. {_HOW}", param="name")
        flags = {flag: _flag(flag, self._fields[flag]) for flag in FLAGS if flag in self._fields}
        return Upload(_text("name", self._fields["name"]), flags, bytes(self._config), self._commit)

    def close(self) -> None:
        """Remove what was not committed."""
        for writer in self._writers.values():
            writer.abort()

    def _commit(self) -> VersionFiles:
        config, weights = (self._writers[name].commit() for name in ADAPTER_FILES)
        return VersionFiles(config, weights)

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
            raise _malformed(f"it has more than {MAX_PARTS} parts")
        self._header = []

    def _begin_data(self) -> None:
        pairs = zip(self._header[::2], self._header[1::2], strict=True)
        headers = {bytes(name).lower(): bytes(value) for name, value in pairs}
        kind, options = parse_options_header(headers.get(b"content-disposition", b"").decode("latin-1"))
        field = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or not field:
            raise _malformed("a part has no Content-Disposition: form-data with a name")
        if field == _FILES_FIELD:
            self._begin_file(options.get(b"filename"))
        elif field == "name" or field in FLAGS:
            self._begin_field(field)
        else:
            raise InvalidRequestError(f"{field[:80]}: an upload has no such field. {_HOW}", param=field[:80])

    def _begin_field(self, field: str) -> None:
        if field in self._fields:
            raise InvalidRequestError(f"{field}: it is given twice. Give it once.", param=field)
        self._fields[field] = b""

        def write(data: memoryview) -> None:
            if len(self._fields[field]) + len(data) > MAX_FIELD_BYTES:
                raise InvalidRequestError(
                    f"{field}: it is over {MAX_FIELD_BYTES} bytes. Send less.", param=field
                )
            self._fields[field] += data

        self._write = write

    def _begin_file(self, filename: bytes | None) -> None:
        name = (filename or b"").decode("utf-8", "replace")
        if name not in ADAPTER_FILES:
            raise InvalidRequestError(
                f"files: {name[:80]!r} is not one of the two files of an adapter. {_HOW}", param=_FILES_FIELD
            )
        if name in self._writers:
            raise InvalidRequestError(f"files: {name} is there twice. Send it once.", param=_FILES_FIELD)
        writer = self._writers[name] = self._store.writer()
        self._write = writer.write if name == WEIGHTS_FILE else self._write_config

    def _write_config(self, data: memoryview) -> None:
        if len(self._config) + len(data) > MAX_CONFIG_BYTES:
            raise InvalidRequestError(
                f"files: {CONFIG_FILE} is over {MAX_CONFIG_BYTES} bytes, which no PEFT config is.",
                param=_FILES_FIELD,
            )
        self._config += data
        self._writers[CONFIG_FILE].write(data)

    def _end(self) -> None:
        self._complete = True


def boundary_of(request: Request) -> bytes | None:
    """The boundary of a multipart body; None when the body is something else. Raises InvalidRequestError."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        return None
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise _malformed("its Content-Type names no boundary")
    return boundary


async def read_form(request: Request, form: Form, threads: Threads) -> Upload:
    """Feed the request's body to the form, a piece at a time, in threads.

    Raises ClientGoneError, and what Form raises.
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


def _text(field: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{field}: it is not UTF-8.", param=field) from error


def _flag(field: str, value: bytes) -> bool:
    try:
        return parse_bool(_text(field, value))
    except SettingsError as error:
        raise InvalidRequestError(f"{field}: {error}.", param=field) from error


def _malformed(reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The multipart body cannot be read: {reason}. {_HOW}", code="invalid_multipart"
    )
