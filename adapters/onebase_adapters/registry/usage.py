"""Usage by tenant, day, base and adapter, for bills and for the quota of training."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from sqlalchemy import Insert, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from onebase_adapters.registry.database import Database, plain
from onebase_adapters.registry.records import UsageFigures, UsageKey
from onebase_adapters.registry.tables import UsageRow, UsageWriterRow

DIMENSIONS = tuple(item.name for item in fields(UsageKey))
FIGURES = tuple(item.name for item in fields(UsageFigures))
_WRITER_SECONDS = 30 * 86400.0
"""Time, in seconds, after which a writer that has written nothing is forgotten."""


class UsageRecords:
    """Usage of a registry's servers. All methods block, and may be called from any thread.

    Raises RegistryBusyError, RegistryFullError and RegistryError like Registry.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def write(self, writer: str, batch: int, rows: Mapping[UsageKey, UsageFigures]) -> None:
        """Add figures to those stored. A batch whose outcome is unknown may be written again: it counts once.

        writer: one process of a server. batch: counts up from 1.
        """
        with self._database.write_uncounted() as session:
            if not is_new_batch(session, writer, batch):
                return
            # In one order, so that two servers never wait for each other.
            values = [_values(key, rows[key]) for key in sorted(rows)]
            if values:
                session.execute(_adding(session), values)

    def find(
        self, start: str, end: str, by: Sequence[str], *, tenant: str | None = None, limit: int
    ) -> list[tuple[dict[str, str], UsageFigures]]:
        """Return sums over the days from `start` to `end`, both included (as 2026-11-26), in the order of
        `by`.

        by: one or more of DIMENSIONS. limit: largest number of results.
        """
        columns = [getattr(UsageRow, name) for name in by]
        sums = [func.sum(getattr(UsageRow, name)) for name in FIGURES]
        query = select(*columns, *sums).where(UsageRow.day >= start, UsageRow.day <= end)
        if tenant is not None:
            query = query.where(UsageRow.tenant == tenant)
        with self._database.read() as session:
            rows = session.execute(query.group_by(*columns).order_by(*columns).limit(limit)).all()
        return [(dict(zip(by, row[: len(by)], strict=True)), _figures(row[len(by) :])) for row in rows]


def is_new_batch(session: Session, writer: str, batch: int) -> bool:
    """Return True if a writer's batch has not been written, and record it as written."""
    row = session.get(UsageWriterRow, writer, with_for_update=True)
    now = time.time()
    if row is None:
        session.execute(delete(UsageWriterRow).where(UsageWriterRow.at < now - _WRITER_SECONDS))
        session.add(UsageWriterRow(id=writer, batch=batch, at=now))
    elif row.batch >= batch:
        return False
    else:
        row.batch, row.at = batch, now
    session.flush()
    return True


def _adding(session: Session) -> Insert:
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    insert: postgresql.Insert | sqlite.Insert = dialect.insert(UsageRow)
    sums = {name: getattr(UsageRow, name) + insert.excluded[name] for name in FIGURES}
    return insert.on_conflict_do_update(index_elements=list(DIMENSIONS), set_=sums)


def _values(key: UsageKey, figures: UsageFigures) -> dict[str, object]:
    return {name: plain(value) for name, value in asdict(key).items()} | asdict(figures)


def _figures(sums: Sequence[Any]) -> UsageFigures:
    """Convert a row of sums; PostgreSQL returns sums of whole numbers as Decimal."""
    requests, prompt, cached, completion, seconds, tokens = sums
    return UsageFigures(int(requests), int(prompt), int(cached), int(completion), float(seconds), int(tokens))
