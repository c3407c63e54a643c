"""The settings of a client. The SDK reads the environment only here."""

from __future__ import annotations

import enum
import os
import re
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import metadata
from typing import Final, Literal, TypeAlias

DEFAULT_URL = "http://127.0.0.1:8000"


_KEY: Final = re.compile(r"[!-~]+")


class _Unset(enum.Enum):
    UNSET = "unset"


Unset: TypeAlias = Literal[_Unset.UNSET]
UNSET: Final = _Unset.UNSET
"""Tells "not given" from None, which means "no limit", "no key" or "no version"."""


@dataclass(frozen=True)
class Timeout:
    """Limits of waiting, in seconds. None is no limit.

    `read` limits the server's silence, not the length of an answer. An answer that is not streamed is
    silent until it is complete, so `read` must cover the whole generation.
    """

    connect: float | None = 5.0
    read: float | None = 600.0
    write: float | None = 60.0

    def __post_init__(self) -> None:
        for name in ("connect", "read", "write"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(
                    f"timeout: {name} must be more than 0 seconds, not {value!r}; None is no limit"
                )

    @classmethod
    def of(cls, value: float | Timeout | None) -> Timeout:
        """Return the limits for a value: a number limits every wait (connecting to 5 seconds at most), None
        only connecting."""
        if isinstance(value, Timeout):
            return value
        if value is None:
            return cls(read=None, write=None)
        return cls(connect=min(5.0, value), read=value, write=value)


@dataclass(frozen=True)
class ClientOptions:
    """Settings that `with_options` can change: all but the connection pool and its URL."""

    api_key: str | None = field(repr=False)
    timeout: Timeout
    max_retries: int

    def __post_init__(self) -> None:
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):
            # Without the key itself: errors end in logs.
            raise ValueError("api_key has a character that no key has, such as a space or a line break")
        if (
            isinstance(self.max_retries, bool)
            or not isinstance(self.max_retries, int)
            or self.max_retries < 0
        ):
            raise ValueError(f"max_retries must be a whole number of 0 or more, not {self.max_retries!r}")

    def changed(
        self,
        api_key: str | Unset | None,
        timeout: float | Timeout | Unset | None,
        max_retries: int | Unset,
    ) -> ClientOptions:
        """Return a copy with the given options replaced."""
        return replace(
            self,
            api_key=self.api_key if api_key is UNSET else api_key,
            timeout=self.timeout if timeout is UNSET else Timeout.of(timeout),
            max_retries=self.max_retries if max_retries is UNSET else max_retries,
        )


def url_or_default(url: str | None) -> str:
    """`url`, else $ONEBASE_URL, else the server's default address.

    Raises:
        ValueError: it is not an http or https URL.
    """
    chosen = url or os.environ.get("ONEBASE_URL") or DEFAULT_URL
    scheme, found, rest = chosen.partition("://")
    if not found or scheme.lower() not in ("http", "https") or not rest.strip("/"):
        raise ValueError(f"url must look like {DEFAULT_URL}, not {chosen!r}")
    return chosen.rstrip("/")


def api_key_or_default(api_key: str | None) -> str | None:
    """`api_key`, else $ONEBASE_API_KEY, else none."""
    return api_key or os.environ.get("ONEBASE_API_KEY", "").strip() or None


def openai_key() -> str | None:
    """Return $OPENAI_API_KEY, with which `onebase migrate` asks OpenAI; None if there is none."""
    return os.environ.get("OPENAI_API_KEY", "").strip() or None


@cache
def sdk_version() -> str:
    """Return the version of the installed `onebase`, or `unknown` when it runs from a bare source folder."""
    try:
        return metadata.version("onebase")
    except metadata.PackageNotFoundError:
        return "unknown"
