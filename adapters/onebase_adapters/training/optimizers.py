"""Optimizers and learning rates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from onebase_adapters.training.recipe import Recipe, Schedule, decided

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters.

    With LoRA+ the B matrices learn `lora_plus_ratio` times faster than the rest (Hayou et al. 2024).
    """
    ratio = recipe.lora_plus_ratio or 1.0
    slow: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (fast if ".lora_B." in name or ".lora_embedding_B." in name else slow).append(parameter)
    groups = [{"params": slow, "factor": 1.0}, {"params": fast, "factor": ratio}]
    options: dict[str, Any] = {
        "lr": decided(recipe.learning_rate),
        "betas": _BETAS,
        "eps": _EPSILON,
        "weight_decay": recipe.weight_decay,
    }
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    import bitsandbytes as bnb

    paged, plain = (
        (bnb.optim.PagedAdamW32bit, bnb.optim.PagedAdamW8bit),
        (torch.optim.AdamW, bnb.optim.AdamW8bit),
    )
    # Without a GPU there is nothing to page to: the states are in host memory anyway.
    on_gpu = slow[0].device.type == "cuda" if slow else False
    kinds = paged if recipe.optimizer.startswith("paged") and on_gpu else plain
    optimizer: torch.optim.Optimizer = kinds[recipe.optimizer.endswith("8bit")](groups, **options)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Of the step to come."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def learning_rate(step: int, steps: int, peak: float, schedule: Schedule, warmup_ratio: float) -> float:
    """Of step `step` (from 0): rises linearly in the warm-up, then falls to 0 (cosine, linear) or stays.

    As transformers' schedules with the warm-up rounded up, but the first step of a warm-up is not 0: it would
    be computed for nothing.
    """
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    part = (step - warmup) / max(1, steps - warmup)
    return peak * (0.5 * (1 + math.cos(math.pi * part)) if schedule == "cosine" else 1 - part)
