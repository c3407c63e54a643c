"""The benchmark's client against a real socket: what it reads must not depend on how the bytes arrive."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from bench.stream import HttpError, fetch_json, request, stream_completion

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@asynccontextmanager
async def serving(parts: Sequence[bytes]) -> AsyncIterator[str]:
    """A server that answers every request with `parts`, each sent on its own; yields its URL."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def events(*payloads: object) -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(payload).encode() for payload in payloads)


def completion(*texts: str) -> bytes:
    pieces = [{"choices": [{"index": 0, "text": text}]} for text in texts]
    usage = {"choices": [], "usage": {"completion_tokens": len(texts)}}
    return events(*pieces, usage) + b"data: [DONE]\n\n"


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_stream_is_the_same_however_its_bytes_are_cut(size: int) -> None:
    body = completion("naïve ", "日本", " 👩‍👩‍👧")
    cut = [chunk(body[start : start + size]) for start in range(0, len(body), size)]

    async def run() -> None:
        async with serving([CHUNKED, *cut, b"0\r\n\r\n"]) as url:
            sample = await stream_completion(url, {})
            assert (sample.text, sample.tokens) == ("naïve 日本 👩‍👩‍👧", 3)
            assert 0 < sample.ttft <= sample.ended - sample.started

    asyncio.run(run())


def test_an_empty_first_piece_is_no_first_token() -> None:
    async def run() -> None:
        async with serving([CHUNKED, chunk(completion("")), b"0\r\n\r\n"]) as url:
            with pytest.raises(ValueError, match="ended with 1 tokens"):
                await stream_completion(url, {})
        async with serving([CHUNKED, chunk(completion("")), b"0\r\n\r\n"]) as url:
            assert (await stream_completion(url, {}, silent=True)).tokens == 1
        timed = events({"choices": [], "timings": {"prompt_ms": 0.25}}) + completion("")
        async with serving([CHUNKED, chunk(timed), b"0\r\n\r\n"]) as url:
            assert (await stream_completion(url, {}, silent=True)).ttft == pytest.approx(0.00025)

    asyncio.run(run())


def test_an_error_event_in_a_stream_is_raised() -> None:
    body = completion("a").replace(b"data: [DONE]\n\n", b"") + events({"error": {"message": "engine gone"}})

    async def run() -> None:
        async with serving([CHUNKED, chunk(body), chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n"]) as url:
            with pytest.raises(HttpError, match="engine gone"):
                await stream_completion(url, {})

    asyncio.run(run())


def test_a_refusal_carries_its_status_and_headers() -> None:
    head = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 3\r\nContent-Length: 4\r\n\r\nbusy"

    async def run() -> None:
        async with serving([head]) as url:
            with pytest.raises(HttpError, match="HTTP 429: busy") as raised:
                await fetch_json(url)
            assert raised.value.headers["retry-after"] == "3"

    asyncio.run(run())


def test_a_stream_that_breaks_off_is_no_sample() -> None:
    async def run() -> None:
        async with serving([CHUNKED, chunk(completion("a"))[:20]]) as url:
            with pytest.raises(asyncio.IncompleteReadError):
                await stream_completion(url, {})

    asyncio.run(run())


def test_only_this_machine_is_asked() -> None:
    async def run() -> None:
        async with request("http://192.0.2.1:8000/v1/models"):
            pass

    with pytest.raises(ValueError, match="only servers on this machine"):
        asyncio.run(run())
