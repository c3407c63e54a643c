"""TRL's AsyncGRPO samples on this server while it trains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from .async_grpo import STEPS
from .support import Starter

PROGRAM = Path(__file__).with_name("async_grpo.py")


@pytest.fixture(scope="module")
def base(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a chat template that TRL knows, and tokens of quite different probabilities."""
    made = tmp_path_factory.mktemp("grpo") / "base"
    shutil.copytree(small_base, made)
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.mul_(8)
    model.save_pretrained(made)
    package = find_spec("trl")
    assert package is not None
    assert package.origin is not None
    template = Path(package.origin).parent / "chat_templates" / "qwen3.jinja"
    shutil.copyfile(template, made / "chat_template.jinja")
    return made


@pytest.mark.full
@pytest.mark.usefixtures("forks")
def test_async_grpo_learns_from_rewards_of_what_the_versions_that_it_loads_say(
    serve_real: Starter, base: Path, tmp_path: Path
) -> None:
    synced = tmp_path / "out" / ".vllm_lora"
    synced.mkdir(parents=True)
    options = ["--quantization", "none", "--dtype", "float32", "--adapters-dir", str(synced)]
    with serve_real("--base", str(base), *options) as server, server.client() as http:
        command = [sys.executable, str(PROGRAM), server.url, str(base), str(synced.parent)]
        environment = os.environ | {"CI": "1", "HF_HUB_OFFLINE": "1"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stderr[-4000:] + server.log
        adapters = {one["name"]: one["active"] for one in http.get("/v1/adapters").json()["data"]}
        usage = http.get("/v1/usage", params={"group_by": "adapter"}).json()["data"]

    steps: list[dict[str, Any]] = [one for one in json.loads(run.stdout.splitlines()[-1]) if "kl" in one]
    assert [one["step"] for one in steps] == list(range(1, STEPS + 1))
    versions = [f"trl-policy-v{number}" for number in range(1, STEPS + 2)]
    assert adapters == {name: name in versions[-2:] for name in versions}
    sampled = {one["adapter"]: one["completion_tokens"] for one in usage}
    assert set(sampled) <= set(adapters), "the base answered"
    assert sampled["trl-policy-v1"] > 0
    # Rows of the first step are those of the first version, and others at most one version old.
    assert abs(steps[0]["kl"]) < 1e-3  # of the logprobs that came with the ids, and of the trainer's
    assert abs(steps[0]["ratio"] - 1) < 0.02
    assert all(one["sample/staleness_max"] <= 1 for one in steps)
    rewards = [one["reward"] for one in steps]
    assert fmean(rewards[-4:]) > fmean(rewards[:2]) + 0.1, rewards
