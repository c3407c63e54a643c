"""Results of a batch so far, on the disk of its server: each row once, whatever is killed in between.

Two files, `output.jsonl` and `errors.jsonl`, to which answers are appended and synced in groups. A row
counts once its group is on the disk. What a kill, a power cut or a full disk leaves of a group is cut off
again: at the next start all that follows the last whole record, after a failed write all that it wrote.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from onebase_adapters.store.atomic_files import sync

OUTPUT, ERRORS = "output.jsonl", "errors.jsonl"
EXPIRED = "batch_expired"
"""Code of the rows that were left when the time was over."""


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    input_tokens_details: _Details | None = None


class _Body(msgspec.Struct):
    usage: _Usage | None = None


class _Response(msgspec.Struct):
    status_code: int
    body: msgspec.Raw


class _Error(msgspec.Struct):
    code: str


class _Record(msgspec.Struct):
    """Fields of a record that are read again; the rest is for those who download it."""

    id: str
    response: _Response | None = None
    error: _Error | None = None


_decoder = msgspec.json.Decoder(_Record)
_body_decoder = msgspec.json.Decoder(_Body)


@dataclass(frozen=True)
class Result:
    """Record of one row. number: the row's, from 0. ok: whether it is an answer, and no error."""

    number: int
    ok: bool
    record: bytes


def answered(batch_id: str, number: int, custom_id: str, status: int, request_id: str, body: bytes) -> Result:
    """Return the record of a row that a route has answered. body: JSON on one line.

    Raises ValueError, RecursionError: it is something else, and could not be read again.
    """
    head = {"id": record_id(batch_id, number), "custom_id": custom_id}
    response = {"status_code": status, "request_id": request_id, "body": msgspec.Raw(body)}
    record = msgspec.json.encode({**head, "response": response, "error": None})
    _decoder.decode(record)
    if b"\n" in record:
        raise ValueError(f"the answer to row {number} is not on one line")
    return Result(number, status < 400, record + b"\n")


def unanswered(batch_id: str, number: int, custom_id: str, code: str, message: str) -> Result:
    """Return the record of a row that no route was asked for."""
    head = {"id": record_id(batch_id, number), "custom_id": custom_id}
    record = {**head, "response": None, "error": {"code": code, "message": message}}
    return Result(number, False, msgspec.json.encode(record) + b"\n")


def record_id(batch_id: str, number: int) -> str:
    return f"batch_req_{batch_id.removeprefix('batch_')}_{number:06d}"


class Results:
    """The two files of a batch of `rows` rows. All methods block. One thread at a time. Raises OSError."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.completed = self.failed = 0
        self.expired = False
        """Whether the time was over before all rows had their turn."""
        self.usage = {"prompt": 0, "cached": 0, "completion": 0}
        self._done = bytearray(rows)
        self._files: dict[bool, BinaryIO] = {}
        self._sizes: dict[bool, int] = {}
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            for ok, name in ((True, OUTPUT), (False, ERRORS)):
                self._files[ok] = (folder / name).open("a+b", buffering=0)
                self._sizes[ok] = self._recover(ok, folder / name)
            sync(folder)
            sync(folder.parent)
        except BaseException:
            self.close()
            raise

    def is_done(self, number: int) -> bool:
        return bool(self._done[number])

    def left(self) -> Iterator[int]:
        """Return the rows that have no record, in order."""
        return (number for number, done in enumerate(self._done) if not done)

    def append(self, results: Sequence[Result]) -> None:
        """Write a group of records, of rows that have none: all of them are on the disk when this returns.

        Raises OSError: none of them is kept, and the same call may be made again.
        """
        written = {ok: b"".join(result.record for result in results if result.ok is ok) for ok in self._files}
        for ok, file in self._files.items():
            if os.fstat(file.fileno()).st_size != self._sizes[ok]:  # of a failed call, which could not cut it
                os.ftruncate(file.fileno(), self._sizes[ok])
        try:
            for ok, data in written.items():
                if data:
                    _write(self._files[ok], data)
                    os.fsync(self._files[ok].fileno())
        except OSError:
            for ok, file in self._files.items():
                with suppress(OSError):
                    os.ftruncate(file.fileno(), self._sizes[ok])
            raise
        for ok, data in written.items():
            self._sizes[ok] += len(data)
        for result in results:
            self._count(result.number, result.ok, _decoder.decode(result.record))

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _recover(self, ok: bool, path: Path) -> int:
        """Count the records of a file, and cut off what is not whole. Returns its size."""
        size = 0
        with path.open("rb") as file:
            for line in file:
                number = self._number(line)
                if number is None:
                    break
                self._count(number, ok, _decoder.decode(line))
                size += len(line)
        handle = self._files[ok].fileno()
        if os.fstat(handle).st_size != size:
            os.ftruncate(handle, size)
            os.fsync(handle)
        return size

    def _number(self, line: bytes) -> int | None:
        """Return the number of the row whose record a line is, or None for an incomplete record."""
        if not line.endswith(b"}\n"):
            return None
        try:
            digits = _decoder.decode(line).id.rpartition("_")[2]
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        number = int(digits) if digits.isdecimal() and len(digits) < 10 else -1
        return number if 0 <= number < len(self._done) and not self._done[number] else None

    def _count(self, number: int, ok: bool, record: _Record) -> None:
        self._done[number] = True
        self.completed += ok
        self.failed += not ok
        self.expired |= record.error is not None and record.error.code == EXPIRED
        used = None if record.response is None else _usage(record.response.body)
        if used is not None:
            details = used.prompt_tokens_details or used.input_tokens_details or _Details()
            self.usage["prompt"] += used.prompt_tokens + used.input_tokens
            self.usage["cached"] += details.cached_tokens
            self.usage["completion"] += used.completion_tokens + used.output_tokens


def _usage(body: msgspec.Raw) -> _Usage | None:
    try:
        return _body_decoder.decode(body).usage
    except msgspec.DecodeError:
        return None


def _write(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
