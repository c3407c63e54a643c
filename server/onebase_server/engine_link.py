"""One engine process and the socket to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence

import msgspec

from onebase_server.engine.protocol import FrameReader, ToApi, ToEngine, encode, to_api_decoder

ENGINE_COMMAND = (sys.executable, "-m", "onebase_server.engine")

_log = logging.getLogger(__name__)


class _Frames(asyncio.Protocol):
    """Decodes what arrives, in the event loop, and hands over each message with a plain call."""

    def __init__(self, on_message: Callable[[ToApi], None], on_lost: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._frames = FrameReader()
        self._decoder = to_api_decoder()
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            payloads = self._frames.feed(data)
            messages = [self._decoder.decode(payload) for payload in payloads]
        except (ValueError, msgspec.DecodeError) as error:
            _log.error("the engine sent something that is no message: %s", error)
            if self._transport is not None:
                self._transport.close()
            return
        for message in messages:
            self._on_message(message)

    def connection_lost(self, error: Exception | None) -> None:
        self._on_lost()


class EngineProcess:
    """A running engine. Made by `spawn`; ended by `end` or by its own death."""

    def __init__(self, process: asyncio.subprocess.Process, transport: asyncio.WriteTransport) -> None:
        self._process = process
        self._transport = transport

    @classmethod
    async def spawn(
        cls, command: Sequence[str], on_message: Callable[[ToApi], None], on_lost: Callable[[], None]
    ) -> EngineProcess:
        """Start the command with one end of a socket pair.

        `on_lost` is called once when the socket closes, which a dead process causes too. The engine
        gets a session of its own: Ctrl-C in the terminal reaches the api alone, which drains first.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    "--fd",
                    str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_unix_connection(lambda: _Frames(on_message, on_lost), sock=ours)
        return cls(process, transport)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Queue a message; never blocks. Lost if the engine is gone."""
        if not self._transport.is_closing():
            self._transport.write(encode(message))

    async def end(self, grace: float = 0.0) -> str:
        """Wait `grace` seconds for the process to exit, then kill it. Says how it ended, for the log."""
        try:
            return await asyncio.wait_for(self.wait(), grace)
        except TimeoutError:
            self.signal_group(signal.SIGKILL)
            return await self.wait()

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the engine and to whatever it has started."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    async def wait(self) -> str:
        """How the process ended, once it has: `exit status 1`, `signal SIGKILL`."""
        status = await self._process.wait()
        self._transport.close()
        if status < 0:
            return f"signal {signal.Signals(-status).name}"
        return f"exit status {status}"
