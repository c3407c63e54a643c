"""`onebase serve`, `base`, `keys`, `tenants`, `backup`: what needs the server's code."""

from __future__ import annotations

import argparse
import json
import logging
import os
import pwd
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from onebase_edge.folder_lock import FolderInUseError, lock_folder
from onebase_edge.options import add_all_settings, add_settings, address_error, checked, print_failure
from onebase_edge.settings import (
    Settings,
    SettingsError,
    load_settings,
    parse_duration,
    parse_quotas,
)
from onebase_engine.logs import LOG_FORMAT, set_up_logs
from onebase_engine.machine import explain_refusal, with_room
from onebase_protocol.command_line import OptionParser

if TYPE_CHECKING:
    from onebase_adapters.registry import ApiKeys, Tenants
    from onebase_server.app.wiring import Commands

_SERVE = """\
Serve one base model, and LoRA adapters on it, over HTTP.

Without options: the small default base (downloaded once, 270 MB), on http://127.0.0.1:8000.
The first answer:

  curl http://127.0.0.1:8000/generate -H 'Content-Type: application/json' \\
       -d '{"prompt": "The capital of France is", "max_tokens": 16}'
"""
_LOG_WIDTH = 200
"""Characters, so that no line of a log is broken."""


def serve(argv: Sequence[str], commands: Commands | None = None) -> int:
    """`onebase serve`. Exit status: 0 after a drain, 1 when it cannot serve, 2 if it cannot before its
    settings, or what they name, are changed.

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
    console = Console(stderr=True, quiet=as_json)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _LOG_WIDTH

    def failed(error: Exception | str, status: int = 1) -> int:
        if as_json:
            logging.getLogger(__name__).critical("%s", error)
        print_failure(console, str(error))
        return status

    # What is refused at a glance is refused before the libraries are imported, which takes seconds.
    from onebase_edge.listener import bind

    try:
        listener = bind(settings)
    except OSError as error:
        return failed(address_error(settings, error))
    with listener:
        try:
            lock = lock_folder(Path(settings.data_dir).expanduser().absolute())
        except FolderInUseError as error:
            return failed(error)
        try:
            _serve_on(settings, listener, console, commands)
        except Exception as error:
            if (refusal := explain_refusal(error)) is not None:
                return failed(refusal)
            # Not imported here: what failed may be an import. Its errors come only from where it succeeded.
            startup = sys.modules.get("onebase_server.app.startup")
            if startup is None or not isinstance(error, startup.StartupError):
                raise
            return failed(error, 2 if isinstance(error, startup.WrongSettingsError) else 1)
        finally:
            lock.close()
    return 0


def _serve_on(
    settings: Settings, listener: socket.socket, console: Console, commands: Commands | None
) -> None:
    """Import the server, and serve until a signal. Raises StartupError, or whatever memory that is refused
    raises where it is."""
    from onebase_server.app.startup import serve_until_stopped

    with_room(lambda: serve_until_stopped(settings, listener, console, commands))


def base(argv: Sequence[str]) -> int:
    """`onebase base fetch | check`: download a base, or say whether it can be served.

    Exit status of `check`: 0 if it can be served, 1 if not.
    """
    parser = OptionParser(prog="onebase base", description="Get base models ready before serving them.")
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
    check = commands.add_parser(
        "check",
        help="say whether a base can be served, before its weights are downloaded",
        description="Say from a base's config alone whether it can be served, and what it takes.\n"
        "Of a repository only the config and the tokenizer are downloaded.",
    )
    check.add_argument("base", metavar="BASE", help="org/repo[@revision] on the Hub, or a folder")
    check.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(list(argv))
    if arguments.command == "check":
        return _check_base(arguments.base, arguments.json)
    from onebase_server.app.console import LoadingDisplay
    from onebase_server.app.startup import StartupError, resolve

    console = Console(stderr=True)
    try:
        with LoadingDisplay(console) as display:
            resolved = resolve(arguments.base, display)
    except StartupError as error:
        print_failure(console, str(error))
        return 1
    sys.stdout.write(f"{resolved.folder}\n")
    return 0


def _check_base(spec: str, as_json: bool) -> int:
    """Print what a base's config says. Return 0 if it can be served, else 1."""
    from onebase_engine.base.default_base import BaseError, resolve_config
    from onebase_engine.base.load import UnsupportedBaseError, read_config
    from onebase_engine.engine.base_check import check_base
    from onebase_server.app.console import LoadingDisplay, print_base_check
    from onebase_server.inference.tokenization import chat_support

    console = Console(stderr=True)
    try:
        with LoadingDisplay(console) as display:
            folder = resolve_config(spec, display.update)
        config = read_config(folder)
    except (BaseError, UnsupportedBaseError) as error:
        print_failure(console, str(error))
        return 1
    found, chat = check_base(config), chat_support(folder)
    if as_json:
        fields = {
            "base": spec,
            "served": found.refusal is None if found.certain else None,
            **asdict(found),
            **asdict(chat),
        }
        sys.stdout.write(json.dumps(fields, indent=2) + "\n")
    else:
        print_base_check(Console(), spec, found, chat)
    return 0 if found.refusal is None else 1


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
    parser = OptionParser(prog="onebase backup", description=_BACKUP)
    parser.add_argument(
        "folder", metavar="FOLDER", help="where the copy is to be; it is made if it is not there"
    )
    add_settings(parser, "data_dir", "registry", "store")
    arguments = parser.parse_args(list(argv))
    from onebase_server.storage.opening import StorageError, back_up, keep_private

    console = Console(stderr=True)
    keep_private()
    try:
        given = {name: getattr(arguments, name) for name in ("data_dir", "registry", "store")}
        left_out = back_up(load_settings(given), Path(arguments.folder))
        holds = _describe_backup(Path(arguments.folder).expanduser())
    except (SettingsError, StorageError, OSError, sqlite3.Error) as error:
        print_failure(console, str(error))
        return 1
    console.print(f"Copied to {arguments.folder}: {holds}", soft_wrap=True, markup=False, highlight=False)
    if left_out:
        console.print(
            f"Not in this backup: {' and '.join(left_out)}. Copy that by its own tools, the registry first.",
            style="yellow",
            soft_wrap=True,
        )
    else:
        console.print(f"Serve the copy with: onebase serve --data-dir {arguments.folder}", soft_wrap=True)
    return 0


def _describe_backup(folder: Path) -> str:
    """Return what a backup holds: `205 adapters, 41 files, 164 MB, newest change 2026-11-30 12:34:56 UTC`.

    Raises OSError, sqlite3.Error.
    """
    from onebase_server.app.console import readable_bytes

    files = [file for file in folder.rglob("*") if file.is_file()]
    parts = [f"{len(files):,} files", readable_bytes(sum(file.stat().st_size for file in files))]
    registry = folder.absolute() / "registry.db"
    if registry.exists():
        with closing(sqlite3.connect(f"{registry.as_uri()}?immutable=1", uri=True)) as copy:
            (adapters,) = copy.execute("SELECT COUNT(*) FROM adapters").fetchone()
            (newest,) = copy.execute("SELECT MAX(at) FROM audit").fetchone()
        parts.insert(0, f"{adapters:,} adapter{'' if adapters == 1 else 's'}")
        if newest is not None:
            parts.append(f"newest change {datetime.fromtimestamp(newest, UTC):%Y-%m-%d %H:%M:%S} UTC")
    return ", ".join(parts)


def keys(argv: Sequence[str]) -> int:
    """`onebase keys create | list | set | revoke`: on the registry itself, whether or not a server runs."""
    arguments = keys_parser().parse_args(list(argv))
    from onebase_server.app.console import print_keys

    def work(registry: ApiKeys, _: Tenants, console: Console, output: Console) -> None:
        if arguments.action == "create":
            # What may fail comes before the key is made: it is shown once.
            settings = load_settings({"data_dir": arguments.data_dir, "registry": arguments.registry})
            where = "this --registry" if settings.registry else f"--data-dir {settings.data_dir}"
            before = registry.all()
            made, key = registry.create(
                arguments.tenant,
                arguments.scope,
                name=arguments.name,
                expires_at=None if arguments.expires is None else time.time() + arguments.expires,
                quotas=arguments.quota,
                priority=arguments.priority or 0,
            )
            print_keys(console, [made])
            console.print(f"Servers with {where} know it.", soft_wrap=True, markup=False)
            if not any("admin" in one.scopes and one.valid_at(time.time()) for one in (*before, made)):
                since = "" if before else " from now on"
                console.print(
                    f"No valid key has the scope admin. Servers ask everybody for a key{since}, your own "
                    "commands too: make one for yourself by onebase keys create --scope admin, with the same "
                    "--data-dir and --registry.",
                    soft_wrap=True,
                    markup=False,
                )
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
    from onebase_server.app.console import print_tenants

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
    """Do the work, given the terminal and the output. Returns the exit status: 0, or 1 with the reason."""
    from onebase_adapters.registry import Origin, RegistryError, acting
    from onebase_server.storage.opening import StorageError, keep_private, open_keys

    console, output = Console(stderr=True), Console()
    if not output.is_terminal:
        output.width = _LOG_WIDTH
    keep_private()
    try:
        settings = load_settings({"data_dir": arguments.data_dir, "registry": arguments.registry})
        origin = Origin(actor=f"onebase {command} of {_user()}")
        with open_keys(settings) as (of_keys, of_tenants), acting(origin):
            work(of_keys, of_tenants, console, output)
    except (SettingsError, StorageError, RegistryError) as error:
        print_failure(console, str(error))
        return 1
    return 0


def _user() -> str:
    """Return who runs this process, as in `ann@host`; by number where the user has no name."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        name = str(os.getuid())
    return f"{name}@{socket.gethostname()}"


def keys_parser() -> argparse.ArgumentParser:
    """Return the options of `onebase keys`."""
    from onebase_adapters.registry import DEFAULT_TENANT, KEY_QUOTAS, SCOPES
    from onebase_adapters.registry.keys import MAX_PRIORITY

    parser = OptionParser(prog="onebase keys", description=_KEYS)
    actions = parser.add_subparsers(dest="action", required=True)
    create = actions.add_parser("create", help="make a key, and print it once as the last line")
    create.add_argument("--tenant", default=DEFAULT_TENANT, help="whose key it is (default: default)")
    create.add_argument(
        "--scope",
        action="extend",
        type=_scopes,
        required=True,
        metavar="SCOPE,...",
        help=f"what it allows: {', '.join(SCOPES)}; admin allows everything, and operating the servers. May "
        "be repeated",
    )
    create.add_argument(
        "--expires",
        type=checked(parse_duration),
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
        add_settings(action, "data_dir", "registry")
    return parser


def tenants_parser() -> argparse.ArgumentParser:
    """Return the options of `onebase tenants`."""
    from onebase_adapters.registry import TENANT_QUOTAS

    parser = OptionParser(prog="onebase tenants", description=_TENANTS)
    actions = parser.add_subparsers(dest="action", required=True)
    setting = actions.add_parser("set", help="change a tenant's quotas")
    setting.add_argument("tenant", metavar="TENANT", help="as its keys have it (--tenant)")
    _add_quota(setting, TENANT_QUOTAS, required=True)
    listing = actions.add_parser("list", help="all tenants, their quotas, and what they keep and trained")
    for action in (setting, listing):
        add_settings(action, "data_dir", "registry")
    return parser


def _add_quota(parser: argparse.ArgumentParser, names: Sequence[str], *, required: bool = False) -> None:
    kept = ""
    if "bytes" in names:
        kept = "; bytes as in 10GB, training_seconds (a calendar month's) as in 20h, log_days in the log"
    parser.add_argument(
        "--quota",
        action=_Merge,
        type=checked(parse_quotas),
        default={},
        required=required,
        metavar="NAME=LIMIT,...",
        help=f"{', '.join(names)}: requests and tokens in any 60 seconds, sequences at once{kept}; "
        "NAME=none: no limit. What is not named stays as it is; may be repeated",
    )


class _Merge(argparse.Action):
    """Collects what is named by one option or by several of its kind; each name once."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest)
        for name in values:
            if name in before:
                raise argparse.ArgumentError(self, f"{name} is given twice. Give it once.")
        setattr(namespace, self.dest, {**before, **values})


def _scopes(text: str) -> list[str]:
    return [scope.strip() for scope in text.split(",") if scope.strip()]


def serve_parser() -> argparse.ArgumentParser:
    """Return the options of `onebase serve`, one per field of Settings."""
    parser = OptionParser(
        prog="onebase serve",
        repeated=True,
        usage="onebase serve [options]",
        description=_SERVE,
        epilog="Each option can also be set in the environment: --kv-memory 2GB is ONEBASE_KV_MEMORY=2GB.",
    )
    add_all_settings(parser)
    return parser
