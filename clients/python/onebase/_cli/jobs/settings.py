"""`--set NAME=VALUE`: settings of a recipe as a person writes them."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from ...training_types import TrainingSettings

_LISTS: Final = frozenset({"targets", "metrics", "sample_prompts"})
_ONE_EACH: Final = frozenset({"sample_prompts"})
"""Lists whose items may hold commas: each --set adds one."""
_PATTERNS: Final = frozenset({"rank_pattern", "alpha_pattern"})


def parse_settings(given: Sequence[str]) -> TrainingSettings:
    """The settings, of the types that the server wants.

    Raises:
        ValueError: one is not NAME=VALUE, or of a name that there is not.
    """
    settings: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise ValueError(f"--set: write NAME=VALUE, such as r=8, not {text!r}")
        _check(name)
        if name in _LISTS:
            settings[name] = [*settings.get(name, []), *_items(name, value)]
        elif name in _PATTERNS:
            settings[name] = settings.get(name, {}) | _pattern(name, value)
        else:
            settings[name] = _scalar(value)
    return cast(TrainingSettings, settings)


def parse_labels(given: Sequence[str]) -> Mapping[str, str] | None:
    """What `--metadata KEY=VALUE` says.

    Raises:
        ValueError: one is not KEY=VALUE.
    """
    labels = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"--metadata: write KEY=VALUE, such as team=support, not {text!r}")
        labels[key] = value
    return labels or None


def names() -> str:
    """Every setting, for the help text."""
    return textwrap.fill(
        ", ".join(TrainingSettings.__annotations__), 100, initial_indent="  ", subsequent_indent="  "
    )


def _check(name: str) -> None:
    known = list(TrainingSettings.__annotations__)
    if name in ("seed", "method"):
        raise ValueError(f"--set {name}: it has an option of its own, --{name}")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"--set {name}: there is no such setting; {hint}")


def _items(name: str, value: str) -> list[str]:
    if value.startswith("["):
        items = _json(name, value)
        return [str(item) for item in items]
    if name in _ONE_EACH:
        return [value]
    return [part.strip() for part in value.split(",") if part.strip()]


def _pattern(name: str, value: str) -> dict[str, Any]:
    if value.startswith("{"):
        return dict(_json(name, value))
    pairs = [part.partition("=") for part in value.split(",")]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError(f"--set {name}: write LAYER=NUMBER, such as {name}=down_proj=32, not {value!r}")
    return {layer.strip(): _scalar(number) for layer, _, number in pairs}


def _json(name: str, value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"--set {name}: {value!r} is not JSON: {error}") from error


def _scalar(value: str) -> Any:
    """A number, true or false as such; all else is text."""
    try:
        parsed = json.loads(value)
    except ValueError:
        return value
    return parsed if isinstance(parsed, bool | int | float) else value
