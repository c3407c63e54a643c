"""Compare a run's result in each slice of its held-out rows; a field of the rows names their slice.

The measure is the recipe's `best_by`, on the start of training (the base, or an adapter), on the version
that was active when training ended, if there is one, and on the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from onebase_training.data.dataset import Dataset
from onebase_training.metrics import is_decided, macro_f1, score
from onebase_training.recipe import REWARD, Recipe

MOST_SLICES = 100
"""Largest number of slices in a report: the worst regressions, then the largest slices. All of them count for
`max_regression`."""
OTHERS = "others"
"""Name of the slice that the rows of all further slices are added up as, in paired differences."""
MOST_CHANGED = 20
LONGEST = 500
"""Largest number of characters of a text in a report."""
LOSS, ACCURACY, F1 = "loss", "accuracy", "f1"
ACTIVE = "active"
"""Subject that the result would replace."""


class Question(Protocol):
    """A held-out row that subjects are measured on. reference: the right answer."""

    @property
    def reference(self) -> str: ...
    @property
    def slice(self) -> str: ...
    @property
    def line(self) -> int: ...


@dataclass(frozen=True)
class SubjectMetrics:
    """One subject. losses: by slice, nats a supervised token (classification: a row). replies: to the
    prompts, in their order. rewards: of the replies, where a grader gave them some."""

    losses: Mapping[str, float]
    replies: Sequence[str]
    rewards: Sequence[float] = ()


def by_slice(data: Dataset) -> dict[str, Dataset]:
    """Return the rows of each slice, by its name; rows without one are left out."""
    rows: dict[str, list[Any]] = {}
    for row in data.rows:
        if row.slice:
            rows.setdefault(row.slice, []).append(row)
    return {name: Dataset(found) for name, found in rows.items()}


def mean_by_slice(rows: Sequence[Question], values: Sequence[float]) -> dict[str, float]:
    """Return the mean of the rows' values in each slice; rows without values are left out."""
    parts: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=False):
        if row.slice:
            parts.setdefault(row.slice, []).append(value)
    return {name: sum(some) / len(some) for name, some in parts.items()}


def slice_report(
    recipe: Recipe,
    rows: Mapping[str, int],
    prompts: Sequence[Question],
    subjects: Mapping[str, SubjectMetrics],
    after: SubjectMetrics,
) -> dict[str, Any]:
    """Return the slices, those that got worse, and rows whose replies were right and are wrong, as JSON.

    Args:
        rows: held-out rows of each slice. prompts: those that replies were generated for.
        subjects: those that the result is compared with: "base" or "parent" first, then "active" if that was
            measured.
    """
    scores = {name: _Scores.of(recipe, prompts, one) for name, one in subjects.items()}
    new = _Scores.of(recipe, prompts, after)
    asked = Counter(prompt.slice for prompt in prompts)
    figures = {name: _Figures(one.losses, scores[name].of_slice) for name, one in subjects.items()}
    own = _Figures(after.losses, new.of_slice)
    found = [_slice(recipe, name, count, asked[name], figures, own) for name, count in rows.items()]
    found.sort(key=lambda one: (-one["worse_by"], -one["rows"], one["slice"]))
    changed: dict[tuple[str, int], dict[str, Any]] = {}
    for name in subjects:  # a row counts once, and against the version that would be replaced
        changed |= _changed(recipe, prompts, name, (subjects[name], after), (scores[name], new))
    lost = sorted(changed.values(), key=lambda one: one["against"] != ACTIVE)
    return {
        "by": recipe.best_by,
        "against": next(iter(subjects)),
        "slices": found[:MOST_SLICES],
        "slice_count": len(found),
        "regressed": [one["slice"] for one in found if one["regressed"]],
        "changed": lost[:MOST_CHANGED],
        "changed_count": len(lost),
    }


def paired_differences(
    recipe: Recipe,
    prompts: Sequence[Question],
    replies: Mapping[str, Sequence[str]],
    after: Sequence[str],
    rewards: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return how the result's scores differ from each subject's on the same rows, by subject and metric.

    Each slice has its number of rows, the sum of the differences (above 0 where the result is better) and
    that of their squares. Rows that name no slice are one of an empty name. Of more than MOST_SLICES slices
    the smallest are added up as one, OTHERS.

    Args:
        replies: to the prompts, of each subject. after: the result's. rewards: of each subject's replies, and
            of the result's as "adapter", where a grader gave them some.
    """
    given = rewards or {}
    new = _Scores.of(recipe, prompts, SubjectMetrics({}, after, given.get("adapter", ()))).of_row
    return {
        name: _differences(
            prompts, _Scores.of(recipe, prompts, SubjectMetrics({}, one, given.get(name, ()))).of_row, new
        )
        for name, one in replies.items()
        if one and after
    }


def _differences(
    prompts: Sequence[Question], before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]
) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for metric, old in before.items():
        parts: dict[str, list[float]] = {}
        for prompt, one, other in zip(prompts, old, after[metric], strict=True):
            parts.setdefault(prompt.slice, []).append(other - one)
        ordered = sorted(parts.items(), key=lambda part: -len(part[1]))
        if len(ordered) > MOST_SLICES:
            rest = [one for _, some in ordered[MOST_SLICES - 1 :] for one in some]
            kept = ordered[: MOST_SLICES - 1]
            same = next((some for name, some in kept if name == OTHERS), None)
            if same is None:
                kept.append((OTHERS, rest))
            else:
                same += rest
            ordered = kept
        found[metric] = [
            {"slice": name, "rows": len(some), "sum": sum(some), "squares": sum(one**2 for one in some)}
            for name, some in ordered
        ]
    return found


def _score(name: str, reply: str, reference: str) -> float:
    return float(reply == reference) if name == ACCURACY else score(name, reply, reference)


@dataclass(frozen=True)
class _Scores:
    """Scores of one subject. of_row: each metric's score of each prompt. of_slice: their means, by slice."""

    of_row: dict[str, list[float]]
    of_slice: dict[str, dict[str, float]]

    @classmethod
    def of(cls, recipe: Recipe, prompts: Sequence[Question], subject: SubjectMetrics) -> _Scores:
        replies = subject.replies
        references = [prompt.reference for prompt in prompts] if replies else []
        rows = {
            name: [_score(name, *pair) for pair in zip(replies, references, strict=True)]
            for name in (recipe.measured if replies else ())
            if name not in (F1, REWARD)
        }
        if subject.rewards:
            rows[REWARD] = list(subject.rewards)
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


@dataclass(frozen=True)
class _Figures:
    """One subject's losses and metrics by slice."""

    losses: Mapping[str, float]
    metrics: Mapping[str, Mapping[str, float]]

    def by(self, recipe: Recipe, name: str) -> float | None:
        """Return the value of one slice that the recipe decides by; None if it was not measured."""
        if recipe.best_by == LOSS:
            return self.losses.get(name)
        return self.metrics.get(name, {}).get(recipe.best_by)

    def worse_than(self, other: _Figures, recipe: Recipe, name: str) -> float:
        """Return how much worse it is than another subject on a slice; 0.0 if one was not measured."""
        own, value = self.by(recipe, name), other.by(recipe, name)
        if own is None or value is None:
            return 0.0
        return own - value if recipe.best_by == LOSS else value - own


def _slice(
    recipe: Recipe, name: str, rows: int, asked: int, subjects: Mapping[str, _Figures], own: _Figures
) -> dict[str, Any]:
    count = rows if recipe.best_by == LOSS else asked
    first, active = next(iter(subjects.values())), subjects.get(ACTIVE)
    worse = {subject: own.worse_than(one, recipe, name) for subject, one in subjects.items()}
    limit = recipe.max_regression
    enough = count >= recipe.slice_rows
    over = [subject for subject, by in worse.items() if limit != "auto" and enough and by > limit]
    return {
        "slice": name,
        "rows": rows,
        "measured": count if first.by(recipe, name) is not None else 0,
        "before": first.by(recipe, name),
        "active": None if active is None else active.by(recipe, name),
        "after": own.by(recipe, name),
        "worse_by": max(0.0, *worse.values()),
        "regressed": bool(over),
        "regressed_against": over,
        "loss_before": first.losses.get(name),
        "loss_active": None if active is None else active.losses.get(name),
        "loss_after": own.losses.get(name),
        "metrics_before": first.metrics.get(name, {}),
        "metrics_active": {} if active is None else active.metrics.get(name, {}),
        "metrics_after": own.metrics.get(name, {}),
    }


def _changed(
    recipe: Recipe,
    prompts: Sequence[Question],
    against: str,
    measured: tuple[SubjectMetrics, SubjectMetrics],
    scores: Sequence[_Scores],
) -> dict[tuple[str, int], dict[str, Any]]:
    """Return rows whose reply was right and is wrong, by the deciding metric and the prompt's number.

    against: the subject that was right.
    """
    found = {}
    decided = [
        name
        for name in recipe.measured
        if name == ACCURACY or (name not in (F1, REWARD) and is_decided(name))
    ]
    for metric in decided:
        rows = [one.of_row.get(metric, []) for one in scores]
        if not all(rows):  # a subject has no replies if memory ran out for metrics that nobody asked for
            continue
        for number, (before, after) in enumerate(zip(*rows, strict=True)):
            if before > after:
                texts = (prompts[number].reference, *(one.replies[number] for one in measured))
                reference, said, says = (text[:LONGEST] for text in texts)
                found[metric, number] = {
                    "line": prompts[number].line,
                    "slice": prompts[number].slice,
                    "metric": metric,
                    "against": against,
                    "reference": reference,
                    "before": said,
                    "after": says,
                }
    return found
