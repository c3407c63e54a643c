#!/usr/bin/env python3
"""Checks and measures OneBase on a machine with a GPU, in one go and without a network.

Needs no base: one of Llama-3.1-8B's shape with random 4-bit weights is made on the card. Each part is a
process with a time limit of its own; whatever becomes of one, the others run. Everything is over in
`--minutes`. Leaves gpu-check.json and a page, gpu-check.md. Exit status: 0 if all of it holds, else 1.

  make gpu-check                                            # or: python3 benchmarks/gpu_check.py
  make gpu-check CHECK_ARGS="--only machine,kernels --minutes 9"
  make gpu-check CHECK_ARGS="--bundle onebase-gpu-check.tar"   # where there is a network: what to carry
  make gpu-check CHECK_ARGS="--device cpu"                  # under Triton's interpreter: whether it would run
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import gpu_bundle
from bench.command import Options, names
from bench.gpu_report import held, now, page
from bench.processes import end_on_signals, tail

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("engine", "server", "adapters", "clients/python", "benchmarks", "")
MINUTES = 30.0
END_SECONDS = 10.0
"""Time, in seconds, after which a killed process is given up."""
_CHILD_SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of prctl(2)."""


@dataclass(frozen=True)
class Part:
    """`seconds`: its limit, when all run in MINUTES. `module`: what is run as a program, with its name."""

    name: str
    title: str
    seconds: float
    module: str = "bench.gpu_parts"


MACHINE = Part("machine", "the machine", 120)
PARTS = (
    Part("kernels", "kernels against PyTorch", 360, "bench.gpu_kernels"),
    Part("engine", "the engine", 240),
    Part("invariance", "a row's bits in any company", 240),
    Part("memory", "out of memory by a long prompt", 90),
    Part("proof", "attach, proof and kills beside the engine", 240, "bench.gpu_processes"),
    Part("training", "a training job beside the engine", 210, "bench.gpu_processes"),
    Part("peft", "transformers + PEFT on the same base", 120),
    Part("tests", "the engine's and adapters' tests", 180, "bench.gpu_processes"),
)


def run_part(
    part: Part, setup: Mapping[str, str], environment: Mapping[str, str], seconds: float
) -> dict[str, Any]:
    """Run a part in a process of its own, for at most so long; return what it has found, however it ends.

    Nothing that it has started is left, or it would have memory of the GPU that the next part needs.
    """
    folder = Path(setup["folder"]) / part.name
    folder.mkdir(parents=True, exist_ok=True)
    file, log = folder / "findings.json", folder / "log"
    file.unlink(missing_ok=True)
    began = time.monotonic()
    told = json.dumps({**setup, "folder": str(folder)})
    with log.open("wb") as output, _left_behind():
        process = subprocess.Popen(
            [sys.executable, "-m", part.module, part.name, str(file), told],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,
        )
        over = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            over = True
        finally:
            _adopt(True)  # once more: it holds for the whole process, which others may use too
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # One that waits in the driver for a GPU that hangs cannot be killed.
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
    found: dict[str, Any] = {"state": "", "error": "", "figures": [], "checks": [], "tables": []}
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text())
    if over:
        found |= {"state": "timed out", "error": f"it took more than {seconds:.0f} s"}
    elif not found["state"] or (process.returncode and found["state"] == "ok"):
        found |= {"state": "failed", "error": f"its process ended with {_status(process.returncode)}"}
    elif found["state"] == "ok" and not all(check["held"] for check in found["checks"]):
        found["state"] = "fails"
    elif found["state"] == "ok" and not found["checks"] and part.name != MACHINE.name:
        found |= {"state": "failed", "error": "it found nothing to check"}
    if found["state"] in ("failed", "timed out"):
        found["log"] = tail(log, 25)[-4000:]
    return {"part": part.name, "title": part.title, "seconds": time.monotonic() - began, **found}


def _status(code: int | None) -> str:
    if code is None:
        return "no end: it cannot be killed"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


@contextmanager
def _left_behind() -> Iterator[None]:
    """Kill, at the end, what a process that began meanwhile has left behind, in sessions of their own too."""
    before = _children()
    _adopt(True)
    try:
        yield
    finally:
        until = time.monotonic() + END_SECONDS
        while (left := _children() - before) and time.monotonic() < until:
            for pid in left:
                with suppress(ProcessLookupError, ChildProcessError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.05)
        _adopt(False)


def _adopt(orphans: bool) -> None:
    """Return True if processes whose parent ends become children of this one."""
    ctypes.CDLL(None).prctl(_CHILD_SUBREAPER, int(orphans), 0, 0, 0)


def _children() -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = path.read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                found.add(int(path.parent.name))
    return found


def run_parts(
    parts: Sequence[Part], setup: Mapping[str, str], environment: Mapping[str, str], seconds: float
) -> list[dict[str, Any]]:
    """Run part after part, each told at the terminal. Their limits share `seconds` as they share MINUTES.

    Ctrl-C and the like end the part that runs; the others are reported as not run.
    """
    scale, results = seconds / sum(part.seconds for part in parts), list[dict[str, Any]]()
    left = list(parts)
    try:
        while left:
            part = left[0]
            print(f"{part.name:<12}", end="", flush=True)
            result = run_part(part, setup, environment, max(part.seconds * scale, 1.0))
            results.append(result)
            left.pop(0)
            wrong = [check["name"] for check in result["checks"] if not check["held"]]
            said = [result["error"].partition("\n")[0], *(f"FAILS: {name}" for name in wrong)]
            print(
                f"{result['state']:<10}{result['seconds']:>5.0f} s  {'; '.join(filter(None, said))[:300]}",
                flush=True,
            )
    except (KeyboardInterrupt, SystemExit):
        print("interrupted", flush=True)
    nothing: dict[str, Any] = {"figures": [], "checks": [], "tables": [], "seconds": 0.0}
    for part in left:
        results.append({"part": part.name, "title": part.title, "state": "not run", "error": "", **nothing})
    return results


def environment_of(device: str, folder: Path) -> dict[str, str]:
    """Return the environment of the parts: the sources of this checkout, and before them those of a
    bundle."""
    site = folder / "site"
    gpu_bundle.unpack(ROOT / gpu_bundle.WHEELS, site)
    try:
        metadata.version("onebase")
    except metadata.PackageNotFoundError:
        # It is not installed, but is asked for its version.
        version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
        facts = site / "onebase-0.dist-info"
        facts.mkdir(parents=True, exist_ok=True)
        (facts / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: onebase\nVersion: {version[1] if version else '0'}\n"
        )
    paths = [str(site), *(str(ROOT / source) for source in SOURCES), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment.pop("TRITON_INTERPRET", None)
    return environment | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})


def _commit() -> str:
    told = ROOT / gpu_bundle.COMMIT
    if told.exists():
        return told.read_text().strip()
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


def main(argv: Sequence[str]) -> int:
    asked = Options(__doc__)
    known = [part.name for part in (MACHINE, *PARTS)]
    add = asked.add
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: under Triton's interpreter")
    add("--shape", choices=("8b", "tiny"), help="of the random base; by default 8b, and tiny on the CPU")
    add("--only", type=names(*known), default=known, help=f"comma-separated: {', '.join(known)}")
    asked.number("minutes", MINUTES, "for all of it; the parts that run share them")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the report")
    add("--bundle", type=Path, metavar="FILE", help="write what to carry to a machine without a network")
    parser = asked.parser
    options = parser.parse_args(argv)
    if sys.version_info < (3, 11):  # noqa: UP036 (there it is whatever the machine has)
        parser.error(f"OneBase runs on Python 3.11 and newer; {sys.executable} is older")
    if options.bundle is not None:
        return gpu_bundle.write_bundle(ROOT, options.bundle)
    shape = options.shape or ("tiny" if options.device == "cpu" else "8b")
    if (options.device, shape) == ("cpu", "8b"):
        parser.error("an 8B takes days under Triton's interpreter: --shape tiny is for --device cpu")
    end_on_signals()
    output: Path = options.output.resolve()
    folder = output / "gpu-check"
    folder.mkdir(parents=True, exist_ok=True)
    environment = environment_of(options.device, folder)
    began, started = now(), time.monotonic()
    setup = {"device": options.device, "shape": shape, "folder": str(folder)}
    results = run_parts((MACHINE,), setup, environment, min(MACHINE.seconds, options.minutes * 60))
    facts = results[0].get("facts", {})
    if options.device == "cuda" and facts.get("GPU") is None:
        print(results[0].get("log", ""), file=sys.stderr)
        said = (results[0].get("log") or results[0]["error"]).strip().splitlines() or ["interrupted"]
        if "no GPU" in facts:
            print(f"There is no GPU here that can be used: {facts['no GPU']}")
        else:
            print(f"Whether there is a GPU here could not be seen: {said[-1]}")
        print(gpu_bundle.advice())
        return 1
    wanted = [part for part in PARTS if part.name in options.only]
    if wanted and results[0]["state"] != "not run":
        left = options.minutes * 60 - (time.monotonic() - started)
        results += run_parts(wanted, setup, environment, max(left, 1.0))
    report = {
        "format": 1,
        "ok": all(map(held, results)) and any(result["checks"] for result in results),
        "device": options.device,
        "shape": shape,
        "began": began,
        "seconds": time.monotonic() - started,
        "commit": _commit(),
        "machine": facts,
        "parts": results,
    }
    (output / "gpu-check.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / "gpu-check.md").write_text(page(report))
    print(f"{'All of it holds.' if report['ok'] else 'Not all of it holds.'} {output / 'gpu-check.md'}")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
