"""A run in two processes, as `accelerate launch` starts them, reaches what one process reaches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.training.runs import write_chats

from onebase_adapters.training.cli.train import main

ROOT = Path(__file__).parents[2]
OPTIONS = ["--r", "4", "--batch-size", "8", "--max-steps", "5", "--micro-tokens", "90", "--dtype", "float32"]


def start(folder: Path, out: Path, data: Path, launcher: list[str]) -> None:
    paths = os.pathsep.join(str(ROOT / part) for part in ("adapters", "server", "clients/python"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", *launcher, "--base", str(folder), "--data", str(data), "--name", "two"]
    done = subprocess.run(
        [*command, "--out", str(out), *OPTIONS], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_two_processes_have_the_loss_curve_of_one(talking_folder: Path, tmp_path: Path) -> None:
    data = write_chats(tmp_path / "train.jsonl", 40)
    program = "onebase_adapters.training.cli.train"
    alone = ["--base", str(talking_folder), "--data", str(data), "--name", "two", *OPTIONS]
    assert main([*alone, "--out", str(tmp_path / "one")]) == 0
    # The second process has no data but the rows that the first keeps.
    blind = tmp_path / "blind.py"
    blind.write_text(
        "import os, sys\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.argv[sys.argv.index('--data') + 1] = 'gone.jsonl'\n"
        f"from {program} import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    # What `accelerate launch` runs on GPUs; on the CPU it starts a single process.
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--", str(blind)]
    start(talking_folder, tmp_path / "two", data, launch)
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert len(one["losses"]) == 5
    for key in ("losses", "held_out"):
        assert [loss for _, loss in two[key]] == pytest.approx([loss for _, loss in one[key]], rel=1e-4)
