"""From rows to records, and what a text column can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from onebase_adapters.registry.records import (
    MODULES,
    Action,
    AdapterRecord,
    HistoryEntry,
    State,
    VersionError,
    VersionRecord,
)
from onebase_adapters.registry.tables import AdapterRow, HistoryRow, VersionRow
from onebase_adapters.store.content import Blob, VersionFiles


def adapter_record(row: AdapterRow) -> AdapterRecord:
    return AdapterRecord(
        tenant=row.tenant,
        name=row.name,
        active=row.active,
        pinned=row.pinned,
        created_at=row.created_at,
        updated_at=row.updated_at,
        versions=tuple(version_record(version, row, whole=False) for version in row.versions),
    )


def version_record(row: VersionRow, adapter: AdapterRow, *, whole: bool = True) -> VersionRecord:
    """`whole`: with the report's modules, which cost a query of their own unless undeferred."""
    report = row.report
    if report is not None and whole:
        report = {**report, MODULES: row.modules or []}
    prepared = None
    if row.prepared_sha256 is not None:
        prepared = Blob(row.prepared_sha256, row.prepared_size or 0)
    error = None
    if row.error_code is not None:
        error = VersionError(row.error_code, row.error_message or "")
    return VersionRecord(
        tenant=adapter.tenant,
        name=adapter.name,
        digest=row.digest,
        state=cast(State, row.state),
        files=VersionFiles(
            Blob(row.config_sha256, row.config_size), Blob(row.weights_sha256, row.weights_size)
        ),
        prepared=prepared,
        report=report,
        source=row.source,
        error=error,
        created_at=row.created_at,
        created_by=row.created_by,
        finished_at=row.finished_at,
    )


def history_entry(row: HistoryRow) -> HistoryEntry:
    return HistoryEntry(cast(Action, row.action), row.version, row.previous, row.actor, row.at)


def set_report(row: VersionRow, report: Mapping[str, Any] | None) -> None:
    if report is None:
        row.report = row.modules = None
        return
    row.report = {key: value for key, value in report.items() if key != MODULES}
    row.modules = list(report.get(MODULES, ()))


def plain(value: str) -> str:
    """Text that every database takes: a NUL or half a surrogate pair (JSON allows both) becomes U+FFFD."""
    return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
