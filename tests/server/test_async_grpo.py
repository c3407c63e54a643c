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
from peft import PeftModel
from transformers import AutoModelForCausalLM

from .async_grpo import STEPS
from .support import Starter

PROGRAM = Path(__file__).with_name("async_grpo.py")
IDS = list(range(300, 340))
"""Tokens whose log-probabilities by the last version are compared."""


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
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300 + 25 * STEPS
        )
        assert run.returncode == 0, run.stderr[-4000:] + server.log
        adapters = {one["name"]: one["active"] for one in http.get("/v1/adapters").json()["data"]}
        usage = http.get("/v1/usage", params={"group_by": "adapter"}).json()["data"]
        versions = [f"trl-policy-v{number}" for number in range(1, STEPS + 2)]
        asked = {"model": versions[-1], "prompt": IDS, "max_tokens": 1, "echo": True, "logprobs": 1}
        answer = http.post("/v1/completions", json=asked)
        assert answer.status_code == 200, answer.text
        served = answer.json()["choices"][0]["logprobs"]["token_logprobs"][1 : len(IDS)]

    steps: list[dict[str, Any]] = [one for one in json.loads(run.stdout.splitlines()[-1]) if "kl" in one]
    assert [one["step"] for one in steps] == list(range(1, STEPS + 1))
    assert adapters == {name: name in versions[-2:] for name in versions}
    sampled = {one["adapter"]: one["completion_tokens"] for one in usage}
    assert set(sampled) <= set(adapters), "the base answered"
    assert sampled["trl-policy-v1"] > 0
    # Rows of the first step are those of the first version, and others at most one version old.
    assert abs(steps[0]["kl"]) < 1e-3  # of the logprobs that came with the ids, and of the trainer's
    assert abs(steps[0]["ratio"] - 1) < 0.02
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(whole, synced / versions[-1])
    with torch.no_grad(), model.disable_adapter():
        untrained = logprobs(model)
    with torch.no_grad():
        trained = logprobs(model)
    assert (trained - untrained).abs().max() > 0.1
    torch.testing.assert_close(torch.tensor(served), trained, atol=1e-2, rtol=0)
    assert all(one["sample/staleness_max"] <= 1 for one in steps)
    rewards = [one["reward"] for one in steps]
    assert fmean(rewards[-4:]) > fmean(rewards[:2]) + 0.1, rewards


def logprobs(model: PeftModel) -> torch.Tensor:
    """Those of all of IDS but the first."""
    scores = model(torch.tensor([IDS])).logits[0, :-1].log_softmax(-1)
    return scores.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
