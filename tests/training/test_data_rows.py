"""The shapes of rows: what each is taken for, and what is said about those that are none.

Rows of preferences: every way to write one, and where its prompt ends.

Cells of tables that hold JSON: messages where they are meant, and texts where they are not.
"""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.training.data_support import (
    BAD,
    CHATML_TOOLS,
    GOOD,
    LLAMA_3,
    SYSTEM,
    USER,
    base_tokenizer,
    chat,
    learned,
    only,
    problems,
    recipe,
    refused,
    whole,
    write_rows,
    written,
)

from onebase_training.data.dataset import Chat, DataError, Preference, PreferencePair, Text
from onebase_training.data.files import Record, json_array
from onebase_training.data.reader import load_dataset
from onebase_training.data.rows import parse_row


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
    odd = [{"type": "text", "text": "a"}, {"type": "odd", "text": "b"}]
    assert refused({"messages": [{"role": "user", "content": odd}, GOOD]}) == (
        "messages[0].content[1]",
        "only parts of type text, each with a text, can be learned",
    )


@pytest.mark.parametrize(
    ("kind", "what"),
    [("image_url", "an image (image_url)"), ("input_audio", "sound"), ("file", "a file"), (["x"], "only")],
)
def test_parts_that_are_no_text_are_refused_with_what_to_do(kind: Any, what: str) -> None:
    content = [{"type": "text", "text": "What is it?"}, {"type": kind, "image_url": {"url": "data:..."}}]
    field, reason = refused({"messages": [{"role": "user", "content": content}, GOOD]})
    assert field == "messages[0].content[1]"
    assert reason.startswith(what)
    assert isinstance(kind, list) or "leave the row out" in reason


WEATHER = {
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
OLD_CALL = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
CALL = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "get_weather", "arguments": {"city": "Oslo"}},
}


def openai_rows() -> tuple[dict[str, Any], dict[str, Any]]:
    """The same conversation as OpenAI wrote it first, and as it writes it now."""
    old = {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "function_call": OLD_CALL},
            {"role": "function", "name": "get_weather", "content": "rain"},
            {**GOOD, "weight": 1},
        ],
        "functions": [WEATHER],
    }
    new = {
        "messages": [
            USER,
            {"role": "assistant", "tool_calls": [{**CALL, "function": OLD_CALL}]},
            {"role": "tool", "name": "get_weather", "content": "rain", "tool_call_id": "call00001"},
            GOOD,
        ],
        "tools": [{"type": "function", "function": WEATHER}],
        "parallel_tool_calls": False,
    }
    return old, new


def test_functions_and_function_call_are_read_as_the_tools_and_calls_that_replaced_them(
    tmp_path: Path,
) -> None:
    old, new = openai_rows()
    parsed = parse_row(old, "supervised")
    assert parsed == parse_row(new, "supervised")
    assert isinstance(parsed, Chat)
    assert parsed.messages[1]["tool_calls"] == [CALL]
    dataset = load_dataset(write_rows(tmp_path / "r.jsonl", [old, new]), base_tokenizer(), recipe())
    one, other = (row.samples[0] for row in dataset.rows)
    assert one.ids.tolist() == other.ids.tolist()
    assert "get_weather" in learned(dataset.rows[0], base_tokenizer())


def test_functions_are_read_in_a_preference_too() -> None:
    old, _ = openai_rows()
    call = old["messages"][1]
    row = {
        "input": {"messages": [USER], "functions": [WEATHER], "parallel_tool_calls": True},
        "preferred_output": [call],
        "non_preferred_output": [GOOD],
    }
    parsed = parse_row(row, "dpo")
    assert isinstance(parsed, PreferencePair)
    assert isinstance(parsed.chosen, Chat)
    assert parsed.chosen.tools == [{"type": "function", "function": WEATHER}]
    assert parsed.chosen.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"functions": {}}, "functions"),
        ({"functions": [{"type": "function", "function": WEATHER}]}, "functions[0]"),
        ({"tools": [{"type": "function", "function": WEATHER}]}, "functions"),
        ({"messages": [{**USER, "function_call": OLD_CALL}, GOOD]}, "messages[0].function_call"),
        ({"messages": [USER, {**GOOD, "function_call": "f"}]}, "messages[1].function_call"),
        ({"messages": [USER, {**GOOD, "function_call": {}}]}, "messages[1].function_call"),
        (
            {"messages": [USER, {**GOOD, "function_call": OLD_CALL, "tool_calls": [CALL]}]},
            "messages[1].function_call",
        ),
        (
            {"messages": [USER, {**GOOD, "function_call": {"name": "f", "arguments": "{"}}]},
            "messages[1].function_call.arguments",
        ),
    ],
)
def test_functions_and_calls_that_cannot_be_read_are_refused_by_field(
    change: dict[str, Any], field: str
) -> None:
    assert refused({**openai_rows()[0], **change})[0] == field


def test_functions_that_a_shape_does_not_read_would_be_lost() -> None:
    assert refused({"text": "a", "functions": [WEATHER]})[0] == "functions"


def test_a_refusal_is_learned_as_the_reply_that_it_is() -> None:
    no = {"role": "assistant", "content": None, "refusal": "I cannot help with that."}
    parsed = parse_row({"messages": [USER, no]}, "supervised")
    assert isinstance(parsed, Chat)
    assert parsed.messages[1] == {"role": "assistant", "content": "I cannot help with that."}


def test_prompts_for_graders_are_refused_with_what_to_do() -> None:
    field, reason = refused({"messages": [USER], "reference_answer": "7"})
    assert field == "messages"
    assert "Add the reply to learn" in reason


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({}, "", "the row has nothing; give messages"),
        ({"question": "a", "answer": "b"}, "", "the row has question, answer; give messages"),
        ({"conversations": []}, "", "write it as messages"),
        ({"chosen": "a", "rejected": "b"}, "", "set method to dpo"),
        ({"messages": "hi"}, "messages", "must be a list of messages"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": ["hi"]}, "messages[0]", "an object with role and content"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "missing"),
        ({"messages": [{"role": "human", "content": "a"}]}, "messages[0].role", "'human' is not a role"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role", "is not a role"),
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
        ({"prompt": "a", "answer": "b"}, "completion", "missing; did you mean completion for answer?"),
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
        ({"prompt": "q", "completion": " a", "tools": [{}]}, "tools", "give the row as messages"),
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
    assert parsed == Chat([told | {"role": "system"}, USER, GOOD], None, [2])


def test_an_empty_list_of_tool_calls_is_none() -> None:
    messages = [{**USER, "tool_calls": []}, {**GOOD, "tool_calls": []}, {**USER, "tool_calls": None}, GOOD]
    assert parse_row({"messages": messages}, "supervised") == Chat([USER, GOOD, USER, GOOD], None, [1, 3])
    assert refused({"messages": [USER, {"role": "assistant", "tool_calls": []}]})[0] == "messages[1].content"


def test_the_examples_of_the_documentation_are_read_as_it_says() -> None:
    text = (Path(__file__).parents[2] / "docs" / "training-data.md").read_text()
    blocks = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    parsed = [
        parse_row(
            item.value,
            "dpo" if "chosen" in block else "classification" if '"label"' in block else "supervised",
        )
        for block in blocks
        for item in json_array(io.BytesIO(block.encode()), lambda _count: None, "docs")
        if isinstance(item, Record)
    ]
    told = [type(row).__name__ for row in parsed]
    assert told == ["Chat", "Text", "Chat", "Text", *["PreferencePair"] * 5, *["Labelled"] * 4]


CHATS = PreferencePair(Chat([USER, GOOD], None, [1]), Chat([USER, BAD], None, [1]))
BRIEF = PreferencePair(Chat([SYSTEM, USER, GOOD], None, [2]), Chat([SYSTEM, USER, BAD], None, [2]))
TEXTS = PreferencePair(Text("The sky is", " blue"), Text("The sky is", " green"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, CHATS),
        ({"prompt": "q", "chosen": [GOOD], "rejected": [BAD]}, CHATS),
        ({"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHATS),
        ({"prompt": "q\n", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHATS),
        ({"question": "q", "chosen": "good", "rejected": "bad"}, CHATS),
        ({"question": "q", "chosen": [GOOD], "rejected": [BAD]}, CHATS),
        ({"system": "Be brief.", "question": "q", "chosen": "good", "rejected": "bad"}, BRIEF),
        ({"prompt": "q", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, BRIEF),
        ({"prompt": [USER], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, BRIEF),
        ({"system": "Be brief.", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, BRIEF),
        ({"messages": [USER, GOOD], "prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHATS),
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
def test_every_spelling_of_a_preference_is_the_same_choice(
    row: dict[str, Any], expected: PreferencePair
) -> None:
    assert parse_row(row, "dpo") == expected


def test_the_shared_beginning_ends_before_the_word_in_which_two_texts_part() -> None:
    parsed = parse_row({"chosen": "It was green", "rejected": "It was great"}, "dpo")
    assert parsed == PreferencePair(Text("It was", " green"), Text("It was", " great"))


@pytest.mark.parametrize(
    ("prompt", "chosen", "replies"),
    [
        ("A", ("Apples are fruit", "A dog is one"), ("Apples are fruit", "A dog is one")),
        ("A dog", ("A dog barks", "A dog, no"), (" barks", ", no")),
        ("It is ", ("It is good", "It is bad"), ("good", "bad")),
        ("空は", ("空は青い", "空は赤い"), ("青い", "赤い")),
    ],
)
def test_a_text_prompt_is_taken_off_both_replies_where_a_word_ends(
    prompt: str, chosen: tuple[str, str], replies: tuple[str, str]
) -> None:
    parsed = parse_row({"prompt": prompt, "chosen": chosen[0], "rejected": chosen[1]}, "dpo")
    assert parsed == PreferencePair(Text(prompt, replies[0]), Text(prompt, replies[1]))


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        (chat("q", "a"), "", "the method is dpo"),
        ({"prompt": "q", "chosen": [GOOD]}, "rejected", "missing"),
        ({"prompt": "q", "chosen": [GOOD], "rejected": [GOOD]}, "rejected", "the same as chosen"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "prompt", "begin differently"),
        ({"chosen": "a b", "rejected": "c d"}, "prompt", "begin differently"),
        ({"prompt": "q", "chosen": [USER], "rejected": [BAD]}, "chosen", "must be the assistant's reply"),
        ({"prompt": "q", "chosen": "a", "rejected": [BAD]}, "chosen", "must be a list of messages"),
        ({"input": [USER], "preferred_output": [GOOD], "non_preferred_output": [BAD]}, "input", "an object"),
        ({"preferred_output": [GOOD], "non_preferred_output": [BAD]}, "input", "missing"),
        ({"promt": "q", "chosen": "a b", "rejected": "a c"}, "promt", "did you mean prompt?"),
        ({"system": "S", "chosen": [USER, GOOD], "rejected": [BAD]}, "prompt", "begin differently"),
        ({"input": "q", "chosen": "a b", "rejected": "a c"}, "input", "name it prompt"),
        ({"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "prompt", "leave prompt out"),
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
    calls = [{"function": {"name": "f", "arguments": {}}}]
    row = {"prompt": "q", "chosen": [{**GOOD, "tool_calls": calls}], "rejected": [BAD]}
    without_tools = base_tokenizer(LLAMA_3)
    with pytest.raises(DataError) as caught:
        load_dataset(write_rows(tmp_path / "r.jsonl", [row]), without_tools, recipe(method="dpo"))
    assert caught.value.problems[0].field == "chosen messages[1].tool_calls"


@pytest.mark.parametrize(
    "row",
    [
        {"question_id": 1, "prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
        {"question_en": "q", "prompts": 3, "prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
        {
            "messages": [USER, {"role": "assistant", "content": None}],
            "prompt": "q",
            "chosen": [GOOD],
            "rejected": [BAD],
        },
        {"question": "raw", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"question": {"id": 1}, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_columns_beside_a_preference_are_left_alone(row: dict[str, Any]) -> None:
    assert parse_row(row, "dpo") == PreferencePair(
        Chat([USER, GOOD], None, [1]), Chat([USER, BAD], None, [1])
    )


def test_a_system_message_beside_texts_makes_them_a_chat() -> None:
    row = {"system": SYSTEM["content"], "prompt": "q", "chosen": GOOD["content"], "rejected": BAD["content"]}
    sides = [Chat([SYSTEM, USER, reply], None, [2]) for reply in (GOOD, BAD)]
    assert parse_row(row, "dpo") == PreferencePair(*sides)


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
