"""Tables as training data: CSV and Parquet, read row by row within bounds."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from tests.training.data_support import base_tokenizer, chat, learned, problems, recipe, written

from onebase_adapters.training.data import files
from onebase_adapters.training.data.files import read_file
from onebase_adapters.training.data.reader import DataError, load_dataset

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def test_csv_cells_may_span_lines_and_hold_messages_as_json(tmp_path: Path) -> None:
    messages = json.dumps(chat("q", "from json")["messages"]).replace('"', '""')
    text = f'messages,prompt,completion\r\n,"a\n\nb",c\r\n\r\n"{messages}",,\r\n'
    dataset = load_dataset(written(tmp_path, text.encode(), "rows.csv"), base_tokenizer(), recipe())
    assert [row.line for row in dataset.rows] == [2, 6]
    assert [learned(row, base_tokenizer()) for row in dataset.rows] == ["c<|im_end|>", "from json<|im_end|>"]


def test_bad_csv_rows_are_told_with_their_lines(tmp_path: Path) -> None:
    text = b'prompt,completion\na,b\nonly one\na,b,c\n\xff,b\n"open,b\n'
    found = problems(written(tmp_path, text, "rows.csv"))
    assert [line for line, _, _ in found] == [3, 4, 5, 6]
    assert "1 cells, where the first line names 2 columns" in found[0][2]
    assert "not UTF-8" in found[2][2]


def test_tabs_separate_the_cells_of_a_tsv_file(tmp_path: Path) -> None:
    path = written(tmp_path, b"prompt\tcompletion\na, b\tc\n", "rows.tsv")
    assert learned(load_dataset(path, base_tokenizer(), recipe()).rows[0], base_tokenizer()) == "c<|im_end|>"


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_rows_have_nested_messages_without_the_nulls_that_fill_them_up(tmp_path: Path) -> None:
    messages = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}],
        [{"role": "user", "content": "r"}, {"role": "assistant", "content": "b", "name": "n"}],
        None,
    ]
    path = write_parquet(
        tmp_path / "rows.parquet", {"messages": messages, "text": [None, None, "x y"], "image": [b"\0"] * 3}
    )
    dataset = load_dataset(path, base_tokenizer(), recipe())
    assert [row.line for row in dataset.rows] == [1, 2, 3]
    assert learned(dataset.rows[1], base_tokenizer()) == "b<|im_end|>"


def test_bad_parquet_rows_are_told_by_number(tmp_path: Path) -> None:
    found = problems(
        write_parquet(tmp_path / "r.parquet", {"prompt": ["a", None], "completion": [None, "b"]})
    )
    assert [(line, field) for line, field, _ in found] == [(1, "completion"), (2, "prompt")]
    found = problems(write_parquet(tmp_path / "b.parquet", {"text": [b"\x80\x04pickle"]}))
    assert found == [(1, "text", "a text is wanted, not dict")]
    found = problems(write_parquet(tmp_path / "c.parquet", {"body": ["a"], "label": [1]}))
    assert "its columns are body, label" in found[0][2]
    found = problems(write_parquet(tmp_path / "d.parquet", {"question": ["a"], "answer": ["b"]}))
    assert "its columns are question, answer" in found[0][2]
    found = problems(
        write_parquet(tmp_path / "e.parquet", {"promt": ["q"], "chosen": ["a b"], "rejected": ["a c"]}),
        method="dpo",
    )
    assert found == [(1, "promt", "an unknown field: did you mean prompt?")]


def bomb(path: Path, each: int, rows: int) -> Path:
    """Many rows that all point at one long text."""
    long = pyarrow.array(["x" * each])
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), long)
    return write_parquet(path, {"text": column})


def test_a_parquet_file_that_unfolds_without_end_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bomb(tmp_path / "long.parquet", 20 << 20, 10_000)
    assert path.stat().st_size < 4 << 20
    assert "row 1 is longer than 4 MB" in problems(path)[0][2]
    monkeypatch.setattr(files, "MOST_PARQUET_BYTES", 10 << 20)
    many = bomb(tmp_path / "many.parquet", 1 << 20, 100)
    with pytest.raises(DataError, match="all are too long together"):
        list(read_file(many))
    monkeypatch.setattr(files, "MOST_ROWS", 50)
    with pytest.raises(DataError, match="100 rows are too many: at most 50 are read"):
        list(read_file(many))


def test_the_reading_of_parquet_has_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PARQUET_MEMORY", 2 << 30)
    lists = [["x" * (30 << 20)]]
    path = tmp_path / "deep.parquet"
    column = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 500, pyarrow.int32()), pyarrow.array(lists[0])
    )
    row = pyarrow.ListArray.from_arrays(pyarrow.array([0, 500], pyarrow.int32()), column)
    parquet.write_table(pyarrow.table({"messages": row}), path)
    with pytest.raises(DataError, match=r"unfolds to more|no sound Parquet|damaged"):
        list(read_file(path))


def test_a_csv_row_is_given_up_at_4_mb_whatever_it_would_become(tmp_path: Path) -> None:
    cells = written(tmp_path, b"prompt,completion\na,b\n" + b"xyz," * 5_000_000 + b"\nc,d\n", "cells.csv")
    assert peak_of_reading(cells) < 20 << 20
    lines = written(tmp_path, b'prompt,completion\na,b\n"open,' + b"\nxyz" * 5_000_000, "lines.csv")
    assert peak_of_reading(lines) < 20 << 20
    for path in (cells, lines):
        ((line, _, reason),) = problems(path)
        assert line == 3
        assert "the row is longer than 4 MB, or a quote in it is never closed; what follows" in reason


def peak_of_reading(path: Path) -> int:
    tracemalloc.start()
    try:
        assert len(list(read_file(path))) == 2
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_name_that_two_of_very_many_columns_have_is_found(tmp_path: Path) -> None:
    names = ",".join(f"{number}" for number in range(200_000))
    ((_, _, reason),) = problems(written(tmp_path, f"\n{names},199999\n".encode(), "rows.csv"))
    assert "two columns have the name '199999'" in reason


def test_a_parquet_file_without_rows_is_read_to_its_end(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "r.parquet", {"text": pyarrow.array([], pyarrow.string())})
    with pytest.raises(DataError, match="the file has no rows"):
        load_dataset(path, base_tokenizer(), recipe(), on_progress=lambda part: None)
