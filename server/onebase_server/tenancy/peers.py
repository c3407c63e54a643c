"""The other servers on a registry: which of them live, that this one does, and what all let in of quotas."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from onebase_adapters.registry import OtherServer, RegistryError, ServerIdInUseError, ServerRecords
from onebase_edge.background import Threads
from onebase_server.tenancy.quotas import Limiter

LEASE_SECONDS = 30.0
"""Time, in seconds, without a renewal of its lease after which a process counts as dead."""
_RENEWED_IN = 1 / 6
"""Part of a lease after which it is renewed."""
_GIVEN_UP_IN = 2 / 3
"""Part of the lease without a renewal after which a server ends its trainers, since others may take over its
jobs."""
_WATCHED_IN = 1 / 30
SHARE_SECONDS = 0.5
"""Time, in seconds, between two exchanges of admitted requests."""
_OVERLAP_SECONDS = 5.0
"""Time, in seconds, that is read again each time: what was written in it may not have been visible yet."""
_FORGET_SECONDS = 60.0
_LEAVE_SECONDS = 5.0

_log = logging.getLogger(__name__)


class LeaseHolder(Protocol):
    """Holder of a lease: `jobs.scheduler.JobScheduler`."""

    @property
    def runs_jobs(self) -> bool:
        """Return True if this process runs the jobs of its data folder."""
        ...

    def room(self) -> int:
        """Return the number of trainers that could start now."""
        ...

    def look(self) -> None:
        """Look soon at what has changed, also at `Peers.conflict`."""
        ...

    def lease_lost(self) -> None:
        """Handle the loss of the lease: others may take over what runs here. Never called where there are
        none."""
        ...


class Peers:
    """This process's lease in the registry, and those of other servers, as of its last renewal.

    For one event loop. The lease is kept while `keep` runs.

    server: the id of the data folder. lock: the identity of that folder's lock.
    """

    def __init__(self, records: ServerRecords, server: str, lock: str) -> None:
        self.records = records
        self.server = server
        self.process = f"{lock}.{uuid.uuid4().hex}"
        self.owns_jobs = False
        """Whether this process has the lease under which the jobs and batches of `server` run."""
        self.conflict: ServerIdInUseError | None = None
        """Error of a renewal, after the lease had run out and a copy of the data folder had begun."""
        self._lease = LEASE_SECONDS
        self._threads = Threads("lease", 1)
        self._others: Sequence[OtherServer] = ()
        self._renewed_at = -math.inf
        self._is_lost = False
        self._changed = asyncio.Event()
        self._reported_room = 0

    @property
    def are_alive(self) -> bool:
        """Return True if another server, of any base, shares the registry now."""
        return any(one.alive for one in self._others)

    @property
    def have_been(self) -> bool:
        """Return True if another data folder's server of this base was ever there: it may take over what runs
        here, or leave something."""
        return any(one.same_base and one.server != self.server for one in self._others)

    @property
    def most_room(self) -> int:
        """Trainers that the other server of this base with the most room could start."""
        rooms = (one.room for one in self._others if one.alive and one.runs and one.same_base)
        return max(rooms, default=0)

    @property
    def holds_lease(self) -> bool:
        """Return True if nobody may have taken over what runs here."""
        return not self._is_lost

    def report_room(self, room: int) -> None:
        """Have others know at once how many trainers could start, if that has changed."""
        if room != self._reported_room:
            self._changed.set()

    async def keep(self, holder: LeaseHolder) -> None:
        """Renew the lease, whatever fails, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_renewing(holder))
            tasks.create_task(self._keep_watch(holder))

    async def _keep_renewing(self, holder: LeaseHolder) -> None:
        while True:
            self._changed.clear()
            if self.conflict is None:
                await self.renew(runs=holder.runs_jobs, room=holder.room())
            if self.conflict is not None:
                holder.look()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._lease * _RENEWED_IN):
                    await self._changed.wait()

    async def claim(self, *, room: int) -> None:
        """Take the lease under which this process runs jobs.

        Where a process with another lock has it, wait until it runs out: that process may have died on
        another machine. Raises ServerIdInUseError if that process renews it; RegistryError.
        """
        first: ServerIdInUseError | None = None
        while True:
            try:
                return await self._renew(runs=True, room=room)
            except ServerIdInUseError as error:
                if first is None:
                    _log.warning("%s Waiting until its lease runs out, or is renewed.", error)
                elif error.renewed_at > first.renewed_at:
                    raise
                first = error  # an earlier process's, where the one before it has left
            await asyncio.sleep(self._lease * _WATCHED_IN)

    async def renew(self, *, runs: bool, room: int) -> None:
        """Renew the lease now, and learn of the others, if the registry can be reached."""
        try:
            await self._renew(runs=runs, room=room)
        except ServerIdInUseError as error:
            if self.owns_jobs:
                self.owns_jobs, self.conflict = False, error
        except RegistryError as error:
            _log.debug("the lease cannot be renewed: %s", error)
        except Exception:
            _log.exception("the lease cannot be renewed")

    async def _renew(self, *, runs: bool, room: int) -> None:
        began, renew = time.monotonic(), self.records.renew
        self._others = await self._threads.run_blocking(
            renew, self.process, self.server, runs=runs, room=room, seconds=self._lease
        )
        self._renewed_at, self._reported_room, self._is_lost = began, room, False
        self.owns_jobs = runs

    async def _keep_watch(self, holder: LeaseHolder) -> None:
        """Notice a lost lease by this machine's clock, since the database may not answer at all."""
        while True:
            await asyncio.sleep(self._lease * _WATCHED_IN)
            late = time.monotonic() - self._renewed_at > self._lease * _GIVEN_UP_IN
            if late and self.have_been and not self._is_lost:
                self._is_lost = True
                _log.warning("the lease in the registry could not be renewed: others may take over the jobs")
                try:
                    holder.lease_lost()
                except Exception:
                    _log.exception("the trainers cannot be ended")

    async def leave(self) -> None:
        """Record that the server ends: others need not wait for the end of its lease."""
        try:
            async with asyncio.timeout(_LEAVE_SECONDS):
                await self._threads.run_blocking(self.records.leave, self.process)
        except (RegistryError, TimeoutError) as error:
            _log.info("the lease in the registry runs out by itself: %s", error or "no answer in time")


class QuotaSharing:
    """Exchange of admitted requests with other servers, for quotas. For one event loop.

    Nothing is written or read while no other server lives, or nobody has a quota. While the registry is away,
    what was heard last counts on, until it is a minute old.
    """

    def __init__(self, peers: Peers, limiter: Limiter, has_quotas: Callable[[], bool]) -> None:
        self._peers = peers
        self._limiter = limiter
        self._has_quotas = has_quotas
        self._threads = Threads("quotas", 1)
        self._since = 0.0
        self._forget_at = 0.0
        self._away = False

    async def keep(self) -> None:
        """Share every SHARE_SECONDS, until cancelled."""
        while True:
            await asyncio.sleep(SHARE_SECONDS)
            if self._peers.are_alive and self._has_quotas():
                await self._share()

    async def _share(self) -> None:
        records, uses = self._peers.records, self._limiter.report_uses()
        try:
            now, heard = await self._threads.run_blocking(
                records.share_use, self._peers.process, uses, self._since - _OVERLAP_SECONDS
            )
            self._limiter.hear(heard)
            self._since = now
            if now >= self._forget_at:
                await self._threads.run_blocking(records.forget_use)
                self._forget_at = now + _FORGET_SECONDS
        except Exception as error:
            self._limiter.report_again(uses)
            if not self._away:
                _log.warning("quotas are counted without news from other servers: %s", error)
            self._away = True
        else:
            self._away = False
