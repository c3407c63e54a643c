"""A proven version as one file: the finished tensors, which an engine loads without PEFT.

A safetensors file. Its metadata holds the layout's version, the base it was proved on, and for each
module its kind, its scale and the tensors that make it up; tensors that two modules share are stored once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import torch

from onebase_engine.base.layers import LayerShape
from onebase_engine.kernels.weights import (
    AdapterWeights,
    ExpertLora,
    Head,
    LoraWeights,
    ModuleWeights,
    SavedModule,
    TokenRows,
    fits,
    invocation_of,
    tensors_of,
    without_head,
)

LAYOUT = "onebase-prepared-1"
MAX_HEADER_BYTES = 64 << 20
"""Largest accepted header, in bytes: more than twice that of the largest accepted adapter."""
_CHUNK_BYTES = 1 << 20
_KINDS: dict[str, type[ModuleWeights]] = {
    "lora": LoraWeights,
    "alora": LoraWeights,
    "experts": ExpertLora,
    "saved": SavedModule,
    "tokens": TokenRows,
    "head": Head,
}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class PackedAdapterError(ValueError):
    """The file is not the requested packed version, which has to be made again."""


def write_packed_adapter(path: Path, weights: AdapterWeights, *, base_id: str) -> None:
    """Write the tensors to `path` and flush them to the disk.

    Raises:
        OSError: no room, say; what was written is left for the caller to remove.
    """
    tensors: dict[str, torch.Tensor] = {}
    known: dict[tuple[int, torch.Size], str] = {}
    modules: list[dict[str, Any]] = []
    for name, module in weights.items():
        parts = {}
        for part, tensor in tensors_of(module):
            key = known.setdefault((tensor.data_ptr(), tensor.shape), f"{len(modules)}.{part}")
            tensors[key] = tensor.detach()
            parts[part] = key
        entry: dict[str, Any] = {"name": name, "kind": _kind(module), "tensors": parts}
        if isinstance(module, LoraWeights | ExpertLora):
            entry["scale"] = module.scale
            if isinstance(module, LoraWeights) and module.invocation:
                # A kind of its own: releases that know no invocations refuse it.
                entry |= {"kind": "alora", "invocation": list(module.invocation)}
        elif isinstance(module, TokenRows) and module.words:
            entry["words"] = module.words
        modules.append(entry)
    metadata = {"layout": LAYOUT, "base_id": base_id, "modules": json.dumps(modules, allow_nan=False)}
    # Aligned as safetensors asks: wider types first.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    with path.open("wb") as file:
        file.write(_header(metadata, ordered))
        for tensor in ordered.values():
            file.write(_bytes_of(tensor.cpu().contiguous()))
        file.flush()
        os.fsync(file.fileno())


def _header(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for key, tensor in tensors.items():
        offsets = [position, position := position + tensor.numel() * tensor.dtype.itemsize]
        header[key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _kind(module: ModuleWeights) -> str:
    return next(kind for kind, cls in _KINDS.items() if isinstance(module, cls))


def read_packed_adapter(
    path: Path,
    sha256: str | None = None,
    *,
    base_id: str | None = None,
    layers: Mapping[str, LayerShape] | None = None,
) -> AdapterWeights:
    """Read the file's tensors into new memory, hashing them in the same pass.

    Args:
        sha256: what the file must hash to, in hex.
        base_id: the base that the version must have been proved on.
        layers: those of the base, by name, which the modules must fit. Other releases of transformers may
            give the same base other names.

    Raises:
        PackedAdapterError: the file is missing, damaged, another one, or of another layout or base.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            header = _read_header(file, digest, os.fstat(file.fileno()).st_size)
            metadata = header.pop("__metadata__", {})
            tensors = _read_tensors(file, digest, header)
            if file.read(1):
                raise PackedAdapterError("bytes follow the last tensor")
    except OSError as error:
        raise PackedAdapterError(f"cannot read {path.name}: {error.strerror or error}") from error
    except (LookupError, TypeError, ValueError, RecursionError, OverflowError, struct.error) as error:
        raise PackedAdapterError(f"{path.name} is no packed adapter: {error}") from error
    if sha256 is not None and digest.hexdigest() != sha256:
        raise PackedAdapterError(f"{path.name} is damaged: its SHA-256 is not {sha256[:12]}…")
    weights = _modules(path.name, metadata, tensors, base_id)
    if layers is not None:
        for name, module in without_head(weights).items():
            if name not in layers or not fits(module, layers[name]):
                raise PackedAdapterError(f"{path.name} does not fit the base at {name:.200}; prove it again")
    return weights


def _read_header(file: BinaryIO, digest: Any, size: int) -> dict[str, Any]:
    prefix = file.read(8)
    (length,) = struct.unpack("<Q", prefix)
    if length > min(size, MAX_HEADER_BYTES):
        raise ValueError("its header is longer than the file or the limit")
    raw = file.read(length)
    digest.update(prefix)
    digest.update(raw)
    header = json.loads(raw)
    if not isinstance(header, dict):
        raise TypeError("its header is no object")
    ends = [int(entry["data_offsets"][1]) for key, entry in header.items() if key != "__metadata__"]
    if max(ends, default=0) != size - 8 - length:
        raise ValueError("it is truncated, or longer than its tensors")
    return header


def _read_tensors(file: BinaryIO, digest: Any, header: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Read each tensor into its own allocation, since MKL's last bits may depend on a matrix's alignment."""
    tensors: dict[str, torch.Tensor] = {}
    position = 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        if (
            start != position
            or min(shape, default=0) < 0
            or math.prod(shape) * dtype.itemsize != stop - start
        ):
            raise ValueError(f"{key} does not lie where the header says")
        tensor = torch.empty(shape, dtype=dtype)
        _fill(file, digest, tensor)
        tensors[key], position = tensor, stop
    return tensors


def _fill(file: BinaryIO, digest: Any, tensor: torch.Tensor) -> None:
    memory = _bytes_of(tensor)
    for start in range(0, len(memory), _CHUNK_BYTES):
        part = memory[start : start + _CHUNK_BYTES]
        if file.readinto(part) != len(part):  # type: ignore[attr-defined]
            raise ValueError("it ends within a tensor")
        digest.update(part)


def _modules(
    file: str, metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor], base_id: str | None
) -> AdapterWeights:
    if not isinstance(metadata, dict) or metadata.get("layout") != LAYOUT:
        raise PackedAdapterError(f"{file} has another layout than {LAYOUT}; prove the version again")
    if base_id is not None and metadata.get("base_id") != base_id:
        raise PackedAdapterError(f"{file} was proved on another base; prove the version again")
    used: set[str] = set()
    weights: dict[str, ModuleWeights] = {}
    try:
        for entry in json.loads(metadata["modules"]):
            used.update(entry["tensors"].values())
            parts = {part: tensors[key] for part, key in entry["tensors"].items()}
            weights[entry["name"]] = _module(entry, parts)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise PackedAdapterError(f"{file} does not describe its modules: {error}") from error
    if not weights or used != tensors.keys():
        raise PackedAdapterError(f"{file} holds other tensors than it describes")
    invocation = invocation_of(weights)
    if any(getattr(module, "invocation", invocation) != invocation for module in weights.values()):
        raise PackedAdapterError(f"{file} has modules that act from different tokens on")
    if invocation and not all(isinstance(module, LoraWeights) for module in weights.values()):
        raise PackedAdapterError(f"{file} has modules that act before the invocation")
    return weights


def _module(entry: Mapping[str, Any], parts: Mapping[str, torch.Tensor]) -> ModuleWeights:
    cls = _KINDS[entry["kind"]]
    if bool(entry.get("invocation")) != (entry["kind"] == "alora"):
        raise ValueError("an invocation belongs to the kind alora, and to no other")
    if unknown := parts.keys() - {field.name for field in fields(cls)}:
        raise ValueError(f"unknown tensors {sorted(unknown)}")
    values: dict[str, Any] = dict(parts)
    if cls in (LoraWeights, ExpertLora):
        values["scale"] = float(entry["scale"])
    if cls is LoraWeights:
        values["invocation"] = tuple(map(int, entry.get("invocation") or ()))
    if cls is TokenRows:
        values["words"] = int(entry.get("words", 0))
    module: ModuleWeights = cls(**values)
    _check(module)
    return module


def _check(module: ModuleWeights) -> None:
    """Raise ValueError unless the module's tensors fit each other."""
    if isinstance(module, LoraWeights):
        vectors = [v for v in (module.bias, module.gain) if v is not None]
        fits = module.a.ndim == module.b.ndim == 2 and module.rank in module.a.shape
        fits = fits and all(v.shape == module.b.shape[:1] for v in vectors) and math.isfinite(module.scale)
        fits = fits and all(t.dtype == torch.float32 for t in (module.a, module.b, *vectors))
    elif isinstance(module, ExpertLora):
        fits = module.a.ndim == module.b.ndim == 3 and module.a.shape[:2] == (len(module.b), module.rank)
        fits = fits and module.a.dtype == module.b.dtype == torch.float32 and math.isfinite(module.scale)
    elif isinstance(module, Head):
        fits = module.weight.ndim == 2 and module.weight.is_floating_point()
        fits = fits and (module.bias is None or module.bias.shape == module.weight.shape[:1])
    elif isinstance(module, SavedModule):
        fits = module.bias is None or module.bias.shape == module.weight.shape[:1]
    else:
        fits = module.indices.dtype == torch.int64 and module.rows.dtype == torch.float32
        fits = fits and module.rows.ndim == 2 and module.indices.shape == module.rows.shape[:1]
    if not fits:
        raise ValueError("tensors that do not fit each other")
