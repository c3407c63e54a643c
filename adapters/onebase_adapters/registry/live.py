"""Sessions of clients that train step by step, their samplers, and the samples that they were promised."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from onebase_adapters.registry import audit
from onebase_adapters.registry.database import Database, plain, plain_json
from onebase_adapters.registry.errors import UnknownLiveError
from onebase_adapters.registry.records import AuditAction, record_of
from onebase_adapters.registry.tables import LiveSampleRow, LiveSamplerRow, LiveSessionRow

FORGOTTEN_AT_ONCE = 500
"""Largest number of sessions that one statement deletes: databases limit its parameters."""


@dataclass(frozen=True)
class LiveSession:
    """A session. details: what the client says of it, as `user_metadata`."""

    id: str
    tenant: str
    key: str
    created_at: float
    details: Mapping[str, Any] = field(hash=False)
    finished_at: float | None = None


@dataclass(frozen=True)
class LiveSampler:
    """A sampling session. path: the checkpoint that it samples from; None: the base."""

    id: str
    session: str
    tenant: str
    base_model: str
    path: str | None
    created_at: float


@dataclass(frozen=True)
class LiveSample:
    """A promised sample: its request until it is finished, then its result or its error."""

    id: str
    sampler: str
    tenant: str
    key: str
    request: bytes | None
    created_at: float
    result: bytes | None = None
    error: Mapping[str, str] | None = field(default=None, hash=False)
    finished_at: float | None = None


class LiveRecords:
    """Sessions, samplers and samples of one base. All methods block, may be called from any thread, and are
    one transaction each. Raises RegistryBusyError, RegistryFullError and RegistryError like Registry."""

    def __init__(self, database: Database, base_id: str) -> None:
        self._database = database
        self._base_id = base_id

    def add_session(self, session: LiveSession, server: str) -> None:
        with self._database.write_uncounted() as writing:
            writing.add(
                LiveSessionRow(
                    id=session.id,
                    tenant=session.tenant,
                    key=session.key,
                    server=server,
                    created_at=session.created_at,
                    seen_at=session.created_at,
                    details=plain_json(session.details),
                )
            )

    def session(self, tenant: str, session_id: str) -> LiveSession:
        """Return one of the tenant's sessions. Raises UnknownLiveError."""
        with self._database.read() as reading:
            return record_of(LiveSession, _session(reading, tenant, session_id))

    def sessions(self, tenant: str, *, offset: int, limit: int) -> list[str]:
        """Return the ids of the tenant's sessions, newest first."""
        query = select(LiveSessionRow.id).where(LiveSessionRow.tenant == tenant)
        query = query.order_by(LiveSessionRow.created_at.desc(), LiveSessionRow.id).offset(offset)
        with self._database.read() as reading:
            return list(reading.scalars(query.limit(limit)))

    def session_seen(self, tenant: str, session_id: str, *, finished: bool = False) -> None:
        """Note that the session's client lives, or that it has finished. Raises UnknownLiveError."""
        now = time.time()
        with self._database.write_uncounted() as writing:
            row = _session(writing, tenant, session_id)
            row.seen_at = now
            if finished:
                row.finished_at = now

    def open_sessions(self, seen: float, finished: float) -> set[str]:
        """Return the ids of sessions that were seen since then and did not finish before that time."""
        is_open = or_(LiveSessionRow.finished_at.is_(None), LiveSessionRow.finished_at >= finished)
        query = select(LiveSessionRow.id).where(LiveSessionRow.seen_at >= seen, is_open)
        with self._database.read() as reading:
            return set(reading.scalars(query))

    def forget_sessions(self, seen: float, but: Collection[str]) -> None:
        """Delete the sessions that were not seen since then, and their samplers. but: ids of sessions that
        were, of which the registry does not know."""
        query = select(LiveSessionRow.id).where(LiveSessionRow.seen_at < seen)
        with self._database.write_uncounted() as writing:
            old = sorted(set(writing.scalars(query)).difference(but))
            for first in range(0, len(old), FORGOTTEN_AT_ONCE):
                some = old[first : first + FORGOTTEN_AT_ONCE]
                writing.execute(delete(LiveSamplerRow).where(LiveSamplerRow.session.in_(some)))
                writing.execute(
                    delete(LiveSessionRow).where(LiveSessionRow.id.in_(some), LiveSessionRow.seen_at < seen)
                )

    def note(self, action: AuditAction, tenant: str, target: str, details: Mapping[str, Any]) -> None:
        """Add an entry about a session, a run or a checkpoint to the audit log."""
        with self._database.write_uncounted() as writing:
            audit.note(writing, action, tenant, target, base_id=self._base_id, details=details)

    def add_sampler(self, sampler: LiveSampler, server: str) -> LiveSampler:
        """Add a sampler, and return it; or return the one that has its id. Raises UnknownLiveError if that is
        another tenant's."""
        with self._database.write_uncounted() as writing:
            row = writing.get(LiveSamplerRow, plain(sampler.id))
            if row is None:
                fields = {**vars(sampler), "base_id": self._base_id, "server": server}
                row = LiveSamplerRow(**fields, clients=0)
                writing.add(row)
                writing.flush()
            elif row.tenant != sampler.tenant:
                raise UnknownLiveError("sampler", sampler.id, "sampling_session_id")
            return record_of(LiveSampler, row)

    def sampler(self, tenant: str, sampler_id: str) -> LiveSampler:
        """Return one of the tenant's samplers. Raises UnknownLiveError."""
        with self._database.read() as reading:
            return record_of(LiveSampler, self._sampler(reading, tenant, sampler_id))

    def samplers(self, tenant: str, session_id: str) -> list[LiveSampler]:
        """Return a session's samplers, oldest first."""
        query = select(LiveSamplerRow).where(
            LiveSamplerRow.session == plain(session_id), LiveSamplerRow.tenant == tenant
        )
        with self._database.read() as reading:
            rows = reading.scalars(query.order_by(LiveSamplerRow.created_at, LiveSamplerRow.id))
            return [record_of(LiveSampler, row) for row in rows]

    def join_sampler(self, tenant: str, sampler_id: str) -> int:
        """Count one more client of a sampler, and return its number, from 1. Raises UnknownLiveError."""
        with self._database.write_uncounted() as writing:
            row = self._sampler(writing, tenant, sampler_id, lock=True)
            row.clients += 1
            return row.clients

    def write_samples(self, samples: Sequence[LiveSample], server: str) -> None:
        """Write promised or finished samples, in place of those with their ids. One call for many costs as
        much as for one."""
        with self._database.write_uncounted() as writing:
            for sample in samples:
                fields = {**vars(sample), "base_id": self._base_id, "server": server}
                fields["error"] = None if sample.error is None else plain_json(sample.error)
                writing.merge(LiveSampleRow(**fields))

    def sample(self, tenant: str, sample_id: str) -> LiveSample | None:
        """Return one of the tenant's samples."""
        with self._database.read() as reading:
            row = reading.get(LiveSampleRow, plain(sample_id))
            if row is None or row.tenant != tenant or row.base_id != self._base_id:
                return None
            return record_of(LiveSample, row)

    def open_samples(self, server: str) -> list[LiveSample]:
        """Return the unfinished samples of a server, oldest first."""
        query = select(LiveSampleRow).where(
            LiveSampleRow.server == server,
            LiveSampleRow.base_id == self._base_id,
            LiveSampleRow.finished_at.is_(None),
        )
        with self._database.read() as reading:
            rows = reading.scalars(query.order_by(LiveSampleRow.created_at))
            return [record_of(LiveSample, row) for row in rows]

    def forget_samples(self, before: float) -> None:
        """Delete the samples that were finished before then."""
        with self._database.write_uncounted() as writing:
            writing.execute(delete(LiveSampleRow).where(LiveSampleRow.finished_at < before))

    def _sampler(
        self, session: Session, tenant: str, sampler_id: str, *, lock: bool = False
    ) -> LiveSamplerRow:
        query = select(LiveSamplerRow).where(LiveSamplerRow.id == plain(sampler_id))
        row = session.scalar(query.with_for_update() if lock else query)
        if row is None or row.tenant != tenant or row.base_id != self._base_id:
            raise UnknownLiveError("sampler", sampler_id, "sampling_session_id")
        return row


def _session(session: Session, tenant: str, session_id: str) -> LiveSessionRow:
    row = session.get(LiveSessionRow, plain(session_id))
    if row is None or row.tenant != tenant:
        raise UnknownLiveError("session", session_id, "session_id")
    return row
