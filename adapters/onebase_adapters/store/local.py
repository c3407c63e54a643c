"""Blobs in a folder: each written under a temporary name, fsynced, renamed, and its folder fsynced.

A process killed in between leaves the old state or the new one, and perhaps a temporary file for `sweep`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from onebase_adapters.store.atomic_files import sync
from onebase_adapters.store.blobs import Blob, BlobDamagedError, StoreError, store_errors

_PART = ".part"
_CHUNK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_sha256(name: str) -> bool:
    """Return True for 64 hexadecimal digits in lower case, the only names of blobs, so that none leads
    elsewhere."""
    return _SHA256.fullmatch(name) is not None


class FileSystem:
    """Steps of a write that can fail, one by one, so that a test can make each of them fail."""

    def create(self, path: Path) -> BinaryIO:
        """Create a file; the lock that `sweep` respects is held as long as it is open."""
        file = path.open("x+b", buffering=0)
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        return file

    def open_file(self, path: Path) -> BinaryIO:
        """Open a finished file of another writer, locked in the same way."""
        file = path.open("rb+", buffering=0)
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        return file

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]

    def sync(self, file: BinaryIO) -> None:
        os.utime(file.fileno())
        os.fsync(file.fileno())

    def rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def sync_folder(self, folder: Path) -> None:
        sync(folder)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)


class PartFile:
    """A file that is being written, under a temporary name that nothing reads."""

    def __init__(self, path: Path, file: BinaryIO, files: FileSystem) -> None:
        self.path = path
        self._files = files
        self._file: BinaryIO | None = file
        self._sum = hashlib.sha256()
        self._size = 0
        with store_errors(f"reading {path}"):
            while chunk := file.read(_CHUNK):
                self._sum.update(chunk)
                self._size += len(chunk)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._size

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the bytes so far."""
        return self._sum.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        if self._file is None:
            raise StoreError("This file was committed or given up: begin another.")
        try:
            with store_errors("writing a blob"):
                self._files.write(self._file, data)
        except StoreError:
            self.discard()
            raise
        self._sum.update(data)
        self._size += len(data)

    def finish(self) -> Blob:
        """Flush everything to the disk, still under the temporary name and still locked. Returns the blob."""
        if self._file is None:
            raise StoreError("This file was committed or given up: begin another.")
        try:
            with store_errors("writing a blob"):
                self._files.sync(self._file)
        except StoreError:
            self.discard()
            raise
        return Blob(self._sum.hexdigest(), self._size)

    def close(self) -> None:
        """Close the file as it is."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def discard(self) -> None:
        """Close and delete it; what cannot be deleted now is left to `sweep`."""
        if self._file is not None:
            with suppress(OSError):
                self._files.unlink(self.path)
            self.close()


class LocalBlobs:
    """A folder of blobs named by their SHA-256, with a folder next to it for unfinished files."""

    def __init__(self, root: Path, files: FileSystem) -> None:
        self.blobs = root / "blobs"
        self.scratch = root / "tmp"
        self._lock = root / "lock"
        self._files = files
        with store_errors(f"making the store's folder {root}"):
            for folder in (self.blobs, self.scratch):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock.touch()
            files.sync_folder(root)
            files.sync_folder(root.parent)

    def path(self, sha256: str) -> Path:
        return self.blobs / sha256

    def new_part(self) -> PartFile:
        path = self.scratch / f"{uuid.uuid4().hex}{_PART}"
        with store_errors("making a temporary file"):
            return PartFile(path, self._files.create(path), self._files)

    def existing_part(self, path: Path) -> PartFile:
        """Return a file in `scratch` that another writer finished, hashed as it is now; deleted if that
        fails."""
        try:
            with store_errors(f"reading {path}"):
                return PartFile(path, self._files.open_file(path), self._files)
        except StoreError:
            with suppress(OSError):
                self._files.unlink(path)
            raise

    def publish(self, part: PartFile, blob: Blob) -> None:
        """Rename a finished file to its final name.

        An older file of that name is replaced: its content is the same, or it is damaged. Its age starts
        anew, so that `sweep` leaves it to whoever wrote it last.
        """
        try:
            with store_errors("naming a blob"):
                with self._locked(fcntl.LOCK_SH):
                    self._files.rename(part.path, self.path(blob.sha256))
                self._files.sync_folder(self.blobs)
        except StoreError:
            part.discard()
            raise
        part.close()

    def size(self, sha256: str) -> int | None:
        """Return the size in bytes; None without such a blob. Raises StoreError while the folder is not
        mounted."""
        with store_errors(f"looking for {sha256}"):
            try:
                return self.path(sha256).stat().st_size
            except FileNotFoundError:
                self._lock.stat()  # gone too where a disk is not mounted
                return None

    def remove(self, sha256: str, older_than: float) -> bool:
        """Delete a blob that nobody has written for `older_than` seconds. Returns True if it was deleted."""
        with store_errors(f"deleting {sha256}"), self._locked(fcntl.LOCK_EX):
            try:
                age = time.time() - self.path(sha256).stat().st_mtime
            except FileNotFoundError:
                return False
            if age < older_than:
                return False
            self._files.unlink(self.path(sha256))
            return True

    def claim(self, registry: str) -> bool:
        """Record that a registry uses the folder. Returns True if no other does."""
        with store_errors("noting the registry"):
            folder = self.blobs.parent / "registries"
            folder.mkdir(exist_ok=True)
            if not (folder / registry).exists():
                (folder / registry).touch()
                self._files.sync_folder(folder)
            return len(list(folder.iterdir())) == 1

    def names(self) -> list[str]:
        """Return the blobs' SHA-256 sums; files of other names are left alone."""
        with store_errors("listing the store"), os.scandir(self.blobs) as entries:
            return [entry.name for entry in entries if is_sha256(entry.name)]

    def sweep(self, keep: frozenset[str], older_than: float) -> int:
        """Delete the blobs that are not in `keep` and the temporary files that no process has open.

        Files younger than `older_than` seconds are kept. Returns the number of deleted files.
        """
        removed = sum(self.remove(name, older_than) for name in self.names() if name not in keep)
        if removed:
            with store_errors("sweeping the store"):
                self._files.sync_folder(self.blobs)
        return removed + self.sweep_scratch(older_than)

    def sweep_scratch(self, older_than: float) -> int:
        removed = 0
        for entry in list(os.scandir(self.scratch)):
            with suppress(FileNotFoundError):
                if not entry.is_file(follow_symlinks=False) or _is_locked(entry.path):
                    continue
                if time.time() - entry.stat(follow_symlinks=False).st_mtime >= older_than:
                    with store_errors("sweeping temporary files"):
                        self._files.unlink(Path(entry.path))
                    removed += 1
        return removed

    @contextmanager
    def _locked(self, mode: int) -> Iterator[None]:
        """Exclude the naming of blobs from their deletion by age, in any process on this disk."""
        with self._lock.open("rb") as file:
            fcntl.flock(file.fileno(), mode)
            yield


def _is_locked(path: str) -> bool:
    with open(path, "rb") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def check_content(path: Path, sha256: str) -> None:
    """Read the file once, and raise BlobDamagedError unless its content has this SHA-256."""
    with store_errors(f"reading {sha256}"), path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise BlobDamagedError(f"Blob {sha256} is damaged: its content has the SHA-256 {found}.")
