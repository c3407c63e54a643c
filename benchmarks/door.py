#!/usr/bin/env python3
"""Cost of hostile clients to others: a crowd beside a stream, the worst bodies beside a probe, and resets.

crowd    one stream of the base runs on and on, in turns alone, beside idle connections and refused requests,
         and beside the same client on a server that decides nothing (control). Each turn's median of the time
         between two tokens is divided by that of the quiet turn before it. The control tells what the client
         itself takes, where it shares the cores; the rest is the server's.
bodies   one client sends one body over and over, another asks for /health and notes how long that takes.
resets   streams are broken off in the middle with a TCP reset; then the server's open files are counted.

  python benchmarks/door.py                      # all three, on a server that it starts
  python benchmarks/door.py --parts crowd --turns 20 --idle 2000 --refusals 200
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

from rich.console import Console

from bench.command import Options
from bench.crowd import REFUSED
from bench.processes import cpu_seconds, end_on_signals, onebase_server
from bench.report import percentile
from bench.stream import completion_events, fetch_json, request

HEAD = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LEAST_TIMES = 10
"""Tokens that a turn waits for, on a machine that is busy with other work."""
SIZE = 1_990_000
"""Bytes of a body: under --max-body."""
BODIES: dict[str, Callable[[], bytes]] = {
    "nested arrays": lambda: with_length(b"/generate", b"[" * 490_000),
    "token ids": lambda: repeated(b"/v1/completions", b'{"model": "base", "prompt": [', b"1000,", b"1]}"),
    "wrong token ids": lambda: repeated(
        b"/v1/completions", b'{"model": "base", "prompt": [', b"-100,", b"1]}"
    ),
    "floats": lambda: repeated(b"/generate", b'{"prompt": [', b"1e-300,", b"1]}"),
    "long numbers": lambda: repeated(b"/generate", b'{"prompt": [', b"9" * 4000 + b",", b"1]}"),
    "fields": lambda: with_length(
        b"/generate", b"{" + b",".join(b'"%d":{}' % one for one in range(24_000)) + b"}"
    ),
    "escapes": lambda: repeated(b"/generate", b'{"prompt": "', rb"\u00e9", b'"}'),
    "one word": lambda: repeated(b"/generate", b'{"prompt": "', b"a", b'", "max_tokens": 1}'),
    "messages": lambda: repeated(
        b"/v1/chat/completions",
        b'{"model": "base", "messages": [',
        b'{"role":"user","content":"a"},',
        b"1]}",
        12_000,
    ),
    "chunks of a byte": lambda: (
        HEAD % b"/generate" + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 1_500_000 + b"0\r\n\r\n"
    ),
    "a form of boundaries": lambda: repeated(b"/v1/files", b"--B\r\n", b"\r\n--A", b"\r\n").replace(
        b"application/json", b"multipart/form-data; boundary=B"
    ),
    "headers": lambda: b"GET /version HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 190 + b"\r\n",
    "pipelined": lambda: REFUSED[0] * 15,
}
"""Requests that cost a server most, by name."""


def with_length(path: bytes, body: bytes) -> bytes:
    return HEAD % path + b"Content-Length: %d\r\n\r\n" % len(body) + body


def repeated(path: bytes, begin: bytes, piece: bytes, end: bytes, most: int = 10**9) -> bytes:
    """Return a request whose body is `begin`, as many pieces as fit, and `end`."""
    count = min(most, (SIZE - len(begin) - len(end)) // len(piece))
    return with_length(path, begin + piece * count + end)


# ---- the crowd ------------------------------------------------------------------------------------


async def stream_for_ever(url: str, base: str, times: list[float]) -> None:
    """Note when each piece of a text arrives; one request after another."""
    payload = {"model": base, "prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
    while True:
        async for now, _ in completion_events(url, payload):
            times.append(now)


@dataclass
class Listener:
    """Notes when each token of a stream arrives."""

    streaming: asyncio.Future[None]
    times: list[float]

    async def gap(self, seconds: float) -> float:
        """Return the median gap between two tokens from now on, for so long, or until there are some."""
        self.times.clear()
        await asyncio.sleep(seconds)
        while len(self.times) < LEAST_TIMES:
            if self.streaming.done():
                self.streaming.result()
            await asyncio.sleep(0.1)
        return median(after - before for before, after in pairwise(self.times))


@dataclass
class Turns:
    """Measurements beside one kind of crowd, turn by turn."""

    ratios: list[float] = field(default_factory=list)
    """Ratio of each turn's median gap to that of the quiet turn before."""
    gaps: list[float] = field(default_factory=list)
    """Median gap of each turn, in seconds."""
    refused: int = 0
    server: float = 0.0
    """Processor seconds of the server that refuses, over what it takes when it is quiet."""
    client: float = 0.0
    """Processor seconds of the client."""

    def __str__(self) -> str:
        low, high = min(self.ratios), max(self.ratios)
        each = 1e3 / max(1, self.refused)
        return (
            f"TPOT {median(self.gaps) * 1e3:.1f} ms, ratio {median(self.ratios):.3f} ({low:.3f} to "
            f"{high:.3f}); {self.refused} refused; processor time of each: "
            f"{self.server * each:.3f} ms of the server, "
            f"{self.client * each:.3f} ms of the client"
        )


@asynccontextmanager
async def helper(*arguments: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a process of bench/crowd.py. It ends when its stdin closes."""
    command = (sys.executable, "-m", "bench.crowd", *map(str, arguments))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, cwd=Path(__file__).parent
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def line_of(process: asyncio.subprocess.Process) -> str:
    """Return the next line that a helper says. Raises RuntimeError if it has ended."""
    line = await process.stdout.readline() if process.stdout else b""
    if not line:
        raise RuntimeError(f"a helper ended with {await process.wait()}")
    return line.decode().strip()


async def refusals_of(client: asyncio.subprocess.Process) -> int:
    """Return how many requests of the crowd were refused so far."""
    if client.stdin:
        client.stdin.write(b"\n")
    return int(await line_of(client))


async def measure_crowd(url: str, base: str, pid: int, options: argparse.Namespace, console: Console) -> None:
    times: list[float] = []
    quiet: list[float] = []
    beside, control = Turns(), Turns()
    streaming = asyncio.ensure_future(stream_for_ever(url, base, times))
    listener = Listener(streaming, times)
    port = urlsplit(url).port or 80
    try:
        await listener.gap(5.0)
        async with helper("answer") as empty:
            kinds = [(beside, port, pid), (control, int(await line_of(empty)), empty.pid)]
            for _ in range(options.turns):
                for turns, target, server_pid in kinds:
                    own = cpu_seconds(server_pid)
                    quiet.append(await listener.gap(options.seconds))
                    own = cpu_seconds(server_pid) - own
                    await crowded_turn(turns, target, server_pid, listener, options)
                    turns.server -= own
                    turns.ratios.append(turns.gaps[-1] / quiet[-1])
    finally:
        streaming.cancel()
    console.print(
        f"crowd: {options.idle} idle connections, {options.refusals} refusals a second, for each of"
    )
    console.print(f"  alone    TPOT {median(quiet) * 1e3:.1f} ms over {len(quiet)} turns")
    console.print(f"  beside   {beside}", soft_wrap=True)
    console.print(f"  control  {control}", soft_wrap=True)
    console.print(f"  the server's part: {median(beside.ratios) / median(control.ratios):.3f}")


async def crowded_turn(
    turns: Turns, port: int, pid: int, listener: Listener, options: argparse.Namespace
) -> None:
    async with helper("send", port, options.idle, options.refusals, options.burst) as client:
        await line_of(client)
        await asyncio.sleep(1)
        server, own, refused = cpu_seconds(pid), cpu_seconds(client.pid), await refusals_of(client)
        turns.gaps.append(await listener.gap(options.seconds))
        turns.server += cpu_seconds(pid) - server
        turns.client += cpu_seconds(client.pid) - own
        turns.refused += await refusals_of(client) - refused
    await asyncio.sleep(0.5)


# ---- bodies ---------------------------------------------------------------------------------------


async def send_over_and_over(port: int, data: bytes) -> None:
    while True:
        with suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(data)
                await writer.drain()
                await reader.readuntil(b"\r\n\r\n")
            finally:
                writer.close()


async def probe(url: str, seconds: float) -> list[float]:
    """Return the durations of requests to /health, in seconds."""
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        async with request(f"{url}/health") as response:
            await response.body()
        found.append(time.perf_counter() - began)
        await asyncio.sleep(0.02)
    return found


async def measure_bodies(url: str, port: int, options: argparse.Namespace, console: Console) -> None:
    for name in ("nothing", *BODIES):
        sender = None
        if name != "nothing":
            code = f"import door,asyncio;asyncio.run(door.send_over_and_over({port},door.BODIES[{name!r}]()))"
            sender = await asyncio.create_subprocess_exec(
                sys.executable, "-c", code, cwd=Path(__file__).parent
            )
            await asyncio.sleep(2)
        try:
            found = await probe(url, options.seconds)
        finally:
            if sender is not None:
                sender.kill()
                await sender.wait()
        console.print(
            f"/health beside {name}: p50 {median(found) * 1e3:.0f} ms, "
            f"p99 {percentile(found, 0.99) * 1e3:.0f} ms, longest {max(found) * 1e3:.0f} ms"
        )


# ---- resets ---------------------------------------------------------------------------------------


def reset_in_mid_stream(port: int, base: str) -> None:
    body = json.dumps({"model": base, "prompt": "Once", "max_tokens": 200, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(with_length(b"/v1/completions", body))
        received = b""
        while b"data:" not in received:
            received += connection.recv(1 << 16)


async def measure_resets(
    url: str, port: int, base: str, pid: int, options: argparse.Namespace, console: Console
) -> None:
    files = Path(f"/proc/{pid}/fd")
    await asyncio.to_thread(reset_in_mid_stream, port, base)
    await asyncio.sleep(2)
    before = len(list(files.iterdir()))
    turn = asyncio.Semaphore(8)

    async def one() -> None:
        async with turn:
            await asyncio.to_thread(reset_in_mid_stream, port, base)

    await asyncio.gather(*(one() for _ in range(options.resets)))
    for _ in range(60):
        await asyncio.sleep(1)
        after = len(list(files.iterdir()))
        if after <= before:
            break
    requests = (await fetch_json(f"{url}/status"))["requests"]
    console.print(f"resets: {options.resets}; open files {before} before, {after} after; requests {requests}")


async def run(options: argparse.Namespace, console: Console) -> None:
    with tempfile.TemporaryDirectory(prefix="onebase-door-") as folder:
        serve = ["--data-dir", folder, "--threads", options.threads, "--kv-memory", "1GiB"]
        async with onebase_server(Path(folder) / "log", *serve) as (url, process):
            base, port = (await fetch_json(f"{url}/status"))["base"], urlsplit(url).port or 80
            if "resets" in options.parts:
                await measure_resets(url, port, base, process.pid, options, console)
            if "bodies" in options.parts:
                await measure_bodies(url, port, options, console)
            if "crowd" in options.parts:
                await measure_crowd(url, base, process.pid, options, console)


def main() -> None:
    asked = Options(__doc__)
    asked.add("--parts", nargs="+", default=["resets", "bodies", "crowd"], help="(default: all three)")
    asked.count("turns", 10, "of the crowd, of the control, and as many without")
    asked.number("seconds", 8.0, "of a turn, and of a body")
    asked.count("idle", 2000, "idle connections")
    asked.count("refusals", 200, "refused requests a second")
    asked.count("burst", 4, "of them in a row")
    asked.count("resets", 1000, "streams that are broken off")
    asked.add("--threads", type=int, default=2, help="of the server (default: 2)")
    end_on_signals()
    asyncio.run(run(asked.parser.parse_args(), Console()))


if __name__ == "__main__":
    main()
