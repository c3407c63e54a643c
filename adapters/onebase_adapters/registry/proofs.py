"""Coordinate proofs: one server proves a version with one kind of kernels, and all others with it reuse
that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from onebase_adapters.registry.database import Database, clock, plain
from onebase_adapters.registry.records import VersionRecord
from onebase_adapters.registry.tables import AdapterRow, ProofRow, VersionRow
from onebase_adapters.store.blobs import Blob


class ProofRecords:
    """Claims and proofs of versions of one base. All methods block, and may be called from any thread.

    A claim lasts some seconds by the database's clock, and longer when it is renewed: a dead server delays
    nobody for longer. A claim that ends later than any could was made before that clock went back, and
    delays nobody either.

    Raises RegistryBusyError, RegistryFullError and RegistryError like Registry.
    """

    def __init__(self, database: Database, base_id: str) -> None:
        self._database = database
        self._base_id = base_id

    def claim(self, version: VersionRecord, kernels: str, seconds: float) -> bool:
        """Claim a version's proof with these kernels for some seconds, and return True if this server has it.

        False: another server proves it, or nothing is left to prove, or the version was deleted.
        """
        with self._database.read() as session:
            if not self._is_open(session, version, kernels, seconds):
                return False
        with self._database.write() as (session, _):  # which excludes other writers
            # Also those to other versions: a server that died takes none of its claims back.
            session.execute(delete(ProofRow).where(ProofRow.until <= clock(session)))
            row = self._is_open(session, version, kernels, seconds)
            if row is None:
                return False
            self._row(row, kernels).until = clock(session) + seconds
            return True

    def _row(self, version: VersionRow, kernels: str) -> ProofRow:
        """Return the row of the version and these kernels, made if necessary, and assign it to this
        server."""
        found = next((one for one in version.proofs if one.kernels == kernels), None)
        if found is None:
            found = ProofRow(kernels=plain(kernels))
            version.proofs.append(found)
        found.server = self._database.server
        return found

    def renew(self, version: VersionRecord, kernels: str, seconds: float) -> None:
        """Extend this server's claim to so many seconds from now."""
        with self._database.write_uncounted() as session:
            session.execute(
                update(ProofRow)
                .where(*self._own(session, version, kernels))
                .values(until=clock(session) + seconds)
            )

    def release(self, version: VersionRecord, kernels: str) -> None:
        """Release this server's claim. What it has proved stays."""
        with self._database.write_uncounted() as session:
            for claim in session.scalars(select(ProofRow).where(*self._own(session, version, kernels))):
                session.delete(claim)

    def keep(self, version: VersionRecord, kernels: str, report: Mapping[str, Any], packed: Blob) -> None:
        """Store a proof with further kernels of a version that is ready. `report`: without modules."""
        with self._database.write() as (session, counter):
            row = self._find(session, version)
            if row is None or row.state != "ready" or _first_kernels(row) == kernels:
                return
            proof = self._row(row, kernels)
            proof.until, proof.report = None, dict(report)
            proof.prepared_sha256, proof.prepared_size = packed.sha256, packed.size
            row.adapter.changed = counter

    def _is_open(
        self, session: Session, version: VersionRecord, kernels: str, seconds: float
    ) -> VersionRow | None:
        """Return the version if it must still be proved with these kernels and no other server does it.

        seconds: duration of a claim.
        """
        row = self._find(session, version)
        if row is None or row.state == "failed" or (row.state == "ready" and _first_kernels(row) == kernels):
            return None
        now = clock(session)
        for proof in row.proofs:
            holds = now < (proof.until or 0.0) <= now + seconds
            others = proof.server != self._database.server and holds
            if proof.kernels == kernels and (proof.until is None or others):
                return None
        return row

    def _find(self, session: Session, version: VersionRecord) -> VersionRow | None:
        return session.scalar(
            select(VersionRow)
            .join(VersionRow.adapter)
            .where(
                AdapterRow.base_id == self._base_id,
                AdapterRow.tenant == version.tenant,
                AdapterRow.name == version.name,
                VersionRow.digest == version.digest,
            )
        )

    def _own(self, session: Session, version: VersionRecord, kernels: str) -> list[Any]:
        """Return the conditions for this server's claim."""
        row = self._find(session, version)
        return [
            ProofRow.version_id == (row.id if row else None),
            ProofRow.kernels == plain(kernels),
            ProofRow.server == self._database.server,
            ProofRow.until.is_not(None),
        ]


def _first_kernels(version: VersionRow) -> str | None:
    """Return the kernels with which the version was proved first."""
    kernels: str | None = (version.report or {}).get("proof", {}).get("kernels")
    return kernels
