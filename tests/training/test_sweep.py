"""A sweep: every run on one base and one set of rows, losers stopped, gone on with, and shown."""

from __future__ import annotations

import csv
import io
import json
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from rich.console import Console
from tests.training.runs import start_at_a_terminal, tiny_base
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from onebase_engine.base.load import BaseSettings, fingerprint
from onebase_training import events, run, sweep
from onebase_training.checkpoint import CheckpointError
from onebase_training.cli.sweep import main
from onebase_training.events import Interrupted, OpenGate
from onebase_training.loop import TrainingDivergedError
from onebase_training.recipe import RecipeError, parse_recipe
from onebase_training.run import TrainingRequest, load_tokenizer
from onebase_training.sweep import Grid, Trial
from onebase_training.sweep_report import PLOT, RESULTS, TABLE, advice, plot, render, write

pytestmark = pytest.mark.usefixtures("forks", "quick_collections")
GRID = Grid(r=(2, 4), learning_rate=(1e-9, 2e-2), targets=(("attention",),))
DULL, BRIGHT = 1e-9, 2e-2
"""Learning rates that learn nothing and something."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer, and rows that can be learned."""
    folder = tmp_path_factory.mktemp("sweep-base")
    tiny_base(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, 320)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    rng = np.random.default_rng(0)
    for name, count in (("train", 32), ("held", 8)):
        rows = [
            {"prompt": " ".join(f"w{n}" for n in rng.integers(3, 320, 6)), "completion": " w50 w57 w64 w71"}
            for _ in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> torch.nn.Module:
    return tiny_base(folder)


@pytest.fixture
def job(folder: Path, tmp_path: Path) -> TrainingRequest:
    recipe = parse_recipe({"batch_size": 4, "max_steps": 8, "micro_tokens": 64})
    return TrainingRequest(
        name="sweep",
        recipe=recipe,
        train=folder / "train.jsonl",
        held_out=folder / "held.jsonl",
        folder=tmp_path / "sweep",
        base=BaseSettings(folder=folder),
        base_name="tiny",
    )


class _Steps:
    """Listens: counts the optimizer steps of each run."""

    def __init__(self, then: Callable[[int], None] = lambda count: None) -> None:
        self.of: dict[str, int] = {}
        self._then = then

    def __call__(self, trial: Trial, event: events.Event) -> None:
        if isinstance(event, events.StepDone):
            self.of[trial.name] = self.of.get(trial.name, 0) + 1
            self._then(self.total)

    @property
    def total(self) -> int:
        return sum(self.of.values())


def run_sweep(
    base: torch.nn.Module, job: TrainingRequest, grid: Grid = GRID, **options: Any
) -> sweep.SweepResult:
    return sweep.sweep(lambda: base, job, grid, options.pop("listen", _Steps()), OpenGate(), **options)


def test_losers_stop_early_and_the_best_run_leaves_an_adapter(
    base: torch.nn.Module, job: TrainingRequest
) -> None:
    before = fingerprint(base)
    steps = _Steps()
    result = run_sweep(base, job, listen=steps)
    assert fingerprint(base) == before
    status = {(t.learning_rate, t.status) for t in result.trials}
    assert {s for rate, s in status if rate == DULL} == {"stopped"}
    best = result.best
    assert best is not None
    assert best.loss is not None
    assert best.learning_rate == BRIGHT
    assert best.loss < result.base_loss
    # 4 runs of 2 steps, 2 of them for 2 more, 1 of them for 4 more.
    assert steps.total == 4 * 2 + 2 * 2 + 4
    assert (result.adapter(best) / "adapter_model.safetensors").is_file()
    assert not (job.folder / best.name / "checkpoints").exists()
    assert [t.step for t in result.trials] == [8, 4, 2, 2]


def test_all_runs_see_one_reading_of_the_data(
    base: torch.nn.Module, job: TrainingRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = []
    read = sweep.read_data
    monkeypatch.setattr(sweep, "read_data", lambda *a, **k: readings.append(1) or read(*a, **k))
    monkeypatch.setattr(run, "read_data", lambda *a, **k: pytest.fail("read again"))
    run_sweep(base, job, survivors=1.0)
    assert readings == [1]
    assert read(job, load_tokenizer(job.base), lambda part: None).kept


def test_metrics_of_the_base_are_measured_once_and_of_each_finished_adapter(
    base: torch.nn.Module, job: TrainingRequest
) -> None:
    measured = []

    def listen(trial: Trial, event: events.Event) -> None:
        if isinstance(event, events.Measured):
            measured.append((event.subject, trial.name))

    recipe = parse_recipe({"batch_size": 4, "max_steps": 4, "metrics": ["exact_match"], "metric_tokens": 8})
    grid = Grid(r=(2, 4), learning_rate=(BRIGHT,), targets=(("attention",),))
    result = run_sweep(
        base, TrainingRequest(**{**vars(job), "recipe": recipe}), grid, listen=listen, survivors=1.0
    )
    assert len(result.trials) == 2
    assert [subject for subject, _ in measured].count("base") == 1
    assert {name for subject, name in measured if subject == "adapter"} == {t.name for t in result.trials}
    assert all("exact_match" in trial.metrics for trial in result.trials)


def test_without_stopping_every_run_ends_and_equals_a_run_of_its_own(
    base: torch.nn.Module, job: TrainingRequest
) -> None:
    result = run_sweep(base, job, survivors=1.0)
    assert {trial.status for trial in result.trials} == {"finished"}
    losses = [trial.loss for trial in result.trials]
    assert losses == sorted(losses)
    halved = run_sweep(base, TrainingRequest(**{**vars(job), "folder": job.folder.with_name("halved")}))
    best = halved.best
    assert best is not None
    whole = next(trial for trial in result.trials if trial.name == best.name)
    assert [(at, loss) for at, _, loss in best.curve] == [(at, loss) for at, _, loss in whole.curve]


def test_a_sweep_that_is_interrupted_goes_on_and_repeats_no_finished_run(
    base: torch.nn.Module, job: TrainingRequest
) -> None:
    whole = run_sweep(base, TrainingRequest(**{**vars(job), "folder": job.folder.with_name("whole")}))

    def stop(count: int) -> None:
        if count == 5:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_sweep(base, job, listen=_Steps(stop))
    steps = _Steps()
    result = run_sweep(base, job, listen=steps)
    assert steps.total < 16
    assert [(t.name, t.status, t.loss) for t in result.trials] == [
        (t.name, t.status, t.loss) for t in whole.trials
    ]
    again = _Steps()
    assert run_sweep(base, job, listen=again).trials == result.trials
    assert again.total == 0


def test_a_gate_that_closes_ends_the_sweep_and_not_just_a_run(
    base: torch.nn.Module, job: TrainingRequest
) -> None:
    class Closing:
        left = 30

        def wait(self) -> None:
            self.left -= 1
            if self.left < 0:
                raise Interrupted("pause")

    with pytest.raises(Interrupted):
        sweep.sweep(lambda: base, job, GRID, _Steps(), Closing())
    assert run_sweep(base, job).best is not None


def test_a_larger_grid_adds_runs_to_those_that_are_there(base: torch.nn.Module, job: TrainingRequest) -> None:
    small = Grid(r=(2,), learning_rate=(BRIGHT,), targets=(("attention",),))
    assert run_sweep(base, job, small).best is not None
    steps = _Steps()
    result = run_sweep(base, job, GRID, listen=steps)
    assert "r2-alpha4-attention-lr0.02" not in steps.of
    assert len(result.trials) == 4


def test_other_data_in_the_same_folder_is_refused(base: torch.nn.Module, job: TrainingRequest) -> None:
    run_sweep(base, job, Grid(r=(2,), learning_rate=(BRIGHT,)))
    for changed in ({"train": job.held_out}, {"recipe": parse_recipe({"batch_size": 2})}):
        with pytest.raises(CheckpointError, match="holds a sweep with other"):
            run_sweep(base, TrainingRequest(**{**vars(job), **changed}))


def test_a_run_that_fails_does_not_end_the_others(base: torch.nn.Module, job: TrainingRequest) -> None:
    real = TrainingRequest(**{**vars(job), "memory_limit": 606_000_000})
    grid = Grid(r=(2, 512), learning_rate=(BRIGHT,), targets=(("all-linear",),))
    result = run_sweep(base, real, grid)
    assert result.best is not None
    assert result.best.r == 2
    failed = result.trials[-1]
    assert (failed.r, failed.status) == (512, "failed")
    assert "memory" in failed.reason
    assert any("512" in line and "failed" in line for line in advice(result))


def test_a_run_that_takes_more_memory_than_there_is_does_not_end_the_others(
    base: torch.nn.Module, job: TrainingRequest
) -> None:
    def exhaust(trial: Trial, event: events.Event) -> None:
        if trial.r == 4 and isinstance(event, events.StepDone):
            torch.empty(2**60)

    result = run_sweep(base, job, Grid(r=(2, 4), learning_rate=(BRIGHT,)), listen=exhaust)
    assert [(trial.r, trial.status) for trial in result.trials] == [(2, "finished"), (4, "failed")]
    assert "memory" in result.trials[-1].reason


def test_what_had_too_little_memory_is_tried_again(base: torch.nn.Module, job: TrainingRequest) -> None:
    grid = Grid(r=(2, 512), learning_rate=(BRIGHT,), targets=(("all-linear",),))
    short = run_sweep(base, TrainingRequest(**{**vars(job), "memory_limit": 606_000_000}), grid)
    assert short.trials[-1].status == "failed"
    other = replace(job.recipe, micro_tokens=32)
    again = run_sweep(base, TrainingRequest(**{**vars(job), "recipe": other}), grid)
    assert {trial.status for trial in again.trials} == {"finished"}


def test_what_diverged_is_not_tried_again(base: torch.nn.Module, job: TrainingRequest) -> None:
    def diverge(trial: Trial, event: events.Event) -> None:
        if isinstance(event, events.StepDone):
            raise TrainingDivergedError(event.step, "the loss", [1])

    grid = Grid(r=(2,), learning_rate=(BRIGHT,))
    assert run_sweep(base, job, grid, listen=diverge).trials[0].status == "failed"
    steps = _Steps()
    assert run_sweep(base, job, grid, listen=steps).trials[0].status == "failed"
    assert steps.total == 0


def test_a_pattern_that_means_no_layer_of_one_choice_is_refused_before_any_run(
    base: torch.nn.Module, job: TrainingRequest
) -> None:
    steps = _Steps()
    recipe = replace(job.recipe, rank_pattern={"down_proj": 8})
    with pytest.raises(RecipeError, match="down_proj"):
        run_sweep(
            base,
            TrainingRequest(**{**vars(job), "recipe": recipe}),
            Grid(targets=(("all-linear",), ("attention",))),
            listen=steps,
        )
    assert steps.total == 0


def test_a_target_that_the_base_lacks_is_refused_before_any_run(
    base: torch.nn.Module, job: TrainingRequest
) -> None:
    steps = _Steps()
    with pytest.raises(RecipeError, match="not a linear layer"):
        run_sweep(base, job, Grid(targets=(("attention",), ("c_attn",))), listen=steps)
    assert steps.total == 0


def test_a_sweep_needs_held_out_rows(base: torch.nn.Module, job: TrainingRequest) -> None:
    recipe = parse_recipe({"eval_split": 0.0})
    with pytest.raises(RecipeError, match="eval_split"):
        run_sweep(base, TrainingRequest(**{**vars(job), "held_out": None, "recipe": recipe}))


def test_combinations_are_tried_once_each() -> None:
    grid = Grid(r=(8, 16), alpha=("auto", 16.0), learning_rate=(1e-4,), targets=(("mlp",), ("attention",)))
    recipes = list(grid.recipes(parse_recipe({})))
    assert len(recipes) == 2 * 3
    assert {(made.r, made.alpha) for made in recipes} == {(8, 16.0), (16, 32.0), (16, 16.0)}
    names = {sweep.name_of(made) for made in Grid(targets=(("a.b", "c" * 200),)).recipes(parse_recipe({}))}
    assert all(len(name) < 120 and "/" not in name for name in names)


def made_up(status: str = "finished", **fields: Any) -> Trial:
    settings = {"name": "r8", "r": 8, "alpha": 16.0, "targets": ["attention"], "learning_rate": 1e-3}
    curve = [(0, 0.0, 2.0), (10, 5.0, 0.9), (20, 10.0, 0.5)]
    return Trial(**{**settings, "parameters": 1000, "curve": curve, "status": status, **fields})


def test_results_without_any_evaluation_are_json(tmp_path: Path) -> None:
    failed = made_up("failed", curve=[], reason="there was not enough memory")
    write(sweep.SweepResult([failed], math.nan, 10, tmp_path))
    assert json.loads((tmp_path / RESULTS).read_text(), parse_constant=pytest.fail)["base_loss"] is None


def test_the_results_are_written_for_people_and_programs(base: torch.nn.Module, job: TrainingRequest) -> None:
    result = run_sweep(base, job)
    write(result)
    rows = list(csv.DictReader((job.folder / TABLE).open()))
    assert [row["name"] for row in rows] == [trial.name for trial in result.trials]
    assert float(rows[0]["loss"]) == pytest.approx(result.trials[0].loss, abs=1e-5)
    found = json.loads((job.folder / RESULTS).read_text())
    assert found["best"] == result.trials[0].name
    console = Console(record=True, width=110, force_terminal=True)
    render(result, console)
    text = console.export_text()
    assert "best" in text
    assert "stopped" in text
    assert str(result.adapter(result.trials[0])) in text
    piped = io.StringIO()
    render(result, Console(file=piped, width=10_000))
    head, *lines = piped.getvalue().splitlines()
    assert head.split("\t") == ["r", "alpha", "targets", "rate", "MB", "loss", "steps", "time", "state"]
    cells = [line.split("\t") for line in lines[: len(rows)]]
    assert cells[0][8] == "best"
    assert [cell[5] for cell in cells] == [row["loss"] and f"{float(row['loss']):.4f}" for row in rows]


@pytest.mark.parametrize("count", [0, 1, 12])
def test_the_plot_is_a_whole_svg_with_a_point_for_each_run(tmp_path: Path, count: int) -> None:
    trials = [
        made_up(
            "stopped" if n % 2 else "finished",
            name=f"r{n}<&>",
            r=n + 1,
            parameters=1000 * (n + 1),
            learning_rate=10.0 ** -(n % 3),
            curve=[(0, 0.0, 2.0), (10, 300.0 * n, 0.5 + 0.01 * n)],
        )
        for n in range(count)
    ]
    result = sweep.SweepResult(trials, 2.0, 10, tmp_path)
    root = ElementTree.fromstring(plot(result))
    titles = [node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 2 * count
    text = "".join(root.itertext())
    assert ("no run has been evaluated" in text) == (count == 0)
    assert "NaN" not in plot(result)
    width, height = (float(size) for size in root.attrib["viewBox"].split()[2:])
    for node in root.iter("{http://www.w3.org/2000/svg}use"):
        assert 0 <= float(node.attrib["x"]) <= width
        assert 0 <= float(node.attrib["y"]) <= height


def test_advice_prefers_a_smaller_run_that_is_as_good(tmp_path: Path) -> None:
    small = made_up(name="small", r=8, parameters=100, curve=[(20, 1.0, 0.503)])
    large = made_up(name="large", r=16, parameters=1000)
    worse = made_up(name="worse", r=4, parameters=10, curve=[(20, 1.0, 0.6)])
    lines = advice(sweep.SweepResult([large, small, worse], 2.0, 20, tmp_path))
    assert "Best: large" in lines[0]
    assert any("small" in line and "10%" in line for line in lines)
    assert any("higher" in line and "rank" in line for line in lines)
    useless = advice(sweep.SweepResult([made_up()], 0.4, 20, tmp_path))
    assert any("no better than the base" in line for line in useless)
    assert advice(sweep.SweepResult([], 0.4, 20, tmp_path)) == ["No run has finished."]


def test_a_recipe_s_file_says_what_is_tried_unless_an_option_does(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.json"
    settings = {"r": 3, "alpha": 7.0, "targets": ["attention"], "learning_rate": 1e-2, "max_steps": 2}
    recipe.write_text(json.dumps(settings))
    arguments = ["--base", str(folder), "--data", str(folder / "train.jsonl"), "--device", "cpu"]
    arguments += ["--recipe", str(recipe), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert main([*arguments, "--r", "2,4"]) == 0
    names = {row["name"] for row in csv.DictReader((tmp_path / "out" / TABLE).open())}
    assert names == {"r2-alpha7-attention-lr0.01", "r4-alpha7-attention-lr0.01"}
    assert (tmp_path / "out" / "r3-alpha7-attention-lr0.01" / "adapter").is_dir()


def test_the_command_runs_a_sweep(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--base", str(folder), "--data", str(folder / "train.jsonl"), "--out", str(tmp_path / "out")]
    settings = ["--batch-size", "8", "--max-steps", "4", "--targets", "q_proj,v_proj", "--device", "cpu"]
    assert main([*arguments, *settings, "--r", "2..4", "--learning-rate", "1e-2"]) == 0
    printed = capfd.readouterr()
    assert "step 4, held-out loss" in printed.err
    assert printed.out.startswith("r\talpha\ttargets\t")
    assert "Best: r" in printed.out
    assert str(tmp_path / "out" / PLOT) in printed.out
    assert (tmp_path / "out" / PLOT).is_file()


def test_what_draws_the_picture_is_asked_for_before_anything_is_trained(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "onebase_training.sweep_report")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    data = str(folder / "train.jsonl")
    assert main(["--base", str(folder), "--data", data, "--out", str(out), "--device", "cpu"]) == 2
    assert "matplotlib" in (said := capsys.readouterr().err)
    assert "onebase[train]" in said
    assert not out.exists()


def test_ctrl_c_writes_a_checkpoint_of_the_run_that_goes_on(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--base", str(folder), "--data", str(folder / "train.jsonl"), "--out", str(out)]
    arguments += ["--r", "2", "--learning-rate", "1e-2", "--device", "cpu", "--batch-size", "4"]
    arguments += ["--epochs", "1000", "--eval-every", "5", "--save-every", "100000"]
    program = "import sys; from onebase_training.cli.sweep import main; sys.exit(main(sys.argv[1:]))"
    process = start_at_a_terminal(["-c", program], *arguments)
    assert process.stderr is not None
    while "step 5, held-out loss" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == 130, rest
    assert "continues where it was" in rest
    assert list(out.glob("*/checkpoints/step-*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--r", "16..8"], "above the last"),
        (["--r", "0"], "above 0"),
        (["--learning-rate", "fast"], "numbers above 0"),
        (["--alpha", "auto,-1"], "or auto"),
        (["--survivors", "2"], "at most 1"),
    ],
)
def test_wrong_lists_are_named(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--data", "x.jsonl", *arguments])
    assert end.value.code == 2
    assert words in capsys.readouterr().err
