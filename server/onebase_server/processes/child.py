"""Common parts of the engine, the verifier and a trainer: their start, and their end of the socket."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import queue
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from onebase_engine.engine.messages import FrameReader, encode
from onebase_engine.imports import quick_imports
from onebase_engine.logs import set_up_logs

GOODBYE_SECONDS = 5.0
"""Time, in seconds after the api's end, within which a child is gone, whatever it computes."""

Received = TypeVar("Received")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inherited:
    """Handles that a child inherits from the api: the socket, and file descriptors that may be None."""

    sock: socket.socket
    base_fd: int | None
    busy_fd: int | None


def begin(name: str) -> Inherited:
    """Set up this process as the api's child of that name, and return what it inherits."""
    parser = argparse.ArgumentParser(description=f"OneBase {name} process; the api starts it.")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the socket to the api")
    parser.add_argument("--base-fd", type=int, help="file descriptor of the memory that holds the base")
    parser.add_argument(
        "--busy-fd", type=int, help="file descriptor of the byte that says whether sequences run"
    )
    arguments = parser.parse_args()
    set_up_logs(name, logging.INFO)
    _set_up_libraries()
    # Ctrl-C in a terminal reaches every process; the api decides when a child ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return Inherited(socket.socket(fileno=arguments.fd), arguments.base_fd, arguments.busy_fd)


def _set_up_libraries() -> None:
    """Drop advice for people who call the libraries themselves, and undo what images ask of them."""
    with quick_imports():
        import torch
        import transformers

    # Some images ask by a variable of the environment for products of fp32 in TF32.
    torch.set_float32_matmul_precision("highest")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.disable_progress_bar()


class ApiGoneError(Exception):
    """The api has closed the socket, or sent something that is no message: the process ends."""


class Channel(Generic[Received]):
    """The socket to the api. Reading and writing have threads of their own: nothing that computes waits for
    either, and an api that ends is noticed in the middle of a computation. A message for which the socket has
    room is written by its sender: the writing thread would first have to wait for its turn in the
    interpreter, while the next step is planned, and the api would go to work when that step needs its core.

    Args:
        decode: makes a message of one frame's payload.
        leave_within: seconds from the api's end until the process ends by force; None: it ends by itself.
        on_leave: what must be done before that.
    """

    def __init__(
        self,
        sock: socket.socket,
        decode: Callable[[bytes], Received],
        *,
        leave_within: float | None = None,
        on_leave: Callable[[], None] = lambda: None,
    ) -> None:
        self._socket = sock
        self._decode = decode
        self._leave_within = leave_within
        self._on_leave = on_leave
        self._inbox: queue.SimpleQueue[Received | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._queued = 0
        """Number of frames in the outbox, the one included that is being written."""
        self._order = threading.Lock()
        self._gone = threading.Event()
        self._closing = False
        self._writer = threading.Thread(target=self._write, name="channel-writer", daemon=True)
        threading.Thread(target=self._read, name="channel-reader", daemon=True).start()
        self._writer.start()

    def send(self, message: msgspec.Struct) -> None:
        """Send a message, or queue what the socket has no room for; callable from any thread.

        Lost if the api has gone.
        """
        frame = encode(message)
        with self._order:
            left = frame if self._queued else frame[self._write_now(frame) :]
            if left:
                self._queued += 1
                self._outbox.put(left)

    def post(self, message: Received) -> None:
        """Add a message of this process's own to those of the api; callable from any thread."""
        self._inbox.put(message)

    def receive(self) -> Received:
        """Return the next message, waiting for it as long as it takes. Raises ApiGoneError."""
        return next(self.arrived(None))

    def arrived(self, timeout: float | None = 0.0) -> Iterator[Received]:
        """Yield the messages that are here; wait up to `timeout` seconds (None: forever) for the first.

        Raises ApiGoneError.
        """
        with contextlib.suppress(queue.Empty):
            message = self._inbox.get(timeout=timeout) if timeout != 0 else self._inbox.get_nowait()
            while True:
                if message is None:
                    raise ApiGoneError("the api closed the socket")
                yield message
                message = self._inbox.get_nowait()

    def check_alive(self) -> None:
        """Raise ApiGoneError if nobody waits for what is being computed."""
        if self._gone.is_set():
            raise ApiGoneError("the api closed the socket")

    def close(self) -> None:
        """Send what is queued, then close."""
        self._closing = True
        self._outbox.put(None)
        self._writer.join(timeout=GOODBYE_SECONDS)
        with contextlib.suppress(OSError):
            # Ends the reader's recv too, which would otherwise keep the socket open.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self) -> None:
        reader = FrameReader()
        try:
            while data := self._socket.recv(1 << 16):
                for payload in reader.feed(data):
                    self._inbox.put(self._decode(payload))
        except (OSError, ValueError, RecursionError, msgspec.DecodeError) as error:
            if not self._closing:
                logger.error("reading from the api failed: %s", error)
        if self._leave_within is not None and not self._closing:
            self._leave_soon(self._leave_within)
        self._gone.set()
        self._inbox.put(None)

    def _write_now(self, frame: bytes) -> int:
        """Write what the socket has room for, and return its length."""
        try:
            return self._socket.send(frame, socket.MSG_DONTWAIT)
        except OSError:  # no room, or no api
            return 0

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while (frame := self._outbox.get()) is not None:
                self._socket.sendall(frame)
                with self._order:
                    self._queued -= 1

    def _leave_soon(self, seconds: float) -> None:
        if not seconds:
            self._leave()
        timer = threading.Timer(seconds, self._leave)
        timer.daemon = True
        timer.start()

    def _leave(self) -> None:
        """End the process although it computes: nobody waits for the result."""
        self._on_leave()
        os._exit(0)
