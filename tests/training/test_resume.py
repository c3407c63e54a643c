"""A run that was stopped, however roughly, ends with the weights of an unbroken one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.disks import small_disk
from tests.training.runs import (
    assert_equal,
    labelled,
    preferences,
    recipe_for,
    samples,
    trainer,
    weights,
)

from onebase_training.checkpoint import CheckpointError, Checkpoints, RunState
from onebase_training.events import Interrupted, Reason
from onebase_training.objectives import Preferences
from onebase_training.processes import ProcessGroup

pytestmark = pytest.mark.usefixtures("forks")
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.3},
    "8-bit optimizer": {"optimizer": "adamw_8bit", "r": 32},
    "LoRA+ and linear": {"lora_plus_ratio": 8.0, "schedule": "linear"},
    "dpo": {"method": "dpo"},
    "classification": {"method": "classification", "dropout": 0.1},
}
REPEATED = ("dropout", "LoRA+ and linear")


class _Interrupting:
    """A gate that stops the run when it was passed so many times."""

    def __init__(self, passes: int, reason: Reason = "pause") -> None:
        self.left = passes
        self._reason: Reason = reason

    def wait(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Interrupted(self._reason)


def test_stopped_after_a_step_and_resumed_it_is_the_same_run(base: torch.nn.Module, tmp_path: Path) -> None:
    data, held_out = samples(12), samples(4, 1)
    recipe = recipe_for(data, eval_every=2, save_every=5, max_steps=7)
    whole = trainer(base, recipe, data, tmp_path / "whole", held_out=held_out)
    expected = whole.run_steps()
    for until, done in ((3, 3), (2, 3), (4, 4)):
        part = trainer(base, recipe, data, tmp_path / "parts", held_out=held_out)
        part.resume()
        assert part.run_steps(until).step == done
        assert not part.finished
        assert (tmp_path / "parts" / "checkpoints" / f"step-{done:08d}").is_dir()
    last = trainer(base, recipe, data, tmp_path / "parts", held_out=held_out)
    last.resume()
    state = last.run_steps(until=9)
    assert last.finished
    assert (state.losses, state.held_out) == (expected.losses, expected.held_out)
    assert_equal(weights(last), weights(whole))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if name in REPEATED else []) for name in SETTINGS]
)
def test_paused_within_steps_and_resumed_it_is_the_same_run(
    name: str, base: torch.nn.Module, tmp_path: Path
) -> None:
    make = {"dpo": preferences, "classification": labelled}.get(name, samples)
    data, held_out = make(12), make(4, 1)
    recipe = recipe_for(data, eval_every=2, save_every=3, max_steps=7, **SETTINGS[name])
    whole = trainer(base, recipe, data, tmp_path / "whole", held_out=held_out)
    expected = whole.run_steps()
    pauses = 0
    for passes in (23, 41, 7, 30, 55, 10_000):
        run = trainer(base, recipe, data, tmp_path / "broken", held_out=held_out, gate=_Interrupting(passes))
        run.resume()
        try:
            state = run.run_steps()
        except Interrupted:
            pauses += 1
            continue
        break
    assert pauses >= 3
    assert_equal(weights(run), weights(whole))
    assert state.losses == expected.losses
    assert state.held_out == expected.held_out
    assert (state.best_step, state.best_loss) == (expected.best_step, expected.best_loss)


def test_a_resumed_dpo_run_computes_its_reference_no_second_time(
    base: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, other = preferences(8), preferences(8, seed=5)
    recipe = recipe_for(data, method="dpo", max_steps=3, save_every=1)
    computed: list[int] = []
    compute = Preferences._computed

    def counted(self: Preferences, *arguments: Any) -> list[tuple[int, float]]:
        found = compute(self, *arguments)
        computed.append(len(found))
        return found

    monkeypatch.setattr(Preferences, "_computed", counted)
    whole = trainer(base, recipe, data, tmp_path / "whole")
    expected = whole.run_steps()
    trainer(base, recipe, data, tmp_path / "parts").run_steps(until=1)
    assert computed == [8, 8]
    for until in (2, 3):
        part = trainer(base, recipe, data, tmp_path / "parts")
        part.resume()
        state = part.run_steps(until=until)
    assert computed == [8, 8]
    assert state.losses == expected.losses
    assert_equal(weights(part), weights(whole))
    # Other rows, or a file that is half there, are not those that were kept.
    trainer(base, recipe, other, tmp_path / "parts").run_steps(until=1)
    (tmp_path / "parts/checkpoints/references.json").write_text('{"key"')
    trainer(base, recipe, other, tmp_path / "parts").run_steps(until=1)
    assert computed == [8, 8, 8, 8]


def test_processes_share_the_reference_of_dpo(base: torch.nn.Module, tmp_path: Path) -> None:
    """Each computes its part of the micro-batches, with the bits that one process has."""
    data = preferences(9)
    recipe = recipe_for(data, method="dpo")
    objective = Preferences(trainer(base, recipe, data, tmp_path).trainable, 0.1)
    alone = objective._computed(data.rows, recipe, ProcessGroup())
    parts = [objective._computed(data.rows, recipe, ProcessGroup(rank, 3)) for rank in range(3)]
    assert all(0 < len(part) < len(alone) for part in parts)
    assert sorted(found for part in parts for found in part) == sorted(alone)


def test_a_cancelled_run_writes_no_checkpoint(base: torch.nn.Module, tmp_path: Path) -> None:
    data = samples(8)
    run = trainer(base, recipe_for(data, save_every=50), data, tmp_path, gate=_Interrupting(9, "cancel"))
    with pytest.raises(Interrupted):
        run.run_steps()
    assert not (tmp_path / "checkpoints").exists()


_SCRIPT = """
import sys, time
from pathlib import Path
import torch
from tests.training.runs import *
torch.set_num_threads(1)
data = samples(12)
recipe = recipe_for(data, eval_every=3, save_every=2, epochs=4, max_steps=12, dropout=0.1)
run = trainer(tiny_base(Path(sys.argv[1])), recipe, data, Path(sys.argv[2]), held_out=samples(4, 1),
              listen=lambda event: print(type(event).__name__, flush=True))
run.resume()
run.run_steps()
torch.save(weights(run), sys.argv[3])
"""


def test_killed_at_any_moment_and_started_again_it_is_the_same_run(
    base: torch.nn.Module, base_folder: Path, tmp_path: Path
) -> None:
    root = Path(__file__).parents[2]
    paths = [str(root / part) for part in ("", "adapters", "engine", "server")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_WAIT_POLICY": "passive"}

    def start(folder: str) -> subprocess.Popen[str]:
        arguments = [str(base_folder), str(tmp_path / folder), str(tmp_path / f"{folder}.pt")]
        command = [sys.executable, "-c", _SCRIPT, *arguments]
        return subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True)

    unbroken = start("whole")
    unbroken.communicate()
    assert unbroken.returncode == 0
    # Killed in a step, while it evaluates, and while it writes a checkpoint.
    for lines, delay in ((4, 0.0), (9, 0.004), (3, 0.001)):
        process = start("broken")
        assert process.stdout is not None
        for _ in range(lines):
            process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    last = start("broken")
    last.communicate()
    assert last.returncode == 0
    load = [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "broken")]
    assert_equal(load[0], load[1])


def test_another_run_is_not_gone_on_with(base: torch.nn.Module, tmp_path: Path) -> None:
    data = samples(8)
    recipe = recipe_for(data, save_every=1, max_steps=1)
    trainer(base, recipe, data, tmp_path).run_steps()
    other = trainer(base, recipe, data, tmp_path)
    other.state.identity = "another"
    with pytest.raises(CheckpointError, match="choose another folder"):
        other.resume()


def test_a_checkpoint_that_was_cut_off_is_never_read(base: torch.nn.Module, tmp_path: Path) -> None:
    data = samples(8)
    recipe = recipe_for(data, save_every=1, epochs=2)
    trainer(base, recipe, data, tmp_path).run_steps()
    folder = tmp_path / "checkpoints"
    (folder / ".step-00000005.part").mkdir()
    (folder / ".step-00000005.part" / "adapter.safetensors").write_bytes(b"half")
    run = trainer(base, recipe, data, tmp_path)
    assert run.resume() == 4


@pytest.mark.parametrize("free", [1_000, 100_000, 600_000])
def test_a_checkpoint_for_which_there_is_no_space_says_so_and_leaves_none(free: int, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        checkpoints = Checkpoints(disk / "checkpoints", keep=2)
        checkpoints.save(RunState("id", step=1), {"a": torch.ones(8)}, {"m": torch.ones(8)})
        filler = disk / "filler"
        filler.write_bytes(b"x" * (shutil.disk_usage(disk).free - free))
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(RunState("id", step=2), {"a": torch.ones(8)}, {"m": torch.ones(250_000)})
        assert checkpoints.steps() == [1]
        filler.unlink()
        checkpoints.save(RunState("id", step=2), {"a": torch.ones(8)}, {"m": torch.ones(125_000)})
        assert checkpoints.steps() == [1, 2]


def test_a_damaged_checkpoint_says_what_to_do(base: torch.nn.Module, tmp_path: Path) -> None:
    data = samples(8)
    recipe = recipe_for(data, save_every=1, max_steps=1)
    trainer(base, recipe, data, tmp_path).run_steps()
    path = tmp_path / "checkpoints" / "step-00000001"
    (path / "adapter.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"cannot be read .*remove it"):
        trainer(base, recipe, data, tmp_path).resume()
    (path / "state.json").write_text(json.dumps({"what": 1}))
    with pytest.raises(CheckpointError, match=r"cannot be read .*remove it"):
        trainer(base, recipe, data, tmp_path).resume()
