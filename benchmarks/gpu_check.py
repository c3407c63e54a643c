#!/usr/bin/env python3
"""Checks and measures OneBase on a machine with a GPU, in commands of ten minutes and without a network.

Needs no base: one of Llama-3.1-8B's shape with random 4-bit weights is made on the card. Each part is a
process with a time limit of its own, the most valuable first; whatever becomes of one, the others run. After
each finding the report is written anew, so that a run that is cut off leaves what it had. Leaves
gpu-check.json, a page, gpu-check.md, and the logs (a rehearsal: gpu-check-rehearsal.*); files are made in a
scratch folder. Exit status: 0 if all of it holds, else 1.

  make gpu-check                                            # or: python3 benchmarks/gpu_check.py
  make gpu-check CHECK_ARGS="--command 2"                   # the second ten minutes, into the same report
  make gpu-check CHECK_ARGS="--only kernels,engine --minutes 5"
  make gpu-check CHECK_ARGS="--bundle onebase-gpu-check.tar"   # where there is a network: what to carry
  make gpu-check CHECK_ARGS="--rehearse"                    # no GPU: the whole schedule, on a tiny base
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import gpu_bundle
from bench.command import Options, names
from bench.gpu_report import find_sanitizer, held, now, page, sanitizer_command, sanitizer_findings
from bench.processes import end_on_signals, tail

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("engine", "server", "adapters", "clients/python", "benchmarks", "")
MINUTES = 9.5
"""Time of one command, in minutes, where a command may take ten."""
LEAST, MOST = 0.5, 2.0
"""Part of its time that a part must have left to be begun, and multiple of it that it may have with what
earlier ones left, so that one that hangs takes no more."""
END_SECONDS = 10.0
"""Time, in seconds, after which a killed process is given up."""
AGAIN_SECONDS = 60.0
"""Limit, in seconds, of a failed part that runs once more with its launches one by one."""
WATCHED_SECONDS = 120.0
"""Limit, in seconds, of a part that failed again and runs on a tiny base under compute-sanitizer."""
LOGGED_BYTES, CARRIED_BYTES = 2 << 20, 24 << 20
"""Largest size, in bytes, of one file of the logs, and of Triton's cache, that is kept with the report."""
CHECKED, REHEARSED = "gpu-check", "gpu-check-rehearsal"
"""Names of the reports, without a suffix: a rehearsal writes over no check of a GPU."""
_CHILD_SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of prctl(2)."""


@dataclass(frozen=True)
class Part:
    """A part of the check: a program, `module`, that is run with the part's name."""

    name: str
    title: str
    seconds: float
    """Limit on its time. What earlier parts did not use is added."""
    module: str = "bench.gpu_parts"
    command: int = 1
    """Number of the command, of ten minutes, that it belongs to."""
    under: tuple[str, ...] = ()
    """Program that runs the part's process, with its options."""


MACHINE = Part("machine", "the machine", 45, "bench.gpu_machine")
PARTS = (
    Part("forms", "what is compiled", 85, "bench.gpu_forms"),
    Part("bits", "sums to the last bit", 50, "bench.gpu_forms"),
    Part("kernels", "kernels against PyTorch", 110, "bench.gpu_kernels"),
    Part("engine", "the engine", 130),
    Part("invariance", "a row's bits in any company", 100, "bench.gpu_invariance"),
    Part("sanitizer", "reads and writes within bounds", 45, "bench.gpu_forms"),
    Part("memory", "out of memory by a long prompt", 80, command=2),
    Part("proof", "attach, proof and kills beside the engine", 150, "bench.gpu_processes", command=2),
    Part("training", "a training job beside the engine", 150, "bench.gpu_processes", command=2),
    Part("peft", "transformers + PEFT on the same base", 55, command=2),
    Part("tests", "the engine's and adapters' tests", 80, "bench.gpu_processes", command=2),
)
COMMANDS = sorted({part.command for part in PARTS})
NOTHING: dict[str, Any] = {"error": "", "figures": [], "checks": [], "tables": [], "seconds": 0.0}
Note = Callable[[Sequence[Mapping[str, Any]]], None]
"""Function that writes the report of these results."""


class InterruptedRunError(Exception):
    """Ctrl-C or a signal ended the run; the argument is the results by then, of all of its parts."""

    def __init__(self, results: list[dict[str, Any]]) -> None:
        super().__init__("interrupted")
        self.results = results


def run_part(
    part: Part,
    setup: Mapping[str, str],
    environment: Mapping[str, str],
    seconds: float,
    note: Callable[[Mapping[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Run a part in a process of its own, for at most so long; return what it has found, however it ends.

    `note` is told what it has found so far, each time that there is more.

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
            [*part.under, sys.executable, "-m", part.module, part.name, str(file), told],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,
        )
        over = False
        try:
            over = not _ended(process, began + seconds, file, note)
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
    where = f", at: {found['stage']}" if found.get("stage") else ""
    if over:
        found |= {"state": "timed out", "error": f"it took more than {seconds:.0f} s{where}"}
    elif not found["state"] or (process.returncode and found["state"] == "ok"):
        found |= {"state": "failed", "error": f"its process ended with {_status(process.returncode)}{where}"}
    elif found["state"] == "ok" and not all(check["held"] for check in found["checks"]):
        found["state"] = "fails"
    elif found["state"] == "ok" and not found["checks"] and part.name != MACHINE.name:
        found |= {"state": "failed", "error": "it found nothing to check"}
    if found["state"] in ("failed", "timed out"):
        found["log"] = tail(log, 120)[-12000:]
    return {"part": part.name, "title": part.title, "seconds": time.monotonic() - began, **found}


def _ended(
    process: subprocess.Popen[bytes], until: float, file: Path, note: Callable[[Mapping[str, Any]], None]
) -> bool:
    """Wait for a process and pass on its findings; return False if it still runs at `until`, in monotonic
    seconds."""
    known = 0
    while True:
        left = until - time.monotonic()
        try:
            process.wait(max(min(left, 1.0), 0.0))
            return True
        except subprocess.TimeoutExpired:
            if left <= 1.0:
                return False
        with suppress(OSError, ValueError):
            if (changed := file.stat().st_mtime_ns) != known:
                known = changed
                note(json.loads(file.read_text()))


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
    parts: Sequence[Part],
    setup: Mapping[str, str],
    environment: Mapping[str, str],
    seconds: float,
    note: Note = lambda results: None,
) -> list[dict[str, Any]]:
    """Run part after part within `seconds`, each told at the terminal, and have the report written meanwhile.

    Each has its own time and what earlier ones left, MOST times its own at most. Where there is too little
    for all of them, the last ones are not run. Ctrl-C and the like end the part that runs and all others,
    and raise InterruptedRunError with what had been found.
    """
    until, results, left = time.monotonic() + seconds, list[dict[str, Any]](), list(parts)
    try:
        while left:
            part, remaining = left[0], until - time.monotonic()
            spare = max(remaining - sum(one.seconds for one in left), 0.0)
            limit = min(part.seconds + spare, MOST * part.seconds, remaining)
            if limit < LEAST * part.seconds:
                left.pop(0)
                error = f"{remaining:.0f} s are left, and it takes up to {part.seconds:.0f} s"
                results.append(_missing(part, error))
                print(f"{part.name:<12}not run         {error}", flush=True)
                continue
            print(f"{part.name:<12}", end="", flush=True)

            def grow(found: Mapping[str, Any], part: Part = part) -> None:
                note([*results, {**_missing(part), **found, "state": "running"}, *map(_missing, left[1:])])

            grow({})
            result = run_part(part, setup, environment, limit, grow)
            results.append(result)
            left.pop(0)
            note([*results, *map(_missing, left)])
            wrong = [check["name"] for check in result["checks"] if not check["held"]]
            said = [result["error"].partition("\n")[0], *(f"FAILS: {name}" for name in wrong)]
            print(
                f"{result['state']:<10}{result['seconds']:>5.0f} s  {'; '.join(filter(None, said))[:300]}",
                flush=True,
            )
    except (KeyboardInterrupt, SystemExit) as error:
        print("interrupted", flush=True)
        results += map(_missing, left)
        note(results)
        raise InterruptedRunError(results) from error
    results += map(_missing, left)
    note(results)
    return results


def _missing(part: Part, error: str = "") -> dict[str, Any]:
    return {"part": part.name, "title": part.title, "state": "not run", **NOTHING, "error": error}


def run_again(
    results: Sequence[Mapping[str, Any]],
    setup: Mapping[str, str],
    environment: Mapping[str, str],
    seconds: float,
) -> list[dict[str, Any]]:
    """Run the parts in which something raised once more, with their launches one by one, so that an error has
    its place; those in which something raises again, on a tiny base under compute-sanitizer."""
    until = time.monotonic() + seconds
    parts = [
        replace(part, title=f"{part.title}, launches one by one", seconds=AGAIN_SECONDS)
        for part in _raised_in(results)
    ]
    folder = Path(setup["folder"])
    one_by_one = {**environment, "CUDA_LAUNCH_BLOCKING": "1"}
    again = list[dict[str, Any]]()
    try:
        again = run_parts(parts, {**setup, "folder": str(folder / "again")}, one_by_one, seconds)
        watched = _run_watched(_raised_in(again), setup, environment, until - time.monotonic())
    except InterruptedRunError as interrupted:
        more = interrupted.results if again else []
        raise InterruptedRunError(
            [*_named(again or interrupted.results, "again"), *_named(more, "watched")]
        ) from interrupted
    return [*_named(again, "again"), *_named(watched, "watched")]


def _raised_in(results: Sequence[Mapping[str, Any]]) -> list[Part]:
    """Return the parts whose process failed, or in which something raised and the rest was done."""
    names = {one["part"] for one in results if one["state"] == "failed" or one.get("tracebacks")}
    return [part for part in PARTS if part.name in names]


def _run_watched(
    parts: Sequence[Part], setup: Mapping[str, str], environment: Mapping[str, str], seconds: float
) -> list[dict[str, Any]]:
    """Run parts on a tiny base under compute-sanitizer, and check that it finds nothing."""
    program = find_sanitizer()
    if program is None:
        return [
            {**_missing(part, "there is no compute-sanitizer here"), "state": "skipped"} for part in parts
        ]
    command, variables = sanitizer_command(program)
    watched = [
        replace(part, title=f"{part.title}, under compute-sanitizer", seconds=WATCHED_SECONDS, under=command)
        for part in parts
    ]
    folder = Path(setup["folder"]) / "watched"
    results = run_parts(
        watched, {**setup, "folder": str(folder), "shape": "tiny"}, {**environment, **variables}, seconds
    )
    for result in results:
        if result["state"] != "not run":
            said = sanitizer_findings(folder / result["part"] / "log")
            check = {"name": "reads and writes within bounds", "held": not said, "detail": "; ".join(said)}
            result["checks"] = [*result["checks"], check]
    return results


def _named(results: Sequence[Mapping[str, Any]], how: str) -> list[dict[str, Any]]:
    return [
        {**result, "part": f"{result['part']} {how}"} for result in results if result["state"] != "not run"
    ]


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
        "TRITON_CACHE_DIR": str(folder / "triton"),
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
    add(
        "--command",
        type=int,
        choices=COMMANDS,
        help="run the parts of these ten minutes (default: the first)",
    )
    add("--only", type=names(*known), help=f"run these parts, comma-separated: {', '.join(known)}")
    asked.number("minutes", MINUTES, "for all of it")
    add("--rehearse", action="store_true", help="run all parts without a GPU, within their limits")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the report")
    add("--cache", type=Path, metavar="FILE", help="gpu-check-triton.tar.gz of an earlier run on such a card")
    add("--bundle", type=Path, metavar="FILE", help="write what to carry to a machine without a network")
    add("--python", help="with --bundle: for this version alone, as in 3.12")
    add("--cuda", help="with --bundle: for this version of CUDA alone, as in 130")
    add(
        "--there", type=Path, metavar="FILE", help="with --bundle: `pip list --format=freeze` of that machine"
    )
    parser = asked.parser
    options = parser.parse_args(argv)
    if sys.version_info < (3, 11):  # noqa: UP036 (there it is whatever the machine has)
        parser.error(f"OneBase runs on Python 3.11 and newer; {sys.executable} is older")
    if options.bundle is not None:
        return gpu_bundle.write_bundle(
            ROOT,
            options.bundle,
            pythons=(options.python,) if options.python else gpu_bundle.PYTHONS,
            cuda=options.cuda,
            there=gpu_bundle.installed(options.there.read_text()) if options.there else {},
        )
    device = "cpu" if options.rehearse else options.device
    shape = options.shape or ("tiny" if device == "cpu" else "8b")
    if (device, shape) == ("cpu", "8b"):
        parser.error("an 8B takes days under Triton's interpreter: --shape tiny is for --device cpu")
    end_on_signals()
    output: Path = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="onebase-gpu-check-", ignore_cleanup_errors=True) as scratch:
        check = Run(options, output, Path(scratch), device, shape)
        return check.rehearse() if options.rehearse else check.run()


class Run:
    """One command of the check, and the report that it adds to."""

    def __init__(self, options: Any, output: Path, folder: Path, device: str, shape: str) -> None:
        self._options, self._output, self._folder = options, output, folder
        self._environment = environment_of(device, folder)
        if options.cache is not None:
            with tarfile.open(options.cache) as tar:
                tar.extractall(folder, filter="data")
        self._setup = {"device": device, "shape": shape, "folder": str(folder)}
        self._name = REHEARSED if options.rehearse else CHECKED
        self._report: dict[str, Any] = {
            "format": 2, "ok": False, "device": device, "shape": shape, "began": now(), "seconds": 0.0,
            "commit": _commit(), "machine": {}, "parts": [],
        }  # fmt: skip
        self._started = time.monotonic()
        self._before: list[dict[str, Any]] = []

    def run(self) -> int:
        """Run the parts that were asked for. Return the exit status."""
        options, seconds = self._options, self._options.minutes * 60
        wanted = [part for part in PARTS if self._wants(part)]
        try:
            (looked,) = self._look(seconds)
        except InterruptedRunError:
            return 1  # nothing has been found yet
        facts = looked.get("facts", {})
        if self._setup["device"] == "cuda" and facts.get("GPU") is None:
            return _without_gpu(looked)
        self._continue(facts)
        results = [looked]
        if wanted and looked["state"] != "not run":
            left = seconds - (time.monotonic() - self._started)
            try:
                results += run_parts(
                    wanted, self._setup, self._environment, max(left, 1.0), self._note_after(looked)
                )
                left = seconds - (time.monotonic() - self._started)
                if self._setup["device"] == "cuda" and options.only is None and left > AGAIN_SECONDS / 2:
                    results += run_again(results, self._setup, self._environment, left)
            except InterruptedRunError as interrupted:
                return self._end([*results, *interrupted.results]) or 1
        return self._end(results)

    def rehearse(self) -> int:
        """Run all parts within their limits, and check that all to carry is here. Return the exit status."""
        missing = gpu_bundle.missing()
        for name in missing:
            print(f"to be carried, and not here: {name}")
        results: list[dict[str, Any]] = []
        try:
            self._rehearse_into(results)
        except InterruptedRunError as interrupted:
            return self._end([*results, *interrupted.results]) or 1
        return self._end(results) or int(bool(missing))

    def _rehearse_into(self, results: list[dict[str, Any]]) -> None:
        results += self._look(MACHINE.seconds)
        self._report["machine"] = results[0].get("facts", {})
        for command in COMMANDS:
            parts = [part for part in PARTS if part.command == command]
            if (sum_ := sum(part.seconds for part in (MACHINE, *parts))) > MINUTES * 60:
                raise SystemExit(
                    f"the parts of command {command} take {sum_:.0f} s, and it has {MINUTES} minutes"
                )
            results += run_parts(parts, self._setup, self._environment, sum_, self._note_after(*results))
        results += run_again(results, self._setup, self._environment, AGAIN_SECONDS + WATCHED_SECONDS)

    def _wants(self, part: Part) -> bool:
        if self._options.only is not None:
            return part.name in self._options.only
        return part.command == (self._options.command or COMMANDS[0])

    def _look(self, seconds: float) -> list[dict[str, Any]]:
        return run_parts((MACHINE,), self._setup, self._environment, max(min(MACHINE.seconds, seconds), 1.0))

    def _continue(self, facts: Mapping[str, Any]) -> None:
        """Keep what an earlier command of the same check has found."""
        self._report["machine"] = facts
        with suppress(OSError, ValueError):
            old = json.loads((self._output / f"{self._name}.json").read_text())
            same = all(old[name] == self._report[name] for name in ("format", "device", "shape", "commit"))
            if same and old["machine"].get("GPU") == facts.get("GPU") and self._options.command is not None:
                self._before = [part for part in old["parts"] if part["part"] != MACHINE.name]

    def _note_after(self, *before: Mapping[str, Any]) -> Note:
        return lambda results: self._write([*before, *results])

    def _write(self, results: Sequence[Mapping[str, Any]]) -> None:
        now_run = {result["part"] for result in results}
        parts = [*results, *(part for part in self._before if part["part"] not in now_run)]
        ok = all(map(held, parts)) and any(part["checks"] for part in parts)
        self._report |= {"parts": parts, "ok": ok, "seconds": time.monotonic() - self._started}
        for name, text in (("json", json.dumps(self._report, indent=1) + "\n"), ("md", page(self._report))):
            part = self._output / f"{self._name}.{name}.part"
            part.write_text(text)
            part.replace(self._output / f"{self._name}.{name}")

    def _end(self, results: Sequence[Mapping[str, Any]]) -> int:
        self._write(results)
        _keep_logs(self._folder, self._output / f"{self._name}-logs.tar.gz")
        cache = self._folder / "triton"
        size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        if self._setup["device"] == "cuda" and size > 0:
            file = self._output / f"{self._name}-triton.tar.gz"
            with tarfile.open(file, "w:gz") as tar:
                tar.add(cache, "triton")
            if file.stat().st_size > CARRIED_BYTES:
                file.unlink()
        page_file = self._output / f"{self._name}.md"
        print(page_file.read_text())
        holds = self._report["ok"]
        print(f"{'All of it holds.' if holds else 'Not all of it holds.'} {page_file}")
        return 0 if holds else 1


def _without_gpu(looked: Mapping[str, Any]) -> int:
    facts = looked.get("facts", {})
    print(looked.get("log", ""), file=sys.stderr)
    said = (looked.get("log") or looked["error"]).strip().splitlines() or ["interrupted"]
    if "no GPU" in facts:
        print(f"There is no GPU here that can be used: {facts['no GPU']}")
    else:
        print(f"Whether there is a GPU here could not be seen: {said[-1]}")
    print(gpu_bundle.advice())
    return 1


def _keep_logs(folder: Path, file: Path) -> None:
    """Write the parts' logs and findings into one file."""
    with tarfile.open(file, "w:gz") as tar:
        parts = ("*", "again/*", "watched/*")
        for pattern in (f"{part}/{name}" for part in parts for name in ("log", "*.log", "*.json", "code/*")):
            for path in sorted(folder.glob(pattern)):
                if path.stat().st_size <= LOGGED_BYTES:
                    tar.add(path, path.relative_to(folder))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
