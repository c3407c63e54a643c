"""The way of accelerators (products of the shape that the step has), run on the CPU: equal to PEFT as well.

Rows agree up to rounding there, so texts are compared, not bits.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.engine.harness import Lab, requests, run
from tests.tiny import save_base

from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.engine import model
from onebase_engine.kernels.reference import ReferenceKernels

ASKED = requests(18, seed=7)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_rows_in_the_shape_of_the_step_equal_peft_alone(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "find_kernels", lambda *_: ReferenceKernels(tiled=False))
    settings = BaseSettings(
        save_base(architecture, tmp_path / "base"), quantization="none", dtype=torch.float32
    )
    lab = Lab.create(load_base(settings), tmp_path)
    expected = [lab.expected(request) for request in ASKED]
    for changes in ({}, {"slots": 2, "step_tokens": 20}):
        engine = lab.engine(**changes)
        assert not engine.model.kernels.tiled
        assert run(engine, ASKED) == expected
        assert engine.slots.used == 0
        engine.check_base()
