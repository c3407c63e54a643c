"""Read and write safetensors files tensor by tensor, a few MiB at a time.

The header is checked whole before any tensor is read, and more strictly than by the safetensors library,
which accepts duplicate names, empty tensors, NaN and infinity. Memory is bounded by the header's and
one chunk's, whatever the file's size. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onebase_adapters.format.config import MAX_HEADER_BYTES, NOTE, WEIGHTS_FILE, AdapterFormatError
from onebase_adapters.format.strict_json import is_dense, parse_json, shown

CHUNK_BYTES = 4 << 20
_CHUNK_ELEMENTS = CHUNK_BYTES // 4
_MAX_DIMENSIONS = 2
_LONGEST_NOTE = 500
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SAME_SIZE_INTEGER = {4: torch.int32, 2: torch.int16}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file, as its header describes it; `offset` is in bytes from the file's beginning."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class TensorFile:
    """An open safetensors file whose header has been checked; `entries` in the order of their bytes.

    `note`: a sentence on what was read as what when the file came, if it was converted.
    """

    def __init__(self, file: io.BufferedReader, entries: tuple[TensorEntry, ...], note: str = "") -> None:
        self._file = file
        self.entries = entries
        self.note = note

    @classmethod
    def read_header(cls, file: io.BufferedReader) -> TensorFile:
        """Check the header against the file's size.

        Raises:
            AdapterFormatError: code `bad_weights`.
        """
        size = os.fstat(file.fileno()).st_size
        raw = file.read(8)
        length = int.from_bytes(raw, "little")
        if len(raw) < 8 or length > size - 8:
            raise _bad("is cut short")
        if length > MAX_HEADER_BYTES:
            raise _bad(f"has a header over {MAX_HEADER_BYTES} bytes")
        return cls(file, *_entries(file.read(length), 8 + length, size))

    def chunks(self, entry: TensorEntry) -> Iterator[torch.Tensor]:
        """Yield the tensor's elements in flat pieces, each valid only until the next is requested.

        Raises:
            AdapterFormatError: code `not_finite` or, if the file was cut meanwhile, `bad_weights`.
        """
        self._file.seek(entry.offset)
        buffer = bytearray(min(entry.nbytes, CHUNK_BYTES))
        left = entry.nbytes
        while left:
            size = min(left, len(buffer))
            if self._file.readinto(memoryview(buffer)[:size]) != size:
                raise _bad("became shorter while it was read")
            chunk = torch.frombuffer(buffer, dtype=entry.dtype, count=size // entry.dtype.itemsize)
            if not torch.isfinite(chunk).all():
                raise AdapterFormatError(
                    "not_finite", f"{WEIGHTS_FILE}: {entry.name:.200} holds NaN or infinity"
                )
            yield chunk
            left -= size

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        """Return the whole tensor in memory of its own."""
        result, start = torch.empty(entry.numel, dtype=entry.dtype), 0
        for chunk in self.chunks(entry):
            result[start : start + chunk.numel()] = chunk
            start += chunk.numel()
        return result.reshape(entry.shape)

    def holds(self, entry: TensorEntry, expected: torch.Tensor) -> bool:
        """Return True if the tensor, in the dtype of `expected`, is `expected` bit for bit."""
        bits = _SAME_SIZE_INTEGER.get(expected.dtype.itemsize)
        if entry.shape != tuple(expected.shape) or not expected.is_floating_point() or bits is None:
            return False
        flat, start = expected.detach().reshape(-1), 0
        for chunk in self.chunks(entry):
            piece = flat[start : start + chunk.numel()].cpu()
            if not torch.equal(chunk.to(expected.dtype).view(bits), piece.view(bits)):
                return False
            start += chunk.numel()
        return True

    def same(self, one: TensorEntry, other: TensorEntry) -> bool:
        """Return True if two tensors of the file have the same shape, dtype and bits."""
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return False
        bits, start = _SAME_SIZE_INTEGER[one.dtype.itemsize], 0
        for chunk in self.chunks(one):
            part = TensorEntry(
                other.name, other.dtype, (chunk.numel(),), other.offset + start * one.dtype.itemsize
            )
            position = self._file.tell()
            if not torch.equal(chunk.view(bits), self.tensor(part).view(bits)):
                return False
            self._file.seek(position)
            start += chunk.numel()
        return True


@dataclass(frozen=True)
class TensorToWrite:
    """One tensor of a new file: `chunks` gives its elements in flat pieces, converted to `dtype`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[torch.Tensor]]


def write_tensors(path: Path, tensors: Iterable[TensorToWrite]) -> None:
    """Write a safetensors file, tensor by tensor.

    Raises:
        OSError: the disk is full, or the file cannot be written for another reason.
    """
    # Wide dtypes first: then every tensor lies at a multiple of its element's size.
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    buffer = bytearray(_CHUNK_ELEMENTS * 2 * 4)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            for chunk in tensor.chunks():
                torch.frombuffer(buffer, dtype=tensor.dtype, count=chunk.numel()).copy_(chunk)
                file.write(memoryview(buffer)[: chunk.numel() * tensor.dtype.itemsize])


def _entries(raw: bytes, data: int, size: int) -> tuple[tuple[TensorEntry, ...], str]:
    if is_dense(raw):
        raise _bad("has a header of too many values")
    try:
        header = parse_json(raw)
    except (ValueError, RecursionError) as error:
        raise _bad(f"has a header that is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(header, dict):
        raise _bad("has a header that is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad("has metadata that is not strings by name")
    entries = sorted((_entry(name, value, data) for name, value in header.items()), key=lambda e: e.offset)
    end = data
    for entry in entries:
        if entry.offset != end:
            raise _bad(f"leaves a gap before {entry.name:.200}, or lets it overlap")
        end += entry.nbytes
    if end != size:
        raise _bad(f"has {size - data} bytes of tensors, its header says {end - data}")
    note = metadata.get(NOTE, "")
    return tuple(entries), note if note.isprintable() and len(note) <= _LONGEST_NOTE else ""


def _entry(name: str, value: Any, data: int) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(f"must give dtype, shape and data_offsets of {name:.200}")
    dtype = _DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise _bad(f"must hold {name:.200} as F32, F16 or BF16, not {shown(value['dtype'])}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise _bad(f"gives {name:.200} a shape or an offset that no tensor has")
    if 0 in shape or len(shape) > _MAX_DIMENSIONS:
        raise AdapterFormatError(
            "bad_shape", f"{WEIGHTS_FILE}: {name:.200} is {shown(shape)}, which no tensor of an adapter is"
        )
    entry = TensorEntry(name, dtype, tuple(shape), data + offsets[0])
    if offsets[1] - offsets[0] != entry.nbytes:
        raise _bad(f"gives {name:.200} other bytes than its shape {shown(shape)} takes")
    return entry


def _are_sizes(value: Any) -> bool:
    """Return True if it is a list of integers from 0 to the largest size that a file can have."""
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 1 << 62 for one in value)


def _bad(what: str) -> AdapterFormatError:
    return AdapterFormatError("bad_weights", f"{WEIGHTS_FILE} is not a valid safetensors file: it {what}")
