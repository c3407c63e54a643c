"""Messages and tools that are written as JSON text, as in cells of tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onebase_adapters.training.data_json import parse_strict
from onebase_adapters.training.data_problems import RowError

_NEVER_PROSE = ("messages", "tools", "preferred_output", "non_preferred_output")
_PROSE_OR_MESSAGES = (("prompt", "completion"), ("chosen", "rejected"))


def unfold(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with lists in the place of the JSON texts that mean them.

    A text to learn may be JSON as well: prompt and completion are messages only if both of them are, as are
    chosen and rejected, and then the prompt beside these. A text that is no JSON stays.
    """
    made = dict(row)
    for key in _NEVER_PROSE:
        if not isinstance(text := made.get(key), str):
            continue
        if not text.strip():
            made[key] = None
        elif (found := _json(text)) is not None:
            made[key] = found
    for pair in _PROSE_OR_MESSAGES:
        both = {key: _messages(made.get(key)) for key in pair}
        if all(both.values()):
            made |= both
    if isinstance(made.get("chosen"), list) and (prompt := _messages(made.get("prompt"))):
        made["prompt"] = prompt
    if "preferred_output" in made and isinstance(given := _json(made.get("input")), dict):
        made["input"] = unfold(given)
    return made


def _messages(value: Any) -> list[Any] | None:
    """The messages that a field holds; None if it holds anything else."""
    found = _json(value)
    if not isinstance(found, list):
        return None
    return found if all(map(_is_message, found)) else None


def _is_message(value: Any) -> bool:
    """Whether it is meant as one: its role is looked at when it is read."""
    known = isinstance(value, dict) and isinstance(value.get("role"), str)
    return known and ("content" in value or "tool_calls" in value)


def _json(value: Any) -> Any:
    """The value of a JSON text, or what is no text; None for any other text."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith(("[", "{")):
        return None
    try:
        return parse_strict(value)
    except RowError:
        return None
