"""A reader that does not read slows nobody, holds little memory, and is cut off."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from pathlib import Path

from .support import PATIENCE, Server, Starter, pace

ENDLESS = {"prompt": "word " * 50, "max_tokens": 90_000, "stream": True}


def open_and_do_not_read(server: Server) -> socket.socket:
    """A connection with a small receive buffer that has asked for an endless stream."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    body = json.dumps(ENDLESS).encode()
    head = (
        "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


def test_a_reader_that_does_not_read_is_cut_off_and_others_are_served(serve_scripted: Starter) -> None:
    with serve_scripted("flood", "--stream-buffer", "50") as server, server.client() as http:
        with open_and_do_not_read(server) as lazy:
            server.wait_for(lambda: "not read fast enough" in server.log)

            other = http.post("/generate", json={"prompt": "word", "max_tokens": 3})
            server.wait_for(lambda: http.get("/status").json()["requests"] == 0)

            assert other.json()["choices"][0]["text"] == "wordwordword"
            assert other.json()["timing"]["decode_s"] == 2.0  # when steps were made, not when they were read
            lazy.settimeout(PATIENCE)
            assert is_cut_off(lazy)
        assert "Traceback" not in server.log


def test_a_reader_that_keeps_up_gets_everything_however_small_the_buffer(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    options = ("--stream-buffer", "2")
    with (
        pace(tmp_path) as (environment, allow),
        serve_scripted("paced", *options, environment=environment) as server,
        server.client() as http,
    ):
        body = {"prompt": "word", "max_tokens": 100, "stream": True}
        allow(2)
        lines = []
        with http.stream("POST", "/generate", json=body) as answer:
            for line in filter(None, answer.iter_lines()):
                lines.append(line)
                allow(1)

        assert sum('"text":"word"' in line for line in lines) == 100
        assert lines[-1] == "data: [DONE]"


def is_cut_off(connection: socket.socket) -> bool:
    """Whether the other side dropped the connection before the stream's end."""
    received = b""
    try:
        while data := connection.recv(1 << 16):
            received += data
    except ConnectionResetError:
        return True
    return b"[DONE]" not in received


def test_a_stream_that_nobody_reads_gives_its_rows_back(serve_scripted: Starter) -> None:
    with (
        serve_scripted("words", "--stream-buffer", "1000000", "--write-timeout", "1") as server,
        server.client() as http,
        open_and_do_not_read(server),
    ):
        server.wait_for(lambda: http.get("/status").json()["requests"] == 1)

        server.wait_for(lambda: http.get("/status").json()["requests"] == 0)


def test_connections_that_are_reset_in_mid_stream_leave_no_descriptor(scripted: Server) -> None:
    with scripted.client() as http:
        before = open_sockets(scripted)
        assert before > 0
        for _ in range(100):
            with open_and_do_not_read(scripted) as connection:
                connection.recv(100)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        scripted.wait_for(lambda: http.get("/status").json()["requests"] == 0)
        scripted.wait_for(lambda: open_sockets(scripted) <= before + 1)  # and the client's own


def open_sockets(server: Server) -> int:
    found = 0
    for entry in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += entry.readlink().name.startswith("socket:")
    return found
