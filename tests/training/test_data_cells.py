"""Cells of tables that hold JSON: messages where they are meant, and texts where they are not."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from tests.training.data_support import (
    BAD,
    CHATML_TOOLS,
    GOOD,
    USER,
    base_tokenizer,
    learned,
    only,
    problems,
    recipe,
    whole,
    write_rows,
    written,
)

from onebase_adapters.training.data.reader import load_dataset


def test_a_completion_that_is_json_stays_the_text_it_is(tmp_path: Path) -> None:
    texts = [
        '[{"function": "f", "arguments": {}}]',
        '[{"role": "user", "content": "hi"}]',
        '{"messages": []}',
    ]
    rows = [{"prompt": "Give JSON: ", "completion": text} for text in texts]
    tables = [written(tmp_path, csv_of(rows).encode(), "r.csv"), write_rows(tmp_path / "r.jsonl", rows)]
    for path in tables:
        dataset = load_dataset(path, base_tokenizer(), recipe())
        assert [whole(row, base_tokenizer()) for row in dataset.rows] == [
            f"Give JSON: {text}<|im_end|>" for text in texts
        ]
    pair = {"prompt": "[Be brief] Who?", "chosen": '[{"role": "admin"}]', "rejected": "[]"}
    dataset = load_dataset(
        written(tmp_path, csv_of([pair]).encode(), "p.csv"), base_tokenizer(), recipe(method="dpo")
    )
    assert whole(dataset.rows[0].chosen, base_tokenizer()).endswith('Who?[{"role": "admin"}]<|im_end|>')  # type: ignore[union-attr]


def test_messages_and_tools_may_be_json_text_in_json_files_too(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    written_out = {"messages": [USER, GOOD], "tools": tools}
    as_text = {key: json.dumps(value) for key, value in written_out.items()}
    dataset = load_dataset(
        write_rows(tmp_path / "r.jsonl", [written_out, as_text]), base_tokenizer(CHATML_TOOLS), recipe()
    )
    first, second = (whole(row, base_tokenizer(CHATML_TOOLS)) for row in dataset.rows)
    assert first == second
    path = write_rows(tmp_path / "bad.jsonl", [{"messages": [USER, GOOD], "tools": "f, g"}])
    assert problems(path)[0][:2] == (1, "tools")


def test_the_input_of_a_preference_may_be_json_text_and_that_of_an_instruction_stays_one(
    tmp_path: Path,
) -> None:
    asked = json.dumps({"messages": [USER], "tools": "[]"})
    pair = {"input": asked, "preferred_output": [GOOD], "non_preferred_output": json.dumps([BAD])}
    path = write_rows(tmp_path / "p.jsonl", [pair, {**pair, "input": {"messages": [USER], "tools": "[]"}}])
    dataset = load_dataset(path, base_tokenizer(), recipe(method="dpo"))
    assert [learned(row.rejected, base_tokenizer()) for row in dataset.rows] == ["bad<|im_end|>"] * 2  # type: ignore[union-attr]
    rows = [{"instruction": "Summarize.", "input": asked, "output": "x"}]
    for table in (csv_of(rows).encode(), json.dumps(rows[0]).encode()):
        path = written(tmp_path, table, "i.csv" if table.startswith(b"instr") else "i.jsonl")
        assert asked in whole(only(load_dataset(path, base_tokenizer(), recipe())), base_tokenizer())


def test_json_text_of_messages_with_a_role_that_is_none_is_not_learned_as_text(tmp_path: Path) -> None:
    told = [json.dumps([{"role": "human", "content": text}]) for text in ("q", "a")]
    path = write_rows(tmp_path / "r.jsonl", [{"prompt": told[0], "completion": told[1]}])
    assert "role" in problems(path)[0][1]


def csv_of(rows: list[dict[str, str]]) -> str:
    out = io.StringIO()
    table = csv.DictWriter(out, list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    return out.getvalue()


def test_cells_hold_messages_where_every_element_is_one(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    rows = [
        {"prompt": [USER], "completion": [GOOD]},
        {"prompt": [USER, {"role": "assistant", "tool_calls": [call]}, USER], "completion": [GOOD]},
    ]
    cells = [{key: json.dumps(value) for key, value in row.items()} for row in rows]
    path = written(tmp_path, csv_of(cells).encode(), "r.csv")
    dataset = load_dataset(path, base_tokenizer(CHATML_TOOLS), recipe())
    assert [learned(row, base_tokenizer()) for row in dataset.rows] == ["good<|im_end|>"] * 2
    tools = '[{"type": "function", "function": {"name": "f"}}]'
    table = csv_of([{"messages": json.dumps([USER, GOOD]), "tools": tools}])
    dataset = load_dataset(written(tmp_path, table.encode(), "t.csv"), base_tokenizer(CHATML_TOOLS), recipe())
    assert '"name": "f"' in whole(only(dataset), base_tokenizer())
    pairs = csv_of(
        [{"prompt": json.dumps([USER]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])}]
    )
    dataset = load_dataset(written(tmp_path, pairs.encode(), "p.csv"), base_tokenizer(), recipe(method="dpo"))
    assert learned(dataset.rows[0].rejected, base_tokenizer()) == "bad<|im_end|>"  # type: ignore[union-attr]
    assert problems(written(tmp_path, b'messages\n"[{"\n', "b.csv"))[0][:2] == (2, "messages")
