"""From settings to a running server: the base resolved, adapters named, parts wired, the loop run."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

import uvloop
from rich.console import Console

from onebase_server.app import create_app
from onebase_server.catalog import Catalog, CatalogError, find_adapters
from onebase_server.console import LoadingDisplay, address_error, print_summary
from onebase_server.engine_link import ENGINE_COMMAND
from onebase_server.http_server import bind, run_server, url_of
from onebase_server.planner import Limits, Planner
from onebase_server.services import Services
from onebase_server.settings import Settings
from onebase_server.supervisor import EngineFailedError, EngineSupervisor
from onebase_server.tokenization import BaseTokenizer

if TYPE_CHECKING:
    from onebase_adapters.default_base import ResolvedBase


class StartupError(RuntimeError):
    """The server cannot serve; the message says why and what to do."""


def run(settings: Settings, console: Console, engine_command: Sequence[str] = ENGINE_COMMAND) -> None:
    """Serve until a signal. `engine_command` starts an engine (`--fd N` is appended).

    Raises StartupError when the server cannot start or not go on.
    """
    try:
        listener = bind(settings)
    except OSError as error:
        raise StartupError(address_error(settings, error)) from error
    with listener, LoadingDisplay(console) as display:
        resolved = resolve(settings.base, display)
        try:
            adapters = find_adapters(settings.adapter, settings.adapters_dir)
            catalog = Catalog(resolved.name, adapters)
        except (CatalogError, OSError) as error:
            raise StartupError(str(error)) from error
        try:
            uvloop.run(_serve(settings, resolved, catalog, listener, console, display, engine_command))
        except EngineFailedError as error:
            raise StartupError(f"the engine cannot serve {resolved.name}: {error}") from error


def resolve(base: str, display: LoadingDisplay) -> ResolvedBase:
    """The base's local folder, downloaded if need be. Raises StartupError."""
    from onebase_adapters.default_base import resolve_base

    try:
        return resolve_base(base, display.update)
    except Exception as error:
        raise StartupError(f"the base {base!r} cannot be used: {error}") from error


async def _serve(
    settings: Settings,
    resolved: ResolvedBase,
    catalog: Catalog,
    listener: socket.socket,
    console: Console,
    display: LoadingDisplay,
    engine_command: Sequence[str],
) -> None:
    supervisor = EngineSupervisor(
        settings.engine_config(str(resolved.folder)),
        catalog,
        queue_limit=settings.queue_limit,
        stall_timeout=settings.stall_timeout,
        command=engine_command,
        on_loading=display.loading,
    )
    services = wire_services(settings, catalog, str(resolved.folder), supervisor)

    def ready() -> None:
        display.close()
        if supervisor.base is not None:
            print_summary(console, settings, supervisor.base, catalog, url_of(listener))

    await run_server(services, create_app(services), listener, ready)


def wire_services(
    settings: Settings, catalog: Catalog, folder: str, supervisor: EngineSupervisor
) -> Services:
    """All parts but the engine, around one base folder. Raises StartupError when it has no tokenizer."""
    try:
        tokenizer = BaseTokenizer(folder)
    except Exception as error:
        raise StartupError(f"the base in {folder} has no usable tokenizer: {error}") from error
    limits = Limits(max_choices=settings.max_choices, max_timeout=settings.max_timeout)
    planner = Planner(supervisor, tokenizer, catalog, limits)
    return Services(settings, catalog, tokenizer, supervisor, planner)
