"""Train from files to a finished adapter, for the command line and for a server's jobs.

A `TrainingRequest` is the request. `prepare` reads its data and makes a `TrainingPlan`: a recipe with every
"auto" decided, which fits into memory. A `PlannedRun` trains, and writes the adapter."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import torch
from torch import nn

from onebase_adapters.format.config import AdapterFormatError
from onebase_adapters.store.atomic_files import write_atomically
from onebase_engine.base.identity import base_id
from onebase_engine.base.layers import empty_base, whole_class
from onebase_engine.base.load import (
    BaseChangedError,
    BaseSettings,
    UnsupportedBaseError,
    fingerprint,
    load_config,
)
from onebase_engine.machine import is_out_of_memory, peak_memory
from onebase_training import events
from onebase_training.batches import MicroBatch, pack
from onebase_training.checkpoint import (
    CheckpointError,
    Checkpoints,
    DataLine,
    RunReport,
    all_better,
    doubts,
    is_better,
    model_card,
    save_peft,
    write_adapter,
)
from onebase_training.classes import Classifying, LabelledRow, class_report
from onebase_training.data.dataset import Dataset, check_labels, split
from onebase_training.data.reader import find_files, load_dataset
from onebase_training.data.report import report as data_report
from onebase_training.data.row_store import map_rows, rows_key, write_rows
from onebase_training.data.tokens import asks_for_date, reply_decoder, with_invocation
from onebase_training.estimate import Estimate, estimate, measured_rate
from onebase_training.events import Gate, Interrupted, LastStep, Listen
from onebase_training.loop import Scores, Trainer, TrainingDivergedError
from onebase_training.metrics import automatic_metrics
from onebase_training.objectives import make_objective
from onebase_training.parent import (
    ActiveVersion,
    FindActive,
    Parent,
    check_parent,
    why_not_comparable,
)
from onebase_training.processes import ProcessGroup
from onebase_training.recipe import (
    AUTO_EVAL_SPLIT,
    MODEL,
    MOST_HELD_OUT,
    NO_PARENT,
    Recipe,
    RecipeError,
    decided,
    parse_recipe,
    resolve,
    step_count,
    token_count,
)
from onebase_training.reinforcement import Policy, Rewarding, RewardTrainer, reward_scores
from onebase_training.replies import Measuring, Replies
from onebase_training.rollouts import RolloutSampler
from onebase_training.slices import (
    ACTIVE,
    LONGEST,
    SubjectMetrics,
    by_slice,
    mean_by_slice,
    paired_differences,
    slice_report,
)
from onebase_training.trainable import Trainable, resolve_parameters, resolve_targets

logger = logging.getLogger(__name__)
ADAPTER, REPORT, EVENTS = "adapter", "report.json", "events.jsonl"
_EVA_ROWS = 256
_PLAN, _DATE, _ROWS = "plan.json", "template_date", "rows"
_MEMORY = ("micro_tokens", "gradient_checkpointing")


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """Request of a training run: its data, its recipe, its base and its folder.

    train, held_out: files or Hub data sets; without `held_out` the recipe's split is held out. names: names
    of the two, if their paths do not have them. folder: the run's own; a run that is in it continues.
    base_repo: the base's name on the Hub, None if it has none. memory_limit: bytes that the process may take.
    base_resident: the base is another process's. save_dtype: of the tensors in the adapter's file.
    parent: the adapter that training continues; the recipe has its settings (`parent.continued`). base_id:
    identity of the base in the server that samples; a run that is not rewarded has no need of it.
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
    parent: Parent | None = None
    base_id: str = ""


class DoesNotFitError(Exception):
    """The run would take more memory than it may; the message says what to change."""

    def __init__(self, estimate: Estimate) -> None:
        super().__init__(estimate.advice)
        self.estimate = estimate


@dataclass(frozen=True)
class Data:
    """Tokenized rows, without `prompts` for training rows. `held_out` is None if nothing is held out. Names
    are for people.

    given: rows of a file of held-out data; 0 if there was none. key: of the rows in the job's folder; None if
    they cannot be stored there. kept: whether they are mapped from there. tokenizer: the base's.
    """

    train: Dataset
    held_out: Dataset | None
    train_name: str
    held_out_name: str
    tokenizer: Any
    given: int = 0
    key: str | None = None
    kept: bool = False


@dataclass(frozen=True)
class TrainingPlan:
    """A run that can start. identity: SHA-256 of recipe, data and base."""

    recipe: Recipe
    data: Data
    estimate: Estimate
    identity: str

    @property
    def steps(self) -> int:
        return step_count(self.recipe, len(self.data.train))


def train(
    load: Callable[[], nn.Module],
    job: TrainingRequest,
    listen: Listen,
    gate: Gate,
    processes: ProcessGroup | None = None,
    *,
    last_step: LastStep | None = None,
    find_active: FindActive = lambda: None,
    rollouts: RolloutSampler | None = None,
) -> RunReport:
    """Train an adapter; leaves `adapter/`, `report.json` and `events.jsonl` in the job's folder.

    Args:
        load: returns the base; it is called once the data is checked.
        find_active: returns the version that the adapter is compared with; for a run of one process.
        rollouts: samples and grades replies, for reinforcement; for a run of one process.

    Raises:
        UnsupportedBaseError: the base cannot be trained, besides what `load` raises.
        RolloutError: replies cannot be sampled or graded.
        DataError: a file has bad lines. RecipeError: a setting cannot be used on this base.
        DoesNotFitError: too little memory; nothing was started.
        TrainingDivergedError: a loss was not finite.
        CheckpointError: the folder holds another run, or a damaged one.
        Interrupted: by the gate; after a pause the same call continues the run.
        BaseChangedError: something wrote to the base. OSError: the disk is full, for instance.
    """
    processes = processes or ProcessGroup()
    with _recorded(job.folder, listen, processes) as record, torch.random.fork_rng(devices=[]):
        if job.recipe.method == "reinforcement" and (rollouts is None or processes.count > 1):
            raise RecipeError("method", _NO_ROLLOUTS)
        record(events.Phase(at=time.time(), name="validating_files"))
        rate = measured_rate(job.base.device, job.base.dtype) if processes.first else None
        plan = prepare(load_config(job.base.folder), job, record, gate, processes, rate=rate)
        if plan.data.held_out is None and (job.recipe.metrics or job.recipe.patience):
            record(events.Notice(at=time.time(), level="warn", message=_NOTHING_HELD_OUT))
        base = load()
        before = fingerprint(base)
        try:
            run = PlannedRun(
                base,
                job,
                plan,
                record,
                gate,
                processes,
                last_step=last_step,
                find_active=find_active,
                rollouts=rollouts if job.recipe.method == "reinforcement" else None,
            )
            run.train()
            report = run.finish()
        finally:
            if fingerprint(base) != before:
                raise BaseChangedError("training changed the base")
        record(events.Finished(at=time.time(), report=report.to_json()))
    return report


_NO_ROLLOUTS = (
    "reinforcement samples from a server, which grades the replies: begin a job there (onebase jobs create "
    "FILE --method reinforcement --grader GRADER)"
)
_NOTHING_HELD_OUT = (
    "Nothing is held out: metrics and patience have no effect. Give validation data, or set eval_split."
)


def prepare(
    config: Any,
    job: TrainingRequest,
    listen: Listen,
    gate: Gate,
    processes: ProcessGroup | None = None,
    *,
    rate: float | None,
    reread: bool = False,
) -> TrainingPlan:
    """Check the files and decide every "auto" setting; the plan is stored in the job's folder for the run.

    The first call in a folder reads the files and reports on them (DataChecked). It stores their rows,
    which later calls map: nothing is read, tokenized or reported twice. It needs the base's folder, but no
    base in memory. Raises as `train`.

    Args:
        config: the base's, from transformers. rate: FLOP/s of the machine, if known. reread: read the files
            even if rows are stored: a check that was killed may not have reported them.
    """
    processes = processes or ProcessGroup()
    tokenizer = load_tokenizer(job.base)

    def on_progress(part: float) -> None:
        gate.wait()
        listen(events.StageProgress(at=time.time(), name="validating_files", part=part))

    # The first process decides for all: on one day also at midnight, and by the memory that it has, since
    # all must cut steps alike.
    dated = processes.decide(lambda: with_template_date(job, tokenizer).recipe)
    job = replace(job, recipe=with_invocation(dated, tokenizer))
    here: list[Data] = []

    def decide() -> tuple[Any, ...]:
        data = read_data(job, tokenizer, on_progress, reread=reread)
        if not data.kept:
            checked = data_report(data.train, data.held_out, tokenizer)
            listen(events.DataChecked(at=time.time(), report=checked.to_json()))
        plan = make_plan(job, data, config, rate)
        keep_template_date(job)
        if data.kept or not keep_rows(job, data):
            here.append(data)
        return plan.recipe, plan.estimate, plan.identity, data.key

    recipe, estimate, identity, key = processes.decide(decide)
    # All processes train on the rows that the first has checked, and none holds them twice.
    data = here.pop() if here else _kept_data(job, key, tokenizer)
    if data is None:  # on another machine than the first
        data = read_data(job, tokenizer, on_progress)
        if identity_of(job, data) != identity:
            raise CheckpointError.other_run(job.folder)
    return TrainingPlan(recipe, data, estimate, identity)


class PlannedRun:
    """A run, continued from the last checkpoint in its folder if there is one. Raises as `train`."""

    def __init__(
        self,
        base: nn.Module,
        job: TrainingRequest,
        plan: TrainingPlan,
        listen: Listen,
        gate: Gate,
        processes: ProcessGroup | None = None,
        *,
        last_step: LastStep | None = None,
        find_active: FindActive = lambda: None,
        rollouts: RolloutSampler | None = None,
    ) -> None:
        recipe, data = plan.recipe, plan.data
        self._job, self._plan, self._listen, self._gate = job, plan, listen, gate
        self._find_active = find_active
        self._processes = processes or ProcessGroup()
        self._trainable = Trainable(
            base,
            recipe,
            gate,
            eva=_eva_batches(recipe, data.train),
            parent=job.parent,
            labels=data.train.labels,
        )
        self._policy = None if rollouts is None else Policy(rollouts, recipe, job.folder, job.base_id)
        self._measuring = self._measuring_of(self._trainable)
        make = Trainer if self._policy is None else partial(RewardTrainer, policy=self._policy)
        self._trainer = make(
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
            export=self._export,
            base_scores=self._base_scores if self._trainable.labels or self._policy else None,
            last_step=last_step,
        )
        self._before, self._parent = Replies(), Replies()

    def _measuring_of(self, trainable: Trainable) -> Measuring:
        job, recipe, data = self._job, self._plan.recipe, self._plan.data
        tokenizer, rest = data.tokenizer, (data.held_out, job.folder, self._listen, self._gate)
        if trainable.labels:
            return Classifying(trainable, tokenizer, recipe, data.train, *rest)
        if self._policy is not None:
            return Rewarding(trainable, tokenizer, recipe, *rest, policy=self._policy)
        return Measuring(trainable, tokenizer, recipe, *rest, asked=bool(job.recipe.metrics))

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
            self._before, self._parent = self._measuring.base(), self._measuring.parent()
        self._listen(events.Phase(at=time.time(), name="training"))
        self._trainer.run_steps(until)
        return self._trainer.finished

    def finish(self) -> RunReport:
        """Measure the adapter, and write it with its report."""
        job, recipe, state = self._job, self._plan.recipe, self._trainer.state
        after = self._measuring.adapter() if self._processes.first else Replies()
        active = self._measure_active()
        slices, better_than = self._slices(after, active), self._better_than(after.metrics, active)
        warnings = self._doubts(all_better(better_than), after, active)
        self._listen(events.Phase(at=time.time(), name="saving"))
        report = RunReport(
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
            metrics_before=self._before.metrics,
            metrics_after=after.metrics,
            better=all_better(better_than),
            better_than=better_than,
            active=active.digest if active else "",
            loss_active=active.loss if active else None,
            metrics_active=active.replies.metrics if active else {},
            not_compared=active.problem if active else "",
            warnings=warnings,
            replies=self._shown_replies(after, active),
            losses=state.losses,
            held_out=state.held_out,
            recipe=recipe.to_json(),
            peak_memory_bytes=peak_memory(self._trainable.device),
            parent=job.parent.label if job.parent else "",
            loss_parent=state.parent_loss,
            metrics_parent=self._parent.metrics,
            slices=slices,
            paired=self._paired(after, active),
            classes=self._classes(after),
        )
        if self._processes.first:
            report = self._write(report)
        self._processes.wait()
        return report

    def _doubts(self, better: bool | None, after: Replies, active: _Active | None) -> list[str]:
        """Return the reasons why an adapter that is called better may not be; each is an event too."""
        subjects = {"base": self._before, "parent": self._parent}
        if active is not None:
            subjects[ACTIVE] = active.replies
        metrics = {name: replies.metrics for name, replies in subjects.items()}
        found = doubts(better, self._plan.recipe.best_by, metrics, after.metrics)
        for message in found:
            self._listen(events.Notice(at=time.time(), level="warn", message=message))
        return found

    def _shown_replies(self, after: Replies, active: _Active | None) -> list[dict[str, Any]]:
        """Return the first held-out rows with what each subject replied to them."""
        if not self._processes.first or not after.texts:
            return []
        subjects = {"base": self._before.texts, "parent": self._parent.texts}
        subjects[ACTIVE] = active.replies.texts if active is not None else []
        subjects["adapter"] = after.texts
        rewards = self._rewards_of(after, active)
        return [
            row
            | {name: texts[number][:LONGEST] for name, texts in subjects.items() if texts}
            | ({"rewards": {name: given[number] for name, given in rewards.items()}} if rewards else {})
            for number, row in enumerate(self._measuring.shown())
        ]

    def _rewards_of(self, after: Replies, active: _Active | None) -> dict[str, list[float]]:
        """Return each subject's rewards, by held-out prompt; none without a grader."""
        if self._policy is None:
            return {}
        subjects = {"base": self._before, "parent": self._parent, "adapter": after}
        if active is not None:
            subjects[ACTIVE] = active.replies
        return {name: [-loss for loss in one.losses] for name, one in subjects.items() if one.losses}

    def _base_scores(self) -> Scores:
        """Return the scores of the base, which has no head, or of its replies, on the held-out rows."""
        losses, metrics = self._before.losses, self._before.metrics
        if self._policy is not None:
            return reward_scores([-loss for loss in losses])
        return Scores.from_means(sum(losses) / len(losses), {"accuracy": metrics["accuracy"]})

    def _classes(self, after: Replies) -> dict[str, Any] | None:
        rows = [row for row in self._measuring.prompts if isinstance(row, LabelledRow)]
        if not rows or not self._processes.first:
            return None
        return class_report(self._trainable.labels, rows, self._before, after)

    def _slices(self, after: Replies, active: _Active | None) -> dict[str, Any] | None:
        """Return the changes in each slice of the held-out rows, against the start of training, and against
        the active version if that was measured."""
        held_out = self._plan.data.held_out
        rows = {} if held_out is None else {name: len(part) for name, part in by_slice(held_out).items()}
        if not rows:
            return None
        self._listen(events.Phase(at=time.time(), name="measuring", message="slices"))
        before, against = (self._before, "base") if self._job.parent is None else (self._parent, "parent")
        begun = self._slice_losses(before, at_start=True)
        rewards = self._rewards_of(after, active)
        subjects = {against: SubjectMetrics(begun, before.texts, rewards.get(against, ()))}
        if active is not None and not active.problem:
            losses = begun if active.is_parent else active.slices
            subjects[ACTIVE] = SubjectMetrics(losses, active.replies.texts, rewards.get(ACTIVE, ()))
        return slice_report(
            self._plan.recipe,
            rows,
            self._measuring.prompts if self._processes.first else [],
            subjects,
            SubjectMetrics(self._slice_losses(after), after.texts, rewards.get("adapter", ())),
        )

    def _paired(self, after: Replies, active: _Active | None) -> dict[str, Any]:
        """Return how the result's scores differ from those of the base and of the active version."""
        if not self._processes.first:
            return {}
        replies = {"base": self._before.texts}
        if active is not None and not active.problem:
            replies[ACTIVE] = active.replies.texts
        rewards = self._rewards_of(after, active)
        return paired_differences(self._plan.recipe, self._measuring.prompts, replies, after.texts, rewards)

    def _slice_losses(self, replies: Replies, *, at_start: bool = False) -> dict[str, float]:
        """Return the held-out loss of each slice.

        Args:
            replies: of the subject; for labels they have the losses.
            at_start: of the start of training, instead of the adapter as it is now.
        """
        if self._trainable.labels or self._policy is not None:
            return mean_by_slice(self._measuring.prompts, replies.losses)
        with self._trainable.at_start() if at_start else nullcontext():
            return self._trainer.slice_losses()

    def _measure_active(self) -> _Active | None:
        """Measure the version that the adapter would replace on the same held-out rows, if there is one.

        An error is reported, and does not end the run. Raises Interrupted, torch.AcceleratorError.
        """
        found = self._find_active()
        if found is None:
            return None
        try:
            active = self._active(found)
        except (Interrupted, torch.AcceleratorError):
            raise
        except Exception as error:
            active = _Active(found.digest, problem=_problem_of(error, found.label))
        gc.collect()  # the version's view of the base, which holds itself
        if active.problem:
            message = f"{found.label}, which is active, is not compared with: {active.problem}."
            self._listen(events.Notice(at=time.time(), level="warn", message=message))
        return active

    def _active(self, found: ActiveVersion) -> _Active:
        """Measure the version, or return the problem. Raises what loading and computing raise."""
        active, parent, held_out = _Active(found.digest), self._job.parent, self._plan.data.held_out
        if held_out is None:
            return replace(active, problem="nothing is held out")
        if parent is not None and parent.digest == found.digest:  # it was measured at the start
            loss = self._trainer.state.parent_loss
            return replace(active, loss=loss, replies=self._parent, is_parent=True)
        if found.version is None:
            return replace(active, problem=found.problem)
        if problem := why_not_comparable(found.version, self._trainable.labels):
            return replace(active, problem=problem)
        message = f"Measuring {found.label}, which is active, on the held-out rows."
        self._listen(events.Phase(at=time.time(), name="measuring", message="active version"))
        self._listen(events.Notice(at=time.time(), level="info", message=message))
        self._trainer.release_optimizer()
        trainable = Trainable(self._trainable.base, self._plan.recipe, self._gate, version=found.version)
        if set(trainable.labels) != set(self._trainable.labels):
            return replace(active, problem="its labels have no names")
        return self._on_rows(held_out, active, trainable, found.label)

    def _on_rows(self, held_out: Dataset, active: _Active, trainable: Trainable, label: str) -> _Active:
        """Return the active version with its figures. trainable: its model."""
        trainer, measuring = self._trainer, self._measuring_of(trainable)
        replies = measuring.active()
        with trainer.measuring(trainable):
            scores = trainer.held_out_scores(held_out)
            if trainable.labels or self._policy is not None:
                slices = mean_by_slice(measuring.prompts, replies.losses)
            else:
                slices = trainer.slice_losses()
        evaluated = events.Evaluated(
            at=time.time(),
            step=trainer.state.step,
            loss=scores.loss,
            best=False,
            active=label,
            **trainer.figures(scores),
        )
        self._listen(evaluated)
        return replace(active, loss=scores.loss, replies=replies, slices=slices)

    def _export(self, folder: Path) -> None:
        """Write the adapter as it is now, for servers of a checkpoint."""
        base, commit = self._base_as_named()
        save_peft(self._trainable.model, folder, base=base, commit=commit)

    def _base_as_named(self) -> tuple[str, str | None]:
        """Return the base's name for an adapter's config, and the commit on the Hub."""
        job = self._job
        return job.base_repo or job.base_name, job.base_commit if job.base_repo else None

    def _better_than(self, after: dict[str, float], active: _Active | None) -> dict[str, bool | None]:
        """Return whether the adapter is better than the base, than its parent and than the active version, if
        these exist; None for one that was not measured."""
        state = self._trainer.state
        subjects = {"base": (state.base_loss, self._before.metrics)}
        if self._job.parent is not None:
            subjects["parent"] = state.parent_loss, self._parent.metrics
        if active is not None:
            subjects[ACTIVE] = active.loss, active.replies.metrics
        return {
            name: is_better(self._plan.recipe, (loss, state.best_loss), metrics, after)
            for name, (loss, metrics) in subjects.items()
        }

    def _write(self, report: RunReport) -> RunReport:
        job = self._job

        def card(size: int) -> str:
            known = replace(report, adapter_bytes=size)
            lines = _data_lines(self._plan.data)
            loader = whole_class(self._trainable.base.config).__name__
            return model_card(known, repo=job.base_repo, commit=job.base_commit, data=lines, loader=loader)

        base, commit = self._base_as_named()
        size = write_adapter(
            self._trainable.model,
            job.folder / ADAPTER,
            base=base,
            commit=commit,
            card=card,
            dtype=job.save_dtype,
        )
        report = replace(report, adapter_bytes=size)
        write_atomically(job.folder / REPORT, json.dumps(report.to_json(), indent=1))
        return report


@dataclass(frozen=True)
class _Active:
    """The version that was active when training ended, on the held-out rows.

    problem: reason why it was not measured. is_parent: training continued from it.
    """

    digest: str
    loss: float | None = None
    replies: Replies = field(default_factory=Replies)
    slices: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""
    is_parent: bool = False


def _problem_of(error: Exception, label: str) -> str:
    """Return the reason why a version could not be measured; the log has details of an unexpected error."""
    if is_out_of_memory(error):
        return "memory is short"
    if isinstance(error, AdapterFormatError | OSError | TrainingDivergedError | UnsupportedBaseError):
        return str(error).rstrip(".")
    logger.error("%s could not be measured", label, exc_info=error)
    return f"{type(error).__name__}: {error}".rstrip(".")


def _eva_batches(recipe: Recipe, data: Dataset) -> list[MicroBatch]:
    """Return the rows that EVA reads: the same when a run is resumed, even with other `micro_tokens`."""
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
    """Yield a listener that also writes events to `events.jsonl`, except those that only move a bar.

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
            if not isinstance(event, events.StageProgress):
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


def load_tokenizer(base: BaseSettings) -> Any:
    """Return the base's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)


def read_data(
    job: TrainingRequest, tokenizer: Any, on_progress: Callable[[float], None], *, reread: bool = False
) -> Data:
    """Read both files of a job, or one of which a part is held out, or map the rows that `keep_rows` stored.

    Args:
        on_progress: called with the part that is read, from 0 to 1. What it raises ends the reading.
        reread: read the files even if rows are stored.

    Raises:
        DataError: a file has bad lines.
    """
    files = [find_files(job.train, "train")]
    if job.held_out is not None:
        files.append(find_files(job.held_out, "eval"))
    key = _rows_key(job, files)
    if not reread and (kept := _kept_data(job, key, tokenizer)) is not None:
        return kept
    rows = _read_rows(job, tokenizer, files, on_progress)
    if key != _rows_key(job, files):
        key = None  # a file was written to while it was read
    return _data(job, rows, tokenizer, key, kept=False)


_TRAIN, _HELD_OUT = "train", "held_out"


def _kept_data(job: TrainingRequest, key: str | None, tokenizer: Any) -> Data | None:
    """Return the rows that `keep_rows` stored under this key, or None."""
    rows = None if key is None else map_rows(job.folder / _ROWS, key, reply_decoder(tokenizer))
    return None if rows is None else _data(job, rows, tokenizer, key, kept=True)


def _data(
    job: TrainingRequest, rows: Mapping[str, Dataset], tokenizer: Any, key: str | None, *, kept: bool
) -> Data:
    held_out, name = rows.get(_HELD_OUT), job.names[0] or Path(job.train).name
    if job.held_out is None or held_out is None:
        held_out_name, given = f"held out of {name}", 0
    else:
        held_out_name, given = job.names[1] or Path(job.held_out).name, len(held_out)
    return Data(rows[_TRAIN], held_out, name, held_out_name, tokenizer, given, key, kept)


def _read_rows(
    job: TrainingRequest,
    tokenizer: Any,
    files: Sequence[Sequence[Path]],
    on_progress: Callable[[float], None],
) -> dict[str, Dataset]:
    """Return the rows to train on, and the held-out ones, if there are any."""
    recipe, (name, held_out_name) = job.recipe, job.names
    load = partial(load_dataset, tokenizer=tokenizer, recipe=recipe)
    part = 1 / len(files)
    rows = load(job.train, name=name, files=files[0], on_progress=lambda done: on_progress(done * part))
    if job.held_out is not None:
        held_out = load(
            job.held_out,
            part="eval",
            name=held_out_name,
            files=files[1],
            on_progress=lambda done: on_progress(part + done * part),
        )
    elif recipe.eval_split == "auto":
        rows, held_out = split(rows, AUTO_EVAL_SPLIT, recipe.seed, limit=MOST_HELD_OUT)
    else:
        rows, held_out = split(rows, recipe.eval_split, recipe.seed, limit=len(rows))
    if recipe.method == "classification":
        check_labels(rows, held_out)
    parts = {_TRAIN: replace(rows, prompts=())}
    return parts | {_HELD_OUT: held_out} if len(held_out) else parts


def keep_rows(job: TrainingRequest, data: Data) -> bool:
    """Write rows into the job's folder, where `read_data` finds them. Returns whether they are there.

    A run can do without; a full disk is reported when it writes what it needs.
    """
    if data.key is None:
        return False
    parts = {_TRAIN: data.train} | ({} if data.held_out is None else {_HELD_OUT: data.held_out})
    try:
        write_rows(job.folder / _ROWS, data.key, parts)
    except OSError:
        return False
    return True


def _rows_key(job: TrainingRequest, files: Sequence[Sequence[Path]]) -> str | None:
    """Return the key in Data, over all of the recipe but its memory settings, which a continued run may
    change."""
    settings = {name: value for name, value in job.recipe.to_json().items() if name not in _MEMORY}
    return rows_key(settings, job.base.folder, files)


def make_plan(job: TrainingRequest, data: Data, config: Any, rate: float | None = None) -> TrainingPlan:
    """Decide all "auto" settings, or read those decided when the run in the job's folder began to compute.

    Args:
        config: the base's, from transformers. rate: FLOP/s of the machine, if known.

    Raises:
        DoesNotFitError, RecipeError.
        CheckpointError: the folder holds another run.
    """
    if not len(data.train):
        raise RecipeError("training_file", "no row is left to train on: add rows, or hold out fewer")
    if job.parent is not None and job.recipe.method == "classification":
        raise RecipeError(MODEL, NO_PARENT)
    identity = identity_of(job, data)

    def decide(before: Recipe | None) -> TrainingPlan:
        recipe = before or _of_parent(resolved(job.recipe, data, config), job, config)
        found = _estimate(job, recipe, data, config, rate)
        return TrainingPlan(found.applied_to(recipe), data, found, identity)

    before = _read(job, identity)
    plan = decide(before)
    if not plan.estimate.fits and not Checkpoints(job.folder / "checkpoints", job.recipe.keep).steps():
        # Nothing was computed yet, perhaps by a plan for another machine.
        plan = decide(None)
        if not plan.estimate.fits:
            raise DoesNotFitError(plan.estimate)
    if plan.recipe != before:
        job.folder.mkdir(parents=True, exist_ok=True)
        held = {"identity": identity, "recipe": plan.recipe.to_json()}
        write_atomically(job.folder / _PLAN, json.dumps(held, indent=1))
    return plan


def _of_parent(recipe: Recipe, job: TrainingRequest, config: Any) -> Recipe:
    """Return the recipe, which must agree with the job's parent, with short names of layers if they are
    equivalent.

    Raises RecipeError.
    """
    if job.parent is None:
        return recipe
    model = empty_base(config)
    check_parent(recipe, job.parent, model)
    names = *resolve_targets(model, recipe.targets), *resolve_parameters(model, recipe.targets)
    return replace(recipe, targets=names)


def _estimate(job: TrainingRequest, recipe: Recipe, data: Data, config: Any, rate: float | None) -> Estimate:
    rows, held_out = data.train.rows, data.held_out.rows if data.held_out is not None else ()
    tokens, longest = sum(map(len, rows)), max(map(len, [*rows, *held_out]))
    supervised = sum(row.targets for row in rows)
    supervised_part = supervised / max(1, tokens)
    if recipe.method == "reinforcement":  # replies of half the length that they may have
        tokens += len(rows) * recipe.sample_tokens // 2
        longest += recipe.sample_tokens
        # Memory must do for a micro-batch of the shortest prompts whose replies are as long as they may be.
        supervised_part = recipe.sample_tokens / (min(map(len, rows)) + recipe.sample_tokens)
    total = token_count(recipe, len(rows), tokens)
    if recipe.method == "reinforcement":
        total *= decided(recipe.group_size) * recipe.updates
    return estimate(
        config,
        recipe,
        quantization=job.base.quantization,
        dtype=job.base.dtype,
        device=job.base.device,
        longest_row=longest,
        total_tokens=total,
        supervised_part=supervised_part,
        labels=len(data.train.labels),
        memory_limit=_memory_for_run(job),
        base_resident=job.base_resident,
        rate=rate,
    )


def _memory_for_run(job: TrainingRequest) -> int | None:
    """Return the bytes that the run itself may take, less two copies of the parent's weights."""
    if job.memory_limit is None or job.parent is None:
        return job.memory_limit
    return max(0, job.memory_limit - 2 * job.parent.weights.stat().st_size)


def resolved(recipe: Recipe, data: Data, config: Any) -> Recipe:
    """Return the recipe with all decided except what depends on memory, with the metrics that suit the
    held-out rows they are measured on where none are named. `config`: the base's."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**20
    found = resolve(recipe, rows=len(data.train), held_out=data.given, base_limit=limit)
    own_measure = found.method in ("classification", "reinforcement")
    if found.metrics or own_measure or not found.metric_rows or data.held_out is None:
        return found
    measured = data.held_out.prompts[: found.metric_rows]
    references = ((prompt.reference, len(prompt.reply)) for prompt in measured)
    return replace(found, metrics=automatic_metrics(references))


def identity_of(job: TrainingRequest, data: Data) -> str:
    """Return the SHA-256 of recipe, data and base, by which a folder recognizes its run."""
    settings = {"quantization": job.base.quantization, "dtype": str(job.base.dtype)}
    held_out = data.held_out.digest if data.held_out is not None else ""
    # Only what was asked for: a setting that a later release adds must not make it another run.
    # How much is computed at once may change: a run that needed too much memory continues with less.
    defaults = Recipe().to_json()
    asked = {
        name: value
        for name, value in job.recipe.to_json().items()
        if value != defaults.get(name) and name not in _MEMORY
    }
    parts = [asked, data.train.digest, held_out, base_id(job.base.folder, settings)]
    if job.parent is not None:
        parts.append(job.parent.digest)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(job: TrainingRequest, identity: str) -> Recipe | None:
    """Return the recipe decided when the run in the folder began, with the memory settings of this job."""
    path = job.folder / _PLAN
    if not path.exists():
        return None
    try:
        held = json.loads(path.read_text())
        if held["identity"] == identity:
            asked = {name: value for name in _MEMORY if (value := getattr(job.recipe, name)) != "auto"}
            return parse_recipe({**held["recipe"], **asked})
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError.unreadable(path, error) from error
    raise CheckpointError.other_run(job.folder)


def with_template_date(job: TrainingRequest, tokenizer: Any) -> TrainingRequest:
    """Return the job with the day on which the run in its folder began; unchanged if the template prints
    none.

    A chat template that prints today's date, as Llama 3.2's does, would write other rows after midnight.
    The day is today, until `keep_template_date`. Raises CheckpointError, OSError.
    """
    if job.recipe.template_date != "auto" or not asks_for_date(tokenizer):
        return job
    path = job.folder / _DATE
    try:
        day = date.fromisoformat(path.read_text()).isoformat()
    except FileNotFoundError:
        day = date.today().isoformat()
    except ValueError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): remove {job.folder} to start over"
        ) from error
    return replace(job, recipe=replace(job.recipe, template_date=day))


def keep_template_date(job: TrainingRequest) -> None:
    """Store the day on which the run begins; it continues with this date on another day. Raises OSError."""
    path = job.folder / _DATE
    if job.recipe.template_date != "auto" and not path.exists():
        job.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, job.recipe.template_date)
