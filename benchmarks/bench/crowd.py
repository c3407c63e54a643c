"""Hostile clients that cost next to nothing, and a server that decides nothing, each as a process of its own.

Both share the cores with what is measured, so they use plain sockets and import little.

  python -m bench.crowd send PORT IDLE REFUSALS BURST   # says how many were refused on each line of stdin
  python -m bench.crowd answer                          # says its port; both run until their stdin closes
"""

from __future__ import annotations

import select
import socket
import sys
import time

REFUSED = (
    b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\nContent-Length: 0\r\n\r\n",
    b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n",
)
ANSWER = b"HTTP/1.1 403 Forbidden\r\ncontent-length: 500\r\n\r\n" + b"x" * 500
_LENGTH = b"content-length: "


def send(port: int, idle: int, each_second: int, burst: int) -> None:
    """Hold idle connections, and send requests that are refused at a steady pace, `burst` in a row.

    Says `ready` once the connections are open. Raises ValueError for a request that was not refused.
    """
    kept = [socket.create_connection(("127.0.0.1", port)) for _ in range(idle)]
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    print("ready", flush=True)
    began, sent = time.perf_counter(), 0
    while True:
        if select.select([sys.stdin], [], [], max(0.0, began + sent / each_second - time.perf_counter()))[0]:
            if not sys.stdin.readline():
                break
            print(sent, flush=True)
        for _ in range(burst):
            connection.sendall(REFUSED[sent % len(REFUSED)])
            _read_refusal(connection)
            sent += 1
    for one in (connection, *kept):
        one.close()


def _read_refusal(connection: socket.socket) -> None:
    received = connection.recv(1 << 16)
    while received and (b"\r\n\r\n" not in received or len(received) < _size(received)):
        received += connection.recv(1 << 16)
    if received[9:10] != b"4":
        raise ValueError(f"this was not refused: {received[:200]!r}")


def _size(received: bytes) -> int:
    begin = received.index(_LENGTH) + len(_LENGTH)
    length = int(received[begin : received.index(b"\r", begin)])
    return received.index(b"\r\n\r\n") + 4 + length


def answer() -> None:
    """Answer whatever comes with the same refusal, unread: what any server would cost."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(listener.getsockname()[1], flush=True)
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    poll.register(sys.stdin, select.EPOLLIN)
    connections: dict[int, socket.socket] = {}
    while True:
        for number, _ in poll.poll():
            if number == sys.stdin.fileno():
                return
            if number == listener.fileno():
                connection, _ = listener.accept()
                connections[connection.fileno()] = connection
                poll.register(connection, select.EPOLLIN)
            elif not _answered(connections[number]):
                poll.unregister(number)
                connections.pop(number).close()


def _answered(connection: socket.socket) -> bool:
    """Return True if there was something to answer, or the client has left."""
    try:
        received = connection.recv(1 << 16)
        if received:
            connection.sendall(ANSWER)
    except ConnectionError:
        return False
    return bool(received)


if __name__ == "__main__":
    if sys.argv[1] == "answer":
        answer()
    else:
        send(*map(int, sys.argv[2:]))
