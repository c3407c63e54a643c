"""TRL's SFTTrainer on the run that `train.py` describes, in TRL's own environment: `train.py` starts it.

It imports nothing of OneBase: `pip install trl bitsandbytes` is all that its environment needs.

Like for like: the same tokenized rows in the same steps, the learning rate of each step given, AdamW without
weight decay, gradients clipped to 1, NF4 with double quantization, sdpa attention. Adapters are trained in
fp32: the trainer casts those on a quantized base to bf16, and here they are cast back. The variants are what
users of TRL can choose from; see `bench.training.VARIANTS`.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from bench.peft_nf4 import load_base
from bench.training import MAX_LENGTH, TrainTask


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.cpu: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())


class TimedTrainer(SFTTrainer):  # type: ignore[misc]
    """A trainer that takes its learning rates from the task."""

    rates: list[float]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        factors = [rate / max(self.rates) for rate in self.rates] + [0.0]
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: factors[step])
        return self.lr_scheduler


def configured(task: TrainTask) -> Any:
    """Return the settings of TRL's run."""
    padding_free = task.variant == "trl-padding-free"
    return SFTConfig(
        output_dir=str(Path(task.out) / "trainer"),
        max_steps=task.steps,
        per_device_train_batch_size=task.batch,
        gradient_accumulation_steps=1,
        gradient_checkpointing=task.variant in ("trl-checkpointing", "trl-defaults"),
        bf16=task.variant in ("trl-bf16", "trl-defaults"),
        padding_free=padding_free,
        max_length=None if padding_free else MAX_LENGTH,
        learning_rate=max(task.rates),
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=task.seed,
        train_sampling_strategy="sequential",
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def adapted(task: TrainTask) -> Any:
    """Return the base with a new adapter, which begins as OneBase's does."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=task.rank,
        lora_alpha=2 * task.rank,
        lora_dropout=0.0,
        target_modules="all-linear",
    )
    base = load_base(task.base, "sdpa")
    torch.manual_seed(task.seed)
    return get_peft_model(base, config)


def trainable(model: Any) -> dict[str, Any]:
    """Return the adapter's parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(**settings: Any) -> dict[str, Any]:
    """Train, and return the fields of a `bench.training.TrainRun`: a worker's function."""
    task = TrainTask(**settings)
    torch.set_num_threads(task.threads)
    clock, model = StepClock(), adapted(task)
    began = {name: parameter.data for name, parameter in trainable(model).items()}
    trainer: Any = TimedTrainer(
        model=model,
        args=configured(task),
        train_dataset=Dataset.from_list(json.loads(Path(task.rows).read_text())),
        processing_class=AutoTokenizer.from_pretrained(task.base),
        callbacks=[clock],
    )
    trainer.rates = task.rates
    if task.variant not in ("trl-bf16", "trl-defaults"):
        # Undo the cast to bf16. No optimizer has seen the parameters yet.
        for name, parameter in trainable(trainer.model).items():
            parameter.data = began[name]
    trainer.train()
    adapter = Path(task.out) / "adapter"
    trainer.model.save_pretrained(adapter, save_embedding_layers=False)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    times = {"ends": clock.ends, "cpu": clock.cpu}
    return {**times, "peak": peak, "losses": losses, "adapter": str(adapter)}
