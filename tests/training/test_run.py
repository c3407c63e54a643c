"""A whole run: from files to an adapter that PEFT loads, a report, a model card and a record of events."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.training.runs import write_chats

from onebase_engine.base.load import BaseSettings, UnsupportedBaseError, load_base
from onebase_engine.base.view import view
from onebase_training import events
from onebase_training.checkpoint import CheckpointError, RunReport
from onebase_training.data.dataset import DataError
from onebase_training.events import Interrupted, OpenGate
from onebase_training.parent import ActiveVersion, Parent
from onebase_training.recipe import RecipeError, parse_recipe
from onebase_training.run import DoesNotFitError, TrainingRequest, train

SETTINGS: dict[str, Any] = {
    "r": 4,
    "batch_size": 4,
    "max_steps": 8,
    "learning_rate": 2e-2,
    "eval_every": 4,
    "metrics": ["json_valid", "exact_match"],
    "metric_rows": 3,
    "metric_tokens": 8,
    "sample_prompts": ["Which colour?"],
}


@pytest.fixture(scope="module")
def base(talking_folder: Path) -> torch.nn.Module:
    return load_base(BaseSettings(folder=talking_folder))


def new_job(base_folder: Path, folder: Path) -> TrainingRequest:
    return TrainingRequest(
        name="colours",
        recipe=parse_recipe(SETTINGS),
        train=write_chats(folder / "train.jsonl", 24),
        held_out=write_chats(folder / "held-out.jsonl", 6, first=100),
        folder=folder / "run",
        base=BaseSettings(folder=base_folder),
        base_name="small",
    )


@pytest.fixture
def job(talking_folder: Path, tmp_path: Path) -> TrainingRequest:
    return new_job(talking_folder, tmp_path)


@pytest.fixture
def quick(job: TrainingRequest) -> TrainingRequest:
    """One step, after which nothing is generated."""
    recipe = replace(job.recipe, max_steps=1, eval_every=1, metrics=(), sample_prompts=())
    return replace(job, recipe=recipe)


@dataclass(frozen=True)
class Whole:
    """A run from its beginning to its end, which no test may write to."""

    job: TrainingRequest
    report: RunReport
    events: list[events.Event]

    def copied(self, job: TrainingRequest) -> TrainingRequest:
        """The job that has run, in the other's folder."""
        shutil.copytree(self.job.folder, job.folder)
        return job


@pytest.fixture(scope="module")
def whole(base: torch.nn.Module, talking_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    job = new_job(talking_folder, tmp_path_factory.mktemp("whole"))
    seen: list[events.Event] = []
    return Whole(job, run(base, job, seen), seen)


def run(base: torch.nn.Module, job: TrainingRequest, seen: list[events.Event] | None = None) -> RunReport:
    return train(lambda: base, job, (seen if seen is not None else []).append, OpenGate())


def test_a_run_leaves_an_adapter_that_peft_loads_and_tells_what_came_of_it(
    base: torch.nn.Module, whole: Whole
) -> None:
    job, report, seen = whole.job, whole.report, whole.events
    assert report.loss_before is not None
    assert report.loss_after is not None
    assert report.loss_after < report.loss_before
    assert report.better is True
    assert set(report.metrics_before) == set(report.metrics_after) == {"json_valid", "exact_match"}
    assert json.loads((job.folder / "report.json").read_text()) == json.loads(json.dumps(report.to_json()))
    adapter = job.folder / "adapter"
    names = sorted(path.name for path in adapter.iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert report.adapter_bytes == (adapter / "adapter_model.safetensors").stat().st_size
    PeftModel.from_pretrained(view(base), adapter)
    # In one order in every process, or the same adapter would have another digest.
    targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)
    card = (adapter / "README.md").read_text()
    for part in (
        "train.jsonl",
        "held-out.jsonl",
        f"{report.loss_before:.4f}",
        "`json_valid`",
        "| `r` | `4` |",
    ):
        assert part in card
    kinds = [type(event) for event in seen]
    order = [
        events.DataChecked,
        events.Planned,
        events.Measured,
        events.StepDone,
        events.Saved,
        events.Finished,
    ]
    assert [kinds.index(kind) for kind in order] == sorted(kinds.index(kind) for kind in order)
    subjects = [event.subject for event in seen if isinstance(event, events.Measured)]
    assert subjects == ["base", "adapter"]
    assert [event.step for event in seen if isinstance(event, events.Sampled)] == [0, 4, 8]
    recorded = [json.loads(line)["type"] for line in (job.folder / "events.jsonl").read_text().splitlines()]
    assert recorded.count("step") == 8
    assert recorded[-1] == "finished"


def test_json_is_measured_and_replies_are_shown_without_being_asked(
    base: torch.nn.Module, job: TrainingRequest, whole: Whole
) -> None:
    recipe = replace(job.recipe, metrics=(), sample_prompts=(), max_steps=2, eval_every=2)
    version = Parent.of_folder(whole.job.folder / "adapter")
    active = ActiveVersion("colours@aaaa", "a" * 64, version)
    report = train(
        lambda: base, replace(job, recipe=recipe), lambda event: None, OpenGate(), find_active=lambda: active
    )
    assert set(report.metrics_after) == set(report.metrics_active) == {"json_valid", "exact_match"}
    assert [row["line"] for row in report.replies] == [1, 2, 3]  # metric_rows
    assert set(report.replies[0]) == {
        "line", "slice", "prompt", "reference", "base", "active", "adapter",
    }  # fmt: skip
    assert report.replies[0]["prompt"].endswith("Item 100 is red. Which colour?")
    assert report.replies[0]["reference"] == '{"colour": "red"}'
    held = json.loads((job.folder / "report.json").read_text())
    assert held["replies"] == report.replies
    # The card may be published.
    card = (job.folder / "adapter" / "README.md").read_text()
    assert "## Results" in card
    assert not any(text in card for text in ("Which colour?", '{"colour": "red"}'))


def test_replies_are_shown_where_nothing_is_measured_and_none_are_generated_for_no_rows(
    base: torch.nn.Module, job: TrainingRequest
) -> None:
    rows = [{"prompt": f"{n}?", "completion": f"A long reply, number {n}, of many words"} for n in range(9)]
    Path(str(job.held_out)).write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = []
    for count in (3, 0):
        recipe = replace(
            job.recipe, metrics=(), sample_prompts=(), max_steps=1, eval_every=1, metric_rows=count
        )
        one = replace(job, recipe=recipe, folder=job.folder.with_name(f"run-{count}"))
        seen: list[events.Event] = []
        report = run(base, one, seen)
        assert (report.metrics_after, report.warnings) == ({}, [])
        assert not any(isinstance(event, events.Measured) for event in seen)
        shown.append(len(report.replies))
    assert shown == [3, 0]


def test_a_base_that_cannot_generate_replies_is_trained_if_none_were_asked_for(
    base: torch.nn.Module, job: TrainingRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> list[str]:
        raise UnsupportedBaseError("its attention cannot be paged")

    monkeypatch.setattr("onebase_training.replies.generate_replies", refuse)
    recipe = replace(job.recipe, metrics=(), sample_prompts=(), max_steps=1, eval_every=1)
    seen: list[events.Event] = []
    report = run(base, replace(job, recipe=recipe), seen)
    assert (report.replies, report.metrics_after, report.better is not None) == ([], {}, True)
    assert [event.message for event in seen if isinstance(event, events.Notice)] == [
        "No replies to held-out prompts are compared: its attention cannot be paged"
    ]
    with pytest.raises(UnsupportedBaseError):
        run(base, replace(job, folder=job.folder.with_name("asked")))


def test_paused_and_started_again_it_is_the_same_adapter(
    base: torch.nn.Module, job: TrainingRequest, whole: Whole
) -> None:
    class Pausing:
        left = 60

        def wait(self) -> None:
            self.left -= 1
            if self.left == 0:
                raise Interrupted("pause")

    gate = Pausing()
    pauses = 0
    while pauses < 20:
        try:
            train(lambda: base, job, lambda event: None, gate)
            break
        except Interrupted:
            pauses, gate.left = pauses + 1, 150
    assert pauses > 0
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (job.folder, whole.job.folder)]
    assert files[0].read_bytes() == files[1].read_bytes()


class KilledError(Exception):
    """What ends a run here."""


def test_a_run_that_is_to_end_early_keeps_the_best_of_the_steps_that_it_did_and_can_be_killed_meanwhile(
    base: torch.nn.Module, job: TrainingRequest, whole: Whole
) -> None:
    job = replace(job, recipe=replace(job.recipe, eval_every=2))
    seen: list[events.Event] = []

    def listen(event: events.Event) -> None:
        """Somebody is gone when all is trained and measured."""
        seen.append(event)
        if isinstance(event, events.Phase) and event.name == "saving":
            raise KilledError

    def ask() -> int | None:
        """Somebody asks during the third step."""
        return 2 if any(isinstance(event, events.StepDone) and event.step == 3 for event in seen) else None

    with pytest.raises(KilledError):
        train(lambda: base, job, listen, OpenGate(), last_step=ask)
    done = len(seen)
    report = train(lambda: base, job, seen.append, OpenGate(), last_step=lambda: 2)
    assert not [event for event in seen[done:] if isinstance(event, events.StepDone)]
    assert (report.steps, report.losses) == (3, whole.report.losses[:3])
    rates = [event.learning_rate for event in seen if isinstance(event, events.StepDone)]
    assert rates == [one.learning_rate for one in whole.events if isinstance(one, events.StepDone)][:3]
    assert [step for step, _ in report.held_out] == [0, 2, 3]
    losses = dict(report.held_out[1:])
    assert report.loss_after == min(losses.values()) == losses[report.best_step]
    assert report.better is True
    assert (job.folder / "adapter" / "adapter_model.safetensors").is_file()


def test_a_run_that_is_to_end_early_ends_with_the_evaluation_that_runs_then(
    base: torch.nn.Module, job: TrainingRequest
) -> None:
    seen: list[events.Event] = []

    def ask() -> int | None:
        """Somebody asks while the fourth step is measured."""
        evaluated = any(isinstance(event, events.Evaluated) and event.step == 4 for event in seen)
        return 4 if evaluated else None

    report = train(lambda: base, job, seen.append, OpenGate(), last_step=ask)
    assert (report.steps, [step for step, _ in report.held_out]) == (4, [0, 4])
    assert [event.step for event in seen if isinstance(event, events.Saved)][-1] == 4


def test_a_finished_run_is_not_trained_again(
    base: torch.nn.Module, job: TrainingRequest, whole: Whole
) -> None:
    seen: list[events.Event] = []
    assert run(base, whole.copied(job), seen).losses == whole.report.losses
    assert not [event for event in seen if isinstance(event, events.StepDone)]


def test_another_recipe_in_the_same_folder_is_refused_and_leaves_the_run_as_it_was(
    base: torch.nn.Module, job: TrainingRequest, whole: Whole
) -> None:
    whole.copied(job)
    before = {path: path.read_bytes() for path in job.folder.rglob("*") if path.is_file()}
    other = replace(job, recipe=replace(job.recipe, r=8))
    with pytest.raises(CheckpointError, match="another recipe"):
        run(base, other)
    assert {path: path.read_bytes() for path in job.folder.rglob("*") if path.is_file()} == before


def test_without_held_out_rows_nothing_is_called_better(
    base: torch.nn.Module, quick: TrainingRequest
) -> None:
    report = run(base, replace(quick, held_out=None, recipe=replace(quick.recipe, eval_split=0.0)))
    assert (report.better, report.loss_before, report.loss_after) == (None, None, None)
    assert "Nothing was held out" in (quick.folder / "adapter" / "README.md").read_text()


def test_a_part_is_held_out_where_no_file_is_given(base: torch.nn.Module, quick: TrainingRequest) -> None:
    report = run(base, replace(quick, held_out=None, recipe=replace(quick.recipe, eval_split=0.25)))
    assert report.loss_before is not None


def test_in_bfloat16_the_file_is_half_as_large(
    base: torch.nn.Module, quick: TrainingRequest, whole: Whole
) -> None:
    half = run(base, replace(quick, save_dtype=torch.bfloat16))
    assert half.adapter_bytes < 0.6 * whole.report.adapter_bytes
    tensors = load_file(quick.folder / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_what_cannot_fit_is_refused_before_it_begins(base: torch.nn.Module, job: TrainingRequest) -> None:
    with pytest.raises(DoesNotFitError, match=r"\S"):
        run(base, replace(job, memory_limit=100_000_000))
    assert not (job.folder / "checkpoints").exists()
    assert not (job.folder / "plan.json").exists()


def test_bad_lines_and_settings_stop_it_before_it_begins(base: torch.nn.Module, job: TrainingRequest) -> None:
    bad = job.folder.with_name("bad.jsonl")
    bad.write_text('{"messages": []}\nnot json\n')
    with pytest.raises(DataError) as caught:
        run(base, replace(job, train=bad))
    assert [problem.line for problem in caught.value.problems] == [1, 2]
    with pytest.raises(RecipeError, match="wq"):
        run(base, replace(job, recipe=replace(job.recipe, targets=("wq",))))


def test_the_report_says_what_part_was_held_out_and_an_explicit_part_has_no_limit(
    base: torch.nn.Module, quick: TrainingRequest
) -> None:
    many = write_chats(quick.folder.with_name("many.jsonl"), 500)
    recipe = replace(quick.recipe, eval_split=0.5)
    seen: list[events.Event] = []
    report = run(base, replace(quick, train=many, held_out=None, recipe=recipe), seen)
    assert report.recipe["eval_split"] == 0.5
    (checked,) = [event.report for event in seen if isinstance(event, events.DataChecked)]
    assert (checked["rows"], checked["evaluation"]["rows"]) == (250, 250)


def test_a_pattern_that_means_no_layer_is_refused(base: torch.nn.Module, job: TrainingRequest) -> None:
    with pytest.raises(RecipeError, match="dwon_proj") as caught:
        run(base, replace(job, recipe=replace(job.recipe, rank_pattern={"dwon_proj": 3})))
    assert caught.value.field == "rank_pattern"


def test_metrics_of_the_base_that_were_cut_off_are_measured_again(
    base: torch.nn.Module, job: TrainingRequest, whole: Whole
) -> None:
    whole.copied(job)
    (job.folder / "base_metrics.json").write_text("")
    assert run(base, job).metrics_before == whole.report.metrics_before


def test_a_run_that_needed_too_much_memory_goes_on_with_less(
    base: torch.nn.Module, job: TrainingRequest
) -> None:
    def stop(event: events.Event) -> None:
        if isinstance(event, events.Saved):
            raise Interrupted("pause")

    with pytest.raises(Interrupted):
        train(lambda: base, job, stop, OpenGate())
    seen: list[events.Event] = []
    run(base, replace(job, recipe=replace(job.recipe, micro_tokens=64, gradient_checkpointing=True)), seen)
    (planned,) = [event for event in seen if isinstance(event, events.Planned)]
    assert planned.first_step > 0
    assert (planned.recipe["micro_tokens"], planned.recipe["gradient_checkpointing"]) == (64, True)


def test_eva_finds_the_same_ranks_when_a_run_goes_on_with_less_memory(
    base: torch.nn.Module, job: TrainingRequest
) -> None:
    def stop(event: events.Event) -> None:
        if isinstance(event, events.Saved):
            raise Interrupted("pause")

    recipe = replace(job.recipe, init="eva", micro_tokens=256, metrics=(), sample_prompts=())
    job = replace(job, recipe=recipe, train=write_chats(job.folder.with_name("more.jsonl"), 60))
    with pytest.raises(Interrupted):
        train(lambda: base, job, stop, OpenGate())
    assert run(base, replace(job, recipe=replace(recipe, micro_tokens=64))).steps == 8


def test_a_checkpoint_of_other_ranks_is_told(
    base: torch.nn.Module, job: TrainingRequest, whole: Whole
) -> None:
    whole.copied(job)
    path = max((job.folder / "checkpoints").glob("step-*")) / "adapter.safetensors"
    save_file({name: torch.zeros(7, 7) for name in load_file(path)}, path)
    with pytest.raises(CheckpointError, match="of other ranks"):
        run(base, job)


def test_a_line_that_a_killed_process_left_half_written_spoils_no_other(
    base: torch.nn.Module, quick: TrainingRequest
) -> None:
    quick.folder.mkdir()
    (quick.folder / "events.jsonl").write_text('{"type": "st')
    run(base, quick)
    lines = (quick.folder / "events.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["type"] == "phase"
