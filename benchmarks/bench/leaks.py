"""Resources that an idle server must have given back: KV blocks, sequences, memory, file descriptors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from bench.process_stats import ProcessStats, available, read_tree
from bench.stream import fetch_json

COUNTERS = (
    "rows_running",
    "rows_waiting",
    "requests",
    "kv_blocks_free",
    "kv_blocks_total",
    "slots_used",
    "adapters_loaded",
    "preemptions",
    "generated_tokens",
    "cached_tokens",
    "restarts",
)
OPTIONAL = ("requests", "restarts")
"""Counters that are not the engine's own; a server may leave them out of /status."""


@dataclass(frozen=True)
class Snapshot:
    """A server's state at one moment."""

    counters: dict[str, int]
    processes: list[ProcessStats]

    @property
    def idle(self) -> bool:
        """Nothing runs or waits, and every KV block is free."""
        counters = self.counters
        open_work = (counters.get(name, 0) for name in ("rows_running", "rows_waiting", "requests"))
        return not any(open_work) and counters["kv_blocks_free"] == counters["kv_blocks_total"]

    def line(self) -> str:
        """Return the state in a few words."""
        counters = self.counters
        memory = " + ".join(f"{process.rss / 2**20:.0f}" for process in self.processes)
        return (
            f"rows {counters['rows_running']}+{counters['rows_waiting']}, "
            f"blocks {counters['kv_blocks_free']}/{counters['kv_blocks_total']} free, "
            f"{counters['preemptions']} preempted, {memory or '?'} MiB"
        )


async def snapshot(url: str, pid: int | None) -> Snapshot:
    """Reads `GET /status`, and /proc when `pid` is given (Linux only).

    Raises:
        HttpError: /status did not answer 200.
        OSError: nothing listens, it lacks a figure, or the process is gone.
    """
    figures = _flatten(await fetch_json(f"{url}/status"))
    missing = [name for name in COUNTERS if name not in figures and name not in OPTIONAL]
    if missing:
        raise OSError(f"{url}/status lacks {', '.join(missing)}")
    counters = {name: int(figures[name]) for name in COUNTERS if name in figures}
    return Snapshot(counters, read_tree(pid) if pid is not None and available() else [])


def _flatten(status: Any) -> dict[str, int]:
    """Every whole number in nested objects, by its own name."""
    found: dict[str, int] = {}
    for name, value in status.items():
        if isinstance(value, dict):
            found |= _flatten(value)
        elif isinstance(value, int):
            found[name] = value
    return found


def compare(before: Snapshot, after: Snapshot, memory_bound: int, descriptor_slack: int) -> list[str]:
    """Return the leaks between two idle moments, in sentences.

    Args:
        memory_bound: bytes that the resident memory of one process may grow by.
        descriptor_slack: file descriptors that one process may have more.
    """
    leaks = [
        f"{when} the server is not idle: {state.line()}"
        for when, state in _named(before, after)
        if not state.idle
    ]
    for name in ("kv_blocks_total", "adapters_loaded", "restarts"):
        if before.counters.get(name) != after.counters.get(name):
            leaks.append(f"{name} went from {before.counters.get(name)} to {after.counters.get(name)}")
    old = {process.pid: process for process in before.processes}
    if old.keys() != {process.pid for process in after.processes}:
        leaks.append("the server's processes are not the same as after the warm-up")
    for process in after.processes:
        if (earlier := old.get(process.pid)) is None:
            continue
        growth = process.rss - earlier.rss
        if growth > memory_bound:
            leaks.append(f"{process.name} grew by {growth / 2**20:.0f} MiB")
        if process.descriptors > earlier.descriptors + descriptor_slack:
            leaks.append(f"{process.name} has {process.descriptors} descriptors, had {earlier.descriptors}")
    return leaks


def _named(before: Snapshot, after: Snapshot) -> list[tuple[str, Snapshot]]:
    return [("after the warm-up", before), ("at the end", after)]


def leak_table(before: Snapshot, after: Snapshot) -> Table:
    table = Table("figure", "after warm-up", "at the end", title="the idle server")
    for name in after.counters:
        table.add_row(name, str(before.counters.get(name, "")), str(after.counters[name]))
    old = {process.pid: process for process in before.processes}
    for process in after.processes:
        earlier = old.get(process.pid)
        memory = f"{earlier.rss / 2**20:.1f}" if earlier else ""
        table.add_row(f"{process.name}, MiB resident", memory, f"{process.rss / 2**20:.1f}")
        descriptors = str(earlier.descriptors) if earlier else ""
        table.add_row(f"{process.name}, descriptors", descriptors, str(process.descriptors))
    return table
