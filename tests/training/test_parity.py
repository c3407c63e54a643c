"""Training is what a plain loop over PEFT computes, and what it has trained is what is served."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import ARCHITECTURES, HYBRIDS, load_folder, save_base
from torch import nn

from onebase_engine.base.attach import attach, publish
from onebase_engine.base.default_base import fetch_default_base
from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_training.attention import SHORT
from onebase_training.batches import pack, step_rows
from onebase_training.checkpoint import Checkpoints, write_adapter
from onebase_training.data.dataset import Dataset, Sample
from onebase_training.events import OpenGate
from onebase_training.loop import Trainer
from onebase_training.objectives import make_objective
from onebase_training.recipe import Recipe, resolve
from onebase_training.trainable import Trainable

STEPS = 10
FP32: dict[str, Any] = {"dtype": torch.float32, "compute_dtype": torch.float32}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows(count: int, vocabulary: int, longest: int, seed: int = 5) -> list[Sample]:
    """Rows of unlike lengths; the second part of each is supervised, and some of it is not."""
    random = np.random.default_rng(seed)
    made = []
    for line in range(1, count + 1):
        length = int(random.integers(6, longest))
        supervised = np.arange(length) >= random.integers(2, length - 1)
        supervised[-2] = False
        ids = random.integers(3, vocabulary, length).astype(np.int32)
        made.append(Sample(ids=ids, supervised=supervised, line=line))
    return made


def recipe(data: Sequence[Sample], **changes: Any) -> Recipe:
    """Resolved, in micro-batches that do not hold a step's rows at once."""
    settings: dict[str, Any] = {
        "r": 4,
        "batch_size": 4,
        "max_steps": STEPS,
        "epochs": 100.0,
        "learning_rate": 2e-3,
        "warmup_ratio": 0.3,
        "max_grad_norm": 0.5,
        "micro_tokens": 2 * max(map(len, data)),
        "gradient_checkpointing": False,
    }
    return resolve(Recipe(**{**settings, **changes}), rows=len(data), held_out=0, base_limit=512)


def trainer(base: nn.Module, made: Recipe, data: Sequence[Sample], folder: Path) -> Trainer:
    trainable = Trainable(base, made, OpenGate())
    return Trainer(
        trainable,
        make_objective(trainable, made),
        made,
        Dataset(data),
        None,
        checkpoints=Checkpoints(folder, 1),
        identity="",
        listen=lambda event: None,
    )


def losses_of(base: nn.Module, made: Recipe, data: Sequence[Sample], folder: Path) -> list[float]:
    return [loss for _, loss in trainer(base, made, data, folder).run_steps().losses]


# ---- the plain loop ---------------------------------------------------------------------------


def plain_losses(base: Any, made: Any, data: Sequence[Sample], **lora: Any) -> list[float]:
    """PEFT on the base itself, padded batches of two rows, AdamW, a cosine; nothing of OneBase's training."""
    torch.manual_seed(made.seed)
    settings = {"r": made.r, "lora_alpha": 2 * made.r, "target_modules": "all-linear", **lora}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings)).train()
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ratio = made.lora_plus_ratio if made.lora_plus_ratio and "lora_B" in name else 1.0
            groups.setdefault(ratio, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": some, "ratio": ratio} for ratio, some in groups.items()], weight_decay=made.weight_decay
    )
    losses = []
    for step in range(made.max_steps):
        batch = [data[row] for row in step_rows(len(data), made.batch_size, step, made.seed)]
        count = sum(int(row.supervised.sum()) for row in batch)
        total = 0.0
        for start in range(0, len(batch), 2):
            loss = summed_loss(model, batch[start : start + 2]) / count
            loss.backward()
            total += loss.item()
        losses.append(total)
        nn.utils.clip_grad_norm_([p for some in groups.values() for p in some], made.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["ratio"] * plain_rate(step, made)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def summed_loss(model: Any, batch: Sequence[Sample]) -> torch.Tensor:
    longest = max(map(len, batch))
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros(len(batch), longest, dtype=torch.int64)
    labels = torch.full((len(batch), longest), -100)
    for number, row in enumerate(batch):
        ids[number, : len(row)] = torch.from_numpy(row.ids)
        mask[number, : len(row)] = 1
        wanted = torch.from_numpy(row.supervised)
        labels[number, : len(row)][wanted] = torch.from_numpy(row.ids).long()[wanted]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def plain_rate(step: int, made: Any) -> float:
    """Three steps of ten up, then half a cosine down."""
    warm_up = math.ceil(made.max_steps * made.warmup_ratio)
    if step < warm_up:
        return float(made.learning_rate) * (step + 1) / (warm_up + 1)
    part = (step - warm_up) / (made.max_steps - warm_up)
    return float(made.learning_rate) * (1 + math.cos(math.pi * part)) / 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: save_base(name, root / name) for name in ARCHITECTURES | HYBRIDS}


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "qwen3_5", "granite_h", "lfm2"])
def test_the_loss_curve_is_that_of_a_plain_loop_over_peft(
    architecture: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    settings = BaseSettings(folders[architecture], **FP32)
    data = rows(24, 320, 40)
    made = recipe(data)
    expected = plain_losses(load_base(settings), made, data)
    assert losses_of(load_base(settings), made, data, tmp_path) == pytest.approx(expected, abs=1e-4)
    assert abs(expected[0] - expected[-1]) > 0.05


@pytest.mark.parametrize(
    ("changes", "lora"),
    [
        pytest.param({"packing": False}, {}, id="one-row-at-a-time"),
        pytest.param({"gradient_checkpointing": True}, {}, id="gradient-checkpointing"),
        pytest.param({"lora_plus_ratio": 8.0, "weight_decay": 0.1}, {}, id="lora-plus-and-weight-decay"),
        pytest.param({"use_rslora": True}, {"use_rslora": True}, id="rslora"),
        pytest.param({"use_dora": True}, {"use_dora": True}, id="dora"),
        pytest.param(
            {"targets": ("q_proj", "lm_head"), "rank_pattern": {"lm_head": 6}},
            {"target_modules": ["q_proj", "lm_head"], "rank_pattern": {"lm_head": 6}},
            id="head-as-a-target",
        ),
    ],
)
def test_no_setting_changes_the_curve_in_another_way_than_it_does_for_peft(
    changes: dict[str, Any], lora: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    settings = BaseSettings(folders["llama"], **FP32)
    data = rows(24, 320, 40)
    made = recipe(data, **changes)
    expected = plain_losses(load_base(settings), made, data, **lora)
    assert losses_of(load_base(settings), made, data, tmp_path) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("architecture", ["gemma4", "llama4"])
def test_layers_that_share_states_or_count_positions_are_computed_twice_for_the_same_curve(
    architecture: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    settings = BaseSettings(folders[architecture], **FP32)
    data = rows(24, 320, 40)
    made = recipe(data, gradient_checkpointing=True)
    expected = plain_losses(load_base(settings), made, data)
    assert losses_of(load_base(settings), made, data, tmp_path) == pytest.approx(expected, abs=1e-4)


def test_the_curve_is_that_of_a_plain_loop_also_where_rows_are_long(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    settings = BaseSettings(folders["llama"], **FP32)
    data = rows(12, 320, 2 * SHORT - 32)
    assert min(map(len, data)) < SHORT < max(map(len, data))
    made = recipe(data)
    expected = plain_losses(load_base(settings), made, data)
    assert losses_of(load_base(settings), made, data, tmp_path) == pytest.approx(expected, abs=1e-4)


@pytest.mark.full
def test_the_curve_on_the_real_base_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    settings = BaseSettings(fetch_default_base(), **FP32)
    data = rows(20, 49152, 24)
    made = recipe(data, batch_size=2, learning_rate=1e-3, max_steps=4)
    expected = plain_losses(load_base(settings), made, data)
    assert losses_of(load_base(settings), made, data, tmp_path) == pytest.approx(expected, abs=1e-4)


# ---- the shared base --------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_gradients_on_an_attached_base_are_those_on_an_own_one_bit_for_bit(
    architecture: str, folders: dict[str, Path]
) -> None:
    settings = BaseSettings(folders[architecture])
    data = rows(6, 320, 40)
    made = recipe(data, init="false")
    own = gradients(load_base(settings), made, data)
    published = load_base(settings)
    fd = os.memfd_create("base")
    try:
        shared = attach(settings, publish(published, fd), fd)
    finally:
        os.close(fd)
    found = gradients(shared, made, data)
    assert own.keys() == found.keys()
    assert all(torch.equal(gradient, found[name]) for name, gradient in own.items())
    assert all(gradient.count_nonzero() for gradient in own.values())


def gradients(base: nn.Module, made: Any, data: Sequence[Sample]) -> dict[str, torch.Tensor]:
    trainable = Trainable(base, made, OpenGate())
    for batch in pack(data, range(len(data)), made.micro_tokens, packing=True):
        losses, _ = trainable.losses(batch)
        losses.sum().backward()
    named = trainable.named_parameters().items()
    return {name: one.grad for name, one in named if one.grad is not None}


# ---- what is served ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "precision", "apart"),
    [
        pytest.param("llama", FP32, 1e-4, id="tiny-nf4-in-fp32"),
        pytest.param("llama", {}, 0.05, id="tiny-nf4-in-bf16"),
        pytest.param(None, {}, 0.25, id="default-base-nf4-in-bf16", marks=pytest.mark.full),
    ],
)
def test_the_finished_adapter_gives_the_logits_in_serving_that_it_gave_in_training(
    architecture: str | None,
    precision: dict[str, Any],
    apart: float,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    """apart: of log-probabilities, nats, at most, and a quarter of it on average.

    In bf16 a logit of 10 has steps of 0.06, and on some processors a packed product sums in another order.
    """
    folder = folders[architecture] if architecture else fetch_default_base()
    base: Any = load_base(BaseSettings(folder, **precision))
    data = rows(8 if architecture else 4, base.config.vocab_size, 32)
    run = trainer(
        base, recipe(data, learning_rate=1e-2, max_steps=4 if architecture else 2), data, tmp_path / "run"
    )
    run.run_steps()
    trained = log_likelihoods(run.trainable, data)
    write_adapter(run.trainable.model, tmp_path / "adapter", base="tiny", commit=None, card=str)
    served = served_log_likelihoods(base, tmp_path / "adapter", data)
    assert [len(row) for row in trained] == [len(row) for row in served]
    pairs = zip(chain.from_iterable(trained), chain.from_iterable(served), strict=True)
    differences = [abs(mine - theirs) for mine, theirs in pairs]
    assert max(differences) <= apart
    assert fmean(differences) <= apart / 4
    with run.trainable.without_adapter():
        untrained = log_likelihoods(run.trainable, data)
    changes = zip(chain.from_iterable(trained), chain.from_iterable(untrained), strict=True)
    assert max(abs(mine - bare) for mine, bare in changes) > 0.5


def log_likelihoods(trainable: Trainable, data: Sequence[Sample]) -> list[list[float]]:
    """Of the supervised tokens of each row, as the loss of training has them: packed, in training mode."""
    found: list[list[float]] = [[] for _ in data]
    for batch in pack(data, range(len(data)), 100, packing=True):
        losses, owner = trainable.losses(batch)
        for loss, sample in zip(losses.tolist(), owner.tolist(), strict=True):
            found[batch.rows[sample]].append(-loss)
    return found


def served_log_likelihoods(base: nn.Module, adapter: Path, data: Sequence[Sample]) -> list[list[float]]:
    """Of the same tokens by the engine, all rows at once; the base's rows are among them."""
    engine = Engine(base, name="tiny", limits=SchedulerLimits(32, 96, 512), kv_blocks=400)
    engine.put_adapter("digest", load_folder(base, adapter).weights)
    for number, row in enumerate(data):
        for name, adapters in ((str(number), [protocol.AdapterRef("digest")]), (f"base-{number}", [])):
            sampling = protocol.Sampling(temperature=0.0, max_tokens=1, prompt_logprobs=0)
            engine.submit(
                protocol.Submit(id=name, prompt=row.ids.tolist(), sampling=sampling, adapters=adapters)
            )
    scores: dict[str, list[float]] = {}
    while engine.busy:
        engine.step()
        for output in engine.take_outputs():
            assert output.error_message is None, output.error_message
            if output.prompt_logprobs is not None:
                scores[output.id] = [score.logprob for score in output.prompt_logprobs]
    return [
        [score for score, wanted in zip(scores[str(number)], row.supervised[1:], strict=True) if wanted]
        for number, row in enumerate(data)
    ]
