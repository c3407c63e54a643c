"""Rows and operations for tests of live adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.training.runs import VOCABULARY

from onebase_training.events import Gate, OpenGate
from onebase_training.live import BaseName, LiveModels
from onebase_training.live_operations import (
    Datum,
    ForwardBackward,
    Load,
    ModelSpec,
    Operation,
    OptimStep,
    Result,
    Save,
)
from onebase_training.live_store import LiveStore

STEP = OptimStep(learning_rate=1e-2)


def ids_of(count: int, seed: int) -> np.ndarray:
    """Token ids, one more than a row of `count` tokens has."""
    return np.random.default_rng(seed).integers(3, VOCABULARY, count + 1)


def text_row(count: int, seed: int = 0, **inputs: Any) -> Datum:
    """A row for cross-entropy, every token weighing 1 unless `weights` are given."""
    ids = ids_of(count, seed)
    return Datum.of(ids[:-1].tolist(), {"target_tokens": ids[1:], "weights": np.ones(count, "f4"), **inputs})


def policy_row(count: int, seed: int = 0, **inputs: Any) -> Datum:
    """A row for the losses of policies, with the logprobs of a sampler that was about as unsure."""
    rng = np.random.default_rng(seed)
    ids = ids_of(count, seed)
    given = {
        "target_tokens": ids[1:],
        "logprobs": (-5.7 + 0.3 * rng.standard_normal(count)).astype("f4"),
        "advantages": rng.standard_normal(count).astype("f4"),
        **inputs,
    }
    return Datum.of(ids[:-1].tolist(), given)


def ask(*rows: Datum, loss: str = "cross_entropy", **options: Any) -> ForwardBackward:
    return ForwardBackward(data=list(rows), loss=loss, **options)


def lesson(root: Path, model: str) -> dict[int, Operation]:
    """Fourteen operations with each kind among them, in which gradients lie over points, saves and loads."""
    saved = str(root / model / "weights" / "half")
    operations: list[Operation] = [
        ask(text_row(20, 1), text_row(9, 2)),
        ask(policy_row(12, 3), loss="ppo"),
        STEP,
        ask(text_row(15, 4)),
        Save(name="half", kind="weights"),
        ask(text_row(15, 4), forward_only=True),
        STEP,
        ask(policy_row(11, 5), loss="no such loss"),
        ask(policy_row(11, 5), loss="importance_sampling"),
        Load(folder=saved, optimizer=True),
        ask(text_row(30, 6), policy_row(5, 7, weights=np.zeros(5, "f4"))),
        ask(text_row(30, 6), text_row(30, 8)),
        OptimStep(learning_rate=3e-3, grad_clip_norm=1.0, weight_decay=0.1),
        Save(name="end", kind="weights"),
    ]
    return dict(enumerate(operations, start=1))


SPECS = (
    ModelSpec(id="small", rank=4, seed=1, train_mlp=False),
    ModelSpec(id="wide:0", rank=16, seed=2, train_unembed=False),
)


def live_models(base: torch.nn.Module, root: Path, gate: Gate | None = None, **options: Any) -> LiveModels:
    models = LiveModels(base, LiveStore(root), gate or OpenGate(), BaseName("tiny"), **options)
    models.enqueue_all()
    return models


def done(
    base: torch.nn.Module,
    root: Path,
    operations: Mapping[int, Any],
    spec: ModelSpec = SPECS[0],
    check: Callable[[Result], Any] = lambda result: result,
) -> list[Any]:
    """Submit operations to a model, made if it is new, do them all, and return what came of them."""
    store = LiveStore(root)
    store.create(spec)
    for seq_id, operation in operations.items():
        store.submit(spec.id, seq_id, operation)
    models = live_models(base, root)
    while models.do_next():
        pass
    found = [store.result(spec.id, seq_id) for seq_id in operations]
    return [check(result) for result in found if result is not None]
