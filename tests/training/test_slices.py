"""Held-out rows by slice: which got worse, by how much, and which rows were right and are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onebase_engine.base.load import BaseSettings, load_base
from onebase_training import events
from onebase_training.data.dataset import DataError, Dataset, PromptRow, RowPlace, Sample
from onebase_training.data.reader import load_dataset
from onebase_training.data.row_store import map_rows, write_rows
from onebase_training.events import OpenGate
from onebase_training.recipe import Recipe, RecipeError, parse_recipe
from onebase_training.run import TrainingRequest, train
from onebase_training.slices import (
    MOST_CHANGED,
    MOST_SLICES,
    OTHERS,
    SubjectMetrics,
    by_slice,
    paired_differences,
    slice_report,
)

from .data_support import base_tokenizer, chat
from .runs import talking_base


def prompts(slices: list[str], references: list[str]) -> list[PromptRow]:
    """One row for each, of which only the slice and the reply are looked at."""
    made = []
    for number, (name, reference) in enumerate(zip(slices, references, strict=True), start=1):
        sample = Sample(np.array([number], np.int32), np.array([True]), number, name)
        text = reference
        made.append(PromptRow(sample, slice(0, 1), RowPlace(number, number), lambda ids, text=text: text))
    return made


def test_differences_of_the_smallest_of_too_many_slices_are_added_up_and_none_is_left_out() -> None:
    names = [f"s{number}" for number in range(MOST_SLICES) for _ in range(10)]
    names += [f"z{number}" for number in range(100) for _ in range(9)]
    references = ["yes"] * len(names)
    after = ["yes" if name.startswith("s") else "no" for name in names]
    recipe = parse_recipe({"metrics": ["exact_match"]})
    found = paired_differences(recipe, prompts(names, references), {"base": references}, after)
    (differences,) = found["base"].values()
    assert len(differences) == MOST_SLICES
    assert sum(one["rows"] for one in differences) == len(names)
    assert sum(one["sum"] for one in differences) == -900
    assert next(one for one in differences if one["slice"] == OTHERS)["sum"] == -900


def recipe(**settings: Any) -> Recipe:
    return parse_recipe({"slice_rows": 2, **settings})


def compared(made: Recipe, asked: list[PromptRow], before: list[str], after: list[str], **losses: Any) -> Any:
    names = dict.fromkeys(prompt.slice for prompt in asked if prompt.slice)
    rows = {name: sum(prompt.slice == name for prompt in asked) for name in names}
    begun, now = losses.get("losses", ({}, {}))
    subjects = {"base": SubjectMetrics(begun, before)}
    if "active" in losses:
        subjects["active"] = losses["active"]
    return slice_report(made, rows, asked, subjects, SubjectMetrics(now, after))


def test_a_slice_that_gets_worse_by_more_than_allowed_is_named_and_its_rows_are_shown() -> None:
    asked = prompts(["de", "de", "fr", "fr", ""], ["a", "b", "c", "d", "e"])
    made = recipe(metrics=["exact_match"], best_by="exact_match", max_regression=0.02)
    found = compared(made, asked, ["a", "b", "x", "d", "e"], ["a", "x", "c", "d", "y"])
    worst, other = found["slices"]
    assert (worst["slice"], worst["before"], worst["after"], worst["worse_by"]) == ("de", 1.0, 0.5, 0.5)
    assert (other["slice"], other["before"], other["after"], other["worse_by"]) == ("fr", 0.5, 1.0, 0.0)
    assert (worst["regressed"], other["regressed"], found["regressed"]) == (True, False, ["de"])
    assert [(row["line"], row["slice"], row["before"], row["after"]) for row in found["changed"]] == [
        (2, "de", "b", "x"), (5, "", "e", "y"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "regressed"),
    [
        ({}, []),
        ({"max_regression": 0.5}, []),
        ({"max_regression": 0.49}, ["de"]),
        ({"max_regression": 0.0}, ["de"]),
        ({"max_regression": 0.0, "slice_rows": 3}, []),
    ],
)
def test_the_limit_holds_for_slices_of_enough_rows(settings: dict[str, Any], regressed: list[str]) -> None:
    asked = prompts(["de", "de"], ["a", "b"])
    made = recipe(metrics=["exact_match"], best_by="exact_match", **settings)
    assert compared(made, asked, ["a", "b"], ["a", "x"])["regressed"] == regressed


def test_by_loss_a_slice_is_worse_when_its_loss_rises() -> None:
    asked = prompts(["a", "a", "b", "b"], ["x"] * 4)
    losses = {"a": 1.0, "b": 2.0}, {"a": 1.5, "b": 0.5}
    found = compared(recipe(max_regression=0.4), asked, [], [], losses=losses)
    assert [(one["slice"], one["worse_by"], one["regressed"]) for one in found["slices"]] == [
        ("a", 0.5, True), ("b", 0.0, False),
    ]  # fmt: skip
    assert (found["by"], found["changed"], found["slices"][0]["measured"]) == ("loss", [], 2)


def test_a_slice_that_is_worse_than_the_active_version_regresses_though_it_is_better_than_the_base() -> None:
    asked = prompts(["de", "de", "fr", "fr"], ["a", "b", "c", "d"])
    made = recipe(metrics=["exact_match"], best_by="exact_match", max_regression=0.02)
    active = SubjectMetrics({}, ["a", "b", "c", "x"])
    found = compared(made, asked, ["a", "x", "c", "d"], ["a", "y", "c", "x"], active=active)
    de, fr = found["slices"]
    assert (de["before"], de["active"], de["after"], de["worse_by"]) == (0.5, 1.0, 0.5, 0.5)
    assert (fr["before"], fr["active"], fr["after"], fr["worse_by"]) == (1.0, 0.5, 0.5, 0.5)
    assert (de["regressed_against"], fr["regressed_against"]) == (["active"], ["base"])
    assert found["regressed"] == ["de", "fr"]
    assert [(row["line"], row["against"], row["before"], row["after"]) for row in found["changed"]] == [
        (2, "active", "b", "y"), (4, "base", "d", "x"),
    ]  # fmt: skip
    by_loss = recipe(max_regression=0.4)
    losses = {"de": 2.0, "fr": 2.0}, {"de": 1.5, "fr": 1.0}
    found = compared(by_loss, asked, [], [], losses=losses, active=SubjectMetrics({"de": 1.0, "fr": 1.0}, []))
    assert found["regressed"] == ["de"]
    assert [one["loss_active"] for one in found["slices"]] == [1.0, 1.0]


def test_a_metric_with_values_between_names_no_rows() -> None:
    asked = prompts(["a"], ["one two"])
    made = recipe(metrics=["word_f1"], best_by="word_f1")
    found = compared(made, asked, ["one two"], ["one"])
    assert (found["changed"], found["slices"][0]["worse_by"] > 0) == ([], True)


@pytest.mark.parametrize(("before", "after"), [(["x", "y"], []), ([], ["x", "y"])])
def test_a_subject_without_replies_is_compared_by_loss_alone(before: list[str], after: list[str]) -> None:
    """As after a measurement that ran out of memory."""
    asked = prompts(["a", "a"], ["x", "y"])
    found = compared(recipe(metrics=["exact_match"]), asked, before, after, losses=({"a": 1.0}, {"a": 2.0}))
    assert (found["changed"], found["slices"][0]["worse_by"]) == ([], 1.0)


def test_a_report_is_bounded_and_its_verdict_is_not() -> None:
    count = MOST_SLICES + 50
    asked = prompts([f"s{number}" for number in range(count) for _ in range(2)], ["r" * 5000] * 2 * count)
    made = recipe(metrics=["exact_match"], best_by="exact_match", max_regression=0.1)
    found = compared(made, asked, ["r" * 5000] * 2 * count, ["w" * 5000] * 2 * count)
    assert (len(found["slices"]), found["slice_count"], len(found["regressed"])) == (
        MOST_SLICES,
        count,
        count,
    )
    assert (len(found["changed"]), found["changed_count"]) == (MOST_CHANGED, 2 * count)
    assert len(json.dumps(found)) < 100_000


# ---- from the rows ---------------------------------------------------------------------------------


def rows_of(path: Path, *slices: Any, field: str = "slice") -> Path:
    lines = [chat(f"q{number}", f"a{number}") | {field: name} for number, name in enumerate(slices)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_field_of_a_row_names_its_slice(tmp_path: Path) -> None:
    file = rows_of(tmp_path / "r.jsonl", "de", None, "", 7, True, ["odd"])
    data = load_dataset(file, base_tokenizer(), recipe())
    assert [row.slice for row in data.rows] == ["de", "", "", "7", "true", ""]
    assert [prompt.slice for prompt in data.prompts] == ["de", "", "", "7", "true", ""]
    assert {name: len(part) for name, part in by_slice(data).items()} == {"de": 1, "7": 1, "true": 1}
    named = load_dataset(
        rows_of(tmp_path / "n.jsonl", "x", field="lang"), base_tokenizer(), recipe(slice_by="lang")
    )
    assert named.rows[0].slice == "x"
    write_rows(tmp_path / "kept", "key", {"train": data})
    kept = map_rows(tmp_path / "kept", "key", lambda ids: "")
    assert kept is not None
    assert [row.slice for row in kept["train"].rows] == [row.slice for row in data.rows]
    assert kept["train"].prompts[0].slice == "de"


def test_columns_of_tables_name_slices_as_well(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "r.csv").write_text("prompt,completion,lang\na,b,de\n")
    table = pa.table({"prompt": ["a"], "completion": ["b"], "lang": ["de"], "other": [1]})
    pq.write_table(table, tmp_path / "r.parquet")
    for name in ("r.csv", "r.parquet"):
        data = load_dataset(tmp_path / name, base_tokenizer(), recipe(slice_by="lang"))
        assert [row.slice for row in data.rows] == ["de"], name


@pytest.mark.parametrize("value", [["x"], {"a": 1}, 1.5, "x" * 101])
def test_a_slice_that_is_no_name_is_refused_where_the_field_was_chosen(tmp_path: Path, value: Any) -> None:
    with pytest.raises(DataError, match="lang"):
        load_dataset(
            rows_of(tmp_path / "r.jsonl", value, field="lang"), base_tokenizer(), recipe(slice_by="lang")
        )


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"slice_by": " "}, "slice_by"),
        ({"max_regression": -0.1}, "max_regression"),
        ({"slice_rows": 0}, "slice_rows"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(settings)
    assert refused.value.field == field


def test_a_run_reports_its_slices_against_the_base(tmp_path: Path) -> None:
    folder = talking_base(tmp_path / "base")
    train_rows = rows_of(tmp_path / "train.jsonl", *("de", "fr") * 6)
    held_out = rows_of(tmp_path / "held.jsonl", "de", "de", "fr", None)
    settings = {
        "max_steps": 2, "batch_size": 4, "metrics": ["min_characters:1"], "metric_tokens": 4, "r": 4,
        "learning_rate": 1e-2, "max_regression": 0.0, "slice_rows": 1,
    }  # fmt: skip
    job = TrainingRequest(
        name="n", recipe=parse_recipe(settings), train=train_rows, held_out=held_out, folder=tmp_path / "run",
        base=BaseSettings(folder=folder), base_name="tiny",
    )  # fmt: skip
    heard: list[events.Event] = []
    report = train(lambda: load_base(job.base), job, heard.append, OpenGate())
    found = report.slices
    assert found is not None
    rows = {one["slice"]: one for one in found["slices"]}
    assert {name: one["rows"] for name, one in rows.items()} == {"de": 2, "fr": 1}
    assert (found["against"], found["by"]) == ("base", "loss")
    whole = load_dataset(held_out, base_tokenizer(), job.recipe)
    weights = {name: sum(row.targets for row in part.rows) for name, part in by_slice(whole).items()}
    rest = sum(row.targets for row in whole.rows if not row.slice)
    # The means of the slices, by their tokens, with the row of none, are the mean of all.
    assert report.loss_before is not None
    total = report.loss_before * (sum(weights.values()) + rest)
    of_slices = sum(rows[name]["before"] * weight for name, weight in weights.items())
    assert 0 < (total - of_slices) / rest < 20
    assert set(rows["de"]["metrics_after"]) == {"min_characters:1"}
    card = (job.folder / "adapter" / "README.md").read_text()
    assert "held-out loss by slice" in card
    assert found["regressed"] == [name for name, one in rows.items() if one["after"] > one["before"]]


def test_rows_without_slices_have_no_such_report() -> None:
    sample = Sample(np.array([1, 2], np.int32), np.array([False, True]), 1)
    assert by_slice(Dataset([sample])) == {}
