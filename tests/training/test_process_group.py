"""A run in two processes, as `accelerate launch` starts them, reaches what one process reaches."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.training.runs import write_chats

from onebase_training.cli.train import main

ROOT = Path(__file__).parents[2]
OPTIONS = ["--r", "4", "--batch-size", "8", "--max-steps", "5", "--micro-tokens", "90", "--dtype", "float32"]


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "train.jsonl", 40)


@pytest.fixture(scope="module")
def one(talking_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of the run in one process."""
    out = tmp_path_factory.mktemp("alone") / "one"
    alone = ["--base", str(talking_folder), "--data", str(data), "--name", "two", "--out", str(out), *OPTIONS]
    assert main(alone) == 0
    return report(out)


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def command(folder: Path, data: Path, out: Path, *more: str) -> list[str]:
    """A training run whose second process has no data but the rows that the first keeps."""
    blind = out.with_suffix(".py")
    blind.write_text(
        "import os, sys\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.argv[sys.argv.index('--data') + 1] = 'gone.jsonl'\n"
        "from onebase_training.cli.train import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    options = ["--base", str(folder), "--data", str(data), "--name", "two", "--out", str(out), *OPTIONS]
    return [str(blind), *options, *more]


def agree(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert len(one["losses"]) == 5
    for key in ("losses", "held_out"):
        assert [loss for _, loss in two[key]] == pytest.approx([loss for _, loss in one[key]], rel=1e-4)


def train_in_two(arguments: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **ENVIRONMENT, **group, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said


@pytest.mark.usefixtures("forks")
def test_two_processes_have_the_loss_curve_of_one(
    talking_folder: Path, data: Path, tmp_path: Path, one: dict[str, Any]
) -> None:
    train_in_two(command(talking_folder, data, tmp_path / "two"))
    agree(one, report(tmp_path / "two"))


@pytest.mark.usefixtures("forks")
def test_two_processes_share_the_reference_of_dpo_and_have_the_loss_curve_of_one(
    talking_folder: Path, tmp_path: Path
) -> None:
    pairs = [
        {"prompt": f"What is {n} and {n}?", "chosen": f"It is {2 * n}.", "rejected": f"Well, {n} maybe."}
        for n in range(20)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    alone = command(talking_folder, data, tmp_path / "one", "--method", "dpo")[1:]
    assert main(alone) == 0
    train_in_two(command(talking_folder, data, tmp_path / "two", "--method", "dpo"))
    agree(report(tmp_path / "one"), report(tmp_path / "two"))
    kept = [
        json.loads((tmp_path / name / "checkpoints/references.json").read_text()) for name in ("one", "two")
    ]
    assert kept[0]["key"] == kept[1]["key"]
    assert kept[1]["references"] == pytest.approx(kept[0]["references"], abs=1e-4)


@pytest.mark.full
def test_the_launcher_of_torch_starts_such_a_run(
    talking_folder: Path, data: Path, tmp_path: Path, one: dict[str, Any]
) -> None:
    # What `accelerate launch` runs on GPUs; on the CPU it starts a single process.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    paths = os.pathsep.join(str(ROOT / part) for part in ("adapters", "engine", "server", "clients/python"))
    done = subprocess.run(
        [sys.executable, *launcher, *command(talking_folder, data, tmp_path / "two")],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    agree(one, report(tmp_path / "two"))
