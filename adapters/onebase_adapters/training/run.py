"""One training run from its files to a finished adapter: the command line and a server's jobs both do it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import torch
from torch import nn

from onebase_adapters.base import BaseChangedError, BaseSettings, fingerprint
from onebase_adapters.training import events
from onebase_adapters.training.batches import MicroBatch, pack, targets_of
from onebase_adapters.training.checkpoint import CheckpointError, Checkpoints, RunState, write_whole
from onebase_adapters.training.data.dataset import Dataset
from onebase_adapters.training.data.report import report as data_report
from onebase_adapters.training.events import Gate, Listen
from onebase_adapters.training.loop import Trainer
from onebase_adapters.training.machine import measured_rate, peak_memory
from onebase_adapters.training.objectives import make_objective
from onebase_adapters.training.plan import (
    Data,
    Plan,
    keep_template_date,
    make_plan,
    pin_template_date,
    read_data,
)
from onebase_adapters.training.process_group import OtherProcessError, ProcessGroup
from onebase_adapters.training.recipe import Recipe
from onebase_adapters.training.replies import Measuring
from onebase_adapters.training.result import DataLine, Report, is_better, model_card, write_adapter
from onebase_adapters.training.trainable import Trainable

ADAPTER, REPORT = "adapter", "report.json"
_EVA_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train, on what, and where to.

    train, held_out: files or Hub data sets; without `held_out` the recipe's split is held out. names: what
    the two are called, where their paths do not say it. folder: the run's own; a run that is in it goes on.
    base_repo: the base's name on the Hub, None if it has none. memory_limit: bytes that the process may
    take. base_resident: the base is another process's. save_dtype: of the tensors in the adapter's file.
    """

    name: str
    recipe: Recipe
    train: str | Path
    held_out: str | Path | None = None
    names: tuple[str | None, str | None] = (None, None)
    folder: Path
    base: BaseSettings
    base_name: str
    base_repo: str | None = None
    base_commit: str | None = None
    memory_limit: int | None = None
    base_resident: bool = False
    save_dtype: torch.dtype = torch.float32


def train(
    base: nn.Module, job: Job, listen: Listen, gate: Gate, processes: ProcessGroup | None = None
) -> Report:
    """Train an adapter on `base`; leaves `adapter/`, `report.json` and `events.jsonl` in the job's folder.

    Raises:
        DataError: a file has bad lines. RecipeError: a setting cannot be used on this base.
        DoesNotFitError: too little memory; nothing was begun.
        TrainingDivergedError: a loss was not finite.
        CheckpointError: the folder holds another run, or a damaged one.
        Interrupted: as the gate says; after a pause the same call goes on.
        BaseChangedError: something wrote to the base. OSError: the disk is full, for instance.
    """
    processes = processes or ProcessGroup()
    before = fingerprint(base)
    with recorded(job.folder, listen, processes) as tell, torch.random.fork_rng(devices=[]):
        try:
            plan = prepare(base, job, tell, gate, processes)
            report = run_plan(base, job, plan, tell, gate, processes)
        finally:
            if fingerprint(base) != before:
                raise BaseChangedError("training changed the base")
        tell(events.Finished(at=time.time(), report=report.to_json()))
    return report


def prepare(base: nn.Module, job: Job, tell: Listen, gate: Gate, processes: ProcessGroup) -> Plan:
    """Check the files and decide everything. Raises as `train`."""
    tell(events.Phase(at=time.time(), name="validating_files"))
    tokenizer = load_tokenizer(job.base)

    def on_progress(part: float) -> None:
        gate.wait()
        tell(events.Progress(at=time.time(), name="validating_files", part=part))

    job = replace(job, recipe=_with_date(job, tokenizer, processes))
    data = read_data(job.train, job.held_out, tokenizer, job.recipe, names=job.names, on_progress=on_progress)
    checked = data_report(data.train, data.held_out, tokenizer)
    tell(events.DataChecked(at=time.time(), report=checked.to_json()))
    if not processes.first:
        # All processes must cut steps alike: the first one decides, by the memory that it has.
        decided = processes.from_first(None)
        if decided is None:
            raise OtherProcessError("the first process could not plan the run")
        return Plan(decided[0], data, *decided[1:])
    decided = None
    try:
        plan = _plan(base, job, data)
        keep_template_date(job.recipe, job.folder)
        decided = (plan.recipe, plan.estimate, plan.identity)
    finally:
        processes.from_first(decided)
    if data.held_out is None and (job.recipe.metrics or job.recipe.patience):
        message = (
            "Nothing is held out: metrics and patience have no effect. Give eval data, or set eval_split."
        )
        tell(events.Notice(at=time.time(), level="warn", message=message))
    return plan


def _with_date(job: Job, tokenizer: Any, processes: ProcessGroup) -> Recipe:
    """The same day in all processes, also at midnight."""
    dated = None
    try:
        if processes.first:
            dated = pin_template_date(job.recipe, tokenizer, job.folder)
    finally:
        dated = processes.from_first(dated)
    if dated is None:
        raise OtherProcessError("the first process could not begin the run")
    return dated


def _plan(base: nn.Module, job: Job, data: Data) -> Plan:
    return make_plan(
        job.folder,
        job.recipe,
        data,
        job.base,
        base.config,
        memory_limit=job.memory_limit,
        base_resident=job.base_resident,
        rate=measured_rate(job.base.device, job.base.dtype),
    )


def run_plan(
    base: nn.Module, job: Job, plan: Plan, tell: Listen, gate: Gate, processes: ProcessGroup | None = None
) -> Report:
    """Train as planned. Raises as `train`."""
    processes = processes or ProcessGroup()
    recipe, data = plan.recipe, plan.data
    trainable = Trainable(base, recipe, gate, eva=_eva_batches(recipe, data.train))
    measuring = Measuring(trainable, load_tokenizer(job.base), recipe, data.held_out, job.folder, tell, gate)
    trainer = Trainer(
        trainable,
        make_objective(trainable, recipe),
        recipe,
        data.train,
        data.held_out,
        checkpoints=Checkpoints(job.folder / "checkpoints", recipe.keep),
        identity=plan.identity,
        listen=tell,
        processes=processes,
        on_evaluation=measuring.sample if processes.first else lambda step: None,
    )
    done = trainer.resume()
    tell(
        events.Planned(
            at=time.time(),
            recipe=recipe.to_json(),
            estimate=plan.estimate.to_json(),
            steps=plan.steps,
            first_step=done,
        )
    )
    metrics_before = measuring.base() if processes.first else {}
    tell(events.Phase(at=time.time(), name="training"))
    state = trainer.run()
    metrics_after = measuring.adapter() if processes.first else {}
    return _finish(job, plan, trainable, state, (metrics_before, metrics_after), tell, processes)


def load_tokenizer(base: BaseSettings) -> Any:
    """The base's own."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)


def _finish(
    job: Job,
    plan: Plan,
    trainable: Trainable,
    state: RunState,
    metrics: tuple[dict[str, float], dict[str, float]],
    tell: Listen,
    processes: ProcessGroup,
) -> Report:
    """Write the adapter and the report."""
    tell(events.Phase(at=time.time(), name="saving"))
    report = Report(
        name=job.name,
        base=job.base_name,
        quantization=job.base.quantization,
        steps=state.step,
        best_step=state.best_step or state.step,
        tokens=state.tokens,
        seconds=state.seconds,
        parameters=sum(parameter.numel() for parameter in trainable.parameters()),
        adapter_bytes=0,
        loss_before=state.base_loss,
        loss_after=state.best_loss,
        metrics_before=metrics[0],
        metrics_after=metrics[1],
        better=is_better(plan.recipe, (state.base_loss, state.best_loss), *metrics),
        losses=state.losses,
        held_out=state.held_out,
        recipe=plan.recipe.to_json(),
        peak_memory_bytes=peak_memory(trainable.device),
    )
    if processes.first:
        report = _write(job, plan, trainable, report)
    processes.wait()
    return report


def _write(job: Job, plan: Plan, trainable: Trainable, report: Report) -> Report:
    def card(size: int) -> str:
        known = replace(report, adapter_bytes=size)
        return model_card(known, repo=job.base_repo, commit=job.base_commit, data=_data_lines(plan.data))

    size = write_adapter(
        trainable.model,
        job.folder / ADAPTER,
        base=job.base_repo or job.base_name,
        commit=job.base_commit if job.base_repo else None,
        card=card,
        dtype=job.save_dtype,
    )
    report = replace(report, adapter_bytes=size)
    write_whole(job.folder / REPORT, json.dumps(report.to_json(), indent=1))
    return report


def _eva_batches(recipe: Recipe, data: Dataset) -> list[MicroBatch]:
    """What EVA looks at. It is looked at again when a run goes on, perhaps with other `micro_tokens`."""
    if recipe.init != "eva":
        return []
    numbers = range(min(len(data), _EVA_ROWS))
    longest = max(len(data.rows[number]) for number in numbers)
    return pack(data.rows, numbers, longest, packing=recipe.packing)


def _data_lines(data: Data) -> list[DataLine]:
    parts = [("train", data.train, data.train_name)]
    if data.held_out is not None:
        parts.append(("held out", data.held_out, data.held_out_name))
    lines = []
    for part, rows, name in parts:
        tokens = sum(map(len, rows.rows))
        targets = sum(map(targets_of, rows.rows))
        lines.append(DataLine(part, name, len(rows), tokens, targets, rows.digest))
    return lines


EVENTS = "events.jsonl"


@contextmanager
def recorded(folder: Path, listen: Listen, processes: ProcessGroup) -> Iterator[Listen]:
    """A listener that also keeps the events, but for those that only move a bar, in `events.jsonl`.

    Nothing is kept of a run that is refused because the folder is another one's.
    """
    if not processes.first:
        yield lambda event: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / EVENTS).open("ab+") as file:
        before = file.tell()
        if before and not _ends_a_line(file):
            file.write(b"\n")  # a process that was killed may have left half a line

        begun = False

        def tell(event: events.Event) -> None:
            nonlocal begun
            begun = begun or isinstance(event, events.Planned)
            if not isinstance(event, events.Progress):
                file.write(msgspec.json.encode(event) + b"\n")
                file.flush()
            listen(event)

        try:
            yield tell
        except CheckpointError:
            if not begun:
                file.truncate(before)
            raise


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
