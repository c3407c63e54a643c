"""Load the adapters that a run needs besides its own through PEFT: the parent that it continues, which fixes
parts of its recipe, and the version that its result would replace."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from onebase_adapters.format.canonical import HEAD_FILE, canonicalize
from onebase_adapters.format.config import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    AdapterFormatError,
    check_config,
)
from onebase_adapters.format.names import BaseModules
from onebase_adapters.format.safetensors_file import TensorFile
from onebase_adapters.format.spec import AdapterSpec
from onebase_adapters.format.tensors import plan
from onebase_engine.base.layers import adaptable_layers, left_out
from onebase_training.recipe import (
    HIGHEST_RANK,
    MODEL,
    Recipe,
    RecipeError,
    continued,
    own_settings,
)

_SHOWN = 10
"""Largest number of labels that a message lists."""


@dataclass(frozen=True)
class Parent:
    """One version of an adapter. label: its name for people. digest: names its content, hexadecimal. config,
    weights: its two files, which need not have been checked."""

    label: str
    digest: str
    config: Path
    weights: Path

    @classmethod
    def of_folder(cls, folder: Path) -> Parent:
        """Return the adapter in a folder. Raises OSError if one of its files cannot be read."""
        config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
        total = hashlib.sha256()
        for path in (config, weights):
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return cls(str(folder), total.hexdigest(), config, weights)


@dataclass(frozen=True)
class ActiveVersion:
    """Version that requests for a job's adapter use.

    label: `name@digest` for people. digest: the version's own. version: its files; None if they cannot
    be read, for the reason `problem`.
    """

    label: str
    digest: str
    version: Parent | None
    problem: str = ""


FindActive = Callable[[], ActiveVersion | None]
"""Function that returns the active version when training has ended; None: no version is active."""


def modules_of(parent: Parent, model: nn.Module) -> dict[str, Any]:
    """Return `own_settings` from the parent's files alone, before a base is in memory.

    Args:
        model: the base's tree; it may be on meta.

    Raises RecipeError: the files are no adapter of this base, or of a kind that is not trained here.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    try:
        with parent.config.open("rb") as opened:
            facts = check_config(opened.read(MAX_CONFIG_BYTES + 1))
        with parent.weights.open("rb") as opened:
            file = TensorFile.read_header(opened)
            layers = adaptable_layers(model)
            known = BaseModules(layers, own.get, tuple(left_out(model)))
            modules = plan(file.entries, facts, known, HIGHEST_RANK).modules
    except (AdapterFormatError, OSError) as error:
        raise RecipeError(MODEL, f"{parent.label} cannot be trained further on this base: {error}") from error
    settings = own_settings(
        modules,
        task=facts.task,
        rslora=facts.rslora,
        label=parent.label,
        invocation=facts.invocation,
    )
    for name in settings["targets"]:
        if layers[name].kind not in ("linear", "experts"):
            raise RecipeError(
                MODEL,
                f"{parent.label} cannot be trained further: its module {name} is no linear layer, and only "
                "those are trained here. Begin with the base or another one",
            )
    return settings


def check_parent(recipe: Recipe, parent: Parent, model: nn.Module) -> None:
    """Raise RecipeError unless the recipe agrees with the adapter's files. `model`: the base's."""
    continued({**recipe.to_json()}, modules_of(parent, model), parent.label)


def load_parent(base: nn.Module, tree: nn.Module, parent: Parent, recipe: Recipe, name: str) -> Any:
    """Return PEFT's own model of the parent on a tree over the base, to be trained: its weights in fp32.

    The files are checked and written again as a canonical folder first, which is all that PEFT sees.

    Raises RecipeError: the files are no adapter of this base.
    """
    from peft import LoraConfig, PeftModel

    with tempfile.TemporaryDirectory(prefix="onebase-parent-") as place:
        try:
            _write_canonical(base, parent, Path(place))
        except AdapterFormatError as error:
            raise RecipeError(MODEL, f"{parent.label} cannot be trained further: {error}") from error
        config: Any = LoraConfig.from_pretrained(place)
        config.lora_dropout = recipe.dropout
        model: Any = PeftModel.from_pretrained(
            tree, place, adapter_name=name, is_trainable=True, config=config
        )
    return model


def load_version(base: nn.Module, tree: nn.Module, version: Parent, name: str) -> LoadedVersion:
    """Load a version of any kind that is served onto a tree over the base, to be measured.

    Raises AdapterFormatError: the files are no adapter of this base.
    """
    from peft import PeftModel

    with tempfile.TemporaryDirectory(prefix="onebase-version-") as place:
        spec = _write_canonical(base, version, Path(place))
        if spec.words not in (0, len(base.get_output_embeddings().weight)):  # type: ignore[operator]
            raise AdapterFormatError(
                "unsupported_kind",
                f"it has a vocabulary of its own ({spec.words} tokens), and is measured by its own alone",
            )
        model: Any = PeftModel.from_pretrained(tree, place, adapter_name=name)
        head = _head(load_file(Path(place) / HEAD_FILE)) if spec.labels else None
    device = next(base.parameters()).device
    return LoadedVersion(model, spec.label_names, None if head is None else head.to(device))


@dataclass(frozen=True)
class LoadedVersion:
    """PEFT's model of a version that is only measured. For a classifier also its labels, in the order of the
    head's rows, and the head, [labels, hidden] in fp32."""

    model: Any
    labels: tuple[str, ...]
    head: nn.Linear | None


def _head(tensors: Mapping[str, torch.Tensor]) -> nn.Linear:
    weight, bias = tensors["weight"].float(), tensors.get("bias")
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.float(), requires_grad=False)
    return made


def why_not_comparable(version: Parent, labels: Sequence[str]) -> str:
    """Return the reason why a version cannot be measured on the held-out rows of a run, or "" if it can.

    Args:
        labels: the run's own, of a classifier; none for text.

    Raises AdapterFormatError, OSError: its config cannot be read.
    """
    with version.config.open("rb") as opened:
        facts = check_config(opened.read(MAX_CONFIG_BYTES + 1))
    if facts.task != ("SEQ_CLS" if labels else "CAUSAL_LM"):
        kinds = {"CAUSAL_LM": "generates text", "SEQ_CLS": "classifies texts"}
        trained = "classifies texts" if labels else "generates text"
        return (
            f"it {kinds.get(facts.task, f'is of the kind {facts.task}')}, and the trained adapter {trained}"
        )
    if labels and set(facts.label_names) != set(labels):
        known = ", ".join(facts.label_names[:_SHOWN]) or "labels without names"
        return f"its labels are others: {known}{', ...' if len(facts.label_names) > _SHOWN else ''}"
    return ""


def _write_canonical(base: nn.Module, version: Parent, folder: Path) -> AdapterSpec:
    """Write the version's files again as a canonical folder, which is all that PEFT sees.

    Raises AdapterFormatError: the files are no adapter of this base.
    """
    own = dict(base.named_parameters(remove_duplicate=False))
    return canonicalize(
        version.config,
        version.weights,
        adaptable_layers(base),
        HIGHEST_RANK,
        folder,
        base_tensor=own.get,
        left_out=left_out(base),
    )


def copied(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return copies of the tensors as they are now."""
    return {name: one.detach().clone() for name, one in parameters.items()}
