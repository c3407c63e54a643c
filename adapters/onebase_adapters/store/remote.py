"""Blobs in an object store or on another machine, through fsspec."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec

from onebase_adapters.store.blobs import FULL, Blob, BlobMissingError, StoreError, StoreFullError
from onebase_adapters.store.local import is_sha256
from onebase_engine.redaction import redacted, without_secrets

# Where an object is there whole or not at all. Elsewhere (sftp, smb...) it is put under another name first.
_ATOMIC_PUT = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "memory"})
# Bytes of a part, and parts in memory at once: by default s3fs takes ten of 50 MB.
_S3_LIMITS = {"chunksize": 16 << 20, "max_concurrency": 4}
_FULL_CODES = ("QuotaExceeded", "InsufficientStorage", "StorageFull", "EntityTooLarge")


class RemoteBlobs:
    """Blobs at `<url>/blobs/<sha256>`. Every error is a StoreError, without the URL's credentials."""

    def __init__(self, url: str) -> None:
        self.url = url
        with self._errors("opening the store"):
            self._fs: Any
            self._fs, root = fsspec.core.url_to_fs(url)
        root = root.rstrip("/")
        if not root:
            raise StoreError(f"{redacted(url)} names no bucket or folder to keep blobs in.")
        self._blobs = f"{root}/blobs"
        self._parts = f"{root}/tmp"
        self._registries = f"{root}/registries"
        scheme = url.partition("://")[0]
        self._atomic = scheme in _ATOMIC_PUT
        self._limits = _S3_LIMITS if scheme in ("s3", "s3a") else {}

    def _path(self, sha256: str) -> str:
        return f"{self._blobs}/{sha256}"

    def put(self, source: Path, blob: Blob) -> None:
        """Upload a finished file, even if it exists: its age starts anew, and it is whole."""
        with self._errors(f"sending {blob.sha256}"):
            if self._atomic:
                self._fs.put_file(str(source), self._path(blob.sha256), **self._limits)
            else:
                self._fs.makedirs(self._blobs, exist_ok=True)
                self._fs.makedirs(self._parts, exist_ok=True)
                part = f"{self._parts}/{uuid.uuid4().hex}.part"
                self._fs.put_file(str(source), part)
                self._fs.mv(part, self._path(blob.sha256))
            stored = self._info(blob.sha256)
        if stored is None or stored["size"] != blob.size:
            raise StoreError(f"{redacted(self.url)} took {blob.sha256} but does not have all of it.")

    def get(self, sha256: str, target: Path) -> None:
        """Download into a local file. Raises BlobMissingError."""
        with self._errors(f"fetching {sha256}"):
            try:
                self._fs.get_file(self._path(sha256), str(target))
            except FileNotFoundError:
                raise BlobMissingError(f"{redacted(self.url)} has no blob {sha256}.") from None

    def size(self, sha256: str) -> int | None:
        """Return the size in bytes; None without such a blob."""
        with self._errors(f"looking for {sha256}"):
            info = self._info(sha256)
        return None if info is None else int(info["size"])

    def _info(self, sha256: str) -> dict[str, Any] | None:
        self._fs.invalidate_cache(self._blobs)
        try:
            info: dict[str, Any] = self._fs.info(self._path(sha256))
        except FileNotFoundError:
            return None
        return info

    def remove(self, sha256: str, older_than: float) -> bool:
        """Delete a blob that was not uploaded within `older_than` seconds. Returns True if it was deleted."""
        with self._errors(f"deleting {sha256}"):
            info = self._info(sha256)
            if info is None or _age(info) < older_than:
                return False
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._path(sha256))
            return True

    def sweep(self, keep: frozenset[str], older_than: float) -> int:
        with self._errors("sweeping the store"):
            orphans = [
                info["name"]
                for info in self._listing(self._blobs)
                if is_sha256(_name(info)) and _name(info) not in keep and _age(info) >= older_than
            ]
            orphans += [info["name"] for info in self._listing(self._parts) if _age(info) >= older_than]
            for name in orphans:
                with suppress(FileNotFoundError):
                    self._fs.rm_file(name)
        return len(orphans)

    def claim(self, registry: str) -> bool:
        """Record that a registry uses the place. Returns True if no other does."""
        with self._errors("noting the registry"):
            if registry not in map(_name, self._listing(self._registries)):
                if not self._atomic:
                    self._fs.makedirs(self._registries, exist_ok=True)
                self._fs.pipe_file(f"{self._registries}/{registry}", registry.encode())
            return len(self._listing(self._registries)) == 1

    def _listing(self, folder: str) -> list[dict[str, Any]]:
        self._fs.invalidate_cache(folder)
        try:
            entries: list[dict[str, Any]] = self._fs.ls(folder, detail=True)
        except FileNotFoundError:
            return []
        return [info for info in entries if info["type"] == "file"]

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        # A library's exception may quote the URL, keys and all: none of it is chained or repeated unseen.
        try:
            yield
        except StoreError:
            raise
        except Exception as error:
            said = without_secrets(f"{type(error).__name__}: {error}", self.url)
            full = getattr(error, "errno", None) in FULL or any(code in said for code in _FULL_CODES)
            kind = StoreFullError if full else StoreError
            raise kind(f"{redacted(self.url)} failed while {doing}: {said}") from None


def _name(info: dict[str, Any]) -> str:
    return str(info["name"]).rpartition("/")[2]


def _age(info: dict[str, Any]) -> float:
    """Return the seconds since the object was written; 0 if that is unknown, so that nothing is lost."""
    for key in ("LastModified", "last_modified", "mtime", "modified", "updated", "created"):
        written = info.get(key)
        if isinstance(written, datetime):
            return time.time() - written.timestamp()
        if isinstance(written, int | float):
            return time.time() - written
    return 0.0
