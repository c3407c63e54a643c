"""Proofs shared by several servers: a version is proved once for each base and kind of kernels.

The registry says who proves what, and with which kernels a version was proved. The packed adapter is in the
store under the hash that was proved. A server with other kernels proves for itself before it first loads the
version: the same tensors summed in another order are another computation.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from onebase_adapters import registry as registry_errors
from onebase_adapters.registry import Registry, RegistryError, VersionRecord
from onebase_adapters.registry.records import MODULES
from onebase_adapters.store.store import Store, StoreError
from onebase_edge.background import Threads, keep_running
from onebase_edge.errors import UnavailableError
from onebase_server.adapters.catalog import Catalog
from onebase_server.adapters.residency import PackedAdapterFile
from onebase_server.processes.verifier_client import (
    OnProgress,
    Proof,
    RejectedError,
    VerifierClient,
    VerifierGoneError,
)
from onebase_server.storage.calls import RegistryThreads, storage_errors
from onebase_server.telemetry.histogram import PROOF_SECONDS, Histogram
from onebase_server.telemetry.traces import Tracing, failed

CLAIM_SECONDS = 60.0
"""Time, in seconds without a renewal, after which another server may claim a proof."""
LOOK_SECONDS = 5.0
"""Time, in seconds, between two looks for another server's proof, where nothing notifies of it."""
_RETRY_AFTER = 10.0
_MOST_REFUSED = 1000

_log = logging.getLogger(__name__)


class SharedProofs:
    """Proofs by this server's verifier, or by another server's. Called from one event loop.

    Args:
        kernels: what this server's engine computes with, once there is one.
        records, disk: threads for the registry's calls and for the store's.
    """

    def __init__(
        self,
        registry: Registry,
        store: Store,
        catalog: Catalog,
        verifier: VerifierClient,
        kernels: Callable[[], str],
        *,
        records: RegistryThreads,
        disk: Threads,
        tracing: Tracing,
    ) -> None:
        self._registry = registry
        self._store = store
        self._catalog = catalog
        self._verifier = verifier
        self._kernels = kernels
        self._records = records
        self._disk = disk
        self._tracing = tracing
        self._open: Counter[str] = Counter()
        """Number of open claims on unfinished versions, including those that are awaited, by digest."""
        self._made: dict[tuple[str, bool], Proof] = {}
        """Proofs by digest and `allow_noop`, for the content's other names that are open."""
        self._refused: dict[tuple[str, str], str] = {}
        self.seconds = Histogram(PROOF_SECONDS)
        """Time, in seconds, of each proof that this server's verifier has made."""

    # ---- who proves -----------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def claimed(self, version: VersionRecord) -> AsyncIterator[bool]:
        """Claim the proof of an unfinished version: yield True if this server is to prove it, and no other
        does.

        Entering waits for an engine, and for another server that is proving the version. Once that one has
        finished it, this yields False. Raises AdapterNotFoundError and UnknownVersionError of the registry.
        """
        await self._verifier.base_here()
        self._open[version.digest] += 1
        try:
            async with self._claim(version, self._kernels(), lambda found: found.finished) as ours:
                yield ours
        finally:
            self._open[version.digest] -= 1
            if not self._open[version.digest]:
                del self._open[version.digest]
                self._made = {key: made for key, made in self._made.items() if key[0] != version.digest}

    @contextlib.asynccontextmanager
    async def _claim(
        self, version: VersionRecord, kernels: str, is_done: Callable[[VersionRecord], bool]
    ) -> AsyncIterator[bool]:
        if not await self._ours(version, kernels, is_done):
            yield False
            return
        renewing = asyncio.get_running_loop().create_task(
            keep_running("renewing the claim to a proof", lambda: self._renew(version, kernels))
        )
        try:
            yield True
        finally:
            renewing.cancel()
            with contextlib.suppress(RegistryError):
                await self._records.run_blocking(self._registry.proofs.release, version, kernels)

    async def _ours(
        self, version: VersionRecord, kernels: str, is_done: Callable[[VersionRecord], bool]
    ) -> bool:
        """Return True once the claim is this server's, or False once another's has ended in a proof or a
        failure."""
        while True:
            changed = self._catalog.changed
            try:
                if await self._records.run_blocking(
                    self._registry.proofs.claim, version, kernels, CLAIM_SECONDS
                ):
                    return True
                found = await self._records.run_blocking(
                    self._registry.version, version.tenant, version.name, version.digest
                )
            except (registry_errors.UnknownAdapterError, registry_errors.UnknownVersionError):
                raise
            except RegistryError as error:
                # A proof too many costs less than a version that waits for the database.
                _log.warning("version %s is proved without a claim: %s", version.digest[:12], error)
                return True
            if found.state == "failed" or is_done(found):
                return False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await changed.wait()

    async def _renew(self, version: VersionRecord, kernels: str) -> None:
        """Renew the claim while there is an engine: others do not wait for a server that has long had
        none."""
        while True:
            await asyncio.sleep(CLAIM_SECONDS / 3)
            if self._verifier.has_base:
                with contextlib.suppress(RegistryError):
                    await self._records.run_blocking(
                        self._registry.proofs.renew, version, kernels, CLAIM_SECONDS
                    )

    # ---- proofs ---------------------------------------------------------------------------------

    def has_none(self, version: VersionRecord) -> bool:
        """Return True if a ready version was proved with other kernels only."""
        return version.state == "ready" and version.packed_for(self._kernels()) is None

    async def prove(
        self, version: VersionRecord, *, allow_noop: bool, wait_for_verifier: bool, on_progress: OnProgress
    ) -> Proof:
        """Return the proof of this content under another name if there is one, else the verifier's.

        Raises what VerifierClient.prove does.
        """
        known = await self._known_proof(version, allow_noop)
        if known is not None:
            return known
        key = version.digest, allow_noop
        if key not in self._made:
            self._made[key] = await self._verified(version, allow_noop, wait_for_verifier, on_progress)
        return self._made[key]

    async def keep(self, version: VersionRecord, proof: Proof) -> None:
        """Record a proof of a version that was made ready with other kernels. Raises RegistryError."""
        report = {name: part for name, part in proof.report.items() if name != MODULES}
        await self._records.write(self._registry.proofs.keep, version, self._kernels(), report, proof.packed)

    async def _verified(
        self, version: VersionRecord, allow_noop: bool, wait_for_verifier: bool, on_progress: OnProgress
    ) -> Proof:
        began = time.monotonic()
        try:
            with self._tracing.span("prove", _span_attributes(version)) as span:
                try:
                    return await self._verifier.prove(
                        version.files,
                        tenant=version.tenant,
                        allow_noop=allow_noop,
                        wait_for_verifier=wait_for_verifier,
                        on_progress=on_progress,
                    )
                except RejectedError as error:
                    failed(span, error.code)
                    raise
        finally:
            self.seconds.observe(time.monotonic() - began)

    async def _known_proof(self, version: VersionRecord, allow_noop: bool) -> Proof | None:
        """Return the proof of this content under another name, if its packed adapter is in the store.

        Only names that the tenant may know: the time to readiness must not reveal what others have.
        """
        known, kernels = self._catalog.of(version.tenant), self._kernels()
        for other in self._catalog.of_digest(version.digest):
            if not known.sees(other) or other.state != "ready" or other.report is None:
                continue
            if other.prepared is None or other.packed_for(kernels) != other.prepared:
                continue
            if other.report["proof"]["modules_changed"] == 0 and not allow_noop:
                continue
            if await self._disk.run_blocking(self._store.exists, other.prepared.sha256):
                whole = await self._records.run_blocking(
                    self._registry.version, other.tenant, other.name, other.digest
                )
                if whole.report is not None and whole.prepared is not None:
                    return Proof(dict(whole.report), whole.prepared)
        return None

    # ---- other kernels --------------------------------------------------------------------------

    async def for_kernels(self, packed: PackedAdapterFile) -> PackedAdapterFile:
        """Return the file proved with this server's kernels; it is proved now if it was not yet.

        Raises UnavailableError: it cannot be proved with these, or not now.
        """
        if packed.is_proved or not packed.versions:
            return packed
        version, kernels = packed.versions[0], self._kernels()
        refused = self._refused.get((version.digest, kernels))
        if refused is not None:
            raise _not_here(version, kernels, refused)
        try:
            with storage_errors(version.name):
                return await self._proved_by(packed, version, kernels)
        except RejectedError as error:
            _log.error(
                "version %s of %s was proved, but not with the %s kernels: %s",
                version.digest[:12], version.name, kernels, error,
            )  # fmt: skip
            self._refused[version.digest, kernels] = error.message
            if len(self._refused) > _MOST_REFUSED:
                del self._refused[next(iter(self._refused))]
            raise _not_here(version, kernels, error.message) from error
        except (VerifierGoneError, StoreError) as error:
            raise _not_here(version, kernels, str(error)) from error

    async def _proved_by(
        self, packed: PackedAdapterFile, version: VersionRecord, kernels: str
    ) -> PackedAdapterFile:
        def is_done(found: VersionRecord) -> bool:
            return found.packed_for(kernels) is not None or not found.finished

        async with self._claim(version, kernels, is_done) as ours:
            if ours:
                _log.info(
                    "version %s of %s is proved with the %s kernels, too",
                    version.digest[:12], version.name, kernels,
                )  # fmt: skip
                # Whether a version may change nothing was decided when it became ready.
                proof = await self._verified(version, True, True, lambda progress: None)
                await self.keep(version, proof)
        found = await self._records.run_blocking(
            self._registry.version, version.tenant, version.name, version.digest
        )
        blob = found.packed_for(kernels)
        if blob is None:
            raise VerifierGoneError("it is being prepared again")
        return PackedAdapterFile(blob, packed.versions, is_proved=True)


def _not_here(version: VersionRecord, kernels: str, why: str) -> UnavailableError:
    return UnavailableError(
        f"Version {version.digest[:12]} of the adapter was not proved with this server's {kernels} kernels: "
        f"{why}",
        code="adapter_unavailable",
        retry_after=_RETRY_AFTER,
    )


def _span_attributes(version: VersionRecord) -> Mapping[str, Any]:
    """Return the attributes of a proof's span."""
    return {
        "onebase.adapter": version.name,
        "onebase.version": version.digest,
        "onebase.tenant": version.tenant,
    }
