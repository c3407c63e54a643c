"""Live adapters on one base: each operation is done once, in its model's order, and survives the process.

What an operation changes is in memory until a point is written: weights, gradients since the last step and
the optimizer's state, atomically. A new process reads the newest point, repeats the operations since then
that have a result, for the state alone, and continues. On the CPU the bits are those of a process that was
never killed, since a model's operations depend on nothing but the model: only on a GPU, where bits depend on
more than the rows, do rows of several models share a pass.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import importlib.util
import logging
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from onebase_adapters.proof.extract import extract
from onebase_adapters.store.atomic_files import atomic_directory
from onebase_adapters.store.blobs import FULL, version_digest
from onebase_engine.base.load import BaseChangedError, longest_row
from onebase_engine.lora.packed_adapter import write_packed_adapter
from onebase_engine.machine import is_out_of_memory
from onebase_training.batches import Packed, first_fit
from onebase_training.checkpoint import CONFIG, WEIGHTS, save_peft
from onebase_training.datum_losses import Loss, Row, check_row, find_loss, target_logprobs
from onebase_training.events import Gate, Interrupted
from onebase_training.live_operations import (
    CheckpointFolder,
    Computed,
    DenseArray,
    ForwardBackward,
    Load,
    Loaded,
    ModelSpec,
    Operation,
    OptimStep,
    ParentCheckpoint,
    Refuse,
    Refused,
    RefusedError,
    Result,
    Save,
    StartingWeights,
    Stepped,
    WeightsSaved,
)
from onebase_training.live_store import (
    CHECKPOINT,
    ENCRYPTED,
    PACKED,
    RESULT,
    RESULTS_KEPT,
    START,
    LiveStore,
    Made,
    UnknownLiveModelError,
    encoded,
    read_checkpoint,
)
from onebase_training.parent import Parent, modules_of
from onebase_training.recipe import HIGHEST_RANK, Recipe, RecipeError, decided
from onebase_training.replies import Scorer, ScoringError
from onebase_training.trainable import ADAPTER, Trainable, head_name, joined, target_parameters

MICRO_TOKENS = 1024
"""Tokens computed in one pass, whatever the memory: other passes would add up to other last bits."""
JOINED_BYTES = 4 << 20
"""Largest operation, in bytes, that is read to find out whether it fits into a pass of several models."""
CHECKPOINTING_BYTES = 1 << 30
"""Size of a base from which on activations are computed twice instead of kept."""
HIGHEST_SETTING = 1e6
"""Largest learning rate, weight decay, epsilon and norm: what AdamW makes of them is a number of fp32."""
POINT_SECONDS = 30.0
"""Time of computing, in seconds, that a process that begins again may have to do over. The first step after
that time writes a point."""
STEPLESS_POINTS = 4
"""Multiple of that time from which on a point is written after a backward pass too, with its gradients."""
POINT_OPERATIONS = RESULTS_KEPT // 2
"""Number of a model's operations after which a point is written however little they computed: without one no
operation's file is deleted, and no result's."""
RETRY_SECONDS = 60.0
"""Longest pause, in seconds, before a model for which there was no memory is tried again, while tries are
quick. The first pause is one second, and each is twice the one before it."""
PAUSE_BY_TRY = 10.0
"""Least pause before the next try, as a multiple of the time that the last try took."""
SHORTAGE_SECONDS = 600.0
"""Time, in seconds, after which a model is broken that finds no memory though no other model is loaded. While
none is, no pause between two tries is longer than half of it."""
_OPTIMIZER, _STATE, _META = "optimizer.safetensors", "state.safetensors", "state.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_NO_MEMORY = "out_of_memory"
STATE_BYTES = 20
"""Bytes that a trained parameter takes: itself, two gradients and two moments of Adam, in fp32."""
OWNER_SHARE = 0.5
"""Largest part of the trainer's memory for the models of one owner who has several."""
MODELS_SHARE = 0.8
"""Largest part of the trainer's memory for all models, if there are several. Passes need the rest."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseName:
    """Name of the base in an adapter's config, and its commit on the Hub, if it has one."""

    name: str
    commit: str | None = None


class _Meta(msgspec.Struct, frozen=True):
    """A model's state that is no tensor."""

    steps: int
    parent: ParentCheckpoint | None = None


class LiveModel:
    """One live adapter in memory: its weights, the gradients added up since the last step, and Adam's state.

    Args:
        start: the version of an adapter that it begins with; None: new weights on the base.

    Raises RecipeError: the base has no layers that were asked for, or the rank is too high; or the version is
    none of this base, or of a kind that is not trained here.
    """

    def __init__(
        self,
        base: nn.Module,
        spec: ModelSpec,
        gate: Gate,
        name: BaseName,
        scorer: Scorer,
        start: Parent | None = None,
    ) -> None:
        self.spec = spec
        self.steps = 0
        self._parent = None if start is None else _parent_of(start)
        self._scorer = scorer
        self._name = name
        self._recipe = _recipe(base, spec, start)
        self.trainable = Trainable(base, self._recipe, gate, parent=start, keeps_start=False)
        self._words = int(base.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
        self._longest = longest_row(base.config) or 2**20
        self._parameters = self.trainable.named_parameters()
        self.gradients: dict[str, torch.Tensor] | None = None
        """Sums of the passes since the last step, by parameter; each pass makes new ones."""
        self._reset_optimizer()

    @property
    def targets(self) -> list[str]:
        """Names of the layers that are trained, as PEFT's config has them."""
        config = self.trainable.model.peft_config[ADAPTER]
        return sorted([*config.target_modules, *(config.target_parameters or ())])

    @property
    def parameters(self) -> int:
        """Number of trained numbers."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    # ---- computing -----------------------------------------------------------------------------

    @property
    def joins(self) -> bool:
        """Return True if the model's passes can be computed together with those of others."""
        return self.trainable.lora_layers() is not None

    def forward_backward(self, operation: ForwardBackward) -> Computed:
        """Compute losses and, unless `forward_only`, add their gradients. Raises RefusedError."""
        began = time.monotonic()
        checked = self.check(operation)
        if not operation.forward_only:
            try:
                found, sums = self._backward(checked.rows, checked.loss, checked.settings, checked.exact)
                return self.add(ComputedPass(found, sums, checked.tokens, time.monotonic() - began))
            finally:
                self.clear()
        losses = [
            _loss(checked.loss, checked.exact[place], row, checked.settings)
            for place, row in enumerate(checked.rows)
        ]
        sums = [float(one.double().sum()) for one in losses]
        return ComputedPass(checked.exact, sums, checked.tokens, time.monotonic() - began).result()

    def check(self, operation: ForwardBackward) -> CheckedPass:
        """Return a pass whose rows can be computed, with the sampler's logprobs if they are needed. Raises
        RefusedError."""
        loss = find_loss(operation.loss)
        settings = loss.settings(operation.config)
        if not operation.data:
            raise RefusedError("data has no rows")
        rows = [
            check_row(datum, loss, place, self._words, self._longest)
            for place, datum in enumerate(operation.data)
        ]
        exact = self._sampler_logprobs(rows) if operation.forward_only or loss.compares else {}
        return CheckedPass(rows, loss, settings, exact)

    def add(self, computed: ComputedPass) -> Computed:
        """Add the gradients of a pass, and return its result. Raises RefusedError."""
        result = computed.result()
        self._add_gradients()
        return result

    @property
    def has_finite_gradients(self) -> bool:
        """Return True if what a pass has computed, and not added yet, is finite."""
        gradients = (parameter.grad for parameter in self._parameters.values())
        return all(bool(torch.isfinite(one).all()) for one in gradients if one is not None)

    def _backward(
        self, rows: list[Row], loss: Loss, settings: Mapping[str, float], exact: Mapping[int, torch.Tensor]
    ) -> tuple[dict[int, torch.Tensor], list[float]]:
        """Compute gradients, and return each row's logprobs and its loss.

        exact: the sampler's logprobs, which replace those of this pass; the gradients are of this pass.
        """
        found, sums = dict[int, torch.Tensor](), [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda place: (-len(rows[place]), place))
        self.clear()
        for one_pass in first_fit([len(rows[place]) for place in order], MICRO_TOKENS):
            places = [order[one] for one in one_pass]
            losses = []
            for place, own in zip(places, self.logprobs([rows[place] for place in places]), strict=True):
                logprobs = _with_exact(own, exact.get(place))
                found[place] = logprobs.detach().cpu()
                losses.append(_loss(loss, logprobs, rows[place], settings))
                sums[place] = float(losses[-1].detach().double().sum())
            torch.cat([one.flatten() for one in losses]).sum().backward()  # type: ignore[no-untyped-call]
        return found, sums

    def _sampler_logprobs(self, rows: list[Row]) -> dict[int, torch.Tensor]:
        """Return the logprobs of the rows' targets, fp32, by the engine that serves. Raises RefusedError."""
        tokens = [row.tokens.tolist() for row in rows]
        targets = [row.targets.view(len(row), -1).tolist() for row in rows]
        try:
            scored = self._scorer.logprobs(self.trainable.weights(), tokens, targets)
        except ScoringError as error:
            raise RefusedError(str(error)) from error
        found = {}
        for place, (row, values) in enumerate(zip(rows, scored, strict=True)):
            if values is None:
                raise RefusedError(f"data[{place}]: the logits are not finite", "not_finite")
            found[place] = torch.tensor(values).view(row.targets.shape)
        return found

    def logprobs(self, rows: list[Row]) -> list[torch.Tensor]:
        """Return the logprobs of the rows' targets, fp32, with gradients: all rows in one pass."""
        device, lengths = self.trainable.device, [len(row) for row in rows]
        tokens = torch.cat([row.tokens for row in rows]).to(device)
        packed = Packed(
            ids=tokens[None],
            positions=torch.cat([torch.arange(length) for length in lengths]).to(device)[None],
            keep=torch.arange(len(tokens), device=device),
            targets=tokens,
            owner=tokens,
            lengths=lengths,
        )
        return target_logprobs(self.trainable.logits(packed), rows)

    def clear(self) -> None:
        """Drop gradients that were computed and not added."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def _add_gradients(self) -> None:
        """Add the gradients of one operation, which fail together. Raises RefusedError."""
        new = {
            name: torch.zeros_like(one) if one.grad is None else one.grad
            for name, one in self._parameters.items()
        }
        self.clear()
        if not all(bool(torch.isfinite(one).all()) for one in new.values()):
            raise RefusedError("the gradient is not finite: lower the weights or advantages", "not_finite")
        before = self.gradients
        self.gradients = new if before is None else {name: before[name] + one for name, one in new.items()}

    def optim_step(self, operation: OptimStep) -> Stepped:
        """Step AdamW. Raises RefusedError."""
        numbers = {name: getattr(operation, name) for name in operation.__struct_fields__}
        for name, value in numbers.items():
            highest = 1.0 if name.startswith("beta") else HIGHEST_SETTING
            if not 0 <= value < highest:
                raise RefusedError(
                    f"adam_params.{name} is {value}: write a number from 0 to below {highest:g}"
                )
        if self.gradients is None:
            raise RefusedError("there is no gradient to step with: call forward_backward first")
        for name, parameter in self._parameters.items():
            parameter.grad = self.gradients[name].clone()
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), operation.grad_clip_norm or math.inf)
        if not torch.isfinite(norm):
            self.clear()
            raise RefusedError("the gradient is not finite: load a checkpoint", "not_finite")
        for group in self._optimizer.param_groups:
            group |= {
                "lr": operation.learning_rate,
                "betas": (operation.beta1, operation.beta2),
                "eps": operation.eps,
                "weight_decay": operation.weight_decay,
            }
        self._optimizer.step()
        self.clear()
        self.gradients = None
        self.steps += 1
        return Stepped(metrics={"grad_norm": float(norm)}, step=self.steps)

    def _reset_optimizer(self) -> None:
        self._optimizer = torch.optim.AdamW(self._parameters.values())

    # ---- state ---------------------------------------------------------------------------------

    def write_state(self, folder: Path) -> None:
        """Write everything that the model is into a folder. Raises OSError."""
        tensors = _named("weight", self._parameters) | self._moments()
        if self.gradients is not None:
            tensors |= _named("gradient", self.gradients)
        save_file(tensors, folder / _STATE)
        (folder / _META).write_bytes(msgspec.json.encode(_Meta(self.steps, self._parent)))

    def read_state(self, folder: Path) -> None:
        """Become what `write_state` wrote. Raises OSError, ValueError: the folder is damaged."""
        tensors = load_file(folder / _STATE)
        meta = msgspec.json.decode((folder / _META).read_bytes(), type=_Meta)
        self._set(_part("weight", tensors))
        self._set_moments(tensors, meta.steps)
        self._parent = meta.parent
        self.gradients = {
            name: one.to(self.trainable.device) for name, one in _part("gradient", tensors).items()
        } or None

    def save(self, folder: Path, operation: Save, seq_id: int) -> CheckpointFolder:
        """Write a checkpoint, which is whole when it appears. Raises OSError, RefusedError."""
        before = read_checkpoint(folder)
        if before is not None and before.seq_id == seq_id:
            return before  # of a process that was killed before it could tell
        if before is not None and not operation.overwrite:
            raise RefusedError(f"there is a checkpoint {operation.name!r}: choose another name, or overwrite")
        now, kept = time.time(), operation.kind == "weights"
        recipients = _recipients(operation.recipients)
        with atomic_directory(folder) as work:
            packed, packed_bytes = "", 0
            if operation.kind != "external":
                packed, packed_bytes = self._write_packed(work / PACKED)
            if not operation.packed_only:
                self._write_peft(work)
            if kept:
                save_file(self._moments(), work / _OPTIMIZER)
            digest = packed if operation.packed_only else _digest(work)
            if recipients:
                _encrypt(work, recipients)
            checkpoint = CheckpointFolder(
                name=operation.name,
                kind=operation.kind,
                folder=str(folder),
                model=self.spec.id,
                base_id=self.spec.base_id,
                seq_id=seq_id,
                step=self.steps,
                digest=digest,
                bytes=sum(path.stat().st_size for path in work.iterdir()),
                rank=self._recipe.r,
                alpha=decided(self._recipe.alpha),
                targets=self.targets,
                train_mlp=self.spec.train_mlp,
                train_attn=self.spec.train_attn,
                train_unembed=self.spec.train_unembed,
                optimizer=kept,
                created=now,
                expires=None if operation.ttl_seconds is None else now + operation.ttl_seconds,
                packed=packed,
                packed_bytes=packed_bytes,
                metadata=operation.metadata,
                parent=self._parent,
                version=self.spec.version,
            )
            (work / CHECKPOINT).write_bytes(msgspec.json.encode(checkpoint))
        return checkpoint

    def _write_peft(self, folder: Path) -> None:
        """Write the adapter as PEFT does, whose own way takes longer than a step. Raises OSError."""
        config = self.trainable.model.peft_config[ADAPTER]
        if config.target_parameters:  # which PEFT renames
            save_peft(self.trainable.model, folder, base=self._name.name, commit=self._name.commit)
            (folder / "README.md").unlink(missing_ok=True)
        else:
            named = copy.copy(config)
            named.base_model_name_or_path, named.revision = self._name.name, self._name.commit
            named.inference_mode, named.target_modules = True, sorted(config.target_modules)
            named.save_pretrained(str(folder))
            tensors = {_file_name(name): one.detach().cpu() for name, one in self._parameters.items()}
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)

    def _write_packed(self, path: Path) -> tuple[str, int]:
        """Write the weights as the engine loads them. Return the file's SHA-256 and size. Raises OSError."""
        write_packed_adapter(path, extract(self.trainable.model, ADAPTER), base_id=self.spec.base_id)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size

    def load(self, start: Load | StartingWeights) -> CheckpointFolder:
        """Become a checkpoint, and without its optimizer begin a new one; gradients are dropped.

        Raises RefusedError: there is none, it lacks the optimizer, or it is of other layers or ranks.
        """
        folder = Path(start.folder)
        checkpoint = read_checkpoint(folder)
        if checkpoint is None:
            raise RefusedError("there is no such checkpoint, or it has expired", "not_found")
        if start.optimizer and not checkpoint.optimizer:
            raise RefusedError(f"checkpoint {checkpoint.name!r} has no optimizer: load its weights alone")
        if checkpoint.base_id != self.spec.base_id:
            raise RefusedError(f"checkpoint {checkpoint.name!r} was made on another base", "other_base")
        if checkpoint.version != self.spec.version:  # whose ranks and alphas it has, module by module
            raise RefusedError(
                f"checkpoint {checkpoint.name!r} began with {checkpoint.version or 'the base'}, and the "
                f"model with {self.spec.version or 'the base'}: make a model from the checkpoint"
            )
        if checkpoint.alpha != decided(self._recipe.alpha):
            raise RefusedError(
                f"the checkpoint has alpha {checkpoint.alpha:g}, the model {decided(self._recipe.alpha):g}"
            )
        if not (folder / WEIGHTS).exists():
            what = "encrypted" if checkpoint.kind == "external" else "a snapshot for sampling"
            raise RefusedError(f"checkpoint {checkpoint.name!r} is {what}: save its weights")
        weights = load_file(folder / WEIGHTS)
        named = {_file_name(name): name for name in self._parameters}
        if {name: one.shape for name, one in weights.items()} != {
            saved: self._parameters[name].shape for saved, name in named.items()
        }:
            raise RefusedError(
                f"the checkpoint has rank {checkpoint.rank} on {', '.join(checkpoint.targets)}, the model "
                f"rank {self.spec.rank} on {', '.join(self.targets)}: make a model from the checkpoint"
            )
        moments = load_file(folder / _OPTIMIZER) if start.optimizer else {}
        self._set({named[saved]: one for saved, one in weights.items()})
        self._set_moments(moments, checkpoint.step if start.optimizer else 0)
        self.gradients = None
        self._parent = ParentCheckpoint(
            model=checkpoint.model,
            kind=checkpoint.kind,
            name=checkpoint.name,
            digest=checkpoint.digest,
            step=checkpoint.step,
            optimizer=start.optimizer,
            from_base=checkpoint.parent is None,
        )
        return checkpoint

    def _set(self, values: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(values[name])

    def _moments(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for kind in _MOMENTS:
            states = {name: self._optimizer.state.get(one) for name, one in self._parameters.items()}
            found |= _named(kind, {name: state[kind] for name, state in states.items() if state})
        return found

    def _set_moments(self, tensors: Mapping[str, torch.Tensor], steps: int) -> None:
        self._reset_optimizer()
        self.steps = steps
        moments = {kind: _part(kind, tensors) for kind in _MOMENTS}
        for name, parameter in self._parameters.items() if moments[_MOMENTS[0]] else ():
            state: dict[str, Any] = {
                kind: values[name].to(parameter.device).clone() for kind, values in moments.items()
            }
            self._optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **state}


@dataclass(frozen=True)
class CheckedPass:
    """A pass that can be computed. exact: the sampler's logprobs by row, if the loss compares with them."""

    rows: list[Row]
    loss: Loss
    settings: Mapping[str, float]
    exact: Mapping[int, torch.Tensor]

    @property
    def tokens(self) -> int:
        """Number of tokens of all rows."""
        return sum(map(len, self.rows))


@dataclass(frozen=True)
class ComputedPass:
    """A pass whose gradients are not added yet. found, sums: logprobs and loss of each row, by its place.
    seconds: time that it took."""

    found: Mapping[int, torch.Tensor]
    sums: Sequence[float]
    tokens: int
    seconds: float

    @property
    def is_finite(self) -> bool:
        """Return True if each row has a finite loss."""
        return all(map(math.isfinite, self.sums))

    def result(self) -> Computed:
        """Raises RefusedError: a row's loss is not finite."""
        for place, value in enumerate(self.sums):
            if not math.isfinite(value):
                raise RefusedError(f"data[{place}]: the loss is not finite", "not_finite")
        return Computed(
            outputs=[
                {"logprobs": DenseArray.of(self.found[place].numpy())} for place in range(len(self.sums))
            ],
            metrics={"loss:sum": math.fsum(self.sums)},
            tokens=self.tokens,
            seconds=self.seconds,
        )


def compute_together(asked: Sequence[tuple[LiveModel, ForwardBackward]]) -> list[ComputedPass | Refused]:
    """Compute losses and gradients of several models in one pass over the base, each on rows of its own.

    What one of them is refused for leaves the others alone. asked: models that `joins`, with backward passes.

    Raises RuntimeError: a gradient is not finite, and may have spoilt those of others.
    """
    began, results = time.monotonic(), dict[int, ComputedPass | Refused]()
    ready: dict[int, tuple[LiveModel, CheckedPass]] = {}
    for place, (model, operation) in enumerate(asked):
        try:
            ready[place] = model, model.check(operation)
        except RefusedError as error:
            results[place] = error.refused
    if ready:
        computed = _backward_together(list(ready.values()))
        seconds, tokens = time.monotonic() - began, sum(one.tokens for one in computed)
        for place, one in zip(ready, computed, strict=True):
            results[place] = replace(one, seconds=seconds * one.tokens / tokens)
    return [results[place] for place in range(len(asked))]


def _backward_together(passes: Sequence[tuple[LiveModel, CheckedPass]]) -> list[ComputedPass]:
    """Compute the gradients of all models whose losses are finite. Raises RuntimeError as
    `compute_together`."""
    adapters, end = [], 0
    for model, checked in passes:
        adapters.append((model.trainable, slice(end, end + checked.tokens)))
        end += checked.tokens
        model.clear()
    results, total = [], []
    with joined(adapters):
        rows = [row for _, checked in passes for row in checked.rows]
        logprobs = iter(passes[0][0].logprobs(rows))
        for _, checked in passes:
            own = [
                _with_exact(next(logprobs), checked.exact.get(place)) for place in range(len(checked.rows))
            ]
            losses = [
                _loss(checked.loss, one, row, checked.settings)
                for one, row in zip(own, checked.rows, strict=True)
            ]
            found = {place: one.detach().cpu() for place, one in enumerate(own)}
            sums = [float(one.detach().double().sum()) for one in losses]
            results.append(ComputedPass(found, sums, checked.tokens, 0.0))
            total += [one.flatten() for one in losses] if results[-1].is_finite else []
        if total:
            torch.cat(total).sum().backward()  # type: ignore[no-untyped-call]
    if not all(model.has_finite_gradients for model, _ in passes):
        raise RuntimeError("a gradient is not finite")
    return results


def _with_exact(own: torch.Tensor, exact: torch.Tensor | None) -> torch.Tensor:
    """Return the sampler's logprobs, if there are any, with the gradients of this pass."""
    return own if exact is None else exact.to(own) + (own - own.detach())


def _loss(loss: Loss, logprobs: torch.Tensor, row: Row, settings: Mapping[str, float]) -> torch.Tensor:
    inputs = {name: value.to(logprobs) for name, value in row.inputs.items()}
    return loss.elementwise(logprobs, inputs, settings)


def _parent_of(start: Parent) -> ParentCheckpoint:
    return ParentCheckpoint(
        model="adapters",
        kind="sampler",
        name=start.label,
        digest=start.digest,
        step=0,
        optimizer=False,
        from_base=False,
    )


def _recipe(base: nn.Module, spec: ModelSpec, start: Parent | None) -> Recipe:
    """Return the recipe of a model. Raises RecipeError."""
    size = sum(one.numel() * one.element_size() for one in base.parameters())
    recipe = Recipe(seed=spec.seed % 2**31, gradient_checkpointing=size > CHECKPOINTING_BYTES)
    if start is None:
        return replace(recipe, r=spec.rank, alpha=spec.alpha, targets=targets_of(base, spec))
    own = modules_of(start, base)
    if own["use_dora"] or own["alora_invocation_tokens"]:
        kind = "a DoRA" if own["use_dora"] else "an activated LoRA"
        raise RecipeError(
            "path", f"{start.label} is {kind}, and only LoRAs are trained step by step: train it by a job"
        )
    return replace(recipe, **own | {"targets": tuple(own["targets"])})


def targets_of(base: nn.Module, spec: ModelSpec) -> tuple[str, ...]:
    """Return a recipe's targets for what is to be trained. Raises RecipeError: nothing is."""
    if not 1 <= spec.rank <= HIGHEST_RANK:
        raise RecipeError("rank", f"rank is {spec.rank}: write a whole number from 1 to {HIGHEST_RANK}")
    found = ["all-linear"] if spec.train_attn and spec.train_mlp else []
    if not found:
        found = [name for name, on in (("attention", spec.train_attn), ("mlp", spec.train_mlp)) if on]
    if spec.train_mlp and target_parameters(base, ["experts"]):
        found.append("experts")
    if spec.train_unembed and (head := head_name(base)):
        found.append(head)
    if not found:
        raise RecipeError("targets", "nothing is to be trained: set train_mlp, train_attn or train_unembed")
    return tuple(found)


def _named(kind: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{kind} {name}": one.detach().contiguous().cpu() for name, one in tensors.items()}


def _part(kind: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    start = f"{kind} "
    return {name.removeprefix(start): one for name, one in tensors.items() if name.startswith(start)}


def _file_name(name: str) -> str:
    """Return a parameter's name as PEFT's files have it."""
    return name.replace(f".{ADAPTER}", "")


def _digest(folder: Path) -> str:
    sums = []
    for name in (CONFIG, WEIGHTS):
        with (folder / name).open("rb") as file:
            sums.append(hashlib.file_digest(file, "sha256").hexdigest())
    return version_digest(*sums)


def _recipients(keys: Sequence[str]) -> list[Any]:
    """Return the public keys to which files are encrypted. Raises RefusedError."""
    if not keys:
        return []
    if importlib.util.find_spec("pyrage") is None:
        raise RefusedError(
            "age_encryption_recipients: this server lacks the package pyrage. Its operator installs it with "
            "pip install 'onebase[tinker]'; without recipients the files are not encrypted",
            "not_installed",
        )
    return [_recipient(key, f"age_encryption_recipients[{place}]") for place, key in enumerate(keys)]


def _recipient(key: str, place: str) -> Any:
    from pyrage import RecipientError, encrypt, ssh, x25519

    for kind in (x25519.Recipient, ssh.Recipient):
        with suppress(RecipientError), _panics_refused(f"{place}: nothing can be encrypted to {key[:80]!r}"):
            found = kind.from_str(key)
            encrypt(b"", [found])
            return found
    raise RefusedError(
        f"{place}: {key[:80]!r} is no public key: write age1... or a line of an SSH public key "
        "(ssh-ed25519, ssh-rsa)"
    )


def _encrypt(folder: Path, recipients: Sequence[Any]) -> None:
    """Replace each file by its encrypted form. Raises OSError, RefusedError."""
    import pyrage

    for path in sorted(folder.iterdir()):
        encrypted = path.with_name(path.name + ENCRYPTED)
        with _panics_refused("age_encryption_recipients: the files cannot be encrypted to these keys"):
            pyrage.encrypt_file(str(path), str(encrypted), recipients)
        encrypted.chmod(path.stat().st_mode)
        path.unlink()


@contextmanager
def _panics_refused(message: str) -> Iterator[None]:
    """Raise RefusedError where pyrage panics, which it does over keys that are well-formed but no keys. A
    panic is a BaseException, and would end the process."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RefusedError(f"{message}: make a new key pair and send its public key") from error


@dataclass
class _Shortage:
    """State of a model that waits for memory.

    pause: seconds between the last two tries. next_try: time of the next one. alone_since: time of the first
    one from which on no other model was loaded while an operation waited; None if the last was not so.
    """

    pause: float = 0.5
    next_try: float = 0.0
    alone_since: float | None = None


class LiveModels:
    """The live adapters of a store, done one operation at a time, the models in turns.

    Args:
        base: as `load_base` or `attach` returns it.
        gate: passed between any two layers; it may raise Interrupted, and nothing is lost by that.
        on_done: called with the model's id and the number of an operation that has its result; for a model
            that was made, or refused, with 0.
        point_seconds: time of computing after which a point is written, as POINT_SECONDS.
        int8_cache: whether the engine that serves keeps keys and values in int8.
        memory: bytes for all models; 0: not known.
        find_memory: returns these bytes anew; called before a model is made, and after an operation that ran
            out of them.
        joins: whether small backward passes of several models are computed in one. Their bits then depend on
            each other.
        clock: returns the time, in seconds, by which models that wait for memory are tried again.
    """

    def __init__(
        self,
        base: nn.Module,
        store: LiveStore,
        gate: Gate,
        name: BaseName,
        *,
        on_done: Callable[[str, int], None] = lambda model_id, seq_id: None,
        point_seconds: float = POINT_SECONDS,
        int8_cache: bool = False,
        memory: int = 0,
        find_memory: Callable[[], int] | None = None,
        joins: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._memory, self._find_memory = memory, find_memory
        self._joins = joins
        self._proven: set[str] = set()
        """Models whose passes may join others: an operation was done here, by itself and not refused, since
        the model was made, and since a joined pass with it failed. A process that dies of the first one tells
        which it was."""
        self._next_tokens: dict[str, tuple[int, int]] = {}
        """Number of each model's next operation, and its tokens in a joined pass; 0 tokens: it joins none."""
        self._base, self._store, self._gate, self._name = base, store, gate, name
        self._scorer = Scorer(base, gate.wait, int8_cache=int8_cache)
        self._on_done = on_done
        self._point_seconds = point_seconds
        self._models: dict[str, LiveModel] = {}
        self._since_point: dict[str, float] = {}
        """Seconds of computing that no point of a model covers."""
        self._failed_points: dict[str, tuple[int, float]] = {}
        """Operation after which a model's last point could not be written, and `_since_point` then."""
        self._broken: dict[str, Refused] = {}
        """Result of each operation of a model that could not be made here."""
        self._waiting: dict[str, _Shortage] = {}
        """Models that were made once, and for which there is no memory now. Their operations wait for it."""
        self._lost: set[str] = set()
        """Models to be made again, in a turn for that alone, because an operation left them half changed."""
        self._turns: deque[str] = deque()

    def enqueue(self, model_id: str) -> None:
        """Give a model a turn, because something was written for it."""
        if model_id not in self._turns:
            self._turns.append(model_id)

    def enqueue_all(self) -> None:
        """Give each model of the store a turn."""
        for spec in self._store.models():
            self.enqueue(spec.id)

    def refuse(self, model_id: str, seq_id: int, refused: Refused) -> None:
        """Give an operation that has no result this one; number 0: all of them, for the model is broken.

        Raises OSError.
        """
        if seq_id == 0:
            if self._store.is_live(model_id):
                self._broken[model_id] = refused
                if self._store.made(model_id) is None:
                    self._store.write_made(model_id, Made(refused=refused.message))
                    self._on_done(model_id, 0)
            return
        self._store.complete(model_id)
        if seq_id == self._store.next_seq(model_id) and self._store.is_live(model_id):
            self._store.write_result(model_id, seq_id, refused)
            self._on_done(model_id, seq_id)

    def do_next(self) -> bool:
        """Do one operation of the model whose turn it is, or make it again if its last operation left it half
        changed. Returns False if nothing waits.

        Raises OSError, Interrupted: no result was written. The operation is done again by the next process,
        from the state before it. Where the disk was full, that is not held against the operation.
        """
        for model_id in self._waiting:
            if self._is_due(model_id) and self._store.has_next(model_id):
                self.enqueue(model_id)
        while self._turns:
            model_id = self._turns.popleft()
            try:
                if self._do_next_of(model_id):
                    self.enqueue(model_id)
                    return True
            except (UnknownLiveModelError, FileNotFoundError):
                if self._store.is_live(model_id):
                    raise
            except OSError as error:
                if _is_disk_full(error):  # it may be so for a moment
                    self._store.forget_begun()
                raise
            if not self._store.is_live(model_id):
                self._forget(model_id)
        return False

    def seconds_to_retry(self) -> float | None:
        """Return the seconds until a model that waits for memory is to be tried again; None if no operation
        waits for one."""
        times = [one.next_try for model_id, one in self._waiting.items() if self._store.has_next(model_id)]
        return max(0.0, min(times) - self._clock()) if times else None

    def _is_due(self, model_id: str) -> bool:
        """Return True unless a model waits for memory, and is not to be tried yet."""
        shortage = self._waiting.get(model_id)
        return shortage is None or shortage.next_try <= self._clock()

    def _wake_waiting(self) -> None:
        """Try the models that wait for memory in their next turns: there may be more of it."""
        for model_id, shortage in self._waiting.items():
            shortage.next_try = self._clock()
            self.enqueue(model_id)

    def _look_for_memory(self) -> None:
        if self._find_memory is not None:
            self._memory = self._find_memory()

    def _forget(self, model_id: str) -> None:
        """Free the memory of a model that was unloaded, for those that wait for memory."""
        self._broken.pop(model_id, None)
        self._waiting.pop(model_id, None)
        self._proven.discard(model_id)
        self._next_tokens.pop(model_id, None)
        self._since_point.pop(model_id, None)
        self._failed_points.pop(model_id, None)
        if self._models.pop(model_id, None) is not None or model_id in self._lost:
            self._lost.discard(model_id)
            gc.collect()
            self._wake_waiting()

    def write_points(self) -> None:
        """Write all models to the disk, so that nothing has to be done over. One that cannot be written, or
        that is unloaded meanwhile, is skipped."""
        for model_id, model in self._models.items():
            try:
                if self._since_point[model_id] and self._store.is_live(model_id):
                    last = self._store.last_result(model_id)
                    self._write_point(model, last, self._store.result(model_id, last))
            except (OSError, UnknownLiveModelError) as error:
                logger.warning("no point of training model %s is written: %s", model_id, error)

    def _do_next_of(self, model_id: str) -> bool:
        if not self._store.is_live(model_id) or self._store.spec(model_id).base_id != self._store.base_id:
            return False
        if not self._is_due(model_id):
            return False
        if model_id not in self._models and model_id not in self._broken:
            for other in [other for other in self._models if not self._store.is_live(other)]:
                self._forget(other)
            self._store.write_begun(model_id, 0)
            gc.collect()  # PEFT's modules refer to one another: what was here before would keep its memory
            self._look_for_memory()
            self._make(model_id)
            self._store.forget_begun()
            if model_id not in self._models:
                gc.collect()
            is_again = model_id in self._lost
            self._lost.discard(model_id)
            if model_id in self._waiting:
                return False
            if is_again:
                return True  # its next operation comes after those of models that had no turn meanwhile
        seq_id = self._store.next_seq(model_id)
        operation = self._store.operation(model_id, seq_id)
        if operation is None:
            return False
        if model_id in self._broken:
            self._store.write_result(model_id, seq_id, self._broken[model_id])
            self._on_done(model_id, seq_id)
            return True
        self._store.write_begun(model_id, seq_id)
        if self._done_with_others(model_id, seq_id, operation):
            return True
        began = time.monotonic()
        model = self._models[model_id]
        before = model.gradients
        result = self._done_alone(model, seq_id, operation)
        result = self._record(model, seq_id, operation, result, before)
        if not isinstance(result, Refused):
            self._proven.add(model_id)
            if not isinstance(operation, Load) and not _leaves_state(operation):
                self._since_point[model_id] += time.monotonic() - began
        if model_id not in self._lost:
            self._write_point_if_due(model, seq_id, result)
        return True

    def _record(
        self,
        model: LiveModel,
        seq_id: int,
        operation: Operation,
        result: Result,
        before: dict[str, torch.Tensor] | None,
    ) -> Result:
        """Write an operation's result, and return it. An operation whose result, or whose point, cannot be
        written is refused, and undone: the gradients of a pass are those `before` it, and after another one
        the model is made again.

        Raises OSError: the refusal cannot be written either, or the operation has saved a checkpoint, which
        the next process finds.
        """
        model_id = model.spec.id
        try:
            if isinstance(operation, Load) and not isinstance(result, Refused):
                self._write_point(model, seq_id, result)  # the checkpoint may be gone once it is done over
            self._store.write_result(model_id, seq_id, result)
        except OSError as error:
            if not self._store.is_live(model_id) or self._store.last_point(model_id) >= seq_id:
                raise  # nobody waits for the result, or the point has it
            if isinstance(operation, Save) and not isinstance(result, Refused):
                raise
            logger.warning("the result of operation %d of %s cannot be written: %s", seq_id, model_id, error)
            if isinstance(operation, ForwardBackward):
                model.gradients = before
            elif not _leaves_state(operation):
                self._make_again(model_id)
            message = f"its result cannot be written: {error}"
            result = Refused(message=message, code="disk_full", category="server")
            self._store.write_result(model_id, seq_id, result)
        self._on_done(model_id, seq_id)
        return result

    def _make_again(self, model_id: str) -> None:
        """Have a model made again from its point, before its memory goes to others. Its next operation waits
        for a turn behind theirs."""
        if self._models.pop(model_id, None) is None:
            return
        self._lost.add(model_id)
        self._proven.discard(model_id)
        with suppress(ValueError):
            self._turns.remove(model_id)
        self._turns.appendleft(model_id)

    def _done_alone(self, model: LiveModel, seq_id: int, operation: Operation) -> Result:
        """Do an operation. A pass without memory is done once more if there is more now than it was given."""
        result, before = self._done(model, seq_id, operation), self._memory
        if isinstance(result, Refused) and result.code == _NO_MEMORY:
            self._look_for_memory()
            if isinstance(operation, ForwardBackward) and self._memory > before:
                return self._done(model, seq_id, operation)
        return result

    def _done_with_others(self, model_id: str, seq_id: int, operation: Operation) -> bool:
        """Do a backward pass together with those that are next in the order of other models.

        One without memory for its gradients is left to a later turn. Return False if there are none that fit,
        or the pass failed: then it is done by itself.
        """
        passes = self._passes_with(model_id, seq_id, operation) if self._joins else []
        if len(passes) < 2:
            return False
        models = {one: self._models[one] for one, *_ in passes}
        try:
            computed = compute_together([(models[one], asked) for one, _, asked in passes])
        except Exception as error:
            if _ends_process(error):
                raise
            logger.warning("a pass of %d models failed, and each is done by itself: %s", len(models), error)
            for model in models.values():
                model.clear()
            self._proven.difference_update(models)  # any of them may have spoilt it
            return False
        for (one, number, asked), outcome in zip(passes, computed, strict=True):
            before = models[one].gradients
            result = _added(models[one], asked, outcome)
            if isinstance(result, Refused) and result.code == _NO_MEMORY:
                self._proven.discard(one)  # it is done by itself, where more memory is looked for
                continue
            try:
                recorded = self._record(models[one], number, asked, result, before)
                if isinstance(recorded, Computed):
                    self._since_point[one] += recorded.seconds
                if one not in self._lost:
                    self._write_point_if_due(models[one], number, recorded)
            except (UnknownLiveModelError, FileNotFoundError):
                if self._store.is_live(one):
                    raise  # else it was unloaded meanwhile
        return True

    def _passes_with(
        self, model_id: str, seq_id: int, operation: Operation
    ) -> list[tuple[str, int, ForwardBackward]]:
        """Return a backward pass, and the next ones of models whose turns follow, as far as all fit."""
        found, left = list[tuple[str, int, ForwardBackward]](), MICRO_TOKENS
        for one in (model_id, *self._turns):
            number, asked = (seq_id, operation) if one == model_id else self._next_small(one, left)
            tokens = self._joined_tokens(one, asked)
            if isinstance(asked, ForwardBackward) and 0 < tokens <= left:
                found.append((one, number, asked))
                left -= tokens
            if left == 0 or not found:
                break
        return found

    def _joined_tokens(self, model_id: str, operation: Operation | None) -> int:
        """Return the number of tokens of an operation that may join a pass; 0 if it may not."""
        if model_id not in self._proven or not isinstance(operation, ForwardBackward):
            return 0
        joins = not operation.forward_only and self._models[model_id].joins
        return sum(map(len, operation.data)) if joins else 0

    def _next_small(self, model_id: str, room: int) -> tuple[int, Operation | None]:
        """Return a model's next operation and its number, if it may join a pass with room for so many tokens.

        None is read that is large, that was read before and does not fit, or of a model of which nothing is
        done now.
        """
        is_live = model_id in self._models and self._store.is_live(model_id)
        if not is_live or model_id in self._broken or model_id not in self._proven:
            return 0, None
        number = self._store.next_seq(model_id)
        known, tokens = self._next_tokens.get(model_id, (0, 0))
        size = self._store.operation_bytes(model_id, number)
        if size == 0 or (known == number and not 0 < tokens <= room):
            return number, None
        operation = self._store.operation(model_id, number) if size <= JOINED_BYTES else None
        self._next_tokens[model_id] = number, self._joined_tokens(model_id, operation)
        return number, operation

    def _done(self, model: LiveModel, seq_id: int, operation: Operation) -> Result:
        """Do an operation. An error fails it alone, unless base or device cannot be trusted after it."""
        try:
            return self._result(model, seq_id, operation)
        except RefusedError as error:
            return error.refused
        except Exception as error:
            if _ends_process(error):
                raise
            model.clear()  # gradients of a pass that ended half-way
            if isinstance(operation, OptimStep | Load):  # which is half done
                self._make_again(model.spec.id)
            if is_out_of_memory(error):
                return _out_of_memory(operation)
            if isinstance(operation, Save):
                code = "disk_full" if isinstance(error, OSError) else "save_failed"
                return Refused(message=f"it cannot be saved: {error}", code=code, category="server")
            if isinstance(error, OSError) and not isinstance(operation, Load):
                raise
            logger.exception("operation %d of %s failed", seq_id, model.spec.id)
            message = f"it failed: {error or type(error).__name__}"
            return Refused(message=message, code="operation_failed", category="server")

    def _result(self, model: LiveModel, seq_id: int, operation: Operation) -> Result:
        if isinstance(operation, ForwardBackward):
            return model.forward_backward(operation)
        if isinstance(operation, OptimStep):
            return model.optim_step(operation)
        if isinstance(operation, Load):
            return Loaded(model.load(operation))
        if isinstance(operation, Refuse):
            raise RefusedError(operation.message, operation.code)
        try:
            folder = self._store.checkpoint_folder(model.spec.id, operation.kind, operation.name)
        except KeyError:
            raise RefusedError(
                f"{operation.name!r} is no name for a checkpoint: take letters, digits, '.', '_' and '-'"
            ) from None
        return WeightsSaved(model.save(folder, operation, seq_id))

    # ---- what is on the disk -------------------------------------------------------------------

    def _make(self, model_id: str) -> None:
        """Make the model that a spec asks for, or continue it. One that cannot be made fails alone; one that
        was made before, and for which there is no memory now, waits for that."""
        made, shortage = self._store.made(model_id), self._waiting.pop(model_id, _Shortage())
        began = self._clock()
        try:
            if made is not None and made.refused:
                raise RefusedError(made.refused, "model_refused")
            spec, folder = self._store.spec(model_id), self._store.folder(model_id) / START
            start = None
            if spec.version:
                digest = spec.version.rpartition("@")[2]
                start = Parent(spec.version, digest, folder / CONFIG, folder / WEIGHTS)
            model = LiveModel(self._base, spec, self._gate, self._name, self._scorer, start)
            if made is None:
                self._check_share(model)
            if self._store.last_point(model_id) < 0:
                if model.spec.start is not None:
                    model.load(model.spec.start)
                self._write_point(model, 0, None)
            self._continue(model)
        except (RecipeError, RefusedError) as error:
            self._broken[model_id] = Refused(message=str(error), code="model_refused")
            self._store.write_made(model_id, Made(refused=str(error)))
        except Exception as error:
            if _ends_process(error) or (made is not None and _is_disk_full(error)):
                raise
            message = f"the model cannot be continued: {error or type(error).__name__}"
            if is_out_of_memory(error):
                if made is not None and self._waits(model_id, shortage, began):
                    return
                message = self._no_memory(is_new=made is None)
            logger.exception("training model %s cannot be continued", model_id)
            self._broken[model_id] = Refused(message=message, code="model_broken", category="server")
            if made is None:
                self._store.write_made(model_id, Made(refused=message))
            else:
                self._wake_waiting()
        else:
            self._models[model_id] = model
            if made is None:
                self._store.write_made(model_id, Made(targets=model.targets, parameters=model.parameters))
        self._on_done(model_id, 0)

    def _waits(self, model_id: str, shortage: _Shortage, began: float) -> bool:
        """Let a model wait for memory, longer after a try that took long, so that other models have time too.

        Return False if an operation waited for it for SHORTAGE_SECONDS while no other model was loaded: then
        there is none to wait for.
        """
        now, since = self._clock(), None
        has_next = self._store.has_next(model_id)
        if has_next and not self._models:
            since = now if shortage.alone_since is None else shortage.alone_since
        if since is not None and now - since >= SHORTAGE_SECONDS:
            return False
        by_try = PAUSE_BY_TRY * (now - began)
        if not self._models:  # nobody else has use for the time, and two tries fit before it is given up
            by_try = min(SHORTAGE_SECONDS / 2, by_try)
        pause = max(min(RETRY_SECONDS, 2 * shortage.pause), by_try)
        if model_id in self._lost:
            self._wake_waiting()  # what it had is free
        self._waiting[model_id] = _Shortage(pause, now + pause, since)
        when = f"in {pause:g} s" if has_next else "once an operation waits for it"
        logger.warning("no memory for training model %s: it is tried again %s", model_id, when)
        return True

    def _no_memory(self, is_new: bool) -> str:
        """Return the message of a model for which there is no memory."""
        if not is_new:
            return (
                f"the trainer had no memory for this model for {SHORTAGE_SECONDS / 60:g} minutes: begin "
                "another from a checkpoint of it"
            )
        remedy = "end another run, or lower the rank" if self._models else "lower the rank, or try later"
        return f"the trainer has no memory for this model: {remedy}"

    def _check_share(self, model: LiveModel) -> None:
        """Raise RefusedError if a new model beside others takes too much of the memory: its owner's part, or
        what passes need."""
        everyone = [*self._models.values(), model]
        own = [one for one in everyone if one.spec.owner == model.spec.owner]
        for models, whose, part in ((own, "your", OWNER_SHARE), (everyone, "all", MODELS_SHARE)):
            taken = STATE_BYTES * sum(one.parameters for one in models)
            most = int(part * self._memory)
            if self._memory and len(models) > 1 and taken > most:
                raise RefusedError(
                    f"with this model {whose} {len(models)} would take {taken} bytes, and they may take "
                    f"{most}: end another run, or lower the rank"
                )

    def _continue(self, model: LiveModel) -> None:
        """Read the newest point, and do over what was done since. Points are written meanwhile as they are
        due: there may have been no room for them before."""
        model_id = model.spec.id
        self._store.complete(model_id)
        point, last = self._store.last_point(model_id), self._store.last_result(model_id)
        model.read_state(self._store.point(model_id, point))
        self._since_point[model_id] = 0.0
        self._failed_points.pop(model_id, None)
        for seq_id in range(point + 1, last + 1):
            began = time.monotonic()
            operation, kept = self._store.operation(model_id, seq_id), self._store.result(model_id, seq_id)
            if operation is None:
                raise RuntimeError(f"operation {seq_id} of {model_id} is missing")
            if not _leaves_state(operation) and not isinstance(kept, Refused):
                self._do_over(model, seq_id, operation, kept)
            self._since_point[model_id] += time.monotonic() - began
            self._write_point_if_due(model, seq_id, kept)

    def _do_over(self, model: LiveModel, seq_id: int, operation: Operation, kept: Result | None) -> None:
        """Repeat an operation for the model's state alone. Raises MemoryError, RuntimeError."""
        model_id, again = model.spec.id, self._done(model, seq_id, operation)
        if isinstance(again, Refused) and again.code == _NO_MEMORY:
            raise MemoryError(again.message)
        if isinstance(again, Refused):
            raise RuntimeError(f"operation {seq_id} of {model_id} cannot be done over: {again.message}")
        if isinstance(again, Stepped) and isinstance(kept, Stepped) and again != kept:
            logger.warning("operation %d of %s came out otherwise than before", seq_id, model_id)

    def _write_point_if_due(self, model: LiveModel, seq_id: int, result: Result | None) -> None:
        """Write a point after an operation if too much would have to be done over, or too many operations are
        kept. After a step it is written sooner, since gradients take room in a point. Nothing is lost without
        it, so one that cannot be written is tried again after as much time or as many operations more."""
        model_id = model.spec.id
        most = self._point_seconds if isinstance(result, Stepped) else STEPLESS_POINTS * self._point_seconds
        last, covered = self._failed_points.get(model_id, (self._store.last_point(model_id), 0.0))
        if self._since_point[model_id] - covered <= most and seq_id - last < POINT_OPERATIONS:
            return
        try:
            self._write_point(model, seq_id, result)
        except OSError as error:
            logger.warning(
                "no point of training model %s is written, and it is tried later: %s", model_id, error
            )
            self._failed_points[model_id] = seq_id, self._since_point[model_id]

    def _write_point(self, model: LiveModel, seq_id: int, result: Result | None) -> None:
        """Write the model's state after an operation, with its result: either both survive, or none. Nothing
        stays of a model that was unloaded."""
        if not self._store.is_live(model.spec.id):
            return
        try:
            with atomic_directory(self._store.point(model.spec.id, seq_id)) as work:
                model.write_state(work)
                if result is not None:
                    (work / RESULT).write_bytes(encoded(result))
        finally:
            if not self._store.is_live(model.spec.id):  # since when it was unloaded, points may be back
                self._store.unload(model.spec.id)
        self._store.forget_before(model.spec.id, seq_id)
        for work in self._store.point(model.spec.id, seq_id).parent.glob(".*"):
            shutil.rmtree(work, ignore_errors=True)
        self._since_point[model.spec.id] = 0.0
        self._failed_points.pop(model.spec.id, None)


def _ends_process(error: Exception) -> bool:
    """Return True for an error after which nothing more can be computed in this process."""
    if isinstance(error, Interrupted | torch.AcceleratorError | BaseChangedError):
        return True
    return type(error) is RuntimeError and "CUDA error" in str(error) and not is_out_of_memory(error)


def _is_disk_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in FULL


def _added(
    model: LiveModel, operation: ForwardBackward, computed: ComputedPass | Refused
) -> Computed | Refused:
    """Add the gradients of a model's part in a pass of several, and return its result."""
    if isinstance(computed, Refused):
        return computed
    try:
        return model.add(computed)
    except RefusedError as error:
        return error.refused
    except Exception as error:
        if _ends_process(error) or not is_out_of_memory(error):
            raise
        return _out_of_memory(operation)
    finally:
        model.clear()


def _out_of_memory(operation: Operation) -> Refused:
    remedy = "try it again, end another run, or begin one of a lower rank"
    if isinstance(operation, ForwardBackward):
        remedy = "send fewer or shorter rows"
    message = f"it needs more memory than the trainer may take: {remedy}"
    return Refused(message=message, code=_NO_MEMORY, category="server")


def _leaves_state(operation: Operation) -> bool:
    """Return True for an operation after which the model is what it was."""
    return isinstance(operation, Save | Refuse) or (
        isinstance(operation, ForwardBackward) and operation.forward_only
    )
