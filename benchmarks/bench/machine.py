"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("onebase", "torch", "transformers", "peft", "bitsandbytes")
_VERSION = "from importlib.metadata import version; print(version('{}'))"


def describe(vllm_python: Path | None, trl_python: Path | None = None) -> dict[str, Any]:
    """CPU, memory, versions and load: all that a reader needs to judge a figure."""
    versions = {name: _version(name) for name in PACKAGES}
    for name, python in (("vllm", vllm_python), ("trl", trl_python)):
        if python is not None:
            versions[name] = _output([str(python), "-c", _VERSION.format(name)])
    here = Path(__file__).parent
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "gpu": _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _output(["git", "-C", str(here), "describe", "--always", "--dirty"]),
        "load_before": round(os.getloadavg()[0], 2),
    }


def sentence(described: dict[str, Any]) -> str:
    """The line above a table."""
    versions = ", ".join(f"{name} {version}" for name, version in described["versions"].items() if version)
    gpu = f", {described['gpu']}" if described["gpu"] else ""
    return f"{described['cpu']}, {described['cores']} cores{gpu}; {versions}. Times in ms."


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


def _output(command: list[str]) -> str | None:
    """The command's output; None when there is no such command, or it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
