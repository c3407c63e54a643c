"""A grader in Python harms nothing but its own reply, whatever it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from onebase_adapters.hub.confinement import can_confine_code
from onebase_server.jobs import grading
from onebase_server.jobs.grading import PythonProcess
from onebase_training.graders import Graded, GradingError

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
    thread.join(30)
    assert failed == ["python_grader_runtime_error"]
