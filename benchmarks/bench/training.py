"""One training run as all targets do it, and the figures of several."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.worker import call

ONEBASE = "onebase"
VARIANTS = ("trl", "trl-checkpointing", "trl-padding-free", "trl-bf16", "trl-defaults")
"""trl: its fastest in fp32: padded batches of all rows of a step, activations kept.
trl-checkpointing: with gradient checkpointing, which is TRL's default.
trl-padding-free: rows in one sequence; TRL means it for FlashAttention, sdpa masks all pairs of tokens.
trl-bf16: as trl, adapters and their products in bf16, as TRL has them by default.
trl-defaults: checkpointing and bf16, as TRL does without being told."""
WARM_UP = 2
"""Steps before the clock starts: first calls, buffers that grow."""
LEARNING_RATE, WARMUP_RATIO = 5e-4, 0.1
"""Learning rate at the end of its warm-up, and the part of the steps in which it rises."""
MAX_LENGTH = 1024
"""Tokens of the longest row."""


@dataclass(frozen=True)
class TrainTask:
    """Input of a target, as JSON. Paths are texts.

    data: the file that the rows are from. rows: a JSON list of them, tokenized (`input_ids`, `labels`), in
    the order of the steps, `batch` rows a step. rates: learning rate of each step. variant: what a target is
    called.
    """

    base: str
    threads: int
    data: str
    rows: str
    steps: int
    batch: int
    rates: list[float]
    rank: int
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


def run_target(repeat: int, task: TrainTask, trl_python: Path | None, timeout: float) -> TrainRun:
    """Run one target in a process of its own, alone. Raises StartError with the end of its log."""
    folder = Path(task.out)
    folder.mkdir(parents=True)
    environment = {"OMP_NUM_THREADS": str(task.threads), "TOKENIZERS_PARALLELISM": "false"}
    environment["HF_HUB_OFFLINE"] = "1"
    function, python = "bench.train_trl:train", trl_python
    if task.variant == ONEBASE:
        function, python = "bench.training:train_onebase", Path(sys.executable)
    answer = call(function, asdict(task), folder / "log", timeout, python or "", environment)
    return TrainRun(target=task.variant, repeat=repeat, **answer)


def train_onebase(**settings: Any) -> dict[str, Any]:
    """Train as `onebase train` does, and return the fields of a TrainRun: a worker's function."""
    import torch

    from onebase_engine.base.load import BaseSettings, load_base
    from onebase_engine.machine import keep_freed_memory
    from onebase_training import events
    from onebase_training.events import OpenGate
    from onebase_training.recipe import Recipe
    from onebase_training.run import ADAPTER, TrainingRequest, train

    task = TrainTask(**settings)
    torch.set_num_threads(task.threads)
    keep_freed_memory()  # as `onebase train` does
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = BaseSettings(folder=Path(task.base), device=device)
    times: dict[str, list[float]] = {"ends": [], "cpu": [], "losses": []}

    def listen(event: events.Event) -> None:
        if isinstance(event, events.StepDone):
            if device.type == "cuda":
                torch.cuda.synchronize()
            times["ends"].append(time.perf_counter())
            times["cpu"].append(time.process_time())
            times["losses"].append(event.loss)

    # What depends on memory is left to be decided. Nothing is held out.
    recipe = Recipe(
        r=task.rank,
        alpha=2.0 * task.rank,
        targets=("all-linear",),
        batch_size=task.batch,
        max_steps=task.steps,
        epochs=1000.0,
        learning_rate=LEARNING_RATE,
        learning_rate_multiplier=1.0,
        warmup_ratio=WARMUP_RATIO,
        max_length=MAX_LENGTH,
        seed=task.seed,
        eval_split=0.0,
    )
    job = TrainingRequest(
        name="benchmark",
        recipe=recipe,
        train=Path(task.data),
        folder=Path(task.out) / "run",
        base=base,
        base_name=base.folder.name,
    )
    report = train(lambda: load_base(base), job, listen, OpenGate())
    return {**times, "peak": report.peak_memory_bytes, "adapter": str(job.folder / ADAPTER)}


# ---- figures --------------------------------------------------------------------------------------

COLUMNS = (
    "target",
    "tokens/s",
    "ratio",
    "tokens/CPU second",
    "peak memory, GB",
    "held-out loss",
    "last step's loss",
)


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
    """Return figures by target: medians over the repeats."""
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


def rows_of(figures: Mapping[str, TrainFigures], first: str) -> list[list[str]]:
    """Return the cells of COLUMNS by target. ratio: tokens/s of the first target over this one's."""
    rows = []
    for target, one in figures.items():
        speed, ours = one.tokens_per_second, figures.get(first)
        ratio = "" if target == first or ours is None else f"{ours.tokens_per_second / speed:.2f}x"
        work, memory = f"{one.tokens_per_cpu_second:.0f}", f"{one.peak / 1e9:.2f}"
        rows.append(
            [target, f"{speed:.0f}", ratio, work, memory, f"{one.held_out:.4f}", f"{one.last_loss:.4f}"]
        )
    return rows
