"""Messages and tools that are written as JSON text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onebase_adapters.training.data_json import parse_strict
from onebase_adapters.training.data_problems import RowError
from onebase_adapters.training.messages import ROLES

_NEVER_TEXT = ("messages", "tools", "preferred_output", "non_preferred_output")
_TEXT_OR_MESSAGES = (("prompt", "completion"), ("chosen", "rejected"))


def unfold_lists(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with lists in the place of JSON texts, in the fields that are never prose. Raises RowError."""
    made = dict(row)
    for key in _NEVER_TEXT:
        if isinstance(text := made.get(key), str):
            made[key] = _parsed(key, text) if text.strip() else None
    return made


def unfold_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """A table's row with lists in the place of the JSON texts that mean messages.

    A text to learn may be JSON as well: prompt and completion are messages only if both of them are, as are
    chosen and rejected, and then the prompt beside these.
    """
    made = dict(row)
    for pair in _TEXT_OR_MESSAGES:
        both = {key: _messages(made.get(key)) for key in pair}
        if all(both.values()):
            made |= both
    if isinstance(made.get("chosen"), list) and (prompt := _messages(made.get("prompt"))):
        made["prompt"] = prompt
    if (given := _json(made.get("input"))) and isinstance(given, dict) and "messages" in given:
        made["input"] = given
    return made


def _parsed(key: str, text: str) -> Any:
    try:
        return parse_strict(text)
    except RowError as error:
        raise RowError(key, error.reason) from None


def _messages(value: Any) -> list[Any] | None:
    """The messages that a cell holds; None if it holds anything else."""
    found = _json(value)
    if not isinstance(found, list):
        return None
    return found if all(map(_is_message, found)) else None


def _is_message(value: Any) -> bool:
    known = isinstance(value, dict) and value.get("role") in ROLES
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
