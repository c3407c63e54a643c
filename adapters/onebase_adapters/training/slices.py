"""What a run changes in each slice of its held-out rows: a field of the rows says which slice a row is of.

Measured by the recipe's `best_by`, on what training went on from (the base, or an adapter) and on the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from onebase_adapters.training.data.dataset import Dataset
from onebase_adapters.training.metrics import is_decided, macro_f1, score
from onebase_adapters.training.recipe import Recipe

MOST_SLICES = 100
"""In a report: those that got worse most, then the largest. All of them count for `max_regression`."""
MOST_CHANGED = 20
_LONGEST = 500
"""Characters of a text in a report."""
LOSS, ACCURACY, F1 = "loss", "accuracy", "f1"


class Question(Protocol):
    """A held-out row that subjects are measured on. reference: what would be right."""

    @property
    def reference(self) -> str: ...
    @property
    def slice(self) -> str: ...
    @property
    def line(self) -> int: ...


@dataclass(frozen=True)
class Measured:
    """One subject. losses: by slice, nats a supervised token (classification: a row). replies: to the
    prompts, in their order."""

    losses: Mapping[str, float]
    replies: Sequence[str]


def by_slice(data: Dataset) -> dict[str, Dataset]:
    """The rows of each slice, by its name; rows of none are left out."""
    rows: dict[str, list[Any]] = {}
    for row in data.rows:
        if row.slice:
            rows.setdefault(row.slice, []).append(row)
    return {name: Dataset(found) for name, found in rows.items()}


def mean_by_slice(rows: Sequence[Question], values: Sequence[float]) -> dict[str, float]:
    """The mean of the rows' values in each slice; none of rows without values."""
    parts: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=False):
        if row.slice:
            parts.setdefault(row.slice, []).append(value)
    return {name: sum(some) / len(some) for name, some in parts.items()}


def slice_report(
    recipe: Recipe,
    rows: Mapping[str, int],
    prompts: Sequence[Question],
    before: Measured,
    after: Measured,
    against: str,
) -> dict[str, Any]:
    """The slices, which of them got worse, and rows whose replies were right and are wrong, as JSON.

    Args:
        rows: held-out rows of each slice. prompts: those that replies were generated for; none without
            metrics. against: who is `before`: "base" or "parent".
    """
    scores = [_Scores.of(recipe, prompts, one.replies) for one in (before, after)]
    asked = Counter(prompt.slice for prompt in prompts)
    found = [
        _slice(recipe, name, count, asked[name], (before, after), scores) for name, count in rows.items()
    ]
    found.sort(key=lambda one: (-one["worse_by"], -one["rows"], one["slice"]))
    changed = _changed(recipe, prompts, (before, after), scores)
    return {
        "by": recipe.best_by,
        "against": against,
        "slices": found[:MOST_SLICES],
        "slice_count": len(found),
        "regressed": [one["slice"] for one in found if one["regressed"]],
        "changed": changed[:MOST_CHANGED],
        "changed_count": len(changed),
    }


def _score(name: str, reply: str, reference: str) -> float:
    return float(reply == reference) if name == ACCURACY else score(name, reply, reference)


@dataclass(frozen=True)
class _Scores:
    """of_row: each metric's score of each prompt. of_slice: their means, by slice."""

    of_row: dict[str, list[float]]
    of_slice: dict[str, dict[str, float]]

    @classmethod
    def of(cls, recipe: Recipe, prompts: Sequence[Question], replies: Sequence[str]) -> _Scores:
        references = [prompt.reference for prompt in prompts] if replies else []
        rows = {
            name: [_score(name, *pair) for pair in zip(replies, references, strict=True)]
            for name in (recipe.measured if replies else ())
            if name != F1
        }
        means: dict[str, dict[str, float]] = {}
        for name, values in rows.items():
            parts: dict[str, list[float]] = {}
            for prompt, value in zip(prompts, values, strict=True):
                parts.setdefault(prompt.slice, []).append(value)
            for part, some in parts.items():
                means.setdefault(part, {})[name] = sum(some) / len(some)
        if F1 in recipe.measured and replies:
            pairs: dict[str, list[tuple[str, str]]] = {}
            for prompt, reply in zip(prompts, replies, strict=True):
                pairs.setdefault(prompt.slice, []).append((prompt.reference, reply))
            for part, found in pairs.items():
                means.setdefault(part, {})[F1] = macro_f1(*zip(*found, strict=True))
        return cls(rows, means)


def _slice(
    recipe: Recipe,
    name: str,
    rows: int,
    asked: int,
    measured: tuple[Measured, Measured],
    scores: Sequence[_Scores],
) -> dict[str, Any]:
    by_loss = recipe.best_by == LOSS
    losses = [one.losses.get(name) for one in measured]
    metrics = [one.of_slice.get(name, {}) for one in scores]
    values = losses if by_loss else [one.get(recipe.best_by) for one in metrics]
    count = rows if by_loss else asked
    before, after = values
    worse = 0.0
    if before is not None and after is not None:
        worse = after - before if by_loss else before - after
    limit = recipe.max_regression
    return {
        "slice": name,
        "rows": rows,
        "measured": count if before is not None else 0,
        "before": before,
        "after": after,
        "worse_by": max(0.0, worse),
        "regressed": limit != "auto" and count >= recipe.slice_rows and worse > limit,
        "loss_before": losses[0],
        "loss_after": losses[1],
        "metrics_before": metrics[0],
        "metrics_after": metrics[1],
    }


def _changed(
    recipe: Recipe,
    prompts: Sequence[Question],
    measured: tuple[Measured, Measured],
    scores: Sequence[_Scores],
) -> list[dict[str, Any]]:
    """Rows whose reply was right and is wrong, by the metrics that say so."""
    found = []
    decided = [name for name in recipe.measured if name == ACCURACY or (name != F1 and is_decided(name))]
    for metric in decided:
        pairs = zip(*(one.of_row.get(metric, []) for one in scores), strict=True)
        for number, (before, after) in enumerate(pairs):
            if before > after:
                texts = (prompts[number].reference, *(one.replies[number] for one in measured))
                reference, said, says = (text[:_LONGEST] for text in texts)
                found.append(
                    {
                        "line": prompts[number].line,
                        "slice": prompts[number].slice,
                        "metric": metric,
                        "reference": reference,
                        "before": said,
                        "after": says,
                    }
                )
    return found
