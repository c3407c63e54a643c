"""Read an unquantized base from disk: its config, its layers and its tensors, one at a time.

The model is never loaded whole: merging and converting read a tensor, write it and drop it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open
from torch import nn

from onebase_engine.base.default_base import BaseError, resolve_base
from onebase_engine.base.experts import expert_matrices
from onebase_engine.base.layers import LayerShape, adaptable_layers, empty_base, whole_class
from onebase_engine.base.load import (
    BaseSettings,
    Quantization,
    UnsupportedBaseError,
    load_config,
    quantized_layers,
    rounded,
)

INDEX_FILE = "model.safetensors.index.json"
OnProgress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1."""


class ExportError(ValueError):
    """The export is not possible in this form; the message says why, and what works."""


class ExpertPart(NamedTuple):
    """The part of a parameter with the matrices of all experts that one tensor of the files holds."""

    parameter: str
    """Full name."""
    expert: int | None
    """Number of the expert, or None if the tensor is the whole parameter."""
    part: int = 0
    parts: int = 1
    """Place among, and number of, the tensors whose rows make up an expert's matrix: its gate and what it
    gates are two in most files."""


class BaseFiles:
    """The files of one base in `folder`. `name`: the base's name in messages. Raises ExportError.

    served: how a server quantizes the base, if the weights of quantized layers are to be read as it computes
    with them; None: as they are in the files.
    """

    def __init__(self, folder: Path, name: str, served: BaseSettings | None = None) -> None:
        self.folder = folder
        self.name = name
        self._served = served
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        if self.config.get("quantization_config"):
            raise ExportError(
                f"the base in {folder} is stored quantized, and merging into rounded weights rounds them "
                "again: name the unquantized one with --base"
            )
        try:
            self._loaded_config = load_config(folder)
        except UnsupportedBaseError as error:
            raise ExportError(str(error)) from None
        self.shards = self._read_shards()
        self._shard_of = {name: shard for shard, names in self.shards.items() for name in names}
        self._kept: dict[str, torch.Tensor] = {}
        if lacking := sorted(name for name in self._rounded if not self.has(name)):
            raise ExportError(
                f"the files of {name} hold {lacking[0]} under another name, so it cannot be rounded as the "
                "server rounds it: use --weights original"
            )
        stacked = {place.parameter for place in self.expert_parts.values()} if served is not None else set()
        if served is not None and any(one.path not in stacked for one in expert_matrices(self._model)):
            raise ExportError(
                f"the files of {name} hold experts in a form that is not rounded here as the server rounds "
                "them: use --weights original"
            )

    def _read_shards(self) -> Mapping[str, tuple[str, ...]]:
        """Return the names of the tensors in each safetensors file, both in order."""
        index = self.folder / INDEX_FILE
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            files = sorted(set(weight_map.values()))
        else:
            files = ["model.safetensors"]
        found = {}
        for file in files:
            if Path(file).name != file or not (self.folder / file).is_file():
                raise ExportError(f"{self.folder} lacks {file}: name the whole base with --base")
            with safe_open(self.folder / file, framework="pt") as opened:
                found[file] = tuple(opened.keys())
        return found

    @property
    def architecture(self) -> str:
        """transformers' class of the model, such as LlamaForCausalLM."""
        named = self.config.get("architectures") or ["unknown"]
        return str(named[0])

    @property
    def text_config(self) -> Any:
        """transformers' config of the text part, with its defaults."""
        return self._loaded_config.get_text_config()

    @property
    def tied(self) -> bool:
        """Whether the head has no weight of its own but the embedding's."""
        return bool(getattr(self._loaded_config, "tie_word_embeddings", False))

    @cached_property
    def layers(self) -> dict[str, LayerShape]:
        """Layers that an adapter may adapt, by full name, found on a model tree without weights.

        Those of a tower that sees or hears are among them: what is exported is the whole model.
        """
        return adaptable_layers(self._model)

    @cached_property
    def expert_parts(self) -> Mapping[str, ExpertPart]:
        """Tensors of experts, by name, as transformers puts them together when it loads the files.

        Those that it changes in another way than by stacking them are not there.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            Concatenate,
            MergeModulelist,
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        shapes = {one.path: one.sizes for one in expert_matrices(self._model)}
        if not shapes:
            return {}
        changes = get_model_conversion_mapping(self._model)
        renamings = [one for one in changes if isinstance(one, WeightRenaming)]
        converters = [one for one in changes if isinstance(one, WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        found: dict[str, ExpertPart] = {}
        counts: dict[tuple[str, str], int] = {}
        for name in sorted(self._shard_of, key=dot_natural_key):
            parameter, pattern = rename_source_key(name, renamings, converters)
            if parameter not in shapes:
                continue
            if pattern is None:
                found[name] = ExpertPart(parameter, None)
                continue
            converter = by_pattern[pattern]
            number = counts[parameter, pattern] = counts.get((parameter, pattern), -1) + 1
            kinds = [type(operation) for operation in converter.operations]
            if kinds in ([MergeModulelist], [MergeModulelist, Concatenate]):
                sources = converter.source_patterns
                found[name] = ExpertPart(parameter, number, sources.index(pattern), len(sources))
        return found

    @cached_property
    def _by_expert(self) -> Mapping[tuple[str, int | None], list[str]]:
        """Names of the tensors that make up an expert's matrix, in the order of its rows."""
        found: dict[tuple[str, int | None], list[str]] = {}
        for name, place in sorted(self.expert_parts.items(), key=lambda item: item[1].part):
            found.setdefault((place.parameter, place.expert), []).append(name)
        return found

    @cached_property
    def _model(self) -> nn.Module:
        """The model's tree, without weights."""
        found: nn.Module = empty_base(self._loaded_config, whole_class(self._loaded_config))
        return found

    @cached_property
    def _rounded(self) -> frozenset[str]:
        """Names of the weights that the server quantizes."""
        if self._served is None:
            return frozenset()
        return frozenset(f"{name}.weight" for name in quantized_layers(self._served, self._model))

    @cached_property
    def embedding(self) -> str:
        """The full name of the input embedding."""
        return next(name for name, layer in self.layers.items() if layer.kind == "embedding")

    @cached_property
    def head(self) -> str | None:
        """The full name of the output head, if it is a module of its own."""
        return next((name for name in self.layers if name.rpartition(".")[2] == "lm_head"), None)

    def has(self, tensor: str) -> bool:
        """Return True if the files hold a tensor of this name."""
        return tensor in self._shard_of

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor, in memory of its own or mapped from its file; rounded if a server rounds it."""
        found = self._stored(name)
        if self._served is None:
            return found
        if (place := self.expert_parts.get(name)) is not None:
            return self._rounded_experts(found, place, self._served)
        return rounded(found, self._served) if name in self._rounded else found

    def _rounded_experts(self, found: torch.Tensor, place: ExpertPart, served: BaseSettings) -> torch.Tensor:
        """Return a tensor of experts, each of whose matrices is rounded as a whole, [out, in]."""
        if place.expert is not None:
            whole = torch.cat([self._stored(name) for name in self._by_expert[place.parameter, place.expert]])
            return rounded(whole, served).chunk(place.parts)[place.part]
        made = torch.empty_like(found, dtype=served.dtype)
        for matrix, target in zip(found, made, strict=True):
            if self.layers[place.parameter].transposed:
                target.copy_(rounded(matrix.T.contiguous(), served).T)
            else:
                target.copy_(rounded(matrix, served))
        return made

    def _stored(self, name: str) -> torch.Tensor:
        with safe_open(self.folder / self._shard_of[name], framework="pt") as opened:
            found: torch.Tensor = opened.get_tensor(name)
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from the header alone."""
        with safe_open(self.folder / self._shard_of[name], framework="pt") as opened:
            return tuple(opened.get_slice(name).get_shape())

    def in_fp32(self, name: str) -> bool:
        """Return True if the files hold a tensor in fp32, and transformers keeps it so in any model.

        These are routers of some mixtures, and what is added to their scores.
        """
        kept = getattr(self._model, "_keep_in_fp32_modules_strict", None) or ()
        if not any(one in name for one in kept):
            return False
        with safe_open(self.folder / self._shard_of[name], framework="pt") as opened:
            return bool(opened.get_slice(name).get_dtype() == "F32")

    def parameter(self, name: str) -> torch.Tensor | None:
        """Return a parameter for the checks of an adapter's files; None for a tied head's weight.

        It is kept until `forget`, because a caller that compares addresses must find the same tensor twice.
        """
        if name not in self._shard_of or (self.tied and self.head and name == f"{self.head}.weight"):
            return None
        if name not in self._kept:
            self._kept[name] = self._stored(name)
        return self._kept[name]

    def forget(self) -> None:
        """Release the tensors that `parameter` has read."""
        self._kept.clear()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the exported weights: float16 if the base is stored in float16, else bfloat16."""
        name = f"{self.embedding}.weight"
        with safe_open(self.folder / self._shard_of[name], framework="pt") as opened:
            return torch.float16 if opened.get_slice(name).get_dtype() == "F16" else torch.bfloat16


def open_base(spec: str, progress: OnProgress, options: Mapping[str, str] | None = None) -> BaseFiles:
    """Return the base that `spec` names (see `resolve_base`), downloaded if necessary.

    Args:
        options: `quantization`, `blocksize` and `double_quant` of a server whose weights are to be read.

    Raises ExportError.
    """
    try:
        resolved = resolve_base(spec, lambda message, share: progress("getting the base", share))
    except BaseError as error:
        raise ExportError(str(error)) from error
    return BaseFiles(resolved.folder, resolved.repo or resolved.name, _served(resolved.folder, options or {}))


def _served(folder: Path, options: Mapping[str, str]) -> BaseSettings | None:
    kind = options.get("quantization")
    if kind not in ("nf4", "int8"):
        return None
    return BaseSettings(
        folder=folder,
        quantization=cast(Quantization, kind),
        blocksize=int(options.get("blocksize", 64)),
        double_quant=options.get("double_quant", "true") == "true",
    )
