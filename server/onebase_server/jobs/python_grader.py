"""Process that runs one grader's Python, confined, and grades one reply after the other.

The api sends the source, and then each reply, as JSON in the frames of `processes.helper`; each is answered
once. What the grader prints goes nowhere. The command is `python -P -m onebase_server.jobs.python_grader
[--unconfined]`.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import sys
from typing import Any, BinaryIO

from onebase_adapters.hub.confinement import confine_code, limit_memory

MEMORY_BYTES = 256 << 20
"""Memory that a grader may take, in bytes."""
_UNCONFINED = "--unconfined"
_LONGEST = 500
_HEADER = 8
_END_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl."""


def main() -> None:
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())
    sys.setrecursionlimit(2000)
    ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL, 0, 0, 0)  # a thread would not be confined
    _write(answers, b"")
    source = _read(calls)["source"]
    try:
        if _UNCONFINED in sys.argv:
            limit_memory((1 << 30) + MEMORY_BYTES)
        else:
            confine_code(MEMORY_BYTES)
    except Exception as error:
        _say(answers, {"confinement": str(error)})
        return
    names: dict[str, Any] = {"__name__": "grader"}
    try:
        exec(compile(source, "grader", "exec"), names)  # noqa: S102 - for this the process is confined
    except BaseException as error:
        _say(answers, {"error": _short(error)})
        return
    _say(answers, {})
    while True:
        asked = _read(calls)
        try:
            answer: dict[str, Any] = {"reward": _number(names["grade"](asked["sample"], asked["item"]))}
        except BaseException as error:
            answer = {"error": _short(error)}
        _say(answers, answer)


def _read(calls: BinaryIO) -> Any:
    """Return the next call; without one the process ends."""
    header = calls.read(_HEADER)
    if len(header) < _HEADER:
        sys.exit()
    return json.loads(calls.read(int.from_bytes(header)))


def _number(value: Any) -> float:
    """Return a grader's reward as a number. Raises TypeError, ValueError."""
    if not isinstance(value, int | float):
        raise TypeError(f"grade returned {type(value).__name__}: return a number")
    if not math.isfinite(value):
        raise ValueError(f"grade returned {value}: return a finite number")
    return float(value)


def _short(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:_LONGEST]
    except BaseException:  # what a grader raises is its own
        return "the grader failed"


def _say(answers: BinaryIO, answer: dict[str, Any]) -> None:
    _write(answers, json.dumps(answer).encode())


def _write(answers: BinaryIO, data: bytes) -> None:
    answers.write(len(data).to_bytes(_HEADER) + data)
    answers.flush()


if __name__ == "__main__":
    main()
