"""Merge base and adapter into one 16-bit model, weight by weight from the files of the unquantized base.

From the weights in the files the result is that of PEFT's `merge_and_unload` on the base in 16 bit, without
the whole model in memory. From the weights that a server computes with, each one is first rounded as the
server rounds it: the adapter was trained and proved on those.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onebase_adapters.export.adapter_parts import AdapterParts, opened_adapter
from onebase_adapters.export.base_files import (
    INDEX_FILE,
    BaseFiles,
    ExpertPart,
    ExportError,
    OnProgress,
    open_base,
)
from onebase_adapters.format.safetensors_file import TensorToWrite, write_tensors
from onebase_adapters.format.spec import ModuleSpec

_PIECE = 1 << 20
"""Elements that are written at once."""
_OTHER_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken")
"""Patterns of the base's other files: the tokenizer, the chat template, the generation settings."""


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the merged model; `make` computes it."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]
    dtype: torch.dtype


class MergedModel:
    """Base and adapter merged into one model.

    Raises ExportError if transformers' model of the base has no place for what the adapter changes.
    """

    def __init__(self, base: BaseFiles, adapter: AdapterParts) -> None:
        self.base = base
        self.dtype = base.dtype
        self._adapter = adapter
        if adapter.spec.invocation:
            raise ExportError(
                "the adapter is an activated LoRA (alora_invocation_tokens): it leaves the tokens before its "
                "invocation to the base, which no merged weight can do. Export it as peft or gguf-lora"
            )
        for module in adapter.spec.modules:
            self._check(module)
        embedding, head = adapter.modules.get(base.embedding), adapter.modules.get(base.head or "")
        both_rows = embedding is not None and embedding.kind == "tokens"
        self.unties = base.tied and not both_rows and (embedding is not None or head is not None)
        """Whether embedding and head, which share a weight in the base, become two weights."""

    def _check(self, module: ModuleSpec) -> None:
        base = self.base
        if module.experts:
            if not any(place.parameter == module.name for place in base.expert_parts.values()):
                raise ExportError(
                    f"the files of {base.name} hold the experts of {module.name} in a form that the adapter "
                    "cannot be merged into: export it as peft"
                )
            return
        tied_head = base.tied and module.name == base.head
        if not tied_head and not base.has(f"{module.name}.weight"):
            raise ExportError(
                f"the files of {base.name} do not hold {module.name}.weight under this name, so the adapter "
                "cannot be merged into them: export it as peft"
            )
        if module.bias and not base.has(f"{module.name}.bias"):
            raise ExportError(
                f"lora_bias: the adapter adds a bias to {module.name}, which has none in "
                f"{base.architecture}, so no merged model can hold it: export it as peft"
            )

    def shards(self) -> Mapping[str, list[MergedTensor]]:
        """Return the tensors of the merged model by the file of the base that holds them."""
        base, head = self.base, f"{self.base.head}.weight"
        found: dict[str, list[MergedTensor]] = {}
        for shard, names in base.shards.items():
            kept = [name for name in names if not (base.tied and name == head)]
            found[shard] = [
                MergedTensor(name, base.shape(name), self._maker(name), self._dtype_of(name)) for name in kept
            ]
            if self.unties and f"{base.embedding}.weight" in kept:
                shape = base.shape(f"{base.embedding}.weight")
                found[shard].append(MergedTensor(head, shape, self._maker(head), self.dtype))
        return found

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if self.base.in_fp32(name) else self.dtype

    def _maker(self, name: str) -> Callable[[], torch.Tensor]:
        return lambda: self.tensor(name)

    @torch.inference_mode()
    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor of the merged model."""
        module, _, parameter = name.rpartition(".")
        stored = f"{self.base.embedding}.weight" if not self.base.has(name) or self._is_tied(name) else name
        plain = self.base.tensor(stored)
        if not plain.is_floating_point():
            raise ExportError(
                f"{name} in the files of {self.base.name} holds {plain.dtype}, no 16-bit weights"
            )
        found, spec = plain.to(self._dtype_of(stored)), self._adapter.modules.get(module)
        place = self.base.expert_parts.get(name)
        if place is not None and place.parameter in self._adapter.modules:
            return self._with_experts(found, place)
        if spec is None:
            return found
        if spec.kind == "saved":
            return self._adapter.part(module, parameter).to(self.dtype)
        if spec.kind == "tokens":
            rows = self._adapter.part(self.base.embedding, "trainable_tokens_delta")
            return found.index_copy(0, torch.tensor(spec.indices), rows.to(self.dtype))
        return self._with_matrices(found, spec, parameter)

    def _is_tied(self, name: str) -> bool:
        return self.base.tied and name == f"{self.base.head}.weight"

    def _with_experts(self, found: torch.Tensor, place: ExpertPart) -> torch.Tensor:
        """Return a tensor of experts plus its difference, which PEFT rounds before it adds it."""
        layer = self.base.layers[place.parameter]
        a, b = self._adapter.expert_matrices(place.parameter)
        scale, rows = self._adapter.scale(place.parameter), layer.size_out // place.parts
        own = b[:, place.part * rows : (place.part + 1) * rows]

        def difference(number: int) -> torch.Tensor:
            delta = (own[number] @ a[number] * scale).to(found.dtype)
            return delta.T if layer.transposed else delta

        if place.expert is not None:
            return found + difference(place.expert)
        made = found.clone()
        for number, matrix in enumerate(made):
            matrix += difference(number)
        return made

    def _with_matrices(self, found: torch.Tensor, spec: ModuleSpec, parameter: str) -> torch.Tensor:
        adapter, scale = self._adapter, self._adapter.scale(spec.name)
        if parameter == "bias":
            return (
                (found + adapter.part(spec.name, "lora_B.bias") * scale).to(found.dtype)
                if spec.bias
                else found
            )
        embeds = spec.name == self.base.embedding
        delta = adapter.part(spec.name, "lora_B") @ adapter.part(spec.name, "lora_A")
        delta = (delta.T if embeds else delta) * scale
        if spec.kind == "lora":
            return (found + delta).to(found.dtype)
        # DoRA: of each output (of an embedding: of each of its dimensions) the length is learned.
        weight, axis = found + delta, 0 if embeds else 1
        factor = adapter.part(spec.name, "lora_magnitude_vector") / torch.linalg.norm(weight, dim=axis)
        scaled: torch.Tensor = factor.unsqueeze(axis) * weight
        return scaled.to(found.dtype)

    @property
    def config(self) -> dict[str, Any]:
        """The config of the merged model."""
        made = {key: value for key, value in self.base.config.items() if key != "torch_dtype"}
        made["dtype"] = str(self.dtype).removeprefix("torch.")
        return made | {"tie_word_embeddings": False} if self.unties else made


def export(
    adapter: Path, target: Path, *, base: str, options: Mapping[str, str], progress: OnProgress
) -> dict[str, object]:
    """Write base and adapter as a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        adapter: a PEFT folder.
        target: the folder to make.
        base: as `onebase serve --base` takes it; unquantized.
        options: `name`, the name that the result gives itself if its format has a field for that, and the
            options of `open_base`.

    Returns what was written: `base` (its name), `base_folder` and `bytes`.

    Raises:
        ExportError: it cannot be merged; the message says why and what works.
        OSError: the folder cannot be written.
    """
    files = open_base(base, progress, options)
    with opened_adapter(adapter, files) as parts:
        model = MergedModel(files, parts)
        shards = model.shards()
        size = sum(_bytes(tensor) for tensors in shards.values() for tensor in tensors)
        check_room(target, size)
        target.mkdir()
        written = _Counter(size, progress)
        for shard, tensors in shards.items():
            write_tensors(target / shard, [_to_write(tensor, written) for tensor in tensors])
    _write_others(model, target, shards, size)
    return {"base": files.name, "base_folder": str(files.folder), "bytes": size}


def check_room(target: Path, size: int) -> None:
    """Raise ExportError unless the disk of `target` has room for `size` bytes."""
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise ExportError(
            f"the export takes {size / 1e9:.2f} GB, and {target.parent} has {free / 1e9:.2f} GB free: make "
            "room, or write it to another disk with --out"
        )


class _Counter:
    """Reports the share of `size` bytes that is written."""

    def __init__(self, size: int, progress: OnProgress) -> None:
        self._size, self._progress, self._done = size, progress, 0

    def add(self, count: int) -> None:
        self._done += count
        self._progress("merging", self._done / self._size)


def _bytes(tensor: MergedTensor) -> int:
    return torch.Size(tensor.shape).numel() * tensor.dtype.itemsize


def _to_write(tensor: MergedTensor, written: _Counter) -> TensorToWrite:
    def pieces() -> Iterator[torch.Tensor]:
        for piece in torch.split(tensor.make().reshape(-1), _PIECE):
            yield piece
            written.add(piece.nbytes)

    return TensorToWrite(tensor.name, tensor.dtype, tensor.shape, pieces)


def _write_others(
    model: MergedModel, target: Path, shards: Mapping[str, list[MergedTensor]], size: int
) -> None:
    """Write everything but the weights."""
    for pattern in _OTHER_FILES:
        for file in model.base.folder.glob(pattern):
            shutil.copyfile(file, target / file.name)
    (target / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")
    if len(shards) > 1:
        where = {tensor.name: shard for shard, tensors in shards.items() for tensor in tensors}
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (target / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    else:
        (target / INDEX_FILE).unlink(missing_ok=True)
