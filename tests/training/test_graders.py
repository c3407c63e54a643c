"""Graders: what they give a reply, whatever the reply or the grader is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from onebase_training import graders
from onebase_training.graders import (
    LONGEST_RENDERED,
    LONGEST_TEMPLATE,
    Grade,
    Graded,
    GraderError,
    GradingError,
    JudgedScore,
    Metric,
    PythonGrader,
    ScoreModel,
    grade,
    parse_formula,
    parse_grader,
    render,
    render_messages,
    similarity,
    to_json,
)

CHECK = {"type": "string_check", "name": "c", "input": "{{sample.output_text}}", "operation": "eq"}


def graded(
    grader: dict[str, Any],
    text: str,
    item: dict[str, Any] | None = None,
    *,
    judge: JudgedScore | GradingError | None = None,
    python: float | GradingError = 0.0,
) -> Grade:
    async def ask(grader: ScoreModel, messages: Any) -> JudgedScore:
        if isinstance(judge, GradingError):
            raise judge
        return judge or JudgedScore(float(len(messages[0][1])), 7, grader.model)

    async def run(grader: PythonGrader, graded: Graded) -> float:
        if isinstance(python, GradingError):
            raise python
        return python

    async def work(call: Callable[[], Any]) -> Any:
        return call()

    return asyncio.run(
        grade(parse_grader(grader), Graded(text, item or {}), judge=ask, python=run, text=work)
    )


@pytest.mark.parametrize(
    ("operation", "reference", "reward"),
    [
        ("eq", "Yes", 1),
        ("eq", "yes", 0),
        ("ne", "yes", 1),
        ("like", "Y", 1),
        ("like", "y", 0),
        ("ilike", "y", 1),
    ],
)
def test_a_string_check_is_one_or_zero(operation: str, reference: str, reward: float) -> None:
    assert graded({**CHECK, "operation": operation, "reference": reference}, "Yes").reward == reward


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("fuzzy_match", 2 * 20 / 43),  # 20 characters in common, of 22 and 21
        ("rouge_1", 2 * 5 / 12),
        ("rouge_2", 2 * 3 / 10),
        ("rouge_l", 2 * 5 / 12),
        ("gleu", 9 / 18),
        ("bleu", ((5 / 6) * (4 / 6) * (2 / 5) * (1 / 4)) ** 0.25),
    ],
)
def test_a_similarity_is_that_of_its_definition(metric: Metric, value: float) -> None:
    assert similarity(metric, "the cat sat on the mat", "the cat is on the mat") == pytest.approx(value)


@pytest.mark.parametrize("metric", ["fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_3", "rouge_l"])
def test_a_text_is_like_itself_and_unlike_nothing(metric: Metric) -> None:
    assert similarity(metric, "one two three four five", "one two three four five") == pytest.approx(1.0)
    assert similarity(metric, "", "") == 1.0
    assert similarity(metric, "one", "") == 0.0


def test_a_template_reads_the_reply_its_json_and_the_row() -> None:
    check = {**CHECK, "input": "{{ sample.output_json.a[1].b }}", "reference": "{{item.right.value}}"}
    assert graded(check, '{"a": [0, {"b": 3}]}', {"right": {"value": 3}}).reward == 1.0
    assert graded(check, "no JSON", {"right": {"value": 3}}).errors == {
        "sample_parse_error": "the reply is no JSON"
    }
    missing = graded(check, '{"a": []}', {"right": {"value": 3}})
    assert (missing.reward, list(missing.errors)) == (0.0, ["invalid_variable_error"])


def multi(formula: str) -> dict[str, Any]:
    parts = {"a": {**CHECK, "reference": "x"}, "b": {"type": "python", "name": "b", "source": SOURCE}}
    return {"type": "multi", "name": "m", "graders": parts, "calculate_output": formula}


SOURCE = "def grade(sample, item):\n    return 1\n"


def test_a_multi_grader_computes_its_formula() -> None:
    found = graded(multi("0.5 * a + max(b, 0.1) ^ 2"), "x", python=0.5)
    assert found.reward == pytest.approx(0.75)
    assert found.parts == {"a": 1.0, "b": 0.5}


def test_a_part_that_fails_counts_as_its_floor_and_the_rest_goes_on() -> None:
    failed = GradingError("python_grader_runtime_error", "ZeroDivisionError")
    found = graded(multi("a + b"), "x", python=failed)
    assert found.reward == 1.0
    assert found.errors == {"python_grader_runtime_error": "b: ZeroDivisionError"}


@pytest.mark.parametrize(("formula", "value"), [("a / b", 0.0), ("log(b)", 0.0), ("9 ^ 9 ^ 9", 0.0)])
def test_a_formula_without_a_value_gives_the_floor(formula: str, value: float) -> None:
    found = graded(multi(formula), "x")
    assert (found.reward, list(found.errors)) == (value, ["formula_parse_error"])


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e7, -1e308])
def test_a_reward_that_is_no_number_to_learn_from_is_the_floor(number: float) -> None:
    python = {"type": "python", "name": "p", "source": SOURCE}
    found = graded(python, "x", python=number)
    assert (found.reward, list(found.errors)) == (0.0, ["other_error"])


def test_a_judge_gives_a_number_of_its_range_or_the_low_end() -> None:
    judge = {
        "type": "score_model",
        "name": "j",
        "model": "base",
        "input": [{"role": "user", "content": "Rate {{sample.output_text}}"}],
        "range": [1, 10],
    }
    found = graded(judge, "xyz")
    assert (found.reward, dict(found.tokens)) == (8.0, {"base": 7})
    outside = graded(judge, "xyz", judge=JudgedScore(11.0, 5, "base"))
    assert (outside.reward, list(outside.errors), outside.tokens["base"]) == (
        1.0,
        ["model_grader_parse_error"],
        5,
    )


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"operation": "near"}, "operation", "Invalid enum value"),
        ({"reference": None}, "reference", "Expected"),
        ({"reference": "{{item}}"}, "reference", "names no field"),
        ({"reference": "{{item.x"}, "reference", "has no }}"),
        ({"input": "{{sample.choices}}"}, "input", "no sample.choices"),
        ({"name": ""}, "name", "1 to 100"),
        ({"more": 1}, "", "unknown field"),
        ({"type": "label_model"}, "type", "use a score_model"),
        (multi("a + c"), "calculate_output", "'c' is no grader"),
        (multi("a.__class__"), "calculate_output", "numbers, names"),
        (multi("(lambda: a)()"), "calculate_output", "numbers, names"),
        (multi("open(a)"), "calculate_output", "no function 'open'"),
        (multi("(" * 500 + "a"), "calculate_output", "no formula"),
        ({**multi("a"), "graders": {}}, "graders", "1 to 32"),
        ({"type": "python", "name": "p", "source": "x ="}, "source", "no Python"),
        ({"type": "python", "name": "p", "source": "x = 1"}, "source", "no function grade"),
        ({"type": "python", "name": "p", "source": SOURCE, "image_tag": "x"}, "image_tag", "no images"),
    ],
)
def test_a_grader_that_cannot_be_used_is_refused_by_its_field(
    change: dict[str, Any], field: str, reason: str
) -> None:
    grader = change if change.get("type") in ("multi", "python") else {**CHECK, "reference": "x", **change}
    with pytest.raises(GraderError) as caught:
        parse_grader(grader)
    assert caught.value.field == field
    assert reason in caught.value.reason


@pytest.mark.parametrize("metric", ["cosine", "meteor"])
def test_a_metric_that_is_not_computed_is_refused_by_name(metric: str) -> None:
    grader = {**CHECK, "type": "text_similarity", "reference": "x", "evaluation_metric": metric}
    del grader["operation"]
    with pytest.raises(GraderError, match=f"{metric} is not computed here: .* use rouge_l or gleu"):
        parse_grader(grader)


def test_a_grader_is_written_as_it_was_read() -> None:
    assert to_json(parse_grader(multi("a"))) == multi("a")
    assert parse_formula("-a + 1").value({"a": 3.0}) == -2.0


def test_a_template_is_read_once_whatever_stands_in_it() -> None:
    """A pattern that may match blanks in several ways takes hours for this one."""
    with pytest.raises(GraderError, match="has no }}"):
        parse_grader({**CHECK, "reference": "{{" + " " * (LONGEST_TEMPLATE - 10) + "x"})


def test_a_template_is_as_long_as_it_may_be_and_no_longer() -> None:
    parse_grader({**CHECK, "reference": "x" * LONGEST_TEMPLATE})
    with pytest.raises(GraderError, match=f"write {LONGEST_TEMPLATE} at most") as caught:
        parse_grader({**CHECK, "reference": "x" * (LONGEST_TEMPLATE + 1)})
    assert caught.value.field == "reference"


def test_rendering_ends_with_the_first_piece_that_is_too_much() -> None:
    class Row(dict[str, Any]):
        reads = 0

        def __getitem__(self, name: str) -> Any:
            Row.reads += 1
            return "y" * 100_000

    with pytest.raises(GradingError, match=f"longer than {LONGEST_RENDERED} characters"):
        render("{{item.a}}" * 2000, Graded("x", Row()))
    assert Row.reads == LONGEST_RENDERED // 100_000 + 1


def test_the_messages_to_a_judge_have_one_limit_together() -> None:
    message = {"role": "user", "content": "{{item.a}}"}
    judge = parse_grader({"type": "score_model", "name": "j", "model": "m", "input": [message] * 3})
    assert isinstance(judge, ScoreModel)
    with pytest.raises(GradingError, match="longer than"):
        render_messages(judge, Graded("x", {"a": "y" * (LONGEST_RENDERED // 2)}))


def test_a_reply_is_parsed_once_for_all_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []

    def parse(text: bytes) -> Any:
        parsed.append(text)
        return [1]

    monkeypatch.setattr(graders, "parse_json", parse)
    assert render("{{sample.output_json[0]}}" * 100, Graded("[1]", {})) == "1" * 100
    assert parsed == [b"[1]"]


def test_a_value_that_cannot_be_written_gives_the_floor() -> None:
    found = graded({**CHECK, "reference": "{{item.a}}"}, "x", {"a": 10**5000})
    assert (found.reward, list(found.errors)) == (0.0, ["other_error"])


def test_what_is_rendered_and_what_failed_can_be_sent_as_a_message() -> None:
    assert render("{{item.a}}", Graded("x", {"a": "\ud800"})).encode() == b"?"
    assert GradingError("other_error", "a \ud800").detail.encode() == b"a ?"


@pytest.mark.parametrize("formula", ["-" * 400 + "a", "1+" * 150 + "a"])
def test_a_formula_is_not_nested_without_end(formula: str) -> None:
    with pytest.raises(GraderError, match="more than 100 operations"):
        parse_formula(formula)


def test_a_formula_that_finds_no_room_on_the_stack_has_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_deep(*args: Any) -> float:
        raise RecursionError("too deep")

    formula = parse_formula("-a")
    monkeypatch.setattr(graders, "_value", too_deep)
    with pytest.raises(GradingError, match="too deep"):
        formula.value({"a": 1.0})


def test_a_grader_is_read_as_openai_writes_it() -> None:
    judge = {"type": "score_model", "name": "j", "model": "m", "input": [{"role": "user", "content": "x"}]}
    parsed = parse_grader({**judge, "range": None, "sampling_params": None})
    assert isinstance(parsed, ScoreModel)
    assert parsed.bounds == (0.0, 1.0)
    one = {**CHECK, "reference": "x"}
    lone = parse_grader({"type": "multi", "name": "m", "graders": one, "calculate_output": "c"})
    assert list(to_json(lone)["graders"]) == ["c"]
    for source in ("grade = lambda sample, item: 1", "grade: object = len"):
        parse_grader({"type": "python", "name": "p", "source": source})


def test_a_range_is_one_that_can_be_learned_from() -> None:
    judge = {"type": "score_model", "name": "j", "model": "m", "input": [{"role": "user", "content": "x"}]}
    with pytest.raises(GraderError, match="from -1e\\+06 to 1e\\+06"):
        parse_grader({**judge, "range": [-1e12, 1.0]})
