"""The part of the GPU check that looks at the machine: `python -m bench.gpu_machine machine FILE SETUP`.

It needs nothing but torch, so that it says what is missing where the other parts cannot even be imported.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.gpu_report import Findings, Setup, driver_state, run_part

NEEDED = (
    "numpy",
    "triton",
    "bitsandbytes",
    "transformers",
    "peft",
    "accelerate",
    "msgspec",
    "safetensors",
)
"""Packages that the other parts import."""
_PREFIXES = ("TORCH", "CUDA", "TRITON", "PYTORCH", "CUBLAS", "NVIDIA", "OMP", "ONEBASE")
"""Beginnings of the names of variables that change what is measured."""


def machine(setup: Setup, found: Findings) -> None:
    """Report the machine, and check that all packages that the other parts need can be imported."""
    found.fact("Python", platform.python_version())
    found.fact("processors", f"{os.cpu_count()}, {_processor()}")
    variables = {name: value for name, value in os.environ.items() if name.startswith(_PREFIXES)}
    found.fact("variables", " ".join(f"{name}={value}" for name, value in sorted(variables.items())))
    torch = _imported(found, "torch")
    for name in NEEDED:
        _imported(found, name)
    for what, read in (("ptxas", _ptxas), ("bitsandbytes' library", _bitsandbytes_library)):
        try:
            found.fact(what, read())
        except Exception as error:  # private parts of packages, which may be others there
            found.fact(what, f"unknown: {type(error).__name__}")
    add = found.table("Packages", ("name", "version"))
    for name, version in sorted({(one.name, one.version) for one in metadata.distributions()}):
        add(name, version)
    if torch is None or setup.device == "cpu":
        return
    if not torch.cuda.is_available():
        built = torch.version.cuda
        found.fact("no GPU", f"torch {torch.__version__} {'sees none' if built else 'is built without CUDA'}")
        return
    facts: Any = torch.cuda.get_device_properties(0)
    found.fact("GPU", facts.name)
    found.fact("memory", f"{facts.total_memory / 1e9:.1f} GB")
    found.fact("capability", f"{facts.major}.{facts.minor}")
    found.fact("multiprocessors", facts.multi_processor_count)
    for name in ("L2_cache_size", "shared_memory_per_block_optin"):
        found.fact(name, getattr(facts, name, "unknown"))
    found.fact("CUDA", torch.version.cuda)
    for name, value in driver_state().items():
        found.fact(name, value)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    found.check("Python's headers are here, which Triton compiles with", header.exists(), str(header))
    found.check(
        "a C compiler is here, which Triton compiles with", compiler() is not None, "gcc, clang or CC"
    )
    found.check("a sum on the GPU", bool(torch.ones(8, device="cuda").sum() == 8))
    for title, measure in (("rates", _rates), ("page-locked memory", _page_locked), ("a launch", _launch)):
        found.trying(title, measure, torch, found)
    for name, value in driver_state().items():
        found.fact(f"{name}, afterwards", value)


def _imported(found: Findings, name: str) -> Any:
    """Import a package and report its version and the seconds that it takes; None if it cannot be."""
    began = time.perf_counter()
    try:
        module = importlib.import_module(name)
        found.fact(name, getattr(module, "__version__", None) or metadata.version(name))
    except Exception as error:
        found.check(f"{name} can be imported", False, f"{type(error).__name__}: {error}")
        return None
    found.figure(f"importing {name}", time.perf_counter() - began, "s")
    return module


def compiler() -> str | None:
    """Return the C compiler that Triton takes: what CC names, else gcc or clang, and no cc."""
    told = os.environ.get("CC")
    return shutil.which("gcc") or shutil.which("clang") if told is None else shutil.which(told)


def _processor() -> str:
    with contextlib.suppress(OSError):
        told = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        return told[1] if told else platform.machine()
    return platform.machine()


def _ptxas() -> str:
    """Return the version of the assembler that Triton uses, and its path."""
    knobs: Any = importlib.import_module("triton.knobs")
    return f"{knobs.nvidia.ptxas.version}, {knobs.nvidia.ptxas.path}"


def _bitsandbytes_library() -> str:
    """Return the path of the library that bitsandbytes has loaded."""
    extension: Any = importlib.import_module("bitsandbytes.cextension")
    return str(extension.lib._lib._name)


def _timed(torch: Any, run: Callable[[], Any], repeats: int = 5) -> float:
    """Return the seconds of the fastest of some runs."""
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _rates(torch: Any, found: Findings) -> None:
    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found.figure(
        "a large copy, read and written",
        2 * (1 << 30) / _timed(torch, lambda: target.copy_(source)) / 1e9,
        "GB/s",
    )
    small = source[: 8 << 20]
    out = target[: 8 << 20]

    def many() -> None:
        for _ in range(100):
            out.copy_(small)

    found.figure("a copy within the cache", 2 * (8 << 20) * 100 / _timed(torch, many) / 1e9, "GB/s")
    side = 8192
    x, y = (torch.randn(side, side, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    found.figure(
        "a product of 8,192 by 8,192 in bf16", 2 * side**3 / _timed(torch, lambda: x @ y) / 1e12, "TFLOP/s"
    )


def _page_locked(torch: Any, found: Findings) -> None:
    began = time.perf_counter()
    torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    found.figure("256 MiB of page-locked memory", (time.perf_counter() - began) * 1e3, "ms")


def _launch(torch: Any, found: Findings) -> None:
    x = torch.zeros(1, device="cuda")
    count = 1000

    def launches() -> None:
        for _ in range(count):
            x.add_(1)

    found.figure("a launch of PyTorch's", _timed(torch, launches) / count * 1e6, "us")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launches()
    found.figure("a kernel and its gap in a graph", _timed(torch, graph.replay) / count * 1e6, "us")


if __name__ == "__main__":
    sys.exit(run_part({"machine": machine}, sys.argv[1:]))
