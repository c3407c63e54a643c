"""The benchmark of judges: what it counts is what the engine computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny import save_base

import judges
from bench import engines
from onebase_adapters.proof.loader import load_adapter
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.scheduler import SchedulerLimits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("base"))


def test_activated_judges_compute_their_own_tokens_and_plain_ones_the_whole_conversation(
    base: Path, tmp_path: Path
) -> None:
    adapters = judges.adapters_of(base, tmp_path, 3)
    loaded, _ = engines.load_base(base)
    engine = Engine(loaded, name="bench", limits=SchedulerLimits(16, 96, 512, 0), kv_blocks=200, slots=6)
    for name, path in adapters.items():
        files = Path(path) / "adapter_config.json", Path(path) / "adapter_model.safetensors"
        engine.put_adapter(name, load_adapter(loaded, *files, 16).weights)
    answers, text = 1 + 8 + 16, [100 + n for n in range(64)]
    found = {
        name: judges.judge(engine, kind, 3, [*text, 100 + number], apart=apart)["tokens"]
        for number, (name, (kind, apart)) in enumerate(judges.MODES.items())
    }
    assert found == {
        "aLoRA": 3 * (1 + 3) + answers,
        "LoRA": 3 * (65 + 3) + answers,
        "LoRA, one by one": 3 * 4 + answers,
    }, "the second kind of LoRA finds the blocks of the first"
