"""One training run from its files to a finished adapter: the command line and a server's jobs both do it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import torch
from torch import nn

from onebase_adapters.store.atomic_files import write_atomically
from onebase_adapters.training import events
from onebase_adapters.training.batches import MicroBatch, pack
from onebase_adapters.training.checkpoint import CheckpointError, Checkpoints
from onebase_adapters.training.data.dataset import Dataset
from onebase_adapters.training.data.report import report as data_report
from onebase_adapters.training.events import Gate, Listen
from onebase_adapters.training.loop import Trainer
from onebase_adapters.training.machine import measured_rate
from onebase_adapters.training.measuring import Measuring
from onebase_adapters.training.objectives import make_objective
from onebase_adapters.training.plan import (
    Data,
    Job,
    Plan,
    keep_template_date,
    load_tokenizer,
    make_plan,
    read_data,
    with_template_date,
)
from onebase_adapters.training.process_group import ProcessGroup
from onebase_adapters.training.recipe import Recipe
from onebase_adapters.training.result import DataLine, Report, is_better, model_card, write_adapter
from onebase_adapters.training.trainable import Trainable
from onebase_engine.base.load import BaseChangedError, fingerprint
from onebase_engine.machine import peak_memory

ADAPTER, REPORT, EVENTS = "adapter", "report.json", "events.jsonl"
_EVA_ROWS = 256


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
    with _recorded(job.folder, listen, processes) as record, torch.random.fork_rng(devices=[]):
        try:
            record(events.Phase(at=time.time(), name="validating_files"))
            rate = measured_rate(job.base.device, job.base.dtype) if processes.first else None
            plan = prepare(base.config, job, record, gate, processes, rate=rate)
            if plan.data.held_out is None and (job.recipe.metrics or job.recipe.patience):
                record(events.Notice(at=time.time(), level="warn", message=_NOTHING_HELD_OUT))
            run = PlannedRun(base, job, plan, record, gate, processes)
            run.train()
            report = run.finish()
        finally:
            if fingerprint(base) != before:
                raise BaseChangedError("training changed the base")
        record(events.Finished(at=time.time(), report=report.to_json()))
    return report


_NOTHING_HELD_OUT = (
    "Nothing is held out: metrics and patience have no effect. Give eval data, or set eval_split."
)


def prepare(
    config: Any,
    job: Job,
    listen: Listen,
    gate: Gate,
    processes: ProcessGroup | None = None,
    *,
    rate: float | None,
) -> Plan:
    """Check the files and decide everything that is "auto"; it is kept in the job's folder for the run.

    Needs the base's folder, but nothing of it in memory. Raises as `train`.

    Args:
        config: the base's, from transformers. rate: FLOP/s of the machine, if known.
    """
    processes = processes or ProcessGroup()
    tokenizer = load_tokenizer(job.base)

    def on_progress(part: float) -> None:
        gate.wait()
        listen(events.Progress(at=time.time(), name="validating_files", part=part))

    # The first process decides for all: on one day also at midnight, and by the memory that it has, since
    # all must cut steps alike.
    job = replace(job, recipe=processes.decide(lambda: with_template_date(job, tokenizer).recipe))
    data = read_data(job, tokenizer, on_progress)
    checked = data_report(data.train, data.held_out, tokenizer)
    listen(events.DataChecked(at=time.time(), report=checked.to_json()))

    def decide() -> tuple[Any, ...]:
        plan = make_plan(job, data, config, rate)
        keep_template_date(job)
        return plan.recipe, plan.estimate, plan.identity

    recipe, estimate, identity = processes.decide(decide)
    return Plan(recipe, data, estimate, identity)


class PlannedRun:
    """A run that goes on from the last checkpoint in its folder, if there is one. Raises as `train`."""

    def __init__(
        self,
        base: nn.Module,
        job: Job,
        plan: Plan,
        listen: Listen,
        gate: Gate,
        processes: ProcessGroup | None = None,
    ) -> None:
        recipe, data = plan.recipe, plan.data
        self._job, self._plan, self._listen = job, plan, listen
        self._processes = processes or ProcessGroup()
        self._trainable = Trainable(base, recipe, gate, eva=_eva_batches(recipe, data.train))
        self._measuring = Measuring(
            self._trainable, load_tokenizer(job.base), recipe, data.held_out, job.folder, listen, gate
        )
        self._trainer = Trainer(
            self._trainable,
            make_objective(self._trainable, recipe),
            recipe,
            data.train,
            data.held_out,
            checkpoints=Checkpoints(job.folder / "checkpoints", recipe.keep),
            identity=plan.identity,
            listen=listen,
            processes=self._processes,
            on_evaluation=self._measuring.sample if self._processes.first else lambda step: None,
        )
        self._metrics_before: dict[str, float] = {}

    def train(self, until: int | None = None) -> bool:
        """Train to the end, or until a step, where it leaves a checkpoint. Returns whether it is finished."""
        planned = events.Planned(
            at=time.time(),
            recipe=self._plan.recipe.to_json(),
            estimate=self._plan.estimate.to_json(),
            steps=self._plan.steps,
            first_step=self._trainer.resume(),
        )
        self._listen(planned)
        if self._processes.first:
            self._metrics_before = self._measuring.base()
        self._listen(events.Phase(at=time.time(), name="training"))
        self._trainer.run(until)
        return self._trainer.finished

    def finish(self) -> Report:
        """Measure the adapter, and write it with its report."""
        job, recipe, state = self._job, self._plan.recipe, self._trainer.state
        metrics = self._metrics_before, self._measuring.adapter() if self._processes.first else {}
        self._listen(events.Phase(at=time.time(), name="saving"))
        report = Report(
            name=job.name,
            base=job.base_name,
            quantization=job.base.quantization,
            steps=state.step,
            best_step=state.best_step or state.step,
            tokens=state.tokens,
            seconds=state.seconds,
            parameters=sum(parameter.numel() for parameter in self._trainable.parameters()),
            adapter_bytes=0,
            loss_before=state.base_loss,
            loss_after=state.best_loss,
            metrics_before=metrics[0],
            metrics_after=metrics[1],
            better=is_better(recipe, (state.base_loss, state.best_loss), *metrics),
            losses=state.losses,
            held_out=state.held_out,
            recipe=recipe.to_json(),
            peak_memory_bytes=peak_memory(self._trainable.device),
        )
        if self._processes.first:
            report = self._write(report)
        self._processes.wait()
        return report

    def _write(self, report: Report) -> Report:
        job = self._job

        def card(size: int) -> str:
            known = replace(report, adapter_bytes=size)
            lines = _data_lines(self._plan.data)
            return model_card(known, repo=job.base_repo, commit=job.base_commit, data=lines)

        size = write_adapter(
            self._trainable.model,
            job.folder / ADAPTER,
            base=job.base_repo or job.base_name,
            commit=job.base_commit if job.base_repo else None,
            card=card,
            dtype=job.save_dtype,
        )
        report = replace(report, adapter_bytes=size)
        write_atomically(job.folder / REPORT, json.dumps(report.to_json(), indent=1))
        return report


def _eva_batches(recipe: Recipe, data: Dataset) -> list[MicroBatch]:
    """The rows that EVA reads: the same when a run is resumed, even with other `micro_tokens`."""
    if recipe.init != "eva":
        return []
    numbers = range(min(len(data), _EVA_ROWS))
    longest = max(len(data.rows[number]) for number in numbers)
    return pack(data.rows, numbers, longest, packing=recipe.packing)


def _data_lines(data: Data) -> list[DataLine]:
    parts = [("train", data.train, data.train_name)]
    if data.held_out is not None:
        parts.append(("held out", data.held_out, data.held_out_name))
    return [
        DataLine(
            part,
            name,
            len(data),
            sum(map(len, data.rows)),
            sum(row.targets for row in data.rows),
            data.digest,
        )
        for part, data, name in parts
    ]


@contextmanager
def _recorded(folder: Path, listen: Listen, processes: ProcessGroup) -> Iterator[Listen]:
    """A listener that also writes events to `events.jsonl`, except those that only move a bar.

    A run that is refused because the folder is another run's leaves no events there.
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

        def record(event: events.Event) -> None:
            nonlocal begun
            begun = begun or isinstance(event, events.Planned)
            if not isinstance(event, events.Progress):
                file.write(msgspec.json.encode(event) + b"\n")
                file.flush()
            listen(event)

        try:
            yield record
        except CheckpointError:
            if not begun:
                file.truncate(before)
            raise


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
