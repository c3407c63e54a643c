"""The process that reads a Parquet file: rows as lines of JSON on stdout. See `data_tables.py`.

`#N` comes first: there are N rows. `!"reason"` instead of rows: it cannot be read. `.` is the end.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from typing import Any

from onebase_adapters.training.row_fields import misspelled

_AT_ONCE = 64
_NEVER_ALONE = {"tools", "input", "system", "question"}
"""Columns that make no row without another."""


def main() -> None:
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
        _refuse(f"no sound Parquet file: {(str(error).splitlines() or [type(error).__name__])[0][:200]}")


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
            raise ValueError(f"its columns are {shown}: wanted are messages, or prompt and completion")
        # A name that was meant as one of the columns must come to light in the rows.
        odd = [name for name in names if name not in known and misspelled(name, columns)]
        yield f"#{rows}\n"
        for batch in file.iter_batches(_AT_ONCE, columns=[*known, *odd], use_threads=False):
            for row in batch.to_pylist():
                yield json.dumps(row, default=_other, ensure_ascii=False) + "\n"


def _other(value: Any) -> dict[str, str]:
    """Bytes and dates are nothing to learn: the row is refused for what stands here."""
    return {"type": type(value).__name__}


def _refuse(reason: str) -> None:
    sys.stdout.write(f"!{json.dumps(reason)}\n")


if __name__ == "__main__":
    main()
