"""The check of a job before it waits for its turn: both files, the recipe, and whether it fits."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from onebase_adapters.training import events
from onebase_adapters.training.data.report import report as data_report
from onebase_adapters.training.events import Gate, Listen
from onebase_adapters.training.plan import keep_template_date, make_plan, pin_template_date, read_data
from onebase_adapters.training.run import Job, load_tokenizer


def check(
    job: Job, budget: int | None, listen: Listen, gate: Gate, rate: float | None = None
) -> dict[str, Any]:
    """Decide everything that is "auto", and keep it in the job's folder: the run reads it there.

    Needs the base's folder, but nothing of it in memory, and no accelerator.

    Args:
        job: its `base.device` is where the run will compute.
        budget: bytes that it may take there, None if nobody said.
        rate: FLOP/s of that device, if known.

    Returns: `recipe`, `estimate` and `steps`.

    Raises: DataError, RecipeError, DoesNotFitError, Interrupted, OSError.
    """
    from transformers import AutoConfig

    tokenizer = load_tokenizer(job.base)

    def on_progress(part: float) -> None:
        gate.wait()
        listen(events.Progress(at=time.time(), name="validating_files", part=part))

    listen(events.Phase(at=time.time(), name="validating_files", message="Reading the files."))
    job = replace(job, recipe=pin_template_date(job.recipe, tokenizer, job.folder))
    data = read_data(job.train, job.held_out, tokenizer, job.recipe, names=job.names, on_progress=on_progress)
    checked = data_report(data.train, data.held_out, tokenizer)
    listen(events.DataChecked(at=time.time(), report=checked.to_json()))
    config = AutoConfig.from_pretrained(job.base.folder, trust_remote_code=False, local_files_only=True)
    plan = make_plan(
        job.folder,
        job.recipe,
        data,
        job.base,
        config,
        memory_limit=budget,
        base_resident=True,
        rate=rate,
    )
    keep_template_date(job.recipe, job.folder)
    return {"recipe": plan.recipe.to_json(), "estimate": plan.estimate.to_json(), "steps": plan.steps}
