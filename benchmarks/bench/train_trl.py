"""TRL's SFTTrainer on the run that `train.py` describes, in TRL's own environment: `train.py` starts it.

It imports nothing of OneBase: `pip install trl bitsandbytes` is all that its environment needs.

Like for like: the same tokenized rows in the same steps, the learning rate of each step given, AdamW without
weight decay, gradients clipped to 1, NF4 with double quantization, sdpa attention. Adapters are trained in
fp32: the trainer casts those on a quantized base to bf16, and `fp32` casts them back. The variants are what
users of TRL can choose from; see VARIANTS.
"""

from __future__ import annotations

import importlib
import json
import resource
import time
from pathlib import Path
from typing import Any

VARIANTS = ("trl", "trl-checkpointing", "trl-padding-free", "trl-bf16", "trl-defaults")
"""trl: its fastest in fp32: padded batches of all rows of a step, activations kept.
trl-checkpointing: with gradient checkpointing, which is TRL's default.
trl-padding-free: rows in one sequence; TRL means it for FlashAttention, sdpa masks all pairs of tokens.
trl-bf16: as trl, adapters and their products in bf16, as TRL has them by default.
trl-defaults: checkpointing and bf16, as TRL does without being told."""


def arguments(task: dict[str, Any], variant: str, folder: Path) -> Any:
    """Return the settings of TRL's run."""
    trl: Any = importlib.import_module("trl")
    padding_free = variant == "trl-padding-free"
    return trl.SFTConfig(
        output_dir=str(folder),
        max_steps=task["steps"],
        per_device_train_batch_size=task["batch"],
        gradient_accumulation_steps=1,
        gradient_checkpointing=variant in ("trl-checkpointing", "trl-defaults"),
        bf16=variant in ("trl-bf16", "trl-defaults"),
        padding_free=padding_free,
        max_length=None if padding_free else task["max_length"],
        learning_rate=max(task["rates"]),
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=task["seed"],
        train_sampling_strategy="sequential",
        use_cpu=task["device"] == "cpu",
        dataloader_num_workers=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def with_adapter(task: dict[str, Any]) -> Any:
    """Return the base with a new adapter, which begins as OneBase's does."""
    import torch
    from peft import LoraConfig, get_peft_model

    from bench.peft_nf4 import load_base

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=task["rank"],
        lora_alpha=task["alpha"],
        lora_dropout=0.0,
        target_modules=task["targets"],
    )
    base = load_base(task["base"], task["device"], "sdpa")
    torch.manual_seed(task["seed"])
    return get_peft_model(base, config)


def trainable(model: Any) -> dict[str, Any]:
    """Return the adapter's tensors by name."""
    return {name: one.data for name, one in model.named_parameters() if one.requires_grad}


def fp32(model: Any, tensors: dict[str, Any]) -> None:
    """Undo the cast to bf16: `tensors` are from before it. No optimizer has seen the parameters yet."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = tensors[name]


def make_trainer(task: dict[str, Any], variant: str, folder: Path) -> Any:
    """Return an SFTTrainer that takes its learning rates from the task and notes when each step ends."""
    trl: Any = importlib.import_module("trl")
    datasets: Any = importlib.import_module("datasets")
    import torch
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import AutoTokenizer, TrainerCallback

    peak = max(task["rates"])
    factors = [rate / peak for rate in task["rates"]] + [0.0]

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.cpu: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
            self.cpu.append(time.process_time())

    class Trainer(trl.SFTTrainer):  # type: ignore[misc]
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: factors[step])
            return self.lr_scheduler

    rows = json.loads(Path(task["rows"]).read_text())
    clock, model = Clock(), with_adapter(task)
    began = trainable(model)
    trainer = Trainer(
        model=model,
        args=arguments(task, variant, folder),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(task["base"]),
        callbacks=[clock],
    )
    if variant not in ("trl-bf16", "trl-defaults"):
        fp32(trainer.model, began)
    trainer.clock = clock
    return trainer


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Train, and return the fields of a `bench.training.TrainRun`: a worker's function."""
    import torch

    torch.set_num_threads(task["threads"])
    folder = Path(task["out"])
    trainer = make_trainer(task, task["variant"], folder / "trainer")
    trainer.train()
    trainer.model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    if task["device"] == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        peak = torch.cuda.max_memory_allocated()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    times = {"ends": trainer.clock.ends, "cpu": trainer.clock.cpu}
    return {**times, "peak": peak, "losses": losses, "adapter": str(folder / "adapter")}
