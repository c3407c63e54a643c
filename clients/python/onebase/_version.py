"""The version of the installed distribution."""

from __future__ import annotations

from functools import cache
from importlib import metadata


@cache
def sdk_version() -> str:
    """The version of the installed `onebase`, or `unknown` when it runs from a bare source folder."""
    try:
        return metadata.version("onebase")
    except metadata.PackageNotFoundError:
        return "unknown"
