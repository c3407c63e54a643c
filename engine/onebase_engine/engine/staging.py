"""Versions in flight to a slot: read from their files in a thread, then copied to the accelerator.

No step waits for a disk. A sequence whose version is still being copied waits while the others continue. On
the CPU, a slot points at host memory: there is nothing to copy and nothing waits.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch

from onebase_engine.base.layers import LayerShape
from onebase_engine.engine.messages import AdapterFailed, AdapterLoaded, LoadAdapter
from onebase_engine.kernels.weights import (
    AdapterWeights,
    copied,
    host_bytes,
    tensors_of,
    weights_bytes,
    without_head,
)
from onebase_engine.lora.packed_adapter import PackedAdapterError, read_packed_adapter

logger = logging.getLogger(__name__)

ALIGNMENT = 256
"""Alignment of tensors in a slab, in bytes: that of an allocation of its own on a GPU."""
KEPT_BYTES = 1 << 30
"""Largest number of bytes of page-locked memory that stay allocated after their versions are gone."""
MOST_PADDING = 1 / 8
"""Largest part of a version that the rounding of its slabs may add."""


# ---- from a file to host memory ---------------------------------------------------------------


@dataclass(frozen=True)
class Arrived:
    """A version's finished tensors in host memory, and the answer to send once the engine has them."""

    weights: AdapterWeights
    answer: AdapterLoaded


class PackedAdapterLoader:
    """Reads files one after the other and delivers each result by a call from its thread.

    `load`, `forget` and `wanted` are called by the stepping thread. `layers`: the base's, which a file must
    fit. `prepare`: conversion of the tensors before they are stored.
    """

    def __init__(
        self,
        device: torch.device,
        layers: Mapping[str, LayerShape],
        deliver: Callable[[Arrived | AdapterFailed], None],
        prepare: Callable[[AdapterWeights], AdapterWeights],
    ) -> None:
        self._layers = layers
        self._prepare = prepare
        self._pin = device.type == "cuda"
        self._deliver = deliver
        self._orders: queue.SimpleQueue[LoadAdapter] = queue.SimpleQueue()
        self._wanted: set[str] = set()
        threading.Thread(target=self._run, name="engine-loader", daemon=True).start()

    def load(self, order: LoadAdapter) -> None:
        """Queue a file and return at once."""
        self._wanted.add(order.digest)
        self._orders.put(order)

    def forget(self, digest: str) -> None:
        """Discard the result of this version's file when it arrives."""
        self._wanted.discard(digest)

    def wanted(self, digest: str) -> bool:
        """Return True if a result that has arrived is still needed; called once for each."""
        wanted = digest in self._wanted
        self._wanted.discard(digest)
        return wanted

    def _run(self) -> None:
        while True:
            order = self._orders.get()
            try:
                self._deliver(self._read(order))
            except PackedAdapterError as error:
                self._fail(order, "damaged", str(error))
            except Exception as error:
                # No memory, say: this version's trouble, not everyone's.
                logger.exception("loading %s failed", order.digest[:12])
                self._fail(order, "load_failed", f"{type(error).__name__}: {error}")

    def _read(self, order: LoadAdapter) -> Arrived:
        started = time.monotonic()
        weights = self._prepare(read_packed_adapter(Path(order.path), order.sha256, layers=self._layers))
        size = host_bytes(weights)
        if self._pin:
            give_unused_back()
            size -= weights_bytes(without_head(weights))
            weights, taken = pinned(weights)
            size += taken
        return Arrived(
            weights,
            AdapterLoaded(
                digest=order.digest,
                bytes=size,
                load_seconds=time.monotonic() - started,
            ),
        )

    def _fail(self, order: LoadAdapter, code: str, message: str) -> None:
        self._deliver(AdapterFailed(digest=order.digest, code=code, message=message))


def _page_locked(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def pinned(weights: AdapterWeights) -> tuple[AdapterWeights, int]:
    """Copy a version to page-locked memory; return the copy and its bytes there.

    Copies from there to the accelerator overlap with its work. All tensors lie in one slab, so that one copy
    moves them, or in the few slabs into which `slabs_of` divides it. A classifier's head, which is in no
    slot, stays where it is.
    """
    found = {id(one): one for module in without_head(weights).values() for _, one in tensors_of(module)}
    there: dict[int, torch.Tensor] = {}
    taken = 0
    for keys in slabs_of({key: tensor.nbytes for key, tensor in found.items()}):
        places = list(accumulate((_aligned(found[key].nbytes) for key in keys), initial=0))
        slab = _page_locked(places[-1])
        taken += page_locked_bytes(places[-1])
        for key, place in zip(keys, places, strict=False):
            tensor = found[key]
            there[key] = slab[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            there[key].copy_(tensor)
    result = {
        name: replace(module, **{part: there.get(id(one), one) for part, one in tensors_of(module)})  # type: ignore[arg-type]
        for name, module in weights.items()
    }
    return result, taken


def give_unused_back() -> None:
    """Release page-locked memory beyond KEPT_BYTES that no tensor uses.

    PyTorch keeps it for tensors of the same size, a power of two, and for good: next to versions of one size
    it would hold all that versions of other sizes ever had (`CachingHostAllocator`).
    """
    told = torch.cuda.host_memory_stats()
    # Before PyTorch 2.10 the second is what tensors have, and another one what is held.
    held = told.get("reserved_bytes.current", told.get("allocated_bytes.current", 0))
    used = told.get("active_bytes.current", told.get("allocated_bytes.current", 0))
    if held - used > KEPT_BYTES:
        _empty_host_cache()


def _empty_host_cache() -> None:
    """Release page-locked memory that no tensor has; log a warning if PyTorch has no way to do so."""
    # The second is the same before PyTorch made it public.
    for owner, name in ((torch.accelerator, "empty_host_cache"), (torch._C, "_host_emptyCache")):
        release = getattr(owner, name, None)
        if release is not None:
            release()
            return
    logger.warning(
        "PyTorch %s offers no way to release page-locked memory: it keeps what versions had that are gone, "
        "within --host-memory",
        torch.__version__,
    )


def page_locked_bytes(size: int) -> int:
    """Return the size of a page-locked allocation: PyTorch rounds it up to a power of two
    (`CachingHostAllocator`)."""
    return 1 << (size - 1).bit_length() if size else 0


def slabs_of(sizes: Mapping[int, int]) -> list[list[int]]:
    """Group tensors into slabs, by their keys; `sizes` are bytes.

    One slab, unless its rounding takes more than MOST_PADDING of it, and less is taken by large ones that are
    nearly full and a small one for the rest.
    """
    left = sorted((key for key in sizes if sizes[key]), key=lambda key: -sizes[key])
    own = {key: _aligned(sizes[key]) for key in left}
    padding = int(MOST_PADDING * sum(own.values()))
    slabs: list[list[int]] = []
    while left:
        needed = sum(own[key] for key in left)
        room = page_locked_bytes(needed)
        if room - needed > padding:
            room = max(room // 2, page_locked_bytes(own[left[0]]))
        slab, rest = list[int](), list[int]()
        for key in left:
            fits = own[key] <= room
            (slab if fits else rest).append(key)
            room -= own[key] * fits
        slabs.append(slab)
        left = rest
    taken = sum(page_locked_bytes(sum(own[key] for key in slab)) for slab in slabs)
    return slabs if taken < page_locked_bytes(sum(own.values())) else [list(own)] * bool(own)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


# ---- from host memory to a slot ---------------------------------------------------------------


class Copy(Protocol):
    """A version's copy, from its start on."""

    def done(self) -> bool: ...

    def wait(self) -> None: ...

    def take_weights(self) -> AdapterWeights:
        """Return the copied tensors, once they are complete, for use by the steps."""


class CudaCopy:
    """A copy from page-locked memory on a stream of its own."""

    def __init__(self, weights: AdapterWeights, device: torch.device, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            self._weights = copied(weights, device)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(stream)

    def done(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self._event.synchronize()

    def take_weights(self) -> AdapterWeights:
        steps = torch.cuda.current_stream()
        parts = (one for module in self._weights.values() for _, one in tensors_of(module))
        for tensor in {one.untyped_storage().data_ptr(): one for one in parts}.values():
            # Its own stream allocated it and must not use the memory again before the steps are done.
            tensor.record_stream(steps)
        return self._weights


def copier(device: torch.device) -> Callable[[AdapterWeights], Copy] | None:
    """Return a function that starts a version's copy to the device; None on the CPU."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return lambda weights: CudaCopy(weights, device, stream)


class Staging:
    """Copies in flight and those that are complete but not yet in a slot, `budget` bytes at most.

    Versions of a sequence that are larger than that, or for which memory is short, are not copied ahead: the
    step that loads them into slots copies them itself.
    """

    def __init__(
        self,
        copy: Callable[[AdapterWeights], Copy] | None,
        budget: int,
        store: Mapping[str, AdapterWeights],
        size_of: Callable[[str], int],
    ) -> None:
        """Start empty. `budget` 0 is no limit. `store`: each version's host tensors; `size_of`: its bytes."""
        self._copy = copy
        self._budget = budget
        self._store = store
        self._size_of = size_of
        self._copies: dict[str, Copy] = {}
        self._sizes: dict[str, int] = {}
        self._asked: set[str] = set()
        """Versions requested in this step, which are not evicted for others."""
        self._started: dict[str, float] = {}
        self.began: dict[str, float] = {}
        """Start, in monotonic seconds, of the move into a slot of each version that was taken."""
        self._crowded = False
        """Whether a sequence waits for room in this step. Later ones then start no copies, and lose those of
        an unfinished set: so the sequence gets its room, and no two wait for each other's."""

    def ready(self, digests: Sequence[str]) -> bool:
        """Return True if a sequence's missing versions can go into slots now; else start their copies."""
        if self._copy is None:
            return True
        sizes = {digest: self._size_of(digest) for digest in digests}
        if self._budget and sum(sizes.values()) > self._budget:
            return True
        fresh = [digest for digest in digests if digest not in self._copies]
        if fresh and self._crowded:
            return False
        self._asked.update(digests)
        taken = sum(self._sizes.values()) + sum(sizes[digest] for digest in fresh)
        if fresh and self._budget and taken > self._budget:
            self._crowded = True
            return False
        for digest in fresh:
            try:
                self._started[digest] = time.monotonic()
                self._copies[digest] = self._copy(self._store[digest])
            except torch.OutOfMemoryError as error:
                logger.warning("no memory to copy %s ahead of its first step: %s", digest[:12], error)
                return True
            self._sizes[digest] = sizes[digest]
        return all(self._copies[digest].done() for digest in digests)

    def take_weights(self, digest: str) -> AdapterWeights:
        """Return the version's tensors for its slot: the copy, if there is one, else those in host memory."""
        copy = self._copies.pop(digest, None)
        self._sizes.pop(digest, None)
        self.began[digest] = self._started.pop(digest, time.monotonic())
        if copy is None:
            return self._store[digest]
        copy.wait()
        return copy.take_weights()

    def drop_unwanted(self, waiting: Iterable[str]) -> None:
        """End a step: free the copies for which no sequence waits any more.

        `waiting`: the versions of all waiting sequences, including those that the step did not reach.
        """
        if self._copies:
            kept = self._asked if self._crowded else set(waiting)
            for digest in self._copies.keys() - kept:
                del self._copies[digest], self._sizes[digest], self._started[digest]
        self._asked.clear()
        self._crowded = False

    def wait(self) -> None:
        """Wait until one more copy is complete, if any is in flight, when there is nothing else to do."""
        for copy in self._copies.values():
            if not copy.done():
                copy.wait()
                return
