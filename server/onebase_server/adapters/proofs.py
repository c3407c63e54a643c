"""One proof of each content, under however many names it is wanted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from onebase_adapters.registry import Registry, VersionRecord
from onebase_adapters.store.store import Store
from onebase_server.adapters.catalog import Catalog
from onebase_server.adapters.prover import Proof, Prover
from onebase_server.background import Threads
from onebase_server.processes.verifier_protocol import Progress

OnProgress = Callable[[Progress], None]


class Proofs:
    """Looks for a proof before it asks for one. Called from one event loop."""

    def __init__(
        self,
        registry: Registry,
        store: Store,
        catalog: Catalog,
        prover: Prover,
        records: Threads,
        disk: Threads,
    ) -> None:
        self._registry = registry
        self._store = store
        self._catalog = catalog
        self._prover = prover
        self._records = records
        self._disk = disk
        self._running: dict[tuple[str, bool], asyncio.Task[Proof]] = {}
        self._listeners: dict[str, set[OnProgress]] = {}

    async def of(
        self, version: VersionRecord, *, allow_noop: bool, patient: bool, on_progress: OnProgress
    ) -> Proof:
        """The proof of this content: found under another name, on its way for one, or a new one.

        Raises what Prover.prove raises, and RegistryError.
        """
        known = await self._known(version, allow_noop)
        if known is not None:
            return known
        listeners = self._listeners.setdefault(version.digest, set())
        listeners.add(on_progress)
        try:
            return await asyncio.shield(self._shared(version, allow_noop, patient))
        finally:
            listeners.discard(on_progress)
            if not listeners:
                self._listeners.pop(version.digest, None)

    def _shared(self, version: VersionRecord, allow_noop: bool, patient: bool) -> asyncio.Task[Proof]:
        key = (version.digest, allow_noop)
        if key not in self._running:

            def tell(progress: Progress) -> None:
                for listener in list(self._listeners.get(version.digest, ())):
                    listener(progress)

            task = asyncio.get_running_loop().create_task(
                self._prover.prove(version.files, allow_noop=allow_noop, patient=patient, on_progress=tell)
            )
            self._running[key] = task
            task.add_done_callback(lambda done: self._running.pop(key, None))
        return self._running[key]

    async def _known(self, version: VersionRecord, allow_noop: bool) -> Proof | None:
        for other in self._catalog.of_digest(version.digest):
            if other.state != "ready" or other.prepared is None or other.report is None:
                continue
            if other.report["proof"]["modules_changed"] == 0 and not allow_noop:
                continue
            if await self._disk.run(self._store.exists, other.prepared.sha256):
                whole = await self._records.run(
                    self._registry.version, other.tenant, other.name, other.digest
                )
                if whole.report is not None and whole.prepared is not None:
                    return Proof(dict(whole.report), whole.prepared)
        return None
