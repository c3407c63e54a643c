"""Records of CSV and Parquet files."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TextIO

from onebase_adapters.training.data_json import MOST_LINE_BYTES, Item, Record, first_twice, parse_strict
from onebase_adapters.training.data_problems import DataError, Problem, RowError

MOST_ROWS = 5_000_000
MOST_PARQUET_BYTES = 4 << 30
"""Of a Parquet file's rows, written out."""

_PARQUET_MEMORY = 8 << 30
_AT_ONCE = 1000
_NOT_UTF8 = "not UTF-8: save the file as UTF-8"


def csv_rows(path: Path, delimiter: str, on_bytes: Callable[[int], None], source: str) -> Iterator[Item]:
    """A record per row, by the names in the first one; empty cells are left out. Lines are those of the
    file, of which a quoted cell may span several."""
    csv.field_size_limit(max(csv.field_size_limit(), MOST_LINE_BYTES))
    with path.open("rb") as file:
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        lines = _RowLines(text)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        names: list[str] | None = None
        before = 0
        while True:
            line = reader.line_num + 1
            lines.begin_row()
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield Problem(line, "", f"not CSV: {error}; what follows was not read")
                return
            except RowError as error:
                yield Problem(line, error.field, error.reason)
                return
            if reader.line_num % _AT_ONCE == 0 or cells is None:
                on_bytes(file.tell() - before)
                before = file.tell()
            if cells is None:
                return
            if not any(cells):
                continue
            if names is None:
                names = _names(line, cells, source)
            else:
                yield _csv_record(line, names, cells, lines.bytes)


class _RowLines:
    """Lines of a text file for csv.reader, as long as they make no row too long.

    bytes: of the row so far.
    """

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self.bytes = 0

    def begin_row(self) -> None:
        """What comes next is of another row."""
        self.bytes = 0

    def __iter__(self) -> _RowLines:
        return self

    def __next__(self) -> str:
        """The next line. Raises RowError."""
        line = self._text.readline(MOST_LINE_BYTES + 1)
        if not line:
            raise StopIteration
        self.bytes += len(line.encode("utf-8", "surrogateescape"))
        if self.bytes > MOST_LINE_BYTES:
            reason = f"the row is longer than {MOST_LINE_BYTES >> 20} MB, or a quote in it is never closed"
            raise RowError("", f"{reason}; what follows was not read")
        return line


def parquet_rows(
    path: Path, columns: Sequence[str], on_part: Callable[[float], None], source: str
) -> Iterator[Item]:
    """A record per row, with what it has of `columns`; its line is its number.

    Read in a process of its own with bounded memory: a small file can unfold to any size. -P: nothing is
    imported from the current folder, where a data set may lie beside code of anybody's.
    """
    command = [sys.executable, "-P", "-m", "onebase_adapters.training.parquet_child", str(path)]
    limits = [str(_PARQUET_MEMORY), str(MOST_ROWS), *columns]
    with subprocess.Popen(
        [*command, *limits], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        try:
            if child.stdout is not None:
                yield from _child_rows(child.stdout, on_part, source)
        finally:
            child.kill()


def _child_rows(lines: IO[bytes], on_part: Callable[[float], None], source: str) -> Iterator[Item]:
    total, line, size = 0, 0, 0
    while raw := lines.readline(MOST_LINE_BYTES + 1):
        size += len(raw)
        if raw.startswith(b"!"):
            raise DataError.of_file(source, json.loads(raw[1:]))
        if raw.startswith(b"#"):
            total = int(raw[1:])
            continue
        if raw.startswith(b"."):
            return
        line += 1
        if len(raw) > MOST_LINE_BYTES or size > MOST_PARQUET_BYTES:
            reason = f"row {line} is longer than {MOST_LINE_BYTES >> 20} MB, or all are too long together"
            raise DataError(source, [Problem(line, "", reason)])
        if line % 64 == 0 or line == total:
            on_part(line / max(1, total))
        try:
            yield Record(line, parse_strict(raw.decode()), len(raw))
        except RowError as error:
            yield Problem(line, error.field, error.reason)
    reason = (
        f"reading stopped after row {line}: the file is damaged, or unfolds to more than the memory allowed"
    )
    raise DataError.of_file(source, reason)


def _names(line: int, cells: Sequence[str], source: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not _is_utf8(names):
        raise DataError(source, [Problem(line, "", _NOT_UTF8)])
    twice = first_twice(names)
    if twice is not None:
        raise DataError(
            source, [Problem(line, "", f"two columns have the name {twice[:60]!r}: rename one of them")]
        )
    return names


def _csv_record(line: int, names: Sequence[str], cells: Sequence[str], size: int) -> Item:
    if len(cells) != len(names):
        return Problem(line, "", f"{len(cells)} cells, where the first line names {len(names)} columns")
    if not _is_utf8(cells):
        return Problem(line, "", _NOT_UTF8)
    given = {name: cell for name, cell in zip(names, cells, strict=True) if cell}
    try:
        return Record(line, given, size)
    except RowError as error:
        return Problem(line, error.field, error.reason)


def _is_utf8(cells: Sequence[str]) -> bool:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return False
    return True
