"""The api's side of a child process: how it is started, talked to and ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from onebase_engine.engine.messages import FrameReader, ToEngine, encode
from onebase_engine.environment import computing_environment
from onebase_engine.machine import step_aside

ENGINE_COMMAND = (sys.executable, "-m", "onebase_server.processes", "engine")
DEATH_SECONDS = 2.0
"""Time, in seconds, within which a killed process is gone, unless the system holds it."""
_LOOKS = 10
"""Largest number of looks for child processes, of which the last one is to find none that is new."""

Received = TypeVar("Received")

_log = logging.getLogger(__name__)


class _Frames(asyncio.Protocol, Generic[Received]):
    """Decodes what arrives, in the event loop, and hands over each message with a plain call."""

    def __init__(
        self,
        decoder: msgspec.msgpack.Decoder[Received],
        on_message: Callable[[Received], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._frames = FrameReader()
        self._decoder = decoder
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            payloads = self._frames.feed(data)
            messages = [self._decoder.decode(payload) for payload in payloads]
        except (ValueError, msgspec.DecodeError) as error:
            _log.error("a child process sent something that is no message: %s", error)
            if self._transport is not None:
                self._transport.close()
            return
        for message in messages:
            self._on_message(message)

    def connection_lost(self, error: Exception | None) -> None:
        self._on_lost()


class ChildProcess:
    """A running child. Made by `spawn`; ended by `end` or by its own death."""

    def __init__(self, process: asyncio.subprocess.Process, transport: asyncio.WriteTransport) -> None:
        self._process = process
        self._transport = transport

    @classmethod
    async def spawn(
        cls,
        command: Sequence[str],
        decoder: msgspec.msgpack.Decoder[Received],
        on_message: Callable[[Received], None],
        on_lost: Callable[[], None],
        fds: Mapping[str, int] | None = None,
        environment: Mapping[str, str] | None = None,
        niceness: int = 0,
    ) -> ChildProcess:
        """Start the command with `--fd N`, one end of a socket pair, and an option for each of `fds`.

        `fds` maps an option's name (`--base-fd`) to a file descriptor that the child inherits.
        `environment` is added to what the child gets of this process's own, in which no credentials are.
        `on_lost` is called once when the socket closes, which a dead process causes too. `niceness`: of a
        child that leaves the processor to the engine, see `step_aside`. The child stays in this process's
        session, which that needs, and makes itself a process group (`processes/__main__.py`).
        """
        ours, theirs = socket.socketpair()
        with theirs:
            inherited = {"--fd": theirs.fileno(), **(fds or {})}
            options = [part for name, number in inherited.items() for part in (name, str(number))]
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    *options,
                    pass_fds=tuple(inherited.values()),
                    stdin=asyncio.subprocess.DEVNULL,
                    env={**computing_environment(), **(environment or {})},
                )
            except BaseException:
                ours.close()
                raise
        if niceness:
            step_aside(process.pid, niceness)
        loop = asyncio.get_running_loop()
        try:
            transport, _ = await loop.create_unix_connection(
                lambda: _Frames(decoder, on_message, on_lost), sock=ours
            )
        except BaseException:
            ours.close()
            process.kill()
            await process.wait()
            raise
        return cls(process, transport)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: msgspec.Struct) -> None:
        """Queue a message; never blocks. Lost if the child is gone."""
        self.send_frame(encode(message))

    def send_frame(self, frame: bytes) -> None:
        """Queue a message that is encoded already; otherwise like `send`."""
        if not self._transport.is_closing():
            self._transport.write(frame)

    async def end(self, grace: float = 0.0) -> str:
        """Wait `grace` seconds for the process to exit, then kill it. Says how it ended, for the log."""
        try:
            return await asyncio.wait_for(self.wait(), grace)
        except TimeoutError:
            self.signal_group(signal.SIGKILL)
            return await self.wait()

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the child and to whatever it has started."""
        if self._process.returncode is None:
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:  # it has no group yet, and has started nothing
                with contextlib.suppress(ProcessLookupError):
                    self._process.send_signal(number)

    async def wait(self) -> str:
        """Wait for the process to end, and return how it did: `exit status 1`, `signal SIGKILL`."""
        status = await self._process.wait()
        self._transport.close()
        if status < 0:
            return f"signal {signal.Signals(-status).name}"
        return f"exit status {status}"


class EngineLink:
    """Link to the engine that runs now. Messages sent while none runs are lost."""

    def __init__(self) -> None:
        self.engine: ChildProcess | None = None

    def send(self, message: ToEngine) -> None:
        """Pass a message to the engine; never blocks."""
        if self.engine is not None:
            self.engine.send(message)


class AskedProcess(Generic[Received]):
    """A child that is asked one thing at a time. Made by `spawn`."""

    def __init__(self, take_news: Callable[[Received], bool]) -> None:
        self.idle = False
        """Whether the process has answered all questions, so that the next one can be put."""
        self.lost = False
        """Whether the process has closed its socket, or died."""
        self._take_news = take_news
        self._child: ChildProcess | None = None
        self._heard_at = 0.0
        self._answer: asyncio.Future[Received | None] | None = None

    @classmethod
    async def spawn(
        cls,
        command: Sequence[str],
        decoder: msgspec.msgpack.Decoder[Received],
        take_news: Callable[[Received], bool],
        fds: Mapping[str, int],
        environment: Mapping[str, str] | None = None,
        niceness: int = 0,
    ) -> AskedProcess[Received]:
        """Start a process as ChildProcess.spawn does. `take_news` gets every message; it returns False for an
        answer."""
        process = cls(take_news)
        process._child = await ChildProcess.spawn(
            command, decoder, process._receive, process._closed, fds, environment, niceness
        )
        return process

    @property
    def pid(self) -> int:
        """Process id, also of a lost process; 0 before the start."""
        return 0 if self._child is None else self._child.pid

    def ask(self, frame: bytes) -> None:
        """Send an encoded message that is to be answered."""
        loop = asyncio.get_running_loop()
        self.idle, self._heard_at = False, loop.time()
        self._answer = loop.create_future()
        if self.lost:
            self._answer.set_result(None)
        self._send(frame)

    async def answer(self, silence: float = math.inf) -> Received | None:
        """Return the answer to the last question, or None if the process is lost.

        It is killed when nothing, news included, is heard of it for `silence` seconds.
        """
        if self._answer is None:
            raise RuntimeError("nothing was asked")
        loop = asyncio.get_running_loop()
        while not self._answer.done():
            left = self._heard_at + silence - loop.time()
            if left <= 0:
                _log.error("process %s has given no sign of life for %g s and is killed", self.pid, silence)
                self.kill()
                return None
            await asyncio.wait((self._answer,), timeout=None if left == math.inf else left)
        answer = self._answer.result()
        self.idle = answer is not None and not self.lost
        return answer

    def notify(self, message: msgspec.Struct) -> None:
        """Send a message that is not answered. Lost if the child is gone."""
        self._send(encode(message))

    def send(self, frame: bytes) -> None:
        """Send a frame that `encode` made, as `notify` does."""
        self._send(frame)

    def kill(self) -> None:
        """End it now; `end` is still needed."""
        self.idle = False
        if self._child is not None:
            self._child.signal_group(signal.SIGKILL)

    async def end(self, grace: float) -> str:
        """End the process as ChildProcess.end does."""
        return "never started" if self._child is None else await self._child.end(grace)

    def _send(self, frame: bytes) -> None:
        if self._child is not None:
            self._child.send_frame(frame)

    def _receive(self, message: Received) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        if not self._take_news(message) and self._answer is not None and not self._answer.done():
            self._answer.set_result(message)

    def _closed(self) -> None:
        self.lost, self.idle = True, False
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(None)


def kill_children() -> list[int]:
    """Kill all processes that this one has started, whoever did, with what those have started.

    For a process that is about to exit. Returns their ids once they are gone, or after DEATH_SECONDS.
    """
    pids: set[int] = set()
    for look in range(_LOOKS):
        found = _children()
        if look and found <= pids:
            break
        pids |= found
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == pid:
                os.killpg(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + DEATH_SECONDS
    while any(map(_runs, pids)) and time.monotonic() < end:
        time.sleep(0.01)
    return sorted(pids)


def _children() -> set[int]:
    """Return the ids of the processes that this one has started, by the threads that did. Those of a thread
    that ends meanwhile become another thread's, which may have been read before."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # that thread has just ended
            found |= set(map(int, path.read_text().split()))
    return found


def _runs(pid: int) -> bool:
    """Return True if a child of this process has not ended yet."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False
