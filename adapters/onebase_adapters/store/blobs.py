"""What is named by its content: one blob, and the two files that make a version."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)


@dataclass(frozen=True)
class Blob:
    """One stored file: the SHA-256 of its content (64 hexadecimal digits) and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class VersionFiles:
    """The two files of one version, as they were sent."""

    config: Blob
    weights: Blob

    @property
    def digest(self) -> str:
        return version_digest(self.config.sha256, self.weights.sha256)


def version_digest(config_sha: str, weights_sha: str) -> str:
    """SHA-256 (hex) that names a version's content, whatever its folder or its name.

    Over both files' names and their own SHA-256 sums, in a fixed order. Raises ValueError for a sum that is
    not hexadecimal.
    """
    total = hashlib.sha256()
    for name, digest in zip(ADAPTER_FILES, (config_sha, weights_sha), strict=True):
        total.update(name.encode() + b"\0" + bytes.fromhex(digest))
    return total.hexdigest()
