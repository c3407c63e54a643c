"""A helper process is held to its limits, whatever it writes."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from onebase_server.processes.helper import HelperProcess, TookTooMuchError

START = (
    "import sys, time; say = lambda data: (sys.stdout.buffer.write(data), sys.stdout.flush()); say(bytes(8));"
)
DRIP = "sys.stdin.buffer.read(9); say((60_000).to_bytes(8));"


@pytest.fixture
def helper() -> Iterator[HelperProcess]:
    helper = HelperProcess()
    yield helper
    helper.kill()


def started(helper: HelperProcess, code: str) -> HelperProcess:
    helper.start([sys.executable, "-c", START + code])
    return helper


def test_a_process_that_writes_a_byte_now_and_then_is_held_to_its_processor_time(
    helper: HelperProcess,
) -> None:
    busy = """
while True:
    say(b'x')
    end = time.process_time() + 0.03
    while time.process_time() < end: pass
"""
    with pytest.raises(TookTooMuchError):
        started(helper, DRIP + busy).call(b"?", 600.0, cpu_seconds=0.3)
    assert helper.process is None


def test_and_to_the_time_of_its_call(helper: HelperProcess) -> None:
    with pytest.raises(TimeoutError):
        started(helper, DRIP + "\nwhile True: say(b'x'); time.sleep(0.02)").call(b"?", 0.5)


def test_a_process_that_writes_more_than_one_answer_is_ended(helper: HelperProcess) -> None:
    twice = "sys.stdin.buffer.read(9); say(((1).to_bytes(8) + b'a') * 2); time.sleep(600)"
    with pytest.raises(ValueError, match="more than an answer"):
        started(helper, twice).call(b"?", 600.0)
    assert started(helper, "sys.stdin.buffer.read(9); say((1).to_bytes(8) + b'b')").call(b"?", 600.0) == b"b"
