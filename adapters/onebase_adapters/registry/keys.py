"""API keys: who may do what, for which tenant. The registry holds their hashes, never the keys.

A key is `ob-<id>-<secret>`. The secret has 256 random bits, so one SHA-256 protects it: there is no
dictionary to try, and a slow hash would only slow down each request. It is the same key with `tml-` before
it, which clients of the Tinker API demand.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sqlalchemy import func, or_, select, union_all, update
from sqlalchemy.orm import Session

from onebase_adapters.registry import audit
from onebase_adapters.registry.database import Database, plain
from onebase_adapters.registry.errors import InvalidKeyError, UnknownKeyError
from onebase_adapters.registry.quotas import KEY_QUOTAS, changed_quotas, check_tenant, quotas_of
from onebase_adapters.registry.records import SCOPES, ApiKeyRecord, Quotas, Scope, record_of
from onebase_adapters.registry.tables import ApiKeyRow, TenantRow

USED_SECONDS = 3600.0
"""Resolution of `last_used_at`, in seconds: a key in use costs one write an hour."""
MAX_NAME = 200
MAX_PRIORITY = 4
"""Largest priority. Priorities are whole numbers from its negative to this; a key has 0 by default."""
_PREFIX = "tml-"
_KEY = re.compile(r"(?:tml-)?(ob-[0-9a-f]{16})-[A-Za-z0-9_-]{43}")
_NOBODY = "0" * 64


@dataclass(frozen=True)
class Callers:
    """All keys that ever existed, and the quotas of the tenants that have any."""

    keys: list[ApiKeyRecord]
    tenants: dict[str, Quotas]


class ApiKeys:
    """Keys of a registry. All methods block, and may be called from any thread.

    A key's row is never deleted, only marked as revoked: a registry that once had a key always requires one.
    Raises RegistryBusyError, RegistryFullError and RegistryError like Registry.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        tenant: str,
        scopes: Collection[str],
        *,
        name: str = "",
        expires_at: float | None = None,
        quotas: Mapping[str, int | None] | None = None,
        priority: int = 0,
    ) -> tuple[ApiKeyRecord, str]:
        """Create a key. Returns its record, and the key itself, which nobody can read again.

        Raises InvalidKeyError.
        """
        check_tenant(tenant)
        _check_priority(priority)
        limits = changed_quotas({}, quotas or {}, KEY_QUOTAS)
        if len(name) > MAX_NAME or not (name == "" or name.isprintable()):
            raise InvalidKeyError("name", f"use up to {MAX_NAME} characters that can be printed.")
        chosen = _checked_scopes(scopes)
        now = time.time()
        if expires_at is not None and expires_at <= now:
            raise InvalidKeyError("expires", "the key would have expired already. Choose a later time.")
        key_id = f"ob-{secrets.token_hex(8)}"
        key = f"{key_id}-{secrets.token_urlsafe(32)}"
        with self._database.write() as (session, counter):
            row = ApiKeyRow(
                id=key_id,
                tenant=tenant,
                name=plain(name),
                scopes=list(chosen),
                sha256=_sha256(key),
                created_at=now,
                expires_at=expires_at,
                quotas=limits,
                priority=priority,
                changed=counter,
            )
            session.add(row)
            session.flush()
            details = {"scopes": list(chosen), "name": name, "expires_at": expires_at}
            more = {"quotas": limits, "priority": priority}
            audit.note(session, "key.created", tenant, key_id, details={**details, **more})
            return _record(row), key

    def all(self, tenant: str | None = None) -> list[ApiKeyRecord]:
        """Return all keys that ever existed, newest first: of all tenants, or of one."""
        keys = select(ApiKeyRow).order_by(ApiKeyRow.created_at.desc(), ApiKeyRow.id)
        if tenant is not None:
            keys = keys.where(ApiKeyRow.tenant == tenant)
        with self._database.read() as session:
            return [_record(row) for row in session.scalars(keys)]

    def change(
        self, key_id: str, quotas: Mapping[str, int | None] | None = None, priority: int | None = None
    ) -> ApiKeyRecord:
        """Change the quotas that `quotas` names (None: no limit), and the priority unless it is None.

        Raises UnknownKeyError, InvalidKeyError.
        """
        if priority is not None:
            _check_priority(priority)
        with self._database.write() as (session, counter):
            row = _row(session, key_id)
            row.quotas = changed_quotas(row.quotas, quotas or {}, KEY_QUOTAS)
            row.priority = row.priority if priority is None else priority
            row.changed = counter
            session.flush()
            details = {"quotas": row.quotas, "priority": row.priority}
            audit.note(session, "key.changed", row.tenant, row.id, details=details)
            return _record(row)

    def since(self, known: int) -> tuple[int, Callers | None]:
        """Return the number of the last change of any key or tenant (0 before the first), and all of them
        unless that number is `known`."""
        newest_of = union_all(select(func.max(ApiKeyRow.changed)), select(func.max(TenantRow.changed)))
        with self._database.read() as session:
            newest = max((changed or 0 for changed in session.scalars(newest_of)), default=0)
            if newest == known:
                return newest, None
            keys = [_record(row) for row in session.scalars(select(ApiKeyRow))]
            tenants = {row.tenant: quotas_of(row.quotas) for row in session.scalars(select(TenantRow))}
            return newest, Callers(keys, tenants)

    def revoke(self, key_id: str) -> ApiKeyRecord:
        """Revoke a key for good; repeating it changes nothing. Raises UnknownKeyError."""
        with self._database.write() as (session, counter):
            row = _row(session, key_id)
            if row.revoked_at is None:
                audit.note(session, "key.revoked", row.tenant, row.id)
            row.revoked_at, row.changed = row.revoked_at or time.time(), counter
            session.flush()
            return _record(row)

    def note_use(self, key_id: str) -> None:
        """Record that the key was used now."""
        now = time.time()
        with self._database.write_uncounted() as session:
            session.execute(
                update(ApiKeyRow)
                .where(ApiKeyRow.id == key_id)
                .where(or_(ApiKeyRow.last_used_at.is_(None), ApiKeyRow.last_used_at < now - USED_SECONDS))
                .values(last_used_at=now)
            )


def id_of(key: str) -> str | None:
    """Return the id that a key names; None if the text is no key."""
    match = _KEY.fullmatch(key)
    return None if match is None else match[1]


def is_key_of(key: str, record: ApiKeyRecord | None) -> bool:
    """Return True if `key` is that of this record, in equal time for a wrong secret and for no record."""
    return hmac.compare_digest(
        _sha256(key.removeprefix(_PREFIX)), _NOBODY if record is None else record.sha256
    )


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _checked_scopes(scopes: Collection[str]) -> tuple[Scope, ...]:
    """Return scopes in their usual order. Raises InvalidKeyError."""
    chosen = tuple(scope for scope in SCOPES if scope in scopes)
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not chosen:
        wrong = f"{unknown[0][:80]!r} is none" if unknown else "there is none"
        raise InvalidKeyError("scopes", f"{wrong}; choose among {', '.join(SCOPES)}.")
    return chosen


def _check_priority(priority: int) -> None:
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise InvalidKeyError(
            "priority",
            f"use a whole number from {-MAX_PRIORITY} to {MAX_PRIORITY}; each step doubles its share.",
        )


def _row(session: Session, key_id: str) -> ApiKeyRow:
    row = session.get(ApiKeyRow, plain(key_id))
    if row is None:
        raise UnknownKeyError(f"There is no API key {key_id[:80]!r}.")
    return row


def _record(row: ApiKeyRow) -> ApiKeyRecord:
    scopes = tuple(scope for scope in SCOPES if scope in row.scopes)
    return record_of(ApiKeyRecord, row, scopes=scopes, quotas=quotas_of(row.quotas))
