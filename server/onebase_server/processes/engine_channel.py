"""The engine's end of the socket to the api: a thread that reads and a thread that writes."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
from collections.abc import Iterator

import msgspec

from onebase_engine.engine import messages as protocol
from onebase_engine.engine.staging import Arrived

logger = logging.getLogger(__name__)

Received = protocol.ToEngine | Arrived | protocol.AdapterFailed
"""What the stepping thread takes: messages from the api, and what the loader thread has read."""


class Channel:
    """The socket to the api. Reading and writing have threads of their own: a step waits for neither."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._inbox: queue.SimpleQueue[Received | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="engine-writer", daemon=True)
        threading.Thread(target=self._read, name="engine-reader", daemon=True).start()
        self._writer.start()

    def send(self, message: protocol.ToApi) -> None:
        self._outbox.put(protocol.encode(message))

    def post(self, message: Received) -> None:
        """Put something beside the api's messages; callable from any thread."""
        self._inbox.put(message)

    def receive(self, timeout: float | None) -> Iterator[Received]:
        """Messages that have arrived; waits up to `timeout` seconds (None: for ever) for the first.

        Raises EOFError when the api has gone.
        """
        with contextlib.suppress(queue.Empty):
            message = self._inbox.get(timeout=timeout) if timeout != 0 else self._inbox.get_nowait()
            while True:
                if message is None:
                    raise EOFError("the api closed the socket")
                yield message
                message = self._inbox.get_nowait()

    def close(self) -> None:
        """Send what is queued, then close."""
        self._outbox.put(None)
        self._writer.join(timeout=5)
        with contextlib.suppress(OSError):
            # Ends the reader's recv too, which would otherwise keep the socket open.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self) -> None:
        reader, decoder = protocol.FrameReader(), protocol.to_engine_decoder()
        try:
            while data := self._socket.recv(1 << 16):
                for payload in reader.feed(data):
                    self._inbox.put(decoder.decode(payload))
        except (OSError, ValueError, RecursionError, msgspec.DecodeError) as error:
            logger.error("reading from the api failed: %s", error)
        finally:
            self._inbox.put(None)

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while (frame := self._outbox.get()) is not None:
                self._socket.sendall(frame)
