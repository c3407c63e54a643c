"""Run as a program: which forms of Triton's kernels the engine asks for. It needs no GPU and compiles none.

    python triton_forms.py FOLDER ARCHITECTURE

Prints the forms that are compiled at a start and those that all kinds of steps ask for, as JSON.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tests.engine.triton_device import stand_in
from tests.tiny import save_base

from onebase_engine.base.layers import adaptable_layers
from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.engine import forms, fusion
from onebase_engine.engine.batch import Packer
from onebase_engine.engine.kv_cache import RESERVED_BLOCKS
from onebase_engine.engine.memory_budget import thin_adapter
from onebase_engine.engine.messages import Sampling
from onebase_engine.engine.model import ServedModel
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_engine.engine.sequence import AdapterMix, Segment, SequenceState, StepPlan
from onebase_engine.kernels import cuda
from onebase_engine.kernels.cuda import CudaKernels

BLOCK = 16
LIMITS = SchedulerLimits(64, 2048, 4096)


def segment(length: int, count: int, *adapters: str) -> Segment:
    """The last `count` tokens of a sequence of so many, with adapters."""
    mix = AdapterMix(tuple((name, 1.0) for name in adapters))
    one = SequenceState("one", 0, [0] * length, Sampling(), mix, arrival=0, arrived_at=0.0)
    one.blocks = [array("i", [RESERVED_BLOCKS]) * -(-length // BLOCK)]
    return Segment(one, length - count, length)


def steps() -> list[list[Segment]]:
    """Decodes of any number of rows, with adapters and without, in short and in long contexts; prompts."""
    names = [f"a{number}" for number in range(4)]
    found = []
    for rows in (1, 2, 3, 4, 5, 8, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64):
        found.append([segment(5, 1) for _ in range(rows)])
        found.append([segment(5 + row, 1, names[row % 4]) for row in range(rows)])
        found.append([segment(700 + 17 * row, 1, *names[: row % 4]) for row in range(rows)])
    for tokens in (1, 7, 16, 49, 64, 65, 100, 128, 129, 192, 256, 257, 300, 511, 512, 513, 1024, 2000):
        found.append([segment(tokens, tokens)])
        found.append([segment(tokens + 900, tokens, "a1"), segment(33, 1, "a2"), segment(3, 1)])
    return found


def main(folder: Path, architecture: str) -> dict[str, Any]:
    stand_in(90)
    layers = 1 if architecture == "llama" else None
    base = load_base(
        BaseSettings(save_base(architecture, folder / "base", layers=layers), quantization="nf4")
    )
    # Nothing is computed: what trials compare would differ.
    cuda.norm_of = lambda module: (module.weight, 1e-5, False)
    cuda.CudaExperts.differs = lambda self: False
    fusion._Trial.passes = lambda self, switches, *more, **named: [on() for on, _ in switches] or True
    with cuda.collecting():
        model = ServedModel(base, 4, kernels=CudaKernels())
        model.allocate_kv(RESERVED_BLOCKS + 8, BLOCK)
    wanted = forms.wanted_forms(model, adaptable_layers(base), LIMITS, BLOCK)
    model._graphs = None  # a capture is of a GPU
    packer = Packer(BLOCK, model.row_multiple, model.groups, recurrent=model.state_bytes > 0)
    with cuda.collecting() as asked:
        for rank in (1, 4, 16, 40, 256):
            ranks = {slot: rank if slot else 8 for slot in range(4)}
            for slot, own in ranks.items():
                model.move_slots(
                    {slot: f"a{slot}"}, lambda _, own=own: thin_adapter(adaptable_layers(base), own)
                )
            for plan in steps():
                for own in plan:
                    own.sequence.blocks *= len(model.groups)
                plan = StepPlan(plan, [])
                model.forward(packer.pack(plan, {f"a{slot}": slot for slot in range(4)}))
    return {
        "wanted": sorted({(one.name, one.key) for one in wanted}),
        "asked": sorted({(one.name, one.key) for one in asked}),
        "count": Counter(one.name for one in wanted),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
