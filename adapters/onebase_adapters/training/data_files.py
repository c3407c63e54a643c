"""Files of training data: which format a file has, and its records with their line numbers.

The file may come from anybody. Nothing in it is run: no pickle, no script, no code of a data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from onebase_adapters.training.data_json import Item, Record, json_array, json_lines
from onebase_adapters.training.data_problems import DataError
from onebase_adapters.training.data_tables import csv_rows, parquet_rows
from onebase_adapters.training.row_fields import KNOWN_FIELDS

__all__ = ["FORMATS", "Item", "Record", "read_file"]

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""By the end of a file's name."""

MOST_FILE_BYTES = 4 << 30

_TELLS = 500
"""How often progress is told."""

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
    """The file's records in order, and a Problem in the place of each line that holds none.

    Args:
        on_part: told the part that was read, from 0 to 1, as reading goes on.
        name: what the file is called, if `path` does not say it (an upload); its end decides the format.

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
    done, told = 0, 0

    def on_bytes(count: int) -> None:
        nonlocal done, told
        done += count
        if on_part is not None and (done - told) * _TELLS >= size:
            told = done
            on_part(min(1.0, done / size) if size else 1.0)

    with path.open("rb") as file:
        if suffix in (".jsonl", ".ndjson"):
            yield from json_lines(file, on_bytes)
        elif suffix == ".json":
            yield from json_array(file, on_bytes, shown)
        elif suffix in (".csv", ".tsv"):
            yield from csv_rows(path, "\t" if suffix == ".tsv" else ",", on_bytes, shown)
        else:
            yield from parquet_rows(path, KNOWN_FIELDS, on_part or _silent, shown)


def _check_beginning(path: Path, shown: str, suffix: str) -> None:
    """Whether the first bytes are those of the format. Raises DataError."""
    with path.open("rb") as file:
        first = file.read(4096)
    if suffix == ".parquet":
        if not first.startswith(b"PAR1"):
            raise DataError.of_file(shown, "this is no Parquet file: it does not begin with PAR1")
        return
    for magic, said in _MAGIC.items():
        if first.startswith(magic):
            raise DataError.of_file(shown, f"this is {said}")
    if b"\0" in first:
        raise DataError.of_file(shown, "this is no text but a binary file")


def _silent(_part: float) -> None:
    """Tell nobody."""
