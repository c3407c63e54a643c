"""A streaming HTTP client that costs next to nothing: it shares the cores with what it measures.

Raw asyncio sockets, HTTP/1.1 with chunked bodies, server-sent events cut at the blank line. Of the
pieces of text only the arrival time is taken; they are parsed after the clock has stopped.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")
DONE = b"[DONE]"


class HttpError(Exception):
    """The server answered with another status than 200, or not in HTTP at all."""

    def __init__(self, status: int, body: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(f"HTTP {status}: {body[:300]}")
        self.status = status
        self.body = body
        self.headers = headers or {}


@dataclass
class Response:
    """A response whose headers have arrived; its body is read by one of the two methods, once."""

    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader
    _buffer: bytearray = field(default_factory=bytearray)

    async def body(self) -> bytes:
        return b"".join([part async for part in self._parts()])

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the data of each server-sent event, `[DONE]` included."""
        async for part in self._parts():
            self._buffer += part
            while (end := self._buffer.find(b"\n\n")) >= 0:
                event = bytes(self._buffer[:end])
                del self._buffer[: end + 2]
                for line in event.split(b"\n"):
                    if line.startswith(b"data:"):
                        yield line[5:].strip()

    async def _parts(self) -> AsyncIterator[bytes]:
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16):
                yield (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readuntil(b"\r\n")
        elif "content-length" in self.headers:
            yield await self.reader.readexactly(int(self.headers["content-length"]))
        else:
            while part := await self.reader.read(65536):
                yield part


@asynccontextmanager
async def request(
    url: str, method: str = "GET", payload: dict[str, Any] | None = None, key: str = ""
) -> AsyncIterator[Response]:
    """Send one request on a connection of its own, which is closed on leaving: that is how to cancel.

    key: API key of the caller, where the server demands one.

    Raises:
        ValueError: the URL is not on the loopback interface.
        OSError, asyncio.IncompleteReadError: the connection failed or ended early.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 80
    if host not in LOOPBACK:
        raise ValueError(f"{url}: only servers on this machine are measured ({', '.join(LOOPBACK)})")
    body = b"" if payload is None else json.dumps(payload).encode()
    head = f"{method} {parts.path or '/'} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
    head += f"Authorization: Bearer {key}\r\n" if key else ""
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(head.encode() + body)
        await writer.drain()
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines[1:] if line)
        headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        yield Response(int(lines[0].split(" ")[1]), headers, reader)
    finally:
        writer.close()


async def fetch_json(url: str, method: str = "GET", payload: dict[str, Any] | None = None) -> Any:
    """Return the parsed JSON body; raises HttpError unless the status is 200."""
    async with request(url, method, payload) as response:
        body = await response.body()
        if response.status != 200:
            raise HttpError(response.status, body.decode(errors="replace"), response.headers)
        return json.loads(body)


@dataclass(frozen=True)
class Sample:
    """One finished stream. Times are seconds."""

    started: float
    ttft: float
    """Time from just before connecting to the first piece of text."""
    ended: float
    tokens: int
    text: str
    cached: int = 0
    """Tokens of the prompt that the target says were in its cache."""

    @property
    def tpot(self) -> float:
        """Mean time between tokens after the first."""
        return (self.ended - self.started - self.ttft) / max(1, self.tokens - 1)


async def stream_completion(url: str, payload: dict[str, Any], *, silent: bool = False) -> Sample:
    """Stream one `/v1/completions` request and time it. silent: it may have no text.

    The first token of a stream without text came when llama.cpp says that it had read the prompt, else with
    the end.

    Raises:
        HttpError: another status than 200, or an error event in the stream.
        ValueError: the stream ended without text or without usage.
    """
    started = time.perf_counter()
    first = last = 0.0
    events: list[bytes] = []
    async with request(f"{url}/v1/completions", "POST", payload) as response:
        if response.status != 200:
            raise HttpError(response.status, (await response.body()).decode(errors="replace"))
        async for event in response.events():
            if event == DONE:
                break
            last = time.perf_counter()
            events.append(event)
            first = first or (last if _text(json.loads(event)) else 0.0)
    text, tokens, cached, prompt_seconds = "", 0, 0, 0.0
    for parsed in map(json.loads, events):
        if "error" in parsed:
            raise HttpError(200, json.dumps(parsed["error"]))
        text += _text(parsed)
        usage = parsed.get("usage") or {}
        tokens = usage.get("completion_tokens", tokens)
        prompt_seconds = (parsed.get("timings") or {}).get("prompt_ms", 0.0) / 1e3 or prompt_seconds
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", cached)
    if silent and not first:
        first = started + prompt_seconds if prompt_seconds else last
    if not first or not tokens:
        raise ValueError(f"a stream of {len(events)} events ended with {tokens} tokens: {events[-1:]!r}")
    return Sample(started, first - started, last, tokens, text, cached)


def _text(event: dict[str, Any]) -> str:
    return "".join(choice.get("text") or "" for choice in event.get("choices", ()))
