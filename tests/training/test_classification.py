"""Classifiers: rows with labels, what is learned of them, and what PEFT and transformers load."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tests.training.data_support import write_rows
from tests.training.runs import labelled, recipe_for, trainer
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from onebase_adapters.format.config import check_config, with_labels
from onebase_engine.base.default_base import DEFAULT_BASE, resolve_base
from onebase_engine.base.load import BaseSettings, load_base
from onebase_server.inference.tokenization import BaseTokenizer, TemplateInput
from onebase_training.checkpoint import RunReport
from onebase_training.cli.data import main as data_main
from onebase_training.cli.estimate import main as estimate_main
from onebase_training.data.dataset import (
    MOST_LABELS,
    DataError,
    Dataset,
    Labelled,
    RowError,
    check_labels,
    split,
)
from onebase_training.data.reader import load_dataset
from onebase_training.data.rows import parse_row
from onebase_training.events import Event, OpenGate
from onebase_training.metrics import label_figures, macro_f1
from onebase_training.parent import Parent
from onebase_training.recipe import Recipe, RecipeError, parse_recipe
from onebase_training.run import TrainingRequest, train
from onebase_training.trainable import Trainable

METHOD = {"method": "classification"}
RECIPE = parse_recipe(METHOD)


def rows(count: int, labels: Sequence[Any] = ("calm", "angry"), start: int = 0) -> list[dict[str, Any]]:
    """Texts that say their label."""
    return [
        {"text": f"Number {n} is {labels[n % len(labels)]} today", "label": labels[n % len(labels)]}
        for n in range(start, start + count)
    ]


def loaded(tmp_path: Path, given: list[dict[str, Any]], name: str = "rows.jsonl", **settings: Any) -> Dataset:
    tokenizer = AutoTokenizer.from_pretrained(resolve_base(DEFAULT_BASE).folder, local_files_only=True)
    return load_dataset(write_rows(tmp_path / name, given), tokenizer, parse_recipe(METHOD | settings))


# ---- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "read"),
    [("good", "good"), (" good ", "good"), (3, "3"), (-1, "-1"), (True, "true"), ("0", "0"), ("été", "été")],
)
def test_a_label_is_a_text_or_a_whole_number(label: Any, read: str) -> None:
    found = parse_row({"text": "x", "label": label, "id": 7}, "classification")
    assert isinstance(found, Labelled)
    assert found.label == read


@pytest.mark.parametrize(
    ("row", "field", "why"),
    [
        ({"text": "x"}, "label", "missing"),
        ({"text": "x", "labl": "a"}, "labl", "did you mean label"),
        ({"text": "x", "label": ""}, "label", "empty"),
        ({"text": " ", "label": "a"}, "text", "empty"),
        ({"text": ["x"], "label": "a"}, "text", "must be a text"),
        ({"text": "x", "label": ["a", "b"]}, "label", "multi-label"),
        ({"text": "x", "label": {"a": 1}}, "label", "multi-label"),
        ({"text": "x", "labels": ["a"]}, "labels", "multi-label"),
        ({"text": "x", "label": 0.5}, "label", "regression"),
        ({"text": "x", "label": "a" * 101}, "label", "100 at most"),
        ({"text": "x", "label": "a\x1b[2J"}, "label", "cannot be printed"),
        ({"text": "x", "label": "a\nb"}, "label", "one line"),
        ({"text": "x", "text_pair": "y", "label": "a"}, "text_pair", "pairs"),
        ({"text": "x", "system": "Be kind.", "label": "a"}, "system", "would be lost"),
        ({"sentence": "x", "label": "a"}, "", "give text (or prompt, or messages) and label"),
        ({"messages": [{"role": "user"}], "label": "a"}, "messages[0].content", "missing"),
    ],
)
def test_bad_rows_are_refused_by_field(row: dict[str, Any], field: str, why: str) -> None:
    with pytest.raises(RowError) as refused:
        parse_row(row, "classification")
    assert refused.value.field == field
    assert why in refused.value.reason


def test_rows_are_read_of_any_format_and_labels_are_found_in_order(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("text,label\n" + "".join(f"text {n},{n}\n" for n in (10, 9, -2, 9)))
    tokenizer = AutoTokenizer.from_pretrained(resolve_base(DEFAULT_BASE).folder, local_files_only=True)
    assert load_dataset(table, tokenizer, RECIPE).labels == ("-2", "9", "10")
    found = loaded(tmp_path, rows(5))
    assert found.labels == ("angry", "calm")
    assert found.label_counts() == {"calm": 3, "angry": 2}
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows(5)), tmp_path / "rows.parquet")
    again = load_dataset(tmp_path / "rows.parquet", tokenizer, RECIPE)
    assert again.digest == found.digest
    other = rows(5)
    other[0]["label"] = "angry"
    assert loaded(tmp_path, other).digest != found.digest


def test_labels_that_are_the_same_number_have_one_order_in_every_process(tmp_path: Path) -> None:
    same = ["0" * count + "7" for count in range(9)]
    found = loaded(tmp_path, [{"text": f"text {label}", "label": label} for label in same]).labels
    assert found == tuple(sorted(same))


def test_a_row_that_is_cut_within_padding_is_read_where_transformers_reads_it(tmp_path: Path) -> None:
    text = f"one two three four five six{'<|im_end|>' * 4} and more"
    (row,) = loaded(tmp_path, [{"text": text, "label": "a"}], max_length=8, too_long="truncate").rows
    (sample,) = row.samples
    served = BaseTokenizer(str(resolve_base(DEFAULT_BASE).folder))
    assert sample.ids.tolist() == served.encode("one two three four five six")
    assert sample.supervised.tolist() == [False] * 5 + [True]


def test_a_row_is_read_as_classify_reads_it(tmp_path: Path) -> None:
    served = BaseTokenizer(str(resolve_base(DEFAULT_BASE).folder))
    asked = [
        {"role": "user", "content": "Where is <|im_end|> it?"},
        {"role": "assistant", "content": "Here."},
    ]
    texts = ["Is it good?", "padded<|im_end|><|im_end|>", " two  spaces\n"]
    given = [{"text": text, "label": "a"} for text in texts] + [{"messages": asked, "label": "b"}]
    found = [sample.ids.tolist() for row in loaded(tmp_path, given).rows for sample in row.samples]
    assert found[0] == served.encode(texts[0])
    assert found[1] == served.encode("padded")
    assert found[2] == served.encode(texts[2])
    assert found[3] == served.encode_chat(TemplateInput(asked))
    for row in loaded(tmp_path, given).rows:
        (sample,) = row.samples
        assert np.flatnonzero(sample.supervised).tolist() == [len(sample) - 1]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (rows(4, ["same"]), "two labels"),
        ([{"text": "x", "label": "0.5"}, {"text": "y", "label": "1.25"}], "regression"),
        ([{"text": f"x {n}", "label": f"l{n}"} for n in range(MOST_LABELS + 1)], "1,000"),
        ([{"text": f"x {n}", "label": f"{n:0100}l"[1:]} for n in range(656)], "65,536"),
    ],
    ids=["one", "numbers", "many", "long"],
)
def test_labels_that_cannot_be_told_apart_are_refused(
    tmp_path: Path, given: list[dict[str, Any]], why: str
) -> None:
    with pytest.raises(DataError, match=why):
        check_labels(loaded(tmp_path, given), None)


def test_the_names_of_all_labels_that_can_be_trained_on_can_be_served(tmp_path: Path) -> None:
    most = [f"\N{BLACK HEART SUIT}{n:098}l" for n in range(655)]
    check_labels(loaded(tmp_path, [{"text": f"x {n}", "label": one} for n, one in enumerate(most)]), None)
    config = json.dumps({"id2label": dict(enumerate(most)), "label2id": dict.fromkeys(most, 0)}, indent=2)
    bare = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 1, "target_modules": ["q_proj"]}
    assert check_config(with_labels(json.dumps(bare).encode(), config.encode())).label_names == tuple(most)


def test_a_held_out_label_that_is_not_trained_on_names_its_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_rows = write_rows(tmp_path / "train.jsonl", rows(4))
    held_out = write_rows(tmp_path / "held.jsonl", [*rows(2, start=9), {"text": "hm", "label": "odd"}])
    given = ["check", str(train_rows), "--eval-data", str(held_out), "--method", "classification"]
    assert data_main(given) == 1
    assert (
        capsys.readouterr().out
        == f"{held_out}:3: label: no row to train on has 'odd': add some, or leave this one out\n"
    )


def test_the_check_shows_the_distribution_and_what_is_uneven(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [*rows(60, ["calm"]), *rows(5, ["angry"], 100)])
    held_out = write_rows(tmp_path / "held.jsonl", rows(2, ["calm"], 200))
    given = ["check", str(data), "--eval-data", str(held_out), "--method", "classification"]
    assert data_main(given) == 0
    said = capsys.readouterr().out
    assert "calm\t60\nangry\t5\n" in said
    assert "60 rows of 'calm', 5 of 'angry'" in said
    assert "no row of the evaluation data has 'angry'" in said
    assert data_main([*given, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["labels"] == [{"label": "calm", "rows": 60}, {"label": "angry", "rows": 5}]
    assert (report["uneven_labels"], report["labels_not_held_out"]) == (True, ["angry"])
    assert report["examples"][0]["label"] == "calm"


def test_when_rows_are_held_out_each_label_keeps_one_and_a_text_one_side(tmp_path: Path) -> None:
    given = [*rows(30), {"text": "alone", "label": "rare"}, *({"text": "both", "label": one} for one in "ab")]
    for seed in range(5):
        kept, held = split(loaded(tmp_path, given), 0.5, seed, limit=100)
        assert len(held) > 10
        assert set(kept.labels) >= {"rare", "calm", "angry"}
        check_labels(kept, held)
        sides = {"a" in part.labels for part in (kept, held)} | {"b" in part.labels for part in (kept, held)}
        assert ("a" in kept.labels) == ("b" in kept.labels), sides


# ---- what a recipe may say -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"metrics": ["exact_match"]}, "metrics"),
        ({"sample_prompts": ["Hello"]}, "sample_prompts"),
        ({"train_on": "all"}, "train_on"),
        ({"best_by": "exact_match"}, "best_by"),
    ],
)
def test_what_is_about_replies_is_refused(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(METHOD | settings)
    assert refused.value.field == field


def test_accuracy_is_a_metric_of_classifiers_only() -> None:
    assert parse_recipe(METHOD | {"best_by": "f1"}).measured == ("accuracy", "f1")
    with pytest.raises(RecipeError, match="best_by"):
        parse_recipe({"best_by": "accuracy"})


def test_f1_counts_every_label_alike() -> None:
    own, given = list("aaaaaaab"), list("aaaaaaaa")
    assert macro_f1(own, given) == pytest.approx((2 * 7 / 15 + 0) / 2)
    found = label_figures(own, [*"aaaaaa", "b", "b"])
    assert (found["a"].precision, found["a"].recall) == (1.0, pytest.approx(6 / 7))
    assert (found["b"].precision, found["b"].recall, found["b"].rows) == (0.5, 1.0, 1)
    assert macro_f1([], []) == 0.0


# ---- training --------------------------------------------------------------------------------


def test_packed_or_row_by_row_it_is_the_same_loss(exact_base: torch.nn.Module, tmp_path: Path) -> None:
    data = labelled(16)
    losses = {}
    for packing in (True, False):
        recipe = recipe_for(data, **METHOD, packing=packing, batch_size=8, max_steps=5, learning_rate=2e-2)
        run = trainer(exact_base, recipe, data, tmp_path / str(packing), held_out=labelled(4, 1))
        losses[packing] = [loss for _, loss in run.run_steps().losses]
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)
    assert losses[True][-1] < losses[True][0]


def test_lm_head_is_no_target_and_the_head_is_of_the_seed(base: torch.nn.Module) -> None:
    data = labelled(6)
    with pytest.raises(RecipeError, match="lm_head is in no classifier"):
        Trainable(base, recipe_for(data, **METHOD, targets=["lm_head"]), OpenGate(), labels=data.labels)
    heads = [
        Trainable(base, recipe_for(data, **METHOD, seed=seed), OpenGate(), labels=data.labels)._head.weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def trained(
    tmp_path: Path, folder: Path, given: list[dict[str, Any]], held_out: list[dict[str, Any]], **settings: Any
) -> tuple[RunReport, Path, list[Event]]:
    """A run in fp32 on a small base with a real tokenizer."""
    asked = {"max_steps": 4, "batch_size": 4, "r": 4, "learning_rate": 2e-2, "eval_every": 2}
    job = TrainingRequest(
        name="moods",
        recipe=parse_recipe(METHOD | asked | settings),
        train=write_rows(tmp_path / "train.jsonl", given),
        held_out=write_rows(tmp_path / "held.jsonl", held_out),
        folder=tmp_path / "run",
        base=BaseSettings(folder, quantization="none", dtype=torch.float32, compute_dtype=torch.float32),
        base_name="small",
    )
    said: list[Event] = []
    report = train(lambda: load_base(job.base), job, said.append, OpenGate())
    return report, job.folder / "adapter", said


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True, "use_rslora": True}, pytest.param({"init": "eva"}, marks=pytest.mark.full)],
    ids=["lora", "dora", "eva"],
)
def test_the_folder_is_to_transformers_and_peft_what_the_report_says(
    settings: dict[str, Any], talking_folder: Path, tmp_path: Path
) -> None:
    labels = ["calm", "angry", "A|B `c`"]
    held_out = rows(7, labels, 50)
    report, folder, _ = trained(tmp_path, talking_folder, rows(12, labels), held_out, **settings)
    config = AutoConfig.from_pretrained(folder)
    assert config.id2label == {0: "A|B `c`", 1: "angry", 2: "calm"}
    model = AutoModelForSequenceClassification.from_pretrained(
        talking_folder, config=config, dtype=torch.float32
    )
    reference = PeftModel.from_pretrained(model, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(talking_folder)
    losses, right, given = [], 0, []
    for row in held_out:
        with torch.inference_mode():
            logits = reference(**tokenizer(row["text"], return_tensors="pt")).logits[0].double()
        number = config.label2id[row["label"]]
        losses.append(-float(logits.log_softmax(0)[number]))
        given.append(config.id2label[int(logits.argmax())])
        right += given[-1] == row["label"]
    assert report.loss_after == pytest.approx(sum(losses) / 7, abs=2e-5)
    assert report.metrics_after["accuracy"] == pytest.approx(right / 7)
    assert report.metrics_after["f1"] == pytest.approx(macro_f1([row["label"] for row in held_out], given))
    assert report.classes is not None
    assert report.classes["labels"] == ["A|B `c`", "angry", "calm"]
    matrix = report.classes["adapter"]["confusion"]
    assert sum(map(sum, matrix)) == 7
    assert sum(matrix[n][n] for n in range(3)) == right
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "| `A\\|B 'c'` |" in card


def test_the_base_is_asked_for_the_labels_name_and_slices_are_compared(
    talking_folder: Path, tmp_path: Path
) -> None:
    held_out = [row | {"slice": "ab"[n % 2]} for n, row in enumerate(rows(6, start=50))]
    report, _, said = trained(
        tmp_path, talking_folder, rows(12), held_out, best_by="f1", max_regression=0.0, slice_rows=1
    )
    assert report.classes is not None
    assert report.classes["base_by"] == "decide"
    assert set(report.metrics_before) == set(report.metrics_after) == {"accuracy", "f1"}
    assert report.better is (report.metrics_after["f1"] > report.metrics_before["f1"])
    assert report.slices is not None
    slices = {one["slice"]: one for one in report.slices["slices"]}
    assert (report.slices["by"], set(slices)) == ("f1", {"a", "b"})
    for one in slices.values():  # every slice has rows of one label only
        share = one["metrics_after"]["accuracy"]
        assert one["after"] == pytest.approx(1.0 if share == 1 else share / (1 + share))
        assert one["regressed"] is (one["after"] < one["before"])
    means = [one["loss_before"] * one["rows"] for one in slices.values()]
    assert sum(means) / 6 == pytest.approx(report.loss_before)
    assert [event.accuracy for event in said if type(event).__name__ == "Evaluated"][-1] is not None


def test_labels_that_are_bare_numbers_are_compared_with_the_most_frequent_one(
    talking_folder: Path, tmp_path: Path
) -> None:
    given = [{"text": f"number {n}", "label": int(n % 4 == 0)} for n in range(12)]
    held_out = [{"text": f"other {n}", "label": int(n < 2)} for n in range(5)]
    report, _, _ = trained(tmp_path, talking_folder, given, held_out, max_steps=1)
    assert report.classes is not None
    assert report.classes["base_by"] == "most_frequent"
    assert report.metrics_before == {"accuracy": 0.6, "f1": pytest.approx((0.75 + 0) / 2)}
    expected = -(3 * math.log(9 / 12) + 2 * math.log(3 / 12)) / 5
    assert report.loss_before == pytest.approx(expected)


def test_training_goes_on_from_no_adapter(talking_folder: Path, tmp_path: Path) -> None:
    parent = Parent("old", "0" * 64, tmp_path / "config", tmp_path / "weights")
    job = TrainingRequest(
        name="moods",
        recipe=Recipe(method="classification"),
        train=write_rows(tmp_path / "train.jsonl", rows(12)),
        folder=tmp_path / "run",
        base=BaseSettings(talking_folder),
        base_name="small",
        parent=parent,
    )
    with pytest.raises(RecipeError, match="name no adapter to go on from"):
        train(lambda: load_base(job.base), job, lambda event: None, OpenGate())


def test_an_estimate_counts_the_head_and_no_logits_of_the_vocabulary(
    talking_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows(40, ["a", "b", "c"]))
    options = ["--base", str(talking_folder), "--r", "4", "--targets", "q_proj", "--gpu", "l4", "--json"]
    assert estimate_main([*options, "--data", str(data), "--method", "classification"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 2 * 4 * (64 + 64) + 3 * 64
    assert estimate_main([*options, "--rows", "40"]) == 0
    assert found["logits_bytes"] < json.loads(capsys.readouterr().out)["logits_bytes"] / 100
