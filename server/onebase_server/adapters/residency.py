"""Which versions the engine holds in host memory: loaded on demand, the least recently used evicted.

Room is given in order of arrival, and all that one request needs at once, so that two requests never wait
for what the other one holds. Requests for versions that are loaded already wait for nobody.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path

from onebase_adapters.store.store import BlobDamagedError, BlobMissingError
from onebase_engine.engine.messages import (
    AdapterFailed,
    AdapterLoaded,
    AdapterUnloaded,
    LoadAdapter,
    SlotsChanged,
    ToEngine,
    UnloadAdapter,
)
from onebase_server.adapters.lease import Held, Lease, Use
from onebase_server.adapters.memory_use import MemoryUse, PackedAdapterFile, Tier
from onebase_server.errors import (
    AdapterDeletedError,
    EngineRestartedError,
    InvalidRequestError,
    OneBaseError,
    QueueFullError,
    UnavailableError,
)

__all__ = ["Lease", "MemoryUse", "PackedAdapterFile", "Residency", "Tier", "Use"]

_QUEUE_RETRY_AFTER = 2.0
_log = logging.getLogger(__name__)


class Residency:
    """The versions in the engine's host memory. Everything is called from one event loop.

    Args:
        limit: bytes for all versions together.
        find: the file with a version's tensors; raises UnknownAdapterError when the version is gone.
        fetch: a local path of it; may take long (a remote store).
        send: passes a message to the engine without blocking.
        queue_limit: requests that may wait until their versions are loaded.
    """

    def __init__(
        self,
        limit: int,
        find: Callable[[str], PackedAdapterFile],
        fetch: Callable[[PackedAdapterFile], Awaitable[Path]],
        send: Callable[[ToEngine], None],
        queue_limit: int = 256,
    ) -> None:
        self.limit = limit
        self._queue_limit = queue_limit
        self._waiting = 0
        self.on_damaged: Callable[[PackedAdapterFile], None] = lambda prepared: None
        """Called when a file is lost or not what was proved; the version may have another one by then."""
        self._find = find
        self._fetch = fetch
        self._send = send
        self._held: dict[str, Held] = {}
        self._leaving: dict[str, Held] = {}
        self._leases: set[Lease] = set()
        self._pinned: frozenset[str] = frozenset()
        self._slots: frozenset[str] = frozenset()
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._clock = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._unwanted: set[str] = set()
        self._running = False
        self._loads = 0
        self._evictions = 0

    # ---- for requests ------------------------------------------------------------------------

    def lease(self, uses: Iterable[Use]) -> Lease:
        """A hold on these versions; it counts as a use of them from now on. Must be released."""
        lease = Lease(self, list(uses))
        self._leases.add(lease)
        return lease

    async def obtain(self, lease: Lease) -> None:
        """Load what the lease lacks and hold all of it. Raises what Lease.ready says."""
        digests = lease.digests
        if all(digest in self._held for digest in digests):
            for digest in digests:
                lease.hold(self._held[digest])
        else:
            if self._waiting > self._queue_limit:
                raise QueueFullError(self._waiting, self._queue_limit, _QUEUE_RETRY_AFTER)
            self._waiting += 1
            try:
                async with self._turn:
                    await self._make_room(lease, digests)
            finally:
                self._waiting -= 1
        for held in lease.held:
            held.last_used = next(self._clock)
            await asyncio.shield(held.loaded)

    def release(self, lease: Lease) -> None:
        self._leases.discard(lease)
        for held in lease.held:
            held.leases -= 1
            held.last_used = next(self._clock)
            if self._held.get(held.digest) is held:
                self._unload_if_unwanted(held)
        self._changed.set()

    def is_used(self, use: Use) -> bool:
        """Whether a request runs with the version under this name, or waits for it."""
        return any(use in lease.uses for lease in self._leases)

    def revoke(self, use: Use) -> None:
        """End every request that uses the version under this name."""
        for lease in [lease for lease in self._leases if use in lease.uses]:
            lease.revoke(AdapterDeletedError(use.name))

    # ---- memory ------------------------------------------------------------------------------

    def tier(self, digest: str) -> Tier:
        """Where the version is now."""
        held = self._held.get(digest)
        if held is None or not held.is_loaded:
            return "disk"
        return "slot" if digest in self._slots else "host"

    @property
    def memory(self) -> MemoryUse:
        pinned = sum(self._held[digest].bytes for digest in self._pinned if digest in self._held)
        return MemoryUse(self.limit, self._used, len(self._held), pinned, self._loads, self._evictions)

    def pin(self, digests: Iterable[str]) -> None:
        """From now on exactly these versions are never evicted."""
        self._pinned = frozenset(digests)
        self._changed.set()

    def check_pins(self, digests: Iterable[str]) -> None:
        """Raises InvalidRequestError when these versions cannot be in memory together."""
        total = sum(self._find(digest).blob.size for digest in set(digests))
        if total > self.limit:
            raise InvalidRequestError(
                f"pinned: the pinned adapters would take {total} bytes of host memory and the limit is "
                f"{self.limit} (--host-memory). Unpin another one, or raise the limit.",
                param="pinned",
                code="host_memory_exceeded",
            )

    async def load_pinned(self) -> None:
        """Bring the pinned versions into memory, after an engine's start. Failures are logged."""
        for digest in sorted(self._pinned):
            try:
                async with self.lease([Use("", digest)]):
                    pass
            except OneBaseError as error:
                _log.error("pinned version %s cannot be loaded: %s", digest[:12], error)

    def keep_only(self, wanted: Callable[[str], bool]) -> None:
        """Free the memory of versions that nobody can ask for any more, each once nothing runs with it."""
        self._unwanted = {digest for digest in self._held if not wanted(digest)}
        for digest in list(self._unwanted):
            self._unload_if_unwanted(self._held[digest])

    def _unload_if_unwanted(self, held: Held) -> None:
        if held.digest in self._unwanted and held.is_loaded and not held.leases:
            self._unload(held)

    @property
    def _used(self) -> int:
        return sum(held.bytes for held in (*self._held.values(), *self._leaving.values()))

    async def _make_room(self, lease: Lease, digests: Sequence[str]) -> None:
        """Reserve memory for all that is missing, in one go, and begin to load it."""
        for digest in digests:
            if digest in self._held:
                lease.hold(self._held[digest])
        while True:
            if not self._running:
                raise EngineRestartedError
            missing = {one: self._find(one) for one in digests if one not in self._held}
            needed = sum(prepared.blob.size for prepared in missing.values())
            self._check_possible(digests)
            self._evict(needed)
            if self._used + needed <= self.limit:
                break
            self._changed.clear()
            await self._changed.wait()
        for digest, prepared in missing.items():
            lease.hold(self._begin_load(digest, prepared))

    def _evict(self, needed: int) -> None:
        """Tell idle versions to leave until `needed` bytes will be free, if that can be had."""
        while needed + sum(held.bytes for held in self._held.values()) > self.limit:
            idle = self._least_recently_used()
            if idle is None:
                return
            self._evictions += 1
            self._unload(idle)

    def _check_possible(self, digests: Sequence[str]) -> None:
        others = self._pinned - set(digests)
        needed = sum(self._find(digest).blob.size for digest in digests)
        pinned = sum(self._held[digest].bytes for digest in others if digest in self._held)
        if needed + pinned > self.limit:
            beside = f" beside {pinned} bytes of pinned adapters" if pinned else ""
            raise InvalidRequestError(
                f"adapter: it takes {needed} bytes of host memory{beside} and the limit is {self.limit} "
                "(--host-memory). Raise the limit, or unpin others.",
                param="adapter",
                code="host_memory_exceeded",
            )

    def _least_recently_used(self) -> Held | None:
        idle = [
            held
            for held in self._held.values()
            if not held.leases and held.is_loaded and held.digest not in self._pinned
        ]
        return min(idle, key=lambda held: held.last_used, default=None)

    # ---- loading -----------------------------------------------------------------------------

    def _begin_load(self, digest: str, prepared: PackedAdapterFile) -> Held:
        loaded = asyncio.get_running_loop().create_future()
        held = Held(digest, prepared, prepared.blob.size, loaded, last_used=next(self._clock))
        held.loaded.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._held[digest] = held
        self._unwanted.discard(digest)
        task = asyncio.get_running_loop().create_task(self._load(held))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return held

    async def _load(self, held: Held) -> None:
        """Ask the engine to load; its answer ends `held.loaded`."""
        try:
            path = await self._fetch(held.prepared)
            leaving = self._leaving.get(held.digest)
            if leaving is not None:
                await leaving.unloaded.wait()
        except OneBaseError as error:
            self._load_failed(held, error)
            return
        except Exception as error:
            _log.error("version %s cannot be read: %s", held.digest[:12], error)
            self._load_failed(held, _unavailable(held.digest, str(error)))
            if isinstance(error, BlobMissingError | BlobDamagedError):
                self.on_damaged(held.prepared)
            return
        if self._held.get(held.digest) is held:
            self._loads += 1
            self._send(LoadAdapter(held.digest, str(path), held.prepared.blob.sha256))

    def _load_failed(self, held: Held, error: OneBaseError) -> None:
        if self._held.get(held.digest) is held:
            del self._held[held.digest]
        if not held.loaded.done():
            held.loaded.set_exception(error)
        self._changed.set()

    def _unload(self, held: Held) -> None:
        del self._held[held.digest]
        self._unwanted.discard(held.digest)
        self._leaving[held.digest] = held
        self._send(UnloadAdapter(held.digest))

    # ---- the engine's words ------------------------------------------------------------------

    def receive(self, message: AdapterLoaded | AdapterFailed | AdapterUnloaded | SlotsChanged) -> None:
        """What the engine says about versions."""
        if isinstance(message, SlotsChanged):
            self._slots = frozenset(message.digests)
        elif isinstance(message, AdapterUnloaded):
            gone = self._leaving.pop(message.digest, None)
            if gone is not None:
                gone.unloaded.set()
            self._changed.set()
        else:
            self._load_answered(message)

    def _load_answered(self, message: AdapterLoaded | AdapterFailed) -> None:
        held = self._held.get(message.digest)
        if held is None or held.loaded.done():
            return
        if isinstance(message, AdapterFailed):
            _log.error("version %s cannot be loaded: %s", message.digest[:12], message.message)
            self._load_failed(held, _unavailable(message.digest, message.message))
            if message.code == "damaged":
                self.on_damaged(held.prepared)
            return
        held.bytes = message.bytes
        held.loaded.set_result(None)
        self._changed.set()

    def engine_ready(self) -> None:
        """From now on versions can be loaded."""
        self._running = True

    def engine_gone(self) -> None:
        """The engine's memory is gone, and everything in it. Whoever waits is told."""
        self._running = False
        held, self._held = self._held, {}
        leaving, self._leaving = self._leaving, {}
        self._slots = frozenset()
        for one in held.values():
            if not one.loaded.done():
                one.loaded.set_exception(EngineRestartedError())
        for one in leaving.values():
            one.unloaded.set()
        self._changed.set()


def _unavailable(digest: str, reason: str) -> UnavailableError:
    return UnavailableError(
        f"Version {digest[:12]} of the adapter cannot be loaded: {reason}",
        code="adapter_unavailable",
        retry_after=10.0,
    )
