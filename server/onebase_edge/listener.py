"""Listening sockets, and uvicorn behind the door with our limits on connections."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import resource
import socket
import struct
from collections.abc import Generator
from dataclasses import fields
from functools import partial
from typing import Any

import uvicorn

from onebase_edge.cross_site import CrossSiteMiddleware
from onebase_edge.protocol import ConnectionLimits, Connections, LimitedProtocol, limit_unread
from onebase_edge.settings import Settings, inherited_listener

LEAST_FILES = 64
"""Number of open files that are not for connections: the server has about thirty of its own."""
_SO_ATTACH_REUSEPORT_CBPF = 51  # asm-generic/socket.h; the socket module does not name it
_RETURN_1 = struct.pack("=HBBI", 0x06, 0, 0, 1)
"""A classic BPF program of one instruction, `struct sock_filter`: BPF_RET | BPF_K with the value 1."""
_LAST_BYTES_SECONDS = 5
"""Time, in seconds after the drain, for what is already written but not yet sent."""


class QuietServer(uvicorn.Server):
    """Leaves signals alone: who starts it owns them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


def bind(settings: Settings, *, take_over: bool | None = None) -> socket.socket:
    """Return a listening socket, made before anything slow begins. Raises OSError when the address is in
    use.

    take_over: whether another process of the same user may have the address, which is to end; None: nor may a
    later one take it.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    given = inherited_listener()
    # Named, or asyncio takes its connections for others than TCP's, and leaves Nagle's algorithm on.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=given)
    try:
        if given is None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if take_over:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind((settings.host, settings.port))
            if take_over is not None:  # set only now, it does not hide that somebody is there
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        else:
            listener.set_inheritable(False)
        limit_unread(listener, settings.write_timeout)
        if not take_over:  # else once it serves: until then all connections are for the other one
            listener.listen(1024)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def take_new_connections(listener: socket.socket) -> None:
    """Let all new connections of an address that two processes listen at go to the later one, so that the
    earlier one resets none that it has not accepted when it closes. Where the kernel refuses, both get some.

    listener: the later one's socket, which listens.
    """
    program = ctypes.create_string_buffer(_RETURN_1)
    described = struct.pack("@HP", 1, ctypes.addressof(program))  # struct sock_fprog
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, described)


def url_of(listener: socket.socket) -> str:
    """Return the address to type into a browser on the same machine."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def uvicorn_config(
    middleware: CrossSiteMiddleware, settings: Settings, *, files_each: int = 1
) -> uvicorn.Config:
    """Return uvicorn's configuration for an app behind its middleware, within the settings' limits on
    connections.

    files_each: number of files that each connection opens, of those that the process may.
    """
    connections = Connections(_connection_limits(settings, files_each))
    protocol: Any = partial(LimitedProtocol, connections=connections, turned_away=middleware.turned_away)
    config = uvicorn.Config(
        middleware,
        http=protocol,
        lifespan="off",
        ws="none",
        log_level="warning",
        access_log=settings.access_log,
        server_header=False,
        proxy_headers=False,  # the middleware reads them
        timeout_keep_alive=settings.keep_alive_timeout,  # type: ignore[arg-type]  # given to `call_later` only
        timeout_graceful_shutdown=_LAST_BYTES_SECONDS,
        log_config=None,
    )
    logging.getLogger("uvicorn.access").setLevel(logging.INFO)  # Config has given it `log_level` too
    return config


def _connection_limits(settings: Settings, files_each: int) -> ConnectionLimits:
    """Raise the process's limit of open files as far as the connections need it and the system lets it.
    Return the settings' limits, with fewer connections where that is not enough."""
    values = {item.name: getattr(settings, item.name) for item in fields(ConnectionLimits)}
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = LEAST_FILES + files_each * settings.max_connections
    if 0 <= files < wanted:
        files = wanted if most < 0 else max(files, min(wanted, most))
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
        values["max_connections"] = max(1, min(settings.max_connections, (files - LEAST_FILES) // files_each))
    return ConnectionLimits(**values)
