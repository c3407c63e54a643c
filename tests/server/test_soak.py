"""Hundreds of requests, many of them abandoned, leave nothing behind in the api; and servers whose processes
and disks fail at random lose nothing, answer rightly and leave nothing behind: see chaos.py."""

from __future__ import annotations

import asyncio
import os
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from .chaos import NAMES, Asked, Change, Chaos, Places, same_events
from .support import Server, Starter

REQUESTS = 240


def open_files(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


async def one_request(client: httpx2.AsyncClient, number: int) -> str:
    """One request, seeded by its number: streamed or not, read to the end or given up."""
    chance = random.Random(number)
    body: dict[str, Any] = {
        "prompt": "one two three",
        "max_tokens": chance.randint(1, 20),
        "n": chance.randint(1, 3),
    }
    if chance.random() < 0.3:
        body["stop"] = ["three"]
    if chance.random() < 0.4:
        answer = await client.post("/generate", json=body)
        return "whole" if answer.status_code == 200 else f"status {answer.status_code}"
    async with client.stream(
        "POST", "/generate", json={**body, "max_tokens": 2000, "stream": True}
    ) as answer:
        async for line in answer.aiter_lines():
            if chance.random() < 0.2 or line == "data: [DONE]":
                break
    return "left"


async def soak(url: str) -> list[str]:
    limits = httpx2.Limits(max_connections=32)
    async with httpx2.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        return await asyncio.gather(*(one_request(client, number) for number in range(REQUESTS)))


def test_requests_and_abandoned_streams_leave_no_row_and_no_open_file(serve_scripted: Starter) -> None:
    with serve_scripted("words") as server, server.client() as http:
        asyncio.run(soak(server.url))
        server.wait_for(lambda: http.get("/status").json()["requests"] == 0)
        before = open_files(server)

        def are_closed() -> bool:
            return open_files(server) <= before

        for _ in range(5):  # connections to the registry are opened as they are needed, and kept
            outcomes = asyncio.run(soak(server.url))
            server.wait_for(lambda: http.get("/status").json()["requests"] == 0)
            server.wait_for(lambda: http.get("/status").json()["stats"]["sequences_running"] == 0)
            assert set(outcomes) == {"whole", "left"}
            with suppress(TimeoutError):
                server.wait_for(are_closed, 15)
            if are_closed():
                break
            before = open_files(server)
        else:
            raise AssertionError(f"each round leaves files open, {before} by now")
        assert "Traceback" not in server.log


# ---- faults ---------------------------------------------------------------------------------------

SEEDS = range(*map(int, os.environ.get("ONEBASE_SOAK_SEEDS", "1 2").split()))
FAULTS = int(os.environ.get("ONEBASE_SOAK_FAULTS", "6"))


def test_the_ledger_sees_who_answered_and_refusals_without_a_fault(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    def stream(label: str) -> str:
        return f'data: {{"type":"end","adapter":{label}}}\n\n'

    chaos = Chaos(serve_scripted, Places(tmp_path, remote=False), 1, 1)
    asked, version, now = Asked("/generate", {}, same_events(stream("null"))), "a" * 64, time.monotonic()
    chaos._changes.append(Change(NAMES[0], version, now - 200.0, now - 199.0))
    right, other = stream(f'"{NAMES[0]}@{version[:12]}"'), stream(f'"{NAMES[0]}@{"b" * 12}"')
    for name, told, is_wrong in (
        (NAMES[0], right, False),
        (NAMES[0], other, True),
        (NAMES[0], stream("null"), True),
        (None, stream("null"), False),
        (None, right, True),
    ):
        assert bool(chaos._judged(asked, name, now, 200, told)) is is_wrong, (name, told)
    for code in ("memory_refused", "adapter_unavailable"):
        for faulted, is_wrong in ((now - 1, False), (now - 100, True)):
            chaos._faulted_at = faulted
            assert bool(chaos._judged(asked, None, now, 503, f'"code":"{code}"')) is is_wrong


@pytest.mark.parametrize(
    ("servers", "remote"),
    [(1, False), (2, False), pytest.param(2, True, marks=pytest.mark.full)],
    ids=["one server", "two servers", "two servers on PostgreSQL and S3"],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_servers_under_random_faults_lose_nothing_answer_rightly_and_leave_nothing_behind(
    serve_scripted: Starter, tmp_path: Path, seed: int, servers: int, remote: bool
) -> None:
    with Places(tmp_path, remote=remote) as places:
        # Another seed for each, so that together they meet all kinds of faults.
        chaos = Chaos(serve_scripted, places, 10 * seed + servers, servers, is_short=FAULTS <= 10)
        chaos.run(FAULTS)
    assert not chaos.wrong, "\n".join(chaos.wrong[:20])
    assert sum(chaos.faults.values()) == FAULTS
    assert chaos.outcomes["200"]
