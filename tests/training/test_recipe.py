"""A recipe's settings: what is refused, by which field, and how they are written."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase_training.recipe import Recipe, RecipeError, parse_recipe, recipe_fields

NUMBERS = [item.name for item, kind in recipe_fields() if "int" in str(kind) or "float" in str(kind)]
HUGE = 10**400


@pytest.mark.parametrize(
    "value", [HUGE, -HUGE, float("inf"), float("nan")], ids=["huge", "-huge", "inf", "nan"]
)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_beyond_all_limits_is_refused_by_its_field(name: str, value: Any) -> None:
    given_value = {"down_proj": value} if "pattern" in name else value
    with pytest.raises(RecipeError) as caught:
        parse_recipe({name: given_value})
    assert caught.value.field == name
    assert len(str(caught.value)) < 300


@given(
    st.dictionaries(
        st.sampled_from([item.name for item, _ in recipe_fields()]), st.from_type(object) | st.integers()
    )
)
def test_whatever_is_written_it_is_a_recipe_or_an_error_of_one_field(settings: dict[str, Any]) -> None:
    try:
        made = parse_recipe(settings)
    except RecipeError as error:
        assert error.field in {"", *settings}  # noqa: PT017 - either may be
    else:
        assert parse_recipe(made.to_json()) == made


@pytest.mark.parametrize(
    ("settings", "field", "says"),
    [
        ({"init": "eva", "rank_pattern": {"down_proj": 8}}, "rank_pattern", "leave the pattern out"),
        ({"init": "eva", "use_dora": True}, "init", "choose one"),
        ({"method": "dpo", "train_on": "all"}, "train_on", "leave train_on at assistant"),
        ({"rank_pattern": {"down_proj": 2000}}, "rank_pattern", "1024 at most"),
        ({"sample_prompts": ["x"] * 33}, "sample_prompts", "has 33 texts: write 32 at most"),
        (
            {"metrics": ["contains:" + "x" * 500]},
            "metrics",
            "has 509 characters: write 500 at most",
        ),
        ({"ranks": 8}, "ranks", "is not a setting of a recipe"),
        (
            {"metrics": ["exact_match"], "best_by": "exact_match", "metric_rows": 0},
            "metric_rows",
            "no replies are generated for exact_match: write 1 or more, or leave metrics out",
        ),
    ],
)
def test_what_does_not_go_together_or_is_too_much_is_refused(
    settings: dict[str, Any], field: str, says: str
) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        parse_recipe(settings)
    assert caught.value.field == field


def test_a_text_with_commas_is_one_prompt_and_one_metric_and_several_targets() -> None:
    made = parse_recipe(
        {"sample_prompts": "Hello, who are you?", "metrics": "contains:a, b", "targets": "q_proj, v_proj"}
    )
    assert made.sample_prompts == ("Hello, who are you?",)
    assert made.metrics == ("contains:a, b",)
    assert parse_recipe({"metrics": "exact_match, word_f1"}).metrics == ("exact_match", "word_f1")
    assert made.targets == ("q_proj", "v_proj")


def test_a_recipe_of_nothing_is_the_default() -> None:
    assert parse_recipe({}) == parse_recipe({"r": None}) == Recipe()
