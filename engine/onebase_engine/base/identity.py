"""Identity of a base: adapters proved on one must not serve on another that only has the same name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

SAMPLE_BYTES = 64 << 10
SAMPLE_EVERY = 16 << 20
"""Bytes read from each safetensors file, and the distance between reads: 64 MB of 16 GB."""

_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000
"""Largest header, in bytes, that safetensors itself allows."""


class BaseIdentityError(Exception):
    """The folder holds no base whose identity can be computed; the message says why."""


def base_id(folder: Path, settings: Mapping[str, object]) -> str:
    """Return the SHA-256 (64 hexadecimal digits) of a base, equal on all machines and in all folders.

    Over config.json, the quantization settings, and of each safetensors file its name, size, header and a
    sample of its bytes. Another base of the same shapes differs in each sample; an edit of a few tensors may
    lie between samples.

    Args:
        settings: how the base is quantized (kind, blocksize, dtypes); values that JSON can hold.

    Raises BaseIdentityError.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise BaseIdentityError(
                f"{folder} has no safetensors file: OneBase reads weights from no other kind."
            )
        total = hashlib.sha256()
        # The same fields in another order, or laid out otherwise, are the same base.
        for part in (config, dict(settings)):
            _add(total, json.dumps(part, sort_keys=True).encode())
        for path in files:
            with path.open("rb") as file:
                _add(total, path.name.encode(), _sampled(file, path.stat().st_size))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseIdentityError(f"{folder} cannot be read as a base: {error}") from error
    return total.hexdigest()


def _add(total: hashlib._Hash, *parts: bytes) -> None:
    """Add each part with its length, so that no two lists of parts look the same."""
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)


def _sampled(file: BinaryIO, size: int) -> bytes:
    """Return the SHA-256 of a safetensors file's size, its whole header and a sample of its tensors."""
    header = _LENGTH_BYTES + int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if header > min(size, _LARGEST_HEADER):
        raise ValueError(f"{file.name} is no safetensors file")
    part = hashlib.sha256(size.to_bytes(8, "little"))
    file.seek(0)
    part.update(file.read(header))
    for offset in [*range(header, size, SAMPLE_EVERY), max(header, size - SAMPLE_BYTES)]:
        file.seek(offset)
        part.update(file.read(SAMPLE_BYTES))
    return part.digest()
