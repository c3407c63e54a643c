"""Cache of small results that take long to compute, in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from onebase_engine.base.default_base import default_cache


def recall(kind: str, key: object) -> Any:
    """Return the value stored under this key, or None if there is none or it cannot be read.

    Args:
        kind: the folder within the cache.
        key: all that the answer depends on, as JSON can hold it.
    """
    try:
        return json.loads(_file(kind, key).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def keep(kind: str, key: object, value: object) -> None:
    """Store a value that JSON can hold. If the cache cannot be written, the next start computes it again."""
    with contextlib.suppress(OSError), written(_file(kind, key)) as part:
        part.write(json.dumps(value).encode())


@contextlib.contextmanager
def written(file: Path) -> Iterator[BinaryIO]:
    """Yield a new file that replaces `file` once it is complete; create its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, work = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".part")
    try:
        with open(handle, "w+b") as part:
            yield part
        os.replace(work, file)
    except BaseException:
        os.unlink(work)
        raise


def _file(kind: str, key: object) -> Path:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return default_cache() / kind / f"{name}.json"
