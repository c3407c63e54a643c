"""What is written after an option or in its environment variable, as a value."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


class SettingsError(ValueError):
    """A setting that cannot be used; the message names it and says what would be right."""


def parse_size(text: str) -> int:
    """Bytes from text such as `2GB`, `512MiB` or `1000000`.

    Decimal suffixes (kB, MB, GB, TB) are powers of 1000 and binary ones (KiB, MiB, ...) of 1024.
    Raises SettingsError for anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise SettingsError(f"{text!r} is not a size: write bytes or a suffix, as in 2GB or 512MiB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[prefix.lower()])


def parse_bool(text: str) -> bool:
    """True for 1, true, yes, on; False for 0, false, no, off and the empty text."""
    lowered = text.strip().lower()
    if lowered in {"1", "true", "yes", "on"}:
        return True
    if lowered in {"0", "false", "no", "off", ""}:
        return False
    raise SettingsError(f"{text!r} is neither true nor false: write 1 or 0")


def parse_adapter(text: str) -> tuple[str, str]:
    """`(name, folder)` from `name=folder`."""
    name, separator, folder = text.partition("=")
    if not separator or not name or not folder:
        raise SettingsError(f"{text!r} is not NAME=FOLDER, as in --adapter support=./adapters/support")
    return name, folder


def parse_adapters(text: str) -> tuple[tuple[str, str], ...]:
    """Several `name=folder`, separated by commas (the environment's form)."""
    return tuple(parse_adapter(part.strip()) for part in text.split(",") if part.strip())


def parse_patterns(text: str) -> tuple[str, ...]:
    """Patterns of `org/repo`, separated by commas."""
    patterns = tuple(part.strip() for part in text.split(",") if part.strip())
    for pattern in patterns:
        if pattern.count("/") != 1 or pattern.startswith("/") or pattern.endswith("/"):
            raise SettingsError(f"{pattern!r} is not ORG/REPO, as in --hub-allow 'acme/*'")
    return patterns
