"""Holding rows out, and what a report says: duplicates, leakage, lengths, examples, on any terminal."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.training.data_support import (
    THINKING,
    Load,
    base_tokenizer,
    chat,
    problems,
    recipe,
    rows_loader,
    written,
)

from onebase_training.cli.data import render
from onebase_training.data.dataset import Dataset, split
from onebase_training.data.reader import load_dataset
from onebase_training.data.report import DataReport, report


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return rows_loader(tmp_path)


def lines(dataset: Dataset) -> list[int]:
    return [row.line for row in dataset.rows]


def printed(made: DataReport, **settings: Any) -> str:
    out = io.StringIO()
    render(made, Console(file=out, width=100, **settings))
    return out.getvalue()


def test_held_out_rows_are_the_same_each_time_and_other_ones_by_another_seed(load: Load) -> None:
    dataset = load(*(chat(f"q{i}", f"a{i}") for i in range(50)))
    train, held = split(dataset, 0.2, seed=1)
    assert (len(train), len(held)) == (40, 10)
    assert sorted(lines(train) + lines(held)) == lines(dataset)
    assert lines(held) == sorted(lines(held))
    assert lines(split(dataset, 0.2, seed=1)[1]) == lines(held)
    assert lines(split(dataset, 0.2, seed=2)[1]) != lines(held)
    assert [prompt.line for prompt in held.prompts] == lines(held)
    assert held.digest == split(dataset, 0.2, seed=1)[1].digest != train.digest


def test_at_most_the_limit_and_at_least_one_row_is_held_out(load: Load) -> None:
    dataset = load(*(chat(f"q{i}", f"a{i}") for i in range(20)))
    assert len(split(dataset, 0.9, 0, limit=3)[1]) == 3
    assert len(split(dataset, 0.001, 0)[1]) == 1
    assert len(split(dataset, 0.0, 0)[1]) == 0
    assert len(split(load(chat("q", "a")), 0.5, 0)[1]) == 0


def test_rows_that_say_the_same_stay_on_one_side(load: Load) -> None:
    rows = [chat(f"q {i % 10}", f"a{' ' * (i // 10)} {i % 10}") for i in range(40)]
    train, held = split(load(*rows), 0.3, 0)
    assert {line % 10 for line in lines(train)}.isdisjoint({line % 10 for line in lines(held)})
    assert len(held) == 12


def test_a_group_that_is_too_large_is_not_held_out_where_a_smaller_one_is_there(load: Load) -> None:
    dataset = load(*[chat("same", "same")] * 30, *(chat(f"q{i % 2}", "a") for i in range(10)), chat("q", "a"))
    for seed in range(8):
        train, held = split(dataset, 0.1, seed)
        assert 1 <= len(held) <= 4
        assert len(train) + len(held) == len(dataset)
    two = load(*[chat("same", "same")] * 30, *[chat("q", "a")] * 10)
    assert {len(split(two, 0.1, seed)[1]) for seed in range(8)} == {10}


def test_rows_on_one_line_are_told_apart(tmp_path: Path) -> None:
    rows = [chat(f"q{i}", f"a{i}") for i in range(40)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([*rows, rows[2]]))
    dataset = load_dataset(path, base_tokenizer(), recipe())
    train, held = split(dataset, 0.1, 0)
    assert (len(train), len(held), len(held.prompts)) == (37, 4, 4)
    made = report(dataset, held, base_tokenizer())
    assert (made.rows, made.duplicates, made.named_by) == (41, [(41, 3)], "row")
    assert len(made.leakage) == 4
    shown = printed(made)
    assert "rows.json: duplicates: row 41 repeats 3" in shown
    assert "row 21 ─" in printed(made, force_terminal=True, color_system=None)
    assert made.to_json()["named_by"] == "row"


def test_samples_of_one_row_stay_together_wherever_the_row_stands(tmp_path: Path) -> None:
    # A reply that the template rewrites once more follows makes a sample of its own.
    rows = [chat("q", f"<think>{i}</think>a", "r", f"<think>{i}</think>{i}") for i in range(20)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    tokenizer = base_tokenizer(THINKING)
    dataset = load_dataset(path, tokenizer, recipe())
    _, held = split(dataset, 0.2, 0)
    assert (len(dataset), len(held), len(held.prompts)) == (40, 8, 4)
    said = [re.findall("<think>(\\d+)", tokenizer.decode(row.ids)) for row in held.rows]  # type: ignore[union-attr]
    assert said[0::2] == said[1::2]


def test_a_bad_row_that_shares_its_line_is_told_by_number(tmp_path: Path) -> None:
    rows = json.dumps([chat("q", "a"), {"text": ""}, {}])
    found = problems(written(tmp_path, rows.encode(), "rows.json"))
    assert found[0] == (1, "text", "the text is empty (row 2)")
    assert found[1][2].endswith("(row 3)")
    alone = problems(written(tmp_path, b"\n\n" + json.dumps({"text": ""}).encode(), "rows.jsonl"))
    assert alone == [(3, "text", "the text is empty")]


def test_dropped_rows_are_told_with_the_rows_to_train_on(load: Load) -> None:
    rows = [*(chat(f"q{i}", "a") for i in range(10)), chat("q", "word " * 100)]
    dataset = load(*rows, max_length=60, too_long="drop")
    train, held = split(dataset, 0.2, 0)
    made = report(train, held, base_tokenizer())
    assert made.dropped == [11]
    assert made.evaluation is not None
    assert made.evaluation.dropped == []
    assert "rows.jsonl: dropped as too long: line 11" in printed(made)


def test_a_file_name_is_shown_as_it_is(load: Load) -> None:
    made = report(load(chat("q", "a"), name="[red]x\x1b[2J"), None, base_tokenizer())
    assert "[red]x\N{REPLACEMENT CHARACTER}[2J.jsonl" in printed(made)


def test_duplicates_are_told_with_the_line_that_they_repeat(load: Load) -> None:
    dataset = load(chat("q", "a b"), chat("q", "other"), chat(" q", "a\n b"), chat("q", "a b"))
    assert report(dataset, None, base_tokenizer()).duplicates == [(3, 1), (4, 1)]


def test_rows_that_are_in_the_evaluation_data_are_told_and_those_that_only_ask_the_same(load: Load) -> None:
    train = load(chat("q", "a"), chat("q", "b"), chat("r", "c"), {"text": "t u"}, name="train")
    held = load(chat("q", " a"), {"text": "t  u"}, name="held")
    made = report(train, held, base_tokenizer())
    assert made.leakage == [1, 4]
    assert made.same_prompt == [2]
    shown = printed(made)
    assert "train.jsonl: also in the evaluation data, which then proves nothing: lines 1, 4" in shown
    assert "the same prompt is in the evaluation data: line 2" in shown


def test_preferences_with_the_same_prompt_and_other_replies_are_no_duplicates(load: Load) -> None:
    rows = [{"prompt": "It is", "chosen": " a", "rejected": f" {c}"} for c in "bcb"]
    made = report(load(*rows, method="dpo"), None, base_tokenizer())
    assert (made.rows, made.samples, made.duplicates) == (3, 6, [(3, 1)])
    assert [(example.line, example.side) for example in made.examples][:2] == [(1, "chosen"), (1, "rejected")]


def test_counts_are_those_of_the_rows(load: Load) -> None:
    dataset = load(chat("q", "a"), chat("q", "long " * 50), max_length=60, too_long="truncate")
    made = report(dataset, None, base_tokenizer())
    lengths = [len(row) for row in dataset.rows]
    assert (made.tokens, made.longest, made.shortest) == (sum(lengths), max(lengths), min(lengths))
    assert made.supervised == sum(row.targets for row in dataset.rows)  # type: ignore[union-attr]
    assert made.truncated == [2]
    assert sum(count for _, _, count in made.histogram) == 2
    assert all(low <= high for low, high, _ in made.histogram)


def test_examples_put_together_are_the_row_with_what_is_learned(load: Load) -> None:
    made = report(load(chat("q", "a", "r", "b\nc")), None, base_tokenizer())
    (example,) = made.examples
    assert [text for text, learned in example.segments if learned] == ["a<|im_end|>", "b\nc<|im_end|>"]
    assert "".join(text for text, _ in example.segments) == base_tokenizer().apply_chat_template(
        chat("q", "a", "r", "b\nc")["messages"], tokenize=False
    )


def test_what_is_learned_is_marked_without_colours_and_coloured_with(load: Load) -> None:
    made = report(load(chat("q", "the reply")), None, base_tokenizer())
    plain = printed(made)
    assert "«the reply<|im_end|>»" in plain
    assert "\x1b" not in plain
    coloured = printed(made, force_terminal=True, color_system="standard")
    assert "\x1b[1;32m«the reply" in coloured


def test_the_text_of_a_row_cannot_move_the_cursor(load: Load) -> None:
    evil = "\x1b]0;title\x07\x1b[2Jno \u202eesrever [red]markup[/red]"
    shown = printed(report(load(chat(evil, evil)), None, base_tokenizer()))
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)
    assert "[red]markup[/red]" in shown


def test_a_terminal_without_unicode_gets_other_marks(load: Load) -> None:
    made = report(load(chat("q", "a"), chat("q", "a " * 40)), None, base_tokenizer())
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    render(made, Console(file=out, width=100))
    out.flush()
    assert b">>a<|im_end|><<" in out.buffer.getvalue()  # type: ignore[attr-defined]


def test_a_long_row_is_shown_without_its_middle_and_the_report_is_json(load: Load) -> None:
    made = report(load(chat("q", "word " * 1000)), load(chat("q", "a"), name="held"), base_tokenizer())
    plain = json.loads(json.dumps(made.to_json()))
    text = "".join(each["text"] for each in plain["examples"][0]["segments"])
    assert len(text) < 2000
    assert "characters ...]" in text
    assert plain["supervised_tokens"] == made.supervised
    assert plain["counts"]["same_prompt"] == 1
    assert plain["evaluation"]["rows"] == 1
