"""The engine dies, stalls or refuses: the api stays up, says so, and brings it back.

A scripted engine stands in where the real one cannot be made to fail at a given moment; crash and
stall of the real engine are in test_real_engine_faults.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from onebase_edge.listener import QuietServer
from onebase_edge.settings import Settings
from onebase_server.http.server import run_server

from .scripted_engine import POISON
from .support import HERE, PATIENCE, Server, Starter, alive, free_port, make_folder, pace
from .training_support import until

LONG = {"prompt": "word", "max_tokens": 90_000, "stream": True}


def stream_until_end(server: Server, body: dict[str, Any]) -> list[str]:
    """The data of every event until the stream ends."""
    with server.client() as http, http.stream("POST", "/generate", json=body) as answer:
        return [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]


def test_running_requests_end_with_an_error_when_the_engine_dies_and_new_ones_are_served(
    serve_scripted: Starter,
) -> None:
    with serve_scripted("words") as server, server.client() as http:
        first_pid = server.engine_pid()
        events: list[str] = []
        reader = threading.Thread(target=lambda: events.extend(stream_until_end(server, LONG)))
        reader.start()
        server.wait_for(lambda: http.get("/status").json()["requests"] == 1)

        os.kill(first_pid, signal.SIGKILL)
        reader.join(PATIENCE)

        assert json.loads(events[-2])["error"]["code"] == "engine_restarted"
        assert events[-1] == "[DONE]"
        server.wait_ready()
        assert server.engine_pid() != first_pid
        answer = http.post("/generate", json={"prompt": "word", "max_tokens": 2}).json()
        assert answer["choices"][0]["text"] == "wordword"
        assert http.get("/status").json()["engine"]["restarts"] == 1


def test_a_request_that_kills_two_engines_gets_422_from_then_on(serve_scripted: Starter) -> None:
    with serve_scripted("poison") as server, server.client() as http:
        body = {"prompt": "word", "max_tokens": POISON}
        first = http.post("/generate", json=body)
        server.wait_ready()
        second = http.post("/generate", json=body)
        server.wait_ready()
        refused = http.post("/generate", json=body)

        assert first.status_code == 503
        assert first.json()["error"]["code"] == "engine_restarted"
        assert second.status_code == 422
        assert refused.status_code == 422
        assert refused.json()["error"]["code"] == "crashes_engine"
        assert "retry-after" not in refused.headers
        assert http.post("/generate", json={"prompt": "word", "max_tokens": 2}).status_code == 200
        assert http.get("/status").json()["engine"]["restarts"] == 2


def test_while_the_engine_restarts_requests_get_503_with_retry_after(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with (
        pace(tmp_path, 1) as (environment, allow),  # only the first engine gets ready by itself
        serve_scripted("gated-words", environment=environment) as server,
        server.client() as http,
    ):
        whole: dict[str, httpx2.Response] = {}
        body = {**LONG, "stream": False}
        waiting = threading.Thread(
            target=lambda: whole.update(answer=server.client().post("/generate", json=body))
        )
        waiting.start()
        server.wait_for(lambda: http.get("/status").json()["requests"] == 1)

        os.kill(server.engine_pid(), signal.SIGKILL)
        waiting.join(PATIENCE)
        refused = http.post("/generate", json={"prompt": "word"})

        for answer in (whole["answer"], refused):
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
        assert whole["answer"].json()["error"]["code"] == "engine_restarted"
        assert refused.json()["error"]["code"] == "engine_restarting"
        allow(1)
        server.wait_ready()


def test_an_engine_that_makes_no_progress_turns_health_bad_and_is_replaced(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with (
        pace(tmp_path, 1) as (environment, allow),
        serve_scripted("gated-deaf", "--stall-timeout", "0.5", environment=environment) as server,
        server.client() as http,
    ):
        first_pid = server.engine_pid()
        assert http.get("/health").status_code == 200

        answer = http.post("/generate", json={"prompt": "word"})
        unhealthy = http.get("/health")

        assert answer.status_code == 503
        assert unhealthy.status_code == 503
        assert unhealthy.json()["engine"] == "stalled"
        allow(1)
        server.wait_for(lambda: server.status_of("/health") == 200)
        server.wait_ready()
        assert server.engine_pid() != first_pid


def test_a_pause_that_a_frozen_engine_does_not_take_hides_no_stall_and_leaves_no_pause(
    serve_scripted: Starter,
) -> None:
    with serve_scripted("words", "--stall-timeout", "2") as server, server.client() as http:
        pid = server.engine_pid()
        with ThreadPoolExecutor() as threads:
            request = threads.submit(http.post, "/generate", json={"prompt": "word", "max_tokens": 400})
            server.wait_for(lambda: http.get("/status").json()["requests"] == 1)
            os.kill(pid, signal.SIGSTOP)
            assert http.post("/pause", params={"mode": "keep"}).status_code == 503
            assert request.result(PATIENCE).json()["error"]["code"] == "engine_restarted"
        server.wait_ready()
        assert server.engine_pid() != pid
        assert http.get("/is_paused").json() == {"is_paused": False}


def test_an_engine_whose_rows_all_wait_for_grammars_is_no_stall(serve_scripted: Starter) -> None:
    with serve_scripted("awaits", "--stall-timeout", "2") as server, server.client() as http:
        pid = server.engine_pid()

        answer = http.post("/generate", json={"prompt": "word", "timeout_s": 4.0})

        assert answer.json()["choices"][0]["finish_reason"] == "cancelled", answer.text
        assert server.status_of("/health") == 200
        assert server.engine_pid() == pid


def test_a_tenant_whose_new_grammars_take_too_long_is_told_when_to_come_back(serve_scripted: Starter) -> None:
    with serve_scripted("limited") as server, server.client() as http:
        answer = http.post("/generate", json={"prompt": "word", "guided_regex": "a+"})

        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (429, "rate_limit_exceeded")
        assert answer.headers["retry-after"] == "7"
        assert "guided_regex: new grammars took 20 s" in error["message"]
        assert error["quota"] == "grammar_seconds"


def test_an_idle_engine_is_no_stall(serve_scripted: Starter) -> None:
    with serve_scripted("deaf", "--stall-timeout", "0.2") as server:
        pid = server.engine_pid()
        time.sleep(1.0)

        assert server.status_of("/health") == 200
        assert server.engine_pid() == pid


def test_a_base_that_the_engine_refuses_ends_the_server_with_the_engines_words(
    serve_scripted: Starter,
) -> None:
    with serve_scripted("fatal", ready=False) as server:
        assert server.exit_status() == 1
        assert "this base is a sonnet" in server.log
        assert "Traceback" not in server.log


def test_an_engine_that_dies_while_starting_ends_the_server(serve_scripted: Starter) -> None:
    with serve_scripted("die-early", ready=False) as server:
        assert server.exit_status() == 1
        assert "exit status 7" in server.log


def test_an_engine_that_keeps_dying_ends_the_server_after_a_bounded_number_of_tries(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with (
        pace(tmp_path) as (environment, allow),
        serve_scripted("die-ready", environment=environment) as server,
    ):
        allow(6)
        assert server.exit_status() == 1
        assert "giving up" in server.log
        assert server.log.count("starting a new one") == 5


def test_adapters_come_back_with_the_new_engine(serve_scripted: Starter, tmp_path: Path) -> None:
    make_folder(tmp_path, "acme")
    with serve_scripted("words", "--adapters-dir", str(tmp_path)) as server, server.client() as http:
        before = http.get("/v1/adapters/acme").json()

        os.kill(server.engine_pid(), signal.SIGKILL)
        server.wait_for(lambda: http.get("/status").json()["engine"]["restarts"] == 1)
        server.wait_ready()

        assert before["active"] is True
        assert before["tier"] == "host"
        assert http.get("/v1/adapters/acme").json() == before | {"tier": "disk"}
        assert http.post("/generate", json={"prompt": "word", "adapter": "acme"}).status_code == 200
        assert http.get("/v1/adapters/acme").json()["tier"] == "slot"


def test_an_adapter_without_weights_ends_the_start_by_its_name(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    make_folder(tmp_path, "acme").joinpath("adapter_model.safetensors").unlink()
    with serve_scripted("words", "--adapters-dir", str(tmp_path), ready=False) as server:
        assert server.exit_status() == 2
        assert "acme has no adapter_model.safetensors" in server.log


def test_requests_beyond_the_queue_get_429_with_retry_after(serve_scripted: Starter) -> None:
    with (
        serve_scripted("words", "--max-sequences", "1", "--queue-limit", "1") as server,
        server.client() as http,
    ):
        streams = [http.stream("POST", "/generate", json=LONG) for _ in range(2)]
        for stream in streams:
            stream.__enter__()

        refused = http.post("/generate", json={"prompt": "word"})
        impossible = http.post("/generate", json={"prompt": "word", "n": 3})

        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1
        assert impossible.status_code == 400
        assert "--queue-limit" in impossible.json()["error"]["message"]
        for stream in streams:
            stream.__exit__(None, None, None)
        server.wait_for(lambda: http.get("/status").json()["requests"] == 0)
        assert http.post("/generate", json={"prompt": "word", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_new_requests_and_lets_running_ones_end(
    serve_scripted: Starter, tmp_path: Path, stop: signal.Signals
) -> None:
    with (
        pace(tmp_path, 2) as (environment, allow),
        serve_scripted("paced", environment=environment) as server,
        server.client() as http,
    ):
        events: list[str] = []
        body = {"prompt": "word", "max_tokens": 60, "stream": True}
        reader = threading.Thread(target=lambda: events.extend(stream_until_end(server, body)))
        reader.start()
        server.wait_for(lambda: http.get("/status").json()["requests"] == 1)

        server.signal(stop)
        server.wait_for(lambda: http.get("/ready").status_code == 503)
        refused = http.post("/generate", json={"prompt": "word"})
        allow(60)
        reader.join(PATIENCE)

        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "server_stopping"
        assert "retry-after" in refused.headers
        assert sum('"text":"word"' in event for event in events) == 60
        assert events[-1] == "[DONE]"
        assert server.exit_status() == 0


class Terminal:
    """A server that was started at a terminal; `close` is what closing the window does."""

    def __init__(self, data_dir: Path) -> None:
        self.port = free_port()
        self._master, terminal = os.openpty()
        command = [sys.executable, str(HERE / "serve_scripted.py"), "words"]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port), "--data-dir", str(data_dir)],
            stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(terminal)

    def wait_ready(self) -> None:
        """Reads what is printed meanwhile, so that the server never waits for the terminal."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if select.select([self._master], [], [], 0.05)[0]:
                os.read(self._master, 1 << 16)
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"http://127.0.0.1:{self.port}/ready", timeout=10).status_code == 200:
                    return
        raise TimeoutError

    def close(self) -> None:
        os.close(self._master)


def test_a_server_whose_terminal_is_closed_lets_running_requests_end(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    body = {"prompt": "word", "max_tokens": 60, "stream": True}
    try:
        terminal.wait_ready()
        url = f"http://127.0.0.1:{terminal.port}/generate"
        with httpx2.stream("POST", url, json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            terminal.close()
            events = [first, *(line for line in lines if line)]
        assert sum('"text":"word"' in event for event in events) == 60
        assert terminal.process.wait(PATIENCE) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()


def test_a_hang_up_that_comes_twice_ends_no_request(serve_scripted: Starter, tmp_path: Path) -> None:
    with (
        pace(tmp_path, 2) as (environment, allow),
        serve_scripted("paced", environment=environment) as server,
        server.client() as http,
    ):
        events: list[str] = []
        body = {"prompt": "word", "max_tokens": 9, "stream": True}
        reader = threading.Thread(target=lambda: events.extend(stream_until_end(server, body)))
        reader.start()
        server.wait_for(lambda: http.get("/status").json()["requests"] == 1)
        server.signal(signal.SIGHUP)
        server.wait_for(lambda: server.status_of("/ready") == 503)
        server.signal(signal.SIGHUP)
        allow(9)
        reader.join(PATIENCE)
        assert events[-1] == "[DONE]"
        assert server.exit_status() == 0


def test_a_second_signal_ends_the_server_and_its_engine_at_once(serve_scripted: Starter) -> None:
    with serve_scripted("words") as server, server.client() as http:
        engine = server.engine_pid()
        with http.stream("POST", "/generate", json=LONG):
            server.signal(signal.SIGTERM)
            server.wait_for(lambda: server.status_of("/ready") == 503)

            server.signal(signal.SIGTERM)

            assert server.exit_status() == 128 + signal.SIGTERM
        assert not alive(engine)


def test_requests_that_outlast_the_drain_are_cut_off_and_the_server_still_exits_0(
    serve_scripted: Starter,
) -> None:
    with serve_scripted("words", "--drain-timeout", "0.3") as server, server.client() as http:
        engine = server.engine_pid()
        with http.stream("POST", "/generate", json=LONG) as answer:
            server.signal(signal.SIGTERM)
            *_, error, done = [line for line in answer.iter_lines() if line]
        assert "server_stopping" in error
        assert done == "data: [DONE]"
        assert server.exit_status() == 0
        assert not alive(engine)


def test_a_signal_while_loading_ends_the_server_with_status_0(serve_scripted: Starter) -> None:
    with serve_scripted("sleep-early", ready=False) as server:
        server.wait_for(lambda: server.status_of("/ready") == 503)

        server.signal(signal.SIGTERM)

        assert server.exit_status() == 0


def test_the_engine_ends_when_the_api_is_killed(serve_scripted: Starter) -> None:
    with serve_scripted("words") as server:
        engine = server.engine_pid()

        server.signal(signal.SIGKILL)
        server.exit_status()

        until(lambda: not alive(engine))


async def run_parts(
    follow: Callable[..., Awaitable[None]],
    stop: Callable[[str], Callable[[], Awaitable[None]]],
    ready: asyncio.Event,
    on_ready: Callable[[], None],
    resume: Callable[[], Awaitable[None]],
) -> None:
    """Run a server whose parts do nothing but `follow` until they are stopped."""
    services: Any = SimpleNamespace(
        settings=Settings(),
        answers=Counter(),
        route_secret="",
        pacer=None,
        draining=False,
        supervisor=SimpleNamespace(run_engine=follow, stop=stop("engine"), ready=ready),
        training=SimpleNamespace(scheduler=SimpleNamespace(follow=follow, stop=stop("jobs"))),
        batches=SimpleNamespace(runner=SimpleNamespace(follow=follow, stop=stop("batches"))),
        live=SimpleNamespace(stop=stop("trainer")),
        samples=SimpleNamespace(stop=stop("samples"), resume=resume),
        live_training=SimpleNamespace(stop=stop("live training")),
        grading=SimpleNamespace(post=None),
    )
    app: Any = SimpleNamespace(state=SimpleNamespace(authenticator=None))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await run_server(services, app, listener, on_ready)


async def idle(*_: Any) -> None:
    await asyncio.Event().wait()


async def stopping() -> None:
    pass


STEPS = ["live training", "samples", "batches", "trainer", "jobs", "engine"]


@pytest.mark.parametrize("broken", ["http", *STEPS])
def test_each_step_of_the_end_is_taken_whatever_another_raises(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    taken: list[str] = []

    def stop(name: str) -> Callable[[], Awaitable[None]]:
        async def stopping() -> None:
            taken.append(name)
            if name == broken:
                raise RuntimeError(f"{name} does not stop")

        return stopping

    async def forever(*_: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            taken.append("a task")

    async def ends(*_: Any, **__: Any) -> None:
        if broken == "http":
            raise RuntimeError("http does not stop")

    async def serve() -> None:
        await run_parts(forever, stop, asyncio.Event(), lambda: None, idle)

    monkeypatch.setattr(QuietServer, "serve", ends)
    with pytest.raises(RuntimeError, match=f"{broken} does not stop"):
        asyncio.run(serve())
    assert taken == [*STEPS, "a task", "a task", "a task"]


def test_garbage_collections_of_a_server_that_is_ready_leave_out_what_was_loaded_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def serve() -> float:
        ready, frozen = asyncio.Event(), asyncio.get_running_loop().create_future()
        ready.set()

        async def until_ready(*_: Any, **__: Any) -> None:
            await frozen

        monkeypatch.setattr(QuietServer, "serve", until_ready)
        loaded = len(gc.get_objects())
        await run_parts(
            idle,
            lambda name: stopping,
            ready,
            lambda: frozen.set_result(gc.get_freeze_count() / loaded),
            idle,
        )
        return await frozen

    gc.unfreeze()
    gc.collect()  # what is garbage already is not kept
    assert asyncio.run(serve()) > 0.9


def test_promised_samples_are_drawn_also_if_the_server_cannot_say_that_it_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def serve() -> None:
        ready, resumed = asyncio.Event(), asyncio.Event()
        ready.set()

        async def until_resumed(*_: Any, **__: Any) -> None:
            await resumed.wait()

        async def resume() -> None:
            resumed.set()

        def on_ready() -> None:
            raise BrokenPipeError("nobody reads standard output")

        monkeypatch.setattr(QuietServer, "serve", until_resumed)
        async with asyncio.timeout(60):
            await run_parts(idle, lambda name: stopping, ready, on_ready, resume)

    asyncio.run(serve())
