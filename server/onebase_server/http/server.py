"""Serving with our signals: the first one drains and ends with status 0, a second one ends at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
from collections.abc import Callable

from fastapi import FastAPI

from onebase_edge.cross_site import CrossSiteMiddleware
from onebase_edge.listener import QuietServer, uvicorn_config
from onebase_engine.machine import freeze_loaded
from onebase_server.http.app import InnerRequests
from onebase_server.http.deps import Services, server_stopping
from onebase_server.processes.link import kill_children
from onebase_server.processes.verifier_protocol import scratch_folder

_LEAVE_SECONDS = 2.0
"""Time, in seconds after a signal, for which a server behind `onebase route` answers as before. By then the
route has seen that `/ready` answers 503, and sends nothing more: no request meets a server that refuses it,
nor a connection that closes."""

_log = logging.getLogger(__name__)


async def run_server(
    services: Services, app: FastAPI, listener: socket.socket, on_ready: Callable[[], None]
) -> None:
    """Serve until a signal, or until the engine or the following of jobs cannot be kept running.

    `on_ready` is called once, when the engine is ready for the first time. Raises EngineFailedError,
    ServerIdInUseError.
    """
    settings = services.settings
    middleware = CrossSiteMiddleware(
        app, settings, app.state.authenticator, services.answers, services.route_secret, services.pacer
    )
    server = QuietServer(uvicorn_config(middleware, settings))
    stop = asyncio.Event()
    _install_signals(services, middleware, stop)
    loop = asyncio.get_running_loop()
    engine = loop.create_task(services.supervisor.run_engine())
    jobs = loop.create_task(services.training.scheduler.follow())
    services.grading.post = InnerRequests(app).post
    batches = loop.create_task(services.batches.runner.follow(InnerRequests(app).post))
    http = loop.create_task(server.serve(sockets=[listener]))
    first_ready = loop.create_task(_when_ready(services, on_ready))
    stopped = loop.create_task(stop.wait())
    async with contextlib.AsyncExitStack() as shutdown:  # the last step first, and each whatever others raise
        for task in (engine, batches, jobs):  # what the engine raises says why the server ends
            shutdown.push_async_callback(_cancel, task)
        shutdown.push_async_callback(services.supervisor.stop)
        shutdown.push_async_callback(services.training.scheduler.stop)
        shutdown.push_async_callback(services.live.stop)
        shutdown.push_async_callback(services.batches.runner.stop)
        shutdown.push_async_callback(services.samples.stop)
        shutdown.push_async_callback(services.live_training.stop)
        shutdown.push_async_callback(_end_http, services, server, http)
        shutdown.callback(first_ready.cancel)
        shutdown.callback(stopped.cancel)
        await asyncio.wait({engine, jobs, batches, http, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if stopped.done():
            services.supervisor.go_on()
            if not services.draining:
                await asyncio.wait(
                    {engine, http}, timeout=_LEAVE_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                services.draining = True
            await asyncio.gather(_drain(services, server, engine), services.batches.runner.stop())


async def _end_http(services: Services, server: QuietServer, http: asyncio.Task[None]) -> None:
    services.draining = True
    server.should_exit = True
    await http


async def _cancel(task: asyncio.Task[None]) -> None:
    """End a task. Raise what it has raised itself."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()


async def _when_ready(services: Services, on_ready: Callable[[], None]) -> None:
    await services.supervisor.ready.wait()
    freeze_loaded()
    try:
        on_ready()
    except Exception:
        _log.exception("the server is ready, and cannot say so")
    await services.samples.resume()


async def _drain(services: Services, server: QuietServer, engine: asyncio.Task[None]) -> None:
    """Wait until running requests have ended, for at most the drain timeout.

    Uploads and those that wait for a proof, a pull or a load are running too: not only what the engine has.
    """
    router = services.supervisor.client
    requests = server.server_state.tasks
    if requests:
        _log.warning(
            "stopping: %d running requests may end; press Ctrl-C again to end at once", len(requests)
        )
    try:
        async with asyncio.timeout(services.settings.drain_timeout):
            while (requests or router.open_requests) and not engine.done():
                await asyncio.sleep(0.05)
    except TimeoutError:
        _log.warning("stopping: %d requests did not end in time", len(requests))
        for generation in list(services.running.values()):
            generation.hand_over()
        router.fail_all(server_stopping())


def _install_signals(services: Services, middleware: CrossSiteMiddleware, stop: asyncio.Event) -> None:
    def handle(number: signal.Signals) -> None:
        if services.leaving and number != signal.SIGHUP:  # of a terminal it may come twice, and by itself
            _end_at_once(128 + number)
        services.leaving = middleware.closing = True
        if not services.is_routed:
            services.draining = True
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
            continue  # started by nohup
        loop.add_signal_handler(number, handle, number)


def _end_at_once(status: int) -> None:
    """Exit, and leave no process and none of their temporary files behind."""
    for pid in kill_children():
        shutil.rmtree(scratch_folder(pid), ignore_errors=True)
    os._exit(status)
