#!/usr/bin/env python3
"""Measures `onebase cluster` on this machine: what its address costs, and what four servers do more than one.

The engines compute nothing: each gives four rows a token every 20 ms (or, for what a token costs, one row its
tokens at once), so that servers share the machine's cores for HTTP alone. Needs the extra `ray`.

  python benchmarks/cluster.py
  python benchmarks/cluster.py --requests 400 --seconds 10
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import httpx2
from rich.console import Console

from bench import machine
from bench.command import Options
from bench.processes import free_port
from bench.report import percentile, table

ROOT = Path(__file__).parents[1]
SCRIPTED = ROOT / "tests/server/serve_scripted.py"
SOURCES = os.pathsep.join(str(ROOT / part) for part in ("engine", "server", "adapters", "clients/python"))
ENVIRONMENT = os.environ | {"PYTHONPATH": SOURCES, "COLUMNS": "200"}
CLUSTER = """
import sys
from onebase_route.cli import cluster
sys.exit(cluster(sys.argv[3:], [sys.executable, sys.argv[1], sys.argv[2]]))
"""
NAMES = [f"shop{number}" for number in range(12)]
"""Names of the adapters."""
TOKENS = 50
"""Tokens of a request, where requests a second are counted."""
STREAM_TOKENS = 200


class Cluster:
    """A cluster that runs, on servers whose engines behave as named."""

    def __init__(self, behaviour: str, folder: Path) -> None:
        self._behaviour = behaviour
        self._data = str(folder)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def command(self, *arguments: str) -> list[str]:
        own = [sys.executable, "-c", CLUSTER, str(SCRIPTED), self._behaviour]
        return [*own, *arguments, "--data-dir", self._data]

    def manage(self, *arguments: str) -> None:
        subprocess.run(self.command(*arguments), env=ENVIRONMENT, check=True, stderr=subprocess.DEVNULL)

    def servers(self) -> list[str]:
        with contextlib.suppress(httpx2.TransportError):
            text = httpx2.get(f"{self.url}/metrics", timeout=10).text
            return re.findall(r'onebase_route_ready\{replica="(.*)"\} 1', text)
        return []

    @property
    def ray(self) -> tuple[str, dict[str, str]]:
        """Return the address of Ray, and what lets a program in."""
        known = json.loads((Path(self._data) / "cluster.json").read_text())
        return known["address"], {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": known["token"]}


@contextlib.contextmanager
def running(behaviour: str) -> Iterator[Cluster]:
    """Run a cluster of one server."""
    with tempfile.TemporaryDirectory(prefix="onebase-bench-") as folder:
        cluster = Cluster(behaviour, Path(folder))
        options = f"--port {cluster.port} --drain-timeout 5 --queue-limit 4096 --max-sequences 4"
        up = cluster.command("up", *options.split())
        process = subprocess.Popen(up, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not cluster.servers():
                if process.poll() is not None:
                    raise RuntimeError("the cluster has not started: run `onebase cluster up` to see why")
                time.sleep(0.2)
            yield cluster
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)


# ---- what the address costs ------------------------------------------------------------------------


async def overhead(cluster: Cluster, requests: int) -> dict[str, list[list[float]]]:
    """Return milliseconds of requests of one token and of STREAM_TOKENS, by way.

    Each way has its turn, so that what else the machine does changes all of them alike.
    """
    (direct,) = cluster.servers()
    import ray
    from ray import serve

    ray.init(address=cluster.ray[0], namespace="serve", log_to_driver=False, logging_level="ERROR")
    handle = serve.get_deployment_handle("Server", "onebase").options(stream=True)
    async with httpx2.AsyncClient(timeout=60) as client:

        async def over_http(url: str, tokens: int) -> None:
            body = {"prompt": "a b c", "max_tokens": tokens, "stream": True}
            async with client.stream("POST", f"{url}/generate", json=body) as answer:
                async for _ in answer.aiter_raw():
                    pass

        async def over_ray(tokens: int) -> None:
            body = json.dumps({"prompt": "a b c", "max_tokens": tokens, "stream": True}).encode()
            async for _ in handle.ask.remote("/generate", body):
                pass

        ways: dict[str, Callable[[int], Awaitable[None]]] = {
            "a server itself": lambda tokens: over_http(direct, tokens),
            "the cluster's address": lambda tokens: over_http(cluster.url, tokens),
            "Ray's handle": over_ray,
        }
        found: dict[str, list[list[float]]] = {name: [[], []] for name in ways}
        for number in range(-20, requests):
            for name, way in ways.items():
                for times, tokens, every in zip(found[name], (1, STREAM_TOKENS), (1, 10), strict=True):
                    if number % every == 0:
                        begun = time.perf_counter()
                        await way(tokens)
                        times += [(time.perf_counter() - begun) * 1e3] if number >= 0 else []
    ray.shutdown()
    return found


def show_overhead(console: Console, found: dict[str, list[list[float]]]) -> None:
    columns = ["through", "1 token: p50", "more", "p99", "more", f"{STREAM_TOKENS} tokens: p50"]
    direct, _ = found["a server itself"]
    rows = []
    for name, (one, many) in found.items():
        cells = []
        for value, least in ((percentile(times, share) for times in (one, direct)) for share in (0.5, 0.99)):
            cells += [f"{value:.1f} ms", f"{value - least:+.1f}"]
        rows.append([name, *cells, f"{statistics.median(many):.0f} ms"])
    console.print(table(columns, rows))


# ---- what more servers do --------------------------------------------------------------------------


async def rate(url: str, seconds: float, at_once: int) -> float:
    """Return the requests a second that are answered, of `at_once` clients that ask again and again."""
    end = time.monotonic() + seconds
    answered = 0

    async def ask(number: int, client: httpx2.AsyncClient) -> None:
        nonlocal answered
        draw = random.Random(number)
        while time.monotonic() < end:
            prompt, name = f"{draw.random()} a", draw.choice(NAMES)
            body = {"prompt": prompt, "max_tokens": TOKENS, "adapter": name}
            (await client.post(f"{url}/generate", json=body)).raise_for_status()
            answered += time.monotonic() < end

    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(timeout=120, limits=limits) as client:
        await asyncio.gather(*(ask(number, client) for number in range(at_once)))
    return answered / seconds


def add_adapters(url: str) -> None:
    config = '{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}'
    for number, name in enumerate(NAMES):
        files = [
            ("files", ("adapter_config.json", config.encode(), "application/json")),
            ("files", ("adapter_model.safetensors", b"%d" % number, "application/octet-stream")),
        ]
        to = f"{url}/v1/adapters?wait=true&activate=true"
        httpx2.post(to, data={"name": name}, files=files, timeout=60).raise_for_status()


def main(argv: Sequence[str] | None = None) -> int:
    asked = Options(__doc__)
    asked.count("requests", 300, "of one token, by each way")
    asked.number("seconds", 15.0, "in which requests are counted")
    options = asked.parser.parse_args(argv)
    console = Console()
    console.print(machine.sentence(machine.describe()))
    with running("flood") as cluster:
        os.environ |= cluster.ray[1]  # before Ray is imported
        show_overhead(console, asyncio.run(overhead(cluster, options.requests)))
    rows: list[list[str]] = []
    with running("few") as cluster:
        add_adapters(cluster.url)
        one = 0.0
        for servers in (1, 2, 4):
            if servers > 1:
                cluster.manage("scale", str(servers))
            time.sleep(3)  # they look at the registry each second
            found = asyncio.run(rate(cluster.url, options.seconds, 8 * servers))
            one = one or found
            rows.append([str(servers), f"{found:.1f}", f"{found / one:.2f}", f"{found / one / servers:.0%}"])
    console.print(table(["servers", "requests/s", "to one", "to the ideal"], rows, left=0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
