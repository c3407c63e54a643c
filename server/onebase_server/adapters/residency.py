"""Residency of versions in the engine's host memory: loaded on demand, the least recently used evicted.

Memory is reserved in order of arrival, and for all that one request needs at once, so that two requests never
wait for each other. A request whose versions are loaded does not wait.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from onebase_adapters.registry import VersionRecord
from onebase_adapters.store.blobs import Blob
from onebase_adapters.store.store import BlobDamagedError, BlobMissingError, Store
from onebase_edge.background import Threads
from onebase_edge.errors import (
    AdapterDeletedError,
    AdapterNotFoundError,
    ApiError,
    EngineRestartedError,
    InvalidRequestError,
    LoadingQueueFullError,
    UnavailableError,
)
from onebase_engine.engine.messages import (
    AdapterFailed,
    AdapterLoaded,
    AdapterUnloaded,
    LoadAdapter,
    SlotsChanged,
    ToEngine,
    UnloadAdapter,
)
from onebase_server.adapters.catalog import Catalog, VersionRef
from onebase_server.telemetry.histogram import LOAD_SECONDS, Histogram
from onebase_server.tenancy.shares import QueueShares

Tier = Literal["slot", "host", "disk"]
_QUEUE_RETRY_AFTER = 2.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackedAdapterFile:
    """Packed file of a proven version. `versions`: those that had it at that time. `is_proved`: True if it
    was proved with this server's kernels. `path`: where the file of a live version is, which belongs to no
    adapter and was not proved."""

    blob: Blob
    versions: tuple[VersionRecord, ...]
    is_proved: bool = True
    path: Path | None = None


@dataclass(frozen=True)
class MemoryUse:
    """Host memory for versions, in bytes, and the loads and evictions since the start."""

    limit: int
    used: int
    versions: int
    pinned: int
    loads: int
    evictions: int


class PackedAdapterFiles:
    """The packed adapters of the versions that the catalog knows as ready, and of live versions. `kernels`:
    this server's."""

    def __init__(self, catalog: Catalog, store: Store, disk: Threads, kernels: Callable[[], str]) -> None:
        self._catalog = catalog
        self._store = store
        self._disk = disk
        self._kernels = kernels
        self._live: dict[str, dict[Path, PackedAdapterFile]] = {}
        """Files of live versions, by digest and path."""

    def add_live(self, path: Path, sha256: str, size: int) -> None:
        """Let requests run with a live version, whose digest is that of its file.

        Several files may have one digest: first weights depend on a seed and a rank alone.
        """
        file = PackedAdapterFile(Blob(sha256, size), (), path=path)
        self._live.setdefault(sha256, {})[path] = file

    def drop_live(self, path: Path) -> set[str]:
        """Forget the live versions in a folder, and return the digests that no other file has."""
        for files in self._live.values():
            for file in [file for file in files if file.parent == path]:
                del files[file]
        gone = {digest for digest, files in self._live.items() if not files}
        for digest in gone:
            del self._live[digest]
        return gone

    def is_live(self, digest: str) -> bool:
        """Return True if it is a live version."""
        return digest in self._live

    def find(self, digest: str) -> PackedAdapterFile:
        """Return the version's file. Its size is the tensors' and a header's. Raises AdapterNotFoundError."""
        if (live := self._live.get(digest)) is not None:
            return next(reversed(live.values()))  # others may be about to go
        ready = [version for version in self._catalog.of_digest(digest) if version.state == "ready"]
        kernels = self._kernels()
        for version in ready:
            if (blob := version.packed_for(kernels)) is not None:
                having = tuple(one for one in ready if one.packed_for(kernels) == blob)
                return PackedAdapterFile(blob, having)
        for version in ready:
            if (blob := version.prepared) is not None:
                having = tuple(one for one in ready if one.prepared == blob)
                return PackedAdapterFile(blob, having, is_proved=False)
        raise AdapterNotFoundError(
            f"Version {digest[:12]} of the adapter is gone: it was deleted.", code="version_not_found"
        )

    async def fetch(self, packed: PackedAdapterFile) -> Path:
        """Return a local path; a file in a remote store is fetched first. Raises StoreError."""
        if packed.path is not None:
            return packed.path
        return await self._disk.run_blocking(self._store.local, packed.blob.sha256)


@dataclass(eq=False)
class CacheEntry:
    """One version that is in the engine's memory or being loaded. `bytes` are reserved from the beginning.

    `packed`: the file that it is loaded from, even if the version gets another one in the meantime.
    """

    digest: str
    packed: PackedAdapterFile
    bytes: int
    loaded: asyncio.Future[None]
    leases: int = 0
    last_used: int = 0
    unloaded: asyncio.Event = field(default_factory=asyncio.Event)
    began: float = field(default_factory=time.monotonic)

    @property
    def is_loaded(self) -> bool:
        return self.loaded.done() and not self.loaded.cancelled() and self.loaded.exception() is None


class Residency:
    """The versions in the engine's host memory. Everything is called from one event loop.

    Args:
        limit: bytes for all versions together.
        find: the file with a version's tensors; raises AdapterNotFoundError when the version is gone.
        fetch: a local path of it; may take long (a remote store).
        send: passes a message to the engine without blocking.
        queue_limit: requests that may wait until their versions are loaded (and more, of other tenants than
            those that fill the queue).
        prove: the file as it was proved with this server's kernels, which takes a proof where there is none.
        knows: whether a version is still there by the name that a request has for it.
    """

    def __init__(
        self,
        limit: int,
        find: Callable[[str], PackedAdapterFile],
        fetch: Callable[[PackedAdapterFile], Awaitable[Path]],
        send: Callable[[ToEngine], None],
        queue_limit: int = 256,
        prove: Callable[[PackedAdapterFile], Awaitable[PackedAdapterFile]] | None = None,
        knows: Callable[[VersionRef], bool] = lambda use: True,
    ) -> None:
        self.limit = limit
        self._find = find
        self._fetch = fetch
        self._send = send
        self._queue_limit = queue_limit
        self._subscribers: list[Callable[[PackedAdapterFile], None]] = []
        self._prove = prove
        self._knows = knows
        self._waiting = QueueShares()
        self._entries: dict[str, CacheEntry] = {}
        self._leaving: dict[str, CacheEntry] = {}
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
        self.load_seconds = Histogram(LOAD_SECONDS)
        """Time, in seconds, of each load into host memory, including the fetch from a remote store."""
        self.slot_seconds = Histogram(LOAD_SECONDS)
        """Time, in seconds, of each copy from host memory into a slot."""

    # ---- for requests ------------------------------------------------------------------------

    def subscribe(self, subscriber: Callable[[PackedAdapterFile], None]) -> None:
        """Call it when a file is lost or is not what was proved: its versions may have another one by
        then."""
        self._subscribers.append(subscriber)

    def _report_damaged(self, packed: PackedAdapterFile) -> None:
        for subscriber in self._subscribers:
            subscriber(packed)

    def lease(
        self,
        uses: Iterable[VersionRef],
        on_revoked: Callable[[ApiError], None] = lambda error: None,
        tenant: str = "",
    ) -> Lease:
        """Return a lease on these versions for a tenant. It counts as a use of them at once; it must be
        released.

        on_revoked: called when one of them is deleted by force while the loaded lease is held.
        """
        lease = Lease(self, uses, on_revoked, tenant)
        self._leases.add(lease)
        return lease

    async def obtain(self, lease: Lease) -> None:
        """Load what the lease lacks and hold all of it. Raises what `Lease.ready` does."""
        for use in lease.uses:
            if use.name and not self._knows(use):  # deleted after the request chose it
                raise AdapterDeletedError(use.name)
        digests = lease.digests
        if all(digest in self._entries for digest in digests):
            for digest in digests:
                lease.hold(self._entries[digest])
        else:
            if not self._waiting.has_room(lease.tenant, 1, self._queue_limit + 1):
                waiting = max(0, self._waiting.total - 1)  # one is being loaded
                raise LoadingQueueFullError(waiting, self._queue_limit, _QUEUE_RETRY_AFTER)
            self._waiting.enter(lease.tenant)
            try:
                async with self._turn:
                    await self._make_room(lease, digests)
            finally:
                self._waiting.leave(lease.tenant)
        for entry in lease.entries:
            entry.last_used = next(self._clock)
            await asyncio.shield(entry.loaded)

    def release(self, lease: Lease) -> None:
        self._leases.discard(lease)
        for entry in lease.entries:
            entry.leases -= 1
            entry.last_used = next(self._clock)
            if self._entries.get(entry.digest) is entry:
                self._unload_if_unwanted(entry)
        self._changed.set()

    def is_used(self, use: VersionRef) -> bool:
        """Return True if a request runs with the version under this name, or waits for it."""
        return any(use in lease.uses for lease in self._leases)

    def revoke(self, tenant: str, name: str, digest: str | None = None) -> None:
        """End every request that uses the version under this name; None: any version."""
        for lease in list(self._leases):
            if any(
                (use.tenant, use.name) == (tenant, name) and digest in (None, use.digest)
                for use in lease.uses
            ):
                lease.revoke(AdapterDeletedError(name))

    # ---- memory ------------------------------------------------------------------------------

    def tier(self, digest: str) -> Tier:
        """Return the version's tier: slot, host memory or disk."""
        entry = self._entries.get(digest)
        if entry is None or not entry.is_loaded:
            return "disk"
        return "slot" if digest in self._slots else "host"

    @property
    def loaded(self) -> list[tuple[str, Tier, bool]]:
        """The versions in memory, the newest use first, each with its tier and whether it is pinned."""
        entries = sorted(self._entries.values(), key=lambda entry: -entry.last_used)
        return [
            (one.digest, self.tier(one.digest), one.digest in self._pinned)
            for one in entries
            if one.is_loaded
        ]

    @property
    def slots_used(self) -> int:
        """Slots with a version in them."""
        return len(self._slots)

    @property
    def waiting(self) -> int:
        """Requests that wait until their versions are loaded."""
        return sum(lease.waits for lease in self._leases)

    @property
    def used(self) -> set[VersionRef]:
        """Versions that requests run with or wait for."""
        return {use for lease in self._leases for use in lease.uses}

    @property
    def memory(self) -> MemoryUse:
        pinned = sum(self._entries[digest].bytes for digest in self._pinned if digest in self._entries)
        return MemoryUse(self.limit, self._used, len(self._entries), pinned, self._loads, self._evictions)

    def pin(self, digests: Iterable[str]) -> None:
        """Set the versions that are never evicted."""
        self._pinned = frozenset(digests)
        self._changed.set()

    def check_pins(self, digests: Iterable[str]) -> None:
        """Raise InvalidRequestError if these versions cannot be in memory together."""
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
                async with self.lease([VersionRef("", "", digest)]):
                    pass
            except ApiError as error:
                _log.error("pinned version %s cannot be loaded: %s", digest[:12], error)

    def keep_only(self, wanted: Callable[[str], bool]) -> None:
        """Unload versions that nobody can ask for any more, each when its last request has ended. Live ones
        stay until `forget`."""
        self._unwanted = {
            digest
            for digest, entry in self._entries.items()
            if (digest in self._unwanted if entry.packed.path is not None else not wanted(digest))
        }
        for digest in list(self._unwanted):
            self._unload_if_unwanted(self._entries[digest])

    def forget(self, digests: Iterable[str]) -> None:
        """Unload live versions that nobody can ask for any more, each when its last request has ended."""
        for digest in digests:
            if (entry := self._entries.get(digest)) is not None:
                self._unwanted.add(digest)
                self._unload_if_unwanted(entry)

    def _unload_if_unwanted(self, entry: CacheEntry) -> None:
        if entry.digest in self._unwanted and entry.is_loaded and not entry.leases:
            self._unload(entry)

    @property
    def _used(self) -> int:
        return sum(entry.bytes for entry in (*self._entries.values(), *self._leaving.values()))

    async def _make_room(self, lease: Lease, digests: Sequence[str]) -> None:
        """Reserve memory for all that is missing, in one go, and begin to load it."""
        for digest in digests:
            if digest in self._entries:
                lease.hold(self._entries[digest])
        while True:
            if not self._running:
                raise EngineRestartedError
            missing = {one: self._find(one) for one in digests if one not in self._entries}
            needed = sum(packed.blob.size for packed in missing.values())
            self._check_possible(digests)
            self._evict(needed)
            if self._used + needed <= self.limit:
                break
            self._changed.clear()
            await self._changed.wait()
        for digest, packed in missing.items():
            lease.hold(self._begin_load(digest, packed))

    def _evict(self, needed: int) -> None:
        """Unload idle versions, the least recently used first, until `needed` bytes will be free."""
        while needed + sum(entry.bytes for entry in self._entries.values()) > self.limit:
            idle = self._least_recently_used()
            if idle is None:
                return
            self._evictions += 1
            self._unload(idle)

    def _check_possible(self, digests: Sequence[str]) -> None:
        others = self._pinned - set(digests)
        needed = sum(self._find(digest).blob.size for digest in digests)
        pinned = sum(self._entries[digest].bytes for digest in others if digest in self._entries)
        if needed + pinned > self.limit:
            others_take = f", pinned adapters take {pinned}," if pinned else ""
            raise InvalidRequestError(
                f"adapter: it takes {needed} bytes of host memory{others_take} and the limit is {self.limit} "
                "(--host-memory). Raise the limit, or unpin others.",
                param="adapter",
                code="host_memory_exceeded",
            )

    def _least_recently_used(self) -> CacheEntry | None:
        idle = [
            entry
            for entry in self._entries.values()
            if not entry.leases and entry.is_loaded and entry.digest not in self._pinned
        ]
        return min(idle, key=lambda entry: entry.last_used, default=None)

    # ---- loading -----------------------------------------------------------------------------

    def _begin_load(self, digest: str, packed: PackedAdapterFile) -> CacheEntry:
        loaded = asyncio.get_running_loop().create_future()
        entry = CacheEntry(digest, packed, packed.blob.size, loaded, last_used=next(self._clock))
        entry.loaded.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._entries[digest] = entry
        self._unwanted.discard(digest)
        task = asyncio.get_running_loop().create_task(self._load(entry))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return entry

    async def _load(self, entry: CacheEntry) -> None:
        """Ask the engine to load; its answer ends `entry.loaded`."""
        try:
            if entry.packed.path is not None:
                with suppress(ApiError):  # it may have another file by now
                    entry.packed = self._find(entry.digest)
            if self._prove is not None:
                entry.packed = await self._prove(entry.packed)
            path = await self._fetch(entry.packed)
            leaving = self._leaving.get(entry.digest)
            if leaving is not None:
                await leaving.unloaded.wait()
        except ApiError as error:
            self._load_failed(entry, error)
            return
        except Exception as error:
            _log.error("version %s cannot be read: %s", entry.digest[:12], error)
            self._load_failed(entry, _unavailable(entry.digest, str(error)))
            if isinstance(error, BlobMissingError | BlobDamagedError):
                self._report_damaged(entry.packed)
            return
        if self._entries.get(entry.digest) is entry:
            self._loads += 1
            self._send(LoadAdapter(entry.digest, str(path), entry.packed.blob.sha256))

    def _load_failed(self, entry: CacheEntry, error: ApiError) -> None:
        if self._entries.get(entry.digest) is entry:
            del self._entries[entry.digest]
            self._unwanted.discard(entry.digest)
        if not entry.loaded.done():
            entry.loaded.set_exception(error)
        self._changed.set()

    def _unload(self, entry: CacheEntry) -> None:
        del self._entries[entry.digest]
        self._unwanted.discard(entry.digest)
        self._leaving[entry.digest] = entry
        self._send(UnloadAdapter(entry.digest))

    # ---- messages from the engine ------------------------------------------------------------

    def receive(self, message: AdapterLoaded | AdapterFailed | AdapterUnloaded | SlotsChanged) -> None:
        """Handle a message of the engine about versions."""
        if isinstance(message, SlotsChanged):
            self._slots = frozenset(message.digests)
            for seconds in message.seconds.values():
                self.slot_seconds.observe(seconds)
        elif isinstance(message, AdapterUnloaded):
            gone = self._leaving.pop(message.digest, None)
            if gone is not None:
                gone.unloaded.set()
            self._changed.set()
        else:
            self._load_answered(message)

    def _load_answered(self, message: AdapterLoaded | AdapterFailed) -> None:
        entry = self._entries.get(message.digest)
        if entry is None or entry.loaded.done():
            return
        if isinstance(message, AdapterFailed):
            _log.error("version %s cannot be loaded: %s", message.digest[:12], message.message)
            if message.code == "slot_memory_exceeded":
                # No later try would go better.
                refusal = InvalidRequestError(
                    f"adapter: {message.message}.", param="adapter", code="slot_memory_exceeded"
                )
                self._load_failed(entry, refusal)
                return
            self._load_failed(entry, _unavailable(message.digest, message.message))
            if message.code == "damaged":
                self._report_damaged(entry.packed)
            return
        entry.bytes = message.bytes
        self.load_seconds.observe(time.monotonic() - entry.began)
        entry.loaded.set_result(None)
        self._unload_if_unwanted(entry)  # its last request may have ended while it was loaded
        self._changed.set()

    def engine_ready(self) -> None:
        """Allow loads: an engine runs."""
        self._running = True

    def engine_gone(self) -> None:
        """Forget all versions: the engine's memory is gone. Waiting leases end with an error."""
        self._running = False
        entries, self._entries = self._entries, {}
        leaving, self._leaving = self._leaving, {}
        self._unwanted.clear()
        self._slots = frozenset()
        for entry in entries.values():
            if not entry.loaded.done():
                entry.loaded.set_exception(EngineRestartedError())
        for entry in leaving.values():
            entry.unloaded.set()
        self._changed.set()


class Lease:
    """A request's hold on its versions: they stay in memory until `release`.

    A context manager: entering waits until everything is loaded.
    """

    def __init__(
        self,
        residency: Residency,
        uses: Iterable[VersionRef],
        on_revoked: Callable[[ApiError], None],
        tenant: str,
    ) -> None:
        self.uses = frozenset(uses)
        self.tenant = tenant
        """Tenant of the request; the adapters may be shared ones of another tenant."""
        self.entries: list[CacheEntry] = []
        self._residency = residency
        self._on_revoked = on_revoked
        self._waiting: asyncio.Task[object] | None = None
        self._revoked: ApiError | None = None
        self._released = False

    @property
    def waits(self) -> bool:
        return self._waiting is not None

    @property
    def digests(self) -> list[str]:
        return sorted({use.digest for use in self.uses})

    async def ready(self) -> None:
        """Wait until every version is loaded. On any error the lease is released.

        Raises:
            InvalidRequestError: they can never be in memory together.
            QueueFullError: too many requests wait already.
            UnavailableError, EngineRestartedError: one cannot be loaded now.
            AdapterDeletedError: one was deleted while this waited.
        """
        self._waiting = asyncio.current_task()
        try:
            await self._residency.obtain(self)
        except asyncio.CancelledError:
            self.release()
            if self._revoked is not None:
                task = asyncio.current_task()
                if task is not None and task.uncancel() == 0:
                    raise self._revoked from None
            raise
        except BaseException:
            self.release()
            raise
        finally:
            self._waiting = None

    def release(self) -> None:
        """Release the versions. May be called more than once."""
        if not self._released:
            self._released = True
            self._residency.release(self)

    def hold(self, entry: CacheEntry) -> None:
        entry.leases += 1
        self.entries.append(entry)

    def revoke(self, error: ApiError) -> None:
        """End what uses the lease, or waits for it, with an error. Only the first one counts."""
        if self._revoked is not None:
            return  # a task that is cancelled twice would end with the cancellation
        self._revoked = error
        if self._waiting is not None:
            self._waiting.cancel()
        else:
            self._on_revoked(error)

    async def __aenter__(self) -> Self:
        await self.ready()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _unavailable(digest: str, reason: str) -> UnavailableError:
    return UnavailableError(
        f"Version {digest[:12]} of the adapter cannot be loaded: {reason}",
        code="adapter_unavailable",
        retry_after=10.0,
    )
