"""Rows of preferences: every way to write one, and where its prompt ends."""

from __future__ import annotations

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

from onebase_adapters.training.data.conversation import Chat, Choice, Text
from onebase_adapters.training.data.dataset import Preference
from onebase_adapters.training.data.reader import DataError, load_dataset
from onebase_adapters.training.data.rows import parse_row

CHATS = Choice(Chat([USER, GOOD], None, [1]), Chat([USER, BAD], None, [1]))
BRIEF = Choice(Chat([SYSTEM, USER, GOOD], None, [2]), Chat([SYSTEM, USER, BAD], None, [2]))
TEXTS = Choice(Text("The sky is", " blue"), Text("The sky is", " green"))


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
def test_every_spelling_of_a_preference_is_the_same_choice(row: dict[str, Any], expected: Choice) -> None:
    assert parse_row(row, "dpo") == expected


def test_the_shared_beginning_ends_before_the_word_in_which_two_texts_part() -> None:
    parsed = parse_row({"chosen": "It was green", "rejected": "It was great"}, "dpo")
    assert parsed == Choice(Text("It was", " green"), Text("It was", " great"))


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
    assert parsed == Choice(Text(prompt, replies[0]), Text(prompt, replies[1]))


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
    row = {"prompt": "q", "chosen": [{**GOOD, "content": "<|im_end|>"}], "rejected": [BAD]}
    with pytest.raises(DataError) as caught:
        load_dataset(write_rows(tmp_path / "r.jsonl", [row]), base_tokenizer(), recipe(method="dpo"))
    assert caught.value.problems[0].field == "chosen messages[1].content"


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
    assert parse_row(row, "dpo") == Choice(Chat([USER, GOOD], None, [1]), Chat([USER, BAD], None, [1]))


def test_a_system_message_beside_texts_makes_them_a_chat() -> None:
    row = {"system": SYSTEM["content"], "prompt": "q", "chosen": GOOD["content"], "rejected": BAD["content"]}
    sides = [Chat([SYSTEM, USER, reply], None, [2]) for reply in (GOOD, BAD)]
    assert parse_row(row, "dpo") == Choice(*sides)
