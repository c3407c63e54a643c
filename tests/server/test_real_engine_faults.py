"""The real engine process, killed and frozen under running requests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from onebase_engine.engine.kv_cache import RESERVED_BLOCKS
from onebase_server.processes.verifier_protocol import scratch_folder

from .conftest import make_adapter
from .support import PATIENCE, Server, Starter, alive, children, command_of, launch, make_folder
from .training_support import make_job, openai_client

ENDLESS = {"prompt": "word", "max_tokens": 30_000, "n": 4, "ignore_eos": True}
PROBE = {"prompt": "The capital of France is", "max_tokens": 3, "temperature": 0, "adapter": "red"}
OPTIONS = ("--kv-memory", "50MB", "--threads", "1")
LONG = ("--max-length", "32768")


@pytest.fixture(scope="module")
def base(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With room for texts that do not end while a test looks away."""
    folder = tmp_path_factory.mktemp("long") / small_base.name
    shutil.copytree(small_base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32_768}))
    return folder


def test_a_killed_and_a_frozen_engine_are_replaced_and_answer_as_before(
    serve_real: Starter, base: Path, tmp_path: Path
) -> None:
    make_adapter(base, tmp_path / "red", seed=1, rank=4)
    options = ("--base", str(base), "--adapters-dir", str(tmp_path), *OPTIONS, *LONG)
    with serve_real(*options, "--stall-timeout", "8") as server, server.client() as http:
        before = http.post("/generate", json=PROBE).json()["choices"]
        for fault in (signal.SIGKILL, signal.SIGSTOP):
            with ThreadPoolExecutor() as threads:
                request = threads.submit(http.post, "/generate", json=ENDLESS | {"prompt": fault.name})
                server.wait_for(lambda: http.get("/status").json()["requests"] == 1)
                first = server.engine_pid()
                os.kill(first, fault)
                answer = request.result(PATIENCE)

            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "engine_restarted"
            if fault == signal.SIGSTOP:
                assert http.get("/health").status_code == 503
            server.wait_ready()
            assert server.engine_pid() != first
            assert http.get("/health").status_code == 200
            assert http.post("/generate", json=PROBE).json()["choices"] == before


@pytest.mark.full
def test_an_engine_whose_sequences_wait_longer_for_a_mask_than_a_stall_takes_is_not_replaced(
    serve_real: Starter, base: Path
) -> None:
    with serve_real("--base", str(base), *OPTIONS, "--stall-timeout", "8") as server, server.client() as http:
        body = {"prompt": "word", "max_tokens": 60, "guided_regex": "[a-z ]{80}"}
        before = http.post("/generate", json=body | {"temperature": 0}).json()["choices"]
        engine = server.engine_pid()
        (template,) = [pid for pid in children(engine) if "grammar_process" in command_of(pid)]
        server.wait_for(lambda: len(children(template)) == 1)  # the trial's process ends after its answer
        (follower,) = children(template)
        os.kill(follower, signal.SIGSTOP)
        with ThreadPoolExecutor() as threads:
            request = threads.submit(http.post, "/generate", json=body | {"temperature": 0}, timeout=PATIENCE)
            time.sleep(12)
            assert not request.done()
            os.kill(follower, signal.SIGCONT)
            assert request.result(PATIENCE).json()["choices"] == before
        assert server.engine_pid() == engine


def test_a_server_keeps_keys_and_values_in_int8_if_asked_says_so_and_proves_adapters(
    serve_real: Starter, small_base: Path, tmp_path: Path
) -> None:
    make_adapter(small_base, tmp_path / "red", seed=1, rank=4)
    options = ("--base", str(small_base), "--adapters-dir", str(tmp_path), *OPTIONS, "--kv-dtype", "int8")
    with serve_real(*options) as server, server.client() as http:
        info = http.get("/status").json()["info"]
        assert info["kv_dtype"] == "int8"
        config = json.loads((small_base / "config.json").read_text())
        heads = config["num_hidden_layers"] * config["num_key_value_heads"]
        token = heads * 2 * (config["head_dim"] + 2)
        assert info["kv_bytes"] == (info["kv_blocks"] + RESERVED_BLOCKS) * info["block_size"] * token
        assert "rounded to 8 bits" in info["promise"]
        server.wait_for(lambda: " tokens in int8" in server.log)
        answers = [http.post("/generate", json=PROBE).json()["choices"][0]["text"] for _ in range(2)]
        assert answers[0] == answers[1]


def test_an_adapter_that_the_engine_refuses_ends_the_start_with_its_name_and_the_reason(
    serve_real: Starter, small_base: Path, tmp_path: Path
) -> None:
    make_folder(tmp_path, "broken")
    options = ("--base", str(small_base), *OPTIONS, "--adapters-dir", str(tmp_path))
    with serve_real(*options, ready=False) as server:
        assert server.exit_status() == 1
        assert "adapter broken cannot be served" in server.log
        assert "Traceback" not in server.log


@pytest.mark.full
def test_a_drain_lets_real_text_end_paused_or_not_and_the_engine_exit(
    serve_real: Starter, base: Path
) -> None:
    with serve_real("--base", str(base), *OPTIONS, *LONG) as server, server.client() as http:
        engine = server.engine_pid()
        body = PROBE | {
            "adapter": None,
            "max_tokens": 3000,
            "ignore_eos": True,
            "stream": True,
            "temperature": 1,
        }
        with http.stream("POST", "/generate", json=body) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            http.post("/pause", params={"mode": "keep"}).raise_for_status()
            assert http.get("/status").json()["stats"]["sequences_running"] == 1
            assert http.get("/ready").json() == {"status": "paused", "engine": "ready"}
            assert server.status_of("/health") == 200
            server.signal(signal.SIGTERM)
            rest = [line for line in lines if line]

        assert '"text"' in first
        assert '"completion_tokens":3000' in rest[-2]
        assert rest[-1] == "data: [DONE]"
        assert server.exit_status() == 0
        assert not Path(f"/proc/{engine}").exists()


@pytest.mark.full
def test_a_second_signal_ends_every_process_with_the_server_whatever_it_does(
    serve_real: Starter, base: Path
) -> None:
    """Frozen, they do not notice the end of the server by themselves."""
    options = ("--base", str(base), *OPTIONS, *LONG)
    with serve_real(*options, start=launch) as server, server.client() as http:
        make_job(openai_client(server), '{"text": "some words"}\n' * 50)
        server.wait_for(lambda: bool(server.trainer_pids()))
        for pid in (server.verifier_pid(), *server.trainer_pids()):
            os.kill(pid, signal.SIGSTOP)
        started = children(server.process.pid)
        assert {command_of(pid).split(".")[-1] for pid in started} == {"engine", "verifier", "trainer"}
        try:
            request = threading.Thread(target=lambda: quietly_post(server))
            request.start()
            server.wait_for(lambda: http.get("/status").json()["requests"] == 1)
            server.signal(signal.SIGTERM)
            server.wait_for(lambda: server.status_of("/ready") == 503)
            server.signal(signal.SIGTERM)

            assert server.exit_status() == 128 + signal.SIGTERM
            request.join(PATIENCE)
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
