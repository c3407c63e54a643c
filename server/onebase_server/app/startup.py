"""Start of the server from its settings: the base resolved, adapters named, parts wired, the loop run."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import threading
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop
from rich.console import Console

import onebase_server
from onebase_adapters.registry import RegistryError, ServerIdInUseError
from onebase_adapters.signatures import PolicyError
from onebase_edge.background import keep_running
from onebase_edge.errors import UnavailableError
from onebase_edge.listener import LEAST_FILES, url_of
from onebase_edge.settings import Settings, is_loopback
from onebase_engine.base.chat import begin_tokenizing_aside
from onebase_engine.machine import switch_threads_soon
from onebase_server.adapters.sources import FolderError, find_adapters
from onebase_server.app.console import LoadingDisplay, print_summary
from onebase_server.app.wiring import Commands, assemble
from onebase_server.http.app import create_app
from onebase_server.http.deps import Services
from onebase_server.http.server import run_server
from onebase_server.inference.tokenization import TokenizerError, leave_torch_out
from onebase_server.jobs.folders import DataDirError
from onebase_server.processes.supervisor import EngineFailedError
from onebase_server.storage.opening import Storage, StorageError, chosen_device, keep_private, open_storage
from onebase_server.telemetry.traces import Tracing, TracingError

if TYPE_CHECKING:
    from onebase_engine.base.default_base import ResolvedBase

_log = logging.getLogger(__name__)


class StartupError(RuntimeError):
    """The server cannot serve; the message says why and what to do."""


class WrongSettingsError(StartupError):
    """The server cannot serve before its settings, or what they name, are changed: another start would end
    as this one."""


def serve_until_stopped(
    settings: Settings, listener: socket.socket, console: Console, commands: Commands | None = None
) -> None:
    """Serve on the listener until a signal. Raises StartupError when the server cannot start or continue."""
    _check_open_files()
    switch_threads_soon()
    if settings.stop_with_stdin:
        threading.Thread(target=_stop_with_stdin, daemon=True).start()
    with LoadingDisplay(console) as display:
        base = resolve(settings.base, display)
        leave_torch_out()
        begin_tokenizing_aside()
        keep_private()  # not before: the cache of bases may be shared by several users
        try:
            given = find_adapters(settings.adapter, settings.adapters_dir, base.name)
            # Decided once, for the engine too: adapters are bound to the base that it loads.
            settings = replace(settings, device=chosen_device(settings.device))
            storage = open_storage(settings, base.name, base.folder)
            check_keys(settings, storage)
        except FolderError as error:
            raise WrongSettingsError(str(error)) from error
        except StorageError as error:
            raise StartupError(str(error)) from error
        server = _Server(settings, base, storage, given, commands or Commands())
        try:
            uvloop.run(server.serve(listener, console, display))
        except EngineFailedError as error:
            raise StartupError(f"the engine cannot serve {base.name}: {error}") from error
        except ServerIdInUseError as error:
            raise StartupError(
                f"{error} Is {settings.data_dir} a copy of that process's? Then name another --registry, or "
                "delete training/server-id in the copy, which makes it a server of its own"
            ) from error


def _check_open_files() -> None:
    """Raises StartupError now, rather than let some request fail at one file too many."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= allowed < LEAST_FILES:
        raise StartupError(
            f"only {allowed} files may be open at once (ulimit -n), and the server needs at least "
            f"{LEAST_FILES}, and one more for each further connection: run `ulimit -n 1024` first, or raise "
            "the limit of the service (LimitNOFILE=1024) or of the container (--ulimit nofile=1024)"
        )


def check_keys(settings: Settings, storage: Storage) -> None:
    """Raises WrongSettingsError where everybody on a network could do everything; StorageError."""
    if settings.insecure or is_loopback(settings.host):
        return
    try:
        keys = storage.registry.keys.all()
    except RegistryError as error:
        raise StorageError(f"{error} (--registry, --data-dir)") from error
    if not keys:
        raise WrongSettingsError(
            f"--host {settings.host} lets others reach this server, and there is no API key yet: make one "
            "with `onebase keys create --scope admin`, with the same --data-dir and --registry, or pass "
            "--insecure to let everybody do everything"
        )


def _stop_with_stdin() -> None:
    """Stop as by SIGTERM once standard input ends: its other end was closed, or its process died."""
    with contextlib.suppress(OSError):
        while os.read(0, 1 << 16):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


def resolve(base: str, display: LoadingDisplay) -> ResolvedBase:
    """Return the base's local folder, downloaded if need be. Raises StartupError."""
    from onebase_engine.base.default_base import BaseError, BaseSpecError, resolve_base

    try:
        return resolve_base(base, display.update)
    except BaseSpecError as error:
        raise WrongSettingsError(str(error)) from error
    except BaseError as error:
        raise StartupError(str(error)) from error
    except Exception as error:
        raise StartupError(f"the base {base!r} cannot be used: {error}") from error


@dataclass(frozen=True)
class _Server:
    """One server, with all that was settled before the event loop began."""

    settings: Settings
    base: ResolvedBase
    storage: Storage
    given: list[tuple[str, Path]]
    commands: Commands

    async def serve(self, listener: socket.socket, console: Console, display: LoadingDisplay) -> None:
        settings = self.settings
        services = self._services(display)
        supervisor = services.supervisor

        def ready() -> None:
            display.close()
            unserved = services.tokenizer.unserved
            if settings.log_format == "json":
                _log.info("OneBase %s is ready at %s", onebase_server.__version__, url_of(listener))
                for part, reason in unserved.items():
                    _log.warning("%s: %s", part, reason)
            if supervisor.base is not None:
                print_summary(
                    console,
                    settings,
                    supervisor.base,
                    services.catalog,
                    url_of(listener),
                    keys=services.keys.has_keys,
                    unserved=unserved,
                )

        try:
            await services.catalog.refresh()
            await services.keys.refresh()
        except (RegistryError, UnavailableError) as error:
            raise StartupError(f"{error} (--registry)") from error
        try:
            services.request_log.start()
        except OSError as error:
            raise StartupError(f"the log of requests cannot be written: {error} (--data-dir)") from error
        training = services.training
        await training.scheduler.claim()
        upkeep = [
            asyncio.create_task(keep_running(name, work))
            for name, work in (
                ("following the registry", partial(services.catalog.watch, settings.sync_seconds)),
                ("sweeping the store", partial(self.storage.keep_tidy, services.adapters.disk)),
                ("writing usage", services.usage.keep_writing),
                ("following rollouts", services.rollouts.keep),
                ("reading the load", services.load.keep_reading),
                ("watching the machine", services.load.keep_watching_machine),
                ("renewing the lease", partial(training.peers.keep, training.scheduler)),
                ("sharing quotas", services.sharing.keep),
                ("tidying live training", partial(services.live_training.keep_tidy, services.samples)),
                ("forgetting samples", services.samples.keep_tidy),
            )
        ]
        async with (
            contextlib.AsyncExitStack() as shutdown
        ):  # the last step first, and each whatever others raise
            shutdown.callback(self.storage.registry.close)
            shutdown.callback(services.body_readers.close)
            shutdown.push_async_callback(asyncio.to_thread, services.tracing.close)
            shutdown.push_async_callback(asyncio.to_thread, services.request_log.close)
            shutdown.push_async_callback(services.training.peers.leave)
            shutdown.push_async_callback(services.usage.close)
            shutdown.push_async_callback(services.rollouts.close)
            for task in upkeep:
                shutdown.callback(task.cancel)
            await run_server(services, create_app(services), listener, ready)

    def _services(self, display: LoadingDisplay) -> Services:
        try:
            return assemble(
                self.settings,
                self.base,
                self.storage,
                self.given,
                self.commands,
                display.loading,
                Tracing(self.settings.otlp_endpoint),
            )
        except (PolicyError, TracingError) as error:
            raise WrongSettingsError(str(error)) from error
        except (DataDirError, StorageError) as error:
            raise StartupError(str(error)) from error
        except TokenizerError as error:
            raise WrongSettingsError(
                f"the base in {self.base.folder} has no usable tokenizer: {error}"
            ) from error
        except OSError as error:
            raise StartupError(f"the server cannot be set up: {error}") from error
        except Exception as error:
            _log.exception("the server cannot be set up")
            raise StartupError(f"the server cannot be set up: {type(error).__name__}: {error}") from error
