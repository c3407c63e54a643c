"""Where a run can go on from: the adapter, the optimizer's state and the place in the data.

A run's folder has `checkpoints/step-00000120/` for the last few steps and `checkpoints/best-00000100/`. A
checkpoint appears whole or not at all: it is written under another name, synced, then renamed. What is random
in a run follows from its seed and the step's number, so only the number has to be kept.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from onebase_adapters.store.atomic_files import atomic_directory

_ADAPTER, _OPTIMIZER, _STATE = "adapter.safetensors", "optimizer.pt", "state.json"
_STEP = re.compile(r"step-(\d{8})")


class CheckpointError(Exception):
    """The run's folder cannot be used; the message says why and what to do."""

    @classmethod
    def unreadable(cls, path: Path, error: Exception) -> CheckpointError:
        """A file without which nothing in its folder can be used."""
        return cls(f"{path} cannot be read ({error}): remove {path.parent} to start over")

    @classmethod
    def other_run(cls, folder: Path) -> CheckpointError:
        """The folder holds the results of another run."""
        return cls(
            f"{folder} holds a run with another recipe, other data or another base: go on with the same "
            "ones, choose another folder, or remove this one"
        )


@dataclass
class RunState:
    """What a run knows in addition to tensors. Losses are nats a supervised token.

    identity: SHA-256 of recipe, data and base: only the same run resumes from a checkpoint.
    """

    identity: str
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    base_loss: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    without_better: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


class Checkpoints:
    """The checkpoints of one run's folder."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def save(self, state: RunState, adapter: Mapping[str, torch.Tensor], optimizer: dict[str, Any]) -> Path:
        """Write the state after `state.step` steps and drop the oldest. Raises OSError."""
        target = self.folder / f"step-{state.step:08d}"
        with atomic_directory(target) as work:
            save_file(_plain(adapter), work / _ADAPTER)
            _save_optimizer(optimizer, work / _OPTIMIZER)
            (work / _STATE).write_text(json.dumps(asdict(state)))
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self.folder / f"step-{old:08d}", ignore_errors=True)
        for work in self.folder.glob(".*.part"):
            shutil.rmtree(work, ignore_errors=True)
        wanted = {self._best(json.loads(self._state(step))["best_step"]) for step in self.steps()}
        for path in self.folder.glob("best-*"):
            if path not in wanted:
                shutil.rmtree(path, ignore_errors=True)
        return target

    def save_best(self, step: int, adapter: Mapping[str, torch.Tensor]) -> None:
        """Save an adapter as the best one; the previous one stays until the next `save`. Raises OSError."""
        with atomic_directory(self._best(step)) as work:
            save_file(_plain(adapter), work / _ADAPTER)

    def best(self, step: int) -> dict[str, torch.Tensor]:
        """The adapter that was saved as the best after a step. Raises CheckpointError."""
        try:
            return load_file(self._best(step) / _ADAPTER)
        except Exception as error:
            raise CheckpointError(f"{self._best(step)} cannot be read: {error}") from error

    def _state(self, step: int) -> str:
        return (self.folder / f"step-{step:08d}" / _STATE).read_text()

    def _best(self, step: int) -> Path:
        return self.folder / f"best-{step:08d}"

    def steps(self) -> list[int]:
        """The steps after which there are checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = (_STEP.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def latest(self, identity: str) -> RunState | None:
        """The state of the last checkpoint, if there is any.

        Raises CheckpointError: it is another run's, or cannot be read.
        """
        if not (steps := self.steps()):
            return None
        path = self.folder / f"step-{steps[-1]:08d}"
        try:
            state = RunState(**json.loads((path / _STATE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): remove it to go on before it") from error
        if state.identity != identity:
            raise CheckpointError.other_run(self.folder.parent)
        state.losses = [(step, loss) for step, loss in state.losses]
        state.held_out = [(step, loss) for step, loss in state.held_out]
        return state

    def tensors(self, step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Adapter and optimizer state after a step, in host memory. Raises CheckpointError."""
        path = self.folder / f"step-{step:08d}"
        try:
            optimizer = torch.load(path / _OPTIMIZER, map_location="cpu", weights_only=True)
            return load_file(path / _ADAPTER), optimizer
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read ({error}): remove it to go on before it") from error


def _save_optimizer(optimizer: dict[str, Any], path: Path) -> None:
    """Raises the OSError of a write that failed, where torch.save says only "unexpected pos"."""
    failed: list[OSError] = []

    class Noting(io.FileIO):
        def write(self, data: Any) -> int:
            try:
                return super().write(data)
            except OSError as error:
                failed.append(error)
                raise

    try:
        with Noting(path, "w") as raw, io.BufferedWriter(raw) as file:
            torch.save(optimizer, file)
    except RuntimeError as error:
        if failed:
            raise failed[0] from error
        raise


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
