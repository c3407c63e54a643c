"""The verifier's end of the socket to the api."""

from __future__ import annotations

import logging
import os
import queue
import shutil
import socket
import threading
from pathlib import Path

import msgspec

from onebase_engine.engine.messages import FrameReader, encode
from onebase_server.processes.verifier_protocol import ToVerifier, to_verifier_decoder

logger = logging.getLogger(__name__)

LONGEST_GOODBYE = 5.0
"""Seconds from the api's end until the process is gone, whatever it is doing then."""


class ApiGoneError(Exception):
    """The api closed the socket, or said something that is no message: the verifier ends."""


class Channel:
    """Reads in a thread of its own, so that an api that ends is noticed while a proof computes."""

    def __init__(self, sock: socket.socket, scratch: Path | None = None) -> None:
        self._scratch = scratch
        self._socket = sock
        self._inbox: queue.SimpleQueue[ToVerifier | None] = queue.SimpleQueue()
        self._gone = threading.Event()
        self._sending = threading.Lock()
        threading.Thread(target=self._read, name="verifier-reader", daemon=True).start()

    def receive(self) -> ToVerifier:
        """The next message, whenever it comes. Raises ApiGoneError."""
        message = self._inbox.get()
        if message is None:
            raise ApiGoneError
        return message

    def send(self, message: msgspec.Struct) -> None:
        """From any thread. Raises ApiGoneError."""
        self.check()
        try:
            with self._sending:
                self._socket.sendall(encode(message))
        except OSError as error:
            raise ApiGoneError from error

    def check(self) -> None:
        """Raise ApiGoneError if nobody waits for what is being computed."""
        if self._gone.is_set():
            raise ApiGoneError

    def _read(self) -> None:
        reader, decoder = FrameReader(), to_verifier_decoder()
        try:
            while data := self._socket.recv(1 << 16):
                for payload in reader.feed(data):
                    self._inbox.put(decoder.decode(payload))
        except (OSError, ValueError, RecursionError, msgspec.DecodeError) as error:
            logger.error("reading from the api failed: %s", error)
        self._gone.set()
        self._inbox.put(None)
        timer = threading.Timer(LONGEST_GOODBYE, self._leave)
        timer.daemon = True
        timer.start()

    def _leave(self) -> None:
        """End the process although it computes; nothing else would remove its files."""
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        os._exit(0)
