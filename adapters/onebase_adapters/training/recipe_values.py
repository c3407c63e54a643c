"""What each value of a recipe may be: types, limits, and the sentence that says so."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import Field
from datetime import date
from typing import Any, Literal, get_args, get_origin

HIGHEST_RANK = 1024
MOST_TEXTS = 32
"""Metrics, and prompts that are answered during a run."""

_REFUSED_INITS = {
    **dict.fromkeys(
        ("pissa", "olora", "corda", "loftq", "lora_ga"),
        "changes the base's weights, which all adapters share",
    ),
    **dict.fromkeys(("orthogonal", "mica"), "does not work on 4-bit weights"),
}


class RecipeError(ValueError):
    """A setting that cannot be used. `field` is its name in the recipe, "" where several are at odds."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def about(
    group: str, text: str, *, low: float | None = None, high: float | None = 1e9, above: float | None = None
) -> dict[str, Any]:
    """A field's help text and limits: `low` and `high` are allowed, `above` is not."""
    return {"group": group, "help": text, "low": low, "high": high, "above": above}


def check_value(item: Field[Any], value: Any, kind: Any) -> None:
    """Raise RecipeError unless `value` is of the type `kind` and within the limits of a recipe's field."""
    name, limits = item.name, item.metadata
    if name == "init" and isinstance(value, str) and value in _REFUSED_INITS:
        raise RecipeError(name, f"init {value!r} {_REFUSED_INITS[value]}; use true, gaussian, false or eva")
    if not _fits(value, kind):
        raise RecipeError(name, f"{name} is {shown(value)}: {_expected(kind)}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(name, f"{name} is {value}: write a finite number")
    if limits["above"] is not None and not value > limits["above"]:
        raise RecipeError(name, f"{name} is {shown(value)}: it must be above {limits['above']:g}")
    if limits["low"] is not None and value < limits["low"]:
        raise RecipeError(name, f"{name} is {shown(value)}: the lowest value is {limits['low']:g}")
    if limits["high"] is not None and value > limits["high"]:
        raise RecipeError(name, f"{name} is {shown(value)}: the highest value is {limits['high']:g}")


def check_texts(field: str, texts: Sequence[str], longest: int) -> None:
    """Raise RecipeError for too many texts, or one of more than `longest` characters."""
    if len(texts) > MOST_TEXTS:
        raise RecipeError(field, f"{field} has {len(texts)} texts: write {MOST_TEXTS} at most")
    for number, text in enumerate(texts):
        if len(text) > longest:
            raise RecipeError(field, f"{field}[{number}] has {len(text)} characters: write {longest} at most")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(part, str) and part for part in value)
    if get_origin(kind) is Mapping:
        number: Any = int if get_args(kind)[1] is int else int | float
        most = HIGHEST_RANK if number is int else 1e6
        return isinstance(value, Mapping) and all(
            isinstance(key, str)
            and isinstance(part, number)
            and not isinstance(part, bool)
            and 0 < part <= most
            for key, part in value.items()
        )
    if kind in (bool, str):
        return isinstance(value, kind)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return any(_fits(value, part) for part in get_args(kind))


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"choose one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return "write a list of texts"
    if get_origin(kind) is Mapping:
        most = f", {HIGHEST_RANK} at most" if get_args(kind)[1] is int else ""
        return f"write layer names with positive numbers{most}"
    plain = {
        bool: "write true or false",
        int: "write a whole number",
        float: "write a number",
        str: "write a text",
    }
    if kind in plain:
        return plain[kind]
    first = next(part for part in get_args(kind) if get_origin(part) is not Literal)
    return f"{plain[first]} or auto"


def shown(value: Any) -> str:
    """A value in an error, cut to a line."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def is_date(text: str) -> bool:
    """Whether it is a day as in 2026-01-31."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
