"""Files of rows as the client reads them: problems of shape before a file is sent, and held-out prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onebase._core.rows import (
    MOST_PROBLEMS,
    AnswerComparison,
    ComparedAnswer,
    calls_text,
    held_out_rows,
    shape_problems,
)

HELLO = {"role": "assistant", "content": "Hello", "weight": 1}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, HELLO]}


def written(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    file = folder / name
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


@pytest.mark.parametrize(
    ("method", "row", "problem"),
    [
        ("supervised", CHAT, ""),
        ("supervised", {"messages": json.dumps(CHAT["messages"])}, ""),
        ("supervised", {"text": "all of it"}, ""),
        ("supervised", {"instruction": "a", "output": "b", "more": 1}, ""),
        ("supervised", {"prompt": "a", "answer": "b"}, "did you mean completion for answer?"),
        ("supervised", {"prompt": "a"}, "completion: missing"),
        ("supervised", {"conversations": []}, "messages: missing; did you mean messages for conversations?"),
        ("supervised", {"messages": CHAT["messages"][:1]}, "messages: there is no message of the assistant"),
        ("supervised", {"a": 1}, "the row has a; give messages, or prompt and completion, or"),
        ("supervised", "[1]", "it is not a JSON object"),
        ("supervised", "{", "it is not JSON"),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "c"}, ""),
        ("dpo", {"input": {}, "preferred_output": [], "non_preferred_output": []}, ""),
        ("dpo", {"prompt": "a", "chosen": "b"}, "rejected: missing"),
        ("classification", {"text": "a", "label": 0}, ""),
        ("classification", {"text": "a", "category": "x"}, "did you mean label for category?"),
    ],
)
def test_a_row_without_a_shape_of_the_method_is_a_problem(
    tmp_path: Path, method: str, row: Any, problem: str
) -> None:
    found = shape_problems(written(tmp_path, "", row), method)
    assert [one.line for one in found] == ([2] if problem else [])
    assert not found or problem in found[0].message


def test_problems_end_at_a_limit_and_other_formats_are_left_to_the_server(tmp_path: Path) -> None:
    assert len(shape_problems(written(tmp_path, *["{"] * 50), "supervised")) == MOST_PROBLEMS
    assert shape_problems(written(tmp_path, "a,b", name="rows.csv"), "supervised") == ()


def test_held_out_rows_are_prompts_without_the_reply(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"b": 1, "a": 2}'}}]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    file = written(
        tmp_path, CHAT, {"prompt": "one", "completion": " two"}, {"messages": CHAT["messages"][:1]},
        {"messages": [CHAT["messages"][0], call], "tools": tools}, {"prompt": "no reply"},
    )  # fmt: skip
    rows = held_out_rows(file)
    calls = calls_text([("f", {"a": 2, "b": 1})])
    assert [row.reference for row in rows] == ["Hello", " two", None, calls, None]
    assert [row.question for row in rows] == ["Hi", "one", "Hi", "Hi", "no reply"]
    assert rows[0].asked == {"messages": [{"role": "user", "content": "Hi"}]}
    assert rows[3].asked["tools"] == tools
    assert len(held_out_rows(file, limit=2)) == 2
    for bad in ({"label": 1}, {"messages": [CHAT["messages"][1]]}, "{"):
        with pytest.raises(ValueError, match="line 1"):
            held_out_rows(written(tmp_path, bad))
    with pytest.raises(ValueError, match="no rows"):
        held_out_rows(written(tmp_path, ""))


def test_answers_are_compared_with_each_other_and_with_the_replies() -> None:
    rows = (
        ComparedAnswer(1, "a", '{"x": 1}', '{"x": 1}', '{"x": 1} '),
        ComparedAnswer(2, "b", '{"x": 2}', '{"x": 2}', "two"),
        ComparedAnswer(3, "c", None, "p", "q"),
    )
    found = AnswerComparison("one", "two", rows)
    assert found.agreement == pytest.approx(1 / 3)
    assert (found.exact_match_a, found.exact_match_b) == (1.0, 0.5)
    assert (found.json_valid_a, found.json_valid_b) == (1.0, 0.5)
    assert [row.line for row in found.differing] == [2, 3]
    none = AnswerComparison("one", "two", rows[2:])
    assert (none.exact_match_a, none.json_valid_a, none.agreement) == (None, None, 0.0)
