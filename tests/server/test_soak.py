"""Hundreds of requests, many of them abandoned, leave nothing behind in the api; and two servers behind one
address are killed, stopped and kept from their database, while clients and an operator go on.

The second can be repeated for as many seeds as wanted, each with as many events:
`ONEBASE_SOAK_SEEDS="0 100" ONEBASE_SOAK_EVENTS=60 pytest tests/server/test_soak.py -k servers`.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import text
from tests.postgres import postgres_server

from onebase_adapters.registry.database import Database

from .support import Server, Starter, routing, upload
from .test_resumption import by_choice, words
from .test_several_servers import LEASE, shared, stop_between_writes
from .training_support import make_job, messages, openai_client

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
        server.wait_for(lambda: http.get("/status").json()["requests"] == 0, 60)
        before = open_files(server)

        outcomes = asyncio.run(soak(server.url))

        server.wait_for(lambda: http.get("/status").json()["requests"] == 0, 60)
        server.wait_for(lambda: http.get("/status").json()["stats"]["sequences_running"] == 0, 60)
        server.wait_for(lambda: open_files(server) <= before, 60)
        assert set(outcomes) == {"whole", "left"}
        assert "Traceback" not in server.log


# ---- two servers behind one address ----------------------------------------------------------------

SEEDS = range(*map(int, os.environ.get("ONEBASE_SOAK_SEEDS", "1 2").split()))
EVENTS = int(os.environ.get("ONEBASE_SOAK_EVENTS", "14"))
STOPS = (0.3, 2.0, 9.0) if EVENTS < 20 else (0.3, 2.0, 9.0, 25.0)
"""Seconds for which a server stands still: longer than its lease, and than the route waits for it."""
CLIENTS = 6
NAMES = ("red", "green", "blue")
DELETED = "adapter_deleted"


@dataclass(eq=False)
class Change:
    """What an operator asked for: the version of a name that is active then, None for none. until: when its
    answer came; infinity: no answer said that it was done, and it may be done at any time."""

    name: str
    digest: str | None
    since: float
    until: float = math.inf
    forced: bool = False


@dataclass
class Asked:
    """A kind of stream: its path, its body without an adapter, and its events as told by an idle server."""

    path: str
    body: dict[str, Any]
    events: dict[tuple[int, ...], str] = field(default_factory=dict)


def kinds(client: int) -> list[Asked]:
    """The streams that a client asks for."""
    prompt, length = words(f"client{client}"), 40 + 10 * client
    many = [{"prompt": prompt, "max_tokens": length}, {"prompt": words("x"), "max_tokens": 9}]
    return [
        Asked("/generate", {"prompt": prompt, "max_tokens": length, "logprobs": 1}),
        Asked("/generate", {"prompt": prompt, "max_tokens": length, "n": 2}),
        Asked("/v1/completions", {"prompt": prompt, "max_tokens": length}),
        Asked("/generate/many", {"requests": many}),
    ]


def stream_of(http: httpx2.Client, asked: Asked, name: str | None) -> tuple[int, str]:
    """Status and text of a stream; of what is not answered by one, its error."""
    body = {**asked.body, "stream": True}
    if asked.path == "/generate/many":
        body = {"requests": [{**one, "adapter": name} for one in asked.body["requests"]]}
    elif asked.path == "/generate":
        body["adapter"] = name
    else:
        body["model"] = name or "smollm2-135m-instruct"
    with http.stream("POST", asked.path, json=body) as answer:
        return answer.status_code, "".join(answer.iter_text())


def same_events(text: str) -> dict[tuple[int, ...], str]:
    """The events of each choice without what differs from one answer to the next."""
    text = re.sub(r'"adapter":"[^"]*"', '"adapter":null', text)
    text = re.sub(r'"model":"[^"]*"', '"model":""', text)
    return by_choice(re.sub(r'"cached_tokens":\d+', '"cached_tokens":0', text))


def lasting_port() -> int:
    """A free port that no connection gets by chance while its server is started again."""
    while True:
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", random.randrange(20_000, 30_000)))
            return int(tried.getsockname()[1])


class Torture:
    """Two servers behind a route, at the same addresses through all restarts; clients that stream, and an
    operator who changes adapters and makes jobs. All choices follow from the seed."""

    def __init__(self, serve: Starter, folder: Path, registry: str, seed: int, stack: ExitStack) -> None:
        self.chance = random.Random(seed)
        self._registry = Database(registry)
        stack.callback(self._registry.close)
        self.wrong: list[str] = []
        self.outcomes: Counter[str] = Counter()
        self._serve = serve
        self._folder = folder
        self._seed = seed
        self._stack = stack
        self._ports = [lasting_port() for _ in range(2)]
        self.servers = [self._start(number) for number in range(2)]
        self._started = list(self.servers)
        for server in self.servers:
            server.wait_ready()
        self.route = stack.enter_context(routing(self.servers, folder))
        self._changes: list[Change] = []
        self._engines_died: list[float] = []
        self._versions: dict[str, list[str]] = {name: [] for name in NAMES}
        self._jobs = 0
        self._kinds = [kinds(number) for number in range(CLIENTS)]
        self._over = threading.Event()

    def _start(self, number: int) -> Server:
        options = (*shared(self._folder), "--registry", self._registry.url)
        options = (*options, "--port", str(self._ports[number]))
        place = self._folder / f"server{number}"
        place.mkdir(exist_ok=True)
        made = self._serve("words", *options, ready=False, data_dir=place, environment=LEASE)
        server = self._stack.enter_context(made)
        server.port, server.url = self._ports[number], f"http://127.0.0.1:{self._ports[number]}"
        return server

    # ---- clients --------------------------------------------------------------------------------

    def record(self) -> None:
        """The events of each kind of stream while nothing happens."""
        with self.route.client() as http:
            for asked in (one for some in self._kinds for one in some):
                status, text = stream_of(http, asked, None)
                assert status == 200, text
                asked.events = same_events(text)

    def _client(self, number: int) -> None:
        chance = random.Random(f"{self._seed} {number}")
        with httpx2.Client(base_url=self.route.url, timeout=150) as http:
            while not self._over.is_set():
                asked, name = chance.choice(self._kinds[number]), chance.choice((None, *NAMES))
                since = time.monotonic()
                try:
                    status, text = stream_of(http, asked, name)
                except httpx2.HTTPError as error:
                    status, text = 0, repr(error)
                why = self._judged(asked, name, since, status, text)
                if why:
                    self.wrong.append(f"{asked.path} of {name}: {why}: {text[-400:]}")

    def _judged(self, asked: Asked, name: str | None, since: float, status: int, text: str) -> str:
        """What is wrong with an answer; "" for nothing."""
        code = (re.findall(r'"code":"(\w+)"', text) or [""])[-1]
        self.outcomes[code or str(status)] += 1
        during = [one for one in self._changes if one.name == name and one.until > since]
        if status == 503 and code:
            return ""
        if code == DELETED:
            return "" if any(one.forced for one in during) else "not deleted"
        if code in ("adapter_not_found", "model_not_found", "version_not_found"):
            return "" if any(one.digest is None for one in self._possible(name, since)) else "it is there"
        if code in ("engine_restarted", "crash_suspect", "engine_starting", "engine_restarting"):
            return "" if any(at > since - 30 for at in self._engines_died) else "no engine died"
        if code or status != 200:
            return f"status {status} {code}"
        if same_events(text) != asked.events:
            return "other events"
        told = {one.partition("@")[2] for one in re.findall(r'"adapter":"([^"]*)"', text)}
        allowed = {(one.digest or "")[:12] for one in self._possible(name, since)}
        return "" if told <= allowed else f"of version {told - allowed}, not {allowed}"

    def _possible(self, name: str | None, since: float) -> list[Change]:
        """What may have been active from then on."""
        of_name = [one for one in self._changes if one.name == name]
        before = [one for one in of_name if one.until <= since]
        return [one for one in of_name if one.until > since] + before[-1:]

    # ---- an operator ------------------------------------------------------------------------------

    def _changed(self, name: str, digest: str | None, ask: Callable[[], httpx2.Response], **how: Any) -> None:
        """Note a change before it is asked for, and whether it was done."""
        change = Change(name, digest, time.monotonic(), **how)
        self._changes.append(change)
        try:
            answer = ask()
        except httpx2.HTTPError as error:
            self.wrong.append(f"a change of {name} got no answer: {error!r}")
            return
        if answer.status_code < 300:
            change.digest = digest if digest is None else answer.json().get("version", digest)
            change.until = time.monotonic()
        self.outcomes[f"change {answer.status_code}"] += 1

    def add(self, http: httpx2.Client) -> None:
        """A new version, active."""
        name, content = self.chance.choice(NAMES), f"content {self.chance.random()}".encode()
        change = Change(name, None, time.monotonic())
        self._changes.append(change)
        answer = upload(http, name, content, query="wait=true&activate=true")
        if answer.status_code == 200:
            change.digest, change.until = answer.json()["version"], time.monotonic()
            self._versions[name].append(answer.json()["version"])
        else:  # it may become ready, and active, later
            found = re.findall(r"[0-9a-f]{64}", answer.text)
            change.digest = found[0] if found else self._digest_later(http, name)
        self.outcomes[f"upload {answer.status_code}"] += 1

    def _digest_later(self, http: httpx2.Client, name: str) -> str | None:
        answer = http.get(f"/v1/adapters/{name}/versions")
        newest = answer.json()["data"][:1] if answer.status_code == 200 else []
        return newest[0]["version"] if newest else None

    def activate(self, http: httpx2.Client) -> None:
        """A version that there is."""
        name = self.chance.choice(NAMES)
        if self._versions[name]:
            version = self.chance.choice(self._versions[name])
            body = {"version": version}
            self._changed(name, version, lambda: http.post(f"/v1/adapters/{name}/activate", json=body))

    def deactivate(self, http: httpx2.Client) -> None:
        name = self.chance.choice(NAMES)
        self._changed(name, None, lambda: http.post(f"/v1/adapters/{name}/deactivate", json={}))

    def delete(self, http: httpx2.Client) -> None:
        """A name by force."""
        name = self.chance.choice(NAMES)
        self._versions[name] = []
        self._changed(name, None, lambda: http.delete(f"/v1/adapters/{name}?force=true"), forced=True)

    def train(self, http: httpx2.Client) -> None:
        """A job, unless too much is broken just now."""
        self._jobs += 1
        try:
            make_job(
                openai_client(self.route), "long", suffix=f"job{self._jobs}", extra={"activate": "always"}
            )
        except Exception as error:
            self.outcomes[f"job: {type(error).__name__}"] += 1

    # ---- faults -----------------------------------------------------------------------------------

    def kill(self, http: httpx2.Client) -> None:
        """A server, which is started again at once."""
        number = self.chance.randrange(2)
        old = self.servers[number]
        old.signal(signal.SIGCONT)
        old.signal(signal.SIGKILL)
        old.exit_status()
        self.servers[number] = self._start(number)
        self._started.append(self.servers[number])

    def kill_engine(self, http: httpx2.Client) -> None:
        server = self.chance.choice(self.servers)
        try:
            engine = server.engine_pid()
        except ValueError:
            return  # it has none yet
        self._engines_died.append(time.monotonic())
        os.kill(engine, signal.SIGKILL)

    def stop(self, http: httpx2.Client) -> None:
        """A server stands still, sometimes for longer than its lease, sometimes while it writes."""
        server, seconds = self.chance.choice(self.servers), self.chance.choice(STOPS)
        if self.chance.random() < 0.8 and self._registry.url.startswith("sqlite"):
            stop_between_writes(server, self._folder)
        else:
            server.signal(signal.SIGSTOP)
        time.sleep(seconds)
        server.signal(signal.SIGCONT)

    def lock(self, http: httpx2.Client) -> None:
        """Nobody can write to the database for some time, and whoever reads waits for nothing."""
        seconds = self.chance.choice((0.3, 1.5, 4.0))
        with self._registry.engine.begin() as connection:
            connection.execute(text("UPDATE change_counter SET value = value"))
            time.sleep(seconds)

    def run(self, events: int) -> None:
        """All of it, with so many events."""
        with self.route.client(150) as http:
            for name in NAMES:
                self._changes.append(Change(name, None, 0.0, 0.0))
            self.record()
            for _ in range(4):
                self.add(http)
            clients = [threading.Thread(target=self._client, args=(one,)) for one in range(CLIENTS)]
            for client in clients:
                client.start()
            ways = [self.kill] * 4 + [self.stop] * 2 + [self.add] * 3 + [self.activate] * 2
            ways += [self.kill_engine, self.lock, self.deactivate, self.delete, self.train, self.train]
            try:
                for _ in range(events):
                    way = self.chance.choice(ways)
                    way(http)
                    self.outcomes[f"did {way.__name__}"] += 1
                    time.sleep(self.chance.choice((0.0, 0.1, 1.0)))
            finally:
                self._over.set()
            for client in clients:
                client.join()
            for server in self.servers:
                server.wait_ready()

    def _rows(self, query: str) -> list[Any]:
        with self._registry.engine.connect() as connection:
            return list(connection.execute(text(query)))

    # ---- what is left ------------------------------------------------------------------------------

    def settle(self) -> None:
        """Wait until nothing runs; note what is left that should not be."""
        with self.servers[0].client() as one, self.servers[1].client() as other:
            for server, http in zip(self.servers, (one, other), strict=True):
                server.wait_for(lambda: http.get("/status").json()["requests"] == 0, 60)  # noqa: B023
            client = openai_client(self.servers[0])

            def jobs() -> list[Any]:
                return list(client.fine_tuning.jobs.list(limit=100))

            self.servers[0].wait_for(
                lambda: all(job.status in ("succeeded", "failed") for job in jobs()), 180
            )
            for job in jobs():
                told = messages(client, job.id)
                if job.status != "succeeded" or sum("is proved" in line for line in told) != 1:
                    self.wrong.append(f"job {job.id} {job.status} {job.error}: {told}")
            clean = {
                "files of jobs": "SELECT * FROM job_files",
                "claims of proofs": "SELECT server, until FROM proofs WHERE until IS NOT NULL",
                "unfinished versions": "SELECT state FROM versions WHERE state NOT IN ('ready', 'failed')",
            }
            for what, query in clean.items():
                try:
                    self.servers[0].wait_for(lambda: not self._rows(query), 90)  # noqa: B023
                except TimeoutError:
                    self.wrong.append(f"{what}: {self._rows(query)}")
            seen = [
                [(adapter["id"], adapter["version"]) for adapter in http.get("/v1/adapters").json()["data"]]
                for http in (one, other)
            ]
            if seen[0] != seen[1]:
                self.wrong.append(f"the servers know different adapters: {seen}")
        for server in (*self._started, self.route):
            for part in server.log.split("Traceback")[1:]:  # scripted processes may end as they like
                if re.search("/onebase_(server|route)/", part[:3000]):
                    self.wrong.append(f"a log has a traceback: {part[:3000]}")


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=pytest.mark.full)])
@pytest.mark.parametrize("seed", SEEDS)
def test_two_servers_that_are_killed_stopped_and_kept_waiting_answer_rightly_to_the_end(
    serve_scripted: Starter, tmp_path: Path, seed: int, kind: str
) -> None:
    with ExitStack() as stack:
        registry = f"sqlite:///{tmp_path / 'registry.db'}"
        if kind == "postgresql":
            registry = stack.enter_context(postgres_server()).database()
        torture = Torture(serve_scripted, tmp_path, registry, seed, stack)
        torture.run(EVENTS)
        torture.settle()
        print(json.dumps(torture.outcomes))
        (tmp_path / "logs").write_text("".join(one.log for one in (*torture._started, torture.route)))
    assert not torture.wrong, "\n".join(torture.wrong[:20])
    assert torture.outcomes["200"]
