"""The real verifier process, in which a job whose digest is the name of a fault meets that fault.

All other jobs go their ordinary way.
"""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from onebase_adapters.proof import verifier as proving
from onebase_engine.engine.batch import Packer
from onebase_engine.lora.slots import AdapterSlots
from onebase_server.processes import verifier
from onebase_server.processes.verifier_protocol import Prove, Proved, Rejected


def dropped_layer(patch: pytest.MonkeyPatch) -> None:
    """Slots forget one layer of every version."""
    load = AdapterSlots.load

    def forgetful(self: AdapterSlots, slot: int, weights: Any) -> None:
        load(self, slot, {name: w for name, w in weights.items() if "layers.1.self_attn.o_proj" not in name})

    patch.setattr(AdapterSlots, "load", forgetful)


def wrong_positions(patch: pytest.MonkeyPatch) -> None:
    """The engine computes tokens as if they stood elsewhere; its modules are right."""
    pack = Packer.pack

    def shifting(self: Packer, *arguments: Any) -> Any:
        batch = pack(self, *arguments)
        batch.positions[:] += 1 + 7 * (batch.positions % 2)
        return batch

    patch.setattr(Packer, "pack", shifting)


def written_base(patch: pytest.MonkeyPatch) -> None:
    """Loading a version writes to the base."""
    load = proving.load_adapter

    def writing(base: Any, *arguments: Any, **named: Any) -> Any:
        adapter = load(base, *arguments, **named)
        with torch.no_grad():
            base.get_input_embeddings().weight.mul_(2.0)
        return adapter

    patch.setattr(proving, "load_adapter", writing)


def hangs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(proving.ModuleProver, "prove", lambda *arguments: time.sleep(600))


def out_of_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(proving.ModuleProver, "prove", lambda *arguments: torch.empty(1 << 60))


def file_limit(patch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.EFBIG, "File too large")

    patch.setattr(proving.ModuleProver, "prove", refuse)


def stumbles(patch: pytest.MonkeyPatch) -> None:
    """An exception that nobody thought of."""
    patch.setattr(proving.TextProver, "prove", lambda *arguments: 1 / 0)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    fault.__name__: fault
    for fault in (
        dropped_layer,
        wrong_positions,
        written_base,
        hangs,
        out_of_memory,
        file_limit,
        stumbles,
    )
}

answer = verifier.answer


def faulty(prover: proving.Verifier, job: Prove, on_progress: proving.OnProgress) -> Proved | Rejected:
    with pytest.MonkeyPatch.context() as patch:
        if job.digest in FAULTS:
            FAULTS[job.digest](patch)
        return answer(prover, job, on_progress)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as whole_process:
        whole_process.setattr(verifier, "answer", faulty)
        sys.exit(verifier.main())
