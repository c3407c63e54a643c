"""Data is read once in a run: its rows are kept, and mapped by whoever needs them next; never other rows."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.disks import small_disk
from tests.training.runs import preferences, samples, write_chats
from transformers import AutoConfig
from transformers.utils import CHAT_TEMPLATE_DIR

from onebase_engine.base.load import BaseSettings, load_base
from onebase_training import events
from onebase_training.checkpoint import CheckpointError
from onebase_training.data.dataset import (
    DataError,
    Dataset,
    Preference,
    PromptRow,
    Row,
    RowPlace,
    Sample,
)
from onebase_training.data.row_store import map_rows, rows_key, write_rows
from onebase_training.events import OpenGate
from onebase_training.recipe import parse_recipe
from onebase_training.run import (
    Data,
    TrainingPlan,
    TrainingRequest,
    load_tokenizer,
    prepare,
    read_data,
    train,
)

KEY = "a key"


def decode(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def mapped(folder: Path, key: str = KEY) -> dict[str, Dataset] | None:
    return map_rows(folder, key, decode)


def plain(data: Dataset) -> Any:
    """Everything that training reads of a data set."""
    rows = [
        (type(row), row.line, [(s.ids.tolist(), s.supervised.tolist(), s.line) for s in row.samples])
        for row in data.rows
    ]
    prompts = [(p.ids.tolist(), p.reply.tolist(), p.place, p.reference) for p in data.prompts]
    return rows, prompts, data.digest


@st.composite
def datasets(draw: st.DrawFn) -> Dataset:
    """Rows of either kind, or none, some with a prompt; ids and lines up to their limits."""
    lines = st.integers(0, 2**40)

    def sample(line: int) -> Sample:
        ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6))
        supervised = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        return Sample(np.array(ids, np.int32), np.array(supervised, np.bool_), line)

    pairs = draw(st.booleans())
    rows: list[Row] = []
    prompts = []
    for number in range(draw(st.integers(0, 4))):
        line = draw(lines)
        last = sample(line)
        rows.append(Preference(last, sample(line)) if pairs else last)
        if draw(st.booleans()):
            start, stop = sorted(draw(st.integers(0, len(last))) for _ in range(2))
            prompts.append(PromptRow(last, slice(start, stop), RowPlace(number + 1, line), decode))
    return Dataset(rows, prompts)


@given(datasets(), datasets())
def test_what_is_mapped_is_what_was_written(tmp_path: Path, one: Dataset, other: Dataset) -> None:
    write_rows(tmp_path / "rows", KEY, {"train": one, "held_out": other})
    found = mapped(tmp_path / "rows")
    assert found is not None
    assert {name: plain(data) for name, data in found.items()} == {
        "train": plain(one),
        "held_out": plain(other),
    }


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    write_rows(folder, KEY, {"train": preferences(2)})
    return folder


def test_a_byte_changed_anywhere_leaves_nothing_to_map(rows: Path) -> None:
    assert mapped(rows) is not None
    for path in rows.iterdir():
        sound = path.read_bytes()
        for place in range(len(sound)):
            path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
            assert mapped(rows) is None, (path.name, place)
        path.write_bytes(sound)
    assert mapped(rows) is not None


def test_what_is_cut_off_or_lost_leaves_nothing_to_map(rows: Path) -> None:
    assert mapped(rows) is not None
    for path in rows.iterdir():
        sound = path.read_bytes()
        for length in range(len(sound)):
            path.write_bytes(sound[:length])
            assert mapped(rows) is None, (path.name, length)
        path.unlink()
        assert mapped(rows) is None, path.name
        path.write_bytes(sound)
    assert mapped(rows) is not None


def test_what_is_added_or_under_another_name_leaves_nothing_to_map(rows: Path) -> None:
    path, other = rows / "train.samples.npy", rows / "held_out.samples.npy"
    shutil.copyfile(path, other)
    assert mapped(rows) is None
    path.unlink()
    assert mapped(rows) is None
    other.rename(path)
    assert mapped(rows) is not None


@pytest.mark.parametrize("kind", ["a file", "a link", "a link to nothing"])
def test_what_has_the_place_of_the_folder_is_replaced_without_a_trace(rows: Path, kind: str) -> None:
    other = rows.with_name("other")
    rows.rename(other)
    if kind == "a file":
        rows.touch()
    else:
        rows.symlink_to(other if kind == "a link" else "nowhere")
    for _ in range(2):
        write_rows(rows, KEY, {"train": preferences(3)})
        assert {path.name for path in rows.parent.iterdir()} == {"rows", "other"}
    found = mapped(rows)
    assert found is not None
    assert len(found["train"]) == 3
    assert mapped(other) is not None


def test_rows_of_another_key_are_not_mapped(rows: Path) -> None:
    assert mapped(rows, "another key") is None


def test_mapped_rows_are_read_only_and_no_memory_of_the_process(rows: Path) -> None:
    found = mapped(rows)
    assert found is not None
    (sample, *_) = found["train"].rows[0].samples
    assert not sample.ids.flags.writeable
    assert str(rows / "train.ids.npy") in Path("/proc/self/maps").read_text()


# ---- of a run ------------------------------------------------------------------------------------


@pytest.fixture
def job(talking_folder: Path, tmp_path: Path) -> TrainingRequest:
    """With a base's folder of its own, which tests may change."""
    folder = tmp_path / "base"
    shutil.copytree(talking_folder, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    return TrainingRequest(
        name="colours",
        recipe=parse_recipe({"r": 2, "batch_size": 4, "max_steps": 2}),
        train=write_chats(tmp_path / "train.jsonl", 24),
        held_out=write_chats(tmp_path / "held-out.jsonl", 6, first=100),
        folder=tmp_path / "run",
        base=BaseSettings(folder=folder),
        base_name="small",
    )


def prepared(job: TrainingRequest, *, reread: bool = False) -> tuple[TrainingPlan, int]:
    """The plan, and how often the data was said to be read."""
    seen: list[events.Event] = []
    config = AutoConfig.from_pretrained(job.base.folder)
    plan = prepare(config, job, seen.append, OpenGate(), rate=1e9, reread=reread)
    return plan, sum(isinstance(event, events.DataChecked) for event in seen)


def read(job: TrainingRequest) -> Data:
    return read_data(job, load_tokenizer(job.base), lambda part: None)


def test_data_is_read_and_told_of_once_and_the_plan_is_the_same(job: TrainingRequest) -> None:
    for wanted in (job, replace(job, held_out=None, folder=job.folder.with_name("split"))):
        whole = read(wanted)
        assert not whole.kept
        (first, told), (second, again) = prepared(wanted), prepared(wanted)
        assert (told, again) == (1, 0)
        assert first.identity == second.identity
        for plan in (first, second):
            assert plan.data.kept
            assert whole.held_out is not None
            assert plan.data.held_out is not None
            assert plain(plan.data.train) == plain(whole.train)
            assert plain(plan.data.held_out) == plain(whole.held_out)
            assert len(plan.data.held_out.prompts) == len(plan.data.held_out)
            names = (plan.data.train_name, plan.data.held_out_name, plan.data.given)
            assert names == (whole.train_name, whole.held_out_name, whole.given)


def test_a_check_reads_the_files_whatever_was_kept(job: TrainingRequest) -> None:
    assert [prepared(job, reread=True)[1] for _ in range(2)] == [1, 1]


def test_kept_rows_take_the_place_of_the_files(job: TrainingRequest) -> None:
    plan, _ = prepared(job)
    assert plan.data.key is not None
    # They cannot come from the files, so these were not parsed.
    write_rows(job.folder / "rows", plan.data.key, {"train": samples(3)})
    assert plain(read(job).train) == plain(samples(3))


def test_a_file_that_is_gone_is_told_although_its_rows_are_kept(job: TrainingRequest) -> None:
    prepared(job)
    Path(job.train).unlink()
    with pytest.raises(DataError, match=r"train\.jsonl.*\n.*cannot be read"):
        prepared(job)


def test_damaged_rows_are_read_again_in_silence(job: TrainingRequest) -> None:
    first, _ = prepared(job)
    whole = plain(first.data.train)
    path = job.folder / "rows" / "train.ids.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    second, told = prepared(job)
    assert (told, second.identity) == (1, first.identity)
    assert plain(second.data.train) == whole
    assert prepared(job)[1] == 0


def edit(path: Path, old: str, new: str) -> None:
    """Change a file, but neither its size nor its time."""
    before = path.stat()
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def template(base: Path, name: str, text: str) -> None:
    (base / CHAT_TEMPLATE_DIR).mkdir()
    (base / CHAT_TEMPLATE_DIR / f"{name}.jinja").write_text(text)


CHANGES: dict[str, Callable[[TrainingRequest], Any]] = {
    "the training file": lambda job: edit(Path(job.train), "red", "tan"),
    "the held-out file": lambda job: edit(Path(str(job.held_out)), "red", "tan"),
    "the tokenizer": lambda job: edit(job.base.folder / "tokenizer.json", '"Ġthe"', '"Ġthf"'),
    "the stop tokens": lambda job: edit(job.base.folder / "generation_config.json", "2", "3"),
    "the chat template": lambda job: (job.base.folder / "chat_template.jinja").open("a").write(" "),
    "a template with a name": lambda job: template(job.base.folder, "tool_use", "{{ tools }}"),
    "no held-out file": lambda job: replace(job, held_out=None),
    **{
        f"{name} {value}": lambda job, name=name, value=value: replace(
            job, recipe=replace(job.recipe, **{name: value})
        )
        for name, value in {
            "max_length": 100, "too_long": "drop", "train_on": "all", "template_date": "2024-02-29",
            "eval_split": 0.5, "seed": 1, "method": "dpo",
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_rows_are_of_the_data_the_settings_and_the_base_that_made_them(
    job: TrainingRequest, what: str
) -> None:
    def key(of: TrainingRequest) -> str | None:
        data = [[Path(str(source))] for source in (of.train, of.held_out) if source is not None]
        return rows_key(of.recipe.to_json(), of.base.folder, data)

    before = key(job)
    assert before == key(job) is not None
    made = CHANGES[what](job)
    assert key(made if isinstance(made, TrainingRequest) else job) != before


def test_changed_rows_of_the_same_size_and_time_are_read_again(job: TrainingRequest) -> None:
    before = replace(job, folder=job.folder.with_name("other"))
    assert prepared(before)[1] == 1
    (before.folder / "plan.json").unlink()
    edit(Path(job.train), "red", "tan")
    plan, told = prepared(before)
    assert told == 1
    assert plan.data.train.digest == prepared(job)[0].data.train.digest


def test_a_run_that_may_take_less_memory_maps_the_same_rows(job: TrainingRequest) -> None:
    prepared(job)
    less = replace(job, recipe=replace(job.recipe, micro_tokens=64, gradient_checkpointing=True))
    assert prepared(less)[1] == 0


def test_a_pipe_is_not_read_for_a_key(tmp_path: Path, talking_folder: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    assert rows_key({}, talking_folder, [[tmp_path / "rows.jsonl"]]) is None


def test_a_file_that_grows_while_it_is_read_is_not_kept(job: TrainingRequest) -> None:
    def grow(part: float) -> None:
        with Path(job.train).open("a") as file:
            file.write("\n")

    data = read_data(job, load_tokenizer(job.base), grow)
    assert data.key is None


def test_a_run_that_is_refused_keeps_no_rows_and_leaves_those_of_another(job: TrainingRequest) -> None:
    prepared(job)
    other = replace(job, train=write_chats(job.folder.with_name("other.jsonl"), 30))
    with pytest.raises(CheckpointError, match="another recipe"):
        prepared(other)
    assert prepared(job)[1] == 0


def test_without_room_for_the_rows_a_run_has_them_in_memory(job: TrainingRequest, tmp_path: Path) -> None:
    many = write_chats(tmp_path / "many.jsonl", 600)
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        plan, told = prepared(replace(job, train=many, folder=disk / "run"))
        assert (told, plan.data.kept, len(plan.data.train)) == (1, False, 600)
        assert sorted(path.name for path in (disk / "run").iterdir()) == ["plan.json"]


def test_mapped_or_in_memory_it_is_the_same_adapter(job: TrainingRequest) -> None:
    base = load_base(job.base)
    other = replace(job, folder=job.folder.with_name("in-memory"))
    other.folder.mkdir()
    (other.folder / ".rows.part").touch()  # in the place of the folder that is written into
    files = []
    for each in (job, other):
        train(lambda: base, each, lambda event: None, OpenGate())
        files.append((each.folder / "adapter" / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert (job.folder / "rows").is_dir()
    assert not (other.folder / "rows").exists()
    told = [json.loads(line)["type"] for line in (job.folder / "events.jsonl").read_text().splitlines()]
    assert told.count("data_checked") == 1
