"""Server processes for tests: started on a free port, watched, and always ended."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Protocol, cast

import httpx2
import pytest
from fastapi.routing import APIRoute

from onebase_adapters.registry import ApiKeys
from onebase_adapters.registry.database import Database
from onebase_edge.settings import Settings
from onebase_server.http.app import create_app
from onebase_server.http.deps import Services

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = os.pathsep.join(str(ROOT / part) for part in ("engine", "server", "adapters", "clients/python"))
PATIENCE = 600.0
"""Seconds after which what a test waits for does not come any more, however busy the machine is."""
SHORTEST_PAUSE, LONGEST_PAUSE = 0.03, 0.2
"""Between two looks, in seconds: each takes processor time from what is waited for."""
KINDS = ("engine", "verifier", "trainer")
SERVERS = int(os.environ.get("ONEBASE_TEST_SERVERS", "1"))
"""Behind the address that tests ask: several share a registry and a store, behind `onebase route`."""
one_server = pytest.mark.skipif(SERVERS > 1, reason="asks for what one server alone has")
ROUTE = (sys.executable, "-c", "import sys; from onebase.cli import main; sys.exit(main())", "route")
CONFIG = '{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}'


class Server:
    """A server process: its URL, its log, and ways to end it."""

    def __init__(self, process: ServerProcess, port: int, data_dir: Path) -> None:
        self.process = process
        self.data_dir = data_dir
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self._log = bytearray()
        self._reading = threading.Lock()
        """Held from before a part of the log is taken out of its pipe until it is in `_log`."""
        threading.Thread(target=self._read_log, daemon=True).start()

    def _read_log(self) -> None:
        pipe = self.process.stderr
        while pipe is not None:
            select.select([pipe], [], [])
            with self._reading:
                data = os.read(pipe.fileno(), 1 << 16)
                self._log += data
                if not data:
                    pipe.close()
                    return

    def _read_rest(self) -> None:
        """Wait until all is read that was written so far: the end of the pipe comes with the last process
        that inherited it, which may live on."""
        pipe, end = self.process.stderr, time.monotonic() + PATIENCE
        while pipe is not None and time.monotonic() < end:
            with self._reading:
                if pipe.closed or not select.select([pipe], [], [], 0)[0]:
                    return
            time.sleep(0.01)

    @property
    def log(self) -> str:
        return bytes(self._log).decode(errors="replace")

    def client(self, timeout: float = 300.0) -> httpx2.Client:
        """What it answers must have a status that the OpenAPI file names."""
        return httpx2.Client(base_url=self.url, timeout=timeout, event_hooks={"response": [is_told]})

    def wait_ready(self) -> None:
        self.wait_for(lambda: self.status_of("/ready") == 200)

    def status_of(self, path: str) -> int | None:
        """The status of a GET; None while nobody listens."""
        try:
            return httpx2.get(self.url + path, timeout=10).status_code
        except httpx2.TransportError:
            return None

    def wait_for(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
        end, pause = time.monotonic() + seconds, SHORTEST_PAUSE
        while not condition():
            if self.process.poll() is not None:
                raise RuntimeError(f"the server exited with {self.process.returncode}:\n{self.log}")
            if time.monotonic() > end:
                raise TimeoutError(f"no luck within {seconds} s:\n{self.log}")
            time.sleep(pause)
            pause = min(1.2 * pause, LONGEST_PAUSE)

    def step_until_rows(self, step: Callable[[int], None], rows: int) -> None:
        """Give a scripted engine steps, one by one, until so many rows run: the first may take several."""
        with self.client() as http:

            def run() -> bool:
                step(1)
                stats = http.get("/status").json()["stats"]  # None before the first step
                return stats is not None and bool(stats["sequences_running"] == rows)

            self.wait_for(run)

    def exit_status(self, seconds: float = PATIENCE) -> int:
        """Wait for the process to end."""
        status = self.process.wait(seconds)
        self._read_rest()
        return status

    def engine_pid(self) -> int:
        """The process id of the engine."""
        return self._child("engine")

    def verifier_pid(self) -> int:
        """The process id of the verifier."""
        return self._child("verifier")

    def trainer_pids(self) -> list[int]:
        """The process ids of the trainers that run."""
        return [pid for pid in children(self.process.pid) if "trainer" in command_of(pid)]

    def live_pids(self) -> list[int]:
        """The process ids of the trainers of live adapters: one, or none."""
        return live_trainers(self.process.pid)

    def _child(self, kind: str) -> int:
        (child,) = (pid for pid in children(self.process.pid) if kind in command_of(pid))
        return child

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


def as_route(http: httpx2.Client) -> dict[str, str]:
    """Return the header that makes a server believe those of `onebase route`, for an admin's client."""
    secret: str = http.get("/route_secret").raise_for_status().json()["secret"]
    return {"x-onebase-route": secret}


@functools.cache
def told_statuses() -> list[tuple[re.Pattern[str], dict[str, set[str]]]]:
    """By the paths of the routes that are in the OpenAPI file: the statuses that it names by method."""
    app = create_app(cast(Services, SimpleNamespace(settings=Settings())))
    paths: dict[str, Any] = app.openapi()["paths"]
    found = [
        (
            route.path_regex,
            {method.upper(): set(one["responses"]) for method, one in paths[route.path_format].items()},
        )
        for route in app.routes
        if isinstance(route, APIRoute) and route.include_in_schema
    ]
    assert len(found) > 40, "no routes to compare with"
    return found


def is_told(answer: httpx2.Response) -> None:
    """Fails where the answer's status is not one that the OpenAPI file names for its route."""
    if SERVERS > 1 and answer.status_code == 503 and b'"of_one_server"' in answer.read():
        pytest.skip("the route has no such path")
    method = "GET" if answer.request.method == "HEAD" else answer.request.method
    path = answer.request.url.raw_path.decode().partition("?")[0]
    for known, told in told_statuses():
        if known.fullmatch(path) and method in told:
            assert str(answer.status_code) in told[method], (
                f"{method} {path} answered {answer.status_code}, which its `responses` do not name: "
                f"add it to `answer(...)` of the route. {answer.read().decode()}"
            )
            return


GONE = (FileNotFoundError, ProcessLookupError)
"""What reading in /proc raises of a process that has ended before its file was opened, or since."""


def children(pid: int) -> list[int]:
    """The processes that a process has started, from any of its threads."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(*GONE):  # that thread has just ended
            found += map(int, (thread / "children").read_text().split())
    return found


def live_trainers(pid: int) -> list[int]:
    """The trainers of live adapters that a process has started."""
    found = []
    for child in children(pid):
        with contextlib.suppress(*GONE):
            if "live" in Path(f"/proc/{child}/cmdline").read_text().split("\0"):
                found.append(child)
    return found


def command_of(pid: int) -> str:
    """The last part of the program that a process runs, as in `onebase_server.engine`."""
    try:
        parts = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except GONE:
        return ""
    return next((part.rpartition("/")[2] for part in parts if any(kind in part for kind in KINDS)), "")


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except GONE:
        return False


def free_port() -> int:
    """A port of this process's own part: tests beside it may look for one before it is used."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port // 2 % 4 == worker % 4:
            return port


class ServerProcess(Protocol):
    """What tests use of a `subprocess.Popen`."""

    pid: int
    returncode: int | None
    stderr: IO[str] | None

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class ForkedProcess:
    """A server that a process of ForkedServers has forked."""

    def __init__(self, pid: int, stderr: IO[str], ask: Callable[[dict[str, Any]], int]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stderr: IO[str] | None = stderr
        self._ask = ask
        self._handle = os.pidfd_open(pid)

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._handle], [], [], 0)[0]:
            self._reap()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self._handle], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a forked server", timeout or 0)
        return self._reap()

    def _reap(self) -> int:
        if self.returncode is None:
            self.returncode = self._ask({"ended": self.pid})
            os.close(self._handle)
        return self.returncode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkedServers:
    """Starts serve_scripted.py, or `route` with its options, by forking a process that has imported what they
    need, which takes seconds."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "serve_scripted.py"), "--forks", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{SOURCES}"},
            )
        self._lock = threading.Lock()

    def start(self, arguments: list[str], environment: Mapping[str, str], umask: int) -> ForkedProcess:
        ours, theirs = os.pipe()
        request = {"arguments": arguments, "environment": dict(environment), "umask": umask}
        try:
            pid = self._ask(request, theirs)
        finally:
            os.close(theirs)
        return ForkedProcess(pid, open(ours, encoding="utf-8", errors="replace"), self._ask)

    def _ask(self, request: dict[str, Any], *descriptors: int) -> int:
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
            return int(json.loads(self._socket.recv(1 << 10)))

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


def launch(
    command: list[str], environment: Mapping[str, str], umask: int, popen: Any = subprocess.Popen
) -> ServerProcess:
    process: ServerProcess = popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        umask=umask,
    )
    return process


@contextlib.contextmanager
def serving(
    command: list[str],
    *options: str,
    ready: bool = True,
    data_dir: Path | None = None,
    environment: Mapping[str, str] | None = None,
    umask: int = -1,
    start: Callable[[list[str], Mapping[str, str], int], ServerProcess] = launch,
) -> Iterator[Server]:
    """A server started by `command` on a free port; killed at the end if it still runs.

    Without `data_dir` it has one of its own that is deleted in the end.
    """
    port = free_port()
    own_data = tempfile.mkdtemp(prefix="onebase-test-data-")
    settings = os.environ | {"PYTHONPATH": SOURCES, "COLUMNS": "200"} | dict(environment or {})
    whole = [*command, "--port", str(port), "--data-dir", str(data_dir or own_data), *options]
    process = start(whole, settings, umask)
    server = Server(process, port, data_dir or Path(own_data))
    try:
        if ready:
            server.wait_ready()
        with contextlib.ExitStack() as others:
            if ready and SERVERS > 1:
                route = others.enter_context(_several(server, command, options, settings, start))
                server.url, server.port = route.url, route.port
            yield server
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(own_data, ignore_errors=True)


@contextlib.contextmanager
def _several(
    server: Server,
    command: list[str],
    options: Sequence[str],
    environment: Mapping[str, str],
    start: Callable[[list[str], Mapping[str, str], int], ServerProcess],
) -> Iterator[Server]:
    """A route before the server and others on its registry and store."""
    registry = f"sqlite:///{server.data_dir / 'registry.db'}"
    shared = ["--registry", registry, "--store", str(server.data_dir / "store")]
    with contextlib.ExitStack() as running:
        servers = [server]
        for _ in range(SERVERS - 1):
            folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="onebase-test-data-")))
            port = free_port()
            whole = [*command, "--port", str(port), "--data-dir", str(folder), *options, *shared]
            servers.append(Server(start(whole, environment, -1), port, folder))
            running.callback(servers[-1].process.wait)
            running.callback(servers[-1].process.kill)
        for one in servers:
            one.wait_ready()
        key = _key_file(registry, server.data_dir)
        yield running.enter_context(routing(servers, server.data_dir, *key))


def _key_file(registry: str, folder: Path) -> Sequence[str]:
    """What lets a route read its servers' metrics, where that needs a key."""
    database = Database(registry)
    try:
        keys = ApiKeys(database)
        if not keys.all():
            return ()
        path = folder / "route.key"
        path.touch(0o600)
        path.write_text(keys.create("default", ["admin"])[1])
        return "--key-file", str(path)
    finally:
        database.close()


@contextlib.contextmanager
def routing(
    servers: Sequence[Server],
    folder: Path,
    *options: str,
    command: Sequence[str] = ROUTE,
    start: Callable[[list[str], Mapping[str, str], int], ServerProcess] = launch,
) -> Iterator[Server]:
    """`onebase route` before the servers, ready."""
    port = free_port()
    replicas = [part for server in servers for part in ("--replica", server.url)]
    environment = os.environ | {"PYTHONPATH": SOURCES, "COLUMNS": "200"}
    process = start([*command, "--port", str(port), *replicas, *options], environment, -1)
    route = Server(process, port, folder)
    try:
        route.wait_ready()
        yield route
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def pace(folder: Path, steps: int = 0) -> Iterator[tuple[dict[str, str], Callable[[int], None]]]:
    """The environment of a server whose scripted engine takes a byte a step, and what gives it some more than
    it has from the start."""
    pipe = folder / "pace"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDWR)  # opened for both ways, it waits for nobody
    try:
        allow(end, steps)
        yield {"ONEBASE_TEST_PACE": str(pipe)}, lambda steps: allow(end, steps)
    finally:
        os.close(end)


def allow(pipe: int, steps: int) -> None:
    os.write(pipe, bytes(steps))


Starter = Callable[..., contextlib.AbstractContextManager[Server]]


def make_folder(parent: Path, name: str) -> Path:
    """A folder with an adapter's two files, for verifiers and engines that do not read them."""
    folder = parent / name
    folder.mkdir()
    (folder / "adapter_config.json").write_text(CONFIG)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def upload(
    http: httpx2.Client,
    name: str,
    weights: bytes,
    config: str = CONFIG,
    *,
    query: str = "wait=true",
    **fields: str,
) -> httpx2.Response:
    """POST /v1/adapters with both files; waits for the end unless `query` says otherwise."""
    files = [
        ("files", ("adapter_config.json", config.encode(), "application/json")),
        ("files", ("adapter_model.safetensors", weights, "application/octet-stream")),
    ]
    return http.post(f"/v1/adapters?{query}", data={"name": name, **fields}, files=files)


def upload_folder(http: httpx2.Client, name: str, folder: Path, query: str = "wait=true") -> httpx2.Response:
    """An adapter from a folder, as `upload`."""
    weights = (folder / "adapter_model.safetensors").read_bytes()
    return upload(http, name, weights, (folder / "adapter_config.json").read_text(), query=query)
