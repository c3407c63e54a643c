"""A grader in Python harms nothing but its own reply, whatever it does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onebase_adapters.hub import confinement
from onebase_adapters.hub.confinement import PROCESSOR_SECONDS, can_confine_code
from onebase_server.jobs import grading
from onebase_server.jobs.grading import PythonProcess
from onebase_training.graders import Graded, GradingError

from .support import PATIENCE

pytestmark = pytest.mark.skipif(not can_confine_code(), reason="the kernel has no Landlock or no seccomp")
GRADED = Graded("one two", {"words": 2})
Start = Callable[[str], PythonProcess]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setattr(grading, "CALL_SECONDS", 1.0)
    made: list[PythonProcess] = []

    def of(body: str) -> PythonProcess:
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        made.append(PythonProcess(f"def grade(sample, item):\n{lines}"))
        return made[-1]

    yield of
    for process in made:
        process.close()


def test_a_grader_reads_the_reply_and_its_row(start: Start) -> None:
    process = start("return float(len(sample['output_text'].split()) == item['words'])")
    assert [process.grade(GRADED), process.grade(Graded("one", {"words": 2}))] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("while True: pass", "more than 1 s of a processor"),
        ("return bytearray(1 << 30)", "MemoryError"),
        ("import os; return os.fork()", "PermissionError"),
        ("import socket; socket.create_connection(('127.0.0.1', 80))", "PermissionError"),
        ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
        ("import threading; threading.Thread(target=print).start()", "RuntimeError"),
        ("return float('nan')", "return a finite number"),
        ("return 'good'", "return a number"),
        ("return 1 / 0", "ZeroDivisionError"),
        ("def more(): return more()\nreturn more()", "RecursionError"),
        ("import os; os._exit(0)", "its process ended"),
        ("raise SystemExit", "SystemExit"),
    ],
)
def test_what_a_grader_may_not_do_fails_one_reply_and_the_next_is_graded(
    start: Start, body: str, reason: str
) -> None:
    process = start(f"if item.get('good'): return 1.0\n{body}")
    with pytest.raises(GradingError) as caught:
        process.grade(GRADED)
    assert caught.value.flag == "python_grader_runtime_error"
    assert reason in caught.value.detail
    assert process.grade(Graded("x", {"good": True})) == 1.0


def test_a_grader_that_prints_without_end_is_stopped_by_its_time(start: Start) -> None:
    process = start("while True: print('x' * 10_000)")
    with pytest.raises(GradingError, match="of a processor"):
        process.grade(GRADED)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/proc/1/environ", "/proc/self/environ", "/tmp", __file__.replace(".py", ".json")]
)
def test_a_grader_reads_no_file_of_the_server(start: Start, path: str) -> None:
    process = start(
        f"import os\nreturn len(os.listdir({path!r}) if os.path.isdir({path!r}) else open({path!r}).read())"
    )
    with pytest.raises(GradingError, match=r"PermissionError|FileNotFoundError"):
        process.grade(GRADED)


def test_a_grader_writes_no_file(start: Start, tmp_path: object) -> None:
    process = start(f"open('{tmp_path}/new', 'w')")
    with pytest.raises(GradingError, match="PermissionError"):
        process.grade(GRADED)


def test_a_grader_sees_no_variables_of_the_server(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    assert start("import os\nreturn float('SECRET' in os.environ)").grade(GRADED) == 0.0


def test_closing_ends_a_grader_that_hangs(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(grading, "CALL_SECONDS", 600.0)
    process = start("while True: pass")
    failed: list[str] = []

    def call() -> None:
        try:
            process.grade(GRADED)
        except GradingError as error:
            failed.append(error.flag)

    thread = threading.Thread(target=call)
    thread.start()
    while process._helper.process is None:
        time.sleep(0.01)
    time.sleep(0.5)
    process.close()
    thread.join(PATIENCE)
    assert failed == ["python_grader_runtime_error"]


_CALL = """import ctypes
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(*map(ctypes.c_long, {call})) >= 0 or ctypes.get_errno() != 1:
    return 0.0
return 1.0
"""


_NUMBERS = {
    "prctl": 157, "setrlimit": 160, "inotify_init1": 294, "fanotify_init": 300, "setuid": 105,
    "clock_settime": 227, "swapoff": 168, "init_module": 175, "iopl": 172, "shmat": 30, "mount_setattr": 442,
    "pipe2": 293, "ioctl": 16, "open_by_handle_at": 304, "getpid of another ABI": 0x40000027,
}  # fmt: skip


@pytest.mark.parametrize("name", _NUMBERS)
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are of another machine")
def test_the_kernel_refuses_a_grader_calls_that_computing_does_not_need(start: Start, name: str) -> None:
    assert start(_CALL.format(call=[_NUMBERS[name], 1, 0, 0, 0, 0])).grade(GRADED) == 1.0


def test_a_grader_signals_no_process_by_its_open_files_where_landlock_knows_no_signals() -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        code = (
            "import fcntl, os\n"
            "from onebase_adapters.hub import confinement\n"
            "confinement._SCOPES = 0\n"
            "read, write = os.pipe()\n"
            "confinement.confine_code(256 << 20)\n"
            f"for command, value in ((fcntl.F_SETOWN, {other.pid}), (10, 9), (fcntl.F_SETFL, os.O_ASYNC)):\n"
            "    try:\n"
            "        fcntl.fcntl(read, command, value)\n"
            "    except PermissionError:\n"
            "        print('refused')\n"
            "os.write(write, b'x')\n"
        )
        try:
            command = [sys.executable, "-c", code]
            found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
            assert found.stdout.split() == ["refused"] * 3
            with pytest.raises(subprocess.TimeoutExpired):
                other.wait(0.3)
        finally:
            other.kill()


def test_a_grader_has_a_hard_limit_of_processor_time_and_no_capability(start: Start) -> None:
    process = start("return 1.0")
    process.grade(GRADED)
    assert process._helper.process is not None
    folder = Path(f"/proc/{process._helper.process.pid}")
    (limit,) = [line for line in (folder / "limits").read_text().splitlines() if "cpu time" in line]
    assert limit.split()[3:5] == [str(PROCESSOR_SECONDS)] * 2
    status = dict(
        line.split(":\t", 1) for line in (folder / "status").read_text().splitlines() if ":\t" in line
    )
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0


def test_a_grader_reads_nothing_by_the_path_of_modules(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", "") + os.pathsep)
    with pytest.raises(GradingError, match="PermissionError"):
        start(f"return len(open({str(tmp_path / 'secret')!r}).read())").grade(GRADED)


def test_an_empty_entry_of_the_path_of_modules_opens_no_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep)
    monkeypatch.setattr(sys, "path", [*sys.path, "", str(tmp_path)])
    assert tmp_path not in confinement._python()
    assert Path() not in confinement._python()


def test_a_filter_that_the_kernel_does_not_apply_is_noticed() -> None:
    code = (
        "from onebase_adapters.hub import confinement\n"
        "confinement._REFUSE = confinement._ALLOW\n"
        "try:\n"
        "    confinement.confine_code(256 << 20)\n"
        "except confinement.ConfinementError as error:\n"
        "    print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "does not apply it" in found.stdout


def test_a_grader_has_the_standard_library(start: Start) -> None:
    body = (
        "import collections, ctypes, datetime, decimal, difflib, fractions, random, sqlite3, zoneinfo\n"
        "return float(datetime.datetime.now(zoneinfo.ZoneInfo('UTC')).year > 2000)"
    )
    assert start(body).grade(GRADED) == 1.0


def test_a_process_that_has_computed_for_long_is_replaced_between_two_replies(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grading, "PROCESS_SECONDS", 0.0)
    process = start("return 1.0")
    process.grade(GRADED)
    first = process._helper.process
    assert process.grade(GRADED) == 1.0
    assert process._helper.process is not first
