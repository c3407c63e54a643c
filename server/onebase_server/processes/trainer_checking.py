"""The check of a job before it waits for its turn: both files, the recipe, and whether it fits."""

from __future__ import annotations

import time
from typing import Any

from onebase_adapters.training import events
from onebase_adapters.training.events import Gate, Listen
from onebase_adapters.training.run import Job, prepare


def check(job: Job, listen: Listen, gate: Gate, rate: float | None = None) -> dict[str, Any]:
    """Decide everything that is "auto", and keep it in the job's folder: the run reads it there.

    Needs the base's folder, but nothing of it in memory, and no accelerator.

    Args:
        job: its `base.device` is where the run will compute; its `memory_limit` is what it may take there.
        rate: FLOP/s of that device, if known.

    Returns: `recipe`, `estimate` and `steps`.

    Raises: DataError, RecipeError, DoesNotFitError, Interrupted, OSError.
    """
    from transformers import AutoConfig

    listen(events.Phase(at=time.time(), name="validating_files", message="Reading the files."))
    config = AutoConfig.from_pretrained(job.base.folder, trust_remote_code=False, local_files_only=True)
    plan = prepare(config, job, listen, gate, rate=rate)
    return {"recipe": plan.recipe.to_json(), "estimate": plan.estimate.to_json(), "steps": plan.steps}
