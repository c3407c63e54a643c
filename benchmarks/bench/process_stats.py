"""Memory and file descriptors of a process and its descendants, from Linux's /proc."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class ProcessStats:
    pid: int
    name: str
    rss: int
    """Resident memory in bytes."""
    descriptors: int


def available() -> bool:
    """Return True if this system has Linux's /proc."""
    return (PROC / "self" / "statm").exists()


def read_tree(root: int) -> list[ProcessStats]:
    """The process `root` and all below it, by pid; what ends meanwhile is left out.

    Raises:
        ProcessLookupError: there is no process `root`.
    """
    if not (PROC / str(root)).exists():
        raise ProcessLookupError(f"no process {root}")
    parents = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (parent := _parent(entry)) is not None:
            parents[int(entry.name)] = parent
    members = {root}
    while found := {pid for pid, parent in parents.items() if parent in members} - members:
        members |= found
    stats = [_read(pid) for pid in sorted(members)]
    return [process for process in stats if process is not None]


def _parent(entry: Path) -> int | None:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _read(pid: int) -> ProcessStats | None:
    entry = PROC / str(pid)
    try:
        resident = int((entry / "statm").read_text().split()[1]) * PAGE
        descriptors = len(os.listdir(entry / "fd"))
        words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    return ProcessStats(pid, _name(words), resident, descriptors)


def _name(words: list[str]) -> str:
    """A short name from a command line: the module after -m, else the program."""
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1]
    programs = [Path(word).name for word in words[:2] if word and not word.startswith("-")]
    return programs[-1] if programs else "?"
