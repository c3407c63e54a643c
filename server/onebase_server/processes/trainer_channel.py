"""The trainer's end of the socket to the api."""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
from collections.abc import Callable

import msgspec

from onebase_adapters.training.events import Reason
from onebase_engine.engine.messages import FrameReader, encode
from onebase_server.processes.trainer_protocol import Check, Stop, Train, to_trainer_decoder

logger = logging.getLogger(__name__)


def leave() -> None:
    """End the process at once: nobody waits for it, and what it has saved is whole."""
    os._exit(0)


class Channel:
    """Reads in a thread of its own, so that `Stop` and the api's end are noticed while a step computes."""

    def __init__(self, sock: socket.socket, on_gone: Callable[[], None] = leave) -> None:
        self._socket = sock
        self._on_gone = on_gone
        self._first: queue.SimpleQueue[Check | Train] = queue.SimpleQueue()
        self._reason: Reason | None = None
        threading.Thread(target=self._read, name="trainer-reader", daemon=True).start()

    def receive(self) -> Check | Train:
        """What this process is for."""
        return self._first.get()

    def stopping(self) -> Reason | None:
        """Why the run is to stop, once it is."""
        return self._reason

    def send(self, message: msgspec.Struct) -> None:
        try:
            self._socket.sendall(encode(message))
        except OSError:
            self._on_gone()

    def _read(self) -> None:
        reader, decoder = FrameReader(), to_trainer_decoder()
        try:
            while data := self._socket.recv(1 << 16):
                for payload in reader.feed(data):
                    message = decoder.decode(payload)
                    if isinstance(message, Stop):
                        self._reason = message.reason
                    else:
                        self._first.put(message)
        except (OSError, ValueError, RecursionError, msgspec.DecodeError) as error:
            logger.error("reading from the api failed: %s", error)
        self._on_gone()
