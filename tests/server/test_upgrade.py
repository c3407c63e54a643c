"""Two servers, and the route before them, replaced one after the other by another release, under requests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import httpx2
import pytest

from .access import Keys, client_with
from .support import SOURCES, ForkedServers, Server, free_port, upload

OLD, NEW = "0.1.0", "0.2.0"
DRAIN = 0.2
"""Less than a long stream takes, in seconds: it is handed over to the other server."""
LONG = 150
"""Number of tokens of a long stream."""


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Keys]:
    made = Keys(tmp_path / "shared")
    yield made
    made.close()


class Releases:
    """Starts processes of a release, each at an address that stays."""

    def __init__(self, start: ForkedServers, shared: Path, key_file: Path) -> None:
        self._start = start
        self._shared = (
            "--registry", f"sqlite:///{shared / 'registry.db'}", "--store", str(shared / "store"),
            "--sync-seconds", "0.1", "--drain-timeout", str(DRAIN),
        )  # fmt: skip
        self._key_file = key_file
        self.processes: list[Server] = []

    def server(self, release: str, port: int, folder: Path) -> Server:
        folder.mkdir(exist_ok=True)
        options = ["--port", str(port), "--data-dir", str(folder), *self._shared]
        return self._run(["words", *options], release, port)

    def route(self, port: int, servers: list[Server], *options: str) -> Server:
        urls = [part for server in servers for part in ("--replica", server.url)]
        command = ["route", "--port", str(port), "--key-file", str(self._key_file), *urls, *options]
        return self._run(command, NEW, port)

    def _run(self, command: list[str], release: str, port: int) -> Server:
        environment = os.environ | {"PYTHONPATH": SOURCES, "ONEBASE_TEST_RELEASE": release}
        process = self._start.start(command, environment, -1)
        self.processes.append(Server(process, port, self._key_file.parent))
        return self.processes[-1]


@contextlib.contextmanager
def clients(asks: list[Callable[[int], object]]) -> Iterator[Counter[object]]:
    """Ask again and again, each in a thread of its own, until the block ends. What came of it is counted: the
    name of what was asked, where all was right, or else what was wrong."""
    answers: Counter[object] = Counter()
    stop = threading.Event()

    def ask_on(ask: Callable[[int], object]) -> None:
        for number in count():
            if stop.is_set():
                return
            try:
                wrong = ask(number)
            except (httpx2.HTTPError, KeyError, ValueError) as error:
                wrong = repr(error)
            answers[f"{ask.__name__}: {wrong}" if wrong else ask.__name__] += 1

    threads = [threading.Thread(target=ask_on, args=[ask]) for ask in asks]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_an_upgrade_of_one_server_after_the_other_and_of_the_route_fails_no_request(
    forked_servers: ForkedServers, keys: Keys, tmp_path: Path
) -> None:
    key = keys.make("admin")
    key_file = tmp_path / "key"
    key_file.touch(0o600)
    key_file.write_text(key)
    releases = Releases(forked_servers, keys.file.parent, key_file)
    ports = [free_port() for _ in range(3)]
    try:
        servers = [releases.server(OLD, port, tmp_path / f"server{port}") for port in ports[1:]]
        for server in servers:
            server.wait_ready()
        route = releases.route(ports[0], servers)
        route.wait_ready()
        with contextlib.ExitStack() as open_clients:
            https = [open_clients.enter_context(client_with(route, key)) for _ in range(4)]
            body = {"prompt": "one two three", "temperature": 0}
            made = upload(https[0], "shop", b"0", query="wait=true&activate=true").raise_for_status().json()
            whole = https[0].post("/generate", json={**body, "max_tokens": LONG}).raise_for_status().json()
            text = whole["choices"][0]["text"]
            active, next_active = [made["version"]], list[str]()

            def answer(number: int) -> object:
                """A request sees what was active when it was sent, or what came after."""
                known = len(active)
                told = https[0].post("/generate", json={**body, "adapter": "shop", "max_tokens": 5})
                if told.status_code != 200:
                    return told.text
                choice, version = told.json()["choices"][0], told.json()["adapter"].partition("@")[2]
                later = [*next_active, *active[known - 1 :]]
                is_old = any(one.startswith(version) for one in active if one not in later)
                return (is_old or not choice["text"] or not text.startswith(choice["text"])) and told.text

            def stream(number: int) -> object:
                return streamed(https[1], 20 + number % 30)

            def long_stream(number: int) -> object:
                return streamed(https[2], LONG)

            def streamed(http: httpx2.Client, tokens: int) -> object:
                events = []
                with http.stream(
                    "POST", "/generate", json={**body, "max_tokens": tokens, "stream": True}
                ) as told:
                    lines = [line.removeprefix("data: ") for line in told.iter_lines() if line]
                if told.status_code != 200 or lines[-1] != "[DONE]":
                    return lines[-1]
                events = [json.loads(line) for line in lines[:-1]]
                if any("error" in event for event in events):
                    return lines[-2]
                found = "".join(choice["text"] for event in events for choice in event.get("choices", []))
                used = events[-1]["usage"]["completion_tokens"]
                return not (text.startswith(found) and used == tokens) and f"{used} tokens: {found[-80:]}"

            def change(number: int) -> object:
                """Uploads and activations, by turns."""
                next_active[:] = active[-2:-1] if number % 2 else []
                if not next_active:
                    told = upload(https[3], "shop", f"{number + 1}".encode(), query="wait=true&activate=true")
                else:
                    told = https[3].post("/v1/adapters/shop/activate", json={"version": next_active[0]})
                if told.status_code != 200:
                    return told.text
                active.append(told.json()["version"])
                seen = https[3].get("/v1/adapters/shop").json()["version"]
                return seen != active[-1] and f"{seen} after {active[-1]}"

            with clients([answer, stream, long_stream, change]) as answers:
                for number, old in enumerate(servers):
                    old.signal(signal.SIGTERM)
                    assert old.exit_status() == 0
                    servers[number] = releases.server(NEW, old.port, tmp_path / f"server{old.port}")
                    servers[number].wait_ready()  # and on at once: the route need not have seen it yet
                new_route = releases.route(ports[0], servers, "--take-over", str(route.process.pid))
                assert route.exit_status() == 0
                before = answers["long_stream"]
                new_route.wait_for(lambda: answers["long_stream"] > before)

            assert {*answers} == {"answer", "stream", "long_stream", "change"}, answers
            assert min(answers[one] for one in ("answer", "stream", "change")) >= 10, answers
            for server in servers:
                with client_with(server, key) as http:
                    assert http.get("/version").json()["version"] == NEW
    finally:
        for one in releases.processes:
            one.process.kill()
            one.process.wait()
