"""Manifest by which one process finds another one's base in shared memory: plain data, never pickled."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec
import torch

FORMAT = 1

Dtype = Literal[
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
    "uint8", "int8", "int16", "int32", "int64", "bool",
]  # fmt: skip


Flag = Literal["is_loaded_in_4bit", "is_loaded_in_8bit"]
FLAGS: tuple[Flag, ...] = get_args(Flag)
"""Attributes of a model by which PEFT chooses its layers."""


class ManifestError(Exception):
    """The bytes are no manifest of this version of the program."""


class FileSegment(msgspec.Struct, frozen=True, tag="file"):
    """A storage in the shared file: `size` bytes of it from byte `start`."""

    start: int
    size: int


class CudaSegment(msgspec.Struct, frozen=True, tag="cuda"):
    """A storage on a GPU: the arguments of `torch.UntypedStorage._new_shared_cuda`."""

    device: int
    handle: bytes
    """cudaIpcMemHandle of the allocation that holds the storage."""
    size: int
    """Bytes."""
    start: int
    """Byte in that allocation where the storage begins."""
    counter_handle: bytes
    counter_offset: int
    event_handle: bytes
    event_sync: bool


Segment = FileSegment | CudaSegment


class TensorPlace(msgspec.Struct, frozen=True):
    """One tensor object: its storage, and its offset there in elements."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: Dtype


class QuantizedLayer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Fields of a quantized layer besides its tensors."""

    kind: Literal["Linear4bit", "Linear8bitLt", "ExpertStack", "Int8Stack"]
    """A class of bitsandbytes, or one of experts, whose statistics are buffers."""
    size_in: int
    size_out: int
    threshold: float = 0.0
    """Outlier threshold of 8-bit layers. All fields below belong to 4-bit layers."""
    compute_dtype: Dtype = "bfloat16"
    quant_type: str = ""
    blocksize: int = 0
    shape: tuple[int, ...] = ()
    """Shape of the weight before it was quantized; `dtype` is its dtype then."""
    dtype: Dtype = "bfloat16"
    nested_blocksize: int = 0
    """0: the statistics are not quantized themselves."""
    nested_dtype: Dtype = "float32"
    transposed: bool = False
    """Whether modelling code takes an expert's matrix as [in, out]."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A base in shared memory."""

    format: int = FORMAT
    architecture: str
    """Class of the model."""
    flags: list[Flag]
    """Flags that are true."""
    storages: list[Segment]
    tensors: list[TensorPlace]
    names: dict[str, int]
    """Index in `tensors` by name. A tied tensor is one tensor with two names."""
    layers: dict[str, QuantizedLayer]


def encode(manifest: Manifest) -> bytes:
    return msgspec.msgpack.encode(manifest)


def decode(data: bytes) -> Manifest:
    """Decode a manifest. Raises ManifestError."""
    try:
        manifest = msgspec.msgpack.decode(data, type=Manifest)
    except (msgspec.DecodeError, ValueError) as error:
        raise ManifestError(f"the base's manifest cannot be read: {error}") from None
    if manifest.format != FORMAT:
        raise ManifestError(f"the base's manifest has format {manifest.format}, this program reads {FORMAT}")
    return manifest


def dtype_name(dtype: torch.dtype) -> Dtype:
    """Return the name of a dtype. Raises ManifestError for dtypes that no base has."""
    name = str(dtype).removeprefix("torch.")
    try:
        known: Dtype = msgspec.convert(name, Dtype)
    except msgspec.ValidationError:
        raise ManifestError(f"tensors of {name} cannot be shared") from None
    return known


def dtype_of(name: Dtype) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype
