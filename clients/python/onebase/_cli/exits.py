"""Exit statuses, and how a failure is told to the person at the terminal."""

from __future__ import annotations

import sys
from typing import Final

from ..errors import (
    APIConnectionError,
    APITimeoutError,
    AuthenticationError,
    NotFoundError,
    OneBaseError,
)

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
NO_SERVER: Final = 3
INTERRUPTED: Final = 130


def explain(error: OneBaseError, url: str) -> tuple[str, int]:
    """What to print, next step included, and the exit status."""
    if isinstance(error, APIConnectionError) and not error.sent:
        return (
            f"No server answers at {url}.\n"
            "Start one in another terminal: onebase serve\n"
            "Or name one that runs elsewhere with --url or ONEBASE_URL.",
            NO_SERVER,
        )
    hint = _hint(error)
    return f"{error}\n{hint}" if hint else str(error), FAILED


def _hint(error: OneBaseError) -> str | None:
    if isinstance(error, APITimeoutError):
        return "Give it more time with --timeout SECONDS."
    if isinstance(error, AuthenticationError):
        return "Put your API key into the environment: export ONEBASE_API_KEY=..."
    if isinstance(error, NotFoundError) and error.param in ("adapter", "model"):
        return "`onebase models` lists what the server has."
    if isinstance(error, NotFoundError):
        return "Is this a OneBase server? Check --url or ONEBASE_URL."
    return None


def report(error: OneBaseError, url: str) -> int:
    """Print a failure to stderr; gives the exit status."""
    text, status = explain(error, url)
    print(f"onebase: {text}", file=sys.stderr)
    return status
