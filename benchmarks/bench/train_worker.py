"""OneBase's side of the training benchmark: `onebase_training.run.train`, in a process of its own.

Takes the JSON file of a `bench.training.TrainTask`; prints one JSON line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.machine import keep_freed_memory
from onebase_training import events
from onebase_training.events import OpenGate
from onebase_training.recipe import Recipe
from onebase_training.run import ADAPTER, TrainingRequest, train


def recipe_of(task: dict[str, Any]) -> Recipe:
    """The task's settings; what depends on memory is left to be decided. Nothing is held out."""
    targets = task["targets"]
    return Recipe(
        r=task["rank"],
        alpha=float(task["alpha"]),
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        batch_size=task["batch"],
        max_steps=task["steps"],
        epochs=1000.0,
        learning_rate=max(task["rates"]),
        learning_rate_multiplier=1.0,
        warmup_ratio=task["warmup_ratio"],
        max_length=task["max_length"],
        seed=task["seed"],
        eval_split=0.0,
    )


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(task["threads"])
    keep_freed_memory()  # as `onebase train` does
    settings = BaseSettings(folder=Path(task["base"]), device=torch.device(task["device"]))
    ends: list[float] = []
    cpu: list[float] = []
    losses: list[float] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.StepDone):
            if settings.device.type == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            cpu.append(time.process_time())
            losses.append(event.loss)

    folder = Path(task["out"]) / "run"
    job = TrainingRequest(
        name="benchmark",
        recipe=recipe_of(task),
        train=Path(task["data"]),
        folder=folder,
        base=settings,
        base_name=settings.folder.name,
    )
    report = train(lambda: load_base(settings), job, listen, OpenGate())
    answer = {
        "ends": ends,
        "cpu": cpu,
        "peak": report.peak_memory_bytes,
        "losses": losses,
        "adapter": str(folder / ADAPTER),
    }
    print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
