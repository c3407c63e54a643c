"""Exit statuses, and how a failure is told to the person at the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Final

from ..errors import (
    APIConnectionError,
    APITimeoutError,
    AuthenticationError,
    ConflictError,
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


_HINTS: Final[Mapping[str, str]] = {
    "adapter_not_found": "`onebase adapters list` lists the adapters that the server has.",
    "version_not_found": "`onebase adapters show NAME` lists the versions.",
    "job_not_found": "`onebase jobs list` lists the jobs that the server has.",
    "file_not_found": "Give the path of a file instead, and it is sent.",
    "model_not_found": "`onebase models` lists what the server has.",
    "base_mismatch": "If you are sure that it fits this base: --any-base",
    "version_not_ready": "See how far it is, or why it failed: onebase adapters show NAME",
    "adapter_in_use": "To delete it all the same: --force",
    "no_effect": "If that is meant: --allow-noop",
}
"""What to do next, by the code of an error."""


def _hint(error: OneBaseError) -> str | None:
    code = str(getattr(error, "code", ""))
    if isinstance(error, ConflictError) and code == "stale_activation":
        active = error.current[:12] if error.current else "none"
        return f"The active version is {active}. If that is what you expect: --expected {active}"
    if code in _HINTS:
        return _HINTS[code]
    return next((hint for kind, hint in _HINTS_BY_KIND if isinstance(error, kind)), None)


_HINTS_BY_KIND: Final[tuple[tuple[type[OneBaseError], str], ...]] = (
    (APITimeoutError, "Give it more time with --timeout SECONDS."),
    (AuthenticationError, "Put your API key into the environment: export ONEBASE_API_KEY=..."),
    (NotFoundError, "Is this a OneBase server? Check --url or ONEBASE_URL."),
)


def report(error: OneBaseError, url: str) -> int:
    """Print a failure to stderr; gives the exit status."""
    text, status = explain(error, url)
    print(f"onebase: {text}", file=sys.stderr)
    return status
