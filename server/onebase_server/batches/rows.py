"""The file of a batch: one request a line, checked as a whole before the first is answered."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from onebase_edge.errors import InvalidRequestError
from onebase_protocol.batches import BatchError
from onebase_server.requests import strict_json

ENDPOINTS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/classify",
    "/v1/rerank",
    "/score",
    "/v1/decide",
)
"""The routes whose requests a batch may hold."""
MAX_ROWS = 50_000
MAX_LINES = 2 * MAX_ROWS
"""Blank ones too: half a gigabyte of them would be read for minutes."""
MAX_ERRORS = 100
"""Largest number of errors in one file that are reported; further ones are counted."""
MAX_CUSTOM_ID = 512
LINE_BYTES = 8 << 10
"""Largest size of a line, in bytes, besides its body."""
_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20
_ANY = 1 << 62
"""Limit of a line, in bytes, in files that were checked before."""
_FIELDS = ("custom_id", "method", "url", "body")


class BatchLine(msgspec.Struct, forbid_unknown_fields=True):
    """One line of a file that was checked. `body`: as it was written."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


@dataclass
class BatchFileCheck:
    """Result of checking a file: the number of its rows, and their errors."""

    rows: int = 0
    errors: list[BatchError] = field(default_factory=list)
    more: int = 0
    """Number of errors beyond those in `errors`."""

    def complain(self, code: str, message: str, line: int | None = None, param: str | None = None) -> None:
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(BatchError(code=code, message=message, line=line, param=param))
        else:
            self.more += 1

    @property
    def problems(self) -> list[BatchError]:
        if not self.more:
            return self.errors
        message = f"{self.more} more lines are wrong; the first {MAX_ERRORS} are told."
        rest = BatchError(code="more_errors", message=message)
        return [*self.errors, rest]


def check_batch_file(path: Path, endpoint: str, max_body: int) -> BatchFileCheck:
    """Read the whole file, line by line. Blocks. Raises OSError.

    Args:
        endpoint: one of ENDPOINTS, the only one that rows may name.
        max_body: bytes of one row's body.
    """
    checked = BatchFileCheck()
    seen: dict[bytes, int] = {}
    with path.open("rb") as file:
        for number, _, line in _lines(file, max_body + LINE_BYTES):
            if number > MAX_LINES:
                checked.complain(
                    "too_many_lines",
                    f"A file has at most {MAX_LINES} lines, blank ones too. Leave those out.",
                    number,
                )
                break
            if line is None:
                checked.complain(
                    "line_too_long",
                    f"The line is over {max_body + LINE_BYTES} bytes. Shorten it, or raise --max-body.",
                    number,
                )
                continue
            if not line:
                continue
            checked.rows += 1
            if checked.rows > MAX_ROWS:
                checked.complain(
                    "too_many_rows", f"A batch has at most {MAX_ROWS} rows. Split the file.", number
                )
                break
            _check_line(line, number, endpoint, max_body, seen, checked)
    if not checked.rows and not checked.errors:
        checked.complain("empty_file", "The file has no rows. Write one request a line.")
    return checked


def _check_line(
    line: bytes, number: int, endpoint: str, max_body: int, seen: dict[bytes, int], checked: BatchFileCheck
) -> None:
    try:
        value = strict_json.decode(line, max_body)
    except json.JSONDecodeError as error:
        checked.complain("invalid_json_line", f"The line is no JSON: {error.msg[:200]}.", number)
        return
    except InvalidRequestError as error:
        checked.complain("invalid_json_line", error.message, number, error.param)
        return
    if not isinstance(value, dict):
        checked.complain("invalid_json_line", 'The line is no object: write {"custom_id": ...}.', number)
        return
    problem = _problem(value, endpoint)
    if problem is not None:
        param, code, message = problem
        checked.complain(code, f"{param}: {message}", number, param)
        return
    known = blake2b(value["custom_id"].encode(errors="surrogatepass"), digest_size=16).digest()
    first = seen.setdefault(known, number)
    if first != number:
        checked.complain(
            "duplicate_custom_id",
            f"custom_id: line {first} has {value['custom_id'][:80]!r} as well. Give each row its own.",
            number,
            "custom_id",
        )


def _problem(row: dict[str, Any], endpoint: str) -> tuple[str, str, str] | None:
    """Return a row's first problem as the field, a code and a sentence, or None."""
    for name in _FIELDS:
        if row.get(name) is None:
            return name, "missing_required_parameter", f"it is missing. A row has {', '.join(_FIELDS)}."
    for name in row:
        if name not in _FIELDS:
            return name[:80], "unknown_parameter", f"a row has no such field, but {', '.join(_FIELDS)}."
    custom_id = row["custom_id"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        return "custom_id", "invalid_value", f"use a text of 1 to {MAX_CUSTOM_ID} characters."
    if row["method"] != "POST":
        return "method", "invalid_method", f"it is {str(row['method'])[:20]!r}; write POST."
    if row["url"] != endpoint:
        said = str(row["url"])[:80]
        return "url", "invalid_url", f"it is {said!r}, and the batch is for {endpoint}. Make them the same."
    if not isinstance(row["body"], dict):
        return "body", "invalid_value", f"write the object that POST {endpoint} takes."
    if row["body"].get("stream"):
        return "body.stream", "invalid_value", "a batch's answers come in one piece. Leave it out."
    return None


class RowFile:
    """The rows of a file that was checked, by their number from 0. Blocks. Raises OSError.

    With a lower --max-body since the check it has the same rows: its route refuses those that are too long.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._places = array("q", (place for _, place, line in _lines(self._file, _ANY) if line))

    def __len__(self) -> int:
        return len(self._places)

    def read(self, number: int) -> BatchLine:
        place = self._places[number]
        self._file.seek(place)
        return msgspec.json.decode(_without_mark(self._file.readline(), place), type=BatchLine)

    def close(self) -> None:
        self._file.close()


def _lines(file: BinaryIO, most: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield each line's number from 1, its place, and its text (b"" if blank, None if over `most` bytes)."""
    number, place = 0, 0
    while line := file.readline(most + 1):
        number, begin = number + 1, place
        place += len(line)
        text: bytes | None = _without_mark(line, begin)
        if len(line) > most and not line.endswith(b"\n"):
            text = None
            while (rest := file.readline(_CHUNK)) and not rest.endswith(b"\n"):
                place += len(rest)
            place += len(rest)
        elif not line.strip():
            text = b""
        yield number, begin, text


def _without_mark(line: bytes, place: int) -> bytes:
    """Return the line without the byte order mark that some editors write."""
    return line.removeprefix(_BOM) if place == 0 else line
