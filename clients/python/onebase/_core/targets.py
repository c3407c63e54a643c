"""Files and folders that a command writes: whole or not at all, never over others, where there is room."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_OURS: Final = ("adapter_config.json", "config.json")
"""A folder that holds neither is no adapter and no model: even `force` does not replace it."""
_SPARE_BYTES: Final = 64 << 20
"""Left free on the disk, for those who write next to us."""


def check_free(target: Path, *, force: bool) -> None:
    """Raise ValueError unless something may be written at `target`.

    Args:
        force: Whether a file, an adapter or a model that is there may be replaced.
    """
    if not os.path.lexists(target) or _is_empty(target):
        return
    if not force:
        raise ValueError(f"{target} is there already: give another path, or replace it by force")
    if target.is_dir() and not any((target / name).is_file() for name in _OURS):
        raise ValueError(
            f"{target} holds neither an adapter nor a model, so it is not replaced: delete it first"
        )


def _is_empty(target: Path) -> bool:
    return target.is_dir() and not target.is_symlink() and not any(target.iterdir())


@contextmanager
def atomic_target(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield a path next to `target`, for a file or a folder that becomes `target` at the end of the block.

    What is written is synced first. If the block fails, nothing of it is left.

    Raises:
        ValueError: see `check_free`.
        OSError: the place cannot be written to.
    """
    check_free(target, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        yield work
        _sync_all(work)
        check_free(target, force=force)
        _move(work, target)
    finally:
        _remove(work)


def _move(work: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
    if target.is_dir() or work.is_dir():
        if os.path.lexists(target):
            target.rename(old)
        try:
            work.rename(target)
        except OSError:
            if os.path.lexists(old):
                old.rename(target)
            raise
        _remove(old)
    else:
        work.replace(target)
    _sync(target.parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_all(path: Path) -> None:
    if path.is_dir():
        for entry in path.iterdir():
            _sync_all(entry)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise OSError unless the disk of `folder`, which may not be there yet, has room for `needed` bytes."""
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed + _SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"{what} takes {needed / 1e9:.2f} GB, and {place} has {free / 1e9:.2f} GB free: "
            "make room or choose another disk",
        )
