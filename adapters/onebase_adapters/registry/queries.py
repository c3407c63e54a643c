"""Looking rows up, within one tenant and one base."""

from __future__ import annotations

import re
from collections.abc import Collection

from sqlalchemy import ColumnElement, select, union_all
from sqlalchemy.orm import Session, selectinload, undefer

from onebase_adapters.registry.errors import UnknownAdapterError, UnknownVersionError
from onebase_adapters.registry.mapping import plain
from onebase_adapters.registry.tables import AdapterRow, VersionRow

LEAST_PREFIX = 8
"""Hexadecimal digits that a shortened digest must have at least."""

_PREFIX = re.compile(r"[0-9a-f]+")
_BLOBS = (VersionRow.config_sha256, VersionRow.weights_sha256, VersionRow.prepared_sha256)


def scope(base_id: str, tenant: str | None = None) -> list[ColumnElement[bool]]:
    """The conditions for adapters of one base, of one tenant or of all."""
    conditions = [AdapterRow.base_id == base_id]
    if tenant is not None:
        conditions.append(AdapterRow.tenant == tenant)
    return conditions


def find_adapters(session: Session, conditions: Collection[ColumnElement[bool]]) -> list[AdapterRow]:
    """With their versions, by name."""
    rows = session.scalars(
        select(AdapterRow)
        .options(selectinload(AdapterRow.versions))
        .where(*conditions)
        .order_by(AdapterRow.name, AdapterRow.tenant)
    )
    return list(rows)


def find_adapter(session: Session, base_id: str, tenant: str, name: str) -> AdapterRow | None:
    """The adapter with its versions, or None."""
    if (plain(tenant), plain(name)) != (tenant, name):
        return None  # A database would refuse even to look for such a name.
    rows = find_adapters(session, [*scope(base_id, tenant), AdapterRow.name == name])
    return rows[0] if rows else None


def require_adapter(session: Session, base_id: str, tenant: str, name: str) -> AdapterRow:
    """Raises UnknownAdapterError."""
    adapter = find_adapter(session, base_id, tenant, name)
    if adapter is None:
        raise UnknownAdapterError(f"There is no adapter {name[:80]!r} on this base.")
    return adapter


def require_version(session: Session, adapter: AdapterRow, digest: str) -> VersionRow:
    """The version of a digest or of a beginning of one, with its whole report.

    Raises UnknownVersionError, also when several begin like that.
    """
    whole = select(VersionRow).options(undefer(VersionRow.modules)).where(VersionRow.adapter_id == adapter.id)
    if _PREFIX.fullmatch(digest) is None or len(digest) < LEAST_PREFIX:
        raise UnknownVersionError(
            f"{digest[:80]!r} names no version of {adapter.name!r}: give its digest, or at least the first "
            f"{LEAST_PREFIX} of its hexadecimal digits."
        )
    found = session.scalars(whole.where(VersionRow.digest.startswith(digest)).limit(2)).all()
    if len(found) > 1:
        raise UnknownVersionError(
            f"Several versions of {adapter.name!r} begin with {digest}: give more digits."
        )
    if not found:
        raise UnknownVersionError(f"{adapter.name!r} has no version {digest[:80]}.")
    return found[0]


def blobs_of(version: VersionRow) -> set[str]:
    """The SHA-256 sums that a version needs."""
    wanted = (version.config_sha256, version.weights_sha256, version.prepared_sha256)
    return {digest for digest in wanted if digest is not None}


def referenced(session: Session, among: Collection[str] | None = None) -> set[str]:
    """The blobs that any version on any base needs: all of them, or those of `among`."""
    parts = [select(column) for column in _BLOBS]
    if among is not None:
        parts = [part.where(column.in_(among)) for part, column in zip(parts, _BLOBS, strict=True)]
    return {digest for digest in session.scalars(union_all(*parts)) if digest is not None}
