"""`onebase route` and `onebase cluster`: several servers of one base behind one address."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onebase_edge.options import address_error, print_failure
from onebase_edge.settings import (
    Settings,
    SettingsError,
    is_loopback,
    load_settings,
    option_name,
    report_ready,
    setting_fields,
)
from onebase_engine.logs import set_up_logs
from onebase_engine.machine import NO_LIMIT, total_memory
from onebase_route.options import REPLICA_KEY, ROUTE_SETTINGS, cluster_parser, replica_url, route_parser

if TYPE_CHECKING:
    from onebase_route.cluster import ClusterConfig
    from onebase_route.proxy import Replica

_FRONT_SETTINGS = ("host", "port", "access_log", "allowed_host", "allowed_origin", "trusted_proxy")
"""Settings of the cluster's address alone. Servers get the other ones of ROUTE_SETTINGS too."""
_OF_PLAN = ("data_dir", "drain_timeout", "stop_with_stdin")
_START_SECONDS = 600.0
"""Time, in seconds, that a request waits for a first server to start, where there may be none."""
_LOOKED_SECONDS = 2.0
"""Time, in seconds, in which the command that has ended a cluster sees that, before the cluster's Ray
ends."""
_RAY_FOLDER = "onebase-ray-"


def route(argv: Sequence[str]) -> int:
    """Run `onebase route`. Exit status: 0 after a drain, 1 when it cannot serve, 2 for wrong options."""
    parser = route_parser()
    options = vars(parser.parse_args(list(argv)))
    urls, listed = options.pop("replica") or [], options.pop("replicas")
    key_file, wait, resume, take_over = (
        options.pop(name) for name in ("key_file", "wait", "resume", "take_over")
    )
    if not urls and listed is None:
        parser.error("which servers? Name each with --replica URL, or list them in a file: --replicas FILE.")
    try:
        settings = load_settings({name: value for name, value in options.items() if value is not None})
        key = os.environ.get(REPLICA_KEY) if key_file is None else Path(key_file).read_text().strip()
        before = None if take_over is None else os.pidfd_open(take_over)
    except (SettingsError, OSError) as error:
        gone = isinstance(error, ProcessLookupError)
        parser.error(f"--take-over: no process has the id {take_over}" if gone else str(error))
    set_up_logs("route", settings.log_level.upper(), settings.log_format)
    for quiet in ("httpx", "httpx2"):
        logging.getLogger(quiet).setLevel(logging.WARNING)
    import asyncio

    from onebase_edge.listener import bind, url_of
    from onebase_route.proxy import OpenServersError, Route
    from onebase_route.proxy import serve as serve_route

    console = Console(stderr=True, quiet=settings.log_format == "json")
    try:
        listener = bind(settings, take_over=before is not None)
    except OSError as error:
        print_failure(console, address_error(settings, error))
        return 1

    async def run_route() -> None:
        names = None if listed is None else ReplicaFile(Path(listed), urls)
        made = Route(
            urls,
            key=key or None,
            max_body=settings.max_body,
            keyed=not (settings.insecure or is_loopback(settings.host)),
            listed=lambda: None if names is None else names.changed(),
            wait=wait,
            resume=resume,
        )

        def show() -> None:
            print_replicas(console, url_of(listener), made.replicas.values())
            report_ready()

        await serve_route(made, settings, listener, show, before)

    try:
        asyncio.run(run_route())
    except OpenServersError as error:
        print_failure(console, str(error))
        return 1
    return 0


def cluster(argv: Sequence[str], server: Sequence[str] = ("onebase", "serve")) -> int:
    """Run `onebase cluster up | status | scale | restart | drain | down`. Exit status: 0, or 1 with the
    reason, 2 for wrong options, 130 if Ctrl-C ended the waiting.

    `server` replaces the command of a server, for tests of its faults.
    """
    parser = cluster_parser()
    arguments = parser.parse_args(list(argv))
    console = Console(stderr=True, highlight=False, markup=False)
    own = arguments.action == "up" and arguments.address is None and not arguments.config
    status = 0
    try:
        data = Path(load_settings({"data_dir": arguments.data_dir}).data_dir).expanduser().absolute()
        state = data / "cluster.json"
        if arguments.action == "up":
            _check_files(arguments)
        held = _alone(data) if own else contextlib.nullcontext()
        with held, tempfile.TemporaryDirectory(prefix=_RAY_FOLDER) as folder:
            address = _prepare_ray(arguments, state, Path(folder) if own else None)
            from onebase_route import cluster as on_ray

            try:
                if arguments.action == "up":
                    apps, plan = _applications(arguments, parser, data, server)
                    if arguments.config:
                        sys.stdout.write(on_ray.as_yaml(apps))
                    elif own:
                        with on_ray.own_ray(state, Path(folder)):
                            _serve_cluster(arguments, apps, plan, console)
                    else:
                        on_ray.connect(address)
                        status = _waited(_deploy(arguments, apps, on_ray.on_signals(), console), console)
                else:
                    on_ray.connect(address)
                    status = _manage(arguments, console)
            except on_ray.ClusterError as error:
                print_failure(console, str(error))
                return 1
    except (SettingsError, OSError) as error:
        print_failure(console, str(error))
        return 1
    return status


def _check_files(arguments: argparse.Namespace) -> None:
    """Raise SettingsError for a setting that is wrong, and for files of this machine that are not there.

    Each server would say so only minutes later, once Ray has started it. Files of other machines are left to
    them.
    """
    settings = load_settings({item.name: getattr(arguments, item.name) for item, _ in setting_fields()})
    if arguments.address is not None or arguments.config:
        return
    if settings.adapters_dir and not Path(settings.adapters_dir).expanduser().is_dir():
        raise SettingsError(f"--adapters-dir: {settings.adapters_dir} is not a folder")
    for name, folder in settings.adapter:
        place = Path(folder).expanduser()
        if not place.is_dir():
            raise SettingsError(f"adapter {name!r}: {folder} is not a folder")
        if not (place / "adapter_config.json").is_file():
            raise SettingsError(f"adapter {name!r}: {folder} has no adapter_config.json")
    if settings.base.startswith(("/", "./", "../", "~")) and not Path(settings.base).expanduser().is_dir():
        raise SettingsError(f"--base: {settings.base} is not a folder")


@contextlib.contextmanager
def _alone(data: Path) -> Iterator[None]:
    """Hold the lock of a data folder's cluster until the block ends. Raises SettingsError if one runs."""
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = _lock(data, fcntl.LOCK_EX)
    for _ in range(10):  # another command may look who has it
        if lock is None:
            time.sleep(0.1)
            lock = _lock(data, fcntl.LOCK_EX)
    if lock is None:
        raise SettingsError(
            f"a cluster runs with the data folder {data} already: end it with `onebase cluster down`, or "
            "give this one another --data-dir"
        )
    try:
        yield
    finally:
        os.close(lock)


def _lock(data: Path, kind: int) -> int | None:
    """Return a descriptor that holds the lock of the folder's cluster until it is closed; None if another
    does."""
    lock = os.open(data / "cluster.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _state_of(data: Path) -> dict[str, str]:
    """Return address and token of the cluster that runs with the folder. Raises SettingsError if none
    does."""
    way_out = "name the head node of another with --address, or start one with `onebase cluster up`"
    lock = _lock(data, fcntl.LOCK_SH) if data.is_dir() else -1
    if lock is not None:  # where it was killed, Ray would be waited for for minutes
        if lock >= 0:
            os.close(lock)
        raise SettingsError(f"no cluster runs on this machine with the data folder {data}: {way_out}")
    try:
        known = json.loads((data / "cluster.json").read_text())
        return {"address": known["address"], "token": known["token"]}
    except FileNotFoundError as error:
        raise SettingsError(f"the cluster of {data} is starting, or ending: try again") from error
    except (ValueError, TypeError, KeyError) as error:
        raise SettingsError(f"{data / 'cluster.json'} does not say where: {error}") from error


def _prepare_ray(arguments: argparse.Namespace, state: Path, folder: Path | None) -> str:
    """Return the address of the cluster's head node; empty if there is none yet. Raises SettingsError.

    Sets the environment, from which Ray reads at its import whether there is a token, and which. folder:
    where this machine's own Ray has its files.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to Ray's makers
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15: all else there would come before servers
    if arguments.address is not None or (arguments.action == "up" and arguments.config):
        return arguments.address or ""
    if folder is None:
        known = _state_of(state.parent)
    else:
        _clear_up(state)
        known = {"address": "", "token": str(folder / "token")}
        (folder / "token").touch(mode=0o600)
        (folder / "token").write_text(secrets.token_hex(32))
    os.environ.pop("RAY_AUTH_TOKEN", None)  # of another Ray, and read before the file
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=known["token"])
    return known["address"]


def _clear_up(state: Path) -> None:
    """Remove what a killed cluster has left: Ray's folder, which has its logs, and the file that names it."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        folder = Path(json.loads(state.read_text())["token"]).parent
        if folder.name.startswith(_RAY_FOLDER) and folder.parent == Path(tempfile.gettempdir()):
            shutil.rmtree(folder, ignore_errors=True)
    state.unlink(missing_ok=True)


def _waited(settled: bool, console: Console) -> int:
    if settled:
        return 0
    console.print("It continues; `onebase cluster status` shows its progress.")
    return 130


def _serve_cluster(
    arguments: argparse.Namespace, apps: list[dict[str, Any]], plan: ClusterConfig, console: Console
) -> None:
    """Serve on this machine's own Ray until a signal, or until another command has ended the cluster."""
    from onebase_route import cluster as on_ray

    stop = on_ray.on_signals()
    with contextlib.suppress(on_ray.EndedError):
        _deploy(arguments, apps, stop, console)
    while on_ray.is_there() and not stop.wait(1.0):
        pass
    if not stop.is_set():
        stop.wait(_LOOKED_SECONDS)
    if on_ray.is_there():
        console.print("stopping: running requests may end; press Ctrl-C again to end at once")
        on_ray.end(plan.drain_timeout, now=False)


def _manage(arguments: argparse.Namespace, console: Console) -> int:
    """Carry out an action on a running cluster. Return the exit status. Raises ClusterError."""
    from onebase_route import cluster as on_ray

    apps = on_ray.deployed()
    if arguments.action == "status":
        _print_cluster()
    elif arguments.action in ("scale", "restart"):
        if arguments.action == "scale":
            on_ray.scale(apps, arguments.replicas, own=arguments.address is None)
        else:
            on_ray.restart(apps)
        is_settled = on_ray.settled(console.print, on_ray.on_signals())
        if is_settled and arguments.action == "restart":
            on_ray.restart_route()
        return _waited(is_settled, console)
    else:
        on_ray.end(on_ray.ClusterConfig(**apps[0]["args"]).drain_timeout, now=arguments.action == "down")
        console.print("The cluster has ended.")
    return 0


def _applications(
    arguments: argparse.Namespace, parser: argparse.ArgumentParser, data: Path, server: Sequence[str]
) -> tuple[list[dict[str, Any]], ClusterConfig]:
    """Return the applications as Ray Serve is to run them, and their plan. Raises SettingsError,
    ClusterError."""
    from pydantic import ValidationError

    from onebase_route import cluster as on_ray

    given = {item.name: getattr(arguments, item.name) for item, _ in setting_fields()}
    settings = load_settings(given)  # reported here, and not by each server
    alone = arguments.address is None and not arguments.config
    least, most = arguments.min_replicas, arguments.max_replicas
    if (least is None) != (most is None) or (least is not None and least > most):
        parser.error("--min-replicas and --max-replicas go together, the lower one first")
    if alone:
        given |= _shared_out(settings, _most(arguments))
    front = _as_typed({name: given[name] for name in ROUTE_SETTINGS if name not in _OF_PLAN})
    key_file = str(Path(arguments.key_file).expanduser().absolute()) if arguments.key_file else ""
    if alone and key_file:
        Path(key_file).read_bytes()  # reported here
    try:
        plan = on_ray.ClusterConfig(
            server=[*server, *_as_typed(given, but=(*_FRONT_SETTINGS, *_OF_PLAN))],
            ingress=["onebase", "route", *front],
            data_dir=str(data) if alone or arguments.data_dir else "",
            drain_timeout=120.0 if given["drain_timeout"] is None else given["drain_timeout"],
            one_machine=alone and is_loopback(settings.host),
            wait=_START_SECONDS if least == 0 else 0.0,
            key_file=key_file,
        )
    except ValidationError as error:
        raise SettingsError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
    if alone:  # somebody who is there is found before all has started
        on_ray.listen(*on_ray.ingress_address(plan.ingress)).close()
    shares = {"num_cpus": arguments.replica_cpus, "num_gpus": arguments.replica_gpus}
    options: dict[str, Any] = {"num_replicas": arguments.replicas}
    if least is not None:
        options = {"autoscaling_config": on_ray.scaling(least, most)}
    options["ray_actor_options"] = {name: share for name, share in shares.items() if share is not None}
    return on_ray.applications(plan, options), plan


def _most(arguments: argparse.Namespace) -> int:
    """Return the largest number of servers at once."""
    most: int = arguments.max_replicas or arguments.replicas
    return most


def _shared_out(settings: Settings, servers: int) -> dict[str, int]:
    """Return the settings by which each of so many servers on one machine gets its share of threads and
    memory."""
    made = {}
    if not settings.threads:
        made["threads"] = max(1, (os.cpu_count() or 1) // servers)
    if not settings.host_memory and servers > 1 and (total := total_memory()) != NO_LIMIT:
        made["host_memory"] = total // 4 // servers
    return made


def _deploy(
    arguments: argparse.Namespace, apps: list[dict[str, Any]], stop: threading.Event, console: Console
) -> bool:
    """Deploy the applications. Return True once they run, or False if stopped before."""
    from onebase_route import cluster as on_ray

    if arguments.replica_gpus is None and load_settings({"device": arguments.device}).device != "cpu":
        on_ray.take_gpus(apps)
    if arguments.address is None and (said := on_ray.gpus_left(apps, _most(arguments))):
        console.print(said)
    on_ray.deploy(apps)
    running = on_ray.settled(console.print, stop)
    if running:
        _print_cluster()
    return running


def _as_typed(values: dict[str, Any], but: Sequence[str] = ()) -> list[str]:
    """Return the settings that have a value as options of a command line."""
    options: list[str] = []
    for name, value in values.items():
        if value is None or name in but:
            continue
        if isinstance(value, bool):
            options.append(option_name(name) if value else "--no-" + name.replace("_", "-"))
        else:
            for one in value if isinstance(value, (tuple, list)) else [value]:
                options += [option_name(name), "=".join(one) if isinstance(one, tuple) else str(one)]
    return options


def _print_cluster() -> None:
    """Print to standard output how many servers there are, the address, and how many requests each has
    had."""
    from onebase_route import cluster as on_ray

    output = Console(highlight=False, markup=False)
    try:
        report = on_ray.cluster_report()
    except on_ray.ClusterError:
        output.print(f"OneBase cluster, {on_ray.status()}", soft_wrap=True)
        raise
    output.print(f"OneBase cluster on {report['url']}, {on_ray.status()}", soft_wrap=True)
    lines = [("route", "", report)] + [
        (url, "ready" if one.get("ready") else "away", one) for url, one in sorted(report["servers"].items())
    ]
    for name, state, one in lines:
        parts = [name, state, f"{one['requests_total']:.0f} requests" if "requests_total" in one else ""]
        if "pid" in one:
            up = _duration(time.time() - float(one["since"]))
            parts += [f"pid {one['pid']} on {one['node']}", f"up {up}", f"OneBase {one['version']}"]
            parts.append(f"log {one['log']}" if one["log"] else "")
        output.print(f"  {'  '.join(filter(None, parts))}", soft_wrap=True)


def _duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 5 min`, `2 d 4 h`."""
    minutes = int(seconds) // 60
    if minutes < 1:
        return f"{max(0, seconds):.0f} s"
    hours = minutes // 60
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


class ReplicaFile:
    """Addresses in a file, besides those that were given."""

    def __init__(self, path: Path, given: Sequence[str]) -> None:
        self._path = path
        self._given = given
        self._seen: tuple[int, int, int] | None = None
        self._why = ""

    def changed(self) -> list[str] | None:
        """Return the addresses if the file has changed; None if not, or if it cannot be read."""
        try:
            found = self._path.stat()
            seen = (found.st_mtime_ns, found.st_size, found.st_ino)
            if seen == self._seen:
                return None
            lines = (line.partition("#")[0].strip() for line in self._path.read_text().splitlines())
            urls = [*self._given, *(replica_url(line) for line in lines if line)]
        except (OSError, ValueError) as error:
            if str(error) != self._why:
                self._why = str(error)
                logging.getLogger(__name__).error("%s is not used: %s", self._path, error)
            return None
        self._seen, self._why = seen, ""
        return urls


def print_replicas(console: Console, url: str, replicas: Iterable[Replica]) -> None:
    """Print the address, and the servers behind it: which of them are ready."""
    console.print(f"OneBase routes on [bold]{url}[/bold]")
    table = Table.grid(padding=(0, 2))
    for one in replicas:
        table.add_row(escape(one.url), "ready" if one.ready else f"away: {escape(one.why)}")
    console.print(table, highlight=False)
