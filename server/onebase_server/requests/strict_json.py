"""JSON as the standard says it, and no more of it than a request can need.

Everything is decided before a model looks at the values: a validator's work for a wrong value is many times
the parser's.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from onebase_edge.errors import InvalidRequestError

MAX_FIELDS = 50_000
"""Largest number of objects and their fields in one body: a long conversation has about four a message."""
BYTES_PER_VALUE = 4
"""Number of bytes of `--max-body` for each value that a body may hold: a usual token id takes more."""


def decode(body: bytes, max_body: int) -> Any:
    """Return the body's value. Raises json.JSONDecodeError, and InvalidRequestError for JSON that is
    refused."""
    most = max(1000, max_body // BYTES_PER_VALUE)
    if sum(map(body.count, b",[{")) > most:
        raise InvalidRequestError(
            f"The body holds over {most} values. Send fewer, or raise --max-body.", code="too_many_values"
        )
    _check_fields(body)
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise json.JSONDecodeError(str(error), "", 0) from error


def _check_fields(body: bytes) -> None:
    """Raise InvalidRequestError for a field that is given twice, and for too many of them; or
    JSONDecodeError.

    Only Python's reader shows the former. It keeps nothing here, and what is no JSON the other one refuses.
    """
    left = MAX_FIELDS

    def check_pairs(pairs: list[tuple[str, Any]]) -> None:
        nonlocal left
        left -= 1 + len(pairs)
        if left < 0:
            raise InvalidRequestError(
                f"The body holds over {MAX_FIELDS} fields, which no request needs. Send fewer.",
                code="too_many_values",
            )
        if len(pairs) == len(dict(pairs)):
            return
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise InvalidRequestError(f"{name[:80]}: it is given twice. Give it once.", param=name[:80])
            seen.add(name)

    try:
        # `len` stands in for the numbers, of which nothing is needed here: to read 2 MB of them takes 0.2 s.
        json.loads(body, object_pairs_hook=check_pairs, parse_float=len, parse_int=len)
    except ValueError:
        return
    except RecursionError as error:  # the other reader may go a little deeper
        raise json.JSONDecodeError("it is nested too deeply", "", 0) from error
