"""Read files of training data: detect their format, and yield their records with their first lines.

JSON is parsed strictly. The file may come from anybody. Nothing in it is run: no pickle, no script, no code
of a data set. Run as a program, this module reads a Parquet file for another process (see `parquet_rows`).
"""

from __future__ import annotations

import csv
import io
import json
import math
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, TextIO

from onebase_engine.environment import computing_environment
from onebase_training.data.dataset import KNOWN_FIELDS, DataError, Problem, RowError, misspelled

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Supported formats, as suffixes of a file's name."""

MOST_FILE_BYTES = 4 << 30

MOST_ROWS = 5_000_000
MOST_PARQUET_BYTES = 4 << 30
"""Largest size of a Parquet file's rows, written out, in bytes."""
MOST_PARQUET_COLUMNS = 10_000
UNFOLDING = 1000
"""Largest ratio of a Parquet file's unfolded size to its own, beyond UNFOLDED_ANYWAY bytes. Repeated texts
make real files unfold to tens or hundreds of times their size."""
UNFOLDED_ANYWAY = 64 << 20

_PARQUET_MEMORY = 8 << 30
_COUNTING_SECONDS = 120
_READING_SECONDS = 1800
"""Processor time, in seconds, for unfolding a Parquet file once to see its size, and for all the reading."""
_REPORTS = 500
"""Number of times that progress is reported."""
_ROWS_A_REPORT = 1000
_ROWS_A_BATCH = 64
_NAMES_A_LEVEL = 3
"""Names in a Parquet column's path for a list: its own, the repeated group's and the element's."""
_NOT_UTF8 = "not UTF-8: save the file as UTF-8"
_NEVER_ALONE = {"tools", "input", "system", "question"}
"""Columns that do not make a row without another."""

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
    path: Path,
    on_part: Callable[[float], None] | None = None,
    *,
    name: str | None = None,
    more: Sequence[str] = (),
) -> Iterator[Item]:
    """Yield the file's records in order, with a Problem in place of each bad line.

    Args:
        on_part: called with the part that was read, from 0 to 1.
        name: the file's name, if `path` does not have it (an upload); its suffix decides the format.
        more: columns of a Parquet file to read besides those of KNOWN_FIELDS.

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
            yield from parquet_rows(path, (*KNOWN_FIELDS, *more), on_part or (lambda part: None), shown)


def _check_beginning(path: Path, shown: str, suffix: str) -> None:
    """Raise DataError unless the first bytes are those of the format."""
    with path.open("rb") as file:
        first = file.read(4096)
    if suffix == ".parquet":
        if not first.startswith(b"PAR1"):
            raise DataError.of_file(shown, "this is not a Parquet file: it does not begin with PAR1")
        return
    for magic, kind in _MAGIC.items():
        if first.startswith(magic):
            raise DataError.of_file(shown, f"this is {kind}")
    if b"\0" in first:
        raise DataError.of_file(shown, "this is a binary file, not text")


MOST_LINE_BYTES = 4 << 20
MOST_JSON_BYTES = 512 << 20
MOST_DEPTH = 64
"""Largest number of levels of lists and objects in a row."""

_BOM = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"


@dataclass(frozen=True)
class Record:
    """One row as the file has it. line: 1-based. size: bytes, roughly."""

    line: int
    value: dict[str, Any]
    size: int


Item = Record | Problem


def parse_strict(text: str) -> Any:
    """Parse plain JSON. Raises RowError for what parsers read differently, or not at all: NaN, numbers beyond
    a double, a key twice, nesting deeper than MOST_DEPTH, text that is not Unicode."""
    value = _parse(text)
    _check_depth(value)
    return value


def first_twice(names: Iterable[str]) -> str | None:
    """Return the first name that occurs a second time, or None."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def json_lines(file: BinaryIO, on_bytes: Callable[[int], None]) -> Iterator[Item]:
    """Yield a record for each line; blank lines are skipped. on_bytes: called with the number of bytes
    read."""
    line = 0
    while raw := file.readline(MOST_LINE_BYTES + 1):
        line += 1
        on_bytes(len(raw))
        if len(raw) > MOST_LINE_BYTES and not raw.endswith(b"\n"):
            yield Problem(line, "", f"the line is longer than {MOST_LINE_BYTES >> 20} MB")
            _skip_line(file, on_bytes)
            continue
        if line == 1:
            raw = raw.removeprefix(_BOM)
        if not raw.strip():
            continue
        yield _record(line, raw.removesuffix(b"\n"))


def json_array(file: BinaryIO, on_bytes: Callable[[int], None], source: str) -> Iterator[Item]:
    """Yield the records of a `.json` file: a list of objects, one object, or JSON Lines after all."""
    raw = file.read(MOST_JSON_BYTES + 1)
    on_bytes(len(raw))
    if len(raw) > MOST_JSON_BYTES:
        reason = f"a .json file may have {MOST_JSON_BYTES >> 20} MB: write it as JSON Lines (.jsonl)"
        raise DataError.of_file(source, reason)
    try:
        text = raw.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield Problem(line, "", f"not UTF-8 (byte {error.start} of the file): save the file as UTF-8")
        return
    if text.lstrip(_SPACE).startswith("["):
        yield from _elements(text)
    else:
        yield from _objects(text)


def _elements(text: str) -> Iterator[Item]:
    """Yield the values of one list, with the line on which each begins."""
    rest = _Rest(text)
    rest.skip_character("[")
    expect_value = False
    while expect_value or not rest.skip_character("]"):
        try:
            yield rest.row()
        except RowError as error:
            yield rest.problem(f"{error.reason}; what follows was not read")
            return
        expect_value = rest.skip_character(",")
        if not expect_value and not rest.begins_with("]"):
            yield rest.problem("not JSON: ',' or ']' expected; what follows was not read")
            return
    if not rest.is_empty:
        yield rest.problem("there is more after the end of the list")


def _objects(text: str) -> Iterator[Item]:
    """Yield objects that follow each other, each on any number of lines."""
    rest = _Rest(text)
    while not rest.is_empty:
        try:
            yield rest.row()
        except RowError as error:
            yield rest.problem(f"{error.reason}; what follows was not read")
            return


class _Rest:
    """The rest of a JSON text that is still to be read; it never begins with white space."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._escapes = "\\u" in text
        self._line = 1
        self._at = 0
        self._go_to(0)

    @property
    def is_empty(self) -> bool:
        return self._at == len(self._text)

    def begins_with(self, character: str) -> bool:
        return self._text.startswith(character, self._at)

    def skip_character(self, character: str) -> bool:
        """Skip a character; False if another one is there."""
        found = self.begins_with(character)
        if found:
            self._go_to(self._at + 1)
        return found

    def row(self) -> Item:
        """Read a value. Raises RowError if there is none: the end is unknown then."""
        line, start = self._line, self._at
        value, end = _strict(partial(_DECODER.raw_decode, self._text, start), self._escapes)
        self._go_to(end)
        return _as_record(line, value, end - start)

    def problem(self, reason: str) -> Problem:
        """Return a problem at this place."""
        return Problem(self._line, "", reason)

    def _go_to(self, position: int) -> None:
        while position < len(self._text) and self._text[position] in _SPACE:
            position += 1
        self._line += self._text.count("\n", self._at, position)
        self._at = position


def _record(line: int, raw: bytes) -> Item:
    try:
        return _as_record(line, _parse(raw.decode()), len(raw))
    except UnicodeDecodeError as error:
        return Problem(line, "", f"not UTF-8 (byte {error.start} of the line): save the file as UTF-8")
    except RowError as error:
        return Problem(line, error.field, error.reason)


def _as_record(line: int, value: Any, size: int) -> Item:
    if size > MOST_LINE_BYTES:
        return Problem(line, "", f"the row is longer than {MOST_LINE_BYTES >> 20} MB")
    try:
        _check_depth(value)
    except RowError as error:
        return Problem(line, error.field, error.reason)
    if isinstance(value, dict):
        return Record(line, value, size)
    return Problem(line, "", f'a row is an object, as in {{"messages": ...}}, not {_kind(value)}')


def _skip_line(file: BinaryIO, on_bytes: Callable[[int], None]) -> None:
    while raw := file.readline(1 << 20):
        on_bytes(len(raw))
        if raw.endswith(b"\n"):
            return


def _parse(text: str) -> Any:
    return _strict(partial(_DECODER.decode, text), "\\u" in text)


def _strict(parse: Callable[[], Any], escapes: bool) -> Any:
    try:
        value = parse()
        if escapes:
            _check_unicode(value)
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise RowError("", f"not JSON: {error.msg.lower()} ({line}column {error.colno})") from None
    except ValueError as error:
        raise RowError("", f"not JSON: {error}") from None
    return value


def _check_depth(value: Any) -> None:
    """Raise RowError for a value that is too deep for recursion later."""
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        level = [each for each in level if isinstance(each, dict | list)]
        if not level:
            return
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]
    raise _too_deep()


def _too_deep() -> RowError:
    return RowError("", f"nested too deep: at most {MOST_DEPTH} levels of lists and objects are read")


def _check_unicode(value: Any) -> None:
    """Raise ValueError for half a surrogate pair: Python accepts it as text, a tokenizer does not."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair (\\ud800 to \\udfff alone) is not a character") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = first_twice(name for name, _ in pairs) or ""
        raise ValueError(f"the key {twice[:60]!r} occurs twice")
    return result


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large a number")
    return value


def _no_constants(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_no_duplicates, parse_float=_finite, parse_constant=_no_constants
)


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


def csv_rows(path: Path, delimiter: str, on_bytes: Callable[[int], None], source: str) -> Iterator[Item]:
    """Yield a record for each row, by the names in the first one; empty cells are left out.

    Lines are those of the file; a quoted cell may span several.
    """
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

    bytes: size of the row so far.
    """

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self.bytes = 0

    def begin_row(self) -> None:
        """Start another row with the next line."""
        self.bytes = 0

    def __iter__(self) -> _RowLines:
        return self

    def __next__(self) -> str:
        """Return the next line. Raises RowError."""
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
    """Yield a record for each row, with its `columns`; its line is its number.

    The file is read in another process with bounded memory, because a small file can unfold to any size. -P:
    nothing is imported from the current folder, where a data set may come with anybody's code.
    """
    command = [sys.executable, "-P", "-m", "onebase_training.data.files", str(path)]
    limits = [str(_PARQUET_MEMORY), str(_COUNTING_SECONDS), str(MOST_ROWS), str(MOST_PARQUET_BYTES)]
    with subprocess.Popen(
        [*command, *limits, *columns],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=computing_environment(),
    ) as child:
        try:
            if child.stdout is not None:
                yield from _child_rows(child.stdout, on_part, source)
            if child.wait() == -signal.SIGXCPU:
                reason = f"unfolding it takes over {_COUNTING_SECONDS} seconds of the processor: {_SPLIT}"
                raise DataError.of_file(source, reason)
            if child.returncode:
                reason = "reading stopped: the file is damaged, or unfolds to more than the memory allowed"
                raise DataError.of_file(source, reason)
        finally:
            child.kill()


_SPLIT = "split it into several files, or write it as JSON Lines"


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


def main() -> None:
    """Read a Parquet file for another process: rows as lines of JSON on stdout.

    `#N` comes first: there are N rows. `!"reason"` instead of rows: it cannot be read. `.` is the end.
    """
    path, memory, seconds, most_rows, most_bytes, *columns = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _allow_seconds(int(seconds))
    try:
        for line in _lines(path, int(most_rows), int(most_bytes), columns):
            sys.stdout.write(line)
        sys.stdout.write(".\n")
    except ModuleNotFoundError:
        _refuse("Parquet files need the package pyarrow: pip install 'onebase[train]'")
    except _TooMuchError as error:
        _refuse(str(error))
    except MemoryError:
        _refuse("the file unfolds to more than the memory allowed")
    except Exception as error:  # pyarrow's exceptions share no base class
        _refuse(f"not a sound Parquet file: {(str(error).splitlines() or [type(error).__name__])[0][:200]}")


def _allow_seconds(seconds: int) -> None:
    """End this process once it has taken so many seconds of the processor."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _lines(path: str, most_rows: int, most_bytes: int, columns: list[str]) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    pyarrow.set_cpu_count(1)
    with pyarrow.parquet.ParquetFile(path) as file:
        read = _columns_read(file, columns)
        by_size = max(UNFOLDED_ANYWAY, Path(path).stat().st_size * UNFOLDING)
        limits = _Limits(most_rows, min(most_bytes, by_size))
        _check_declared(file.metadata, read, limits)
        _check_unfolded(file, read, limits)
        _allow_seconds(_READING_SECONDS)
        yield f"#{file.metadata.num_rows}\n"
        for batch in file.iter_batches(_ROWS_A_BATCH, columns=read, use_threads=False):
            for row in batch.to_pylist():
                yield json.dumps(row, default=_other, ensure_ascii=False) + "\n"


class _TooMuchError(Exception):
    """A sound file that is too large for its reader; the message has the remedy."""


@dataclass(frozen=True)
class _Limits:
    """Limits of a Parquet file: its rows, and their unfolded size in bytes."""

    rows: int
    bytes: int

    def check_rows(self, rows: int) -> None:
        if rows > self.rows:
            raise _TooMuchError(f"{rows} rows are too many: at most {self.rows} are read; {_SPLIT}")

    def check_bytes(self, what: str, size: int) -> None:
        if size > self.bytes:
            most = f"{self.bytes >> 20} MB, the most that is read of a file of its size"
            raise _TooMuchError(f"it {what} over {most}: {_SPLIT}")


def _columns_read(file: Any, columns: list[str]) -> list[str]:
    """Return the columns that make rows, and those that look like misspelled ones.

    Raises ValueError and _TooMuchError.
    """
    if (count := file.metadata.num_columns) > MOST_PARQUET_COLUMNS:
        raise _TooMuchError(f"{count} columns are too many: at most {MOST_PARQUET_COLUMNS} are read")
    names = file.schema_arrow.names
    known = [name for name in columns if name in names]
    if not set(known) - _NEVER_ALONE:
        shown = ", ".join(name[:40] for name in names[:8])
        raise ValueError(f"its columns are {shown}: give messages, or prompt and completion")
    # A name that was meant as one of the columns must come to light in the rows.
    return known + [name for name in names if name not in known and misspelled(name, columns)]


def _check_declared(metadata: Any, columns: list[str], limits: _Limits) -> None:
    """Raise _TooMuchError for a file that is too large or too deep by its own metadata."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    limits.check_rows(max(metadata.num_rows, sum(group.num_rows for group in groups)))
    size = 0
    for group in groups:
        for index in range(metadata.num_columns):
            chunk = group.column(index)
            names = chunk.path_in_schema.split(".")
            if names[0] not in columns:
                continue
            if len(names) > _NAMES_A_LEVEL * MOST_DEPTH:
                raise _TooMuchError(f"{names[0][:40]} is nested deeper than {MOST_DEPTH} levels")
            # Written out, each value takes a character and a comma at least.
            size += max(chunk.total_uncompressed_size, 2 * chunk.num_values)
    limits.check_bytes("declares", size)


def _check_unfolded(file: Any, columns: list[str], limits: _Limits) -> None:
    """Raise _TooMuchError for a file that unfolds to more than it declares, as repeated texts do.

    Only a few rows are in memory at a time.
    """
    rows = size = 0
    for batch in file.iter_batches(_ROWS_A_BATCH, columns=columns, use_threads=False):
        rows += batch.num_rows
        size += sum(map(_unfolded_bytes, batch.columns))
        limits.check_rows(rows)
        limits.check_bytes("unfolds to", size)


def _unfolded_bytes(array: Any) -> int:
    """Return the size of an Arrow array, in bytes, with each reference to a dictionary or a list written
    out."""
    import pyarrow.compute
    from pyarrow import types

    if types.is_dictionary(array.type):
        words = array.dictionary
        if not (types.is_string(words.type) or types.is_large_string(words.type)):
            return int(array.dictionary_decode().nbytes)
        lengths = pyarrow.compute.binary_length(words).cast("int64").take(array.indices)
        return int(pyarrow.compute.sum(lengths).as_py() or 0)
    if types.is_nested(array.type):
        inner = array.flatten()
        return sum(map(_unfolded_bytes, inner if isinstance(inner, list) else [inner]))
    return int(array.nbytes)


def _other(value: Any) -> dict[str, str]:
    """Replace bytes and dates, which cannot be learned: the row is refused for this value."""
    return {"type": type(value).__name__}


def _refuse(reason: str) -> None:
    sys.stdout.write(f"!{json.dumps(reason)}\n")


if __name__ == "__main__":
    main()
