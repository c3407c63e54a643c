"""Losses that a run minimizes: cross-entropy of the replies or of the labels, or DPO's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from onebase_adapters.store.atomic_files import write_atomically
from onebase_training.batches import MicroBatch, pack
from onebase_training.data.dataset import Row
from onebase_training.processes import ProcessGroup
from onebase_training.recipe import Recipe, decided
from onebase_training.trainable import Trainable


@dataclass(frozen=True)
class PreparedRun:
    """Run that an objective prepares for: its identity, the folder of its resumable state, and the processes
    that share its work."""

    identity: str
    folder: Path
    processes: ProcessGroup


class Objective(Protocol):
    """Computes a micro-batch's summed loss, and sums of other figures by name."""

    def prepare(self, rows: Sequence[Row], recipe: Recipe, run: PreparedRun) -> None:
        """Compute, before the first step, what the loss needs of the rows, in their order."""

    def loss(self, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...

    def on(self, trainable: Trainable) -> Objective:
        """Return the same objective for another adapter of the base; what was prepared holds for it too."""


def make_objective(trainable: Trainable, recipe: Recipe) -> Objective:
    """Return the objective of the recipe's method."""
    if recipe.method in ("supervised", "reinforcement"):  # whose trainer has losses of its own
        return Supervised(trainable)
    if recipe.method == "classification":
        return Classes(trainable)
    return Preferences(trainable, decided(recipe.beta))


class Supervised:
    """Cross-entropy of the supervised tokens."""

    def __init__(self, trainable: Trainable) -> None:
        self._trainable = trainable

    def prepare(self, rows: Sequence[Row], recipe: Recipe, run: PreparedRun) -> None:
        """Do nothing."""

    def loss(self, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        losses, _ = self._trainable.losses(batch)
        return losses.sum(), {}

    def on(self, trainable: Trainable) -> Supervised:
        return Supervised(trainable)


class Classes:
    """Cross-entropy of each row's label, by the classifier's head at its last token."""

    def __init__(self, trainable: Trainable) -> None:
        self._trainable = trainable
        self._number = {label: number for number, label in enumerate(trainable.labels)}

    def prepare(self, rows: Sequence[Row], recipe: Recipe, run: PreparedRun) -> None:
        """Do nothing."""

    def loss(self, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits = self._trainable.class_logits(batch)
        labels = [self._number[sample.label] for sample in batch.samples]
        targets = torch.tensor(labels, device=logits.device)
        right = (logits.argmax(1) == targets).sum().detach()
        return nn.functional.cross_entropy(logits, targets, reduction="sum"), {"accuracy": right}

    def on(self, trainable: Trainable) -> Classes:
        return Classes(trainable)


class Preferences:
    """DPO (Rafailov et al. 2023). The reference is the model that training starts from: the base with the
    adapter off, which costs no memory, or the parent adapter.

    All pairs' references are computed before the first step, by all processes together, packed in the order
    of the rows: packing may change the last bits of a pair, and a resumed run must find the same ones. They
    are stored in the run's folder, and a resumed run reads them.
    """

    def __init__(self, trainable: Trainable, beta: float) -> None:
        self._trainable = trainable
        self._beta = beta
        self._references: dict[int, float] = {}

    def loss(self, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        reference = self._reference(batch)
        likelihoods = self._likelihoods(batch)
        losses, margins = dpo_losses(likelihoods[0::2], likelihoods[1::2], reference, self._beta)
        rewards = {"accuracy": (margins > 0).sum().detach(), "margin": margins.sum().detach()}
        return losses.sum(), rewards

    def on(self, trainable: Trainable) -> Preferences:
        other = Preferences(trainable, self._beta)
        other._references = self._references
        return other

    def _likelihoods(self, batch: MicroBatch) -> torch.Tensor:
        """Return the log-likelihood of each sample's reply given its prompt, [samples] nats."""
        losses, owner = self._trainable.losses(batch)
        return losses.new_zeros(len(batch.samples)).index_add(0, owner, -losses)

    def prepare(self, rows: Sequence[Row], recipe: Recipe, run: PreparedRun) -> None:
        path, key = run.folder / _REFERENCES, _references_key(run.identity, rows)
        references = run.processes.decide(lambda: _read_references(path, key))
        if not references:
            computed = run.processes.all_of(self._computed(rows, recipe, run.processes))
            references = [reference for _, reference in sorted(computed)]
            if run.processes.first:
                with suppress(OSError):  # they can be computed again; a full disk is reported by a checkpoint
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(path, json.dumps({"key": key, "references": references}))
        self._references = {
            id(row.samples[0]): reference for row, reference in zip(rows, references, strict=True)
        }

    def _computed(
        self, rows: Sequence[Row], recipe: Recipe, processes: ProcessGroup
    ) -> list[tuple[int, float]]:
        """Return this process's share of the references, each with the number of its row."""
        batches = pack(rows, range(len(rows)), decided(recipe.micro_tokens), packing=recipe.packing)
        computed: list[tuple[int, float]] = []
        with self._trainable.evaluating(), self._trainable.at_start():
            for batch in processes.share(batches):
                found = self._likelihoods(batch)
                computed += zip(batch.rows, (found[0::2] - found[1::2]).tolist(), strict=True)
        return computed

    def _reference(self, batch: MicroBatch) -> torch.Tensor:
        held = [self._references[id(sample)] for sample in batch.samples[0::2]]
        return torch.tensor(held, device=self._trainable.device)


_REFERENCES = "references.json"


def _references_key(identity: str, rows: Sequence[Row]) -> str:
    """SHA-256 of the run's recipe, data and base, and of the tokens of its rows."""
    total = hashlib.sha256(identity.encode())
    for row in rows:
        for sample in row.samples:
            total.update(f" {len(sample)} ".encode())
            total.update(sample.ids.tobytes() + sample.supervised.tobytes())
    return total.hexdigest()


def _read_references(path: Path, key: str) -> list[float]:
    """Return the references stored under this key; none if there are none, or they cannot be read."""
    try:
        kept = json.loads(path.read_text())
        return list(kept["references"]) if kept["key"] == key else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def dpo_losses(
    chosen: torch.Tensor, rejected: torch.Tensor, reference: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return DPO's loss and margin of each pair (Rafailov et al. 2023, equation 7), both [pairs].

    chosen, rejected: log-likelihoods of the replies, [pairs]. reference: the reference's log-likelihood of
    the chosen one minus that of the rejected one, [pairs].
    """
    margin = beta * ((chosen - rejected) - reference)
    return -nn.functional.logsigmoid(margin), margin
