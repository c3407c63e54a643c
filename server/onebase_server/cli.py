"""`onebase serve`, `route`, `cluster`, `base`, `keys`, `tenants`, `backup`: what needs the server's code."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from rich.console import Console

from onebase_adapters.registry import (
    DEFAULT_TENANT,
    KEY_QUOTAS,
    SCOPES,
    TENANT_QUOTAS,
    ApiKeys,
    Origin,
    RegistryError,
    Tenants,
    acting,
)
from onebase_adapters.registry.keys import MAX_PRIORITY
from onebase_adapters.training.cli.options import Parser
from onebase_engine.logs import LOG_FORMAT, set_up_logs
from onebase_server.access import is_loopback
from onebase_server.settings import (
    Settings,
    SettingsError,
    load_settings,
    option_name,
    parse_adapter,
    parse_duration,
    parse_quotas,
    parse_size,
    setting_fields,
)

if TYPE_CHECKING:
    from onebase_server.routing.cluster import Plan
    from onebase_server.wiring import Commands

_SERVE = """\
Serve one base model, and LoRA adapters on it, over HTTP.

Without options: the small default base (downloaded once, 270 MB), on http://127.0.0.1:8000.
The first answer:

  curl http://127.0.0.1:8000/generate -H 'Content-Type: application/json' \\
       -d '{"prompt": "The capital of France is", "max_tokens": 16}'
"""
_ROUTE = """\
One address for several servers of one base: each request goes where its adapter is, or belongs.

The servers share a registry (PostgreSQL) and a store (S3, or a folder that all of them see). They
check the keys of requests themselves.
"""
_ROUTE_SETTINGS = (
    "host", "port", "log_level", "log_format", "access_log", "drain_timeout", "allowed_host",
    "allowed_origin", "trusted_proxy", "max_connections", "max_connections_per_host", "max_header",
    "max_header_lines", "header_timeout", "body_timeout", "min_body_rate", "keep_alive_timeout",
    "write_timeout", "max_body",
)  # fmt: skip
_CLUSTER = """\
Several servers of one base on Ray Serve, behind one address: started, watched, replaced, scaled.

Without --address, `up` starts Ray on this machine and serves until Ctrl-C; with it, the servers run
on a cluster that `ray start` has made. Servers on several machines share a registry (PostgreSQL)
and a store (S3, or a folder that all of them see).
"""
_UP = """\
Start the servers, or change those that run. Options of `onebase serve` go to each of them; --host,
--port and what is about connections to the address that they have together.
"""
_FRONT_SETTINGS = ("host", "port", "access_log", "allowed_host", "allowed_origin", "trusted_proxy")
"""Of the cluster's address alone. Servers get the other ones of _ROUTE_SETTINGS too."""
_OF_PLAN = ("data_dir", "drain_timeout", "stop_with_stdin")
_START_SECONDS = 600.0
"""That a request waits for a first server to start, where there may be none."""
_LOOKED_SECONDS = 2.0
"""In which the command that has ended a cluster sees that, before its Ray ends."""
_RAY_FOLDER = "onebase-ray-"
_REPLICA_KEY = "ONEBASE_REPLICA_KEY"
_LOG_WIDTH = 200
"""Characters, so that no line of a log is broken."""
_GROUPS = {
    "base": "the base model",
    "adapters": "adapters",
    "server": "server",
    "connections": "connections",
    "engine": "engine (tokens, memory, threads)",
    "training": "training jobs",
    "limits": "limits",
}


def serve(argv: Sequence[str], commands: Commands | None = None) -> int:
    """`onebase serve`. Exit status: 0 after a drain, 1 when it cannot serve, 2 for wrong options.

    `commands` replaces the other processes, for tests of their faults.
    """
    parser = serve_parser()
    options = vars(parser.parse_args(list(argv)))
    try:
        settings = load_settings(options)
    except SettingsError as error:
        parser.error(str(error))
    as_json = settings.log_format == "json"
    os.environ[LOG_FORMAT] = settings.log_format  # which the other processes get, and those that they start
    set_up_logs("api", settings.log_level.upper(), settings.log_format)
    for quiet in ("httpx", "alembic"):
        logging.getLogger(quiet).setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a line for each form that is none
    from onebase_server.startup import StartupError, run

    console = Console(stderr=True, quiet=as_json)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _LOG_WIDTH
    try:
        run(settings, console, commands)
    except StartupError as error:
        from onebase_server.console import print_failure

        if as_json:
            logging.getLogger(__name__).critical("%s", error)
        print_failure(console, str(error))
        return 1
    return 0


def route(argv: Sequence[str]) -> int:
    """`onebase route`. Exit status: 0 after a drain, 1 when it cannot serve, 2 for wrong options."""
    parser = route_parser()
    options = vars(parser.parse_args(list(argv)))
    urls, listed = options.pop("replica") or [], options.pop("replicas")
    key_file, wait = options.pop("key_file"), options.pop("wait")
    if not urls and listed is None:
        parser.error("which servers? Name each with --replica URL, or list them in a file: --replicas FILE.")
    try:
        settings = load_settings({name: value for name, value in options.items() if value is not None})
        key = os.environ.get(_REPLICA_KEY) if key_file is None else Path(key_file).read_text().strip()
    except (SettingsError, OSError) as error:
        parser.error(str(error))
    set_up_logs("route", settings.log_level.upper(), settings.log_format)
    for quiet in ("httpx", "httpx2"):
        logging.getLogger(quiet).setLevel(logging.WARNING)
    import asyncio

    from onebase_server.console import address_error, print_failure, print_replicas
    from onebase_server.http.server import bind, url_of
    from onebase_server.routing.proxy import Route
    from onebase_server.routing.proxy import serve as serve_route

    console = Console(stderr=True, quiet=settings.log_format == "json")
    try:
        listener = bind(settings)
    except OSError as error:
        print_failure(console, address_error(settings, error))
        return 1

    async def run() -> None:
        names = None if listed is None else ReplicaFile(Path(listed), urls)
        made = Route(
            urls,
            key=key or None,
            max_body=settings.max_body,
            listed=lambda: None if names is None else names.changed(),
            wait=wait,
        )

        def show() -> None:
            print_replicas(console, url_of(listener), made.replicas.values())

        await serve_route(made, settings, listener, show)

    asyncio.run(run())
    return 0


def route_parser() -> argparse.ArgumentParser:
    """The options of `onebase route`: its own, and those of `onebase serve` that are about connections."""
    parser = Parser(prog="onebase route", usage="onebase route --replica URL [options]", description=_ROUTE)
    parser.add_argument(
        "--replica",
        action="append",
        type=_checked(replica_url),
        metavar="URL",
        help="a server of the base, as in http://10.0.0.7:8000; once for each",
    )
    parser.add_argument(
        "--replicas",
        metavar="FILE",
        help="a file with such addresses, one a line, that is read again when it changes: servers come and "
        "go without a restart",
    )
    parser.add_argument(
        "--wait",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help="how long a request waits for a server where there is none (default: 0)",
    )
    parser.add_argument(
        "--key-file",
        metavar="FILE",
        help=f"a file with an admin key, by which their metrics are read (or {_REPLICA_KEY} in the "
        "environment); not needed where they have --open-metrics",
    )
    _add_registry(parser, *_ROUTE_SETTINGS)
    return parser


def cluster(argv: Sequence[str], server: Sequence[str] = ("onebase", "serve")) -> int:
    """`onebase cluster up | status | scale | drain | down`. Exit status: 0, or 1 with the reason, 2 for wrong
    options, 130 where Ctrl-C ended the waiting.

    `server` replaces the command of a server, for tests of its faults.
    """
    parser = cluster_parser()
    arguments = parser.parse_args(list(argv))
    from onebase_server.console import print_failure

    console = Console(stderr=True, highlight=False, markup=False)
    own = arguments.action == "up" and arguments.address is None and not arguments.config
    status = 0
    try:
        data = Path(load_settings({"data_dir": arguments.data_dir}).data_dir).expanduser().absolute()
        state = data / "cluster.json"
        held = _alone(data) if own else contextlib.nullcontext()
        with held, tempfile.TemporaryDirectory(prefix=_RAY_FOLDER) as folder:
            address = _prepare_ray(arguments, state, Path(folder) if own else None)
            from onebase_server.routing import cluster as on_ray

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


@contextlib.contextmanager
def _alone(data: Path) -> Iterator[None]:
    """Be the one cluster of a data folder until the block ends. Raises SettingsError where it has one."""
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
    """A descriptor that holds the lock of the folder's cluster until it is closed; None if another does."""
    lock = os.open(data / "cluster.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _state_of(data: Path) -> dict[str, str]:
    """Address and token of the cluster that runs with the folder. Raises SettingsError where none does."""
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
    """The address of the cluster's head node; empty where there is none yet. Raises SettingsError.

    Ray reads as it is imported whether there is a token, and which. folder: of a Ray of this machine's own.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to Ray's makers
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
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
    """After a cluster that was killed: Ray's folder, which has its logs, and the file that names it."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        folder = Path(json.loads(state.read_text())["token"]).parent
        if folder.name.startswith(_RAY_FOLDER) and folder.parent == Path(tempfile.gettempdir()):
            shutil.rmtree(folder, ignore_errors=True)
    state.unlink(missing_ok=True)


def _waited(settled: bool, console: Console) -> int:
    if settled:
        return 0
    console.print("It goes on; `onebase cluster status` shows how far it is.")
    return 130


def _serve_cluster(
    arguments: argparse.Namespace, apps: list[dict[str, Any]], plan: Plan, console: Console
) -> None:
    """On Ray of this machine's own: until a signal, or until another command has ended it."""
    from onebase_server.routing import cluster as on_ray

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
    """Of a cluster that runs: its status, another number of servers, its end. Raises ClusterError."""
    from onebase_server.routing import cluster as on_ray

    apps = on_ray.deployed()
    if arguments.action == "status":
        _print_cluster()
    elif arguments.action == "scale":
        on_ray.scale(apps, arguments.replicas)
        return _waited(on_ray.settled(console.print, on_ray.on_signals()), console)
    else:
        on_ray.end(on_ray.Plan(**apps[0]["args"]).drain_timeout, now=arguments.action == "down")
        console.print("The cluster has ended.")
    return 0


def _applications(
    arguments: argparse.Namespace, parser: argparse.ArgumentParser, data: Path, server: Sequence[str]
) -> tuple[list[dict[str, Any]], Plan]:
    """As Ray Serve is to run it. Raises SettingsError, ClusterError."""
    from pydantic import ValidationError

    from onebase_server.routing import cluster as on_ray

    given = {item.name: getattr(arguments, item.name) for item, _ in setting_fields()}
    host = load_settings(given).host  # what is wrong is told here, and not by each server
    alone = arguments.address is None and not arguments.config
    if alone and given["threads"] is None:
        given["threads"] = max(1, (os.cpu_count() or 1) // arguments.replicas)
    least, most = arguments.min_replicas, arguments.max_replicas
    if (least is None) != (most is None) or (least is not None and least > most):
        parser.error("--min-replicas and --max-replicas go together, the lower one first")
    front = _as_typed({name: given[name] for name in _ROUTE_SETTINGS if name not in _OF_PLAN})
    key_file = str(Path(arguments.key_file).expanduser().absolute()) if arguments.key_file else ""
    if alone and key_file:
        Path(key_file).read_bytes()  # what is wrong is told here
    try:
        plan = on_ray.Plan(
            server=[*server, *_as_typed(given, but=(*_FRONT_SETTINGS, *_OF_PLAN))],
            ingress=["onebase", "route", *front],
            data_dir=str(data) if alone or arguments.data_dir else "",
            drain_timeout=120.0 if given["drain_timeout"] is None else given["drain_timeout"],
            one_machine=alone and is_loopback(host),
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


def _deploy(
    arguments: argparse.Namespace, apps: list[dict[str, Any]], stop: threading.Event, console: Console
) -> bool:
    """Whether it runs, or was stopped before."""
    from onebase_server.routing import cluster as on_ray

    if arguments.replica_gpus is None and arguments.device != "cpu":
        on_ray.take_gpus(apps)
    on_ray.deploy(apps)
    running = on_ray.settled(console.print, stop)
    if running:
        _print_cluster()
    return running


def _as_typed(values: dict[str, Any], but: Sequence[str] = ()) -> list[str]:
    """Settings as options of a command line, of those that are given."""
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
    """To standard output: how many servers there are, the address, and what the servers have answered."""
    from onebase_server.routing import cluster as on_ray

    output = Console(highlight=False, markup=False)
    try:
        told = on_ray.told()
    except on_ray.ClusterError:
        output.print(f"OneBase cluster, {on_ray.status()}", soft_wrap=True)
        raise
    output.print(f"OneBase cluster on {told['url']}, {on_ray.status()}", soft_wrap=True)
    for url, one in sorted(told["servers"].items()):
        state = "ready" if one.get("ready") else "away"
        output.print(f"  {url}  {state}  {one.get('requests_total', 0):.0f} requests", soft_wrap=True)


def cluster_parser() -> argparse.ArgumentParser:
    """The options of `onebase cluster`."""
    parser = Parser(prog="onebase cluster", description=_CLUSTER)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    up = actions.add_parser("up", help="start the servers, or change those that run", description=_UP)
    actions.add_parser("status", help="the address, and the servers behind it")
    scale = actions.add_parser("scale", help="have another number of servers")
    scale.add_argument("replicas", type=_positive, metavar="N", help="servers")
    actions.add_parser("drain", help="take nothing new, let running requests end, then end the servers")
    actions.add_parser("down", help="end the servers now, and what runs on them")
    own = up.add_argument_group("cluster")
    own.add_argument("--replicas", type=_positive, default=1, metavar="N", help="servers (default: 1)")
    own.add_argument(
        "--min-replicas",
        type=_whole,
        metavar="N",
        help="scale by itself, by tokens that wait, with --max-replicas; 0: none while nobody asks "
        "(default: none)",
    )
    own.add_argument("--max-replicas", type=_positive, metavar="N", help="see --min-replicas (default: none)")
    own.add_argument(
        "--replica-gpus",
        type=_share,
        metavar="N",
        help="a server's GPUs, or its part of one (default: 1, where there are GPUs)",
    )
    own.add_argument(
        "--replica-cpus",
        type=_share,
        metavar="N",
        help="a server's share of a machine's CPUs, by which Ray places it (default: 1)",
    )
    own.add_argument(
        "--key-file",
        metavar="FILE",
        help=f"a file with an admin key, by which servers' metrics are read (or {_REPLICA_KEY} in the "
        "environment)",
    )
    own.add_argument(
        "--config", action="store_true", help="print the config file for `serve deploy`, and start nothing"
    )
    groups = {name: up.add_argument_group(title) for name, title in _GROUPS.items()}
    for item, kind in setting_fields():
        groups[item.metadata["group"]].add_argument(option_name(item.name), **_argument(item, kind))
    for action in actions.choices.values():
        action.add_argument(
            "--address",
            metavar="HOST:PORT",
            help="the head node of a cluster that `ray start` has made (default: this machine's own)",
        )
        if action is not up:
            _add_registry(action, "data_dir")
    return parser


class ReplicaFile:
    """The addresses in a file, and those that were given besides."""

    def __init__(self, path: Path, given: Sequence[str]) -> None:
        self._path = path
        self._given = given
        self._seen: tuple[int, int, int] | None = None
        self._why = ""

    def changed(self) -> list[str] | None:
        """The addresses if the file is another one than before; None if not, or if it cannot be read."""
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


def replica_url(text: str) -> str:
    """Scheme, host and port of a server's address. Raises SettingsError."""
    try:
        parts = urlsplit(text)
        wrong = parts.port == 0 or not parts.hostname or re.search(r"[\s%*]", text) is not None
    except ValueError:
        wrong = True
    if (
        wrong
        or parts.scheme not in ("http", "https")
        or parts.path.strip("/")
        or parts.query
        or parts.fragment
    ):
        raise SettingsError(f"{text!r} is no address of a server: give one as http://host:8000.")
    if parts.username or parts.password:
        raise SettingsError("an address has no password in it: give the key with --key-file.")
    return f"{parts.scheme}://{parts.netloc}"


def base(argv: Sequence[str]) -> int:
    """`onebase base fetch`: get a base model ready and print its folder as the last line."""
    parser = Parser(prog="onebase base", description="Get base models ready before serving them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="ACTION")
    fetch = commands.add_parser(
        "fetch",
        help="download a base model once and print its folder",
        description="Download a base model into the cache (once) and print its folder as the last line.",
    )
    default = Settings().base
    fetch.add_argument(
        "base",
        nargs="?",
        default=default,
        metavar="BASE",
        help="the base model: the default's name, org/repo[@revision] on the Hub, or a folder "
        f"(default: {default})",
    )
    arguments = parser.parse_args(list(argv))
    from onebase_server.console import LoadingDisplay, print_failure
    from onebase_server.startup import StartupError, resolve

    console = Console(stderr=True)
    try:
        with LoadingDisplay(console) as display:
            resolved = resolve(arguments.base, display)
    except StartupError as error:
        print_failure(console, str(error))
        return 1
    sys.stdout.write(f"{resolved.folder}\n")
    return 0


_KEYS = """\
Say who may use the servers of a registry. Run it on the machine of one of them,
as the user that it runs as, and with the same --data-dir and --registry.

As soon as there is a key, every request needs one, on every server of the
registry and on this machine too. A change holds within a second.
"""
_TENANTS = """\
Say how much tenants may ask for and keep. Run it on the machine of a server,
as the user that it runs as, and with the same --data-dir and --registry.
A change holds within a second, on every server of the registry.
"""


_BACKUP = """\
Copy what a server keeps to a folder, while it serves. Run it on the machine of the
server, as the user that it runs as, and with the same --data-dir, --registry and --store.

The folder is then a data folder: `onebase serve --data-dir FOLDER` serves it. A second
backup into it copies only the files that are new.
"""


def backup(argv: Sequence[str]) -> int:
    """`onebase backup FOLDER`. Exit status: 0, or 1 with the reason."""
    parser = Parser(prog="onebase backup", description=_BACKUP)
    parser.add_argument(
        "folder", metavar="FOLDER", help="where the copy is to be; it is made if it is not there"
    )
    _add_registry(parser, "data_dir", "registry", "store")
    arguments = parser.parse_args(list(argv))
    from onebase_server.console import print_failure
    from onebase_server.storage import StorageError, back_up, keep_private

    console = Console(stderr=True)
    keep_private()
    try:
        given = {name: getattr(arguments, name) for name in ("data_dir", "registry", "store")}
        left_out = back_up(load_settings(given), Path(arguments.folder))
    except (SettingsError, StorageError) as error:
        print_failure(console, str(error))
        return 1
    if left_out:
        console.print(
            f"Not in this backup: {' and '.join(left_out)}. Copy that by its own tools, the registry first.",
            style="yellow",
            soft_wrap=True,
        )
    else:
        console.print(f"Serve the copy with: onebase serve --data-dir {arguments.folder}", soft_wrap=True)
    return 0


def keys(argv: Sequence[str]) -> int:
    """`onebase keys create | list | set | revoke`: on the registry itself, whether or not a server runs."""
    arguments = keys_parser().parse_args(list(argv))
    from onebase_server.console import print_keys

    def work(registry: ApiKeys, _: Tenants, console: Console, output: Console) -> None:
        if arguments.action == "create":
            made, key = registry.create(
                arguments.tenant,
                arguments.scope,
                name=arguments.name,
                expires_at=None if arguments.expires is None else time.time() + arguments.expires,
                quotas=arguments.quota,
                priority=arguments.priority or 0,
            )
            print_keys(console, [made])
            settings = load_settings({"data_dir": arguments.data_dir, "registry": arguments.registry})
            where = "this --registry" if settings.registry else f"--data-dir {settings.data_dir}"
            console.print(f"Servers with {where} know it.", soft_wrap=True, markup=False)
            console.print("This is the key. It is shown this once, and cannot be read again:")
            sys.stdout.write(f"{key}\n")
        elif arguments.action == "set":
            print_keys(output, [registry.change(arguments.id, arguments.quota, arguments.priority)])
        elif arguments.action == "revoke":
            print_keys(output, [registry.revoke(arguments.id)])
        else:
            print_keys(output, registry.all())

    return _on_registry("keys", arguments, work)


def tenants(argv: Sequence[str]) -> int:
    """`onebase tenants set | list`: on the registry itself, whether or not a server runs."""
    arguments = tenants_parser().parse_args(list(argv))
    from onebase_server.console import print_tenants

    def work(_: ApiKeys, registry: Tenants, console: Console, output: Console) -> None:
        if arguments.action == "set":
            print_tenants(output, [registry.set_quotas(arguments.tenant, arguments.quota)])
        else:
            print_tenants(output, registry.all())

    return _on_registry("tenants", arguments, work)


def _on_registry(
    command: str,
    arguments: argparse.Namespace,
    work: Callable[[ApiKeys, Tenants, Console, Console], None],
) -> int:
    """Do it, given the terminal and what results go to. The exit status: 0, or 1 with the reason."""
    from onebase_server.console import print_failure
    from onebase_server.storage import StorageError, keep_private, open_keys

    console, output = Console(stderr=True), Console()
    if not output.is_terminal:
        output.width = _LOG_WIDTH
    keep_private()
    try:
        settings = load_settings({"data_dir": arguments.data_dir, "registry": arguments.registry})
        with open_keys(settings) as (of_keys, of_tenants), acting(Origin(actor=f"onebase {command}")):
            work(of_keys, of_tenants, console, output)
    except (SettingsError, StorageError, RegistryError) as error:
        print_failure(console, str(error))
        return 1
    return 0


def keys_parser() -> argparse.ArgumentParser:
    """The options of `onebase keys`."""
    parser = Parser(prog="onebase keys", description=_KEYS)
    actions = parser.add_subparsers(dest="action", required=True)
    create = actions.add_parser("create", help="make a key, and print it once as the last line")
    create.add_argument("--tenant", default=DEFAULT_TENANT, help="whose key it is (default: default)")
    create.add_argument(
        "--scope",
        type=_scopes,
        required=True,
        metavar="SCOPE,...",
        help=f"what it allows: {', '.join(SCOPES)}; admin allows everything, and operating the servers",
    )
    create.add_argument(
        "--expires",
        type=_checked(parse_duration),
        metavar="TIME",
        help="when it ends, as in 90d or 12h (default: never)",
    )
    create.add_argument("--name", default="", help="for people, in lists")
    listing = actions.add_parser("list", help="all keys that there ever were, the newest first")
    setting = actions.add_parser("set", help="change a key's quotas and priority")
    revoke = actions.add_parser("revoke", help="end a key for good")
    for action in (setting, revoke):
        action.add_argument("id", metavar="ID", help="as `list` shows it: ob-...")
    for action in (create, setting):
        _add_quota(action, KEY_QUOTAS)
        action.add_argument(
            "--priority",
            type=int,
            metavar="N",
            help=f"-{MAX_PRIORITY} to {MAX_PRIORITY}: each step doubles its share of the engine (default: 0)",
        )
    for action in (create, listing, setting, revoke):
        _add_registry(action)
    return parser


def tenants_parser() -> argparse.ArgumentParser:
    """The options of `onebase tenants`."""
    parser = Parser(prog="onebase tenants", description=_TENANTS)
    actions = parser.add_subparsers(dest="action", required=True)
    setting = actions.add_parser("set", help="change a tenant's quotas")
    setting.add_argument("tenant", metavar="TENANT", help="as its keys have it (--tenant)")
    _add_quota(setting, TENANT_QUOTAS, required=True)
    listing = actions.add_parser("list", help="all tenants, their quotas, and what they keep and trained")
    for action in (setting, listing):
        _add_registry(action)
    return parser


def _add_quota(parser: argparse.ArgumentParser, names: Sequence[str], *, required: bool = False) -> None:
    kept = "; bytes as in 10GB, training_seconds (a calendar month's) as in 20h" if "bytes" in names else ""
    parser.add_argument(
        "--quota",
        type=_checked(parse_quotas),
        default={},
        required=required,
        metavar="NAME=LIMIT,...",
        help=f"{', '.join(names)}: requests and tokens in any 60 seconds, rows at once{kept}; NAME=none: no "
        "limit. What is not named stays as it is",
    )


def _add_registry(parser: argparse.ArgumentParser, *names: str) -> None:
    fields = {item.name: (item, kind) for item, kind in setting_fields()}
    for name in names or ("data_dir", "registry"):
        parser.add_argument(option_name(name), **_argument(*fields[name]))


def _whole(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 10_000:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 10000")
    return number


def _positive(text: str) -> int:
    if not _whole(text):
        raise argparse.ArgumentTypeError("0 is too few: one at least")
    return int(text)


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1024:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1024")
    return share


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 86400")
    return seconds


def _scopes(text: str) -> list[str]:
    return [scope.strip() for scope in text.split(",") if scope.strip()]


def serve_parser() -> argparse.ArgumentParser:
    """The options of `onebase serve`, one per field of Settings."""
    parser = Parser(
        prog="onebase serve",
        usage="onebase serve [options]",
        description=_SERVE,
        epilog="Each option can also be set in the environment: --kv-memory 2GB is ONEBASE_KV_MEMORY=2GB.",
    )
    groups = {name: parser.add_argument_group(title) for name, title in _GROUPS.items()}
    for item, kind in setting_fields():
        groups[item.metadata["group"]].add_argument(option_name(item.name), **_argument(item, kind))
    return parser


def _argument(item: Any, kind: Any) -> dict[str, Any]:
    text = item.metadata["help"].replace("%", "%%")
    argument: dict[str, Any] = {"dest": item.name, "default": None, "help": f"{text}{_default(item)}"}
    if item.name == "adapter":
        return argument | {"action": "append", "type": _checked(parse_adapter), "metavar": "NAME=FOLDER"}
    if get_origin(kind) is tuple:
        return argument | {
            "action": "extend",
            "type": _checked(item.metadata["parse"]),
            "metavar": item.metadata["metavar"],
        }
    if kind is bool:
        return argument | {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return argument | {"choices": get_args(kind)}
    parse = item.metadata["parse"] or {int: int, float: float}.get(kind, str)
    metavar = item.metadata["metavar"] or {int: "N", float: "SECONDS"}.get(kind, item.name.upper())
    return argument | {"type": _checked(parse), "metavar": metavar}


def _default(item: Any) -> str:
    if isinstance(item.default, bool):
        return f" (default: {'on' if item.default else 'off'})"
    if item.metadata["parse"] is parse_size and item.default:
        units = (("GB", 10**9), ("MB", 10**6), ("KiB", 1024), ("", 1))
        unit, size = next(one for one in units if item.default % one[1] == 0)
        return f" (default: {item.default // size}{unit})"
    if isinstance(item.default, int | float):
        return f" (default: {item.default:g})"
    if "by default" in item.metadata["help"]:
        return ""
    return f" (default: {item.default or 'none'})"


def _checked(parse: Any) -> Any:
    def convert(text: str) -> Any:
        try:
            return parse(text)
        except SettingsError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    convert.__name__ = getattr(parse, "__name__", "value")
    return convert
