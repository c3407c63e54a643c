"""Merge several adapters into one, by PEFT's own `add_weighted_adapter` on a view of the base."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onebase_adapters.format.canonical import AdapterFormatError, canonicalize, exact_config
from onebase_adapters.format.config import check_config
from onebase_adapters.format.safetensors_file import TensorToWrite, write_tensors
from onebase_adapters.format.spec import AdapterSpec, ModuleSpec
from onebase_adapters.format.spellings import PREFIX
from onebase_adapters.proof.extract import extract
from onebase_engine.base.layers import LayerShape, adaptable_layers, left_out
from onebase_engine.base.load import BaseChangedError, fingerprint
from onebase_engine.base.view import peft_view
from onebase_engine.kernels.weights import AdapterWeights, LoraWeights
from onebase_protocol.adapters import MergeMethod, MergeSign

_MERGED = "merged"
_PIECE = 1 << 20
"""Elements that are written at once."""


@dataclass(frozen=True)
class MergeInput:
    """One adapter to merge: its name in messages, its two files and its weight."""

    label: str
    config: Path
    weights: Path
    weight: float


@dataclass(frozen=True)
class MergeRecipe:
    """Method and parameters of a merge.

    `density`: the part of each matrix that `ties` and `dare_...` keep, 0 to 1; `sign`: PEFT's method by which
    `..._ties` elect the majority sign; `seed`: of the random choice of what `dare_...` drop.
    """

    method: MergeMethod
    density: float | None
    sign: MergeSign
    seed: int


def merge(
    base: nn.Module,
    parents: Sequence[MergeInput],
    recipe: MergeRecipe,
    max_rank: int,
    config: Path,
    weights: Path,
) -> None:
    """Write the two files of the adapter that PEFT makes of the parents. They are not proved yet.

    Args:
        max_rank: largest rank that the server's slots hold.
        config, weights: the files to write.

    Raises:
        AdapterFormatError: a parent is not sound, or they cannot be merged so.
        BaseChangedError: nothing more can be done in this process.
        OSError: the files cannot be written.
    """
    before = fingerprint(base)
    layers = adaptable_layers(base)
    own = dict(base.named_parameters(remove_duplicate=False))
    with tempfile.TemporaryDirectory(prefix="onebase-merge-") as place:
        folders, specs = [], []
        for number, parent in enumerate(parents):
            folder = Path(place) / str(number)
            folder.mkdir()
            spec = canonicalize(
                parent.config,
                parent.weights,
                layers,
                max_rank,
                folder,
                base_tensor=own.get,
                left_out=left_out(base),
            )
            _check_plain(parent, spec)
            folders.append(folder)
            specs.append(spec)
        if recipe.method != "cat":
            _check_ranks(parents, specs, recipe.method)
        merged = _merged_by_peft(base, folders, [parent.weight for parent in parents], recipe)
    if fingerprint(base) != before:
        raise BaseChangedError("merging adapters changed the base")
    modules = [_spec_of(name, module, layers) for name, module in sorted(merged.items())]
    named = next((spec.base_name for spec in specs if spec.base_name), None)
    config.write_text(json.dumps(exact_config(modules, base_name=named), indent=2) + "\n")
    check_config(config.read_bytes())
    write_tensors(weights, _tensors(merged, layers))


def _check_plain(parent: MergeInput, spec: AdapterSpec) -> None:
    if spec.task != "CAUSAL_LM":
        raise AdapterFormatError(
            "adapter_not_composable",
            f"{parent.label} generates no text (its task_type is {spec.task}): leave it out",
        )
    for module in spec.modules:
        if module.experts:
            raise AdapterFormatError(
                "adapter_not_composable",
                f"{parent.label} adapts {module.name}, and PEFT joins matrices of experts across them: leave "
                "it out, or weight adapters in each request instead",
            )
        if module.kind != "lora" or module.bias:
            kind = (
                "lora_bias"
                if module.bias
                else {"saved": "modules_to_save", "tokens": "token rows"}.get(module.kind, "DoRA")
            )
            raise AdapterFormatError(
                "adapter_not_composable",
                f"{parent.label} has {kind} on {module.name}, which PEFT cannot merge: leave it out",
            )


def _check_ranks(parents: Sequence[MergeInput], specs: Sequence[AdapterSpec], method: str) -> None:
    """Raise AdapterFormatError unless all ranks are equal: methods other than `cat` add matrices
    elementwise."""
    ranks: dict[str, tuple[int, str]] = {}
    largest = [(spec.rank, parent.label) for parent, spec in zip(parents, specs, strict=True)]
    for rank, label in largest:
        _check_same(rank, label, ranks.setdefault("", (rank, label)), "", method)
    for parent, spec in zip(parents, specs, strict=True):
        for module in spec.modules:
            first = ranks.setdefault(module.name, (module.rank, parent.label))
            _check_same(module.rank, parent.label, first, f" on {module.name}", method)


def _check_same(rank: int, label: str, first: tuple[int, str], where: str, method: str) -> None:
    if rank != first[0]:
        raise AdapterFormatError(
            "ranks_differ",
            f"{first[1]} has rank {first[0]} and {label} rank {rank}{where}: {method} needs the same rank in "
            "all; cat takes any",
        )


def _merged_by_peft(
    base: nn.Module, folders: Sequence[Path], weights: Sequence[float], recipe: MergeRecipe
) -> AdapterWeights:
    from peft import PeftModel

    names = [f"parent-{number}" for number in range(len(folders))]
    devices = [parameter.device for parameter in base.parameters() if parameter.device.type == "cuda"][:1]
    with warnings.catch_warnings(), torch.random.fork_rng([device.index or 0 for device in devices]):
        # Advice to who trains, and to who keeps all of a matrix.
        warnings.simplefilter("ignore", UserWarning)
        model: Any = PeftModel.from_pretrained(peft_view(base), str(folders[0]), adapter_name=names[0])
        for name, folder in zip(names[1:], folders[1:], strict=True):
            model.load_adapter(str(folder), adapter_name=name)
        # PEFT gives the result the first one's config. Its scale, of rsLoRA too, is in the matrices by then.
        model.peft_config[names[0]].use_rslora = False
        _keep_exact(model.base_model)
        torch.manual_seed(recipe.seed)
        with torch.no_grad():
            model.base_model.add_weighted_adapter(
                names,
                list(weights),
                _MERGED,
                combination_type=recipe.method,
                density=recipe.density,
                majority_sign_method=recipe.sign,
            )
    return extract(model, _MERGED)


def _keep_exact(tuner: Any) -> None:
    """Make PEFT create the merged matrices in fp32; `cat` copies into them, and they would be 16-bit."""
    from peft.tuners.tuners_utils import cast_adapter_dtype

    inject = tuner.inject_adapter

    def inject_exact(*arguments: Any, **options: Any) -> None:
        inject(*arguments, **options)
        cast_adapter_dtype(tuner.model, adapter_name=_MERGED)

    tuner.inject_adapter = inject_exact


def _spec_of(name: str, module: object, layers: Mapping[str, LayerShape]) -> ModuleSpec:
    if not isinstance(module, LoraWeights) or module.scale != 1.0:
        raise AdapterFormatError("adapter_not_composable", f"PEFT merged {name} into no plain LoRA")
    parameters = module.a.numel() + module.b.numel()
    return ModuleSpec(name, "lora", module.rank, float(module.rank), False, parameters)


def _tensors(merged: AdapterWeights, layers: Mapping[str, LayerShape]) -> Iterator[TensorToWrite]:
    for name, module in merged.items():
        if isinstance(module, LoraWeights):
            embeds = layers[name].kind == "embedding"
            a, b = ("lora_embedding_A", "lora_embedding_B") if embeds else ("lora_A.weight", "lora_B.weight")
            yield _to_write(f"{PREFIX}{name}.{a}", module.a.T if embeds else module.a)
            yield _to_write(f"{PREFIX}{name}.{b}", module.b)


def _to_write(name: str, tensor: torch.Tensor) -> TensorToWrite:
    return TensorToWrite(
        name, torch.float32, tuple(tensor.shape), lambda: torch.split(tensor.reshape(-1), _PIECE)
    )
