"""Bring the files of other trainers into PEFT's own form where they arrive, without torch, mlx or the base.

Names that a trainer wraps are unwrapped, so that whoever exports the version later can load it by PEFT.
mlx-lm (https://github.com/ml-explore/mlx-lm) saves `adapters.safetensors`, with `lora_a` [in, rank] and
`lora_b` [rank, out], and a config of its own. Its `scale` is PEFT's `lora_alpha / r`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from onebase_adapters.format.config import (
    CONFIG_FILE,
    MAX_ALPHA,
    MAX_CONFIG_BYTES,
    MAX_HEADER_BYTES,
    MAX_RANK,
    MLX_WEIGHTS_FILE,
    NOTE,
    AdapterFormatError,
)
from onebase_adapters.format.spellings import PREFIX, unwrapped
from onebase_adapters.format.strict_json import is_dense, parse_json, shown

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_UNSIGNED: Mapping[int, type[np.unsignedinteger[Any]]] = {4: np.uint32, 2: np.uint16}
_ENDS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector.weight"}
_EMBEDDINGS = frozenset(["embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embedding"])
_QUANTIZED = re.compile(r"-(?:\d{1,2}bit|bf16|fp16|mxfp4)$", re.IGNORECASE)
"""End of the names of mlx-community's copies of a model."""
_BLOCK_BYTES = 4 << 20
_MOST_DIMENSIONS = 4

Write = Callable[[bytes], object]


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def is_mlx(config: bytes) -> bool:
    """Return True if the bytes are a config of mlx-lm."""
    try:
        fields = parse_json(config) if len(config) <= MAX_CONFIG_BYTES else None
    except (ValueError, RecursionError):
        return False
    if not isinstance(fields, dict) or "peft_type" in fields:
        return False
    return "lora_parameters" in fields or "fine_tune_type" in fields


def needs_conversion(config: bytes, weights: Path) -> bool:
    """Return True if the files are of mlx-lm, or name their tensors otherwise than PEFT does.

    Files that cannot be read are left to who checks them.

    Raises OSError: the weights cannot be read.
    """
    if is_mlx(config):
        return True
    try:
        names, _ = unwrapped(tensor.name for tensor in _read_header(weights))
    except AdapterFormatError:
        return False
    plain = {name.plain for name in names.values()}
    return plain != names.keys() and len(plain) == len(names)


def tensor_names(weights: Path) -> list[str]:
    """Return the names of the tensors in a weights file; none if it cannot be read.

    Raises OSError.
    """
    try:
        return [tensor.name for tensor in _read_header(weights)]
    except AdapterFormatError:
        return []


def convert(config: bytes, weights: Path, write: Write) -> bytes:
    """Write PEFT's weights of an adapter that needs it, and return PEFT's config.

    The same adapter gives the same bytes. Memory is bounded by the header and a block of 4 MiB.

    Args:
        write: called with the pieces of the new weights file, in their order.

    Raises:
        AdapterFormatError: it is not a LoRA or DoRA of linear layers (mlx-lm), or the file is damaged.
        OSError: the weights cannot be read.
    """
    if is_mlx(config):
        return _of_mlx(config, weights, write)
    tensors = _read_header(weights)
    names, notes = unwrapped(tensor.name for tensor in tensors)
    data = min((tensor.offset for tensor in tensors), default=weights.stat().st_size)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", NOTE: " ".join(notes)}}
    for tensor in tensors:
        start = tensor.offset - data
        header[names[tensor.name].plain] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
    _write_header(header, write)
    with weights.open("rb") as file:
        file.seek(data)
        while piece := file.read(_BLOCK_BYTES):
            write(piece)
    return config


def _write_header(header: Mapping[str, Any], write: Write) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write(len(text).to_bytes(8, "little") + text)


def _of_mlx(config: bytes, weights: Path, write: Write) -> bytes:
    rank, scale, dora, base_name = _read_config(config)
    tensors = _read_header(weights)
    names = {tensor.name: _peft_name(tensor.name, dora) for tensor in tensors}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # Wide dtypes first: then every tensor lies at a multiple of its element's size.
    ordered = sorted(tensors, key=lambda tensor: (-_ITEM_BYTES[tensor.dtype], names[tensor.name]))
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        shape = list(reversed(tensor.shape))
        header[names[tensor.name]] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": [start, end]}
    header["__metadata__"][NOTE] = "The files are of mlx-lm, and were converted when they came."
    _write_header(header, write)
    for tensor in ordered:
        _write_transposed(weights, tensor, write)
    modules = {tensor.name.rpartition(".")[0] for tensor in tensors}
    return json.dumps(
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": scale * rank,
            "lora_dropout": 0.0,
            "use_dora": dora,
            "target_modules": sorted(modules),
        },
        indent=2,
    ).encode()


def _read_config(raw: bytes) -> tuple[int, float, bool, str | None]:
    """Return rank, scale, whether it is a DoRA, and the base's name."""
    fields = parse_json(raw)
    kind = fields.get("fine_tune_type", "dora" if fields.get("use_dora") else "lora")
    if kind not in ("lora", "dora"):
        raise AdapterFormatError(
            "unsupported_kind",
            f"{CONFIG_FILE} is of mlx-lm, and its fine_tune_type is {shown(kind)}; only lora and dora are "
            "served",
        )
    found = fields.get("lora_parameters")
    parameters = found if isinstance(found, dict) else {}
    rank, scale = parameters.get("rank"), parameters.get("scale")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise AdapterFormatError(
            "bad_config", f"lora_parameters.rank must be an integer from 1 to {MAX_RANK}, got {shown(rank)}"
        )
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= MAX_ALPHA / rank:
        raise AdapterFormatError(
            "bad_config", f"lora_parameters.scale must be a number, got {shown(scale)}, for rank {rank}"
        )
    if "alpha" in parameters:
        raise AdapterFormatError(
            "bad_config",
            "lora_parameters has alpha, which the first versions of mlx-lm multiplied with scale and later "
            "ones ignore. Leave alpha out, and write the factor of lora_a @ lora_b as scale.",
        )
    name = fields.get("model")
    usable = isinstance(name, str) and name.isprintable() and len(name) < 500
    return rank, float(scale), kind == "dora", _QUANTIZED.sub("", name) if usable else None


def _read_header(weights: Path) -> list[_Tensor]:
    """Read the header of the weights. Its tensors must fill the file, so that nothing is written twice."""
    size = weights.stat().st_size
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _bad("has no header, or one that is too long")
        raw = file.read(length)
    if is_dense(raw):
        raise _bad("has a header of too many values")
    try:
        header = parse_json(raw)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise _bad("has a header that is no JSON object")
    header.pop("__metadata__", None)
    tensors = sorted((_tensor(name, value) for name, value in header.items()), key=lambda one: one.offset)
    end = 0
    for tensor in tensors:
        if tensor.offset != end:
            raise _bad(f"leaves a gap before {tensor.name:.150}, or lets it overlap")
        end += tensor.nbytes
    if end != size - 8 - length:
        raise _bad("has another size than its header says")
    return [
        _Tensor(tensor.name, tensor.dtype, tensor.shape, tensor.offset + 8 + length) for tensor in tensors
    ]


def _tensor(name: str, value: Any) -> _Tensor:
    fields: dict[str, Any] = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (fields.get(one, ()) for one in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise _bad(f"must hold {name:.150} as F32, F16 or BF16, not {shown(dtype)}")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2) or 0 in shape:
        raise _bad(f"gives {name:.150} a shape or an offset that no tensor has")
    tensor = _Tensor(name, dtype, tuple(shape), offsets[0])
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise _bad(f"gives {name:.150} other bytes than its shape takes")
    return tensor


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    whole = isinstance(value, list) and all(type(one) is int for one in value)
    return whole and len(value) <= _MOST_DIMENSIONS and all(0 <= one < 1 << 62 for one in value)


def _peft_name(name: str, dora: bool) -> str:
    """Return PEFT's name of a tensor of mlx-lm. Raises AdapterFormatError if PEFT has no such tensor."""
    module, _, part = name.rpartition(".")
    if not module or part not in _ENDS or (part == "m" and not dora):
        raise AdapterFormatError(
            "foreign_tensor",
            f"{MLX_WEIGHTS_FILE}: {name:.200} is no lora_a or lora_b of a layer, nor the m of a DoRA. Save "
            "the adapter alone.",
        )
    if module.rpartition(".")[2] in _EMBEDDINGS:
        raise AdapterFormatError(
            "unsupported_kind",
            f"{MLX_WEIGHTS_FILE}: {module:.200} is an embedding, whose matrices mlx-lm applies to a tied "
            "head as well: leave it out of the keys, or fuse the adapter into its base",
        )
    return f"{PREFIX}{module}.{_ENDS[part]}"


def _write_transposed(weights: Path, tensor: _Tensor, write: Write) -> None:
    if len(tensor.shape) > 2:
        raise AdapterFormatError(
            "bad_shape",
            f"{MLX_WEIGHTS_FILE}: {tensor.name:.200} is {shown(list(tensor.shape))}, of experts, which are "
            "not served",
        )
    rows, columns = tensor.shape if len(tensor.shape) == 2 else (math.prod(tensor.shape), 1)
    source = np.memmap(weights, _UNSIGNED[_ITEM_BYTES[tensor.dtype]], "r", tensor.offset, (rows, columns))
    block = max(1, _BLOCK_BYTES // source.itemsize)
    at_once = max(1, block // rows)
    for column in range(0, columns, at_once):
        for row in range(0, rows, block):
            piece = source[row : row + block, column : column + at_once]
            write(np.ascontiguousarray(piece.T).tobytes())


def _bad(what: str) -> AdapterFormatError:
    return AdapterFormatError(
        "bad_weights", f"The file of weights is not a valid safetensors file: it {what}"
    )
