"""A mixture of experts from end to end: trained on, proved and served in 4 bits."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.forks import Nursery
from tests.oracle import greedy
from tests.server.support import launch, serving
from tests.tiny import load_folder
from tests.training.runs import talking_base, write_chats

from onebase_adapters.proof.texts import regrets, tie_of
from onebase_engine.base.load import BaseSettings, load_base

MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "initializer_range": 0.15}


@pytest.mark.full
@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(
    ("targets", "changed"),
    [
        pytest.param("all-linear", 8, id="attention's four layers, twice"),
        pytest.param("experts", 4, id="two parameters of experts, twice"),
        pytest.param("attention,experts", 12, id="both"),
    ],
)
def test_an_adapter_trained_on_a_mixture_is_served_as_peft_computes_it(
    targets: str, changed: int, nursery: Nursery, tmp_path: Path
) -> None:
    base = talking_base(tmp_path / "base", "OlmoeConfig", **MIXTURE)
    data = write_chats(tmp_path / "chats.jsonl", 16)
    command = [sys.executable, "-m", "onebase_training.cli.train", "--data", str(data), "--name", "one"]
    command += ["--base", str(base), "--out", str(tmp_path / "run"), "--threads", "1", "--r", "4"]
    command += ["--targets", targets]
    subprocess.run([*command, "--max-steps", "3", "--learning-rate", "0.02"], check=True, timeout=300)
    adapter = tmp_path / "run" / "adapter"

    options = ["--base", str(base), "--adapter", f"one={adapter}", "--kv-memory", "50MB", "--threads", "1"]
    prompt = list(range(100, 160))
    texts = {}
    start = partial(launch, popen=nursery.popen("forks"))
    with (
        serving([sys.executable, "-m", "onebase_server"], *options, start=start) as server,
        server.client() as http,
    ):
        report = http.get("/v1/adapters/one/versions").json()["data"][0]["report"]
        assert report["proof"]["modules_changed"] == changed
        for model in ("base", "one"):
            body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0}
            answer = http.post("/v1/completions", json=body | {"return_token_ids": True}).raise_for_status()
            texts[model] = answer.json()["choices"][0]["token_ids"]

    loaded = load_base(BaseSettings(base))
    reference = load_folder(loaded, adapter).reference
    for model, own in (("base", loaded), ("one", reference)):
        assert len(texts[model]) == 12
        assert max(regrets(own, prompt, texts[model])) <= tie_of(torch.bfloat16)
    assert texts["one"] != texts["base"]
    assert greedy(loaded, prompt, 12) != greedy(reference, prompt, 12), "the adapter acts"
