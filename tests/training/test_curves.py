"""Curves for TensorBoard and trackio, read back with those tools; the terminal."""

from __future__ import annotations

import io
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.training.runs import finished_report, start_at_a_terminal, write_chats

from onebase_engine.base import quantized_cache
from onebase_engine.base.load import BaseSettings
from onebase_training import events
from onebase_training.checkpoint import sparkline
from onebase_training.cli import sweep
from onebase_training.cli.train import Display, main
from onebase_training.curves import open_curves
from onebase_training.recipe import Recipe
from onebase_training.run import TrainingRequest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("forks")


def step(number: int, loss: float) -> events.StepDone:
    return events.StepDone(
        at=0,
        step=number,
        steps=4,
        epoch=number / 4,
        loss=loss,
        learning_rate=1e-3,
        grad_norm=1,
        tokens=100,
        total_tokens=100 * number,
        tokens_per_second=50,
        seconds_left=65,
        memory_bytes=10**9,
    )


RUN = [
    events.Evaluated(at=0, step=0, loss=3.0, best=False),
    *(step(n, 3 - n / 2) for n in (1, 2, 3, 4)),
    events.Evaluated(at=0, step=4, loss=1.5, best=True),
]


@pytest.fixture
def job(tmp_path: Path) -> TrainingRequest:
    base = BaseSettings(folder=tmp_path)
    return TrainingRequest(
        name="curves", recipe=Recipe(), train="t", folder=tmp_path / "run", base=base, base_name="b"
    )


def test_tensorboard_reads_the_curves(job: TrainingRequest) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_curves(["tensorboard"], job) as write:
        for event in RUN:
            write(event)
    held = EventAccumulator(str(job.folder / "tensorboard"))
    held.Reload()
    assert [(one.step, one.value) for one in held.Scalars("train/loss")] == [
        (1, 2.5),
        (2, 2.0),
        (3, 1.5),
        (4, 1.0),
    ]
    assert [(one.step, one.value) for one in held.Scalars("eval/loss")] == [(0, 3.0), (4, 1.5)]


def test_trackio_keeps_the_curves_on_this_machine(job: TrainingRequest, tmp_path: Path) -> None:
    script = (
        "from tests.training.test_curves import *\n"
        "base = BaseSettings(folder=Path(sys.argv[1]))\n"
        "job = TrainingRequest(\n"
        "    name='c', recipe=Recipe(), train='t', folder=base.folder, base=base, base_name='b')\n"
        "with open_curves(['trackio'], job) as write:\n"
        "    for event in RUN: write(event)\n"
    )
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "adapters"))
    environment = {**os.environ, "PYTHONPATH": paths, "TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    (path,) = tmp_path.glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    assert sum("train/loss" in str(metrics) for _, metrics in rows) == 4
    assert sum("eval/loss" in str(metrics) for _, metrics in rows) == 2


def test_a_sparkline_falls_as_the_losses_do() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0] * 200) == "▁" * 60
    assert len(sparkline(list(range(1000)))) == 60


def test_the_terminal_tells_the_run_in_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    with Display(console) as display:
        for event in RUN:
            display.show(event)
        display.show(events.Sampled(at=0, step=4, prompt="a [b]", text="c [/d]\x1b]0;owned\x07"))
        report = finished_report(
            name="n[x]", metrics_before={"json_valid": 0.0}, metrics_after={"json_valid": 0.5}
        )
        display.finished(report, tmp_path)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for part in (
        "step 2/4  loss 2.0000  50 tok/s  1 min 05 s left",
        "base: held-out loss 3.0000",
        "step 4: held-out loss 1.5000  best",
        "a [b] -> c [/d]\ufffd]0;owned\ufffd",
        "json_valid",
        "50.0%",
        "onebase adapters push",
    ):
        assert part in shown


def test_a_bar_whose_end_is_not_known_shows_no_end_of_what_was_before() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with Display(console) as display:
        display.show(events.StageProgress(at=0, name="validating_files", part=1.0))
        display.loading("loading the base", 0.0)
        assert [task.total for task in display._progress.tasks] == [None]
    last = console.file.getvalue().rpartition("loading the base")[2]  # type: ignore[attr-defined]
    assert "100" not in last


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(ROOT / part) for part in ("adapters", "engine", "server", "clients/python"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    program = [sys.executable, "-m", "onebase_training.cli.train"]
    return subprocess.run(
        [*program, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_command_trains_resumes_and_says_what_to_do_next(
    talking_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_chats(tmp_path / "train.jsonl", 20)
    out = tmp_path / "out"
    arguments = ["--base", str(talking_folder), "--data", str(data), "--name", "colours", "--out", str(out)]
    arguments += ["--batch-size", "4", "--max-steps", "3", "--report-to", "tensorboard", "--r"]
    done = command(*arguments, "4")
    assert done.returncode == 0, done.stderr
    assert f"onebase serve --adapter colours={out / 'adapter'}" in done.stderr
    assert (out / "tensorboard").is_dir()
    assert main([*arguments, "4"]) == 0
    assert "continuing after step 3" in capsys.readouterr().err
    assert main([*arguments, "8"]) == 1
    assert "another recipe" in capsys.readouterr().err


def test_ctrl_c_writes_a_checkpoint_that_the_same_command_goes_on_from(
    talking_folder: Path, tmp_path: Path
) -> None:
    data = write_chats(tmp_path / "train.jsonl", 20)
    out = tmp_path / "out"
    arguments = ["--base", str(talking_folder), "--data", str(data), "--name", "colours", "--out", str(out)]
    arguments += ["--r", "4", "--batch-size", "4", "--epochs", "1000", "--save-every", "1000000"]
    process = start_at_a_terminal(["-m", "onebase_training.cli.train"], *arguments)
    assert process.stderr is not None
    while "step 1/" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == 130, rest
    assert "continues from the last checkpoint" in " ".join(rest.split())
    assert list((out / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("run", [main, sweep.main])
def test_ctrl_c_ends_the_loading_of_a_base_at_once(
    talking_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run: Callable[[list[str]], int],
) -> None:
    loaded = []

    def load_base(settings: BaseSettings) -> Any:
        signal.raise_signal(signal.SIGINT)
        loaded.append(settings)

    monkeypatch.setattr(quantized_cache, "load_kept_base", load_base)
    data = write_chats(tmp_path / "train.jsonl", 20)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        arguments = ["--base", str(talking_folder), "--data", str(data), "--name", "colours"]
        assert run([*arguments, "--out", str(tmp_path / "out")]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert not loaded
    assert "Stopped. The same command continues" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--r", "0"], "--r: r is 0: the lowest value is 1"),
        (["--init", "pissa"], "choose from"),
        (["--metric", "regex:.*"], "is not a metric"),
        (["--memory-limit", "lots"], "is not a size: write it as in 20GB"),
        (["--base", "no/such/base"], "base 'no/such/base' is neither a folder that exists nor a repository"),
        (["--recipe", "missing.json"], "cannot be read"),
        (["--threads", "-1"], "is not a whole number above 0"),
        (["--name", "a[/b]"], "cannot be an adapter's name"),
        (["--name", "../x"], "cannot be an adapter's name"),
        (["--push", "nobody"], "is not the name of a repository"),
    ],
)
def test_a_wrong_option_is_named(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_chats(tmp_path / "train.jsonl", 4)
    name = [] if "--name" in arguments else ["--name", "x"]
    command = ["--data", str(data), *name, "--out", str(tmp_path / "out"), *arguments]
    try:
        status = main(command)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert says in " ".join(capsys.readouterr().err.split())
