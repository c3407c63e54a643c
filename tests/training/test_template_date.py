"""A chat template that prints today's date: the same tokens on every day of a run."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import pytest
from tests.training.data_support import base_tokenizer, chat, only, recipe, whole, write_rows
from tests.training.runs import write_chats

from onebase_engine.base.load import BaseSettings, load_base
from onebase_training import events, run
from onebase_training.checkpoint import CheckpointError
from onebase_training.data.dataset import DataError
from onebase_training.data.reader import load_dataset
from onebase_training.data.tokens import dated_tokenizer
from onebase_training.events import Interrupted, OpenGate
from onebase_training.recipe import Recipe, RecipeError, parse_recipe
from onebase_training.run import TrainingRequest, train
from onebase_training.sweep import Grid, Trial, sweep

# As Llama 3.2's: the caller may say the day.
DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ '<|im_start|>system\nToday Date: ' + date_string + '<|im_end|>\n' }}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def dated_folder(talking_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dated") / "base"
    shutil.copytree(talking_folder, folder)
    (folder / "chat_template.jinja").write_text(DATED)
    return folder


@pytest.fixture
def job(dated_folder: Path, tmp_path: Path) -> TrainingRequest:
    settings = {"r": 4, "batch_size": 4, "max_steps": 4, "save_every": 2, "sample_prompts": ["Which?"]}
    return TrainingRequest(
        name="colours",
        recipe=parse_recipe({**settings, "metric_tokens": 2}),
        train=write_chats(tmp_path / "train.jsonl", 12),
        held_out=write_chats(tmp_path / "held-out.jsonl", 4, first=100),
        folder=tmp_path / "run",
        base=BaseSettings(folder=dated_folder),
        base_name="small",
    )


@pytest.fixture
def tomorrow(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A call after which it is the next day."""

    class Tomorrow(date):
        @classmethod
        def today(cls) -> date:
            return date.today() + timedelta(days=1)

    return lambda: monkeypatch.setattr(run, "date", Tomorrow)


def test_the_day_of_the_recipe_is_what_the_template_prints(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [chat("hi", "yo")])
    tokenizer = base_tokenizer(DATED)
    one = only(load_dataset(path, tokenizer, recipe(template_date="2024-02-29")))
    assert "Today Date: 29 Feb 2024<" in whole(one, tokenizer)
    today = only(load_dataset(path, tokenizer, recipe()))
    assert f"Today Date: {date.today():%d %b %Y}<" in whole(today, tokenizer)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    "form", ["%d %b %Y", "%Y-%m-%d", "%A, %B %-d, %Y", "%j of %y", "none", "100%", "100%% on %d"]
)
def test_a_pinned_day_is_written_as_the_template_writes_today(form: str, several: bool) -> None:
    template = "{%- set form = '" + form + "' %}\n  Today: {{ strftime_now(form) }}{{ messages[0].content }}"
    tokenizer = copy.copy(base_tokenizer())
    tokenizer.chat_template = {"default": template, "tool_use": template} if several else template
    today = date.today()
    dated = dated_tokenizer(tokenizer, recipe(template_date=today.isoformat()))
    shown = [
        one.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        for one in (tokenizer, dated)
    ]
    assert shown[0] == shown[1]
    assert f"Today: {today.strftime(form)}x" in shown[0]


def test_a_run_goes_on_the_next_day_to_the_same_adapter(
    job: TrainingRequest, tomorrow: Callable[[], None]
) -> None:
    base = load_base(job.base)

    def stop(event: events.Event) -> None:
        if isinstance(event, events.Saved):
            raise Interrupted("pause")

    whole_run = replace(job, folder=job.folder.with_name("whole"))
    report = train(lambda: base, whole_run, lambda event: None, OpenGate())
    assert report.recipe["template_date"] == date.today().isoformat()
    with pytest.raises(Interrupted):
        train(lambda: base, job, stop, OpenGate())
    tomorrow()
    seen: list[events.Event] = []
    again = train(lambda: base, job, seen.append, OpenGate())
    assert next(event.first_step for event in seen if isinstance(event, events.Planned)) == 2
    assert again.recipe["template_date"] == report.recipe["template_date"]
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (job.folder, whole_run.folder)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert samples_after(job, 4) == samples_after(whole_run, 4)


def samples_after(job: TrainingRequest, step: int) -> list[str]:
    read = [json.loads(line) for line in (job.folder / "events.jsonl").read_text().splitlines()]
    return [event["text"] for event in read if event["type"] == "sample" and event["step"] == step]


@pytest.mark.full
def test_a_sweep_goes_on_the_next_day(job: TrainingRequest, tomorrow: Callable[[], None]) -> None:
    base = load_base(job.base)
    grid = Grid(r=(2, 4), learning_rate=(1e-2,), targets=(("attention",),))
    steps = []

    def listen(trial: Trial, event: events.Event) -> None:
        if isinstance(event, events.StepDone):
            steps.append(trial.name)
            if len(steps) == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(lambda: base, job, grid, listen, OpenGate(), survivors=1.0)
    tomorrow()
    result = sweep(lambda: base, job, grid, listen, OpenGate(), survivors=1.0)
    assert [trial.status for trial in result.trials] == ["finished", "finished"]
    assert len(steps) <= 9


def test_a_template_without_a_date_pins_none(job: TrainingRequest, talking_folder: Path) -> None:
    plain = replace(job, base=BaseSettings(folder=talking_folder))
    report = train(lambda: load_base(plain.base), plain, lambda event: None, OpenGate())
    assert report.recipe["template_date"] == "auto"
    assert not (job.folder / "template_date").exists()


def test_a_refused_run_has_not_begun(job: TrainingRequest, tomorrow: Callable[[], None]) -> None:
    base = load_base(job.base)
    bad = job.folder.with_name("bad.jsonl")
    bad.write_text("no row")
    with pytest.raises(DataError):
        train(lambda: base, replace(job, train=bad), lambda event: None, OpenGate())
    tomorrow()
    report = train(lambda: base, job, lambda event: None, OpenGate())
    assert report.recipe["template_date"] == (date.today() + timedelta(days=1)).isoformat()


def test_a_damaged_day_is_told(job: TrainingRequest) -> None:
    job.folder.mkdir()
    (job.folder / "template_date").write_text("yesterday")
    with pytest.raises(CheckpointError, match="template_date cannot be read"):
        train(lambda: load_base(job.base), job, lambda event: None, OpenGate())


@pytest.mark.parametrize("day", ["yesterday", "2026-13-01", "20260131", "2026-W01-1", ""])
def test_what_is_no_day_is_refused(day: str) -> None:
    with pytest.raises(RecipeError, match="write a day as in 2026-01-31") as caught:
        Recipe(template_date=day)
    assert caught.value.field == "template_date"
