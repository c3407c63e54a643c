"""The benchmark of judges: what it counts is what the engine computes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.tiny import save_base

import judges
from bench import engines
from bench.processes import StartError
from bench.stream import Sample
from bench.workload import Request
from onebase_adapters.proof.loader import load_adapter
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.messages import AdapterRef, Sampling, Submit
from onebase_engine.engine.scheduler import SchedulerLimits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("base"))


class InEngine:
    """A session of the engine itself."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def run(self, requests: list[Request]) -> list[Sample]:
        submits = []
        for number, request in enumerate(requests):
            sampling = Sampling(temperature=0.0, max_tokens=request.tokens, ignore_eos=True)
            adapters = [AdapterRef(request.adapter)] if request.adapter else []
            assert isinstance(request.prompt, list)
            submits.append(
                Submit(id=str(number), prompt=request.prompt, sampling=sampling, adapters=adapters)
            )
        tokens, cached = [0] * len(requests), [0] * len(requests)
        for output in engines.outputs(self.engine, submits):
            tokens[int(output.id)] += len(output.tokens)
            cached[int(output.id)] += output.cached_tokens or 0
        return [Sample(0.0, 0.0, 0.0, n, "", found) for n, found in zip(tokens, cached, strict=True)]


def test_activated_judges_compute_their_own_tokens_and_plain_ones_the_whole_conversation(
    base: Path, tmp_path: Path
) -> None:
    adapters = judges.adapters_of(base, tmp_path, 3)
    loaded, _ = engines.load_base(base)
    engine = Engine(loaded, name="bench", limits=SchedulerLimits(16, 96, 512, 0), kv_blocks=200, slots=6)
    for name, path in adapters.items():
        files = path / "adapter_config.json", path / "adapter_model.safetensors"
        engine.put_adapter(name, load_adapter(loaded, *files, 16).weights)
    answers, text = 1 + 8 + 16, [100 + n for n in range(64)]
    own = {name: mode for name, mode in judges.MODES.items() if mode.target == "onebase"}
    found = {
        name: asyncio.run(judges.judge(InEngine(engine), mode, 3, [*text, 100 + number]))["tokens"]
        for number, (name, mode) in enumerate(own.items())
    }
    assert found == {
        "aLoRA": 3 * (1 + 3) + answers,
        "LoRA": 3 * (65 + 3) + answers,
        "LoRA, one by one": 3 * 4 + answers,
    }, "the second kind of LoRA finds the blocks of the first"


def test_a_target_that_fails_leaves_the_figures_of_the_others(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counted:
        async def run(self, requests: list[Request]) -> list[Sample]:
            return [Sample(0.0, 0.0, 0.0, one.tokens, "", len(one.prompt) - 1) for one in requests]

    @asynccontextmanager
    async def target(name: str, *_: object) -> AsyncIterator[Counted]:
        if name == "vllm":
            raise StartError("not here")
        yield Counted()

    async def settled(most: float = 0.0) -> None:
        return

    monkeypatch.setattr(judges, "_started", target)
    monkeypatch.setattr(judges.machine, "settle", settled)
    program = str(tmp_path / "python")
    options = ["--base", str(base), "--judges", "2", "--rounds", "2", "--busy", "--vllm-python", program]
    assert judges.main([*options, "--output", str(tmp_path)]) == 1
    written = json.loads((tmp_path / "judges.json").read_text())
    assert {name: len(rounds) for name, rounds in written["runs"].items()} == {
        "aLoRA": 2,
        "LoRA": 2,
        "LoRA, one by one": 2,
    }
    assert written["figures"]["LoRA"]["tokens"] == 2 * 1 + 1 + 16
