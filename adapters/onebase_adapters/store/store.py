"""The files of all versions and of training, each blob stored once under the SHA-256 of its content.

The store is a folder, or any place that fsspec can reach (`s3://bucket/prefix`); a remote one has a local
cache. Several processes and several servers may use one store at once.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

from onebase_adapters.store.blobs import (
    Blob,
    BlobDamagedError,
    BlobMissingError,
    StoreError,
    StoreFullError,
    store_errors,
)
from onebase_adapters.store.local import FileSystem, LocalBlobs, PartFile, check_content, is_sha256
from onebase_adapters.store.remote import RemoteBlobs
from onebase_engine.redaction import redacted

__all__ = [
    "Blob",
    "BlobDamagedError",
    "BlobMissingError",
    "BlobWriter",
    "Store",
    "StoreError",
    "StoreFullError",
]

GRACE = 600.0
"""Time, in seconds, in which an unreferenced blob may have just been stored and be about to be registered."""

_CACHE_HOLD = 300.0
_CHUNK = 1 << 20


class BlobWriter:
    """Writes one blob. Unless `commit` is reached, nothing remains of it.

        with store.writer() as writer:
            writer.write(chunk)
            blob = writer.commit()

    A file that waits for others (the config while the weights are still uploaded) is best committed with
    them: its age begins at the commit.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._part = store.new_part()

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._part.size

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of what was written so far."""
        return self._part.sha256

    @property
    def path(self) -> Path:
        """File with what was written so far, until `commit` or `abort`."""
        return self._part.path

    def write(self, data: bytes | memoryview) -> None:
        """Write data. Raises StoreFullError, StoreError; after either the writer is unusable."""
        self._part.write(data)

    def commit(self) -> Blob:
        """Return the blob, which now outlives `kill -9` and a power cut. Raises StoreFullError,
        StoreError."""
        return self._store.publish(self._part)

    def abort(self) -> None:
        """Discard what was written; after `commit` it does nothing."""
        self._part.discard()

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


class Store:
    """Content-addressed files. All methods block and may be called from any thread.

    Args:
        url: a local path, `file://` or any fsspec URL.
        cache: a local folder in which a remote store's blobs are cached; unused for a local store.
        cache_bytes: limit of the cache. Blobs used in the last five minutes stay beyond that.
        registry: the identity of the registry whose blobs are stored. A store that was ever used with other
            registries deletes no blob: what this one does not need may be theirs.
        grace: seconds in which an unreferenced blob is not deleted (`delete`).
        files: the file system's calls; replaced in tests of faults.
    Raises StoreError when the place cannot be used. No error holds the URL's credentials.
    """

    def __init__(
        self,
        url: str,
        cache: Path,
        cache_bytes: int = 20 << 30,
        *,
        registry: str = "",
        grace: float = GRACE,
        files: FileSystem | None = None,
    ) -> None:
        self.place = redacted(url)
        self._grace = grace
        self._cache_bytes = cache_bytes
        self._evicting = threading.Lock()
        folder = local_folder(url)
        self._remote = RemoteBlobs(url) if folder is None else None
        self._local = LocalBlobs(cache if folder is None else folder, files or FileSystem())
        self._registry = registry
        self._is_noted = not registry

    def is_shared(self) -> bool:
        """Return True if several registries were used with the store, and record this one there.

        Raises StoreError.
        """
        shared = bool(self._registry) and not (self._remote or self._local).claim(self._registry)
        self._is_noted = True
        return shared

    def writer(self) -> BlobWriter:
        """Return a writer for one new blob. Raises StoreFullError, StoreError."""
        return BlobWriter(self)

    def add_file(self, path: Path, *, move: bool = False) -> Blob:
        """Store a local file. Raises StoreFullError, StoreError.

        Args:
            move: the store owns the file from now on, whatever happens; it must lie in `scratch()`, and no
                bytes are copied.
        """
        if move:
            return self.publish(self._local.existing_part(path))
        with self.writer() as writer:
            with store_errors(f"reading {path}"):
                source = path.open("rb")
            with source:
                while chunk := source.read(_CHUNK):
                    writer.write(chunk)
            return writer.commit()

    def add_bytes(self, content: bytes) -> Blob:
        """Store a small content. Raises StoreFullError, StoreError."""
        with self.writer() as writer:
            writer.write(content)
            return writer.commit()

    def new_part(self) -> PartFile:
        """Return a temporary file on the store's disk (a remote store's: the cache's)."""
        return self._local.new_part()

    def publish(self, part: PartFile) -> Blob:
        """Make a blob of a written file: fsync, the remote store first, then the name on this disk."""
        blob = part.finish()
        try:
            if not self._is_noted:
                self.is_shared()  # before another registry could find the blob and take it for an orphan
            if self._remote is not None:
                self._remote.put(part.path, blob)
        except StoreError:
            part.discard()
            raise
        self._local.publish(part, blob)
        self._evict(blob.sha256)
        return blob

    def local(self, sha256: str) -> Path:
        """Return a local file with the blob's content, to be read at once or copied, never written to.

        A remote blob is fetched into the cache and its hash checked. Raises BlobMissingError,
        BlobDamagedError, StoreFullError, StoreError.
        """
        path = self._local.path(_checked(sha256))
        if self._remote is None:
            self.size(sha256)
            return path
        with store_errors(f"looking for {sha256}"), suppress(FileNotFoundError):
            os.utime(path)
            return path
        return self._fetch(sha256, self._remote)

    def hold(self, sha256: str, target: Path, *, own: bool = False) -> Path:
        """Return a local file like `local`, but one that outlives eviction from the cache, for slow or late
        readers.

        In a local store, which evicts nothing, it is the blob itself. In a remote one, `target` becomes a
        link to the cached blob, or a copy of it on another disk.

        Args:
            own: return `target` in a local store too, so that the file outlives the blob's deletion. A
                `target` that is whole already is reused.
        """
        if own and _is_whole(target, sha256):
            return target
        path = self.local(sha256)
        if self._remote is None and not own:
            return path
        with store_errors(f"holding {sha256} in {target}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                os.link(path, target)
            except OSError:
                shutil.copyfile(path, target)
        return target

    def _fetch(self, sha256: str, remote: RemoteBlobs) -> Path:
        part = self._local.new_part()
        try:
            remote.get(sha256, part.path)
            check_content(part.path, sha256)
            part.finish()
            self._local.publish(part, Blob(sha256, part.path.stat().st_size))
        finally:
            part.discard()
        self._evict(sha256)
        return self._local.path(sha256)

    def exists(self, sha256: str) -> bool:
        """Return True if the store itself (not only the cache) has the blob. Raises StoreError."""
        return self._size(sha256) is not None

    def size(self, sha256: str) -> int:
        """Return the size in bytes. Raises BlobMissingError, StoreError."""
        size = self._size(sha256)
        if size is None:
            raise BlobMissingError(f"{self.place} has no blob {sha256}.")
        return size

    def _size(self, sha256: str) -> int | None:
        _checked(sha256)
        if self._remote is not None:
            return self._remote.size(sha256)
        return self._local.size(sha256)

    def check_blob(self, sha256: str) -> None:
        """Read the whole blob and compare its hash. Raises BlobMissingError, BlobDamagedError, StoreError."""
        check_content(self.local(sha256), sha256)

    def delete(self, sha256: str, *, older_than: float | None = None) -> bool:
        """Delete a blob that nothing references any more. Returns True if it was deleted.

        A blob that was stored within `older_than` seconds (the store's grace unless given) stays for the next
        `sweep`: another server may have stored the same content and be about to register it.
        Raises StoreError.
        """
        age = self._grace if older_than is None else older_than
        _checked(sha256)
        if self.is_shared():
            return False
        if self._remote is None:
            return self._local.remove(sha256, age)
        removed = self._remote.remove(sha256, age)
        if removed:
            self._local.remove(sha256, 0.0)
        return removed

    def sweep(self, keep: Iterable[str], older_than: float) -> int:
        """Delete blobs that are not in `keep` and temporary files that no process writes any more.

        Files younger than `older_than` seconds are kept. Returns the number of deleted files. Raises
        StoreError.

        Ask the registry for `keep` just before: a blob registered later is younger than `older_than`.
        """
        if self.is_shared():
            return self._local.sweep_scratch(older_than)
        kept = frozenset(keep)
        if self._remote is None:
            return self._local.sweep(kept, older_than)
        return self._remote.sweep(kept, older_than) + self._local.sweep_scratch(older_than)

    def scratch(self) -> Path:
        """Return the folder on the store's disk (a remote store's: the cache's) for temporary files.

        `add_file(move=True)` takes files from it, and `sweep` clears what is left in it.
        """
        return self._local.scratch

    def _evict(self, newest: str) -> None:
        """Bring a remote store's cache back under its limit, least recently used first."""
        if self._remote is None:
            return
        with self._evicting, suppress(FileNotFoundError):
            held = [
                (path.stat().st_mtime, path.stat().st_size, path.name)
                for path in map(self._local.path, self._local.names())
            ]
            total = sum(size for _, size, _ in held)
            for used, size, name in sorted(held):
                if total <= self._cache_bytes or time.time() - used < _CACHE_HOLD:
                    break
                if name != newest and self._local.remove(name, _CACHE_HOLD):
                    total -= size


def local_folder(url: str) -> Path | None:
    """Return the folder of a local path or a `file://` URL; None for any other place. Raises StoreError."""
    scheme, separator, _ = url.partition("://")
    if not separator:
        return Path(url).expanduser().absolute()
    if scheme not in ("file", "local"):
        return None
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise StoreError(
            f"{redacted(url)}: a file URL needs three slashes and a whole path: file:///data/store."
        )
    return Path(unquote(parts.path))


def _is_whole(path: Path, sha256: str) -> bool:
    try:
        check_content(path, sha256)
    except StoreError:
        return False
    return True


def _checked(sha256: str) -> str:
    if not is_sha256(sha256):
        raise BlobMissingError(f"{sha256[:80]!r} names no blob: that takes 64 hexadecimal digits.")
    return sha256
