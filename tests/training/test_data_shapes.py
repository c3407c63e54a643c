"""The shapes of rows: what each is taken for, and what is said about those that are none."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from tests.training.data_support import (
    BAD,
    GOOD,
    SYSTEM,
    USER,
    base_tokenizer,
    chat,
    learned,
    recipe,
    refused,
    write_rows,
)

from onebase_adapters.training.data.conversation import Chat, Text
from onebase_adapters.training.data.reader import load_dataset
from onebase_adapters.training.data.records import Record, json_array
from onebase_adapters.training.data.rows import parse_row


def test_instruction_and_input_become_one_question_and_the_output_its_reply() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "source": "book"}
    assert parse_row(row, "supervised") == Chat(
        [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}], None, [1]
    )
    bare = parse_row({"instruction": "Add.", "input": "", "output": "3", "system": "Be brief."}, "supervised")
    assert isinstance(bare, Chat)
    assert [message["content"] for message in bare.messages] == ["Be brief.", "Add.", "3"]


def test_prompt_and_completion_may_be_messages() -> None:
    row = {"prompt": [USER, BAD, USER], "completion": [GOOD]}
    assert parse_row(row, "supervised") == Chat([USER, BAD, USER, GOOD], None, [3])


def test_content_may_come_in_parts_of_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    parsed = parse_row({"messages": [{"role": "user", "content": parts}, GOOD]}, "supervised")
    assert isinstance(parsed, Chat)
    assert parsed.messages[0]["content"] == "ab"
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    assert refused({"messages": [{"role": "user", "content": image}, GOOD]}) == (
        "messages[0].content[0]",
        "only parts of type text, with a text, can be learned",
    )


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({}, "", "the row has nothing; wanted is messages"),
        ({"question": "a", "answer": "b"}, "", "the row has question, answer; wanted is messages"),
        ({"conversations": []}, "", "write it as messages"),
        ({"chosen": "a", "rejected": "b"}, "", "set method to dpo"),
        ({"messages": "hi"}, "messages", "a list of messages is wanted"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": ["hi"]}, "messages[0]", "an object with role and content"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "missing"),
        ({"messages": [{"role": "human", "content": "a"}]}, "messages[0].role", "'human' is no role"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role", "is no role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "not int"),
        ({"messages": [USER, {"role": "assistant", "content": "  "}]}, "messages[1].content", "empty"),
        ({"messages": [USER, {**GOOD, "weight": 2}]}, "messages[1].weight", "0 (not learned) or 1"),
        ({"messages": [USER, {**GOOD, "weight": True}]}, "messages[1].weight", "0 (not learned) or 1"),
        ({"messages": [{**USER, "weight": 1}, GOOD]}, "messages[0].weight", "only the assistant's"),
        ({"messages": [USER, {**GOOD, "weigth": 0}]}, "messages[1].weigth", "did you mean weight?"),
        ({"messages": [USER, GOOD], "tool": []}, "tool", "did you mean tools?"),
        ({"messages": [USER, GOOD], "tools": [{"name": "x"}]}, "tools[0]", "a tool is written"),
        ({"messages": [{**USER, "tool_calls": [{}]}]}, "messages[0].tool_calls", "only the assistant's"),
        (
            {"messages": [USER, {**GOOD, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages[1].tool_calls[0].function.arguments",
            "not JSON",
        ),
        ({"prompt": "a"}, "completion", "missing"),
        ({"completion": "a"}, "prompt", "missing"),
        ({"prompt": "a", "completion": ""}, "completion", "the text is empty"),
        ({"prompt": "a", "completion": [GOOD]}, "completion", "both texts or both lists"),
        ({"instruction": "a", "inputs": "b", "output": "c"}, "inputs", "did you mean input?"),
        ({"instruction": "a"}, "output", "missing"),
        ({"text": ""}, "text", "empty"),
        ({"text": ["a"]}, "text", "not list"),
    ],
)
def test_a_row_that_is_no_shape_is_refused_by_field(row: dict[str, Any], field: str, reason: str) -> None:
    found = refused(row)
    assert found[0] == field
    assert reason in found[1]


def test_rows_of_several_shapes_go_together(tmp_path: Path) -> None:
    rows = [
        chat("q", "a"),
        {"prompt": "q", "completion": " b"},
        {"instruction": "q", "output": "c"},
        {"text": "d e"},
    ]
    dataset = load_dataset(write_rows(tmp_path / "r.jsonl", rows), base_tokenizer(), recipe())
    assert [learned(row, base_tokenizer()) for row in dataset.rows] == [
        "a<|im_end|>",
        " b<|im_end|>",
        "c<|im_end|>",
        " e<|im_end|>",
    ]
    assert [prompt.line for prompt in dataset.prompts] == [1, 2, 3]
    assert [prompt.reference for prompt in dataset.prompts] == ["a", " b", "c"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, GOOD]},
        {"messages": [SYSTEM, USER, GOOD]},
        {"prompt": [USER], "completion": [GOOD]},
        {"instruction": "q", "output": "good"},
    ],
)
def test_a_system_field_comes_before_the_messages_of_any_chat(row: dict[str, Any]) -> None:
    parsed = parse_row({**row, "system": "Be brief."}, "supervised")
    assert parsed == Chat([SYSTEM, USER, GOOD], None, [2])
    assert len(parse_row({**row, "system": " "}, "supervised").messages) == len(row.get("messages", "12"))  # type: ignore[union-attr]


def test_tools_are_read_beside_an_instruction() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    parsed = parse_row({"instruction": "q", "output": "good", "tools": tools}, "supervised")
    assert parsed == Chat([USER, GOOD], tools, [1])


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"messages": [SYSTEM, USER, GOOD], "system": "Be long."}, "system", "have a system message already"),
        (
            {"prompt": "q", "completion": " a", "system": "Be brief."},
            "system",
            "would be lost",
        ),
        ({"prompt": "q", "completion": " a", "tools": [{}]}, "tools", "bring the row as messages"),
        ({"text": "a b", "system": "Be brief."}, "system", "put it into the prompt"),
    ],
)
def test_a_system_message_and_tools_are_not_lost_in_silence(
    row: dict[str, Any], field: str, reason: str
) -> None:
    found = refused(row)
    assert found[0] == field
    assert reason in found[1]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, GOOD], "prompt": "q\n", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"instruction": "q", "output": "good", "text": "### Instruction:\nq\n\n### Response:\ngood"},
        {"messages": [USER, GOOD], "tools": [], "input": "", "id": 7, "question": "what?"},
        {"messages": [USER, GOOD], "instruction": "Tr", "input": "Hello", "output": "good", "text": "else"},
        {"messages": [USER, GOOD], "prompt": "other", "completion": "else", "prompt_id": 3},
        {"instruction": "q", "output": "good", "text": "something else"},
    ],
)
def test_of_several_shapes_in_a_row_the_first_counts(row: dict[str, Any]) -> None:
    assert parse_row(row, "supervised") == Chat([USER, GOOD], None, [1])


@pytest.mark.parametrize(
    ("row", "reply"),
    [
        ({"input": "2+2?", "output": "4", "text": "Q: 2+2?\nA: 4"}, "Q: 2+2?\nA: 4"),
        ({"system": "Be brief.", "text": "<sys>Be brief.</sys> hi"}, "<sys>Be brief.</sys> hi"),
        ({"tools": "hammer, saw", "text": "a shed"}, "a shed"),
    ],
)
def test_columns_that_a_text_was_made_from_are_left_alone(row: dict[str, Any], reply: str) -> None:
    assert parse_row(row, "supervised") == Text(None, reply)


@pytest.mark.parametrize("own", ["Be brief.\n", "Be brief."])
@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_that_is_there_already_is_not_written_twice(own: str, role: str) -> None:
    told = {"role": role, "content": own}
    parsed = parse_row({"messages": [told, USER, GOOD], "system": "Be brief."}, "supervised")
    assert parsed == Chat([told, USER, GOOD], None, [2])


def test_an_empty_list_of_tool_calls_is_none() -> None:
    messages = [{**USER, "tool_calls": []}, {**GOOD, "tool_calls": []}, {**USER, "tool_calls": None}, GOOD]
    assert parse_row({"messages": messages}, "supervised") == Chat([USER, GOOD, USER, GOOD], None, [1, 3])
    assert refused({"messages": [USER, {"role": "assistant", "tool_calls": []}]})[0] == "messages[1].content"


def test_the_examples_of_the_documentation_are_read_as_it_says() -> None:
    text = (Path(__file__).parents[2] / "docs" / "training-data.md").read_text()
    blocks = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    parsed = [
        parse_row(item.value, "dpo" if "chosen" in block else "supervised")
        for block in blocks
        for item in json_array(io.BytesIO(block.encode()), lambda _count: None, "docs")
        if isinstance(item, Record)
    ]
    assert [type(row).__name__ for row in parsed] == ["Chat", "Text", "Chat", "Text", *["Choice"] * 5]
