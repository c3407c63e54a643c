"""Random faults against servers under load, with a ledger that judges: nothing lost, nothing wrong, nothing
orphaned.

`make chaos` runs it: one server or two behind `onebase route`, on SQLite and a folder, or on PostgreSQL and
an object store behind proxies that can be cut. Clients stream all the while, and an operator uploads,
activates, rolls out, deletes and trains; engine, verifier and trainers are scripted, so that each answer is
known. All choices follow from the seed; their timing does not.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import math
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx2
from sqlalchemy import text
from tests.disks import fill

from onebase.cli import main as command
from onebase_adapters.registry.database import Database
from onebase_adapters.store.blobs import version_digest
from onebase_server.processes.crash_suspects import FORGIVEN_AFTER

from .support import (
    CONFIG,
    ForkedServers,
    Server,
    Starter,
    alive,
    children,
    command_of,
    routing,
    serving,
    upload,
)
from .test_resumption import by_choice, words
from .test_several_servers import LEASE, stop_between_writes
from .training_support import make_job, messages, openai_client

CLIENTS = 6
NAMES = ("red", "green", "blue")
DELETED = "adapter_deleted"
STOPS = (0.3, 1.0, 2.0, 9.0)
"""Seconds for which a process stands still: the longest is longer than a lease."""
SHORT = (0.3, 1.5, 4.0)
DISK_BYTES = 192 << 20
DELAYS = (0.01, 0.05, 0.2)
"""Seconds by which a disk, a database or a store is slower."""
JUMPS = (-86400.0, -120.0, 120.0, 86400.0)
_NO_FAULT = "no fault in the minute before"
_CODES_RESUMED = ("disk_full", "store_unavailable")
"""Codes of jobs that failed, and go on once they are resumed."""
_CODES_AWAY = (
    "registry_unavailable", "store_unavailable", "store_full", "registry_full", "adapter_unavailable",
)  # fmt: skip


class Proxy:
    """A TCP port before another server, that can be cut, or made slow."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        self._connect = connect
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.is_cut = False
        self.delay = 0.0
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break all connections, and refuse new ones."""
        self.is_cut = True
        for one in list(self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self.is_cut, self.delay = False, 0.0

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                if self.is_cut:
                    client.close()
                    continue
                try:
                    server = self._connect()
                except OSError:
                    client.close()
                    continue
                self._open |= {client, server}
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if self.delay:
                    time.sleep(self.delay)
                target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            self._open.discard(one)
        with suppress(OSError):
            target.close()


class Places:
    """Where the servers of one run keep what they share. remote: PostgreSQL and an object store.

    is_small: whether it is a disk of its own, which can be filled: that takes the right to mount one.
    """

    def __init__(self, folder: Path, *, remote: bool) -> None:
        self.folder = folder
        self.remote = remote
        self.database: Proxy | None = None
        self.store: Proxy | None = None
        self.environment: dict[str, str] = {}
        self.registry = f"sqlite:///{folder / 'registry.db'}"
        self.options: tuple[str, ...] = ()
        self.is_small = False
        self._stack = ExitStack()

    def _mount(self) -> bool:
        """Put a small disk in the folder's place. Return False where that is not permitted."""
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(self.folder)]
        try:
            mounted = subprocess.run(mount, capture_output=True).returncode == 0
        except FileNotFoundError:
            mounted = False
        if mounted:
            self._stack.callback(subprocess.run, ["umount", "--lazy", str(self.folder)], check=True)
        return mounted

    def __enter__(self) -> Self:
        with ExitStack() as begun:  # what fails after the mount unmounts it
            begun.push(self._stack)
            self._begin()
            begun.pop_all()
        return self

    def _begin(self) -> None:
        self.is_small = self._mount()
        store = str(self.folder / "store")
        url = self.registry
        if self.remote:
            from tests.object_store import object_store
            from tests.postgres import postgres_server

            postgres = self._stack.enter_context(postgres_server())
            place = str(postgres.folder / ".s.PGSQL.5432")

            def connect() -> socket.socket:
                made = socket.socket(socket.AF_UNIX)
                made.connect(place)
                return made

            self.database = Proxy(connect)
            self._stack.callback(self.database.close)
            name = postgres.create()
            self.registry = postgres.url(name)
            url = f"postgresql://postgres@127.0.0.1:{self.database.port}/{name}?sslmode=disable"
            bucket = httpx2.URL(self._stack.enter_context(object_store()))
            self.store = Proxy(lambda: socket.create_connection((bucket.host, bucket.port)))
            self._stack.callback(self.store.close)
            httpx2.put(bucket.copy_with(path="/adapters"), timeout=120).raise_for_status()
            self.environment = {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.store.port}",
                "AWS_ACCESS_KEY_ID": "id",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_MAX_ATTEMPTS": "1",
            }
            store = "s3://adapters/chaos"
        self.options = ("--registry", url, "--store", store, "--sync-seconds", "0.1")

    def __exit__(self, *_: object) -> None:
        self._stack.close()


@dataclass(eq=False)
class Change:
    """What an operator asked for: the version of a name that is active then, None for none.

    until: when its answer came; infinity: no answer said that it was done, and it may be done at any time.
    is_rollout: whether its version answers beside the active one, until then.
    """

    name: str
    digest: str | None
    since: float
    until: float = math.inf
    forced: bool = False
    is_rollout: bool = False
    what: str = "nothing"


@dataclass
class Asked:
    """A kind of stream: its path, its body without an adapter, and its events from an idle server."""

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
    text = re.sub(r'"model":"[^"]*"(,"system_fingerprint":"[^"]*")?', '"model":""', text)
    return by_choice(re.sub(r'"cached_tokens":\d+', '"cached_tokens":0', text))


def error_code(told: str) -> str:
    """The code of the error with which an answer ends; "" for none."""
    return (re.findall(r'"code":"(\w+)"', told) or [""])[-1]


def lasting_port() -> int:
    """A free port that no connection gets by chance while its server is started again."""
    while True:
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", random.randrange(20_000, 30_000)))
            return int(tried.getsockname()[1])


def _family(pid: int) -> Iterator[int]:
    """Yield a process, and all that it and those started."""
    yield pid
    with suppress(OSError):
        for child in children(pid):
            yield from _family(child)


def _started_at(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


class Chaos:
    """Servers behind a route, at the same addresses through all restarts; clients that stream; an operator;
    and faults, one after the other. `wrong` is the ledger's verdict: empty, if all is well.

    is_short: for a look of seconds: a fault lasts no longer than the shortest, and few jobs are made.
    """

    def __init__(
        self, serve: Starter, places: Places, seed: int, servers: int, *, is_short: bool = False
    ) -> None:
        self.chance = random.Random(seed)
        self.wrong: list[str] = []
        self.outcomes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        """Time that faults took, by kind."""
        self.phases: dict[str, float] = {}
        """Time that each part of the run took, in seconds."""
        self._operator = random.Random(f"{seed} operator")
        self._serve = serve
        self._places = places
        self._seed = seed
        self._stops: tuple[float, ...] = STOPS[:1] if is_short else STOPS
        self._short: tuple[float, ...] = SHORT[:1] if is_short else SHORT
        self._most_jobs = 2 if is_short else 40
        self._pids: set[tuple[int, str]] = set()
        """Processes of all servers that there were, with their starting times."""
        self._ports = [lasting_port() for _ in range(servers)]
        self._clock = places.folder / "clock"
        self._clock.write_bytes(b"0.0")
        self._disk = places.folder / "disk"
        self._disk.write_bytes(b"0.0")
        self._changes = [Change(name, None, 0.0, 0.0) for name in NAMES]
        self._engines_died: list[float] = []
        self._faulted_at = 0.0
        self._versions: dict[str, list[str]] = {name: [] for name in NAMES}
        self._kept: dict[tuple[str, str], float] = {}
        """Versions that were acknowledged, by name, with the time of that."""
        self._jobs: list[str] = []
        self._files: list[str] = []
        self._kinds = [kinds(number) for number in range(CLIENTS)]
        self._over = threading.Event()
        self._stack = ExitStack()
        self.servers: list[Server] = []
        self._started: list[Server] = []

    # ---- servers ----------------------------------------------------------------------------------

    def _start(self, number: int) -> Server:
        options = (*self._places.options, "--port", str(self._ports[number]))
        options += ("--request-log", "text", "--request-log-size", "20MB")
        place = self._places.folder / f"server{number}"
        place.mkdir(exist_ok=True)
        environment = LEASE | self._places.environment
        environment |= {"ONEBASE_TEST_CLOCK": str(self._clock), "ONEBASE_TEST_DISK": str(self._disk)}
        made = self._serve("words", *options, ready=False, data_dir=place, environment=environment)
        server = self._stack.enter_context(made)
        server.port, server.url = self._ports[number], f"http://127.0.0.1:{self._ports[number]}"
        self._started.append(server)
        return server

    def _pick(self) -> Server:
        return self.chance.choice(self.servers)

    def _child(self, kind: str) -> int | None:
        """A process that a server has started; None if there is none now."""
        found = []
        for server in self.servers:
            with suppress(FileNotFoundError):
                found += [pid for pid in children(server.process.pid) if kind in command_of(pid)]
        return self.chance.choice(found) if found else None

    def _note_processes(self) -> None:
        for server in self.servers:
            for pid in _family(server.process.pid):
                with suppress(OSError, IndexError):
                    self._pids.add((pid, _started_at(pid)))

    # ---- clients ----------------------------------------------------------------------------------

    def record(self) -> None:
        """Note the events of each kind of stream while nothing happens."""
        every = [one for some in self._kinds for one in some]
        with self.route.client(150) as http, ThreadPoolExecutor(len(every)) as pool:
            for asked, (status, told) in zip(
                every, pool.map(lambda one: stream_of(http, one, None), every), strict=True
            ):
                if status != 200:
                    raise RuntimeError(told)
                asked.events = same_events(told)

    def _client(self, number: int) -> None:
        chance = random.Random(f"{self._seed} {number}")
        with httpx2.Client(base_url=self.route.url, timeout=150) as http:
            while not self._over.is_set():
                asked, name = chance.choice(self._kinds[number]), chance.choice((None, *NAMES))
                since = time.monotonic()
                try:
                    status, told = stream_of(http, asked, name)
                except httpx2.HTTPError as error:
                    status, told = 0, repr(error)
                why = self._judged(asked, name, since, status, told)
                if why:
                    logged = [one for server in self.servers for one in server.log.splitlines()]
                    failed = [one for one in logged if f"{asked.path} (" in one][-1:] if status == 500 else []
                    self.wrong.append(f"{asked.path} of {name}: {why}: {told[-400:]} {failed}")

    def _judged(self, asked: Asked, name: str | None, since: float, status: int, told: str) -> str:
        """What is wrong with an answer; "" for nothing."""
        code = error_code(told)
        self.outcomes[code or str(status)] += 1
        during = [one for one in list(self._changes) if one.name == name and one.until > since]
        engine_died = any(at > since - 30 for at in self._engines_died)
        if status == 503 and code:
            is_expected = code == "crash_suspect" or self._faulted_at > since - 60 or engine_died
            return "" if is_expected else _NO_FAULT
        if code == DELETED:
            return "" if any(one.forced for one in during) else "not deleted"
        if code in ("adapter_not_found", "model_not_found", "version_not_found"):
            return "" if any(one.digest is None for one in self._possible(name, since)) else "it is there"
        if code in ("engine_restarted", "crash_suspect", "engine_starting", "engine_restarting"):
            return "" if engine_died else "no engine died"
        if code == "crashes_engine":  # its prompt was there each time, and is refused for that long
            deaths = sum(at > since - FORGIVEN_AFTER for at in self._engines_died)
            return "" if deaths > 1 else f"{deaths} engines died"
        if code in ("no_replica", "replica_lost", *_CODES_AWAY):
            return "" if self._faulted_at > since - 60 else _NO_FAULT
        if code or status != 200:
            return f"status {status} {code}"
        if same_events(told) != asked.events:
            return "other events"
        named = re.findall(r'"(?:adapter|system_fingerprint)":"([^"]*@[^"]*)"', told)
        versions = {one.partition("@")[2] for one in named}
        if bool(versions) != (name is not None):
            return f"by {named or 'the base alone'}"
        possible = self._possible(name, since)
        allowed = {one.digest[:12] for one in possible if one.digest}
        if versions <= allowed:
            return ""
        return f"of version {versions - allowed}, not {allowed}, after {self._told_of(name, since)}"

    def _told_of(self, name: str | None, now: float) -> str:
        """What was asked for a name, and what the registry has of it, in seconds from now."""
        asked = [
            f"{one.what} {(one.digest or 'none')[:12]} {one.since - now:+.1f} to {one.until - now:+.1f}"
            for one in list(self._changes)
            if one.name == name
        ]
        with suppress(Exception):
            rows = self._rows(
                "SELECT action, version, actor, at FROM history JOIN adapters ON adapters.id = adapter_id "
                f"WHERE name = '{name}' ORDER BY history.id"
            )
            at = time.time() - (time.monotonic() - now)
            asked.append("in the registry")
            asked += [f"{row[0]} {(row[1] or 'none')[:12]} {row[2]} {row[3] - at:+.1f}" for row in rows[-12:]]
        return ", ".join(asked[-24:])

    def _possible(self, name: str | None, since: float) -> list[Change]:
        """What may have answered from then on."""
        of_name = [one for one in list(self._changes) if one.name == name]
        before = [one for one in of_name if one.until <= since and not one.is_rollout]
        return [one for one in of_name if one.until > since] + before[-1:]

    # ---- an operator ------------------------------------------------------------------------------

    def _operate(self) -> None:
        ways = [self._add] * 3 + [self._activate] * 3 + [self._roll_out] * 2
        ways += [self._deactivate, self._delete, self._train, self._train, self._upload_file]
        with self.route.client(150) as http:
            while not self._over.is_set():
                way = self._operator.choice(ways)
                try:
                    way(http)
                except httpx2.HTTPError as error:
                    if time.monotonic() - self._faulted_at > 60:
                        self.wrong.append(f"{way.__name__} got no answer: {error!r}")
                    self.outcomes[f"operator {type(error).__name__}"] += 1
                self._over.wait(self._operator.choice((0.0, 0.2, 0.5)))

    def _change(self, name: str, digest: str | None, **how: Any) -> Change:
        what = sys._getframe(1).f_code.co_name.strip("_")
        change = Change(name, digest, time.monotonic(), what=what, **how)
        self._changes.append(change)
        return change

    def _ended(self, change: Change, what: str, answer: httpx2.Response) -> bool:
        self.outcomes[f"{what} {answer.status_code}"] += 1
        if answer.status_code < 300:
            change.until = time.monotonic()
        return answer.status_code < 300

    def _add(self, http: httpx2.Client) -> None:
        """A new version, active."""
        name, content = self._operator.choice(NAMES), f"content {self._operator.random()}".encode()
        version = version_digest(*(hashlib.sha256(one).hexdigest() for one in (CONFIG.encode(), content)))
        change = self._change(name, version)
        if self._ended(change, "upload", upload(http, name, content, query="wait=true&activate=true")):
            self._versions[name].append(version)
            self._kept[name, version] = change.until

    def _activate(self, http: httpx2.Client) -> None:
        """A version that there is."""
        name = self._operator.choice(NAMES)
        if self._versions[name]:
            version = self._operator.choice(self._versions[name])
            change = self._change(name, version)
            self._ended(
                change, "activate", http.post(f"/v1/adapters/{name}/activate", json={"version": version})
            )

    def _roll_out(self, http: httpx2.Client) -> None:
        """A share for a version, and its end: promoted or rolled back."""
        name = self._operator.choice(NAMES)
        if not self._versions[name]:
            return
        version = self._operator.choice(self._versions[name])
        place = f"/v1/adapters/{name}/rollout"
        share = self._change(name, version, is_rollout=True)
        begun = http.post(place, json={"version": version, "percent": 50})
        self.outcomes[f"rollout {begun.status_code}"] += 1
        if 400 <= begun.status_code < 500:
            share.until = time.monotonic()
            return
        self._over.wait(0.5)
        if self._operator.random() < 0.5:
            promoted = self._change(name, version)
            if self._ended(promoted, "promote", http.post(f"{place}/promote")):
                share.until = promoted.until
        else:
            self._ended(share, "roll back", http.post(f"{place}/rollback"))

    def _deactivate(self, http: httpx2.Client) -> None:
        name = self._operator.choice(NAMES)
        change = self._change(name, None)
        self._ended(change, "deactivate", http.post(f"/v1/adapters/{name}/deactivate", json={}))

    def _delete(self, http: httpx2.Client) -> None:
        """A name by force."""
        name = self._operator.choice(NAMES)
        self._versions[name] = []
        for one in [one for one in self._kept if one[0] == name]:
            del self._kept[one]
        change = self._change(name, None, forced=True)
        self._ended(change, "delete", http.delete(f"/v1/adapters/{name}?force=true"))

    def _train(self, http: httpx2.Client) -> None:
        """A job, unless too much is broken just now."""
        if len(self._jobs) >= self._most_jobs:
            return
        try:
            suffix = f"job{len(self._jobs)}"
            job = make_job(openai_client(self.route), "long", suffix=suffix, extra={"activate": "always"})
            self._jobs.append(job.id)
            self.outcomes["job made"] += 1
        except Exception as error:
            self.outcomes[f"job: {type(error).__name__}"] += 1

    def _upload_file(self, http: httpx2.Client) -> None:
        content = f'{{"prompt": "{self._operator.random()}"}}'.encode()
        form = {"file": ("rows.jsonl", content, "application/octet-stream")}
        answer = http.post("/v1/files", data={"purpose": "fine-tune"}, files=form)
        self.outcomes[f"file {answer.status_code}"] += 1
        if answer.status_code == 200:
            self._files.append(answer.json()["id"])

    # ---- faults -----------------------------------------------------------------------------------

    def kill_server(self) -> None:
        """Kill a server, and start it again at once."""
        number = self.chance.randrange(len(self.servers))
        old = self.servers[number]
        self._note_processes()
        old.signal(signal.SIGCONT)
        old.signal(signal.SIGKILL)
        old.exit_status()
        self._engines_died.append(time.monotonic())
        self.servers[number] = self._start(number)

    def _kill(self, kind: str) -> None:
        pid = self._child(kind)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_engine(self) -> None:
        self._engines_died.append(time.monotonic())
        self._kill("engine")

    def kill_verifier(self) -> None:
        self._kill("verifier")

    def kill_trainer(self) -> None:
        self._kill("trainer")

    def stop_server(self) -> None:
        """Have a server stand still, sometimes for longer than its lease."""
        server, seconds = self._pick(), self.chance.choice(self._stops)
        if self._places.remote:
            server.signal(signal.SIGSTOP)
        else:
            stop_between_writes(server, self._places.folder)
        time.sleep(seconds)
        server.signal(signal.SIGCONT)

    def stop_engine(self) -> None:
        """Have an engine stand still, for less than it may."""
        pid, seconds = self._child("engine"), self.chance.choice(self._short)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(seconds)
                os.kill(pid, signal.SIGCONT)

    def lock_database(self) -> None:
        """Nobody can write to the database for some time."""
        with self._registry.engine.begin() as connection:
            connection.execute(text("UPDATE change_counter SET value = value"))
            time.sleep(self.chance.choice(self._short))

    def fail_writes(self) -> None:
        """No file of a server can grow over what it may write: each write fails, as on a full disk."""
        self._limited(self._pick().process.pid, resource.RLIMIT_FSIZE, 0)

    def tight_memory(self) -> None:
        """A verifier or a trainer gets no more memory."""
        pid = self._child(self.chance.choice(("verifier", "trainer")))
        if pid is not None:
            self._limited(pid, resource.RLIMIT_DATA, 1 << 20)

    def no_memory(self) -> None:
        """A server that is ready gets no more memory: in one that begins a library may meet the limit first,
        and end the process with its own words."""
        server = self._pick()
        with suppress(httpx2.TransportError):
            if httpx2.get(f"{server.url}/ready", timeout=5).status_code == 200:
                self._limited(server.process.pid, resource.RLIMIT_DATA, 1 << 20)

    def _limited(self, pid: int, limit: int, most: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            before = resource.prlimit(pid, limit)
            resource.prlimit(pid, limit, (most, before[1]))
            time.sleep(self.chance.choice(self._short))
            for one in _family(pid):  # what it started meanwhile has inherited the limit
                with suppress(ProcessLookupError, PermissionError):
                    if resource.prlimit(one, limit) == (most, before[1]):
                        resource.prlimit(one, limit, before)

    def jump_clock(self) -> None:
        """The clock of all servers jumps, and comes back."""
        self._set(self._clock, self.chance.choice(JUMPS))
        time.sleep(self.chance.choice(self._short))
        self._set(self._clock, 0.0)

    def slow_disk(self) -> None:
        """Each step that the disk of all servers is asked for takes longer, and each commit of SQLite."""
        self._set(self._disk, self.chance.choice(DELAYS))
        time.sleep(self.chance.choice(self._short))
        self._set(self._disk, 0.0)

    def full_disk(self) -> None:
        """Nothing more fits on the disk of all servers."""
        filler = fill(self._places.folder)
        try:
            time.sleep(self.chance.choice(self._short))
        finally:
            filler.unlink()

    def _set(self, place: Path, value: float) -> None:
        made = place.with_suffix(".new")
        made.write_text(str(value))
        made.rename(place)

    def _cut(self, proxy: Proxy | None) -> None:
        if proxy is not None:
            proxy.cut()
            time.sleep(self.chance.choice(self._short))
            proxy.mend()

    def cut_database(self) -> None:
        self._cut(self._places.database)

    def cut_store(self) -> None:
        self._cut(self._places.store)

    def slow_database(self) -> None:
        self._slow(self._places.database)

    def slow_store(self) -> None:
        self._slow(self._places.store)

    def _slow(self, proxy: Proxy | None) -> None:
        if proxy is not None:
            proxy.delay = self.chance.choice(DELAYS)
            time.sleep(self.chance.choice(self._short))
            proxy.mend()

    def _ways(self) -> list[Callable[[], None]]:
        ways = [self.kill_server] * 2 + [self.kill_engine, self.kill_verifier, self.kill_trainer]
        ways += [self.stop_server, self.stop_engine, self.lock_database, self.fail_writes]
        ways += [self.slow_disk, self.tight_memory, self.no_memory, self.jump_clock]
        if self._places.is_small:
            ways += [self.full_disk]
        if self._places.remote:
            ways += [self.cut_database, self.cut_store, self.slow_database, self.slow_store]
        return ways

    # ---- the run ----------------------------------------------------------------------------------

    def run(self, faults: int) -> None:
        """All of it, with so many faults."""
        with self._stack:
            with self._timed("start"):
                self._begin()
            working = [threading.Thread(target=self._client, args=(one,)) for one in range(CLIENTS)]
            working.append(threading.Thread(target=self._operate))
            for thread in working:
                thread.start()
            try:
                with self._timed("faults and pauses"):
                    self._break(faults)
            finally:
                self._over.set()
                with self._timed("last answers"):
                    for thread in working:
                        thread.join()
            with self._timed("last start"):
                self._start_again()
                for server in self.servers:
                    server.wait_ready()
            self._settle()
            self._note_processes()
            with self._timed("end"):
                for server in self.servers:
                    server.signal(signal.SIGTERM)
                for server in self.servers:
                    server.exit_status(180)
        with self._timed("look for orphans"):
            self._check_orphans()

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.phases[phase] = time.monotonic() - began

    def _begin(self) -> None:
        """Start the servers and their route; note what idle ones answer; make some adapters."""
        self.servers = [self._start(number) for number in range(len(self._ports))]
        for server in self.servers:
            server.wait_ready()
        self._registry = Database(self._places.registry)
        self._stack.callback(self._registry.close)
        self.route = self._stack.enter_context(routing(self.servers, self._places.folder))
        self.record()
        with self.route.client(150) as http:
            for _ in range(4):
                self._add(http)

    def _break(self, faults: int) -> None:
        ways = self._ways()
        for number in range(faults):
            # Each kind comes as often as any other, in an order that follows from the seed.
            if number % len(ways) == 0:
                self.chance.shuffle(ways)
            self._start_again()
            way = ways[number % len(ways)]
            began = self._faulted_at = time.monotonic()
            way()
            self._faulted_at = time.monotonic()
            self.faults[way.__name__] += 1
            self.seconds[way.__name__] += self._faulted_at - began  # type: ignore[assignment]
            time.sleep(self.chance.choice((0.0, 0.1, 1.0)))

    def _start_again(self) -> None:
        """Start servers that have ended, as whoever watches over them would: one that begins on a full disk
        says so and ends."""
        for number, server in enumerate(self.servers):
            if server.process.poll() is not None:
                self.outcomes["started again"] += 1
                self.servers[number] = self._start(number)

    # ---- the ledger -------------------------------------------------------------------------------

    def _rows(self, query: str) -> list[Any]:
        with self._registry.engine.connect() as connection:
            return list(connection.execute(text(query)))

    def _settle(self) -> None:
        """Wait until nothing runs; note what was lost, and what is left that should not be."""
        with ExitStack() as clients:
            https = [clients.enter_context(server.client()) for server in self.servers]
            with self._timed("requests end"):
                for server, http in zip(self.servers, https, strict=True):
                    server.wait_for(lambda: http.get("/status").json()["requests"] == 0, 240)  # noqa: B023
            with self._timed("jobs end"):
                self._check_jobs()
            self._check_kept(https[0])
            clean = {
                "files of jobs": "SELECT * FROM job_files",
                "claims of proofs": "SELECT server, until FROM proofs WHERE until IS NOT NULL",
                "unfinished versions": "SELECT state FROM versions WHERE state NOT IN ('ready', 'failed')",
            }
            with self._timed("tables clear"):
                for what, query in clean.items():
                    try:
                        self.servers[0].wait_for(lambda: not self._rows(query), 240)  # noqa: B023
                    except TimeoutError:
                        self.wrong.append(f"orphaned {what}: {self._rows(query)}")
            seen = [
                [(adapter["id"], adapter["version"]) for adapter in http.get("/v1/adapters").json()["data"]]
                for http in https
            ]
            if any(one != seen[0] for one in seen):
                self.wrong.append(f"the servers know different adapters: {seen}")
            with self._timed("each stream once more"):
                self._check_streams(https[0])
            self._check_audit(self.servers[0])
            with self._timed("request logs end"):
                for http in https:
                    stats = http.get("/status").json()["stats"]
                    if stats and stats["sequences_running"]:
                        self.wrong.append(f"orphaned sequences: {stats['sequences_running']}")
                    self._check_log(http)
        for server in (*self._started, self.route):
            for frames in re.findall(r"Traceback.*\n((?:[ |].*\n|\n)*.*)", server.log):
                if re.search("/onebase_(server|route)/", frames):  # scripted processes may end as they like
                    self.wrong.append(f"a log has a traceback: {frames[-4000:]}")

    def _check_jobs(self) -> None:
        client = openai_client(self.servers[0])

        def jobs() -> dict[str, Any]:
            return {job.id: job for job in client.fine_tuning.jobs.list(limit=100)}

        with suppress(TimeoutError):
            self.servers[0].wait_for(
                lambda: all(job.status in ("succeeded", "failed") for job in jobs().values()), 240
            )
        failed = [
            job for job in jobs().values() if job.error is not None and job.error.code in _CODES_RESUMED
        ]
        with self.servers[0].client() as http:  # as their documentation says
            for job in failed:
                http.post(f"/v1/fine_tuning/jobs/{job.id}/resume")
        with suppress(TimeoutError):
            self.servers[0].wait_for(
                lambda: all(job.status in ("succeeded", "failed") for job in jobs().values()), 240
            )
        found = jobs()
        self.wrong += [f"lost job {one}" for one in self._jobs if one not in found]
        for job in found.values():
            told = messages(client, job.id)
            if job.status != "succeeded" or sum("is proved" in line for line in told) != 1:
                self.wrong.append(f"job {job.id} {job.status} {job.error}: {told}")

    def _check_kept(self, http: httpx2.Client) -> None:
        """Each acknowledged version and file is there, and what is active may be."""
        for name, version in self._kept:
            answer = http.get(f"/v1/adapters/{name}/versions")
            known = [one["version"] for one in answer.json().get("data", ())]
            if version not in known:
                self.wrong.append(f"lost version {version[:12]} of {name}")
        for file in self._files:
            if http.get(f"/v1/files/{file}").status_code != 200:
                self.wrong.append(f"lost file {file}")
        now = time.monotonic()
        active = {one["id"]: one["version"] for one in http.get("/v1/adapters").json()["data"]}
        for name in NAMES:
            possible = {one.digest for one in self._possible(name, now)}
            if active.get(name) not in possible:
                told = self._told_of(name, now)
                self.wrong.append(f"{name} is at {active.get(name)}, not {possible}, after {told}")

    def _check_streams(self, http: httpx2.Client) -> None:
        """Each kind of stream is answered, by the base or by an adapter that is active."""
        active = [one["id"] for one in http.get("/v1/adapters").json()["data"] if one["version"]]
        names = [None, *(name for name in NAMES if name in active)]
        every = [one for some in self._kinds for one in some]
        with self.route.client(150) as client, ThreadPoolExecutor(CLIENTS) as pool:

            def ask(number: int) -> str:
                return self._last_answer(client, every[number], names[number % len(names)])

            self.wrong += [why for why in pool.map(ask, range(len(every))) if why]

    def _last_answer(self, http: httpx2.Client, asked: Asked, name: str | None) -> str:
        """What is wrong with the answer to a stream now that nothing is broken; "" for nothing.

        It may take as long as servers and engines take to start. A prompt that is blamed for dead engines is
        refused for longer.
        """
        end = time.monotonic() + 240
        while True:
            since = time.monotonic()
            try:
                status, told = stream_of(http, asked, name)
            except httpx2.HTTPError as error:
                status, told = 0, repr(error)
            why, code = self._judged(asked, name, since, status, told), error_code(told)
            is_answered = (status == 200 and not code) or code == "crashes_engine"
            if is_answered and not why:
                return ""
            if is_answered or since > end:
                return f"{asked.path} of {name} at the end: {why or f'still {status} {code}'}: {told[-400:]}"
            time.sleep(0.5)

    def _check_audit(self, server: Server) -> None:
        """The entries of the audit log, which all servers write, are one chain."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = command(["audit", "verify", "--url", server.url])
        if status:
            self.wrong.append(f"the audit log is no chain: {said.getvalue()}")

    def _check_log(self, http: httpx2.Client) -> None:
        """A request of the log runs only while it does."""
        left = [one["id"] for one in self._logged(http) if one["state"] == "running"]
        if left:
            self.wrong.append(f"the log has requests that run for ever: {left[:5]}")

    def _logged(self, http: httpx2.Client) -> list[dict[str, Any]]:
        end = time.monotonic() + 120
        while True:
            found: list[dict[str, Any]] = http.get("/v1/requests?limit=1000").json()["data"]
            if time.monotonic() > end or not any(one["state"] == "running" for one in found):
                return found
            time.sleep(0.2)

    def _check_orphans(self) -> None:
        """No process of the run is left, and no temporary file but what the store sweeps by its age."""
        end = time.monotonic() + 120
        while (left := list(self._processes())) and time.monotonic() < end:
            time.sleep(0.2)
        self.wrong += [f"orphaned process {one}" for one in left]
        for path in self._places.folder.rglob("*"):
            if path.suffix in (".new", ".tmp", ".part") and path.parent.name != "tmp":
                self.wrong.append(f"orphaned file {path}")

    def _processes(self) -> Iterator[str]:
        for pid, started in self._pids:
            with suppress(OSError, IndexError):
                if _started_at(pid) == started and alive(pid):
                    yield Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()

    def report(self) -> str:
        """Tables of the faults, of where the time went and of what was answered, and the verdict."""
        lines = ["| fault | times | seconds |", "|---|---:|---:|"]
        lines += [
            f"| {name.replace('_', ' ')} | {count} | {self.seconds[name]:.0f} |"
            for name, count in sorted(self.faults.items())
        ]
        lines += ["", "| part | seconds |", "|---|---:|"]
        lines += [f"| {name} | {seconds:.0f} |" for name, seconds in self.phases.items()]
        lines += ["", "| outcome | times |", "|---|---:|"]
        lines += [f"| {name} | {count} |" for name, count in sorted(self.outcomes.items())]
        if not self._places.is_small:
            lines += ["", "No disk was filled: that takes the right to mount one."]
        verdict = "nothing lost, wrong or orphaned" if not self.wrong else f"{len(self.wrong)} findings"
        return "\n".join([*lines, "", f"seed {self._seed}, {sum(self.faults.values())} faults: {verdict}"])


def main(argv: list[str]) -> int:
    made = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    made.add_argument("--faults", type=int, default=1000, help="so many in all (default: 1000)")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--setup", choices=("one", "two", "remote", "all"), default="all")
    args = made.parse_args(argv)
    setups = {"one": (1, False), "two": (2, False), "remote": (2, True)}
    chosen = list(setups) if args.setup == "all" else [args.setup]
    failed = 0
    forked = ForkedServers()

    def start(behaviour: str, *options: str, **how: Any) -> contextlib.AbstractContextManager[Server]:
        return serving([behaviour], *options, start=forked.start, **how)

    try:
        for place, setup in enumerate(chosen):
            servers, remote = setups[setup]
            faults = args.faults // len(chosen) + (place < args.faults % len(chosen))
            with tempfile.TemporaryDirectory(prefix="onebase-chaos-") as folder:
                with Places(Path(folder), remote=remote) as places:
                    began = time.monotonic()
                    chaos = Chaos(functools.partial(start), places, args.seed, servers)
                    chaos.run(faults)
                print(f"## {setup}: {time.monotonic() - began:.0f} s\n\n{chaos.report()}\n", flush=True)
                for finding in chaos.wrong:
                    print(f"- {finding}\n", flush=True)
                failed += bool(chaos.wrong)
    finally:
        forked.close()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
