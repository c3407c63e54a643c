"""Versions in flight to a slot: read from their files in a thread, then copied to the accelerator.

No step waits for a disk. A sequence whose version is still being copied waits while the others continue. On
the CPU, a slot points at host memory: there is nothing to copy and nothing waits.

A version lies in ordinary memory, in one slab, and is copied to an accelerator through a ring of page-locked
memory that is allocated at the start: to lock pages while sequences run holds up the launches of all threads.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch

from onebase_engine.base.layers import LayerShape
from onebase_engine.engine.messages import AdapterFailed, AdapterLoaded, LoadAdapter
from onebase_engine.kernels.weights import (
    AdapterWeights,
    copied,
    host_bytes,
    tensors_of,
    without_head,
)
from onebase_engine.lora.packed_adapter import PackedAdapterError, read_packed_adapter

logger = logging.getLogger(__name__)

ALIGNMENT = 256
"""Alignment of tensors in a slab, in bytes: that of an allocation of its own on a GPU."""
RING_BYTES, RING_PIECES = 16 << 20, 4
"""Bytes and number of the pieces of page-locked memory through which versions are copied."""


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
        self._copied = device.type == "cuda"
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
        if self._copied:
            weights = in_slab(weights)
        return Arrived(
            weights,
            AdapterLoaded(
                digest=order.digest,
                bytes=host_bytes(weights),
                load_seconds=time.monotonic() - started,
            ),
        )

    def _fail(self, order: LoadAdapter, code: str, message: str) -> None:
        self._deliver(AdapterFailed(digest=order.digest, code=code, message=message))


def in_slab(weights: AdapterWeights) -> AdapterWeights:
    """Copy a version into one slab of memory, and return the copy.

    A classifier's head, which is in no slot, stays where it is.
    """
    found = {id(one): one for module in without_head(weights).values() for _, one in tensors_of(module)}
    places = list(accumulate((_aligned(tensor.nbytes) for tensor in found.values()), initial=0))
    slab = torch.empty(places[-1], dtype=torch.uint8)
    there: dict[int, torch.Tensor] = {}
    for (key, tensor), place in zip(found.items(), places, strict=False):
        there[key] = slab[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        there[key].copy_(tensor)
    return {
        name: replace(module, **{part: there.get(id(one), one) for part, one in tensors_of(module)})  # type: ignore[arg-type]
        for name, module in weights.items()
    }


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


# ---- from host memory to a slot ---------------------------------------------------------------


class Copy(Protocol):
    """A version's copy, from its start on."""

    def done(self) -> bool: ...

    def wait(self) -> None: ...

    def cancel(self) -> None:
        """Do not begin the copy, if that is still possible: nobody needs it any more."""

    def take_weights(self) -> AdapterWeights:
        """Return the copied tensors, once they are complete, for use by the steps."""


class PinnedRing:
    """Page-locked memory, allocated once, through which a thread of its own copies to an accelerator."""

    def __init__(self, device: torch.device, size: int = RING_BYTES, pieces: int = RING_PIECES) -> None:
        pinned = device.type == "cuda"
        self._pieces = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(pieces)]
        self._events = [self._event() for _ in self._pieces]
        self._next = 0
        self._stream: Any = torch.cuda.Stream(device) if pinned else None  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(1, "engine-copier")

    def stream(self) -> AbstractContextManager[Any]:
        """Return a context in which the stream of the copies is the current one."""
        return torch.cuda.stream(self._stream)

    def send(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Future[Any]:
        """Begin to copy bytes from host memory to the accelerator, pair by pair.

        Returns:
            A future of the event behind the last copy.
        """
        return self._thread.submit(self._send, pairs)

    def _send(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        for here, there in pairs:
            for source, target in zip(
                torch.split(here, len(self._pieces[0])),
                torch.split(there, len(self._pieces[0])),
                strict=True,
            ):
                piece, event = self._pieces[self._next], self._events[self._next]
                self._next = (self._next + 1) % len(self._pieces)
                event.synchronize()  # what was copied from it before has left it
                piece[: len(source)].copy_(source)
                with self.stream():
                    target.copy_(piece[: len(source)], non_blocking=True)
                    event.record(self._stream)
        last = self._event()
        last.record(self._stream)
        return last

    def _event(self) -> Any:
        return torch.cuda.Event()  # type: ignore[no-untyped-call]


class CudaCopy:
    """A copy from host memory, on a stream of its own."""

    def __init__(self, weights: AdapterWeights, device: torch.device, ring: PinnedRing) -> None:
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

        def there(here: torch.Tensor) -> torch.Tensor:
            pairs.append((here, torch.empty_like(here, device=device)))
            return pairs[-1][1]

        with ring.stream():
            self._weights = copied(weights, device, there)
        self._event = ring.send(pairs)

    def done(self) -> bool:
        return self._event.done() and bool(self._event.result().query())

    def wait(self) -> None:
        self._event.result().synchronize()

    def cancel(self) -> None:
        self._event.cancel()

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
    ring = PinnedRing(device)
    return lambda weights: CudaCopy(weights, device, ring)


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
                self._copies.pop(digest).cancel()
                del self._sizes[digest], self._started[digest]
        self._asked.clear()
        self._crowded = False

    def wait(self) -> None:
        """Wait until one more copy is complete, if any is in flight, when there is nothing else to do."""
        for copy in self._copies.values():
            if not copy.done():
                copy.wait()
                return
