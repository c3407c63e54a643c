"""Files of training data: every format, every bad line with its number, and files that are none.

Tables as training data: CSV and Parquet, read row by row within bounds.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.training.data_support import base_tokenizer, chat, learned, problems, recipe, written

from onebase_training.data import files
from onebase_training.data.dataset import DataError, Problem
from onebase_training.data.files import read_file
from onebase_training.data.reader import load_dataset

GOOD = b'{"prompt": "q", "completion": " a"}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": NaN}', "NaN is not a JSON number"),
        (b'{"text": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"text": 1e999}', "1e999 is too large a number"),
        (b'{"text": "a", "text": "b"}', "the key 'text' occurs twice"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"a":' * 200_000, "nested too deep"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested too deep: at most 64 levels"),
        (b"[1]", "not a list"),
        (b'"text"', "not a text"),
        (b"null", "not null"),
        (b'{"text": "a"} {"text": "b"}', "extra data"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b'{"text": "a\nb"}', "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"text": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"text": "' + b"x" * (5 << 20) + b'"}', "the line is longer than 4 MB"),
        (b"#!/usr/bin/env python", "not JSON"),
    ],
    ids=range(17),
)
def test_a_bad_line_is_told_with_its_number_and_the_others_are_read(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = written(tmp_path, b"\n".join([GOOD, b"", line, GOOD, b'{"nothing": 1}']))
    found = problems(path)
    last = 4 + line.count(b"\n") + 1
    assert found[0][0] == 3
    assert reason in found[0][2]
    assert found[-1][0] == last
    assert "give messages" in found[-1][2]


def test_a_line_as_long_as_may_be_is_read_and_so_is_the_next_one(tmp_path: Path) -> None:
    long = b'{"text": "' + b"x" * (files.MOST_LINE_BYTES - 12) + b'"}'
    assert len(long) == files.MOST_LINE_BYTES
    path = tmp_path / "rows.jsonl"
    path.write_bytes(long + b"\n" + b'{"text": "second"}\n' + b"{\n")
    rows = list(read_file(path))
    assert [getattr(row, "line", None) for row in rows] == [1, 2, 3]
    assert [isinstance(row, Problem) for row in rows] == [False, False, True]


def test_every_bad_line_is_in_the_error_and_the_first_20_in_its_text(tmp_path: Path) -> None:
    path = written(tmp_path, b"\n".join([GOOD, *[b"{}"] * 30]))
    with pytest.raises(DataError) as caught:
        load_dataset(path, base_tokenizer(), recipe())
    assert [each.line for each in caught.value.problems] == list(range(2, 32))
    assert "30 problems" in str(caught.value)
    assert "line 21:" in str(caught.value)
    assert "line 22:" not in str(caught.value)
    assert "and 10 more" in str(caught.value)


def test_bom_crlf_and_empty_lines_are_no_matter(tmp_path: Path) -> None:
    path = written(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n   \n" + GOOD)
    assert [row.line for row in load_dataset(path, base_tokenizer(), recipe()).rows] == [1, 4]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.txt", GOOD, "must end in .jsonl"),
        ("rows", GOOD, "must end in .jsonl"),
        ("rows.pkl", b"\x80\x04K\x01.", "must end in .jsonl"),
        ("rows.py", b"print()", "must end in .jsonl"),
        ("rows.jsonl", gzip.compress(GOOD, mtime=0), "compressed (gzip): unpack it first"),
        ("rows.csv", b"PK\x03\x04" + bytes(30), "ZIP file"),
        ("rows.jsonl", b"PAR1" + bytes(30), "Parquet file: name it .parquet"),
        ("rows.jsonl", GOOD.decode().encode("utf-16"), "UTF-16: save it as UTF-8"),
        ("rows.jsonl", b"\x7fELF\0\0", "binary file"),
        ("rows.jsonl", b"", "the file has no rows"),
        ("rows.jsonl", b"\n\n", "the file has no rows"),
        ("rows.json", b"[]", "the file has no rows"),
        ("rows.csv", b"prompt,completion\n", "the file has no rows"),
        ("rows.csv", b"prompt,prompt\na,b\n", "two columns have the name 'prompt'"),
        ("rows.csv", "question;r\xe9ponse\nA;B\n".encode("latin-1"), "not UTF-8: save the file as UTF-8"),
        ("rows.parquet", GOOD, "not a Parquet file"),
        ("rows.parquet", b"PAR1" + bytes(100) + b"PAR1", "not a sound Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_as_a_whole(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (found,) = problems(written(tmp_path, content, name))
    assert found[0] in (0, 1)
    assert reason in found[2]


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert "No such file" in problems(tmp_path / "no.jsonl")[0][2]
    (tmp_path / "folder.jsonl").mkdir()
    assert "this is a folder" in problems(tmp_path / "folder.jsonl")[0][2]


def test_an_upload_is_read_by_the_name_it_came_with(tmp_path: Path) -> None:
    path = written(tmp_path, b"prompt,completion\nq,a\n", "file-1234")
    assert len(load_dataset(path, base_tokenizer(), recipe(), name="rows.csv")) == 1
    with pytest.raises(DataError, match="must end in"):
        load_dataset(path, base_tokenizer(), recipe(), name="rows.exe")


def test_a_json_list_gives_each_row_the_line_on_which_it_begins(tmp_path: Path) -> None:
    text = '[\n  {"prompt": "q",\n   "completion": " a"},\n\n  {}, {"text":\n 1}\n]\n'
    found = problems(written(tmp_path, text.encode(), "rows.json"))
    assert [(line, field) for line, field, _ in found] == [(5, ""), (5, "text")]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[{"text": "a"}\n{"text": "b"}]', 2),
        ('[{"text": "a"},\n]', 2),
        ('[{"text": "a"}]\nx', 2),
        ('[{"text": "a"},\n{"text": NaN}]', 2),
        ('[{"text": "a"}', 1),
    ],
)
def test_a_broken_json_list_is_told_with_the_line(tmp_path: Path, text: str, line: int) -> None:
    assert [found[0] for found in problems(written(tmp_path, text.encode(), "rows.json"))] == [line]


def test_a_json_file_may_be_json_lines_or_one_object(tmp_path: Path) -> None:
    lines = written(tmp_path, GOOD + b"\n" + GOOD, "rows.json")
    assert [row.line for row in load_dataset(lines, base_tokenizer(), recipe()).rows] == [1, 2]
    one = written(tmp_path, json.dumps(chat("q", "a"), indent=2).encode(), "one.json")
    assert len(load_dataset(one, base_tokenizer(), recipe())) == 1


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    content=st.binary(max_size=200) | st.text(max_size=100).map(str.encode),
    suffix=st.sampled_from([".jsonl", ".json", ".csv"]),
)
def test_any_bytes_give_records_or_problems_and_nothing_else(
    tmp_path: Path, content: bytes, suffix: str
) -> None:
    path = written(tmp_path, content, f"any{suffix}")
    lines = content.count(b"\n") + content.count(b"\r") + 1
    with contextlib.suppress(DataError):
        for item in read_file(path):
            assert 1 <= item.line <= lines
            assert isinstance(item, Problem | files.Record)


def test_progress_grows_to_1_and_may_end_the_reading(tmp_path: Path) -> None:
    path = written(tmp_path, b"\n".join([GOOD] * 500))
    told: list[float] = []
    load_dataset(path, base_tokenizer(), recipe(), on_progress=told.append)
    assert told == sorted(told)
    assert told[0] < 0.1 < 0.9 < told[-1] <= 1.0

    class StopError(Exception):
        pass

    def stop(_part: float) -> None:
        raise StopError

    with pytest.raises(StopError):
        load_dataset(path, base_tokenizer(), recipe(), on_progress=stop)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.json", "rows.csv", "rows.tsv"])
def test_an_empty_file_of_any_format_has_no_rows_and_is_read_to_its_end(tmp_path: Path, name: str) -> None:
    told: list[float] = []
    with pytest.raises(DataError, match="the file has no rows"):
        load_dataset(written(tmp_path, b"", name), base_tokenizer(), recipe(), on_progress=told.append)
    assert set(told) <= {1.0}


def test_a_deep_row_of_a_json_list_is_told_and_the_rows_after_it_are_read(tmp_path: Path) -> None:
    deep = b'{"text": ' + b"[" * 64 + b"]" * 64 + b"}"
    path = written(tmp_path, b"[" + GOOD + b",\n" + deep + b",\n{}]", "rows.json")
    found = problems(path)
    assert [line for line, _, _ in found] == [2, 3]
    assert "at most 64 levels" in found[0][2]


def test_the_key_that_occurs_twice_is_found_among_very_many(tmp_path: Path) -> None:
    keys = ",".join(f'"{number}":1' for number in range(200_000))
    (found,) = problems(written(tmp_path, f'{{{keys},"199999":1}}'.encode()))
    assert "the key '199999' occurs twice" in found[2]


def test_a_name_and_a_field_that_are_no_unicode_are_told_so_that_they_can_be_encoded(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/donn\xe9es.jsonl"))
    path.write_bytes(GOOD)
    dataset = load_dataset(path, base_tokenizer(), recipe())
    assert dataset.source == "donn\\udce9es.jsonl"
    error = DataError(path.name, [Problem(1, "r\udce9ponse", "\udce9 is no text")])
    assert (error.source, error.problems[0].field) == ("donn\\udce9es.jsonl", "r\\udce9ponse")
    assert str(error).encode()


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
    assert found == [(1, "text", "must be a text, not dict")]
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


def test_a_small_parquet_file_that_unfolds_to_100_gb_is_refused_before_its_rows_are_read(
    tmp_path: Path,
) -> None:
    path = bomb(tmp_path / "long.parquet", 1 << 20, 100_000)
    chunk = parquet.ParquetFile(path).metadata.row_group(0).column(0)
    assert path.stat().st_size < 1 << 20
    assert chunk.total_uncompressed_size < 2 << 20  # what it declares is no more than the one text
    read: list[object] = []
    with pytest.raises(
        DataError, match=r"it unfolds to over 64 MB, the most .*: split it into several files"
    ):
        read.extend(read_file(path))
    assert read == []


def test_texts_that_repeat_the_beginning_of_the_one_before_are_bounded_too(tmp_path: Path) -> None:
    path = tmp_path / "prefixes.parquet"
    table = pyarrow.table({"text": ["y" * (1 << 20)] * 500})
    parquet.write_table(table, path, use_dictionary=False, column_encoding="DELTA_BYTE_ARRAY")
    assert path.stat().st_size < 1 << 20
    with pytest.raises(DataError, match="it unfolds to over 64 MB"):
        list(read_file(path))


def test_a_parquet_file_is_refused_by_what_it_declares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plain.parquet"
    parquet.write_table(
        pyarrow.table({"text": ["z" * (1 << 20)] * 100}), path, use_dictionary=False, compression="zstd"
    )
    monkeypatch.setattr(files, "_ROWS_A_BATCH", "never read")
    with pytest.raises(DataError, match="it declares over 64 MB"):
        list(read_file(path))
    one_row = pyarrow.ListArray.from_arrays(
        pyarrow.array([0, 50_000_000], pyarrow.int32()), pyarrow.nulls(50_000_000)
    )
    path = write_parquet(tmp_path / "values.parquet", {"messages": one_row})
    with pytest.raises(DataError, match="it declares over 64 MB"):
        list(read_file(path))


def test_a_parquet_file_with_more_rows_than_it_says_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bomb(tmp_path / "many.parquet", 10, 100_000)
    monkeypatch.setattr(files, "MOST_ROWS", 50)
    with pytest.raises(DataError, match="100000 rows are too many: at most 50 are read; split it"):
        list(read_file(path))
    whole = path.read_bytes()
    footer = whole[-8 - int.from_bytes(whole[-8:-4], "little") :]
    said = b"\xc0\x9a\x0c"  # 100,000 as Thrift writes it: first as the rows of the file, then of its group
    path.write_bytes(whole.removesuffix(footer) + footer.replace(said, b"\x82\x80\x00", 1))
    assert parquet.ParquetFile(path).metadata.num_rows == 1
    with pytest.raises(DataError, match="100000 rows are too many"):
        list(read_file(path))


def test_a_parquet_row_or_all_rows_together_may_be_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "long.parquet", {"text": ["x" * (5 << 20)]})
    assert "row 1 is longer than 4 MB" in problems(path)[0][2]
    monkeypatch.setattr(files, "MOST_PARQUET_BYTES", 10 << 20)
    with pytest.raises(DataError, match="it unfolds to over 10 MB"):
        list(read_file(bomb(tmp_path / "many.parquet", 1 << 20, 50)))
    words = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 50, pyarrow.int32()), ["x" * (1 << 20)])
    one = pyarrow.ListArray.from_arrays(pyarrow.array([0, 50], pyarrow.int32()), words)
    with pytest.raises(DataError, match="it unfolds to over 10 MB"):
        list(read_file(write_parquet(tmp_path / "one.parquet", {"messages": one})))


def test_a_parquet_file_that_takes_too_long_to_unfold_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_COUNTING_SECONDS", 0)
    path = write_parquet(tmp_path / "r.parquet", {"text": ["x"]})
    with pytest.raises(DataError, match="unfolding it takes over 0 seconds of the processor: split it"):
        list(read_file(path))


def test_the_reading_of_parquet_has_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PARQUET_MEMORY", 2 << 30)
    lists = [["x" * (30 << 20)]]
    path = tmp_path / "deep.parquet"
    column = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 500, pyarrow.int32()), pyarrow.array(lists[0])
    )
    row = pyarrow.ListArray.from_arrays(pyarrow.array([0, 500], pyarrow.int32()), column)
    parquet.write_table(pyarrow.table({"messages": row}), path)
    with pytest.raises(DataError, match=r"unfolds to (more|over)|not a sound Parquet|damaged"):
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
