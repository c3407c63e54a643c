"""Tenants' usage: counted here, written to the registry every few seconds, and reported by day."""

from __future__ import annotations

import asyncio
import csv
import datetime
import io
import logging
import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import asdict

from onebase_adapters.registry import RegistryError, UsageFigures, UsageKey, UsageRecords
from onebase_adapters.registry.usage import DIMENSIONS, FIGURES
from onebase_edge.background import Threads
from onebase_edge.errors import InvalidRequestError
from onebase_server.storage.calls import storage_errors
from onebase_server.telemetry.measurements import TokenUsage

FLUSH_SECONDS = 5.0
"""Time, in seconds, between two writes, and so the longest usage that a killed server loses."""
CLOSE_SECONDS = 10.0
"""Limit for the last write, when the server stops."""
MOST_WAITING = 50_000
"""Tenants' adapters and days that wait while the registry is away; what is more waits as `*`, summed."""
OTHERS = "*"
MOST_DAYS = 400
MOST_ROWS = 50_000
"""Largest number of rows in one answer."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

_log = logging.getLogger(__name__)


class TenantUsageRecorder:
    """Counts for one server, whose base is `base`. For one event loop.

    While the registry is away, what it should have waits here. A batch whose end was not heard is written
    again under the same number, by which the registry knows it.
    """

    def __init__(self, records: UsageRecords, threads: Threads, base: str) -> None:
        self._records = records
        self._threads = threads
        self._base = base
        self._writer = uuid.uuid4().hex
        self._batch = 1
        self._writing: dict[UsageKey, UsageFigures] = {}
        self._waiting: dict[UsageKey, UsageFigures] = {}
        self._turn = asyncio.Lock()
        self._away = False

    def generated(self, tenant: str, adapters: Collection[str], usage: TokenUsage) -> None:
        """Record that a request is over. adapters: their names; none is the base."""
        figures = UsageFigures(
            requests=1,
            prompt_tokens=usage.prompt,
            cached_tokens=usage.cached,
            completion_tokens=usage.completion,
        )
        self._add(tenant, "+".join(sorted(set(adapters))), figures)

    def trained(self, tenant: str, adapter: str, seconds: float, tokens: int) -> None:
        """Record for how long a job has trained."""
        self._add(tenant, adapter, UsageFigures(training_seconds=seconds, training_tokens=tokens))

    def _add(self, tenant: str, adapter: str, figures: UsageFigures) -> None:
        key = UsageKey(tenant, today(), self._base, adapter)
        if key not in self._waiting and len(self._waiting) >= MOST_WAITING:
            key = UsageKey(tenant, today(), self._base, OTHERS)
        self._waiting.setdefault(key, UsageFigures()).add(figures)

    # ---- to the registry ---------------------------------------------------------------------

    async def keep_writing(self) -> None:
        """Write every FLUSH_SECONDS, for ever."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await self.flush()

    async def flush(self) -> bool:
        """Write what waits. Returns whether nothing is left."""
        async with self._turn:
            if not self._writing:
                self._writing, self._waiting = self._waiting, {}
            if not self._writing:
                return True
            try:
                await self._threads.run_blocking(
                    self._records.write, self._writer, self._batch, self._writing
                )
            except RegistryError as error:
                if not self._away:
                    _log.warning("usage is kept in memory until the registry can be written: %s", error)
                self._away = True
                return False
            except Exception:
                _log.exception("usage cannot be written")
                return False
            self._writing, self._away = {}, False
            self._batch += 1
            return not self._waiting

    async def close(self) -> None:
        """Write what is left, if the registry can be written."""
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                while not await self.flush():
                    await asyncio.sleep(0.5)
        except TimeoutError:
            lost = UsageFigures()
            for figures in (*self._writing.values(), *self._waiting.values()):
                lost.add(figures)
            _log.error("the registry was away to the end: this usage is not in it: %s", asdict(lost))

    # ---- reports ------------------------------------------------------------------------------

    async def find(
        self, start: str | None, end: str | None, by: str, *, tenant: str | None
    ) -> tuple[list[str], list[tuple[dict[str, str], UsageFigures]]]:
        """Return the columns that `by` names, and a row for each of their values in these days.

        start, end: in UTC, both included, as 2026-11-26; by default the last 30 days. tenant: None is all.
        Raises InvalidRequestError, UnavailableError.
        """
        columns = _columns(by)
        first, last = _days(start, end)
        await self.flush()
        with storage_errors():
            rows = await self._threads.run_blocking(
                self._records.find, first, last, columns, tenant=tenant, limit=MOST_ROWS + 1
            )
        if len(rows) > MOST_ROWS:
            raise InvalidRequestError(
                f"group_by: the answer has more than {MOST_ROWS} rows. Ask for fewer days, or group by less.",
                param="group_by",
            )
        return columns, rows


def today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())


def _columns(by: str) -> list[str]:
    named = [name.strip() for name in by.split(",")]
    for name in named:
        if name not in DIMENSIONS or named.count(name) > 1:
            raise InvalidRequestError(
                f"group_by: {name[:80]!r} is no column, or is there twice; choose among "
                f"{', '.join(DIMENSIONS)}, with commas between them.",
                param="group_by",
            )
    return named


def _days(start: str | None, end: str | None) -> tuple[str, str]:
    last = _day("end", end or today())
    first = last - datetime.timedelta(days=29) if start is None else _day("start", start)
    if not 0 <= (last - first).days < MOST_DAYS:
        raise InvalidRequestError(
            f"start: it must not be after end ({last}), nor {MOST_DAYS} days or more before it.",
            param="start",
        )
    return first.isoformat(), last.isoformat()


def _day(param: str, text: str) -> datetime.date:
    try:
        return datetime.datetime.strptime(text, "%Y-%m-%d").date()
    except ValueError as error:
        raise InvalidRequestError(
            f"{param}: {text[:80]!r} is no day; write it as 2026-11-26 (UTC).", param=param
        ) from error


def usage_csv(columns: Sequence[str], rows: Sequence[tuple[dict[str, str], UsageFigures]]) -> str:
    """Return the usage as CSV with a line of titles. A text that a spreadsheet would read as a formula begins
    with an apostrophe."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow((*columns, *FIGURES))
    for names, figures in rows:
        numbers = asdict(figures)
        lines.writerow((*(_cell(names[name]) for name in columns), *(numbers[name] for name in FIGURES)))
    return text.getvalue()


def _cell(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text
