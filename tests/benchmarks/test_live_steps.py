"""The benchmark of live training: what it prints is what the server did."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import psutil
import pytest
from tests.forks import Nursery
from tests.training.runs import talking_base

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _forks(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement, its server, and the server's own processes begin as forks."""
    monkeypatch.setattr(subprocess, "Popen", nursery.popen("forks of forks"))


@pytest.mark.full
def test_two_tenants_train_and_stream_alone_and_together(tmp_path: Path) -> None:
    base = talking_base(tmp_path / "base")
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(
        tenants_command(base, 3), env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = dict(re.findall(r"^ *(.*?)((?: +[\d.]+%?| +-){5}) *$", done.stdout, re.MULTILINE))
    assert [name.split(":")[0] for name in found] == [
        "16 streams, 8 of each tenant", "acme", "acme", "globex", "all three",
    ]  # fmt: skip
    for name, told in found.items():
        alone, together, left, *passes = told.split()
        if name == "16 streams, 8 of each tenant":
            assert float(alone) > 0
            assert float(together) > 0
            assert left.endswith("%")
            assert passes == ["-", "-"]
        elif name != "all three":  # on a busy machine no pass may end beside streams
            assert (float(alone) > 0) == (int(passes[0]) > 1), name
            assert (float(together) > 0) == (int(passes[1]) > 1), name


@pytest.mark.full
def test_a_server_that_dies_ends_the_measurement_with_a_line_that_says_so(tmp_path: Path) -> None:
    base = talking_base(tmp_path / "base")
    with subprocess.Popen(tenants_command(base, 3600), stderr=subprocess.PIPE, text=True) as running:
        try:
            server = ready_server(running)
            server.kill()
            _, told = running.communicate(timeout=120)
        finally:
            running.terminate()
    assert running.returncode == 1
    assert "ended with -9" in told
    assert "Traceback" not in told


def tenants_command(base: Path, seconds: int) -> list[str]:
    command = [sys.executable, str(ROOT / "benchmarks/live_steps.py"), "--tenants", str(seconds), "--busy"]
    return [*command, "--base", str(base), "--onebase-args", "--kv-memory 100MB --threads 1"]


def ready_server(running: subprocess.Popen[str]) -> psutil.Process:
    """The server that a measurement has started, once it is ready."""
    while running.poll() is None:
        for process in psutil.Process(running.pid).children():
            with contextlib.suppress(psutil.Error, ValueError, httpx2.TransportError):
                command = process.cmdline()
                port = command[command.index("--port") + 1]
                if httpx2.get(f"http://127.0.0.1:{port}/ready", timeout=10).status_code == 200:
                    return process
        time.sleep(0.1)
    raise RuntimeError(f"the measurement ended with {running.returncode}")


@pytest.mark.parametrize(
    "options",
    [
        ["--tenants", "3", "--steps", "5"],
        ["--onebase-args", "--threads 1"],
        ["--tenants", "-1"],
        ["--vllm-python", "/nowhere/python"],
    ],
)
def test_an_option_that_does_nothing_or_cannot_be_used_is_refused_by_name(options: list[str]) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/live_steps.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert f"error: {options[-2]} " in done.stderr
