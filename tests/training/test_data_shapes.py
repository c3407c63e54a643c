"""The shapes of rows: what each is taken for, and what is said about those that are none."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from tests.training.data_support import base_tokenizer, chat, learned, only, recipe, whole, write_rows

from onebase_adapters.training.conversation import Chat, Choice, Text, parse_row
from onebase_adapters.training.data import DataError, load_dataset
from onebase_adapters.training.data_json import Record, json_array
from onebase_adapters.training.data_problems import RowError
from onebase_adapters.training.samples import Preference

USER = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}


def refused(row: dict[str, Any], method: Any = "supervised") -> tuple[str, str]:
    with pytest.raises(RowError) as caught:
        parse_row(row, method)
    return caught.value.field, caught.value.reason


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


CHATS = Choice(Chat([USER, GOOD], None, [1]), Chat([USER, BAD], None, [1]))
TEXTS = Choice(Text("The sky is", " blue"), Text("The sky is", " green"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, CHATS),
        ({"prompt": "q", "chosen": [GOOD], "rejected": [BAD]}, CHATS),
        ({"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHATS),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHATS),
        (
            {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            CHATS,
        ),
        ({"prompt": "The sky is", "chosen": " blue", "rejected": " green"}, TEXTS),
        ({"prompt": "The sky is", "chosen": "The sky is blue", "rejected": "The sky is green"}, TEXTS),
        ({"chosen": "The sky is blue", "rejected": "The sky is green"}, TEXTS),
    ],
)
def test_every_spelling_of_a_preference_is_the_same_choice(row: dict[str, Any], expected: Choice) -> None:
    assert parse_row(row, "dpo") == expected


def test_the_shared_beginning_ends_before_the_word_in_which_two_texts_part() -> None:
    parsed = parse_row({"chosen": "It was green", "rejected": "It was great"}, "dpo")
    assert parsed == Choice(Text("It was", " green"), Text("It was", " great"))


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        (chat("q", "a"), "", "the method is dpo"),
        ({"prompt": "q", "chosen": [GOOD]}, "rejected", "missing"),
        ({"prompt": "q", "chosen": [GOOD], "rejected": [GOOD]}, "rejected", "the same as chosen"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "prompt", "begin differently"),
        ({"chosen": "a b", "rejected": "c d"}, "prompt", "begin differently"),
        ({"prompt": "q", "chosen": [USER], "rejected": [BAD]}, "chosen", "must be the assistant's reply"),
        ({"prompt": "q", "chosen": "a", "rejected": [BAD]}, "chosen", "a list of messages is wanted"),
        ({"input": [USER], "preferred_output": [GOOD], "non_preferred_output": [BAD]}, "input", "an object"),
        ({"preferred_output": [GOOD], "non_preferred_output": [BAD]}, "input", "missing"),
    ],
)
def test_a_preference_that_is_none_is_refused_by_field(row: dict[str, Any], field: str, reason: str) -> None:
    found = refused(row, "dpo")
    assert found[0] == field
    assert reason in found[1]


def test_both_sides_of_a_preference_begin_with_the_prompt_and_only_the_replies_are_learned(
    tmp_path: Path,
) -> None:
    rows = [
        {"prompt": [USER, BAD, USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "The sky is", "chosen": " blue", "rejected": " green"},
    ]
    tokenizer = base_tokenizer()
    dataset = load_dataset(write_rows(tmp_path / "r.jsonl", rows), tokenizer, recipe(method="dpo"))
    for row, prompt in zip(dataset.rows, dataset.prompts, strict=True):
        assert isinstance(row, Preference)
        assert row.chosen.ids[: len(prompt.ids)].tolist() == list(prompt.ids)
        assert row.rejected.ids[: len(prompt.ids)].tolist() == list(prompt.ids)
    first, second = dataset.rows
    assert isinstance(first, Preference)
    assert isinstance(second, Preference)
    assert learned(first.chosen, tokenizer) == "good<|im_end|>"
    assert learned(first.rejected, tokenizer) == "bad<|im_end|>"
    assert learned(second.rejected, tokenizer) == " green<|im_end|>"
    assert [prompt.reference for prompt in dataset.prompts] == ["good", " blue"]


def test_a_problem_of_one_side_names_the_side(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": [{**GOOD, "content": "<|im_end|>"}], "rejected": [BAD]}
    with pytest.raises(DataError) as caught:
        load_dataset(write_rows(tmp_path / "r.jsonl", [row]), base_tokenizer(), recipe(method="dpo"))
    assert caught.value.problems[0].field == "chosen messages[1].content"


def test_a_completion_that_is_json_stays_the_text_it_is(tmp_path: Path) -> None:
    row = {"prompt": "Give JSON: ", "completion": '[{"a": 1}]'}
    sample = only(load_dataset(write_rows(tmp_path / "r.jsonl", [row]), base_tokenizer(), recipe()))
    assert whole(sample, base_tokenizer()) == 'Give JSON: [{"a": 1}]<|im_end|>'


def test_the_examples_of_the_documentation_are_read_as_it_says() -> None:
    text = (Path(__file__).parents[2] / "docs" / "training-data.md").read_text()
    blocks = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    parsed = [
        parse_row(item.value, "dpo" if "chosen" in block else "supervised")
        for block in blocks
        for item in json_array(io.BytesIO(block.encode()), lambda _count: None, "docs")
        if isinstance(item, Record)
    ]
    assert [type(row).__name__ for row in parsed] == ["Chat", "Text", "Chat", "Text", *["Choice"] * 4]
