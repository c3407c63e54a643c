#!/usr/bin/env python3
"""Measures `onebase cluster` on this machine: what its address costs, and what four servers do more than one.

The engines compute nothing: each gives four rows a token every 20 ms (or, for what a token costs, one row its
tokens at once), so that servers share the machine's cores for HTTP alone. Needs the extra `ray`.

  python benchmarks/cluster.py
  python benchmarks/cluster.py --requests 400 --seconds 10
  python benchmarks/cluster.py --seconds 60 --plot placement.png    # only: where each adapter's requests went

The plot goes second by second, while two servers become four, one is killed, and four become two. With it
comes what became of the requests, half of which are streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
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
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
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
AWAY_SECONDS = 3.0
"""Seconds between two looks at a server from which on it counts as away."""
TOKENS = 50
"""Tokens of a request, where requests a second are counted."""
STREAM_TOKENS = 200
ENDS = ANSWERED, LOST, OTHER, WRONG = "answered", "lost, to be sent again", "other errors", "wrong adapter"
ADAPTER_REQUESTS = re.compile(
    r'^onebase_adapter_requests_total{.*adapter="(shop\d+)".*} (\S+)$', re.MULTILINE
)
"""Pattern of an adapter's requests in a server's metrics."""


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
        options = f"--port {cluster.port} --drain-timeout 5 --queue-limit 4096 --max-rows 4"
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


# ---- where requests go, over time ------------------------------------------------------------------


@dataclass
class Placed:
    """Observations of one run. looks: the time of each look at a server, and the requests of each adapter
    until then. marks: actions on the servers, and their times. ended: how requests ended, by the last action
    before they began."""

    looks: dict[str, list[tuple[float, list[float]]]] = field(default_factory=dict)
    marks: list[tuple[float, str]] = field(default_factory=list)
    ended: defaultdict[int, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))


async def placed(cluster: Cluster, seconds: float, at_once: int) -> Placed:
    """Have clients ask for adapters while two servers become four, one is killed, and four become two.

    seconds: in all, besides what adding servers and taking them away takes.
    """
    made, begun = Placed(), time.monotonic()
    sums = list(itertools.accumulate(1 / (rank + 1) for rank in range(len(NAMES))))
    over = asyncio.Event()

    async def ask(number: int, client: httpx2.AsyncClient) -> None:
        draw, stream = random.Random(number), number % 2 == 0
        while not over.is_set():
            name = draw.choices(NAMES, cum_weights=sums)[0]
            body = {"prompt": f"{draw.random()} a", "max_tokens": 10, "adapter": name, "stream": stream}
            phase = len(made.marks)
            made.ended[phase][await ended(client, f"{cluster.url}/generate", body)] += 1

    async def look_at(server: str, client: httpx2.AsyncClient) -> None:
        with contextlib.suppress(httpx2.TransportError):
            text = (await client.get(f"{server}/metrics", timeout=2)).text
            counts = dict(ADAPTER_REQUESTS.findall(text))
            found = [float(counts.get(name, 0)) for name in NAMES]
            made.looks.setdefault(server, []).append((time.monotonic() - begun, found))

    async def look(client: httpx2.AsyncClient) -> None:
        servers: set[str] = set()
        while not over.is_set():
            servers |= set(await asyncio.to_thread(cluster.servers))
            await asyncio.gather(asyncio.sleep(1), *(look_at(server, client) for server in servers))

    def kill_one() -> None:
        os.kill(process_of(sorted(cluster.servers())[0]), signal.SIGKILL)

    async def act() -> None:
        doing: list[tuple[str, Callable[[], None]]] = [
            ("four servers", lambda: cluster.manage("scale", "4")),
            ("one is killed", kill_one),
            ("two servers", lambda: cluster.manage("scale", "2")),
        ]
        for what, action in doing:
            await asyncio.sleep(seconds / 4)
            made.marks.append((time.monotonic() - begun, what))
            await asyncio.to_thread(action)
        await asyncio.sleep(seconds / 4)
        over.set()

    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(timeout=60, limits=limits) as client:
        await asyncio.gather(act(), look(client), *(ask(number, client) for number in range(at_once)))
    return made


async def ended(client: httpx2.AsyncClient, url: str, body: dict[str, Any]) -> str:
    """Return how a request to /generate ended."""
    try:
        answer = await client.post(url, json=body)
    except httpx2.TransportError:
        return LOST
    text = answer.text
    if answer.status_code == 503 or "replica_lost" in text:
        return LOST
    whole = text.endswith("data: [DONE]\n\n") if body["stream"] else text.endswith("}")
    if answer.status_code != 200 or not whole or '"error":{' in text:
        return OTHER
    return ANSWERED if f'"adapter":"{body["adapter"]}@' in text else WRONG


def show_ended(console: Console, made: Placed) -> None:
    phases = ("two servers", *(f"then {what}" for _, what in made.marks))
    rows = [[what, *(f"{made.ended[phase][end]:,}" for end in ENDS)] for phase, what in enumerate(phases)]
    console.print(table(["", *ENDS], rows))


def process_of(url: str) -> int:
    """Return the process of the server at an address."""
    port = url.rpartition(":")[2]
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if ("--port", port) in itertools.pairwise(words) and any(SCRIPTED.name in word for word in words):
            return int(process.pid)
    raise RuntimeError(f"nobody serves {url}")


def draw(made: Placed, title: str, file: Path) -> None:
    """Draw a panel for each server: requests answered a second, each adapter a colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    servers = sorted(made.looks, key=lambda server: (made.looks[server][0][0], server))
    last = max(looks[-1][0] for looks in made.looks.values())
    colors: Any = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    figure, panels = pyplot.subplots(
        len(servers), 1, figsize=(12, 1.8 * len(servers) + 1.6), sharex=True, sharey=True, squeeze=False
    )
    for number, (server, panel) in enumerate(zip(servers, panels[:, 0], strict=True), start=1):
        times = np.array([0.0, *(at for at, _ in made.looks[server]), last])
        counts = np.array([[0.0] * len(NAMES), *(count for _, count in made.looks[server])])
        counts = np.vstack([counts, counts[-1]])
        more, seconds = np.diff(counts, axis=0), np.maximum(np.diff(times), 1e-3)
        rates = np.where(more < 0, counts[1:], more) / seconds[:, None]  # it begins again with its process
        there = seconds <= AWAY_SECONDS
        height = np.zeros(len(seconds))
        for adapter in range(len(NAMES)):
            rate = rates[:, adapter] * there
            panel.bar(times[:-1], rate, seconds, bottom=height, color=colors[adapter], align="edge")
            height += rate
        for begin, length in zip(times[:-1][~there], seconds[~there], strict=True):
            panel.axvspan(begin, begin + length, color="0.88", linewidth=0)
        for at, _ in made.marks:
            panel.axvline(at, color="black", linestyle="--", linewidth=1)
        panel.set_ylabel(f"server {number}\nrequests/s")
        panel.grid(axis="y", alpha=0.3)
    for at, what in made.marks:
        panels[0, 0].annotate(what, (at, 1.02), xycoords=("data", "axes fraction"), ha="center", va="bottom")
    panels[-1, 0].set(xlabel="seconds", xlim=(0, last), ylim=(0, None))
    handles = [Patch(color=color, label=name) for name, color in zip(NAMES, colors, strict=False)]
    handles.append(Patch(color="0.88", label="away"))
    figure.suptitle(title)
    figure.legend(handles=handles, loc="lower center", ncols=7, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


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
    plot = "only draw where requests went, over --seconds (needs matplotlib)"
    asked.add("--plot", type=Path, metavar="FILE", help=plot)
    asked.count("clients", 16, "of the plot")
    options = asked.parser.parse_args(argv)
    console = Console()
    if options.plot:
        with running("few") as cluster:
            add_adapters(cluster.url)
            cluster.manage("scale", "2")
            made = asyncio.run(placed(cluster, options.seconds, options.clients))
        draw(made, f"{len(NAMES)} adapters by Zipf's law, {options.clients} clients", options.plot)
        show_ended(console, made)
        console.print(f"{options.plot}: which server answered for which adapter, second by second")
        return 0
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
