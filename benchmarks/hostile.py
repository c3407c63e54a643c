#!/usr/bin/env python3
"""Measures what a tenant that does its worst costs another one's streams.

Two tenants have keys with every scope but admin. The first streams a text, again and again. Each has a client
in a process of its own, and the second's leaves the cores to the server and to the first's, since it would be
on another machine. The first is measured alone, beside a second tenant that streams as many ordinary texts as
it attacks with, and beside each attack of that tenant and all of them at once: grammars that are large or
never compile, prompts that are long or many, answers that fill every place, uploads, jobs, names that the Hub
does not have, bodies that take long to read, requests that are refused, and connections that dawdle. Of the
first tenant's streams the time between two events is taken.

  python benchmarks/hostile.py                          # each attack for 20 s, all of them for ten minutes
  python benchmarks/hostile.py --attacks grammars --seconds 30
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console

from bench import machine
from bench.command import Options, names
from bench.processes import end_on_signals, make_key, onebase_server
from bench.report import percentile, table

ROOT = Path(__file__).resolve().parent.parent
PLAIN_STREAMS = 16
"""Streams of the second tenant's ordinary load, and of its prompts that are long."""
GRAMMARS = 60
CLIENT_NICENESS = 10
"""Niceness of the second tenant's client, which gets a tenth of a core that the server wants as well."""


def long_body(begin: bytes, piece: bytes, end: bytes) -> bytes:
    """Return a body of as many pieces as fit into what a server takes."""
    return begin + piece * ((1_990_000 - len(begin) - len(end)) // len(piece)) + end


BODIES = (
    ("/generate", b"[" * 490_000),
    ("/v1/completions", long_body(b'{"model": "base", "prompt": [', b"1000,", b"1]}")),
    ("/generate", long_body(b'{"prompt": [', b"1e-300,", b"1]}")),
    ("/generate", long_body(b'{"prompt": [', b"9" * 4000 + b",", b"1]}")),
    ("/generate", b"{" + b",".join(b'"%d":{}' % one for one in range(24_000)) + b"}"),
    ("/generate", long_body(b'{"prompt": "', rb"\u00e9", b'"}')),
    ("/generate", long_body(b'{"prompt": "', b"a", b'", "max_tokens": 1}')),
)
"""Bodies that cost a server most, and their paths."""


class Attacker:
    """The second tenant. Each attack is one request or a few; `run` repeats it."""

    def __init__(self, http: httpx2.AsyncClient, base: str) -> None:
        self._http = http
        self._base = base
        self._numbers = itertools.count()
        self.answers: Counter[str] = Counter()

    async def run(self, attack: Callable[[Attacker], Awaitable[None]], until: float) -> None:
        while time.monotonic() < until:
            try:
                await attack(self)
            except (httpx2.HTTPError, OSError) as error:
                self.answers[type(error).__name__] += 1

    async def post(self, path: str, body: Any = None, **more: Any) -> httpx2.Response:
        answer = (
            await self._http.post(path, json=body, **more) if body else await self._http.post(path, **more)
        )
        code = answer.json().get("error", {}).get("code", "") if answer.status_code >= 400 else ""
        self.answers[f"{answer.status_code} {code}".strip()] += 1
        return answer

    async def plain(self) -> None:
        await self.post(
            "/generate", {"prompt": f"{next(self._numbers)}", "max_tokens": 200, "ignore_eos": True}
        )

    async def grammar(self) -> None:
        """Send a schema that is large, or whose patterns are found to be too many only by compiling it."""
        number = next(self._numbers)
        if number % 5 < 2:
            names = {f"p{n}": {"type": "string", "format": "date-time"} for n in range(2000)}
            schema: dict[str, Any] = {"type": "object", "properties": names, "title": f"{number}"}
        else:
            meeting = [
                {"patternProperties": {f"^a{{1,{n}}}$": {"pattern": f"^.*[a-z]{{{n}}}.*$"}}}
                for n in range(3, 60)
            ]
            schema = {"allOf": [{"properties": {"a": {"type": "string"}}}, *meeting], "title": f"{number}"}
        await self.post("/generate", {"prompt": "x", "guided_json": schema, "max_tokens": 100})

    async def long_prompt(self) -> None:
        await self.post("/generate", {"prompt": f"{next(self._numbers)} word" * 1500, "max_tokens": 1})

    async def long_answer(self) -> None:
        await self.post(
            "/generate", {"prompt": f"{next(self._numbers)}", "max_tokens": 1500, "ignore_eos": True}
        )

    async def many_prompts(self) -> None:
        prompts = [f"{next(self._numbers)} " + "word " * 180 for _ in range(64)]
        await self.post("/v1/completions", {"model": self._base, "prompt": prompts, "max_tokens": 1})

    async def upload(self) -> None:
        """Upload an adapter under a new name, activate it, and delete it."""
        folder, name = ROOT / "examples/adapters/orders", f"evil-{next(self._numbers)}"
        files = [
            ("files", (one, (folder / one).read_bytes()))
            for one in ("adapter_config.json", "adapter_model.safetensors")
        ]
        answer = await self.post("/v1/adapters?wait=true&activate=true", files=files, data={"name": name})
        if answer.status_code < 400:
            await self._http.delete(f"/v1/adapters/{name}?force=true")

    async def job(self) -> None:
        rows = "\n".join(json.dumps({"prompt": f"{n}", "completion": "x" * 200}) for n in range(2000))
        answer = await self.post(
            "/v1/files", files={"file": ("rows.jsonl", rows)}, data={"purpose": "fine-tune"}
        )
        if answer.status_code < 400:
            file = answer.json()["id"]
            await self.post(
                "/v1/fine_tuning/jobs", {"model": self._base, "training_file": file, "suffix": "evil"}
            )
        await asyncio.sleep(1.0)

    async def missing_name(self) -> None:
        await self.post("/generate", {"prompt": "x", "adapter": f"hub:nobody/{next(self._numbers)}@main"})

    async def nonsense(self) -> None:
        """Send a body that takes long to read, of each kind in turn."""
        path, body = BODIES[next(self._numbers) % len(BODIES)]
        await self.post(path, content=body, headers={"content-type": "application/json"})

    async def refused(self) -> None:
        """Send requests that are refused by their address and headers alone, forty a second."""
        await self.post("/nowhere")
        await self.post("/generate", headers={"origin": "http://evil.example"})
        await self.post("/generate", headers={"host": "evil.example"})
        await self.post("/generate", headers={"authorization": "Bearer none"})
        await asyncio.sleep(0.1)

    async def dawdle(self) -> None:
        """Open connections that send a byte now and then."""
        url = self._http.base_url
        streams = [await asyncio.open_connection(url.host, url.port) for _ in range(20)]
        for _ in range(10):
            for _, writer in streams:
                writer.write(b"P")
            await asyncio.sleep(0.2)
        for _, writer in streams:
            writer.close()


ATTACKS: dict[str, tuple[Callable[[Attacker], Awaitable[None]], int]] = {
    "plain": (Attacker.plain, PLAIN_STREAMS),
    "grammars": (Attacker.grammar, GRAMMARS),
    "many streams": (Attacker.long_answer, 100),
    "long prompts": (Attacker.long_prompt, PLAIN_STREAMS),
    "many prompts": (Attacker.many_prompts, 20),
    "uploads": (Attacker.upload, 4),
    "jobs": (Attacker.job, 2),
    "hub": (Attacker.missing_name, 8),
    "nonsense": (Attacker.nonsense, 4),
    "refusals": (Attacker.refused, 5),
    "connections": (Attacker.dawdle, 10),
}
"""Attacks of the second tenant, and how many of each run at once, by name."""


def new_client(url: str, key: str) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        base_url=url,
        headers={"authorization": f"Bearer {key}"},
        timeout=120,
        limits=httpx2.Limits(max_connections=None),
    )


def stream_apart(url: str, key: str, seconds: float) -> list[float]:
    """Stream texts for so long, in the process of an executor; return what `stream` does."""

    async def run() -> list[float]:
        async with new_client(url, key) as http:
            return await stream(http, time.monotonic() + seconds)

    return asyncio.run(run())


async def stream(http: httpx2.AsyncClient, until: float) -> list[float]:
    """Stream texts until then; return the seconds between two events of one stream."""
    gaps: list[float] = []
    body = {
        "prompt": "Once upon a time",
        "max_tokens": 100,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
    }
    while time.monotonic() < until:
        last = None
        async with http.stream("POST", "/generate", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data:"):
                    now = time.perf_counter()
                    gaps += [] if last is None else [now - last]
                    last = now
    return gaps


def give_way() -> None:
    """Leave the cores to others. Between sessions Linux shares them whatever the niceness, so this process
    gets a session of its own, and its niceness goes for that (`sched(7)`, "The autogroup feature")."""
    os.setsid()
    os.nice(CLIENT_NICENESS)
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(CLIENT_NICENESS))


def attack_apart(url: str, key: str, attacks: Sequence[str], seconds: float) -> Counter[str]:
    """Run these attacks at once for so long, in the process of an executor; return what they are answered."""

    async def run() -> Counter[str]:
        async with new_client(url, key) as client:
            models = (await client.get("/v1/models")).json()["data"]
            attacker = Attacker(client, models[0]["id"])
            until = time.monotonic() + seconds
            running = [
                asyncio.create_task(attacker.run(attack, until))
                for attack, times in (ATTACKS[name] for name in attacks)
                for _ in range(times)
            ]
            await asyncio.sleep(seconds)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            return attacker.answers

    return asyncio.run(run())


async def measure(
    url: str, keys: Sequence[str], attacks: Sequence[str], seconds: float, clients: Sequence[Executor]
) -> tuple[list[float], Counter[str]]:
    """Return the first tenant's gaps beside these attacks of the second, and what the second was answered.

    clients: the process of each tenant's client.
    """
    loop = asyncio.get_running_loop()
    attack = loop.run_in_executor(clients[1], attack_apart, url, keys[1], attacks, seconds)
    head_start = min(2.0, seconds / 4)
    await asyncio.sleep(head_start)
    gaps = await loop.run_in_executor(clients[0], stream_apart, url, keys[0], seconds - head_start)
    return gaps, await attack


async def bench(options: argparse.Namespace, console: Console) -> None:
    loads: list[tuple[str, list[str], float]] = [("alone", [], options.seconds)]
    loads += [(name, [name], options.seconds) for name in options.attacks]
    if options.minutes:
        loads.append(
            ("all at once", [name for name in options.attacks if name != "plain"], options.minutes * 60)
        )
    with tempfile.TemporaryDirectory(prefix="onebase-hostile-") as folder:
        data, log = Path(folder) / "data", Path(folder) / "server.log"
        keys = [make_key(data, tenant) for tenant in ("good", "evil")]
        rows: list[list[str]] = []
        serve = ("--data-dir", data, "--hub-allow", "nobody/*")
        spawn = get_context("spawn")
        with ProcessPoolExecutor(1, spawn) as good, ProcessPoolExecutor(1, spawn, give_way) as evil:
            async with onebase_server(log, *serve) as (url, _):
                alone = 0.0
                for name, attacks, seconds in loads:
                    console.print(f"{name}: {seconds:.0f} s")
                    gaps, answers = await measure(url, keys, attacks, seconds, (good, evil))
                    p99 = percentile(gaps, 0.99)
                    alone = alone or p99
                    seen = ", ".join(f"{count} x {what}" for what, count in answers.most_common(4))
                    times = [f"{one * 1e3:.0f}" for one in (percentile(gaps, 0.5), p99, max(gaps))]
                    rows.append([name, seen, str(len(gaps)), *times, f"{p99 / alone:.1f}x"])
        columns = ("beside", "answers", "events", "p50", "p99", "longest", "p99 by alone")
        title = "time between two events of another tenant's stream, ms"
        console.print(table(columns, rows, title, left=2))


def main(argv: Sequence[str] | None = None) -> int:
    asked = Options(__doc__)
    asked.add("--attacks", type=names(*ATTACKS), default=list(ATTACKS), help="comma-separated (default: all)")
    asked.number("seconds", 20, "length of each attack")
    asked.number("minutes", 10, "length of all of them at once; 0: leave it out")
    asked.common("busy")
    options = asked.parser.parse_args(argv)
    console = Console()
    end_on_signals()
    machine.demand_quiet(options.busy, console)
    asyncio.run(bench(options, console))
    return 0


if __name__ == "__main__":
    sys.exit(main())
