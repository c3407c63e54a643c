"""Training that goes on from an adapter: its weights as PEFT loads them, its own rank and layers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from onebase_adapters.training import events
from onebase_adapters.training.cli.train import main
from onebase_adapters.training.events import OpenGate
from onebase_adapters.training.loop import ProcessGroup
from onebase_adapters.training.objectives import PreparedRun, make_objective
from onebase_adapters.training.parent import Parent, modules_of
from onebase_adapters.training.recipe import MODEL, RecipeError, continued, parse_recipe
from onebase_adapters.training.run import Job, PlannedRun, prepare, train
from onebase_adapters.training.trainable import ADAPTER, Trainable
from onebase_engine.base.layers import empty_base
from onebase_engine.base.load import BaseSettings, load_base, load_config
from onebase_engine.base.view import peft_view

from .runs import (
    assert_equal,
    preferences,
    recipe_for,
    samples,
    talking_base,
    tiny_base,
    trainer,
    weights,
    write_chats,
)

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 8},
        "alpha_pattern": {"down_proj": 2},
    },
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj"], "use_dora": True, "use_rslora": True},
    "some layers": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [1]},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return tiny_base(tmp_path_factory.mktemp("base"))


def saved(base: torch.nn.Module, folder: Path, **config: Any) -> Path:
    """An adapter as PEFT makes and saves it, that changes much."""
    torch.manual_seed(3)
    made = LoraConfig(**{"task_type": "CAUSAL_LM", "init_lora_weights": False, **config})
    get_peft_model(peft_view(base), made).save_pretrained(folder)
    return folder


def own(base: torch.nn.Module, folder: Path) -> tuple[Parent, dict[str, Any]]:
    parent = Parent.of_folder(folder)
    return parent, modules_of(parent, base)


@pytest.mark.parametrize("kind", KINDS)
def test_training_begins_with_the_weights_and_outputs_that_peft_gives(
    base: torch.nn.Module, tmp_path: Path, kind: str
) -> None:
    folder = saved(base, tmp_path / "parent", **KINDS[kind])
    parent, settings = own(base, folder)
    recipe = recipe_for(samples(8), **continued({}, settings, "p"))
    made = Trainable(base, recipe, OpenGate(), parent=parent)
    reference: Any = PeftModel.from_pretrained(
        peft_view(base), folder, adapter_name=ADAPTER, is_trainable=True
    )
    theirs = {name: one for name, one in reference.named_parameters() if one.requires_grad}
    assert_equal(
        {n: p.data for n, p in made.named_parameters().items()}, {n: p.data for n, p in theirs.items()}
    )
    ids = torch.randint(3, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    made._packed.set_lengths((12,), made.device)
    with torch.no_grad():
        ours = made.model(input_ids=ids, position_ids=torch.arange(12)[None], use_cache=False).logits
        expected = reference(input_ids=ids, use_cache=False).logits
        bare = base(input_ids=ids, use_cache=False).logits
    assert torch.allclose(ours, expected, atol=0.02)
    assert not torch.allclose(ours, bare, atol=0.1)


def test_no_step_writes_the_parents_own_weights_again(tmp_path: Path) -> None:
    """And a step writes others, of the same rank on the same layers."""
    folder, settings = talking_base(tmp_path / "base"), {}
    parent_folder = saved(load_base(BaseSettings(folder=folder)), tmp_path / "parent", **KINDS["patterns"])
    job, base = job_on(tmp_path, folder, parent_folder, max_steps=1, batch_size=4, **settings)
    plan = prepare(load_config(folder), job, lambda event: None, OpenGate(), rate=None)
    run = PlannedRun(base, job, plan, lambda event: None, OpenGate())
    report = run.finish()
    before = load_file(parent_folder / "adapter_model.safetensors")
    assert_equal(load_file(job.folder / "adapter" / "adapter_model.safetensors"), before)
    assert (report.steps, report.parent) == (0, job.parent.label if job.parent else "")
    run.train()
    run.finish()
    after = load_file(job.folder / "adapter" / "adapter_model.safetensors")
    assert {name: one.shape for name, one in after.items()} == {
        name: one.shape for name, one in before.items()
    }
    assert any(not torch.equal(after[name], before[name]) for name in before)
    config = json.loads((job.folder / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert (config["r"], config["lora_alpha"]) in ((4, 4.0), (8, 2.0))
    again: Any = PeftModel.from_pretrained(peft_view(base), job.folder / "adapter")
    shapes = {name: one.shape for name, one in again.named_parameters() if "lora_A" in name}
    assert {shape[0] for name, shape in shapes.items() if "down_proj" in name} == {8}


def job_on(
    tmp_path: Path, base_folder: Path, parent_folder: Path, **given: Any
) -> tuple[Job, torch.nn.Module]:
    parent = Parent.of_folder(parent_folder)
    settings = modules_of(parent, empty_base(load_config(base_folder)))
    recipe = parse_recipe(continued(given, settings, parent.label))
    base = BaseSettings(folder=base_folder)
    job = Job(
        name="next",
        recipe=recipe,
        train=write_chats(tmp_path / "rows.jsonl", 12),
        held_out=write_chats(tmp_path / "held.jsonl", 4, first=100),
        folder=tmp_path / "run",
        base=base,
        base_name="tiny",
        parent=parent,
    )
    return job, load_base(base)


def test_a_checkpoint_holds_the_adapter_of_its_step_as_peft_has_it(tmp_path: Path) -> None:
    folder = talking_base(tmp_path / "base")
    parent = saved(load_base(BaseSettings(folder=folder)), tmp_path / "parent", **KINDS["patterns"])
    job, base = job_on(tmp_path, folder, parent, max_steps=2, batch_size=4, save_every=1)
    plan = prepare(load_config(folder), job, lambda event: None, OpenGate(), rate=None)
    run = PlannedRun(base, job, plan, lambda event: None, OpenGate())
    run.train(until=1)
    first = run._trainer.trainable.named_parameters()
    expected = {name.replace(f".{ADAPTER}", ""): one.detach().clone() for name, one in first.items()}
    run.train()
    place = job.folder / "checkpoints" / "step-00000001" / "adapter"
    assert_equal(load_file(place / "adapter_model.safetensors"), expected)
    assert sorted(path.name for path in place.iterdir() if path.name.startswith("adapter_")) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    PeftModel.from_pretrained(peft_view(base), place)


def test_a_run_measures_base_and_parent_and_is_better_only_if_it_beats_both(tmp_path: Path) -> None:
    folder = talking_base(tmp_path / "base")
    parent = saved(load_base(BaseSettings(folder=folder)), tmp_path / "parent", **KINDS["plain"])
    job, base = job_on(
        tmp_path, folder, parent, max_steps=3, batch_size=4, learning_rate=1e-2, metrics=["min_characters:1"],
        metric_tokens=4, metric_rows=2, eval_every=3,
    )  # fmt: skip
    heard: list[events.Event] = []
    report = train(lambda: base, job, heard.append, OpenGate())
    first = [event for event in heard if isinstance(event, events.Evaluated) and not event.step]
    assert [event.parent for event in first] == [False, True]
    assert (report.loss_before, report.loss_parent) == (first[0].loss, first[1].loss)
    assert report.loss_parent is not None
    assert report.loss_after is not None
    assert report.loss_before is not None
    assert report.better is (report.loss_after < min(report.loss_parent, report.loss_before))
    assert set(report.metrics_parent) == {"min_characters:1"}
    subjects = [event.subject for event in heard if isinstance(event, events.Measured)]
    assert subjects == ["base", "parent", "adapter"]
    card = (job.folder / "adapter" / "README.md").read_text()
    assert "| base | parent | adapter |" in card
    # An adapter that is better than the base and worse than its parent is not better.
    run = PlannedRun(base, job, prepare(load_config(folder), job, heard.append, OpenGate(), rate=None),
                     heard.append, OpenGate())  # fmt: skip
    state = run._trainer.state
    state.base_loss, state.parent_loss, state.best_loss = 3.0, 1.0, 2.0
    assert run._better({}) is False
    state.best_loss = 0.5
    assert run._better({}) is True


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(base: torch.nn.Module, tmp_path: Path) -> None:
    parent, settings = own(base, saved(base, tmp_path / "parent", **KINDS["plain"]))
    data = samples(8)
    recipe = recipe_for(data, **continued({}, settings, "p"))
    whole = trainer(base, recipe, data, tmp_path / "whole", held_out=samples(4, 9), parent=parent)
    whole.run()
    half = trainer(base, recipe, data, tmp_path / "half", held_out=samples(4, 9), parent=parent)
    half.run(until=3)
    rest = trainer(base, recipe, data, tmp_path / "half", held_out=samples(4, 9), parent=parent)
    assert rest.resume() == 3
    rest.run()
    assert_equal(weights(rest), weights(whole))
    assert rest.state.parent_loss == whole.state.parent_loss


def test_dpo_prefers_from_where_the_parent_stands(base: torch.nn.Module, tmp_path: Path) -> None:
    """Its reference is the parent: before the first step no pair has a margin, also after a resumption."""
    parent, settings = own(base, saved(base, tmp_path / "parent", **KINDS["plain"]))
    data = preferences(6)
    recipe = recipe_for(data, **continued({"method": "dpo"}, settings, "p"))
    made = Trainable(base, recipe, OpenGate(), parent=parent)
    objective: Any = make_objective(made, recipe)
    objective.prepare(data.rows, recipe, PreparedRun("run", tmp_path / "before", ProcessGroup()))
    before = dict(objective._references)
    now = {name: one.detach().clone() for name, one in made.named_parameters().items()}
    with torch.no_grad():
        for one in made.parameters():
            one.add_(0.1)
    objective.prepare(data.rows, recipe, PreparedRun("run", tmp_path / "after", ProcessGroup()))
    assert objective._references == before
    for name, one in made.named_parameters().items():
        assert torch.equal(one, now[name] + 0.1)
    run = trainer(base, recipe, data, tmp_path / "run", held_out=preferences(4, 9), parent=parent)
    run.run(until=1)
    assert run.state.parent_loss == pytest.approx(0.6931472, abs=1e-4)
    assert run.state.base_loss != pytest.approx(0.6931472, abs=1e-2)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"r": 16}, "r"),
        ({"alpha": 3}, "alpha"),
        ({"targets": "attention"}, "targets"),
        ({"targets": ["q_proj"]}, "targets"),
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"init": "gaussian"}, "init"),
    ],
)
def test_a_setting_that_contradicts_the_parent_is_refused_by_name(
    base: torch.nn.Module, tmp_path: Path, given: dict[str, Any], field: str
) -> None:
    _, settings = own(base, saved(base, tmp_path / "parent", **KINDS["plain"]))
    with pytest.raises(RecipeError, match=f"Leave {field} out") as refused:
        continued(given, settings, "acme@1")
    assert refused.value.field == field
    assert "acme@1" in str(refused.value)


def test_settings_that_say_what_the_parent_is_are_taken(base: torch.nn.Module, tmp_path: Path) -> None:
    _, settings = own(base, saved(base, tmp_path / "parent", **KINDS["plain"]))
    given = {
        "r": 4, "alpha": 8, "targets": "v_proj,q_proj", "init": True, "use_dora": False, "dropout": 0.1,
        "epochs": 2,
    }  # fmt: skip
    recipe = parse_recipe(continued(given, settings, "p"))
    assert (recipe.r, recipe.alpha, recipe.dropout, recipe.epochs) == (4, 8.0, 0.1, 2.0)
    assert continued({"alpha": "auto", "r": None}, settings, "p")["alpha"] == 8.0


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is no linear layer"),
        ({"task_type": "FEATURE_EXTRACTION"}, "its task_type is FEATURE_EXTRACTION"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    base: torch.nn.Module, tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    folder = saved(base, tmp_path / "other", **{"r": 4, "target_modules": ["q_proj"], **config})
    with pytest.raises(RecipeError, match=says) as refused:
        own(base, folder)
    assert refused.value.field == MODEL


def test_an_adapter_of_another_base_is_refused(base: torch.nn.Module, tmp_path: Path) -> None:
    small = load_base(BaseSettings(folder=talking_base(tmp_path / "other")))
    with pytest.raises(RecipeError, match="cannot be trained further on this base"):
        own(base, saved(small, tmp_path / "small", r=4, target_modules=["q_proj"]))


def test_a_recipe_that_disagrees_with_the_parents_files_does_not_begin(tmp_path: Path) -> None:
    folder = talking_base(tmp_path / "base")
    parent = saved(load_base(BaseSettings(folder=folder)), tmp_path / "parent", **KINDS["plain"])
    job, _ = job_on(tmp_path, folder, parent)
    wrong = replace(job, recipe=replace(job.recipe, r=8))
    with pytest.raises(RecipeError, match="r is 8"):
        prepare(load_config(folder), wrong, lambda event: None, OpenGate(), rate=None)


def test_another_parent_is_another_run(tmp_path: Path) -> None:
    from onebase_adapters.training.checkpoint import CheckpointError

    folder = talking_base(tmp_path / "base")
    base = load_base(BaseSettings(folder=folder))
    job, _ = job_on(tmp_path, folder, saved(base, tmp_path / "parent", **KINDS["plain"]))
    prepare(load_config(folder), job, lambda event: None, OpenGate(), rate=None)
    other = replace(job, parent=replace(job.parent, digest="0" * 64)) if job.parent else job
    with pytest.raises(CheckpointError, match="another recipe, other data"):
        prepare(load_config(folder), other, lambda event: None, OpenGate(), rate=None)


def test_the_command_goes_on_from_a_run_and_shows_the_parent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = talking_base(tmp_path / "base"), write_chats(tmp_path / "rows.jsonl", 8)
    monkeypatch.chdir(tmp_path)
    common = [
        "--data",
        str(data),
        "--base",
        str(base),
        "--device",
        "cpu",
        "--max-steps",
        "1",
        "--batch-size",
        "2",
    ]
    assert main([*common, "--name", "one", "--r", "4", "--targets", "q_proj"]) == 0
    assert main([*common, "--name", "two", "--from", "runs/one", "--r", "8"]) == 2
    assert "--r: r is 8, but runs/one/adapter has r 4" in capsys.readouterr().err
    assert main([*common, "--name", "two", "--from", "runs/nowhere"]) == 2
    assert "--from: runs/nowhere" in capsys.readouterr().err
    assert main([*common, "--name", "two", "--from", "runs/one"]) == 0
    said = capsys.readouterr().err
    assert "base and runs/one/adapter against adapter" in said
    report = json.loads((tmp_path / "runs/two/report.json").read_text())
    assert (report["parent"], report["recipe"]["r"]) == ("runs/one/adapter", 4)
    assert report["recipe"]["targets"] == ["q_proj"]
