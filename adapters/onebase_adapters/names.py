"""Rule for the names of adapters."""

from __future__ import annotations

import re
from typing import Final

MAX_NAME: Final = 64
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}")
NAME_RULE: Final = f"up to {MAX_NAME} letters, digits, '.', '_' and '-', beginning with a letter or a digit"


def is_adapter_name(name: str) -> bool:
    """Return True if an adapter may have this name."""
    return _NAME.fullmatch(name) is not None
