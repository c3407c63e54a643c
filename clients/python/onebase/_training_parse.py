"""From the server's JSON about training to typed results: pure functions, shared by both clients."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import Any, TypeVar

from ._parse import Json
from .errors import InvalidResponseError
from .training_types import (
    CurvePoint,
    TrainingCheckpoint,
    TrainingEvent,
    TrainingFailure,
    TrainingFile,
    TrainingJobInfo,
    TrainingProgress,
    TrainingReport,
)

T = TypeVar("T")


def file(value: Json) -> TrainingFile:
    return _of(TrainingFile, value)


def job(value: Json) -> TrainingJobInfo:
    error, progress, report = value["error"], value["progress"], value["report"]
    method = value["method"]
    return _of(
        TrainingJobInfo,
        value,
        method=method["type"],
        settings=dict(method[method["type"]]["hyperparameters"]),
        metadata=dict(value["metadata"] or {}),
        progress=None if progress is None else _of(TrainingProgress, progress, optional=True),
        report=None if report is None else _of(TrainingReport, report),
        error=None if error is None else _of(TrainingFailure, error),
        result_files=tuple(value["result_files"]),
    )


def event(value: Json) -> TrainingEvent:
    return _of(TrainingEvent, value, data=dict(value["data"] or {}))


def checkpoint(value: Json) -> TrainingCheckpoint:
    return _of(TrainingCheckpoint, value, step=value["step_number"], metrics=dict(value["metrics"]))


def progressed(progress: TrainingProgress | None, told: TrainingEvent) -> TrainingProgress | None:
    """What an event with figures makes of the progress that was known."""
    names = {
        "step": "step",
        "total_steps": "steps",
        "train_loss": "loss",
        "valid_loss": "eval_loss",
        "tokens_per_second": "tokens_per_second",
        "seconds_left": "seconds_left",
    }
    new = {ours: told.data[theirs] for theirs, ours in names.items() if told.data.get(theirs) is not None}
    if told.type != "metrics" or not new:
        return progress
    return dataclasses.replace(progress or TrainingProgress(), **new)


def curve_of_file(content: bytes) -> tuple[CurvePoint, ...]:
    """The losses in a result file.

    Raises:
        InvalidResponseError: it is no such file.
    """
    try:
        rows = csv.DictReader(io.StringIO(content.decode()))
        return tuple(
            CurvePoint(int(row["step"]), _number(row["train_loss"]), _number(row["valid_loss"]))
            for row in rows
        )
    except (KeyError, ValueError, csv.Error) as error:
        raise InvalidResponseError(f"the result file is no curve: {error}") from error


def curve_of_events(events: Sequence[TrainingEvent]) -> tuple[CurvePoint, ...]:
    """The losses that events tell, whatever their order; of a step that was done again, the newest."""
    found: dict[int, CurvePoint] = {}
    for one in sorted(events, key=lambda event: event.id):
        if one.type != "metrics" or "step" not in one.data:
            continue
        step = int(one.data["step"])
        known = found.get(step, CurvePoint(step, None, None))
        train, valid = one.data.get("train_loss"), one.data.get("valid_loss")
        found[step] = CurvePoint(
            step,
            known.train_loss if train is None else float(train),
            known.valid_loss if valid is None else float(valid),
        )
    return tuple(found[step] for step in sorted(found))


def _of(kind: type[T], value: Json, *, optional: bool = False, **others: Any) -> T:
    """A dataclass from the fields of the same names; `others` are those that are not taken as they are.

    Args:
        optional: Whether a field may be missing, and then has its default.

    Raises:
        KeyError: a field is missing.
    """
    names = [item.name for item in dataclasses.fields(kind)]  # type: ignore[arg-type]  # T is a dataclass
    if optional:
        names = [name for name in names if value.get(name) is not None or name in others]
    return kind(**{name: others[name] if name in others else value[name] for name in names})


def _number(text: str | None) -> float | None:
    return float(text) if text else None
