"""Load the default base, train two steps on packed rows, print the peak of the process beside its estimate.

python peak_of_a_step.py '{"gradient_checkpointing": true}' 1024

With the method reinforcement all but the beginning of each row is a reply, and a step is an update of that
method's own trainer.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch

from onebase_engine.base.default_base import DEFAULT_BASE, resolve_base
from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.machine import keep_freed_memory, peak_memory
from onebase_training.batches import MicroBatch
from onebase_training.data.dataset import Sample
from onebase_training.estimate import estimate
from onebase_training.events import OpenGate
from onebase_training.loop import make_optimizer
from onebase_training.recipe import Recipe, parse_recipe, resolve
from onebase_training.reinforcement import Episode, RewardTrainer
from onebase_training.rollouts import RewardedReply
from onebase_training.trainable import Trainable

ROW = 256
PROMPT = 32
"""Tokens of a row before its reply, with the method reinforcement."""


def learn(trainable: Trainable, recipe: Recipe, ids: Any) -> None:
    optimizer = make_optimizer(trainable.model, recipe)
    supervised = np.arange(ROW) >= ROW // 2
    batch = MicroBatch(tuple(Sample(row, supervised, 1) for row in ids), tuple(range(len(ids))))
    for _ in range(2):
        losses, _ = trainable.losses(batch)
        losses.mean().backward()
        del losses
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def learn_from_rewards(trainable: Trainable, recipe: Recipe, ids: Any) -> None:
    nothing: Any = None
    data: Any = [0] * 100
    trainer = RewardTrainer(
        trainable,
        nothing,
        recipe,
        data,
        None,
        checkpoints=nothing,
        identity="",
        listen=nothing,
        policy=nothing,
    )
    for step in range(2):
        replies = [RewardedReply(tokens=row[PROMPT:].tolist(), logprobs=[], text="") for row in ids]
        episodes = [
            Episode(row[:PROMPT].tolist(), reply, 1.0) for row, reply in zip(ids, replies, strict=True)
        ]
        trainer._update(episodes, step, [])


def main(settings: str, tokens: int) -> None:
    keep_freed_memory()  # as `onebase train` does
    recipe = resolve(parse_recipe(json.loads(settings)), rows=100, held_out=0, base_limit=8192)
    base = load_base(BaseSettings(folder=resolve_base(DEFAULT_BASE).folder))
    trainable = Trainable(base, recipe, OpenGate())
    ids = np.random.default_rng(0).integers(5, 40_000, (tokens // ROW, ROW)).astype(np.int32)
    rewards = recipe.method == "reinforcement"
    (learn_from_rewards if rewards else learn)(trainable, recipe, ids)
    supervised = 1 - PROMPT / ROW if rewards else 0.5
    made = estimate(base.config, recipe, longest_row=ROW, supervised_part=supervised)
    print(json.dumps({"estimated": made.total, "measured": peak_memory(torch.device("cpu"))}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
