"""Functions that run in a process of their own, whose memory goes when it ends. The standard library alone.

  python -m bench.worker MODULE:FUNCTION KEYWORDS

The function gets the keywords, a JSON object, and returns its answer, or what answers each line of JSON on
stdin. Answers are lines of JSON on the stdout that the process was started with; whatever else is printed
goes to stderr.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.processes import StartError, inherited, tail

HERE = Path(__file__).parents[1]
LINE = 1 << 24
"""Largest answer, in bytes."""


def _command(python: Path | str, function: str, keywords: Mapping[str, Any]) -> list[str]:
    return [str(python), "-m", "bench.worker", function, json.dumps(keywords)]


def _environment(env: Mapping[str, str] | None) -> dict[str, str]:
    whole = inherited() if env is None else dict(env)
    paths = [str(HERE), *filter(None, [whole.get("PYTHONPATH")])]
    return {**whole, "PYTHONPATH": os.pathsep.join(paths)}


def call(
    function: str,
    keywords: Mapping[str, Any],
    log: Path,
    timeout: float,
    python: Path | str = sys.executable,
    env: Mapping[str, str] | None = None,
) -> Any:
    """Return the answer of a function, given in a process of its own. Raises StartError if there is none.

    env: added to this process's own environment.
    """
    command = _command(python, function, keywords)
    everything = _environment({**inherited(), **(env or {})})
    with log.open("wb") as errors:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=errors, env=everything, timeout=timeout, check=True
            )
            return json.loads(done.stdout.splitlines()[-1])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            raise StartError(f"{function} failed: {error}\n{tail(log)}") from error


@dataclass(frozen=True)
class Worker:
    """A function's process that answers line by line."""

    process: asyncio.subprocess.Process

    async def ask(self, message: Any) -> Any:
        """Return the answer to a message. Raises EOFError if the process has ended."""
        if self.process.stdin is not None:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            await self.process.stdin.drain()
        return await self.answer()

    async def answer(self) -> Any:
        line = b"" if self.process.stdout is None else await self.process.stdout.readline()
        if not line:
            raise EOFError("the worker ended")
        return json.loads(line)


@asynccontextmanager
async def started(
    function: str,
    keywords: Mapping[str, Any],
    log: Path,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    seconds: float = 300.0,
) -> AsyncIterator[Worker]:
    """Run a function in a process until the block ends. Raises StartError if it does not come up in time.

    env: the whole environment; by default this process's own.
    """
    pipe = asyncio.subprocess.PIPE
    command = _command(sys.executable, function, keywords)
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=pipe,
            stdout=pipe,
            stderr=errors,
            limit=LINE,
            env=_environment(env),
            pass_fds=pass_fds,
        )
    worker = Worker(process)
    try:
        try:
            await asyncio.wait_for(worker.answer(), seconds)
        except (EOFError, TimeoutError) as error:
            raise StartError(f"{function} did not start:\n{tail(log)}") from error
        yield worker
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def main() -> None:
    function, keywords = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module, _, name = function.partition(":")
    answer = getattr(importlib.import_module(module), name)(**json.loads(keywords))
    if not callable(answer):
        print(json.dumps(answer), file=answers)
        return
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
