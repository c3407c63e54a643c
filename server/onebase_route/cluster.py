"""`onebase cluster`: replicas of one server on Ray Serve, behind one address.

Ray Serve starts the servers, watches them, replaces those that end, and decides how many there are. A
replica is an actor with an `onebase serve` as its child. Requests do not pass through Ray, which would cost a
call for each token: one more actor has an `onebase route` as its child, and lists for it the servers that are
there.

Ray's interfaces for routers and autoscaling are new: pyproject.toml pins their releases.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import httpx2
import ray
import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from ray.serve.config import AutoscalingContext, RequestRouterConfig
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from ray.serve.schema import ServeDeploySchema

from onebase.metrics import parse_metrics
from onebase_edge.background import keep_running
from onebase_edge.settings import LISTENER, READY, in_environment, load_settings
from onebase_route.options import REPLICA_KEY, route_parser
from onebase_route.placement import Placement, ReplicaReport
from onebase_route.proxy import read_needs, read_report

APP = "onebase"
FRONT = "onebase-ingress"
"""Application of the ingress alone: Ray Serve replaces all of one whose arguments change."""
SERVER = "Server"
INGRESS = "Ingress"
_HEAD = "node:__internal_head__"
"""Ray resource that pins an actor to the head node."""
_LOOPBACK = "127.0.0.1"
_GOODBYE_SECONDS = 15.0
"""Time, in seconds after the drain, until a child and its actor must have ended."""
_POLL_SECONDS = 0.25
_ILL_SECONDS = 60.0
"""Time, in seconds, that an application may be unhealthy before that is an error: Ray may restart what is
missing."""
_NEW_ROUTE_SECONDS = 60.0
"""Longest time, in seconds, that a route may take to start beside the one that it replaces."""
_ROUTE_SECONDS = 120.0
"""Time, in seconds, after which a restarted route that does not answer is given up: Ray starts another
actor."""
_BUSY = 0.7
"""Part of their places that replicas should have in use, where there may be fewer of them."""
_REFUSED = 2
"""Exit status of a server that does not start before its settings are changed. After others, as where the
database is not there yet, Ray starts it again."""
_LAST_LINE_SECONDS = 0.5
"""Time, in seconds, in which what a child wrote before its end is read."""
_NOT_STARTED = 127
"""Exit status of a child that could not be started, as in a shell."""
_MOST_SENT = 100_000
_SCALED_BY = (
    "vllm:request_success_total", "vllm:prompt_tokens_total", "vllm:generation_tokens_total",
    "vllm:time_to_first_token_seconds_sum", "vllm:time_to_first_token_seconds_count",
)  # fmt: skip
"""Metrics that autoscaling reads."""
_PASSWORD = re.compile(r"://([^/@\s]*:(?!\d+/)[^@\s]+@|\S*[?&]password=[^&\s])")
_ENDS_WITH_ITS_PARENT = """\
import ctypes, os, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
except (OSError, AttributeError):  # elsewhere than on Linux
    pass
if os.getppid() != int(sys.argv[1]):
    sys.exit("its parent has gone")
os.execv(sys.argv[2], sys.argv[2:])
"""
_ONEBASE = ("-c", "import sys; from onebase.cli import main; sys.exit(main())")

_log = logging.getLogger(__name__)
T = TypeVar("T")


class ClusterError(Exception):
    """A request that the cluster cannot carry out; the message says why and what to do."""


class EndedError(ClusterError):
    """Another command has ended the cluster meanwhile."""


class SettingsRefusedError(ClusterError):
    """A child does not start with these settings, and has said why: it would say so again."""


class ClusterConfig(BaseModel):
    """Arguments (`args`) of both applications in a config file of Ray Serve.

    Args:
        server: the command of a server, as it would be typed. It gets --host, --port, --data-dir and
            --drain-timeout; where it names no --registry or --store, those of data_dir.
        ingress: the command of the address that they have together, which runs on the head node.
        data_dir: servers have their folders in its folder `replicas`.
        drain_timeout: seconds that running requests get to finish.
        one_machine: servers listen on 127.0.0.1.
        wait: seconds that a request waits for a server where there is none; 0: only while one is replaced.
        key_file: has the key of an admin, by which servers' metrics are read; else the environment has it.
        restarts: how often all servers were replaced on request. Ray Serve replaces those whose arguments
            change.
    """

    model_config = ConfigDict(extra="forbid")

    server: list[str] = Field(default=["onebase", "serve"], min_length=1)
    ingress: list[str] = Field(default=["onebase", "route"], min_length=1)
    data_dir: str = ""
    drain_timeout: float = Field(default=120.0, ge=0, le=86400)
    one_machine: bool = False
    wait: float = Field(default=0.0, ge=0, le=86400)
    key_file: str = ""
    restarts: int = Field(default=0, ge=0)

    @field_validator("server", "ingress")
    @classmethod
    def _without_passwords(cls, command: list[str]) -> list[str]:
        if any(_PASSWORD.search(part) for part in command):
            raise ValueError(
                "a password in an address would be seen by everybody who sees Ray's state, or the machine's "
                "processes: set PGPASSWORD or ~/.pgpass on each machine instead"
            )
        return command

    @property
    def data(self) -> Path:
        return Path(load_settings({"data_dir": self.data_dir or None}).data_dir).expanduser().absolute()

    def names(self, option: str) -> bool:
        """Return True if the server's command, or the environment, has the option."""
        given = any(part == option or part.startswith(f"{option}=") for part in self.server)
        return given or in_environment(option.strip("-"))


# ---- a child of an actor -------------------------------------------------------------------------


class Child:
    """A process that ends with this one, in whatever way this one ends.

    Args:
        listener: where it is to listen. It has it from its first moment on: a port that is only chosen, any
            other user of the machine could take before it, and be sent what is for it, keys too.
        on_end: called in a thread if the child ends once it was ready, and nobody has ended it.
        keep: descriptors that it gets.
        ready: another one, on which it reports that it serves.
    """

    def __init__(
        self,
        command: Sequence[str],
        listener: socket.socket,
        on_end: Callable[[], None],
        keep: Sequence[int] = (),
        ready: int | None = None,
    ) -> None:
        program = [sys.executable, *_ONEBASE, *command[1:]] if command[0] == "onebase" else list(command)
        self._command = [sys.executable, "-c", _ENDS_WITH_ITS_PARENT, str(os.getpid()), *program]
        self._on_end = on_end
        self._keep = [*keep, listener.fileno(), *([] if ready is None else [ready])]
        self._own = {LISTENER: str(listener.fileno())} | ({} if ready is None else {READY: str(ready)})
        self._started = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self.is_ready = False
        self.status: int | None = None
        self.last_line = ""
        self.since = time.time()
        self.release = version("onebase")
        # Linux ends the child when the thread that has started it ends: this one waits for the child.
        threading.Thread(target=self._run, name="child", daemon=True).start()
        self._started.wait()

    def _run(self) -> None:
        left_out = ("RAY_", "OMP_NUM_THREADS")  # its token, and what it sets for what computes in an actor
        environment = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        environment |= self._own
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment,
                pass_fds=self._keep,
                start_new_session=True,
            )
        except Exception:  # no memory or no process left, say
            _log.exception("the child cannot be started")
            self.status = _NOT_STARTED
            return
        finally:
            self._started.set()
        passing = threading.Thread(target=self._pass_on, args=[self._process.stderr], daemon=True)
        passing.start()
        status = self._process.wait()
        passing.join(_LAST_LINE_SECONDS)  # its own children may write for longer
        self.status = status
        if self.is_ready:
            self.is_ready = False
            _log.error("the child ended with status %d", self.status)
            self._on_end()

    @property
    def pid(self) -> int:
        """Process id; 0 where it could not be started."""
        return 0 if self._process is None else self._process.pid

    def _pass_on(self, lines: Iterable[bytes]) -> None:
        """Write what the child and its children write to this process's log; keep the last line."""
        for line in lines:
            with contextlib.suppress(OSError):  # a full disk; unread, the child would wait at its next line
                os.write(2, line)
            self.last_line = line.decode(errors="replace").strip() or self.last_line

    async def ready(self, client: httpx2.AsyncClient, path: str) -> None:
        """Wait until the child answers at the path. Raises ClusterError if it ends before,
        SettingsRefusedError if its settings are why."""
        while self.status is None:
            with contextlib.suppress(httpx2.TransportError):
                if (await client.get(path)).status_code == 200:
                    self.is_ready = True
                    return
            await asyncio.sleep(_POLL_SECONDS)
        if self.status == _REFUSED and self.last_line:
            raise SettingsRefusedError(self.last_line.removeprefix("onebase: "))
        said = f": {self.last_line}" if self.last_line else ""
        raise ClusterError(f"it ended with status {self.status} before it was ready{said}")

    def kill(self) -> None:
        self.is_ready = False
        if self._process is not None:
            self._process.kill()

    async def stop(self, seconds: float) -> None:
        """End the child by SIGTERM, and by force after so many seconds."""
        self.is_ready = False
        if self._process is not None:
            self._process.terminate()
            end = time.monotonic() + seconds
            while self.status is None and time.monotonic() < end:
                await asyncio.sleep(_POLL_SECONDS)
            self.kill()


def log_file() -> str:
    """Return the file to which this actor and its child write; empty where that is no file."""
    with contextlib.suppress(OSError):
        place = os.readlink("/proc/self/fd/2")
        return place if Path(place).is_file() else ""
    return ""


def described(child: Child) -> dict[str, str]:
    """Return what `onebase cluster status` shows of a child, besides its address."""
    return {
        "pid": str(child.pid),
        "node": socket.gethostname(),
        "since": f"{child.since:.0f}",
        "version": child.release,
        "log": log_file(),
    }


def _end_too() -> None:
    """End this process: Ray starts another actor."""
    os._exit(1)


# ---- one server ------------------------------------------------------------------------------------


class Server:
    """A replica: one OneBase server, and what Ray Serve asks of it."""

    async def __init__(self, plan: ClusterConfig) -> None:  # type: ignore[misc]  # Ray awaits it
        self._plan = plan
        plan.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder, lock = take_folder(plan.data / "replicas")
        host = _LOOPBACK if plan.one_machine else ray.util.get_node_ip_address()
        listener = listen_again(host, folder / "port")
        self.url, port = address_of(listener)
        command = [*plan.server, "--host", host, "--port", str(port), "--data-dir", str(folder)]
        command += ["--drain-timeout", f"{plan.drain_timeout:g}"]
        if not plan.names("--registry"):
            command += ["--registry", f"sqlite:///{plan.data / 'registry.db'}"]
        if not plan.names("--store"):
            command += ["--store", str(plan.data / "store")]
        if not plan.one_machine:
            command += ["--trusted-proxy", _head_address()]
        self._client = _client(self.url, plan)
        self._seen: tuple[float, float] = 0.0, 0.0
        try:
            self._child = Child(command, listener, _end_too, [lock])
        finally:  # the child has both, also while it outlives this process for a moment
            listener.close()
            os.close(lock)
        await self._child.ready(self._client, "/ready")

    async def check_health(self) -> None:
        (await self._client.get("/health")).raise_for_status()

    def record_replica_metadata(self) -> dict[str, str]:
        return {"url": self.url} | described(self._child)

    async def record_routing_stats(self) -> dict[str, Any]:
        """Return a `ReplicaReport` as a dict, with the names of the base."""
        report, bases = read_report(await self._metrics())
        return asdict(report) | {"in_host": sorted(report.in_host), "bases": sorted(bases)}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return `queued_tokens`, `busy` and `ttft`.

        queued_tokens: tokens of the requests that wait, if they are as long as those before. busy: part of
        its sequences in use. ttft: mean time to a first token, in seconds, since the last call.
        """
        text = await self._metrics()
        report, _ = read_report(text)
        known = parse_metrics(text, _SCALED_BY)
        ended, prompts, answers, seconds, firsts = map(known.total, _SCALED_BY)
        tokens = prompts + answers
        before, self._seen = self._seen, (seconds, firsts)
        new = firsts - before[1]
        return {
            "queued_tokens": report.waiting * (tokens / ended if ended else 1.0),
            "busy": min(1.0, report.running / report.sequences),
            "ttft": (seconds - before[0]) / new if new > 0 else 0.0,
        }

    async def _metrics(self) -> str:
        answer = await self._client.get("/metrics")
        return answer.raise_for_status().text

    async def ask(self, path: str, body: bytes) -> AsyncIterator[bytes]:
        """Yield the server's answer to a POST of JSON, as it comes; for other applications on the cluster."""
        head = {"content-type": "application/json"}
        async with self._client.stream("POST", path, content=body, headers=head, timeout=None) as answer:
            if answer.status_code != 200:
                raise ClusterError(f"{answer.status_code}: {(await answer.aread()).decode()}")
            async for piece in answer.aiter_raw():
                yield piece

    async def wake(self) -> None:
        """Do nothing. Called where there is no replica: Ray Serve starts one for it."""

    async def kill(self) -> None:
        self._child.kill()

    async def __del__(self) -> None:
        """End the server. Ray Serve calls this once it sends nothing more, and waits."""
        child = getattr(self, "_child", None)
        if child is not None and child.status is None:
            await child.stop(self._plan.drain_timeout + _GOODBYE_SECONDS / 2)


def take_folder(parent: Path) -> tuple[Path, int]:
    """Return the first folder that no server has, and a lock that keeps others out of it while it is open.

    The next server on this machine continues where the last one in that folder was: its jobs, its cache.
    """
    for number in count():
        folder = parent / str(number)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(parent / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            continue
        return folder, lock
    raise AssertionError


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket for a child. Raises ClusterError if the address is in use."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except (OSError, OverflowError) as error:
        listener.close()
        why = getattr(error, "strerror", None) or error
        raise ClusterError(
            f"cannot listen on {host}:{port}: {why}. Choose another address with --host and --port."
        ) from error
    return listener


async def _listen_after(host: str, port: int) -> socket.socket:
    """Call `listen` once the process that is replaced has closed its socket. Raises ClusterError."""
    until = time.monotonic() + _GOODBYE_SECONDS
    while time.monotonic() < until:
        with contextlib.suppress(ClusterError):
            return listen(host, port)
        await asyncio.sleep(_POLL_SECONDS)
    return listen(host, port)


def listen_again(host: str, kept: Path) -> socket.socket:
    """Listen on the port of the last time, so that its clients find it again, or else on any."""
    last = kept.read_text() if kept.is_file() else ""
    if last.isdecimal():
        with contextlib.suppress(ClusterError):
            return listen(host, int(last))
    listener = listen(host, 0)
    kept.write_text(str(listener.getsockname()[1]))
    return listener


def address_of(listener: socket.socket) -> tuple[str, int]:
    """Return the socket's URL for clients on the same machine, and its port."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": _LOOPBACK, "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}", port


def _head_address() -> str:
    head = next(one for one in ray.nodes() if one["Alive"] and _HEAD in one["Resources"])
    address: str = head["NodeManagerAddress"]
    return address


def _client(url: str, plan: ClusterConfig) -> httpx2.AsyncClient:
    key = Path(plan.key_file).read_text().strip() if plan.key_file else os.environ.get(REPLICA_KEY)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx2.AsyncClient(base_url=url, headers=headers, timeout=10.0, trust_env=False)


async def _reports(read: int, seconds: float) -> bool:
    """Return True once a byte comes through a pipe; False if it ends without one, or none comes in time."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(read, readable.set)
    try:
        async with asyncio.timeout(seconds):
            await readable.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(read)
    return bool(os.read(read, 1))


# ---- the address that they have together ---------------------------------------------------------


class Ingress:
    """`onebase route`, with a list of the servers that Ray Serve says are there."""

    async def __init__(self, plan: ClusterConfig) -> None:  # type: ignore[misc]
        self._plan = plan
        self._servers: DeploymentHandle | None = None
        self._listener = await _listen_after(*ingress_address(plan.ingress))
        self.url, self._port = address_of(self._listener)
        self._client = _client(self.url, plan)
        self._list = plan.data / "ingress-replicas"
        self._list.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._list.write_text("")
        self._urls: list[str] = []
        self._listed: list[str] = []
        self._described: dict[str, dict[str, str]] = {}
        self._following: list[asyncio.Task[None]] = []
        self._ended = asyncio.Event()
        self._restarting = asyncio.Lock()
        self._child = self._start()
        await self._child.ready(self._client, "/health")

    def _start(self, *options: str, ready: int | None = None) -> Child:
        plan, loop = self._plan, asyncio.get_running_loop()
        command = [*plan.ingress, "--replicas", str(self._list), *options]
        if plan.wait:
            command += ["--wait", f"{plan.wait:g}"]
        command += ["--drain-timeout", f"{plan.drain_timeout:g}", "--port", str(self._port)]
        if plan.key_file:
            command += ["--key-file", plan.key_file]

        def on_end() -> None:
            loop.call_soon_threadsafe(self._ended.set)

        return Child(command, self._listener, on_end, ready=ready)

    async def restart(self) -> None:
        """Replace the route by what is installed now, once at a time. Raises ClusterError if that does not
        start.

        The old one accepts connections until the new one serves and stops it.
        """
        async with self._restarting:
            old = self._child
            read, write = os.pipe()
            try:
                new = self._start("--take-over", str(old.pid), ready=write)
            finally:
                os.close(write)
            old.is_ready = False  # its end is no fault
            try:
                if await _reports(read, _NEW_ROUTE_SECONDS):
                    self._child, new.is_ready = new, True
                    return
            finally:
                os.close(read)
                if self._child is not new:
                    new.kill()
                    old.is_ready = old.status is None
                    if not old.is_ready:
                        self._ended.set()
            raise ClusterError(f"the new route was not ready: {new.last_line or 'it said nothing'}")

    def replicas_are(self, servers: Mapping[str, dict[str, str]]) -> None:
        """Set the servers to list, by URL with what they say of themselves. Called by the router, in a thread
        of its own."""
        self._urls, self._described = list(servers), dict(servers)
        self._write_list()

    def _write_list(self) -> None:
        urls, work = self._urls, self._list.with_suffix(".part")
        try:
            work.write_text("".join(f"{url}\n" for url in urls))
            work.replace(self._list)
            self._listed = urls
        except OSError as error:  # tried again by `_keep_route`
            _log.error("requests go to the servers that were there before: %s", error)

    async def check_health(self) -> None:
        if not self._following:  # Ray knows of this object only now, by which the router finds it
            loop = asyncio.get_running_loop()
            self._following = [
                loop.create_task(keep_running("keeping the address", self._keep_route)),
                loop.create_task(keep_running("asking for servers", self._ask_for_servers)),
            ]
        if self._child.is_ready:  # else it has ended and starts again
            (await self._client.get("/health")).raise_for_status()

    async def _keep_route(self) -> None:
        """Restart the route when it has ended: a new actor would take longer. Waits for no server."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2 * _POLL_SECONDS):
                    await self._ended.wait()
            if self._listed != self._urls:
                self._write_list()
            if self._ended.is_set():
                self._child = self._start()
                self._ended.clear()
                try:
                    async with asyncio.timeout(_ROUTE_SECONDS):
                        await self._child.ready(self._client, "/health")
                except (ClusterError, TimeoutError):
                    _end_too()

    async def _ask_for_servers(self) -> None:
        """Ask Ray Serve for a first server, by a request of our own, while requests wait for one."""
        while True:
            await asyncio.sleep(2 * _POLL_SECONDS)
            if self._servers is None:
                with contextlib.suppress(serve.exceptions.RayServeException):  # they are not deployed yet
                    self._servers = serve.get_deployment_handle(SERVER, APP).options()
            if not self._plan.wait or self._servers is None:
                continue
            with contextlib.suppress(httpx2.HTTPError):
                answer = await self._client.get("/metrics")
                if parse_metrics(answer.text).total("onebase_route_waiting"):
                    await self._servers.wake.remote()

    async def report(self) -> dict[str, Any]:
        """Return its URL and, by server, whether it is ready, how many requests it got and what it is."""
        known = parse_metrics((await self._client.get("/metrics")).text)
        ready, sent = (known.by(f"onebase_route_{name}", "replica") for name in ("ready", "requests_total"))
        found = {
            url: self._described.get(url, {}) | {"ready": value, "requests_total": sent.get(url, 0.0)}
            for url, value in ready.items()
        }
        return {"url": self.url, "servers": found} | described(self._child)

    async def kill(self) -> None:
        self._listener.close()
        self._child.kill()

    async def __del__(self) -> None:
        child = getattr(self, "_child", None)
        if child is not None and child.status is None:
            self._listener.close()  # or connections would wait for a child that never comes
            await child.stop(self._plan.drain_timeout + _GOODBYE_SECONDS / 2)


def ingress_address(command: Sequence[str]) -> tuple[str, int]:
    """Return host and port of an ingress, from its command or the environment."""
    known, _ = route_parser().parse_known_args(["--replicas", "-", *command[2:]])
    settings = load_settings({"host": known.host, "port": known.port})
    return settings.host, settings.port


# ---- what Ray Serve plugs in ---------------------------------------------------------------------


class PlacementRouter(RequestRouter):  # type: ignore[misc]  # Ray is not typed
    """Places requests of Ray's handles by `Placement`, with what replicas report to Ray.

    In the ingress's actor it also gives the ingress the list of servers.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        self._placement = Placement()
        self._bases: frozenset[str] = frozenset()
        self._sent: OrderedDict[str, tuple[str, str | None, float, float]] = OrderedDict()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        there = {one.replica_id.unique_id: one.routing_stats for one in replicas}
        for name in set(self._placement.replicas) - there.keys():
            self._placement.lost(name)
        for name, stats in there.items():
            report = {key: value for key, value in stats.items() if key != "bases"}
            self._placement.record_report(
                name, ReplicaReport(**report) if report else ReplicaReport(sequences=1)
            )
            self._bases |= set(stats.get("bases", ()))
        with contextlib.suppress(serve.exceptions.RayServeException):  # in no actor of Ray Serve
            owner = serve.get_replica_context().servable_object
            if hasattr(owner, "replicas_are"):
                owner.replicas_are({one.replica_metadata["url"]: one.replica_metadata for one in replicas})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replica that the placement chose, then the others in case it is full."""
        there = {one.replica_id.unique_id: one for one in candidate_replicas}
        if pending_request is None or not there:
            return [candidate_replicas]
        body = next((one for one in pending_request.args if isinstance(one, bytes)), b"")
        wanted = read_needs(body, self._bases)
        request, now = pending_request.metadata.internal_request_id, time.monotonic()
        self._forget(request, None)  # it is chosen for again
        but = set(self._placement.replicas) - there.keys()
        name = self._placement.place(wanted.adapter, wanted.tokens, now, prefix=wanted.prefix, but=but)
        self._sent[request] = name, wanted.adapter, wanted.tokens, now
        if len(self._sent) > _MOST_SENT:
            self._forget(next(iter(self._sent)), None)
        return [[there.pop(name)], list(there.values())]

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._forget(internal_request_id, time.monotonic())

    def _forget(self, request: str, ended: float | None) -> None:
        sent = self._sent.pop(request, None)
        if sent is not None:
            name, adapter, tokens, since = sent
            now = time.monotonic() if ended is None else ended
            seconds = None if ended is None else ended - since
            self._placement.ended(name, adapter, tokens, now, seconds=seconds, refused=ended is None)


class ByQueuedTokens:
    """Autoscaling policy: the number of replicas by queued tokens, times to a first token and busy sequences.

    Args:
        queued_tokens: of requests that wait, for which there is one more replica.
        ttft_seconds: mean time to a first token, above which there is one more.
    """

    def __init__(self, queued_tokens: float = 4000.0, ttft_seconds: float = 5.0) -> None:
        self._queued_tokens = queued_tokens
        self._ttft_seconds = ttft_seconds

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        there = context.current_num_replicas
        if not there:
            return (1 if context.total_queued_requests else context.target_num_replicas), {}
        report = context.aggregated_metrics or {}
        queued, busy, ttft = (list(report.get(one, {}).values()) for one in ("queued_tokens", "busy", "ttft"))
        if len(busy) < there:  # not all have reported yet
            return context.target_num_replicas, {}
        more = int(sum(queued) / self._queued_tokens)
        if more or fmean(ttft) > self._ttft_seconds:
            return there + max(1, more), {}
        if any(queued):
            return there, {}
        return min(there, math.ceil(sum(busy) / _BUSY)), {}


def build(plan: ClusterConfig) -> serve.Application:
    """Return the application of the servers; `import_path` of a config file of Ray Serve."""
    router = RequestRouterConfig(
        request_router_class=f"{__name__}.{PlacementRouter.__name__}", request_routing_stats_period_s=1.0
    )
    servers = serve.deployment(
        Server, name=SERVER, max_ongoing_requests=1000, request_router_config=router, **_life(plan)
    )
    return servers.bind(plan)


def build_ingress(plan: ClusterConfig) -> serve.Application:
    """Return the application of their address; `import_path` of a config file of Ray Serve."""
    options = {"num_cpus": 0, "resources": {_HEAD: 0.001}}
    ingress = serve.deployment(Ingress, name=INGRESS, ray_actor_options=options, **_life(plan))
    return ingress.bind(plan)


def _life(plan: ClusterConfig) -> dict[str, Any]:
    grace = plan.drain_timeout + _GOODBYE_SECONDS
    return {"graceful_shutdown_timeout_s": grace, "health_check_period_s": 2.0}


def applications(plan: ClusterConfig, servers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the applications as in a config file of Ray Serve. servers: fields of the deployment of
    servers."""
    args = plan.model_dump(exclude_defaults=True)
    made: list[dict[str, Any]] = []
    for name, builder, deployment, others in (
        (APP, build, {"name": SERVER, **servers}, ("ingress", "wait")),
        (FRONT, build_ingress, {"name": INGRESS}, ("server", "one_machine", "restarts")),
    ):
        own = {key: value for key, value in args.items() if key not in others}
        path = f"{__name__}:{builder.__name__}"
        # No prefix: not through Ray's own proxies.
        app = {
            "name": name,
            "route_prefix": None,
            "import_path": path,
            "args": own,
            "deployments": [deployment],
        }
        made.append(app)
    return made


def as_yaml(apps: list[dict[str, Any]]) -> str:
    """Return a config file for `serve deploy`."""
    text: str = yaml.safe_dump({"proxy_location": "Disabled", "applications": apps}, sort_keys=False)
    return text


def scaling(least: int, most: int) -> dict[str, Any]:
    """Return the autoscaling configuration of Ray Serve."""
    return {
        "min_replicas": least,
        "max_replicas": most,
        "policy": {"policy_function": f"{__name__}:{ByQueuedTokens.__name__}"},
        "metrics_interval_s": 2.0,
        "look_back_period_s": 10.0,
        "upscale_delay_s": 5.0,
        "downscale_delay_s": 300.0,
    }


def take_gpus(apps: list[dict[str, Any]]) -> None:
    """Give each server a GPU, if the cluster has any."""
    if ray.cluster_resources().get("GPU"):
        _servers(apps)["ray_actor_options"] |= {"num_gpus": 1}


def gpus_left(apps: list[dict[str, Any]], servers: int) -> str:
    """Return a notice of GPUs that so many servers leave unused; empty if there are none.

    Raises ClusterError where there are fewer GPUs than they take: Ray would wait for more for ever.
    """
    there = int(ray.cluster_resources().get("GPU", 0))
    each = _servers(apps).get("ray_actor_options", {}).get("num_gpus") or 0
    if not each:
        return ""
    room = int(there / each) if each >= 1 else there * int(1 / each)
    if servers > room:
        raise ClusterError(
            f"{servers} servers take {servers * each:g} GPUs, and Ray finds {there} here, enough for {room}: "
            "lower --replicas or --max-replicas, or have servers share a GPU (--replica-gpus 0.5, with "
            "--kv-memory)"
        )
    return f"GPUs: {servers * each:g} of {there} used; --replicas {room} uses all" if servers < room else ""


def scale(apps: list[dict[str, Any]], replicas: int, *, own: bool) -> None:
    """Change the number of servers. own: Ray is this machine's, and no other machine joins it.

    Raises ClusterError where it scales by itself, or is ended, or has too few GPUs.
    """
    _check_whole(apps)
    servers = _servers(apps)
    if "autoscaling_config" in servers:
        raise ClusterError(
            "the cluster scales by itself: `onebase cluster up` again, with other --min-replicas and "
            "--max-replicas"
        )
    if own:
        gpus_left(apps, replicas)
    servers["num_replicas"] = replicas
    deploy(apps)


def restart(apps: list[dict[str, Any]]) -> None:
    """Replace all servers, a fifth of them at a time and one at least: what is installed now is started.

    Raises ClusterError where the cluster is being ended.
    """
    _check_whole(apps)
    args = _app(apps)["args"]
    args["restarts"] = args.get("restarts", 0) + 1
    deploy(apps)


def restart_route() -> None:
    """Replace the route of the address by what is installed now. Raises ClusterError."""
    try:
        serve.get_app_handle(FRONT).restart.remote().result(timeout_s=_ROUTE_SECONDS)
    except Exception as error:
        raise ClusterError(f"the servers are replaced, and the address is not: {error}") from error


def _check_whole(apps: list[dict[str, Any]]) -> None:
    if len(apps) < 2:
        raise ClusterError("the cluster is being ended: finish that with `onebase cluster down`")


def _app(apps: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the application of servers."""
    return next(one for one in apps if one["name"] == APP)


def _servers(apps: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the deployment of servers."""
    found: dict[str, Any] = _app(apps)["deployments"][0]
    return found


# ---- commands ------------------------------------------------------------------------------------


@contextlib.contextmanager
def own_ray(state: Path, folder: Path) -> Iterator[None]:
    """Run Ray on this machine until the end of the block; other commands find it by the file `state`.

    Ray listens on all of the machine's addresses, and does what is asked by those who have its token: it lies
    in `folder`, which this user alone reads. Ray lets everybody into its own folder, which is in there.
    """
    cores = 1000.0  # on one machine as many servers as are asked for
    own = {"include_dashboard": False, "_temp_dir": str(folder / "ray")}
    try:
        _start_ray(address="local", num_cpus=cores, object_store_memory=100 << 20, **own)
    except Exception as error:
        raise ClusterError(f"Ray does not start: {error}") from error
    try:
        address = ray.get_runtime_context().gcs_address
        work = state.with_suffix(".part")
        work.touch(mode=0o600)
        work.write_text(json.dumps({"address": address, "token": os.environ["RAY_AUTH_TOKEN_PATH"]}))
        work.replace(state)
        yield
    finally:
        state.unlink(missing_ok=True)
        ray.shutdown()


def connect(address: str) -> None:
    """Connect to a running Ray. Raises ClusterError."""
    try:
        _start_ray(address=address)
    except Exception as error:
        raise ClusterError(f"Ray does not answer at {address}: {error}") from error


def _start_ray(**options: Any) -> None:
    own = options["address"] == "local"
    ray.init(namespace="serve", logging_level=logging.ERROR, log_to_driver=own, **options)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def deploy(apps: list[dict[str, Any]]) -> None:
    """Have Ray Serve run the applications as they say, beside others that it has of config files."""
    if not _client_of_serve():
        serve.start(proxy_location="Disabled")
    client = _get_global_client()
    others = [
        one["deployed_app_config"]
        for name, one in client.get_serve_details().get("applications", {}).items()
        if name not in (APP, FRONT) and one.get("deployed_app_config")
    ]
    client.deploy_apps(ServeDeploySchema.model_validate({"applications": [*others, *apps]}))


def _client_of_serve() -> Any:
    """Return the client of Ray Serve, or None if it does not run."""
    return _get_global_client(raise_if_no_controller_running=False)


def deployed() -> list[dict[str, Any]]:
    """Return the applications as they were deployed: both, or one while the other is ended. Raises
    ClusterError if there is none."""
    client = _client_of_serve()
    apps = client.get_serve_details().get("applications", {}) if client else {}
    found = [apps[name]["deployed_app_config"] for name in (APP, FRONT) if name in apps]
    if not found:
        raise ClusterError("no cluster of OneBase runs there: start one with `onebase cluster up`")
    return found


def settled(show: Callable[[str], None], stop: threading.Event) -> bool:
    """Wait until the application is as it was deployed last; False where it was stopped.

    Raises ClusterError; EndedError where another command ends it.
    """
    shown, was_there = "", False
    well = time.monotonic()
    while not stop.is_set():
        known = serve.status().applications
        apps = [known[name] for name in (APP, FRONT) if name in known]
        if was_there and len(apps) < 2:
            raise EndedError("another command has ended the cluster")
        if len(apps) == 2:
            was_there = True
            text = states(apps[0].deployments)
            if text != shown:
                show(text)
                shown = text
            if all(app.status != "UNHEALTHY" for app in apps):
                well = time.monotonic()
            if all(app.status == "RUNNING" for app in apps) and _are_all_known(apps[0].deployments):
                return True
            for app in apps:
                ill = app.status == "UNHEALTHY" and time.monotonic() - well > _ILL_SECONDS
                why = [app.message, *(one.message for one in app.deployments.values())]
                refusal = _last_error(why, SettingsRefusedError)
                if app.status == "DEPLOY_FAILED" or ill or (refusal and app.status != "RUNNING"):
                    last = refusal or _last_error(why, ClusterError)
                    raise ClusterError(last or "the cluster does not start: " + " ".join(filter(None, why)))
        stop.wait(_POLL_SECONDS)
    return False


def _last_error(messages: Sequence[str], kind: type[ClusterError]) -> str:
    """Return the text of the last error of a kind in Ray's messages, which have its traceback; else none."""
    found = re.findall(rf"\b{kind.__name__}: (.+)", "\n".join(filter(None, messages)))
    return str(found[-1]).strip() if found else ""


def _are_all_known(deployments: Mapping[str, Any]) -> bool:
    """Return True if the ingress has all servers that run, and no other."""
    running = deployments[SERVER].replica_states.get("RUNNING", 0)
    try:
        servers = cluster_report()["servers"].values()
    except ClusterError:  # it is being replaced
        return False
    return [one.get("ready") for one in servers] == [1.0] * running


def is_there() -> bool:
    return not {APP, FRONT}.isdisjoint(serve.status().applications)


def status() -> str:
    app = serve.status().applications.get(APP)
    return "not there" if app is None else states(app.deployments)


def states(deployments: Mapping[str, Any]) -> str:
    """Return the states of the servers, as in `servers: 2 running, 1 starting`."""
    found = deployments[SERVER].replica_states if SERVER in deployments else {}
    parts = [f"{number} {str(getattr(state, 'value', state)).lower()}" for state, number in found.items()]
    return f"servers: {', '.join(parts) or 'none'}"


def cluster_report() -> dict[str, Any]:
    """Return what the ingress reports of itself and the servers behind it. Raises ClusterError."""
    try:
        found: dict[str, Any] = serve.get_app_handle(FRONT).report.remote().result(timeout_s=20)
    except Exception as error:
        raise ClusterError(f"its address does not answer: {error}") from error
    return found


def end(drain_timeout: float, *, now: bool) -> None:
    """End both applications, the address first: once running requests have ended, or now.

    Raises ClusterError.
    """
    for app, deployment in ((FRONT, INGRESS), (APP, SERVER)):
        if app not in serve.status().applications:
            continue
        if now:
            with contextlib.suppress(Exception):  # it is ended all the same
                serve.get_deployment_handle(deployment, app).broadcast("kill").results(timeout_s=10)
        serve.delete(app, _blocking=False)
        until = time.monotonic() + drain_timeout + 2 * _GOODBYE_SECONDS
        while app in serve.status().applications:
            if time.monotonic() > until:
                raise ClusterError("it has not ended in time: `onebase cluster down` ends it at once")
            time.sleep(_POLL_SECONDS)


def on_signals() -> threading.Event:
    """Return an event that the first SIGINT or SIGTERM sets; the second ends this process, and Ray with it,
    at once."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return stop
