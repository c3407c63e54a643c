"""Adapters besides the trained one: the one that training continues from, with its own rank and layers, and
the active version that the result is compared with. PEFT loads the weights of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from onebase_adapters.format.config import with_labels
from onebase_engine.base.layers import empty_base
from onebase_engine.base.load import BaseSettings, load_base, load_config
from onebase_engine.base.view import peft_view
from onebase_training import events
from onebase_training.checkpoint import all_better
from onebase_training.cli.train import main
from onebase_training.data.reader import load_dataset
from onebase_training.events import Interrupted, OpenGate
from onebase_training.objectives import PreparedRun, make_objective
from onebase_training.parent import ActiveVersion, Parent, modules_of, why_not_comparable
from onebase_training.processes import ProcessGroup
from onebase_training.recipe import MODEL, RecipeError, continued, parse_recipe
from onebase_training.run import PlannedRun, TrainingRequest, load_tokenizer, prepare, train
from onebase_training.trainable import ADAPTER, Trainable

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
) -> tuple[TrainingRequest, torch.nn.Module]:
    parent = Parent.of_folder(parent_folder)
    settings = modules_of(parent, empty_base(load_config(base_folder)))
    recipe = parse_recipe(continued(given, settings, parent.label))
    base = BaseSettings(folder=base_folder)
    job = TrainingRequest(
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
    assert report.better_than == {
        "base": report.loss_after < report.loss_before, "parent": report.loss_after < report.loss_parent,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("better_than", "better"),
    [
        ({"base": True, "active": True}, True),
        ({"base": True, "parent": False}, False),
        ({"base": True, "parent": True, "active": None}, None),
        ({"base": False, "active": None}, False),
        ({"base": None}, None),
    ],
)
def test_an_adapter_is_better_if_it_is_better_than_each_that_it_was_compared_with(
    better_than: dict[str, bool | None], better: bool | None
) -> None:
    assert all_better(better_than) is better


# ---- the active version --------------------------------------------------------------------------


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "supervised": lambda n: {"prompt": f"Item {n} is", "completion": (" red", " blue")[n % 2]},
    "dpo": lambda n: {"prompt": f"Item {n} is", "chosen": (" red", " blue")[n % 2], "rejected": " neither"},
    "classification": lambda n: {"text": f"Item {n} is {('red', 'blue')[n % 2]}", "label": ("r", "b")[n % 2]},
}


def short_job(
    tmp_path: Path, name: str, base: Path, method: str = "supervised", **settings: Any
) -> TrainingRequest:
    """A short run on rows of two slices."""
    place = tmp_path / name
    place.mkdir()
    for file, first, count in (("rows.jsonl", 0, 12), ("held.jsonl", 50, 6)):
        lines = [ROWS[method](n) | {"slice": "xy"[n % 3 == 0]} for n in range(first, first + count)]
        (place / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {"method": method, "max_steps": 3, "batch_size": 4, "r": 4, "learning_rate": 1e-2, **settings}
    return TrainingRequest(
        name=name,
        recipe=parse_recipe(given),
        train=place / "rows.jsonl",
        held_out=place / "held.jsonl",
        folder=place / "run",
        base=BaseSettings(folder=base),
        base_name="tiny",
    )


def active_of(folder: Path) -> ActiveVersion:
    """A trained adapter as a server has it: its config names the labels."""
    if (folder / "config.json").exists():
        config = with_labels(
            (folder / "adapter_config.json").read_bytes(), (folder / "config.json").read_bytes()
        )
        (folder / "adapter_config.json").write_bytes(config)
    return ActiveVersion("tiny@1234", "1234" * 16, Parent.of_folder(folder))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_base(tmp_path_factory.mktemp("words") / "base")


@pytest.mark.parametrize("method", ROWS)
def test_the_active_version_has_the_figures_that_its_own_run_measured(
    tmp_path: Path, words: Path, method: str
) -> None:
    """Whatever the rank and the layers of the two, by the loss, the metrics and each slice."""
    metrics = {"metrics": ["max_characters:12"], "metric_tokens": 4} if method == "supervised" else {}
    first, second = (
        short_job(tmp_path, "first", words, method, **metrics),
        short_job(tmp_path, "second", words, method, max_steps=1, targets=["q_proj"], **metrics | {"r": 2}),
    )
    own = train(lambda: load_base(first.base), first, lambda event: None, OpenGate())
    active = active_of(first.folder / "adapter")
    heard: list[events.Event] = []
    report = train(
        lambda: load_base(second.base), second, heard.append, OpenGate(), find_active=lambda: active
    )
    assert (report.active, report.not_compared) == (active.digest, "")
    # PEFT adds a classifier's product to the layer's output before it rounds the sum, others' after.
    near = 1e-3 if method == "classification" else 1e-6
    assert report.loss_active == pytest.approx(own.loss_after, abs=near)
    assert report.loss_active is not None
    assert report.loss_after is not None
    assert report.loss_active != report.loss_after
    assert report.metrics_active == own.metrics_after
    assert report.better_than["active"] is (report.loss_after < report.loss_active)
    assert report.slices is not None
    assert own.slices is not None
    expected = {one["slice"]: one["after"] for one in own.slices["slices"]}
    assert {one["slice"]: one["active"] for one in report.slices["slices"]} == pytest.approx(
        expected, abs=near
    )
    (said,) = [event for event in heard if isinstance(event, events.Evaluated) and event.active]
    assert (said.active, said.loss) == (active.label, report.loss_active)
    notes = [event.message for event in heard if isinstance(event, events.Notice)]
    assert notes == [f"Measuring {active.label}, which is active, on the held-out rows."]
    assert "| active |" in (second.folder / "adapter" / "README.md").read_text()


def test_an_active_version_of_a_kind_that_is_not_trained_here_is_measured_as_peft_computes_it(
    tmp_path: Path, words: Path
) -> None:
    config = {"r": 2, "target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]}
    folder = saved(load_base(BaseSettings(folder=words)), tmp_path / "other", **config)
    job = short_job(tmp_path, "next", words, max_steps=1)
    active = active_of(folder)
    report = train(
        lambda: load_base(job.base), job, lambda event: None, OpenGate(), find_active=lambda: active
    )
    data = load_dataset(job.held_out or "", load_tokenizer(job.base), job.recipe, part="eval")
    reference: Any = PeftModel.from_pretrained(peft_view(load_base(job.base)), folder).eval()
    total, count = 0.0, 0
    for row in data.rows:
        (one,) = row.samples
        with torch.no_grad():
            logits = reference(input_ids=torch.tensor(one.ids)[None].long(), use_cache=False).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.float(), torch.tensor(one.ids[1:]).long(), reduction="none"
        )
        total += float(losses[torch.tensor(one.supervised[1:])].sum())
        count += one.targets
    assert report.loss_active == pytest.approx(total / count, abs=2e-2)
    assert report.loss_active != pytest.approx(report.loss_before, abs=5e-2)


def test_the_version_that_training_went_on_from_is_not_measured_twice(tmp_path: Path, words: Path) -> None:
    parent = saved(load_base(BaseSettings(folder=words)), tmp_path / "parent", **KINDS["plain"])
    job, base = job_on(tmp_path, words, parent, max_steps=1, batch_size=4)
    assert job.parent is not None
    active = ActiveVersion(job.parent.label, job.parent.digest, None, "it must not be looked at")
    heard: list[events.Event] = []
    report = train(lambda: base, job, heard.append, OpenGate(), find_active=lambda: active)
    assert (report.active, report.loss_active) == (job.parent.digest, report.loss_parent)
    assert (report.not_compared, set(report.better_than)) == ("", {"base", "parent", "active"})
    assert not [event for event in heard if isinstance(event, events.Evaluated) and event.active]


def broken(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"broken")


def another_kind(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))


def too_large(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n: one * 1e30 for n, one in tensors.items()}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (broken, "adapter_model.safetensors"),
        (another_kind, "it classifies texts, and the trained adapter generates text"),
        (too_large, "the held-out loss is not finite"),
    ],
)
def test_a_version_that_cannot_be_measured_is_no_failure_of_the_run_and_nothing_is_called_better(
    tmp_path: Path, words: Path, change: Callable[[Path], None], says: str
) -> None:
    folder = saved(load_base(BaseSettings(folder=words)), tmp_path / "old", **KINDS["plain"])
    change(folder)
    job, active = short_job(tmp_path, "next", words), active_of(folder)
    heard: list[events.Event] = []
    report = train(lambda: load_base(job.base), job, heard.append, OpenGate(), find_active=lambda: active)
    assert says in report.not_compared
    assert report.better_than == {"base": True, "active": None}
    assert (report.better, report.active, report.loss_active) == (None, active.digest, None)
    warned = [event.message for event in heard if isinstance(event, events.Notice) and event.level == "warn"]
    assert [says in message and active.label in message for message in warned] == [True]


def test_a_classifier_of_other_labels_is_not_compared_with(tmp_path: Path, words: Path) -> None:
    first = short_job(tmp_path, "first", words, "classification", max_steps=1)
    train(lambda: load_base(first.base), first, lambda event: None, OpenGate())
    active = active_of(first.folder / "adapter")
    assert active.version is not None
    assert why_not_comparable(active.version, ("b", "r")) == ""
    assert why_not_comparable(active.version, ("b", "g", "r")) == "its labels are others: b, r"
    assert "it classifies texts" in why_not_comparable(active.version, ())


def test_without_held_out_rows_nothing_is_compared(tmp_path: Path, words: Path) -> None:
    job = replace(short_job(tmp_path, "next", words, eval_split=0.0), held_out=None)
    active = ActiveVersion("tiny@1234", "1234" * 16, None, "its files are gone")
    report = train(
        lambda: load_base(job.base), job, lambda event: None, OpenGate(), find_active=lambda: active
    )
    assert (report.not_compared, report.better) == ("nothing is held out", None)


def test_a_pause_while_the_active_version_is_measured_ends_the_run_and_the_next_one_finishes_it(
    tmp_path: Path, words: Path
) -> None:
    folder = saved(load_base(BaseSettings(folder=words)), tmp_path / "old", **KINDS["plain"])
    job, active = short_job(tmp_path, "next", words), active_of(folder)
    measuring: list[bool] = []

    class Pause(OpenGate):
        def wait(self) -> None:
            if measuring:
                raise Interrupted("pause")

    def find_active() -> ActiveVersion:
        measuring.append(True)
        return active

    with pytest.raises(Interrupted):
        train(lambda: load_base(job.base), job, lambda event: None, Pause(), find_active=find_active)
    report = train(
        lambda: load_base(job.base), job, lambda event: None, OpenGate(), find_active=lambda: active
    )
    assert report.loss_active is not None
    assert report.steps == 3


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(base: torch.nn.Module, tmp_path: Path) -> None:
    parent, settings = own(base, saved(base, tmp_path / "parent", **KINDS["plain"]))
    data = samples(8)
    recipe = recipe_for(data, **continued({}, settings, "p"))
    whole = trainer(base, recipe, data, tmp_path / "whole", held_out=samples(4, 9), parent=parent)
    whole.run_steps()
    half = trainer(base, recipe, data, tmp_path / "half", held_out=samples(4, 9), parent=parent)
    half.run_steps(until=3)
    rest = trainer(base, recipe, data, tmp_path / "half", held_out=samples(4, 9), parent=parent)
    assert rest.resume() == 3
    rest.run_steps()
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
    run.run_steps(until=1)
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


ON_EXPERTS = [
    f"model.layers.{n}.mlp.experts.{name}" for n in (0, 1) for name in ("down_proj", "gate_up_proj")
]


@pytest.mark.parametrize(
    ("targets", "agree"),
    [
        (["experts"], True),
        (["experts.down_proj", "experts.gate_up_proj"], True),
        (ON_EXPERTS, True),
        (["experts.down_proj"], False),
        (["experts", "q_proj"], False),
        ([["experts"]], False),
    ],
)
def test_experts_may_be_named_again_as_their_group(targets: list[Any], agree: bool) -> None:
    settings = {"targets": ON_EXPERTS}
    if agree:
        assert continued({"targets": targets}, settings, "p") == settings
    else:
        with pytest.raises(RecipeError, match="Leave targets out"):
            continued({"targets": targets}, settings, "p")
    with pytest.raises(RecipeError, match="Leave targets out"):
        continued({"targets": ["experts"]}, {"targets": ["model.layers.0.mlp.experts.0.w1"]}, "p")


def test_an_invocation_given_as_text_is_compared_once_it_is_tokens() -> None:
    own_tokens, text = {"alora_invocation_tokens": (4, 5)}, {"alora_invocation": "Verdict:"}
    recipe = parse_recipe(continued(text, own_tokens, "p"))
    assert (recipe.alora_invocation, recipe.alora_invocation_tokens) == ("Verdict:", ())
    asked = {"alora_invocation": "", "alora_invocation_tokens": [4, 5]}
    assert parse_recipe(continued(asked, own_tokens, "p")).alora_invocation_tokens == (4, 5)
    for other in ([4, 6], []):
        with pytest.raises(RecipeError, match=r"p has the invocation \[4, 5\].*Leave the invocation out"):
            continued(asked | {"alora_invocation_tokens": other}, own_tokens, "p")
    with pytest.raises(RecipeError, match=r"p has no invocation.*Leave alora_invocation out") as refused:
        continued(text, {"alora_invocation_tokens": ()}, "p")
    assert refused.value.field == "alora_invocation"


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
    from onebase_training.checkpoint import CheckpointError

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
