"""What came of a run, for people and for who decides whether to activate it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from onebase_adapters.training.recipe import Recipe
from onebase_engine.base.load import Quantization


@dataclass(frozen=True, kw_only=True)
class Report:
    """One finished run. Losses are means over held-out rows, nats a supervised token (DPO: a pair).

    better: whether the adapter is better than the base by the recipe's `best_by`; None if not measured.
    metrics_before, metrics_after: base and adapter on the same prompts, each from 0 to 1.
    losses, held_out: (step, loss).
    """

    name: str
    base: str
    quantization: Quantization
    steps: int
    best_step: int
    tokens: int
    seconds: float
    parameters: int
    adapter_bytes: int
    loss_before: float | None
    loss_after: float | None
    metrics_before: dict[str, float]
    metrics_after: dict[str, float]
    better: bool | None
    losses: list[tuple[int, float]]
    held_out: list[tuple[int, float]]
    recipe: dict[str, Any]
    peak_memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def is_better(
    recipe: Recipe,
    loss: tuple[float | None, float | None],
    before: dict[str, float],
    after: dict[str, float],
) -> bool | None:
    """By the recipe's `best_by`: a lower held-out loss, or a higher metric. None if it was not measured.

    Args:
        loss: of the base and of the adapter.
    """
    if recipe.best_by == "loss":
        return None if loss[0] is None or loss[1] is None else loss[1] < loss[0]
    name = recipe.best_by
    return after[name] > before[name] if name in before and name in after else None
