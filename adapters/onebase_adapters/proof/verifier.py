"""Prove one version: from its two files to a packed adapter."""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from onebase_adapters.proof.loader import LoadedAdapter, classifier_of, load_adapter
from onebase_adapters.proof.merging import MergeInput, MergeRecipe, merge
from onebase_adapters.proof.modules import ModuleProof, ModuleProver
from onebase_adapters.proof.report import Stage, what_was_shown
from onebase_adapters.proof.texts import TextProof, TextProver
from onebase_adapters.proof.unusual_weights import WeightFigures, measure, unusual, weight_score
from onebase_engine.base.load import BaseChangedError, fingerprint
from onebase_engine.kernels.weights import (
    HEAD,
    AdapterWeights,
    Head,
    ModuleWeights,
    folded,
    invocation_of,
    tensors_of,
    vocabulary_of,
    weights_bytes,
    without_head,
)
from onebase_engine.lora.packed_adapter import read_packed_adapter, write_packed_adapter
from onebase_protocol.adapters import ModuleReport, ProofReport, VersionReport

OnProgress = Callable[[Stage, float], None]
_LOADED, _COMPARED = 0.15, 0.6
"""Parts of the work that are done when PEFT has loaded the version, and when its modules are compared."""
_NEW_TOKENS = 16
"""Number of tokens in a probe of those that a version adds."""
_IN_LAYER = re.compile(r"\.(\d+)\.(.+)")


@dataclass(frozen=True)
class ProvenVersion:
    """A version's report, and its packed adapter, whose SHA-256 and size are `sha256` and `bytes`."""

    report: VersionReport
    sha256: str
    bytes: int


class Verifier:
    """Proves versions on a base. `max_rank`: largest rank that the engine's slots hold."""

    def __init__(self, base: nn.Module, *, max_rank: int, base_id: str) -> None:
        """`base_id` is written into packed adapters, so that no other base ever loads them."""
        self.device: torch.device = next(base.parameters()).device
        self._base = base
        self._max_rank = max_rank
        self._base_id = base_id
        self._fingerprint = fingerprint(base)
        self._modules = ModuleProver(base)
        self._texts = TextProver(base)

    def prove(
        self,
        config: Path,
        weights: Path,
        packed: Path,
        *,
        probes: Sequence[list[int]],
        probe_tokens: int,
        allow_noop: bool,
        on_progress: OnProgress,
    ) -> ProvenVersion:
        """Validate, load and prove a version, and leave its packed adapter at `packed`.

        Args:
            config, weights: the version's two files.
            packed: the file to write; nothing is left there when anything is raised.
            probes: prompts, as tokens, whose greedy texts of `probe_tokens` tokens are compared.
            allow_noop: accept an adapter that changes nothing.
            on_progress: called with the stage, and the part of all the work that is done, after each module
                and each step of a text; what it raises ends the proof, and it may wait.

        Raises:
            AdapterFormatError: the files are not an adapter that can be served.
            ProofError: what would be served is not PEFT's.
            BaseChangedError: nothing more can be proved in this process.
            OSError: a file cannot be read, or the packed adapter not be written.
        """
        try:
            return self._prove(config, weights, packed, probes, probe_tokens, allow_noop, on_progress)
        except BaseException:
            packed.unlink(missing_ok=True)
            raise

    def merge(self, parents: Sequence[MergeInput], recipe: MergeRecipe, config: Path, weights: Path) -> None:
        """Write the two files of one adapter merged of several; neither is left if that fails.

        Raises as `merging.merge`.
        """
        try:
            merge(self._base, parents, recipe, self._max_rank, config, weights)
        except BaseException:
            config.unlink(missing_ok=True)
            weights.unlink(missing_ok=True)
            raise

    def _prove(
        self,
        config: Path,
        weights: Path,
        packed: Path,
        probes: Sequence[list[int]],
        probe_tokens: int,
        allow_noop: bool,
        on_progress: OnProgress,
    ) -> ProvenVersion:
        started = time.monotonic()
        on_progress("validating", 0.0)
        adapter = load_adapter(self._base, config, weights, self._max_rank, allow_noop=allow_noop)
        on_progress("proving", _LOADED)
        write_packed_adapter(packed, adapter.weights, base_id=self._base_id)
        sha256 = _sha256(packed)
        # What is proved is what the engine will read.
        finished = read_packed_adapter(packed, sha256, base_id=self._base_id)
        modules = self._modules.prove(
            adapter.reference,
            folded(without_head(finished)),
            lambda part: on_progress("proving", _LOADED + part * (_COMPARED - _LOADED)),
        )
        probes = [*_invoking(probes, invocation_of(finished)), *self._new_tokens(finished)]
        texts = self._texts.prove(
            adapter.reference,
            finished,
            probes,
            probe_tokens,
            lambda part: on_progress("proving", _COMPARED + part * (1 - _COMPARED)),
        )
        head, classified = adapter.weights.get(HEAD), 0
        if isinstance(head, Head):
            classifier = classifier_of(adapter.reference, adapter.spec.task, head)
            classified = self._texts.prove_classes(classifier, finished, probes, adapter.spec.task)
        if fingerprint(self._base) != self._fingerprint:
            raise BaseChangedError("a tensor of the attached base was written to")
        measured = measure(finished, self._base, lambda: on_progress("proving", 1.0))
        seconds = time.monotonic() - started
        report = version_report(adapter, finished, measured, modules, texts, seconds, self._base, classified)
        return ProvenVersion(report, sha256, packed.stat().st_size)

    def _new_tokens(self, weights: AdapterWeights) -> list[list[int]]:
        """Return a probe with tokens that the version adds to the base's; none if it adds none."""
        words = len(self._base.get_output_embeddings().weight)  # type: ignore[operator]
        new = range(words, max(vocabulary_of(weights), words))
        return [list(new[:_NEW_TOKENS])] if new else []


def _invoking(probes: Sequence[list[int]], invocation: Sequence[int]) -> list[list[int]]:
    """Return probes for an activated LoRA: behind each, before one, and in none of the first.

    Other adapters have no invocation, and the same probes as before.
    """
    if not invocation or not probes:
        return list(probes)
    begun = [[*invocation, *probes[0], *invocation, *probes[0]], [*invocation, *probes[0]]]
    return [probes[0], *begun, *([*probe, *invocation] for probe in probes)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def version_report(
    adapter: LoadedAdapter,
    weights: AdapterWeights,
    measured: Mapping[str, WeightFigures],
    modules: ModuleProof,
    texts: TextProof,
    seconds: float,
    base: nn.Module,
    classified: int = 0,
) -> VersionReport:
    spec = adapter.spec
    layers, linears = layers_of(base)
    return VersionReport(
        kinds=tuple(spec.kinds),
        rank=spec.rank,
        alpha=spec.alpha,
        rslora=spec.rslora,
        targets=tuple(spec.targets),
        parameters=spec.parameters,
        bytes=weights_bytes(weights),
        base_name=spec.base_name,
        dropped=tuple(spec.dropped),
        warnings=(*spec.warnings, *unusual(measured)),
        weight_score=weight_score(measured),
        modules=tuple(
            ModuleReport(
                name=module.name,
                kind=module.kind,
                rank=module.rank,
                alpha=module.alpha,
                parameters=module.parameters,
                norm=measured[module.name].norm if module.name in measured else _norm(weights[module.name]),
                spectral_norm=measured[module.name].spectral if module.name in measured else None,
                relative_norm=measured[module.name].relative if module.name in measured else None,
            )
            for module in spec.modules
        ),
        proof=ProofReport(
            modules_compared=modules.compared,
            modules_changed=adapter.changed,
            rows=modules.rows,
            exact=modules.exact == modules.compared,
            modules_exact=modules.exact,
            error_ratio=modules.error_ratio,
            kernels=modules.kernels,
            largest_difference=modules.largest_difference,
            texts=texts.texts,
            tokens_compared=texts.tokens,
            texts_changed=texts.changed,
            base_unchanged=True,
            seconds=seconds,
            shown=what_was_shown(
                modules.compared,
                modules.exact,
                modules.tolerated,
                modules.error_ratio,
                modules.kernels,
                texts.texts,
                texts.tokens,
                classified,
            ),
        ),
        task=spec.task,
        invocation_tokens=spec.invocation,
        labels=spec.labels,
        label_names=tuple(spec.label_names),
        vocabulary=0 if spec.words == len(base.get_output_embeddings().weight) else spec.words,  # type: ignore[operator]
        tokenizer=spec.tokens,
        defaults=spec.defaults,
        base_layers=layers,
        base_linears=tuple(linears),
    )


def layers_of(base: nn.Module) -> tuple[int, list[str]]:
    """Return the number of a base's layers, and the names of the linear modules in them, each once."""
    numbers, names = set[str](), dict[str, None]()
    for name, module in base.named_modules():
        found = _IN_LAYER.search(name)
        if found and isinstance(module, nn.Linear):
            numbers.add(found[1])
            names[".".join(part for part in found[2].split(".") if not part.isdigit())] = None
    return len(numbers), list(names)


def _norm(head: ModuleWeights) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for _, tensor in tensors_of(head)))
