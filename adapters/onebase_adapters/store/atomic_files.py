"""Write files and folders atomically, also across a power cut: written next to their place, synced, renamed,
and the folder around them synced."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_synced(work: Path, target: Path) -> None:
    """Rename a synced file to its final name, replacing a file that has it. Raises OSError."""
    work.replace(target)
    sync(target.parent)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file. Raises OSError."""
    work = path.with_name(f".{path.name}.part")
    work.write_text(text, encoding="utf-8")
    sync(work)
    replace_synced(work, path)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a folder to write into, which replaces `target` once all of it is on the disk.

    Raises OSError, also in place of safetensors' own exception.
    """
    work = target.with_name(f".{target.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        for path in [*work.iterdir(), work]:
            sync(path)
    except SafetensorError as error:
        shutil.rmtree(work, ignore_errors=True)
        code = re.search(r"os error (\d+)", str(error))
        number = errno.EIO if code is None else int(code[1])
        raise OSError(number, f"{target} cannot be written: {error}") from error
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    old = target.with_name(f".{target.name}.old")
    _remove(old)
    if os.path.lexists(target):
        target.rename(old)
    replace_synced(work, target)
    _remove(old)


def _remove(path: Path) -> None:
    """Remove a folder with its content, a file, or a link (but not its target)."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
