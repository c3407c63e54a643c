"""Parse JSON strictly, and format its values for messages."""

from __future__ import annotations

import json
import reprlib
from typing import Any

_LONG = 2 << 20
"""Size up to which any text is parsed."""
_LEAST_BYTES = 15
"""Least number of bytes for each comma and bracket. A tensor of an adapter has eight of them in 140 bytes."""


def parse_json(raw: bytes) -> Any:
    """Parse plain JSON in UTF-8, without duplicate keys or NaN.

    Raises:
        ValueError, RecursionError: it is invalid, or nested too deep.
    """
    return json.loads(raw.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)


def is_dense(raw: bytes) -> bool:
    """Return True for long JSON with more values than the header of any real file of as many bytes.

    Parsed, such text takes up to fifty times its size.
    """
    return len(raw) > _LONG and _LEAST_BYTES * sum(raw.count(mark) for mark in (b",", b"[", b"{")) > len(raw)


def shown(value: Any) -> str:
    """Format a value of the file for a message, cut in length and in depth; `repr` may recurse too far."""
    return reprlib.repr(value)[:80]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _no_constants(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
