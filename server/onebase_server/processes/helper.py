"""A process that answers one call at a time, and is killed and replaced when it takes too long or too much.

It does what would hold up every thread of the api, or what only a process of its own can be kept from. A call
and its answer are frames: eight bytes of length, most significant first, and so many bytes. `serve_calls` is
the process's side.
"""

from __future__ import annotations

import os
import select
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from onebase_engine.environment import computing_environment
from onebase_engine.machine import BESIDE_SERVING, count_seconds, step_aside

_LOOK_SECONDS = 0.1
_START_SECONDS = 60.0
"""Longest time until a new process is ready."""
_MOST_BYTES = 32 << 20
"""Largest answer, in bytes, unless a caller says otherwise."""
_HEADER = 8


class TookTooMuchError(Exception):
    """A call used more processor time than it may."""


class HelperProcess:
    """The process, started when it is first needed. Not thread-safe: one call at a time.

    `seconds` is the processor time of the last call, which also counts as the calling thread's.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.seconds = 0.0

    def start(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Start the process unless it runs, and wait until it is ready. Raises OSError, ValueError.

        environment: all of its variables; None: those of this process.
        """
        if self.process is not None and self.process.poll() is None:
            return
        self.kill()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=computing_environment() if environment is None else environment,
            bufsize=0,
        )
        step_aside(self.process.pid, BESIDE_SERVING)
        try:
            _exchange(self.process, b"", _START_SECONDS)
        except BaseException:
            self.kill()
            raise

    def call(
        self,
        data: bytes,
        seconds: float,
        *,
        cpu_seconds: float = float("inf"),
        most_bytes: int = _MOST_BYTES,
    ) -> bytes:
        """Return the answer of the process, which `start` has started. When it fails, the process is killed.

        Args:
            seconds: longest time of a call that gets no processor.
            cpu_seconds: processor time that the call may use, in seconds.
            most_bytes: largest answer.

        Raises:
            TookTooMuchError: the call used more processor time.
            TimeoutError: there was no answer within `seconds`.
            ValueError: the answer is larger.
            OSError: the process has ended.
        """
        process = self.process
        if process is None:
            raise OSError("it was not started")
        before = _cpu_seconds(process.pid)
        try:
            try:
                return _exchange(
                    process, len(data).to_bytes(_HEADER) + data, seconds, cpu_seconds, most_bytes
                )
            finally:
                self.seconds = _cpu_seconds(process.pid) - before
                count_seconds(self.seconds)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def _exchange(
    process: subprocess.Popen[bytes],
    call: bytes,
    seconds: float,
    cpu_seconds: float = float("inf"),
    most_bytes: int = _MOST_BYTES,
) -> bytes:
    if process.stdin is None or process.stdout is None:
        raise OSError("it has no pipes")
    looked, before = time.monotonic(), _cpu_seconds(process.pid)
    until = looked + seconds
    found, length = bytearray(), _HEADER
    left = memoryview(call)
    os.set_blocking(process.stdin.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if left:
            selector.register(process.stdin, selectors.EVENT_WRITE)
        while len(found) < length:
            ready = selector.select(_LOOK_SECONDS)
            if (now := time.monotonic()) - looked >= _LOOK_SECONDS:  # it may write a byte now and then
                looked = now
                if _cpu_seconds(process.pid) - before > cpu_seconds:
                    raise TookTooMuchError
                if now > until:
                    raise TimeoutError(f"it did not answer within {seconds:g} s")
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    left = left[os.write(process.stdin.fileno(), left[: 1 << 16]) :]
                    if not left:
                        selector.unregister(process.stdin)
                    continue
                data = os.read(process.stdout.fileno(), 1 << 20)
                found += data
                if not data:
                    raise BrokenPipeError("it took too much memory, or failed")
                if len(found) >= _HEADER:
                    length = _HEADER + int.from_bytes(found[:_HEADER])
                if length - _HEADER > most_bytes:
                    raise ValueError(f"it writes more than {most_bytes} bytes")
    if len(found) > length:
        raise ValueError("it writes more than an answer")
    return bytes(found[_HEADER:])


def _cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used, in seconds; 0 if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- the process -------------------------------------------------------------------------------------


def take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Return the pipes of calls and answers. What anything prints from now on goes nowhere."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return sys.stdin.buffer, answers


def serve_calls(calls: BinaryIO, answers: BinaryIO, answer: Callable[[bytes], bytes]) -> None:
    """Say that the process is ready, and answer calls until the api closes its pipe, whatever is computed."""
    threading.Thread(target=_end_with_parent, args=(calls.fileno(),), daemon=True).start()
    _write(answers, b"")
    while header := calls.read(_HEADER):
        _write(answers, answer(calls.read(int.from_bytes(header))))


def _write(answers: BinaryIO, data: bytes) -> None:
    answers.write(len(data).to_bytes(_HEADER) + data)
    answers.flush()


def _end_with_parent(calls: int) -> None:
    pipe = select.poll()
    pipe.register(calls, 0)  # a pipe without a writer is reported anyway
    pipe.poll()
    os._exit(1)
