"""One training run as both sides do it, and what came of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.processes import StartError, tail

HERE = Path(__file__).parent
ONEBASE = "onebase"
TRL_WORKER = HERE.parent / "train_trl.py"
WARM_UP = 2
"""Steps before the clock starts: first calls, buffers that grow."""


@dataclass(frozen=True)
class TrainTask:
    """Input of a target, as JSON. Paths are texts.

    data: the file that the rows are from. rows: a JSON list of them, tokenized (`input_ids`, `labels`), in
    the order of the steps, `batch` rows a step. rates: learning rate of each step. targets: "all-linear" or
    names of layers. variant: what a target is called.
    """

    base: str
    device: str
    threads: int
    data: str
    rows: str
    steps: int
    batch: int
    rates: list[float]
    warmup_ratio: float
    rank: int
    alpha: int
    targets: str | list[str]
    max_length: int
    seed: int
    variant: str
    out: str


@dataclass(frozen=True)
class TrainRun:
    """One run of one target. ends: when each step ended, seconds; cpu: what the process had computed until
    then, seconds of all its threads. peak: bytes. adapter: folder."""

    target: str
    repeat: int
    ends: list[float]
    cpu: list[float]
    peak: int
    losses: list[float]
    adapter: str

    def tokens_per_second(self, tokens: Sequence[int]) -> float:
        """Return the speed of the steps after the warm-up. tokens: real ones of each step, without
        padding."""
        return sum(tokens[WARM_UP:]) / (self.ends[-1] - self.ends[WARM_UP - 1])

    def tokens_per_cpu_second(self, tokens: Sequence[int]) -> float:
        """Return the speed by processor time, which others on the machine change less than
        `tokens_per_second`."""
        return sum(tokens[WARM_UP:]) / (self.cpu[-1] - self.cpu[WARM_UP - 1])


def run_target(
    target: str, repeat: int, task: TrainTask, trl_python: Path | None, env: Mapping[str, str], timeout: float
) -> TrainRun:
    """Run one target in a process of its own, alone. Raises StartError with the end of its log."""
    folder = Path(task.out)
    folder.mkdir(parents=True)
    told = folder / "task.json"
    told.write_text(json.dumps(asdict(task)))
    if target == ONEBASE:
        command = [sys.executable, "-m", "bench.train_worker", str(told)]
    else:
        command = [str(trl_python), str(TRL_WORKER), str(told)]
    answer = _answer(command, folder / "log", env, timeout)
    return TrainRun(target=target, repeat=repeat, **answer)


def held_out_losses(
    base: Path, device: str, threads: int, rows: Path, adapters: Sequence[str], log: Path, timeout: float
) -> dict[str, float]:
    """Held-out loss of each adapter folder, and of the base under "", all by the same plain code."""
    command = [sys.executable, "-m", "bench.train_eval", str(base), device, str(threads), str(rows)]
    losses: dict[str, float] = _answer([*command, *adapters], log, {}, timeout)
    return losses


def _answer(command: list[str], log: Path, env: Mapping[str, str], timeout: float) -> Any:
    """The last line that a process prints, as JSON."""
    everything = {**os.environ, "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1", **env}
    with log.open("wb") as errors:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=errors, env=everything, timeout=timeout, check=True
            )
            return json.loads(done.stdout.splitlines()[-1])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            raise StartError(f"{command[:3]} failed: {error}\n{tail(log)}") from error


@dataclass(frozen=True)
class TrainFigures:
    """One target over its repeats. held_out: of the last repeat's adapter; all see the same rows."""

    tokens_per_second: float
    tokens_per_cpu_second: float
    repeats: list[float]
    peak: float
    held_out: float
    last_loss: float


def summarize_training(
    runs: Sequence[TrainRun], tokens: Sequence[int], held_out: Mapping[str, float]
) -> dict[str, TrainFigures]:
    """Figures by target: medians over the repeats."""
    figures = {}
    for target in dict.fromkeys(run.target for run in runs):
        mine = [run for run in runs if run.target == target]
        speeds = [run.tokens_per_second(tokens) for run in mine]
        figures[target] = TrainFigures(
            tokens_per_second=median(speeds),
            tokens_per_cpu_second=median(run.tokens_per_cpu_second(tokens) for run in mine),
            repeats=speeds,
            peak=median(run.peak for run in mine),
            held_out=median(held_out[run.adapter] for run in mine),
            last_loss=median(run.losses[-1] for run in mine),
        )
    return figures
