"""The user's cache folder, and in it a cache of small results that take long to compute."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO


def default_cache(environ: Mapping[str, str] | None = None) -> Path:
    """Return the cache folder of bases: $ONEBASE_CACHE, else onebase in the user's cache folder."""
    env = os.environ if environ is None else environ
    if chosen := env.get("ONEBASE_CACHE"):
        return Path(chosen).expanduser().absolute()
    user_cache = Path(env.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    # The XDG specification tells us to ignore a relative path.
    return (user_cache if user_cache.is_absolute() else Path("~/.cache").expanduser()) / "onebase"


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
