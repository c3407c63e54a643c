"""Names of adapters and of their versions."""

from __future__ import annotations

import re
from typing import Final

MAX_NAME: Final = 64
SHORT_DIGEST: Final = 12
"""Digits of a version's digest in its name."""
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}")
NAME_RULE: Final = f"up to {MAX_NAME} letters, digits, '.', '_' and '-', beginning with a letter or a digit"


def is_adapter_name(name: str) -> bool:
    """Return True if an adapter may have this name."""
    return _NAME.fullmatch(name) is not None


def label(name: str, digest: str) -> str:
    """Return the name of a version in answers: `name@` and the first digits of its digest."""
    return f"{name}@{digest[:SHORT_DIGEST]}"
