"""What a batch reads and what it keeps: every bad line is told, and no kill loses or doubles an answer."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.disks import fill, small_disk

from onebase_server.batches import results as results_module
from onebase_server.batches.results import ERRORS, EXPIRED, OUTPUT, Result, Results, answered, unanswered
from onebase_server.batches.rows import (
    MAX_ERRORS,
    MAX_LINES,
    MAX_ROWS,
    BatchFileCheck,
    RowFile,
    check_batch_file,
)

URL = "/v1/chat/completions"
BATCH = "batch_0123456789abcdef01234567"


def line(custom_id: str = "a", **changes: Any) -> dict[str, Any]:
    row = {"custom_id": custom_id, "method": "POST", "url": URL, "body": {"model": "m"}, **changes}
    return {name: value for name, value in row.items() if value is not ...}


def written(path: Path, *lines: bytes | dict[str, Any]) -> Path:
    texts = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in lines]
    path.write_bytes(b"\n".join(texts))
    return path


def checked(path: Path, *lines: bytes | dict[str, Any]) -> BatchFileCheck:
    return check_batch_file(written(path, *lines), URL, 1000)


def test_good_lines_are_counted_and_read_as_they_were_written(tmp_path: Path) -> None:
    lines = [b"\xef\xbb\xbf" + json.dumps(line("a")).encode(), b"", b"  \r", line("b", body={"n": 1.0}), b""]
    path = written(tmp_path / "in.jsonl", *lines)

    found, rows = check_batch_file(path, URL, 1000), RowFile(path)

    assert (found.rows, found.problems) == (2, [])
    assert [rows.read(number).custom_id for number in range(len(rows))] == ["a", "b"]
    assert bytes(rows.read(1).body) == b'{"n": 1.0}'
    rows.close()


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"[1]", "invalid_json_line", None),
        (b'{"a": NaN}', "invalid_json_line", None),
        (b'{"a": 1, "a": 2}', "invalid_json_line", "a"),
        (b'{"a": ' + 400 * b"[" + 400 * b"]" + b"}", "missing_required_parameter", "custom_id"),
        (b'{"a": ' + 20_000 * b"[", "line_too_long", None),
        (b"\xff", "invalid_json_line", None),
        (b"x" * 20_000, "line_too_long", None),
        (line(custom_id=...), "missing_required_parameter", "custom_id"),
        (line(custom_id=""), "invalid_value", "custom_id"),
        (line(custom_id=7), "invalid_value", "custom_id"),
        (line(custom_id="x" * 513), "invalid_value", "custom_id"),
        (line(method="GET"), "invalid_method", "method"),
        (line(url="/v1/completions"), "invalid_url", "url"),
        (line(url=["/v1"]), "invalid_url", "url"),
        (line(body=...), "missing_required_parameter", "body"),
        (line(body=[]), "invalid_value", "body"),
        (line(body={"stream": True}), "invalid_value", "body.stream"),
        (line(more=1), "unknown_parameter", "more"),
        (line("good"), "duplicate_custom_id", "custom_id"),
    ],
)
def test_a_bad_line_is_told_with_its_number(
    tmp_path: Path, bad: bytes | dict[str, Any], code: str, param: str | None
) -> None:
    found = checked(tmp_path / "in.jsonl", line("good"), b"", bad, line("last"))

    (problem,) = found.problems
    assert (problem.line, problem.code, problem.param) == (3, code, param)
    assert problem.message.endswith(".")


def test_of_many_bad_lines_the_first_are_told_and_the_rest_counted(tmp_path: Path) -> None:
    problems = checked(tmp_path / "in.jsonl", *[b"{"] * (MAX_ERRORS + 7)).problems

    assert [problem.line for problem in problems[:-1]] == list(range(1, MAX_ERRORS + 1))
    assert problems[-1].code == "more_errors"
    assert problems[-1].message.startswith("7 more")


def test_a_file_without_rows_and_one_with_too_many_are_refused(tmp_path: Path) -> None:
    assert [one.code for one in checked(tmp_path / "none.jsonl", b"", b" ").problems] == ["empty_file"]
    many = checked(tmp_path / "many.jsonl", *(line(str(number)) for number in range(MAX_ROWS + 5)))
    assert [(one.code, one.line) for one in many.problems] == [("too_many_rows", MAX_ROWS + 1)]


def test_a_file_of_blank_lines_is_not_read_to_its_end(tmp_path: Path) -> None:
    blank = tmp_path / "blank.jsonl"
    blank.write_bytes(b"\n" * (MAX_LINES + 5))
    problems = check_batch_file(blank, URL, 1000).problems
    assert [(one.code, one.line) for one in problems] == [("too_many_lines", MAX_LINES + 1)]


def test_a_checked_file_has_the_same_rows_when_the_server_takes_shorter_bodies_by_now(tmp_path: Path) -> None:
    long = {"prompt": "x" * 20_000}
    path = written(tmp_path / "in.jsonl", line("a"), line("b", body=long), line("c"))
    assert check_batch_file(path, URL, 30_000).problems == []

    rows = RowFile(path)

    assert [rows.read(number).custom_id for number in range(len(rows))] == ["a", "b", "c"]
    assert json.loads(bytes(rows.read(1).body)) == long
    rows.close()


# ---- what is kept -------------------------------------------------------------------------------


def answer(number: int, status: int = 200) -> Result:
    usage = {"prompt_tokens": 10, "completion_tokens": number, "prompt_tokens_details": {"cached_tokens": 4}}
    body = (
        {"choices": [{"text": "line\nbreak"}], "usage": usage} if status == 200 else {"error": {"code": "x"}}
    )
    return answered(BATCH, number, f"id-{number}", status, "req", msgspec.json.encode(body))


def custom_ids(folder: Path) -> list[str]:
    texts = [(folder / name).read_text().splitlines() for name in (OUTPUT, ERRORS)]
    return [json.loads(text)["custom_id"] for lines in texts for text in lines]


def test_records_are_as_openai_s_and_their_tokens_are_summed(tmp_path: Path) -> None:
    results = Results(tmp_path, 4)
    results.append([answer(2), answer(0, 404), unanswered(BATCH, 3, "id-3", EXPIRED, "too late")])

    (good,) = map(json.loads, (tmp_path / OUTPUT).read_text().splitlines())
    bad, late = map(json.loads, (tmp_path / ERRORS).read_text().splitlines())
    assert list(good) == ["id", "custom_id", "response", "error"]
    assert list(good["response"]) == ["status_code", "request_id", "body"]
    assert good["error"] is None
    assert (bad["response"]["status_code"], bad["response"]["body"]) == (404, {"error": {"code": "x"}})
    assert (late["response"], late["error"]["code"]) == (None, EXPIRED)
    assert (results.completed, results.failed, results.expired) == (1, 2, True)
    assert results.usage == {"prompt": 10, "cached": 4, "completion": 2}
    assert list(results.left()) == [1]
    results.close()


@pytest.mark.parametrize(
    "body", [b"", b"Internal Server Error", b'{"a":\n1}', b'{"a":1}}', b"[" * 9999 + b"]" * 9999]
)
def test_an_answer_that_could_not_be_read_again_is_none(body: bytes) -> None:
    with pytest.raises((ValueError, RecursionError)):
        answered(BATCH, 0, "a", 200, "req", body)


@given(cut=st.integers(0, 400), junk=st.binary(max_size=60), failed=st.booleans())
def test_wherever_a_kill_cuts_a_record_the_whole_ones_count_and_the_rest_is_answered_again(
    tmp_path_factory: pytest.TempPathFactory, cut: int, junk: bytes, failed: bool
) -> None:
    folder = tmp_path_factory.mktemp("batch")
    results = Results(folder, 6)
    results.append([answer(4, 404 if failed else 200), answer(1), answer(3)])
    results.close()
    kept = (folder / OUTPUT).read_bytes()
    torn = answer(5).record[:cut]
    whole = torn.endswith(b"\n")
    (folder / OUTPUT).write_bytes(kept + torn + junk)

    again = Results(folder, 6)
    left = list(again.left())
    again.append([answer(number) for number in left])
    again.close()

    assert left == ([0, 2] if whole else [0, 2, 5])
    assert sorted(custom_ids(folder)) == [f"id-{number}" for number in range(6)]


def test_a_row_that_is_there_twice_is_kept_once(tmp_path: Path) -> None:
    results = Results(tmp_path, 3)
    results.append([answer(0), answer(1)])
    results.close()
    with (tmp_path / OUTPUT).open("ab") as file:
        file.write(answer(0).record)

    again = Results(tmp_path, 3)
    assert (again.completed, list(again.left())) == (2, [2])
    assert custom_ids(tmp_path) == ["id-0", "id-1"]
    again.close()


def test_a_group_that_a_full_disk_cuts_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 256 << 10) as disk:
        results = Results(disk / "batch", 3000)
        results.append([answer(number) for number in range(100)])
        before = (disk / "batch" / OUTPUT).read_bytes()
        filler = fill(disk)
        group = [answer(number) for number in range(100, 300)]

        with pytest.raises(OSError, match="No space") as raised:
            results.append(group)

        assert raised.value.errno == errno.ENOSPC
        assert (disk / "batch" / OUTPUT).read_bytes() == before
        assert results.completed == 100
        filler.unlink()
        results.append(group)
        results.close()
        assert custom_ids(disk / "batch") == [f"id-{number}" for number in range(300)]


def test_what_a_failed_write_could_not_cut_off_is_cut_off_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results(tmp_path, 4)
    results.append([answer(0)])

    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(results_module.os, "fsync", broken)
        patch.setattr(results_module.os, "ftruncate", broken)
        with pytest.raises(OSError, match="gone"):
            results.append([answer(1)])
    assert (tmp_path / OUTPUT).stat().st_size > len(answer(0).record)

    results.append([answer(2), answer(1)])
    results.close()
    assert custom_ids(tmp_path) == ["id-0", "id-2", "id-1"]
