"""The path of accelerators (no tiles, one stack of all slots), run on the CPU: equal to PEFT as well.

Rows agree up to rounding there, so texts are compared, not bits.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.engine.harness import Lab, requests, run
from tests.tiny import save_base
from torch import nn

from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.engine import model
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.model import ServedModel
from onebase_engine.engine.scheduler import Limits
from onebase_engine.lora import slots
from onebase_engine.lora.rows import StepRows
from onebase_engine.lora.slots import SlotModule
from onebase_engine.lora.weights import LoraWeights

ASKED = requests(18, seed=7)


@pytest.fixture
def untiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve as on a device that is no CPU."""

    def wrap(
        tree: nn.Module, step: StepRows, *, slots: int, tiled: bool, kernels: None, unpacked: bool
    ) -> dict[str, SlotModule]:
        return wrap_layers(tree, step, slots=slots, tiled=False)

    def create(self: ServedModel, base: nn.Module, slots: int) -> None:
        initialize(self, base, slots)
        self.tiled = False

    wrap_layers, initialize = slots.wrap_layers, ServedModel.__init__
    monkeypatch.setattr(model, "find_kernels", lambda *_: None)
    monkeypatch.setattr(model, "wrap_layers", wrap)
    monkeypatch.setattr(ServedModel, "__init__", create)


@pytest.mark.usefixtures("untiled")
def test_the_memory_of_slots_counts_ranks_as_stacks_round_them_up(tmp_path: Path) -> None:
    base = load_base(BaseSettings(save_base("llama", tmp_path / "base"), quantization="none"))
    engine = Engine(base, name="tiny", limits=Limits(2, 32, 64), kv_blocks=8, slots=2)
    weights = LoraWeights(torch.ones(9, 128), torch.ones(128, 9), 1.0)
    engine.put_adapter("nine", {"model.layers.0.self_attn.q_proj": weights})
    assert engine.versions.size("nine") == 16 * (128 + 128) * 4


@pytest.mark.usefixtures("untiled")
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_rows_on_the_stack_of_all_slots_equal_peft_alone(architecture: str, tmp_path: Path) -> None:
    settings = BaseSettings(
        save_base(architecture, tmp_path / "base"), quantization="none", dtype=torch.float32
    )
    lab = Lab.create(load_base(settings), tmp_path)
    expected = [lab.expected(request) for request in ASKED]
    for changes in ({}, {"slots": 2, "step_tokens": 20}):
        engine = lab.engine(**changes)
        assert not engine.model.tiled
        assert run(engine, ASKED) == expected
        assert engine.slots.used == 0
        engine.check_base()
