"""Findings of a part of the GPU check, and the page made of all of them. The standard library alone."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOT_BUILT = "not built"
SANITIZER = "compute-sanitizer"
"""NVIDIA's program that watches each access to memory of what it runs."""
_SANITIZER_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
_CODE_BYTES = 1 << 20
"""Largest size, in bytes, of a file of code of a kernel that is kept."""
_ASKED = {
    "driver": "driver_version",
    "clock of the multiprocessors": "clocks.sm",
    "clock of the memory": "clocks.mem",
    "power limit": "power.limit",
    "temperature": "temperature.gpu",
    "reasons for a lower clock": "clocks_throttle_reasons.active",
}
"""Fields that nvidia-smi is queried for, by the name that the report gives them."""


class NotHereError(Exception):
    """This machine has nothing to measure a part on; the message says what is missing."""


@dataclass(frozen=True)
class Setup:
    """Input of a part. `folder`: a folder of its own for files."""

    device: str
    shape: str
    folder: Path

    @property
    def interpreted(self) -> bool:
        """Return True if Triton's kernels run under its interpreter: nothing that is timed means anything."""
        return self.device == "cpu"


class Findings:
    """Written to a file after each finding: what a part has found stays, however it ends."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._found: dict[str, Any] = {"state": "", "error": "", "figures": [], "checks": [], "tables": []}
        self.launches = LastLaunches()

    def figure(self, name: str, value: float | str, unit: str = "") -> None:
        """Note one number, or words where there is none (`NOT_BUILT`)."""
        self._found["figures"].append({"name": name, "value": value, "unit": unit})
        self._write()

    def check(self, name: str, held: bool, detail: str = "") -> None:
        """Note something that must hold. The part goes on."""
        self._found["checks"].append({"name": name, "held": bool(held), "detail": detail})
        print(f"{'holds' if held else 'FAILS'}: {name} {detail}", flush=True)
        self._write()

    def table(self, title: str, headings: Sequence[str]) -> Callable[..., None]:
        """Begin a table; return what adds a row to it."""
        table: dict[str, Any] = {"title": title, "headings": list(headings), "rows": []}
        self._found["tables"].append(table)

        def add(*cells: float | str | None) -> None:
            table["rows"].append(list(cells))
            self._write()

        return add

    def fact(self, name: str, value: Any) -> None:
        """Note something of the machine."""
        self._found.setdefault("facts", {})[name] = value
        self._write()

    def stage(self, title: str) -> None:
        """Note what is done now, which the report of a part that is cut off ends with."""
        self._found["stage"] = title
        self._write()

    def raised(self, title: str) -> None:
        """Note the exception that is handled, whole, and the code of the kernels that were launched last."""
        traceback.print_exc()
        text = traceback.format_exc()[-12000:]
        self._found.setdefault("tracebacks", []).append({"title": title, "text": text})
        if self.launches.names:
            self.figure("kernels that were launched last", ", ".join(self.launches.names))
            keep_code(self.launches.names, self._file.parent / "code")
        self._write()

    def end(self, state: str, error: str = "") -> None:
        self._found |= {"state": state, "error": error}
        self._write()

    def _write(self) -> None:
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps(self._found))
        part.replace(self._file)

    def trying(self, title: str, function: Callable[..., Any], *given: Any) -> None:
        """Do one of several things; where it raises, that is a finding, and the others are done."""
        self.stage(title)
        try:
            function(*given)
        except Exception as error:
            self.raised(title)
            self.check(f"{title} can be measured", False, f"{type(error).__name__}: {error}"[:500])


class Said(logging.Handler):
    """Keeps the first lines of each level that the engine logs: which fusions, captures and kernels it does
    without, and why."""

    MOST = 60

    def __init__(self, findings: Findings) -> None:
        super().__init__(logging.INFO)
        self._add: Callable[..., None] | None = None
        self._findings = findings
        self._counts: Counter[int] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        self._counts[record.levelno] += 1
        if self._counts[record.levelno] <= self.MOST:
            self._add = self._add or self._findings.table("What the engine logged", ("level", "line"))
            self._add(record.levelname.lower(), record.getMessage()[:300])


def driver_state() -> dict[str, str]:
    """Return what the driver says of the GPU now."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_ASKED.values())}", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        return dict(zip(_ASKED, (one.strip() for one in said.split(",")), strict=False))
    return {"driver": "unknown"}


def keep_code(kernels: Iterable[str], folder: Path) -> None:
    """Copy the code of all forms of kernels, as far as Triton's cache has it, into a folder."""
    cache = Path(os.environ.get("TRITON_CACHE_DIR", "~/.triton/cache")).expanduser()
    for name in set(kernels):
        for suffix in ("ttgir", "ptx"):
            for file in cache.glob(f"*/{name}.{suffix}"):
                if file.stat().st_size <= _CODE_BYTES:
                    folder.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, folder / f"{name}-{file.parent.name[:12]}.{suffix}")


def find_sanitizer() -> str | None:
    """Return the path of compute-sanitizer: by PATH, or where CUDA's toolkit has it; None where it is not."""
    return shutil.which(SANITIZER) or shutil.which(SANITIZER, path=os.pathsep.join(_SANITIZER_PLACES))


def sanitizer_command(program: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the command, and the variables, by which a process runs under compute-sanitizer.

    Each tensor is an allocation of its own there, since what lies in a large block of PyTorch's is all within
    bounds; no pass can be captured then, which is no error.
    """
    command = program, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"
    return command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_DISABLE_LINE_INFO": "0"}


def sanitizer_findings(log: Path, most: int = 12) -> list[str]:
    """Return the first lines in which compute-sanitizer says what is wrong."""
    with contextlib.suppress(OSError):
        lines = [
            line.lstrip("= ")
            for line in log.read_text(errors="replace").splitlines()
            if line.startswith("=========")
        ]
        quiet = "COMPUTE-SANITIZER", "ERROR SUMMARY: 0 errors", "Target application"
        return [line for line in lines if line and not line.startswith(quiet)][:most]
    return []


class LastLaunches:
    """Names of the kernels that Triton launched last, the newest at the end."""

    def __init__(self, most: int = 8) -> None:
        self.names: deque[str] = deque(maxlen=most)

    def watch(self) -> None:
        """Note each launch from now on, which costs time."""
        import triton

        # A chain of hooks from Triton 3.5 on, one hook before.
        hook: Any = triton.knobs.runtime.launch_enter_hook
        if hasattr(hook, "add"):
            hook.add(self.note)
        else:
            triton.knobs.runtime.launch_enter_hook = self.note

    def note(self, metadata: Any) -> None:
        told = metadata.get() if hasattr(metadata, "get") else metadata
        self.names.append(str(told["name"]))


PartFunction = Callable[[Setup, Findings], None]


def run_part(parts: Mapping[str, PartFunction], arguments: Sequence[str]) -> int:
    """Run a part in this process. arguments: its name, the file for its findings, its setup as JSON."""
    name, file, setup = arguments
    findings = Findings(Path(file))
    told = json.loads(setup)
    if os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":
        # An error then belongs to the launch before it.
        with contextlib.suppress(ImportError, AttributeError):
            findings.launches.watch()
    engine = logging.getLogger("onebase_engine")
    engine.addHandler(Said(findings))
    engine.setLevel(logging.INFO)
    try:
        parts[name](Setup(told["device"], told["shape"], Path(told["folder"])), findings)
    except NotHereError as missing:
        findings.end("skipped", str(missing))
        return 0
    except BaseException as error:
        findings.raised(name)
        findings.end("failed", f"{type(error).__name__}: {error}"[:2000])
        return 1
    if told["device"] == "cuda":
        findings.figure("the GPU at the end", ", ".join(f"{n} {v}" for n, v in driver_state().items()))
    findings.end("ok")
    # What libraries do at their end, with processes and contexts that are gone, is nobody's finding.
    os._exit(0)


# ---- the page ------------------------------------------------------------------------------------


def held(result: Mapping[str, Any]) -> bool:
    """Return True if a part ran to its end, or had nothing to run on, and all that it checked holds."""
    return result["state"] in ("ok", "skipped") and all(check["held"] for check in result["checks"])


def page(report: Mapping[str, Any]) -> str:
    """Return the report in Markdown."""
    facts = report["machine"]
    lines = [
        "# GPU check",
        "",
        f"**{'Everything that was checked holds.' if report['ok'] else 'Not everything holds.'}** "
        f"Shape {report['shape']}, device {report['device']}, {report['began']}, {report['seconds']:.0f} s, "
        f"commit {report['commit']}.",
        "",
        "; ".join(f"{name} {value}" for name, value in facts.items()) + ".",
        "",
    ]
    if report["device"] == "cpu":
        lines += ["Triton's kernels ran under its interpreter: no time in this report means anything.", ""]
    lines += ["| part | | s | checks | |", "| --- | --- | ---: | ---: | --- |"]
    for part in report["parts"]:
        good = sum(check["held"] for check in part["checks"])
        said = _cell(part["error"].partition("\n")[0][:200])
        cells = part["title"], part["state"], f"{part['seconds']:.0f}", f"{good}/{len(part['checks'])}", said
        lines.append(f"| {' | '.join(cells)} |")
    for part in report["parts"]:
        lines += _part(part)
    return "\n".join(lines) + "\n"


def _part(part: Mapping[str, Any]) -> list[str]:
    wrong = [check for check in part["checks"] if not check["held"]]
    tracebacks = part.get("tracebacks", ())
    if not (part["figures"] or part["tables"] or wrong or tracebacks or part.get("log")):
        return []
    lines = ["", f"## {part['title']}"]
    lines += ["", *(f"- FAILS: {check['name']} {_cell(check['detail'])}" for check in wrong)] if wrong else []
    if part["figures"]:
        lines += ["", "| | |", "| --- | ---: |"]
        lines += [f"| {one['name']} | {shown(one['value'])} {one['unit']} |" for one in part["figures"]]
    for table in part["tables"]:
        headings = table["headings"]
        lines += ["", f"{table['title']}:", "", f"| {' | '.join(headings)} |"]
        lines.append(f"| --- |{' ---: |' * (len(headings) - 1)}")
        lines += [f"| {' | '.join(_cell(shown(cell)) for cell in row)} |" for row in table["rows"]]
    for one in tracebacks:
        lines += ["", f"{one['title']}:", "", "```", *one["text"].splitlines(), "```"]
    if part.get("log"):
        lines += ["", "```", *part["log"].splitlines(), "```"]
    return lines


def shown(value: float | str | None) -> str:
    """Return a cell of a table: three digits, or what it says."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if value == int(value) or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M")
