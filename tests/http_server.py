"""The HTTP server under the stand-ins of the tests."""

from __future__ import annotations

import sys
from http.server import ThreadingHTTPServer
from socketserver import BaseServer
from typing import Any


class StandInServer(ThreadingHTTPServer):
    """A client that hangs up before an answer's end is no fault, and is not written to stderr."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            BaseServer.handle_error(self, request, client_address)
