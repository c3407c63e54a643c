"""Tensors that another process can map: in a file in memory on the CPU, by IPC handles on CUDA.

What is written here about CUDA follows `torch.multiprocessing.reductions` and was not run on a GPU.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from onebase_engine.base import manifest as wire
from onebase_engine.base.manifest import CudaSegment, FileSegment, Segment, TensorPlace
from onebase_engine.machine import return_freed_memory

ALIGNMENT = 64
"""Alignment of storages, in bytes: that of torch's own allocator, which suits vector instructions."""
F_SEAL_FUTURE_WRITE = 0x0010
"""Seal from Linux's fcntl.h (5.1 and later), for which Python's fcntl has no name yet."""
_UNKNOWN_TO_TORCH = (AttributeError, TypeError, ValueError)
"""Errors of a release of PyTorch whose private functions for CUDA's IPC are gone or take something else."""
_EXPANDABLE_SEGMENT = b"e"
"""Second byte of a handle of c10's CUDACachingAllocator for an expandable segment; `c` is cudaMalloc."""


class SharedMemoryError(Exception):
    """Memory that cannot be shared or mapped; the message says why, and what to change if that helps."""


# ---- in the process that has the tensors -----------------------------------------------------


def share(tensors: Sequence[torch.Tensor], fd: int | None) -> tuple[list[Segment], list[TensorPlace]]:
    """Return the storages and places by which `open_tensors` finds the same tensors in another process.

    Each storage on the CPU moves into the file `fd`, and its tensors (the same objects) lie there from then
    on. On CUDA they stay where they are.

    Raises:
        SharedMemoryError, ManifestError: they cannot be shared.
    """
    kinds = {tensor.device.type for tensor in tensors}
    if not kinds <= {"cpu", "cuda"}:
        raise SharedMemoryError(f"tensors on {', '.join(sorted(kinds))} cannot be shared")
    if "cpu" in kinds and fd is None:
        raise SharedMemoryError("tensors on the CPU cannot be shared without a file for them")
    groups = _storage_groups(tensors)
    segments = list(_segments(tensors, groups))
    places: dict[int, TensorPlace] = {}
    for number, members in enumerate(groups):
        places.update({i: _place(tensors[i], number) for i in members})
    if fd is not None and "cpu" in kinds:
        _move_to_file(tensors, groups, segments, places, fd)
    return segments, [places[i] for i in range(len(tensors))]


def lay_out(
    tensors: Sequence[torch.Tensor],
) -> tuple[list[Segment], list[TensorPlace], list[tuple[int, torch.Tensor]]]:
    """Return the result of `share` without moving the CPU tensors, and each storage's start and a tensor."""
    groups = _storage_groups(tensors)
    segments = list(_segments(tensors, groups))
    places: dict[int, TensorPlace] = {}
    storages: list[tuple[int, torch.Tensor]] = []
    for number, (segment, members) in enumerate(zip(segments, groups, strict=True)):
        places.update({i: _place(tensors[i], number) for i in members})
        if isinstance(segment, FileSegment):
            storages.append((segment.start, tensors[members[0]]))
    return segments, [places[i] for i in range(len(tensors))], storages


def file_size(segments: Sequence[Segment]) -> int:
    """Return the size, in bytes, of the file that holds these segments."""
    ends = [segment.start + segment.size for segment in segments if isinstance(segment, FileSegment)]
    return -(-max(ends) // ALIGNMENT) * ALIGNMENT


def storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return all bytes of the tensor's storage, uint8."""
    storage = tensor.untyped_storage()
    return _bytes(storage, 0, storage.nbytes())


def _storage_groups(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Return, for each storage, the indices of the tensors that lie in it."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, tensor in enumerate(tensors):
        storage = tensor.untyped_storage()
        # Empty storages have no address to tell them by.
        groups.setdefault((storage.data_ptr(), 0 if storage.nbytes() else i), []).append(i)
    return list(groups.values())


def _place(tensor: torch.Tensor, storage: int) -> TensorPlace:
    dtype = wire.dtype_name(tensor.dtype)
    return TensorPlace(storage, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride(), dtype)


def _segments(tensors: Sequence[torch.Tensor], groups: Sequence[Sequence[int]]) -> Iterator[Segment]:
    """Yield, for each storage, its place in the file or the handle that opens its memory on the GPU."""
    end = 0
    for members in groups:
        storage = tensors[members[0]].untyped_storage()
        if storage.device.type == "cuda":
            yield _cuda_segment(storage)
            continue
        yield FileSegment(end, storage.nbytes())
        end += -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT


def _move_to_file(
    tensors: Sequence[torch.Tensor],
    groups: Sequence[Sequence[int]],
    segments: Sequence[Segment],
    places: Mapping[int, TensorPlace],
    fd: int,
) -> None:
    mapping = _map_shared(fd, file_size(segments))
    for segment, members in zip(segments, groups, strict=True):
        if not isinstance(segment, FileSegment):
            continue
        # The old memory of each storage is freed before the next one is copied.
        source = tensors[members[0]].untyped_storage()
        _bytes(mapping, segment.start, segment.size).copy_(_bytes(source, 0, segment.size))
        for i in members:
            tensors[i].data = _tensor(mapping, segment.start, places[i])
    _seal(fd)
    return_freed_memory()


def _map_shared(fd: int, size: int) -> Any:
    try:
        os.ftruncate(fd, 0)
        os.ftruncate(fd, size)
        return torch.UntypedStorage.from_file(f"/proc/self/fd/{fd}", True, size)
    except (OSError, RuntimeError) as error:
        raise SharedMemoryError(f"cannot map {size / 1e6:.0f} MB of shared memory: {error}") from error


def _seal(fd: int) -> None:
    """Seal the memfd, if possible, against resizing and against writes other than through this mapping."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE)


def _bytes(storage: torch.UntypedStorage, start: int, count: int) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, start, (count,), (1,))


def _cuda_segment(storage: Any) -> CudaSegment:
    try:
        device, handle, size, start, counter, counter_offset, event, sync = storage._share_cuda_()
    except _UNKNOWN_TO_TORCH as error:
        raise SharedMemoryError(
            f"PyTorch {torch.__version__} shares a GPU's memory in another way than OneBase knows ({error}): "
            "install an earlier one"
        ) from error
    except RuntimeError as error:
        raise SharedMemoryError(
            f"this GPU's memory cannot be shared between processes ({error}); WSL and some MIG set-ups do "
            "not allow it"
        ) from error
    if handle[1:2] == _EXPANDABLE_SEGMENT:
        raise SharedMemoryError(
            "memory of PyTorch's expandable segments cannot be shared between processes: leave "
            "expandable_segments out of PYTORCH_CUDA_ALLOC_CONF"
        )
    return CudaSegment(device, handle, size, start, counter, counter_offset, event, sync)


# ---- in the other process --------------------------------------------------------------------


def open_tensors(
    segments: Sequence[Segment], places: Sequence[TensorPlace], fd: int | None
) -> list[torch.Tensor]:
    """Return new tensors over the memory that `share` described.

    What lies in the file is mapped privately: writing to it copies the page, and only this process sees it.
    On CUDA a write would reach the other process.

    Raises:
        SharedMemoryError: the memory cannot be mapped, or is not the one described.
    """
    files = [segment.start + segment.size for segment in segments if isinstance(segment, FileSegment)]
    mapping = _map_privately(fd, max(files)) if files else None
    count = len(segments)
    storages = [
        (_cuda_storage(segment, f"segment {number} of {count}"), 0)
        if isinstance(segment, CudaSegment)
        else (mapping, segment.start)
        for number, segment in enumerate(segments, 1)
    ]
    try:
        return [_tensor(*storages[place.storage], place) for place in places]
    except (IndexError, RuntimeError) as error:
        raise SharedMemoryError(f"a tensor lies outside of the memory that is shared: {error}") from None


def _tensor(storage: Any, start: int, place: TensorPlace) -> torch.Tensor:
    """Return the tensor of `place`, whose storage begins at byte `start` (a multiple of its item's size)."""
    dtype = wire.dtype_of(place.dtype)
    offset = start // dtype.itemsize + place.offset
    empty = torch.empty(0, dtype=dtype, device=storage.device)
    placed: torch.Tensor = empty.set_(storage, offset, place.shape, place.stride)
    return placed


def _map_privately(fd: int | None, size: int) -> Any:
    if fd is None:
        raise SharedMemoryError("the tensors lie in a file, and none is given")
    try:
        held = os.fstat(fd).st_size
        if held < size:
            raise SharedMemoryError(f"the shared memory holds {held} bytes, not the {size} described")
        return torch.UntypedStorage.from_file(f"/proc/self/fd/{fd}", False, size)
    except (OSError, RuntimeError) as error:
        raise SharedMemoryError(f"cannot map the shared memory: {error}") from error


def _cuda_storage(segment: CudaSegment, title: str) -> Any:
    """Open the other process's memory, which an error calls `title`.

    Its counter goes down each time an attached storage is freed. That is harmless, because the other process
    holds its tensors as long as it lives.
    """
    torch.cuda.init()  # type: ignore[no-untyped-call]
    try:
        return torch.UntypedStorage._new_shared_cuda(
            segment.device,
            segment.handle,
            segment.size,
            segment.start,
            segment.counter_handle,
            segment.counter_offset,
            segment.event_handle,
            segment.event_sync,
        )
    except (RuntimeError, *_UNKNOWN_TO_TORCH) as error:
        raise SharedMemoryError(
            f"cannot open the memory on GPU {segment.device} of another process, {title}: {error}"
        ) from error
