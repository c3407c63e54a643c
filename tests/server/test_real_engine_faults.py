"""The real engine process, killed and frozen under running requests."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest

from .support import Starter

ENDLESS = {"prompt": "word", "max_tokens": 4000, "ignore_eos": True}
PROBE = {"prompt": "The capital of France is", "max_tokens": 3, "temperature": 0, "adapter": "red"}


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_frozen_engine_is_replaced_and_answers_as_before(
    serve_real: Starter, api: Any, fault: signal.Signals
) -> None:
    adapters = str(api.adapters["red"].parent)
    options = ["--adapters-dir", adapters, "--kv-memory", "100MB", "--threads", "1", "--stall-timeout", "8"]
    with serve_real(*options) as server, server.client() as http:
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
