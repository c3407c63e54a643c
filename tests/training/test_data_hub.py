"""Data sets on the Hub: which files are fetched, and that no others are. The Hub is a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.hub_standin import HubStandIn

from onebase_engine.user_cache import default_cache
from onebase_training.data.dataset import DataError
from onebase_training.data.hub import DatasetId, choose, parse_dataset_id

pytestmark = pytest.mark.usefixtures("forks")
SFT = "train_sft-00000-of-00001-b42a775f407cee45.parquet"
GEN = "train_gen-00000-of-00001-0a1b775f407cee45.parquet"
_FETCH = """
import json, sys
from onebase_training.data.files import read_file
from onebase_engine.base.default_base import default_cache
from onebase_training.data.dataset import DataError
from onebase_training.data.hub import fetch, parse_dataset_id
try:
    paths = fetch(parse_dataset_id(sys.argv[1]), sys.argv[2])
    print(json.dumps([item.value["completion"] for path in paths for item in read_file(path)]))
except DataError as error:
    print(json.dumps(str(error)))
"""
_LOAD = """
import json, sys
from tests.training.data_support import base_tokenizer, recipe
from onebase_training.data.reader import load_dataset
dataset = load_dataset(sys.argv[1], base_tokenizer(), recipe(), part=sys.argv[2])
print(json.dumps([[prompt.line, prompt.reference] for prompt in dataset.prompts]))
"""


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as standin:
        yield standin


def fetched(hub: HubStandIn, home: Path, source: str, part: str = "train", **more: str) -> Any:
    return run(_FETCH, hub, home, source, part, **more)


def run(code: str, hub: HubStandIn, home: Path, source: str, part: str, **more: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", code, source, part],
        env={**os.environ, **hub.environment(home), "ONEBASE_CACHE": str(default_cache()), **more},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rows(*texts: str) -> bytes:
    return "".join(json.dumps({"prompt": "q", "completion": text}) + "\n" for text in texts).encode()


def test_the_split_is_fetched_in_all_its_files_and_nothing_else(hub: HubStandIn, tmp_path: Path) -> None:
    files = {
        "README.md": b"# data",
        "acme.py": b"import os; os.abort()",
        "data/train-00000-of-00002.jsonl": rows("a", "b"),
        "data/train-00001-of-00002.jsonl": rows("c"),
        "data/validation-00000-of-00001.jsonl": rows("v"),
        "data/test-00000-of-00001.jsonl": rows("t"),
        "pickled.pkl": b"\x80\x04.",
    }
    hub.add_repo("acme/tickets", files)
    assert run(_LOAD, hub, tmp_path, "acme/tickets", "train") == [[1, "a"], [2, "b"], [3, "c"]]
    assert fetched(hub, tmp_path, "acme/tickets", "eval") == ["v"]
    assert fetched(hub, tmp_path, "acme/tickets:test") == ["t"]
    assert not [path for path in hub.requests() if path.endswith((".py", ".pkl"))]


def test_without_the_hub_what_was_fetched_is_used_if_it_is_whole(hub: HubStandIn, tmp_path: Path) -> None:
    files = {f"train-0000{i}-of-00002.jsonl": rows(f"{i}") for i in range(2)}
    hub.add_repo("acme/tickets", files)
    assert fetched(hub, tmp_path, "acme/tickets") == ["0", "1"]
    assert fetched(hub, tmp_path, "acme/tickets", HF_HUB_OFFLINE="1") == ["0", "1"]
    (second,) = (tmp_path / "hub").rglob("train-00001*")
    second.unlink()
    assert "it is not on this machine" in fetched(hub, tmp_path, "acme/tickets", HF_HUB_OFFLINE="1")


def test_a_revision_is_another_state_of_the_data(hub: HubStandIn, tmp_path: Path) -> None:
    old = hub.add_repo("acme/tickets", {"train.jsonl": rows("old")})
    hub.add_repo("acme/tickets", {"train.jsonl": rows("new")})
    assert fetched(hub, tmp_path, f"acme/tickets@{old}") == ["old"]
    assert fetched(hub, tmp_path, "acme/tickets") == ["new"]


def test_what_the_hub_does_not_give_is_one_clear_problem(hub: HubStandIn, tmp_path: Path) -> None:
    hub.add_repo("acme/empty", {"README.md": b""})
    assert "acme/none: 1 problem" in fetched(hub, tmp_path, "acme/none")
    found = fetched(hub, tmp_path, "acme/empty:other")
    assert "no file of split other is there; files of rows: none" in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", DatasetId("org/name", None, None)),
        ("org/name:test", DatasetId("org/name", "test", None)),
        ("org/name:main/test@v1.0", DatasetId("org/name", "main/test", "v1.0")),
        ("org/name@refs/pr/3", DatasetId("org/name", None, "refs/pr/3")),
        ("data/train.jsonl", None),
        ("train.csv", None),
        ("name", None),
        ("a/b/c", None),
        ("../secret", None),
        ("org/name@../../x", None),
        ("https://host/x", None),
        ("/etc/passwd", None),
    ],
)
def test_an_id_is_told_from_a_path(text: str, expected: DatasetId | None) -> None:
    assert parse_dataset_id(text) == expected


@pytest.mark.parametrize(
    ("names", "source", "part", "expected"),
    [
        (["rows.jsonl"], "o/n", "train", ["rows.jsonl"]),
        (["train.jsonl", "train.parquet"], "o/n", "train", ["train.parquet"]),
        (["train.jsonl", "training_notes.json"], "o/n", "train", ["train.jsonl"]),
        (["dataset_infos.json", "rows.json"], "o/n", "train", ["rows.json"]),
        (["dev.jsonl", "train.jsonl"], "o/n", "eval", ["dev.jsonl"]),
        (
            ["main/train-0.parquet", "socratic/train-0.parquet"],
            "o/n:main/train",
            "train",
            ["main/train-0.parquet"],
        ),
        (["train/a.csv", "test/b.csv"], "o/n:test", "train", ["test/b.csv"]),
        (["train/a.csv", "train/b.csv"], "o/n", "train", ["train/a.csv", "train/b.csv"]),
        (["train.jsonl", "train_sft.jsonl"], "o/n", "train", ["train.jsonl"]),
        (["o-train_1.csv", "o-train_2.csv"], "o/n", "train", ["o-train_1.csv", "o-train_2.csv"]),
        (["train_part1.csv", "train_part2.csv"], "o/n", "train", ["train_part1.csv", "train_part2.csv"]),
        ([f"data/{SFT}", f"data/{GEN}"], "o/n:train_sft", "train", [f"data/{SFT}"]),
        ([f"{SFT}", "test_sft.csv", "test_gen.csv"], "o/n", "train", [SFT]),
        (["train_1.jsonl", "train_2.jsonl"], "o/n:train_1", "train", ["train_1.jsonl"]),
        (["fold-1.csv", "fold-2.csv"], "o/n:fold-2", "train", ["fold-2.csv"]),
        (
            ["shard_0_train.csv", "shard_1_train.csv"],
            "o/n",
            "train",
            ["shard_0_train.csv", "shard_1_train.csv"],
        ),
        (["training/train-x/a.csv", "test.csv"], "o/n", "train", ["training/train-x/a.csv"]),
    ],
)
def test_the_files_of_one_split_and_one_format_are_chosen(
    names: list[str], source: str, part: str, expected: list[str]
) -> None:
    dataset = parse_dataset_id(source)
    assert dataset is not None
    assert choose(dataset, names, part) == expected


@pytest.mark.parametrize("part", ["train", "eval"])
@pytest.mark.parametrize("source", ["o/n", "o/n@main"])
def test_splits_that_share_a_word_are_not_mixed(source: str, part: str) -> None:
    dataset = parse_dataset_id(source)
    assert dataset is not None
    word = "train" if part == "train" else "test"
    names = [f"data/{SFT}", f"data/{GEN}", "data/test_sft-0.parquet", "data/test_gen-0.parquet"]
    with pytest.raises(DataError) as caught:
        choose(dataset, names, part)
    reason = caught.value.problems[0].reason
    assert reason == f"it has several splits of that name ({word}_gen, {word}_sft): write o/n:{word}_gen"


def test_a_split_of_a_configuration_is_named_with_its_folder() -> None:
    names = ["main/train_a.csv", "main/train_b.csv", "other/train.csv"]
    with pytest.raises(DataError, match=r"\(train_a, train_b\): write o/n:main/train_a"):
        choose(DatasetId("o/n", "main/train", None), names, "train")


def test_configurations_are_not_mixed() -> None:
    names = ["main/train-0.parquet", "socratic/train-0.parquet"]
    with pytest.raises(
        DataError, match=r"several configurations \(main, socratic\): write o/n:socratic/train"
    ):
        choose(DatasetId("o/n", None, None), names, "train")
    with pytest.raises(DataError, match="no file of split train is there"):
        choose(DatasetId("o/n", None, None), ["test.jsonl"], "train")
