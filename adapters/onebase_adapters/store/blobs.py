"""Content of the store: blobs named by their SHA-256, the two files of a version, and the store's errors.

StoreError
├── StoreFullError       no space, or the quota is used up; nothing that was stored is lost
├── BlobMissingError     no such blob
└── BlobDamagedError     the content does not match its name
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of a full disk. `EFBIG` too: the limit on a file's size ends a write in the same way."""


@dataclass(frozen=True)
class Blob:
    """One stored file: the SHA-256 of its content (64 hexadecimal digits) and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class AdapterFiles:
    """The two files of one version, as they were sent."""

    config: Blob
    weights: Blob

    @property
    def digest(self) -> str:
        return version_digest(self.config.sha256, self.weights.sha256)

    def of(self, name: str) -> Blob:
        """Return the blob of one of ADAPTER_FILES."""
        return {CONFIG_FILE: self.config, WEIGHTS_FILE: self.weights}[name]


def version_digest(config_sha: str, weights_sha: str) -> str:
    """Return the SHA-256 (hex) that names a version's content, whatever its folder or its name.

    It covers both files' names and their own SHA-256 sums, in a fixed order. Raises ValueError for a sum that
    is not hexadecimal.
    """
    total = hashlib.sha256()
    for name, digest in zip(ADAPTER_FILES, (config_sha, weights_sha), strict=True):
        total.update(name.encode() + b"\0" + bytes.fromhex(digest))
    return total.hexdigest()


class StoreError(Exception):
    """The store failed; the message says what and where, without credentials."""


class StoreFullError(StoreError):
    """No space is left for blobs. What was stored before is whole; later writes work again once there is
    space."""


class BlobMissingError(StoreError):
    """The store has no blob of that name."""


class BlobDamagedError(StoreError):
    """A stored file whose content does not have the SHA-256 in its name."""


@contextmanager
def store_errors(doing: str) -> Iterator[None]:
    """Turn OSError into StoreError or StoreFullError. `doing`: for the message."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StoreFullError(f"No space is left while {doing}: free some, then try again.") from error
        raise StoreError(f"The store failed while {doing}: {error}") from error
