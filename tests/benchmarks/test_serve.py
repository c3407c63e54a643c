"""What `make bench` asks and of whom, what it refuses, and how it judges."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
from rich.console import Console

import goals
import judges
import serve
from bench import machine, peers
from bench.figures import Figures
from bench.machine import BusyError, demand_quiet
from bench.training import VARIANTS, TrainFigures
from bench.workload import SWEEPS, Block, Prompts, Shape, main_block, requests_of, sweep_blocks
from onebase_engine.base.default_base import fetch_default_base

ROOT = Path(__file__).parents[2]
ADAPTERS = {
    "upload to active p50",
    "uploads at once: a minute",
    "random: tokens/s",
    "random: TTFT p99",
    "random, from disk: TTFT p99",
    "resident: TTFT p99",
}
"""Figures of adapters.py that goals may name."""


def blocks() -> list[Block]:
    return [main_block(Shape()), *sweep_blocks(Shape(), SWEEPS)]


@pytest.mark.parametrize(
    "shape", [Shape(), Shape(adapters=1), Shape(streams=1), Shape(streams=2, adapters=2)]
)
def test_every_load_has_a_name_of_its_own_and_adapters_that_its_target_has(shape: Shape) -> None:
    all_blocks = [main_block(shape), *sweep_blocks(shape, SWEEPS)]
    scenarios = [scenario for block in all_blocks for scenario in block.scenarios]
    assert len({scenario.key for scenario in scenarios}) == len(scenarios)
    for block in all_blocks:
        names = {f"a{index}" for index in range(len(block.ranks))}
        asked = {name for scenario in block.scenarios for name in scenario.adapters if name is not None}
        assert asked <= names, block.key


def test_prompts_have_the_length_that_the_load_says_and_none_begins_like_another() -> None:
    prompts = Prompts(fetch_default_base(), 85, 0)
    scenario = next(one for block in blocks() for one in block.scenarios if one.key == "prompts-long")
    requests = requests_of(scenario, prompts, 1)
    assert len({request.prompt[:12] for request in requests}) == scenario.streams
    lengths = [len(prompts._tokenizer.encode(request.prompt).ids) for request in requests]
    assert all(abs(length - scenario.prompt_tokens) <= 2 for length in lengths)


def test_a_prompt_to_copy_begins_its_own_passage_once_more() -> None:
    prompt = Prompts(fetch_default_base(), 85, 0).make_copy("x", length=150)
    first, second, begun = prompt.split("\n\n")
    assert first == second
    assert first.startswith(begun)
    assert 0 < len(begun) < len(first)


RESULT = {"machine": {**machine.describe(None), "commit": "abc"}, "options": {"rounds": "3", "steps": "6"}}


def test_goals_are_judged_by_the_figures_and_not_where_a_peer_is_missing(tmp_path: Path) -> None:
    figures = {
        "single": {"onebase": {"tokens_per_second": 60.0}, "llama.cpp": {"tokens_per_second": 70.0}},
        "alike": {"onebase": {"tpot_p50": 0.040}},
        "beside": {"onebase": {"tpot_p50": 0.044}},
    }
    (tmp_path / "serve.json").write_text(json.dumps({**RESULT, "figures": figures}))
    goals.publish(goals.read(tmp_path), Console(), tmp_path)
    lines = (tmp_path / "goals.md").read_text().splitlines()
    assert "| 1 stream, 1 adapter | llama.cpp | ≥ 0.8 | 0.86 | met |" in lines
    assert "| 1 stream, 1 adapter | vllm | ≥ 3.5 |  | not measured |" in lines
    assert "| TPOT of rank 8, one row of rank 128 | rank 8 alone | ≤ 1.03 | 1.10 | missed |" in lines
    (said,) = [line for line in lines if line.startswith("- serve: ")]
    assert "commit abc" in said
    assert said.endswith("rounds 3, steps 6")


def test_every_goal_names_figures_that_the_benchmarks_write() -> None:
    loads = {scenario.key: block for block in blocks() for scenario in block.scenarios}
    for goal in goals.GOALS:
        for part, *keys in (keys for keys in (goal.own, goal.other) if isinstance(keys, tuple)):
            if part == "serve":
                load, target, figure = keys
                only = loads[load].only
                assert target in serve.TARGETS if only is None else target in only, goal
                assert figure in {field.name for field in fields(Figures)}, goal
            elif part == "train":
                target, figure = keys
                assert target in ("onebase", *VARIANTS), goal
                assert figure in {field.name for field in fields(TrainFigures)}, goal
            elif part == "judges":
                assert keys[0] in judges.MODES, goal
                assert keys[1] == "seconds"
            else:
                assert keys[1] in ADAPTERS, goal


def test_a_peer_that_cannot_be_installed_is_left_out_and_fails_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def cannot(name: str, console: Console) -> Path:
        raise peers.PeerError(f"{name} could not be installed")

    def run(command: list[str]) -> bool:
        asked.append(command)
        return True

    monkeypatch.setattr(goals, "installed", cannot)
    monkeypatch.setattr(goals, "_run", run)
    monkeypatch.setattr(goals, "end_on_signals", lambda: None)
    assert goals.main(["--only", "train", "--busy", "--output", str(tmp_path)]) == 1
    assert [Path(command[1]).name for command in asked] == ["train.py"]
    assert "--trl-python" not in asked[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_ends_the_benchmarks_ends_what_they_have_started(tmp_path: Path, number: signal.Signals) -> None:
    part = tmp_path / "part.py"
    part.write_text(
        "import os, time\n"
        "from pathlib import Path\n"
        "from bench.processes import end_on_signals\n"
        "end_on_signals()\n"
        "try:\n"
        f"    Path({str(tmp_path / 'begun')!r}).write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "finally:\n"
        "    time.sleep(1)\n"
        f"    Path({str(tmp_path / 'ended')!r}).touch()\n"
    )
    whole = f"import sys\nimport goals\ngoals.end_on_signals()\ngoals._run([sys.executable, {str(part)!r}])\n"
    folders = os.pathsep.join(map(str, (ROOT / "benchmarks", ROOT / "engine", ROOT / "server")))
    command = [sys.executable, "-c", whole]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": folders}, stderr=subprocess.DEVNULL
    ) as process:
        while not (tmp_path / "begun").exists() or not (tmp_path / "begun").read_text():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        if number == signal.SIGINT:
            # A terminal sends it to both.
            os.kill(int((tmp_path / "begun").read_text()), number)
        process.wait(60)
    assert (tmp_path / "ended").exists()


def test_a_busy_machine_is_refused_unless_told_otherwise() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            with pytest.raises(BusyError, match="--busy"):
                demand_quiet(False, Console(), seconds=1.0)
            demand_quiet(True, Console(), seconds=0.2)
        finally:
            process.kill()


@pytest.mark.parametrize(("used", "refused"), [(0.01, False), (0.4, True)])
def test_what_keeps_a_machine_busy_is_named(
    used: float, refused: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {-1: (5.0, "init"), -7: (2.0, "cc1")}
    processes = iter([before, {**before, -7: (2.0 + used, "cc1")}])
    busy = iter([100.0, 100.0 + used])
    monkeypatch.setattr(machine, "_seconds_of_processes", lambda: next(processes))
    monkeypatch.setattr(machine, "_busy_seconds", lambda: next(busy))
    demand_quiet(True, Console(), seconds=1.0)
    assert ("cc1 (process -7) 40%" in capsys.readouterr().out) == refused


def test_short_processes_keep_a_machine_busy_as_well() -> None:
    """As a compiler's do, each of which has ended before one looks again."""
    loop = "while :; do timeout 0.3 sh -c 'while :; do :; done'; done"
    with subprocess.Popen(["sh", "-c", loop], start_new_session=True) as process:
        try:
            with pytest.raises(BusyError):
                demand_quiet(False, Console(), seconds=2.0)
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_peer_is_installed_once_and_again_after_an_installation_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEBASE_CACHE", str(tmp_path))
    tries: list[Path] = []

    wanted = ["peer==1", "torch==2"]

    def install(folder: Path, run: peers.Run, requirements: list[str]) -> None:
        tries.append(folder)
        run(sys.executable, "-c", "print('half of it')")
        (folder / "program").touch()
        if len(tries) == 1:
            run(sys.executable, "-c", "raise SystemExit('the network is gone')")

    monkeypatch.setitem(peers.PEERS, "peer", peers.Peer("peer", "1", "program", install, lambda: wanted))
    with pytest.raises(peers.PeerError, match="the network is gone"):
        peers.installed("peer", Console())
    for _ in range(2):
        assert peers.installed("peer", Console()) == tmp_path / "peers" / "peer-1" / "program"
    assert len(tries) == 2
    wanted[1] = "torch==3"
    peers.installed("peer", Console())
    assert len(tries) == 3
