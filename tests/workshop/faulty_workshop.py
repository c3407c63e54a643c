"""The real workshop process, in which a job whose digest is the name of a fault meets that fault.

All other jobs go their ordinary way.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from onebase_engine.engine.batch import Packer
from onebase_engine.lora.slots import SlotBank
from onebase_server.processes import verifier_job as job
from onebase_server.processes.verifier import main


def dropped_layer(patch: pytest.MonkeyPatch) -> None:
    """Slots forget one layer of every version."""
    load = SlotBank.load

    def forgetful(self: SlotBank, slot: int, weights: Any) -> None:
        load(self, slot, {name: w for name, w in weights.items() if "layers.1.self_attn.o_proj" not in name})

    patch.setattr(SlotBank, "load", forgetful)


def wrong_positions(patch: pytest.MonkeyPatch) -> None:
    """The engine computes tokens as if they stood elsewhere; its modules are right."""
    pack = Packer.pack

    def shifting(self: Packer, *arguments: Any) -> Any:
        batch = pack(self, *arguments)
        batch.positions.add_(1 + 7 * (batch.positions % 2))
        return batch

    patch.setattr(Packer, "pack", shifting)


def written_base(patch: pytest.MonkeyPatch) -> None:
    """Loading a version writes to the base."""
    load = job.load_adapter

    def writing(base: Any, *arguments: Any, **named: Any) -> Any:
        adapter = load(base, *arguments, **named)
        with torch.no_grad():
            base.get_input_embeddings().weight.mul_(2.0)
        return adapter

    patch.setattr(job, "load_adapter", writing)


def hangs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(job, "prove_modules", lambda *arguments: time.sleep(600))


def out_of_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(job, "prove_modules", lambda *arguments: torch.empty(1 << 60))


def stumbles(patch: pytest.MonkeyPatch) -> None:
    """An exception that nobody thought of."""
    patch.setattr(job, "prove_texts", lambda *arguments: 1 / 0)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    fault.__name__: fault
    for fault in (dropped_layer, wrong_positions, written_base, hangs, out_of_memory, stumbles)
}


class FaultyProver(job.Prover):
    def _prove(self, asked: job.Prove, on_progress: job.OnProgress) -> job.Proved:
        with pytest.MonkeyPatch.context() as patch:
            if asked.digest in FAULTS:
                FAULTS[asked.digest](patch)
            return super()._prove(asked, on_progress)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as whole_process:
        whole_process.setattr("onebase_server.processes.verifier_process.Prover", FaultyProver)
        sys.exit(main())
