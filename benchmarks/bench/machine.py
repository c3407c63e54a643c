"""The machine on which the figures were measured."""

from __future__ import annotations

import asyncio
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

PACKAGES = ("onebase", "torch", "transformers", "peft", "bitsandbytes")
BUSY = 0.15
"""Part of one core that others may take: a desktop's idle noise, not a build."""


class BusyError(SystemExit):
    """Other work runs on this machine; the message names it. It ends a benchmark that does not catch it."""


def demand_quiet(whatever: bool, console: Console, seconds: float = 2.0) -> None:
    """Look for `seconds` at what this machine's processors do.

    Raises:
        BusyError: others take more than BUSY of a core, unless `whatever`; then a warning is printed.
    """
    before, mine, by_process = _busy_seconds(), time.process_time(), _seconds_of_processes()
    time.sleep(seconds)
    busy = (_busy_seconds() - before - time.process_time() + mine) / seconds
    if busy <= BUSY:
        return
    spent = {
        f"{name} (process {pid})": (used - by_process.get(pid, (0.0, ""))[0]) / seconds
        for pid, (used, name) in _seconds_of_processes().items()
        if pid != os.getpid()
    }
    most = sorted(spent, key=spent.__getitem__, reverse=True)[:3]
    named = ", ".join(f"{who} {spent[who]:.0%}" for who in most if spent[who] > 0)
    message = f"Other work takes {busy:.0%} of a core: {named or 'short processes, or other containers'}. "
    if not whatever:
        raise BusyError(f"{message}Figures would not mean much: end it, or measure all the same with --busy.")
    console.print(f"[yellow]{message}Expect noise.[/]")


async def settle(most: float = 30.0) -> None:
    """Wait until what has just started does nothing, as far as this process can see; `most` seconds.

    A server may be ready before all that it has started is.
    """
    end = time.monotonic() + most
    while time.monotonic() < end:
        before = _busy_seconds()
        await asyncio.sleep(0.5)
        if _busy_seconds() - before <= BUSY * 0.5:
            return


def _busy_seconds() -> float:
    """Return the work of all processors so far, in seconds, without waiting and without what a host took
    away."""
    times = psutil.cpu_times()._asdict()
    return float(sum(times.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq")))


def _seconds_of_processes() -> dict[int, tuple[float, str]]:
    """Return, by process, the processor's time that it has used, in seconds, and its name."""
    return {
        process.pid: (process.info["cpu_times"].user + process.info["cpu_times"].system, process.info["name"])
        for process in psutil.process_iter(["cpu_times", "name"])
        if process.info["cpu_times"]
    }


def describe(
    vllm_python: Path | None = None, trl_python: Path | None = None, llama_server: Path | None = None
) -> dict[str, Any]:
    """Return CPU, memory, versions and load: all that a reader needs to judge a figure."""
    versions = {name: _version(name) for name in PACKAGES}
    if llama_server is not None:
        # One that was built from a package says nothing of its version itself; the folder does.
        pinned = [part for part in llama_server.parts if part.startswith("llama.cpp-")]
        versions["llama.cpp"] = pinned[0].partition("-")[2] if pinned else _llama_version(llama_server)
    for name, python in (("vllm", vllm_python), ("trl", trl_python)):
        if python is not None:
            code = f"from importlib.metadata import version; print(version('{name}'))"
            versions[name] = _output([str(python), "-c", code])
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "gpu": _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": _output(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]),
        "load_before": round(os.getloadavg()[0], 2),
    }


def sentence(described: dict[str, Any]) -> str:
    """Return the line above a table."""
    versions = ", ".join(f"{name} {version}" for name, version in described["versions"].items() if version)
    gpu = f", {described['gpu']}" if described["gpu"] else ""
    return f"{described['cpu']}, {described['cores']} cores{gpu}; {versions}. Times in ms."


def _llama_version(program: Path) -> str | None:
    """Return `b11434`, or what the program says of itself."""
    said = _output([str(program), "--version"], {"LD_LIBRARY_PATH": str(program.parent)}) or ""
    lines = said.splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("version")), None)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _field(file: str, name: str) -> str | None:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def _output(command: list[str], env: dict[str, str] | None = None) -> str | None:
    """Return what the command prints, or None if there is no such command, or it fails."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True, env={**os.environ, **(env or {})}
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or result.stderr.strip() or None
