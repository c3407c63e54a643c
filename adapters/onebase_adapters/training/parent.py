"""The adapter that a run goes on from: what it fixes of the recipe, and its weights, loaded by PEFT."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onebase_adapters.format.canonical import canonicalize
from onebase_adapters.format.config import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    AdapterFormatError,
    check_config,
)
from onebase_adapters.format.names import BaseModules
from onebase_adapters.format.safetensors_file import TensorFile
from onebase_adapters.format.tensors import plan
from onebase_adapters.training.recipe import (
    HIGHEST_RANK,
    MODEL,
    Recipe,
    RecipeError,
    continued,
    own_settings,
)
from onebase_engine.base.layers import adaptable_layers


@dataclass(frozen=True)
class Parent:
    """One version of an adapter. label: what people call it. digest: names its content, hexadecimal.
    config, weights: its two files, which need not have been checked."""

    label: str
    digest: str
    config: Path
    weights: Path

    @classmethod
    def of_folder(cls, folder: Path) -> Parent:
        """An adapter's folder. Raises OSError, if one of its files cannot be read."""
        config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
        total = hashlib.sha256()
        for path in (config, weights):
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return cls(str(folder), total.hexdigest(), config, weights)


def modules_of(parent: Parent, model: nn.Module) -> dict[str, Any]:
    """`own_settings` by the parent's files alone, before a base is in memory.

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
            modules = plan(file.entries, facts, BaseModules(layers, own.get), HIGHEST_RANK).modules
    except (AdapterFormatError, OSError) as error:
        raise RecipeError(MODEL, f"{parent.label} cannot be trained further on this base: {error}") from error
    settings = own_settings(modules, task=facts.task, rslora=facts.rslora, label=parent.label)
    for name in settings["targets"]:
        if layers[name].kind != "linear":
            raise RecipeError(
                MODEL,
                f"{parent.label} cannot be trained further: its module {name} is no linear layer, and only "
                "those are trained here. Begin with the base or another one",
            )
    return settings


def check_parent(recipe: Recipe, parent: Parent, model: nn.Module) -> None:
    """Raise RecipeError unless the recipe says of the adapter what its files say. `model`: the base's."""
    continued({**recipe.to_json()}, modules_of(parent, model), parent.label)


def load_parent(base: nn.Module, tree: nn.Module, parent: Parent, recipe: Recipe, name: str) -> Any:
    """PEFT's own model of the parent on a tree over the base, to be trained: its weights in fp32.

    The files are checked and written again as a canonical folder first, which is all that PEFT sees.

    Raises RecipeError: the files are no adapter of this base.
    """
    from peft import LoraConfig, PeftModel

    own = dict(base.named_parameters(remove_duplicate=False))
    with tempfile.TemporaryDirectory(prefix="onebase-parent-") as place:
        folder = Path(place)
        try:
            canonicalize(
                parent.config,
                parent.weights,
                adaptable_layers(base),
                HIGHEST_RANK,
                folder,
                base_tensor=own.get,
            )
        except AdapterFormatError as error:
            raise RecipeError(MODEL, f"{parent.label} cannot be trained further: {error}") from error
        config: Any = LoraConfig.from_pretrained(place)
        config.lora_dropout = recipe.dropout
        model: Any = PeftModel.from_pretrained(
            tree, place, adapter_name=name, is_trainable=True, config=config
        )
    return model


def copied(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The tensors as they are now."""
    return {name: one.detach().clone() for name, one in parameters.items()}
