"""The real engine process, killed and frozen under running requests."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from typing import Any

import httpx2
import pytest

from onebase_server.processes.verifier_protocol import scratch_folder

from .support import Server, Starter, alive, children, command_of, make_folder
from .training_support import make_job, openai_client

ENDLESS = {"prompt": "word", "max_tokens": 4000, "ignore_eos": True}
PROBE = {"prompt": "The capital of France is", "max_tokens": 3, "temperature": 0, "adapter": "red"}


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_frozen_engine_is_replaced_and_answers_as_before(
    serve_real: Starter, api: Any, tmp_path: Path, fault: signal.Signals
) -> None:
    adapters = str(api.adapters["red"].parent)
    options = ["--adapters-dir", adapters, "--kv-memory", "100MB", "--threads", "1", "--stall-timeout", "8"]
    data_dir = api.copy_of_data(tmp_path / "data")
    with serve_real(*options, data_dir=data_dir) as server, server.client() as http:
        before = http.post("/generate", json=PROBE).json()["choices"]
        answers: list[Any] = []
        request = threading.Thread(
            target=lambda: answers.append(server.client().post("/generate", json=ENDLESS))
        )
        request.start()
        server.wait_for(lambda: http.get("/status").json()["requests"] == 1)
        first = server.engine_pid()

        os.kill(first, fault)
        request.join(120)

        assert answers[0].status_code == 503
        assert answers[0].json()["error"]["code"] == "engine_restarted"
        if fault == signal.SIGSTOP:
            assert http.get("/health").status_code == 503
        server.wait_ready()
        assert server.engine_pid() != first
        assert http.get("/health").status_code == 200
        assert http.post("/generate", json=PROBE).json()["choices"] == before


def test_an_adapter_that_the_engine_refuses_ends_the_start_with_its_name_and_the_reason(
    serve_real: Starter, small_base: Path, tmp_path: Path
) -> None:
    make_folder(tmp_path, "broken")
    options = ("--base", str(small_base), "--kv-memory", "50MB", "--threads", "1")
    with serve_real(*options, "--adapters-dir", str(tmp_path), ready=False) as server:
        assert server.exit_status(180) == 1
        assert "adapter broken cannot be served" in server.log
        assert "Traceback" not in server.log


def test_a_drain_lets_real_text_end_and_the_engine_exit(serve_real: Starter, small_base: Path) -> None:
    options = ("--base", str(small_base), "--kv-memory", "50MB", "--threads", "1")
    with serve_real(*options) as server, server.client() as http:
        engine = server.engine_pid()
        body = PROBE | {"adapter": None, "max_tokens": 8, "ignore_eos": True, "stream": True}
        with http.stream("POST", "/generate", json=body) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            server.signal(signal.SIGTERM)
            rest = [line for line in lines if line]

        assert '"text"' in first
        assert '"completion_tokens":8' in rest[-2]
        assert rest[-1] == "data: [DONE]"
        assert server.exit_status() == 0
        assert not Path(f"/proc/{engine}").exists()


def test_a_second_signal_ends_every_process_with_the_server_whatever_it_does(serve_real: Starter) -> None:
    """Frozen, they do not notice the end of the server by themselves."""
    with serve_real("--kv-memory", "100MB", "--threads", "1") as server, server.client() as http:
        request = threading.Thread(target=lambda: quietly_post(server))
        request.start()
        server.wait_for(lambda: http.get("/status").json()["requests"] == 1)
        make_job(openai_client(server), '{"text": "some words"}\n' * 50)
        server.wait_for(lambda: bool(server.trainer_pids()))
        for pid in (server.verifier_pid(), *server.trainer_pids()):
            os.kill(pid, signal.SIGSTOP)
        started = children(server.process.pid)
        assert {command_of(pid).split(".")[-1] for pid in started} == {"engine", "verifier", "trainer"}
        try:
            server.signal(signal.SIGTERM)
            server.wait_for(lambda: server.status_of("/ready") == 503)
            server.signal(signal.SIGTERM)

            assert server.exit_status() == 128 + signal.SIGTERM
            request.join(30)
            assert [pid for pid in started if alive(pid)] == []
            assert not any(scratch_folder(pid).exists() for pid in started)
        finally:
            for pid in started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def quietly_post(server: Server) -> None:
    """A request that is running until the server ends."""
    with contextlib.suppress(httpx2.TransportError), server.client() as http:
        http.post("/generate", json=ENDLESS)
