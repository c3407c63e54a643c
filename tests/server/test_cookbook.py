"""Recipes of tinker-cookbook against a real server: unmodified, but for the base's name and the loss's.

tools/setup.sh installs the cookbook without its requirements, for PyPI does not have the tml-renderers that
it asks for; none of these recipes imports it. ONEBASE_COOKBOOK_PYTHON has the recipes run by the Python of
another environment, such as one that only `pip install tinker 'tinker-cookbook[math-rl]'` has made.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tests.hub_standin import HubStandIn
from tests.training.runs import talking_base

from .support import Server, Starter

MODEL = "Qwen/Qwen3-4B-Instruct-2507"
"""A name that the cookbook knows, and whose chat format has tools. What is served under it is small."""
PROGRAM = Path(__file__).with_name("cookbook.py")
PYTHON = os.environ.get("ONEBASE_COOKBOOK_PYTHON", sys.executable)
pytestmark = [
    pytest.mark.full,
    pytest.mark.usefixtures("forks"),
    pytest.mark.skipif(find_spec("tinker_cookbook") is None, reason="tinker-cookbook is not installed"),
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of programs for which the small base is on the Hub under MODEL."""
    folder = talking_base(
        tmp_path_factory.mktemp("base") / "base", initializer_range=0.2, max_position_embeddings=2048
    )
    with HubStandIn() as hub:
        hub.add_repo(MODEL, {path.name: path.read_bytes() for path in folder.iterdir()})
        yield hub.environment(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def server(serve_real: Starter, hub: Mapping[str, str]) -> Iterator[Server]:
    options = ("--base", MODEL, "--threads", "1", "--kv-memory", "100MB")
    with serve_real(*options, environment=hub) as running:
        yield running


def run(
    server: Server, hub: Mapping[str, str], folder: Path, recipe: str, **settings: Any
) -> list[dict[str, Any]]:
    """Run a recipe to its end, and return what it logged, a step each."""
    given = {"model_name": MODEL, "base_url": server.url, "log_path": folder / "log", **settings}
    command = [PYTHON, str(PROGRAM), recipe, *(f"{name}={value}" for name, value in given.items())]
    environment = os.environ | hub | {"TINKER_API_KEY": "tml-dummy", "TINKER_TELEMETRY": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr[-6000:] + server.log[-2000:]
    lines = (folder / "log" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def figures(steps: list[dict[str, Any]], name: str) -> list[float]:
    """What was logged under a name, a step each."""
    return [step[name] for step in steps if name in step]


@pytest.fixture(scope="module")
def supervised(
    server: Server, hub: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], list[dict[str, Any]]]:
    """Losses of sl_loop, and its checkpoints."""
    folder = tmp_path_factory.mktemp("sl_loop")
    steps = run(
        server, hub, folder, "sl_loop",
        batch_size=8, max_steps=4, learning_rate=0.02, lora_rank=8, save_every=2,
    )  # fmt: skip
    lines = (folder / "log" / "checkpoints.jsonl").read_text().splitlines()
    return figures(steps, "train_mean_nll"), [json.loads(line) for line in lines]


def test_sl_loop_learns_its_rows(supervised: tuple[list[float], list[dict[str, Any]]]) -> None:
    losses, saved = supervised
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.1
    assert [one["name"] for one in saved] == ["000002", "final"]


def test_a_checkpoint_is_downloaded_as_the_cookbook_does_encrypted_on_its_way(
    server: Server,
    hub: Mapping[str, str],
    tmp_path: Path,
    supervised: tuple[list[float], list[dict[str, Any]]],
) -> None:
    path, target = supervised[1][-1]["state_path"], tmp_path / "adapter"
    program = "import os, sys; from tinker_cookbook import weights; weights.download(tinker_path="
    program += "sys.argv[1], output_dir=sys.argv[2], base_url=sys.argv[3]); os._exit(0)"  # as in cookbook.py
    environment = os.environ | hub | {"TINKER_API_KEY": "tml-dummy", "TINKER_TELEMETRY": "0"}
    command = [sys.executable, "-c", program, path, str(target), server.url]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:] + server.log[-2000:]
    run, name = path.removeprefix("tinker://").split("/weights/")
    saved = server.data_dir / "live" / run / "weights" / name
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (target / file).read_bytes() == (saved / file).read_bytes()
    left = [one for one in (server.data_dir / "live").glob("*/external/*") if one.is_dir()]
    assert left == []  # the export was deleted


def test_rl_loop_samples_and_saves(server: Server, hub: Mapping[str, str], tmp_path: Path) -> None:
    steps = run(
        server, hub, tmp_path, "rl_loop",
        batch_size=4, group_size=4, max_steps=2, max_tokens=8, lora_rank=4, loss_fn="importance_sampling",
    )  # fmt: skip
    assert [step["reward/total"] for step in steps] == [0.0, 0.0]  # a random base boxes no answer
    assert '"final"' in (tmp_path / "log" / "checkpoints.jsonl").read_text()


def test_math_rl_trains_on_logprobs_that_are_the_samplers(
    server: Server, hub: Mapping[str, str], tmp_path: Path
) -> None:
    steps = run(
        server, hub, tmp_path, "math_rl.train",
        groups_per_batch=4, group_size=4, max_steps=3, lora_rank=4, learning_rate=1e-3, eval_every=0,
        loss_fn="importance_sampling",
    )  # fmt: skip
    assert figures(steps, "optim/kl_sample_train_v1") == [0.0] * 3
    assert figures(steps, "optim/kl_sample_train_v2") == [0.0] * 3


def test_dpo_prefers_what_is_chosen(server: Server, hub: Mapping[str, str], tmp_path: Path) -> None:
    steps = run(server, hub, tmp_path, "preference.dpo.train", batch_size=8, max_steps=4, learning_rate=1e-3)
    losses = figures(steps, "dpo_loss")
    assert losses[-1] < losses[0] - 0.1


def test_a_teacher_is_distilled_on_logprobs_that_are_the_samplers(
    server: Server,
    hub: Mapping[str, str],
    tmp_path: Path,
    supervised: tuple[list[float], list[dict[str, Any]]],
) -> None:
    steps = run(
        server, hub, tmp_path, "distillation.on_policy_distillation",
        teacher_model=MODEL, teacher_checkpoint=supervised[1][-1]["sampler_path"], groups_per_batch=4,
        group_size=2, max_tokens=8, max_steps=3, lora_rank=4, learning_rate=1e-3, eval_every=0,
    )  # fmt: skip
    assert all(one > 0 for one in figures(steps, "teacher_kl"))
    assert all(one > 0 for one in figures(steps, "grad_norm"))
    assert figures(steps, "optim/kl_sample_train_v1") == [0.0] * 3
    assert figures(steps, "optim/kl_sample_train_v2") == [0.0] * 3


def test_sdft_learns_from_the_likeliest_tokens_of_a_teacher(
    server: Server, hub: Mapping[str, str], tmp_path: Path
) -> None:
    steps = run(
        server, hub, tmp_path, "sdft.train",
        groups_per_batch=4, max_tokens=8, max_steps=2, lora_rank=4, topk=5, eval_every=0,
    )  # fmt: skip
    assert figures(steps, "sdft/num_datums") == [4.0, 4.0]
    assert all(one > 0 for one in figures(steps, "grad_norm"))


def test_a_decision_model_learns_outcomes(server: Server, hub: Mapping[str, str], tmp_path: Path) -> None:
    data = tmp_path / "markets.csv"
    with data.open("w", newline="") as file:
        writer = csv.writer(file)
        names = "submission_id event_ticker category markets market_outcome title sources"
        writer.writerow([*names.split(), "snapshot_time", "close_time"])
        for number in range(32):
            month = 9 if number < 24 else 11
            market = f"Team {number} wins"
            writer.writerow([
                f"s{number}", f"e{number}", "Sports", json.dumps([market]), json.dumps({market: 1}),
                f"Game {number}", json.dumps([{"title": "News", "summary": "They play."}]),
                f"2025-{month:02}-01T00:00:00Z", f"2025-{month:02}-02T00:00:00Z",
            ])  # fmt: skip
    steps = run(
        server, hub, tmp_path, "decisions.forecasting",
        data_path=data, batch_size=8, max_steps=3, lora_rank=8, learning_rate=0.01, eval_every=0,
    )  # fmt: skip
    scores = [step["test/brier_reward"] for step in steps if "test/brier_reward" in step]
    assert scores[-1] > scores[0]


def test_the_numerics_check_finds_no_difference(
    server: Server, hub: Mapping[str, str], tmp_path: Path
) -> None:
    steps = run(
        server, hub, tmp_path, "rl_numerics_check.train",
        groups_per_batch=2, group_size=4, max_tokens=32, max_steps=2, lora_rank=4, max_trajectory_tokens=1900,
        **{"task.num_pages_min": 1, "task.num_pages_max": 2, "task.page_chars": 200},
    )  # fmt: skip
    assert figures(steps, "optim/kl_sample_train_v1") == [0.0] * 2
    assert figures(steps, "optim/kl_sample_train_v2") == [0.0] * 2
