"""Metrics on replies: what scores, what does not, and what is not a metric."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from onebase_training.checkpoint import doubts
from onebase_training.data.dataset import Dataset, PromptRow, RowPlace, Sample
from onebase_training.metrics import (
    METRICS,
    MetricError,
    automatic_metrics,
    check_metric,
    describe,
    mean,
    score,
)
from onebase_training.recipe import RecipeError, parse_recipe
from onebase_training.run import resolved

SCORES = [
    ("exact_match", " Berlin\n", "Berlin", 1),
    ("exact_match", "berlin", "Berlin", 0),
    ("json_valid", ' {"a": [1, null]}\n', "", 1),
    ("json_valid", '```json\n{"a": 1}\n```', "", 0),
    ("json_valid", '{"a": 1} and more', "", 0),
    ("json_valid", '{"a": 1, "a": 2}', "", 0),
    ("json_valid", "NaN", "", 0),
    ("json_valid", "", "", 0),
    ("json_valid", "[" * 100_000, "", 0),
    ("json_valid", '"\ud800"', "", 0),
    ("json_equal", '{"a": 1, "b": {"c": [1, 2]}}', '{"b":{"c":[1,2]},"a":1.0}', 1),
    ("json_equal", "[1, 2]", "[2, 1]", 0),
    ("json_equal", '{"a": true}', '{"a": 1}', 0),
    ("json_equal", '{"a": 0}', '{"a": false}', 0),
    ("json_equal", '{"a": 1}', '{"a": 1, "b": null}', 0),
    ("json_equal", "no json", "no json", 0),
    ("json_keys:a|b", '{"b": 1, "a": 2}', "", 1),
    ("json_keys:a|b", '{"a": 2}', "", 0),
    ("json_keys:a|b", '["a", "b"]', "", 0),
    ("contains:.*", "literal .* here", "", 1),
    ("contains:.*", "no pattern", "", 0),
    ("contains:a:b", "x a:b y", "", 1),
    ("lacks:sorry", "no excuse", "", 1),
    ("lacks:sorry", "I am sorry", "", 0),
    ("starts_with:Dear", "  Dear you", "", 1),
    ("starts_with:Dear", "My Dear", "", 0),
    ("ends_with:.", "Done.\n", "", 1),
    ("ends_with:.", "Done", "", 0),
    ("one_of:yes|no", "yes", "yes", 1),
    ("one_of:yes|no", "yes", "no", 0),
    ("one_of:yes|no", "no", "of course not", 1),
    ("one_of:yes|no", "perhaps", "perhaps", 0),
    ("one_of:very good|bad", " very good ", "very good", 1),
    ("max_characters:4", " four \n", "", 1),
    ("max_characters:4", "fives", "", 0),
    ("min_characters:4", "four", "", 1),
    ("min_characters:4", "   two", "", 0),
    ("word_f1", "a b c d", "b A x", 4 / 7),
    ("word_f1", "x", "y", 0),
    ("word_f1", "", "", 1),
]


@pytest.mark.parametrize(("name", "reply", "reference", "expected"), SCORES)
def test_a_reply_scores(name: str, reply: str, reference: str, expected: float) -> None:
    assert score(name, reply, reference) == pytest.approx(expected)


def test_every_metric_is_tested_and_described() -> None:
    assert {name.partition(":")[0] for name, *_ in SCORES} == set(METRICS)
    assert all(name in describe() for name in METRICS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("accuracy", ["'accuracy'", "exact_match", "one_of:A|B|C"]),
        ("", ["not a metric"]),
        ("exact_match:Berlin", ["just exact_match"]),
        ("contains:", ["contains:TEXT"]),
        ("contains", ["contains:TEXT"]),
        ("one_of:a||b", ["empty"]),
        ("max_characters:-1", ["whole number"]),
        ("max_characters:²", ["whole number"]),
        ("max_characters:99999999", ["7 digits"]),
    ],
)
def test_what_is_no_metric_is_refused_with_the_way_to_write_it(name: str, words: list[str]) -> None:
    for check in (
        check_metric,
        lambda name: score(name, "", ""),
        lambda name: parse_recipe({"metrics": [name or " "]}),
    ):
        with pytest.raises((MetricError, RecipeError)) as refusal:
            check(name)
        assert getattr(refusal.value, "field", "metrics") == "metrics"
        for word in words:
            assert word in str(refusal.value)


def test_a_recipe_refuses_an_unknown_metric() -> None:
    parse_recipe({"metrics": ["json_valid", "contains:a, b"], "best_by": "contains:a, b"})
    with pytest.raises(RecipeError, match="not a metric"):
        parse_recipe({"metrics": ["bleu"]})


@pytest.mark.parametrize(
    ("replies", "metrics"),
    [
        ([('{"a": 1}', 40), (' [1, {"b": 2}]\n', 30)], ("json_valid", "exact_match")),
        ([('{"a": 1}', 40), ("sorry, I cannot say this at all", 30)], ()),
        ([("refund", 1), ("delivery is late", 9), ("one two three four five six", 5)], ("exact_match",)),
        ([("7", 1), ("12", 1)], ("exact_match",)),
        ([("yes", 1), ("a reply that is longer than that", 6)], ()),
        ([('{"a": 1, "a": 2}', 9)], ("exact_match",)),
        ([], ()),
    ],
)
def test_json_and_short_replies_are_measured_without_being_asked(
    replies: list[tuple[str, int]], metrics: tuple[str, ...]
) -> None:
    assert automatic_metrics(replies) == metrics


def test_only_rows_that_are_measured_choose_the_metrics() -> None:
    rows = ['{"a": 1}', '{"a": 2}', "a text that is neither JSON nor as short as that"]
    read: list[str] = []

    def decode(ids: list[int]) -> str:
        read.append(rows[ids[0]])
        return read[-1]

    prompts = [
        PromptRow(
            Sample(np.array([number] * 9, np.int32), np.array([True] * 9), number),
            slice(1, 9),
            RowPlace(number, number),
            decode,
        )
        for number in range(len(rows))
    ]
    data: Any = SimpleNamespace(train=rows, given=3, held_out=Dataset([], prompts))
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=512))
    assert resolved(parse_recipe({"metric_rows": 2}), data, config).metrics == ("json_valid", "exact_match")
    assert read == rows[:2]
    assert resolved(parse_recipe({"metric_rows": 3}), data, config).metrics == ()


@pytest.mark.parametrize(
    ("better", "after", "warnings"),
    [
        (
            True,
            {"json_valid": 0.0, "exact_match": 0.0},
            ["none of its replies to held-out prompts is valid JSON"],
        ),
        (True, {"exact_match": 0.5}, ["exact_match is 50.0%; active has 75.0%"]),
        (True, {"exact_match": 0.75, "json_valid": 1.0}, []),
        (False, {"json_valid": 0.0}, []),
        (None, {"json_valid": 0.0}, []),
    ],
)
def test_better_by_loss_and_worse_by_a_metric_is_a_warning(
    better: bool | None, after: dict[str, float], warnings: list[str]
) -> None:
    subjects = {"base": {"exact_match": 0.0, "json_valid": 0.25}, "active": {"exact_match": 0.75}}
    found = doubts(better, "loss", subjects, after)
    assert len(found) == len(warnings)
    assert all(part in sentence for part, sentence in zip(warnings, found, strict=True))


def test_the_mean_is_over_rows_and_takes_as_many_replies_as_references() -> None:
    assert mean("exact_match", ["a", "b", "c"], ["a", "x", "c"]) == pytest.approx(2 / 3)
    assert mean("exact_match", [], []) == 0.0
    with pytest.raises(ValueError, match="longer"):
        mean("exact_match", ["a"], ["a", "b"])
