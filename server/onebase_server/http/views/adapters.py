"""Adapters and versions as the JSON that callers get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from msgspec import convert

from onebase_adapters.names import label
from onebase_adapters.registry import SIGNATURE, AdapterRecord, VersionRecord
from onebase_adapters.store.blobs import ADAPTER_FILES
from onebase_protocol.adapters import (
    Adapter,
    AdapterSource,
    AdapterVersion,
    BaseReference,
    SignatureReport,
    VersionFile,
    VersionFiles,
    VersionProgress,
    VersionReport,
)
from onebase_server.adapters.residency import Residency
from onebase_server.adapters.service import AdapterService
from onebase_server.adapters.sources import HubAdapters, PendingPull

_FOREIGN_SOURCE = ("kind", "repo", "revision", "commit", "subfolder", "method", "density", "sign", "seed")
"""Fields of a version's source that other tenants see."""
_FOREIGN_SIGNATURE = ("status", "signer", "identity", "code", "message")
"""Fields of a signature's report that other tenants see."""


class AdapterViews:
    """Answers about adapters, from all services that know of them."""

    def __init__(
        self, adapters: AdapterService, hub: HubAdapters, residency: Residency, base: BaseReference
    ) -> None:
        self._adapters = adapters
        self.base = base
        self._catalog = adapters.catalog
        self._hub = hub
        self._residency = residency

    def adapters(self, tenant: str) -> list[Adapter]:
        """Return all that a tenant may name; also those whose first version is still being pulled."""
        known = {record.name: self.adapter(record) for record in self._catalog.of(tenant)}
        for name in self._hub.running_names(tenant):
            if name not in known:
                known[name] = self.pulled_adapter(self._hub.of_name(tenant, name))
        return [known[name] for name in sorted(known)]

    def named(self, tenant: str, name: str) -> Adapter:
        """Return one adapter. Raises AdapterNotFoundError."""
        pending = self._hub.of_name(tenant, name)
        names = self._catalog.of(tenant)
        if names.get(name) is None and pending:
            return self.pulled_adapter(pending)
        return self.adapter(names.adapter(name, param="name"))

    def adapter(self, record: AdapterRecord) -> Adapter:
        active = record.active_version
        report = (active.report if active is not None else None) or {}
        shown = active if active is not None else record.versions[0] if record.versions else None
        return Adapter(
            id=record.name,
            name=record.name,
            version=record.active,
            active=active is not None,
            state=shown.state if shown is not None else None,
            kinds=tuple(report.get("kinds", ())),
            targets=tuple(report.get("targets", ())),
            rank=report.get("rank"),
            alpha=report.get("alpha"),
            parameters=report.get("parameters"),
            bytes=report.get("bytes"),
            base=self._catalog.base_name,
            tenant=record.tenant,
            shared=record.shared,
            pinned=record.pinned,
            tier=self._residency.tier(record.active) if record.active else None,
            versions=len(record.versions),
            created_at=record.created_at,
            updated_at=record.updated_at,
        )

    def pulled_adapter(self, pending: Sequence[PendingPull]) -> Adapter:
        """Return an adapter of which there is nothing yet but pulls."""
        newest, oldest = pending[0], pending[-1]
        return Adapter(
            id=newest.name,
            name=newest.name,
            version=None,
            active=False,
            state=_state(newest),
            kinds=(),
            targets=(),
            rank=None,
            alpha=None,
            parameters=None,
            bytes=None,
            base=self._catalog.base_name,
            tenant=newest.tenant,
            pinned=False,
            tier=None,
            versions=0,
            created_at=oldest.created_at,
            updated_at=newest.created_at,
        )

    def version(self, version: VersionRecord, reader: str | None = None) -> AdapterVersion:
        """Return one version; its report is as whole as the record's.

        reader: the tenant that reads it, if it may be another one. That one is not told which key, job or
            adapters made it, nor from what data and by which recipe.
        """
        foreign = reader not in (None, version.tenant)
        source = {
            field: value
            for field, value in version.source.items()
            if value is not None and (not foreign or field in _FOREIGN_SOURCE)
        }
        signature = version.source.get(SIGNATURE) or {}
        if foreign:
            signature = {field: signature[field] for field in _FOREIGN_SIGNATURE if field in signature}
        # What was read may be newer than the catalog, or older where a request has activated it since.
        record = self._catalog.of(version.tenant).own(version.name)
        is_active = version.is_active or (record is not None and record.active == version.digest)
        progress = None if version.finished else self._adapters.progress(version)
        return AdapterVersion(
            id=label(version.name, version.digest),
            name=version.name,
            version=version.digest,
            state=version.state,
            active=is_active,
            error=version.error,
            base=self._catalog.base_name,
            source=convert(source, AdapterSource),
            created_at=version.created_at,
            created_by="" if foreign else version.created_by,
            tenant=version.tenant,
            progress=VersionProgress(progress.stage, progress.fraction) if progress else None,
            report=cast(VersionReport | None, version.report),  # JSON, which is sent as it is
            signature=convert(signature, SignatureReport) if signature else None,
        )

    def files(self, version: VersionRecord) -> VersionFiles:
        """Return a version's files and where its base comes from, for those who take both elsewhere."""
        blobs = [(name, version.files.of(name)) for name in ADAPTER_FILES]
        return VersionFiles(
            version=version.digest,
            base=self.base,
            files=tuple(VersionFile(name, blob.size, blob.sha256) for name, blob in blobs),
            signature=(version.source.get(SIGNATURE) or {}).get("bundle"),
        )

    def pull(self, pending: PendingPull) -> AdapterVersion:
        """Return a version that is being pulled: its content, and so its digest, is not known yet."""
        reference = pending.reference
        running = pending.failure is None
        return AdapterVersion(
            id=f"{pending.name}@{pending.id}",
            name=pending.name,
            version=pending.id,
            state=_state(pending),
            active=False,
            error=pending.error,
            base=self._catalog.base_name,
            source=AdapterSource("hub", reference.repo, reference.revision, subfolder=reference.subfolder),
            created_at=pending.created_at,
            created_by=pending.actor,
            tenant=pending.tenant,
            progress=VersionProgress("pulling", pending.transfer.fraction) if running else None,
            report=None,
        )


def _state(pending: PendingPull) -> str:
    return "pulling" if pending.failure is None else "failed"
