"""Files of training data: which format a file has, and its records with their line numbers.

The file may come from anybody. Nothing in it is run: no pickle, no script, no code of a data set. Run as a
program, this module reads a Parquet file for another process (see `parquet_rows`).
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

from onebase_adapters.training.data.records import (
    MOST_LINE_BYTES,
    DataError,
    Item,
    Problem,
    Record,
    RowError,
    first_twice,
    json_array,
    json_lines,
    parse_strict,
)

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""By the end of a file's name."""

MOST_FILE_BYTES = 4 << 30

KNOWN_FIELDS = (
    "messages",
    "tools",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "system",
    "text",
    "question",
    "chosen",
    "rejected",
    "preferred_output",
    "non_preferred_output",
)
"""Every field that some shape has."""

MOST_ROWS = 5_000_000
MOST_PARQUET_BYTES = 4 << 30
"""Of a Parquet file's rows, written out."""

_PARQUET_MEMORY = 8 << 30
_REPORTS = 500
"""How many times progress is reported."""
_LIKE = 0.84
_ROWS_A_REPORT = 1000
_ROWS_A_BATCH = 64
_NOT_UTF8 = "not UTF-8: save the file as UTF-8"
_NEVER_ALONE = {"tools", "input", "system", "question"}
"""Columns that make no row without another."""

_MAGIC = {
    b"PAR1": "a Parquet file: name it .parquet",
    b"\x1f\x8b": "compressed (gzip): unpack it first",
    b"PK\x03\x04": "a ZIP file, as spreadsheets are: save it as CSV or JSON Lines",
    b"\x28\xb5\x2f\xfd": "compressed (zstd): unpack it first",
    b"BZh": "compressed (bzip2): unpack it first",
    b"ARROW1": "an Arrow file: save it as Parquet",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
}


def read_file(
    path: Path, on_part: Callable[[float], None] | None = None, *, name: str | None = None
) -> Iterator[Item]:
    """The file's records in order, with a Problem in place of each bad line.

    Args:
        on_part: gets the part that was read, from 0 to 1, as reading goes on.
        name: what the file is called, if `path` does not say it (an upload); its suffix decides the format.

    Raises:
        DataError: the file as a whole cannot be read; OSError: or not opened.
    """
    shown = name or path.name
    suffix = Path(shown).suffix.lower()
    if suffix not in FORMATS:
        raise DataError.of_file(shown, f"the name must end in {', '.join(FORMATS)}, which tells the format")
    if path.is_dir():
        raise DataError.of_file(shown, "this is a folder: name one file")
    size = path.stat().st_size
    if size > MOST_FILE_BYTES:
        raise DataError.of_file(shown, f"{size} bytes are too many: at most {MOST_FILE_BYTES} are read")
    _check_beginning(path, shown, suffix)
    done, reported = 0, 0

    def on_bytes(count: int) -> None:
        nonlocal done, reported
        done += count
        if on_part is not None and (done - reported) * _REPORTS >= size:
            reported = done
            on_part(min(1.0, done / size) if size else 1.0)

    with path.open("rb") as file:
        if suffix in (".jsonl", ".ndjson"):
            yield from json_lines(file, on_bytes)
        elif suffix == ".json":
            yield from json_array(file, on_bytes, shown)
        elif suffix in (".csv", ".tsv"):
            yield from csv_rows(path, "\t" if suffix == ".tsv" else ",", on_bytes, shown)
        else:
            yield from parquet_rows(path, KNOWN_FIELDS, on_part or (lambda part: None), shown)


def misspelled(key: str, names: Sequence[str]) -> str | None:
    """Which of `names` a key probably means, if any; `prompt_id` does not mean prompt."""
    near = difflib.get_close_matches(key, names, n=1, cutoff=_LIKE)
    return near[0] if near and not key.startswith(f"{near[0]}_") else None


def _check_beginning(path: Path, shown: str, suffix: str) -> None:
    """Raise DataError unless the first bytes are those of the format."""
    with path.open("rb") as file:
        first = file.read(4096)
    if suffix == ".parquet":
        if not first.startswith(b"PAR1"):
            raise DataError.of_file(shown, "this is not a Parquet file: it does not begin with PAR1")
        return
    for magic, said in _MAGIC.items():
        if first.startswith(magic):
            raise DataError.of_file(shown, f"this is {said}")
    if b"\0" in first:
        raise DataError.of_file(shown, "this is a binary file, not text")


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
            if reader.line_num % _ROWS_A_REPORT == 0 or cells is None:
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
    """Lines of a text file for csv.reader; a row that is too long ends them with RowError.

    bytes: of the row so far.
    """

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self.bytes = 0

    def begin_row(self) -> None:
        """The next line begins another row."""
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
    return Record(line, given, size)


def _is_utf8(cells: Sequence[str]) -> bool:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return False
    return True


def parquet_rows(
    path: Path, columns: Sequence[str], on_part: Callable[[float], None], source: str
) -> Iterator[Item]:
    """A record per row, with what it has of `columns`; its line is its number.

    Read in another process with bounded memory: a small file can unfold to any size. -P: nothing is
    imported from the current folder, where a data set may come with anybody's code.
    """
    command = [sys.executable, "-P", "-m", "onebase_adapters.training.data.files", str(path)]
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


def main() -> None:
    """The process that reads a Parquet file: rows as lines of JSON on stdout.

    `#N` comes first: there are N rows. `!"reason"` instead of rows: it cannot be read. `.` is the end.
    """
    path, memory, most_rows, *columns = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
    try:
        for line in _lines(path, int(most_rows), columns):
            sys.stdout.write(line)
        sys.stdout.write(".\n")
    except ModuleNotFoundError:
        _refuse("Parquet files need the package pyarrow: pip install 'onebase[train]'")
    except MemoryError:
        _refuse("the file unfolds to more than the memory allowed")
    except Exception as error:  # pyarrow's exceptions share no base class
        _refuse(f"not a sound Parquet file: {(str(error).splitlines() or [type(error).__name__])[0][:200]}")


def _lines(path: str, most_rows: int, columns: list[str]) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    pyarrow.set_cpu_count(1)
    with pyarrow.parquet.ParquetFile(path) as file:
        rows = file.metadata.num_rows
        if rows > most_rows:
            raise ValueError(f"{rows} rows are too many: at most {most_rows} are read")
        names = file.schema_arrow.names
        known = [name for name in columns if name in names]
        if not set(known) - _NEVER_ALONE:
            shown = ", ".join(name[:40] for name in names[:8])
            raise ValueError(f"its columns are {shown}: give messages, or prompt and completion")
        # A name that was meant as one of the columns must come to light in the rows.
        odd = [name for name in names if name not in known and misspelled(name, columns)]
        yield f"#{rows}\n"
        for batch in file.iter_batches(_ROWS_A_BATCH, columns=[*known, *odd], use_threads=False):
            for row in batch.to_pylist():
                yield json.dumps(row, default=_other, ensure_ascii=False) + "\n"


def _other(value: Any) -> dict[str, str]:
    """Stand in for bytes and dates, which cannot be learned: the row is refused for this value."""
    return {"type": type(value).__name__}


def _refuse(reason: str) -> None:
    sys.stdout.write(f"!{json.dumps(reason)}\n")


if __name__ == "__main__":
    main()
