"""Servers started for a measurement, in a process group of their own that always ends with it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import FrameType

from bench.stream import request

ONEBASE = (sys.executable, "-P", "-m", "onebase.cli")


class StartError(Exception):
    """A process did not come up; the message ends with the last lines of its log."""


def free_port() -> int:
    """Return a TCP port on the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_on_signals() -> None:
    """Turn SIGTERM and SIGHUP into SystemExit, so that `finally` blocks stop what was started.

    Once it ends, further signals do not disturb it: Ctrl-C reaches a benchmark and who has started it.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def leave(number: int, _frame: FrameType | None) -> None:
        for one in numbers:
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    for number in numbers:
        signal.signal(number, leave)


def inherited() -> dict[str, str]:
    """Return this process's environment without OMP_WAIT_POLICY, so that threads of every target wait as they
    do by default. Where it is `passive`, llama.cpp takes three times as long for a token."""
    return {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}


@asynccontextmanager
async def server(
    command: list[str],
    ready_url: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 300.0,
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """Run `command` until the block ends; enter it once `ready_url` answers 200.

    log: gets stdout and stderr. env: added to this process's own environment. timeout: seconds until the
    start counts as failed.

    Raises:
        StartError: the process ended, or was not ready in time.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**inherited(), **(env or {})},
            start_new_session=True,
        )
    try:
        await _wait_ready(process, ready_url, log, timeout)
        yield process
    finally:
        stop_group(process)


@asynccontextmanager
async def onebase_server(
    log: Path, *options: object, timeout: float = 300.0
) -> AsyncIterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run `onebase serve`, as installed in this Python, on a free port; yield its URL and process."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [*ONEBASE, "serve", "--port", str(port), *map(str, options)]
    async with server(command, f"{url}/ready", log, timeout=timeout) as process:
        yield url, process


def make_key(data: Path, tenant: str) -> str:
    """Return a new key of a tenant, for a server on that data folder, with all scopes but `admin`."""
    command = [*ONEBASE, "keys", "create", "--tenant", tenant]
    command += ["--scope", "generate,adapters,train", "--data-dir", str(data)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return next(word for word in done.stdout.split() if word.startswith("ob"))


async def _wait_ready(process: subprocess.Popen[bytes], url: str, log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StartError(f"{process.args!r} ended with {process.returncode}:\n{tail(log)}")
        with suppress(OSError, EOFError, TimeoutError):
            async with asyncio.timeout(5), request(url) as response:
                if response.status == 200:
                    return
        await asyncio.sleep(0.5)
    raise StartError(f"{process.args!r} was not ready after {timeout:.0f} s:\n{tail(log)}")


def stop_group(process: subprocess.Popen[bytes], grace: float = 20.0) -> None:
    """Send SIGTERM to the process; after `grace` seconds, or once it is gone, SIGKILL to its whole group."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process, its threads' too but not its children's, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
