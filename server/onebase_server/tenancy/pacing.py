"""Pacing of requests by the processor time that they take, while those of several tenants run.

Reading, checking and refusing requests takes the cores that the engine's steps on a CPU need, and the event
loop through which every stream goes. A tenant is charged the processor time of its requests, each up to the
moment when the engine has it. What it owes it pays with time: its next requests wait, in the order in which
they came, and running ones are never delayed. Requests that are refused by their address and headers are
charged to the tenant of their key; those without a valid one pay together, whoever sends them. This is a
leaky bucket (GCRA, ITU-T I.371), in seconds of a processor.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from types import coroutine
from typing import Any, TypeVar

from onebase_edge.background import PAYER

Result = TypeVar("Result")

SHARE_OF_CORES = 0.1
"""Part of all cores that one tenant's requests may take while others' requests run."""
MOST_SHARE = 0.5
"""Largest part of one core that they may take: the event loop has no more than one."""
ALLOWANCE_SECONDS = 0.1
"""Seconds of a processor that a tenant may owe before its requests wait."""
MOST_DEBT_SECONDS = 0.5
"""Largest debt of a tenant, in seconds of a processor: one large request, or what it sent while nobody else
was there, does not shut it out."""
USUAL_SECONDS = 0.002
"""Processor time of a request of which nothing is known yet."""
REFUSAL_SECONDS = 0.0003
"""Processor time in which a request is read and refused by its address and headers."""
_NEWEST = 0.1
"""Weight of the newest request in the mean of a tenant's."""
_LEAST_KEPT = 64
"""Accounts among which none is looked for that is unused."""


class _Account:
    """One tenant's requests, in seconds of a processor."""

    def __init__(self, now: float) -> None:
        self.requests = 0
        self.debt = 0.0
        """Processor time that was not paid at the time `at`."""
        self.at = now
        self.mean = USUAL_SECONDS
        """Mean cost of the last requests, which the next one owes when it begins."""
        self.prepaid = 0.0
        """Part of that which those that have begun have not taken yet."""
        self.cost = 0.0
        """Seconds of processor time taken since a request ended last."""
        self.waiting: deque[asyncio.Future[None]] = deque()
        self.timer: asyncio.TimerHandle | None = None


class RequestPacer:
    """Lets tenants' requests begin. For one event loop.

    share: seconds of a processor in a second for each tenant; None: SHARE_OF_CORES.
    """

    def __init__(self, share: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        cores = len(os.sched_getaffinity(0))
        self._share = min(MOST_SHARE, SHARE_OF_CORES * cores) if share is None else share
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._refused = _Account(self._clock())
        """Account of all requests that are refused without a valid key."""
        self._look_at = _LEAST_KEPT
        """Number of accounts from which on unused ones are looked for."""

    def refuse(self, tenant: str | None) -> bool:
        """Charge a refusal, and return True, if a request may be refused now.

        Else `wait_to_refuse` comes first. tenant: None for a request without a valid key.
        """
        account = self._account(tenant)
        if account.waiting or self._must_wait(account):
            return False
        self._owe(account, REFUSAL_SECONDS)
        return True

    async def wait_to_refuse(self, tenant: str | None) -> None:
        """Wait for the turn of a request that `refuse` did not let go, and charge its refusal."""
        account = self._account(tenant)
        await self._wait(account)
        self._owe(account, REFUSAL_SECONDS)

    async def serve(
        self,
        tenant: str,
        answer: Callable[[], Awaitable[None]],
        *,
        runs: Callable[[], bool] = lambda: False,
        at_once: bool = False,
    ) -> None:
        """Await `answer()` once it is the tenant's turn, or `at_once`, and charge what it takes in this
        thread until `runs`, and in others."""
        account = self._account(tenant)
        account.requests += 1
        began = False
        try:
            if not at_once and (account.waiting or self._must_wait(account)):
                await self._wait(account)
            began = True
            account.prepaid += account.mean
            self._owe(account, account.mean)  # before the next one looks whether it must wait
            before = PAYER.set(partial(self.charge, tenant))
            try:
                await _timed(answer(), runs, partial(self._charge, account))
            finally:
                PAYER.reset(before)
        finally:
            account.requests -= 1
            if began:
                account.mean += _NEWEST * (account.cost - account.mean)
                account.cost = 0.0
            if not account.requests:
                account.prepaid = 0.0
                self._release()

    def charge(self, tenant: str, seconds: float) -> None:
        """Charge what a thread has computed for a tenant's request, perhaps after that has ended."""
        self._charge(self._account(tenant), seconds)

    def _charge(self, account: _Account, seconds: float) -> None:
        account.cost += seconds
        paid = min(account.prepaid, seconds)
        account.prepaid -= paid
        if seconds > paid:
            self._owe(account, seconds - paid)

    def _account(self, tenant: str | None) -> _Account:
        if tenant is None:
            return self._refused
        account = self._accounts.get(tenant)
        if account is None:
            if len(self._accounts) >= self._look_at:
                self._accounts = {name: one for name, one in self._accounts.items() if self._is_used(one)}
                self._look_at = max(_LEAST_KEPT, 2 * len(self._accounts))
            account = self._accounts[tenant] = _Account(self._clock())
        return account

    def _is_used(self, account: _Account) -> bool:
        return account.requests > 0 or self._debt(account) > 0.0

    def _debt(self, account: _Account) -> float:
        now = self._clock()
        account.debt = max(0.0, account.debt - self._share * (now - account.at))
        account.at = now
        return account.debt

    def _owe(self, account: _Account, seconds: float) -> None:
        account.debt = min(MOST_DEBT_SECONDS, self._debt(account) + seconds)

    def _must_wait(self, account: _Account) -> bool:
        if self._debt(account) <= ALLOWANCE_SECONDS:
            return False
        return any(one.requests for one in self._accounts.values() if one is not account)

    async def _wait(self, account: _Account) -> None:
        turn = asyncio.get_running_loop().create_future()
        account.waiting.append(turn)
        if account.timer is None:  # else one has just begun, or waits for its turn already
            self._wake(account)
        try:
            await turn
        except asyncio.CancelledError:
            if turn in account.waiting:
                account.waiting.remove(turn)
            raise

    def _release(self) -> None:
        """Look whether a tenant's requests need not wait any more, since others have ended."""
        for account in (*self._accounts.values(), self._refused):
            if account.waiting and not self._must_wait(account):
                self._wake(account)

    def _wake(self, account: _Account) -> None:
        """Let the first waiting request begin when its tenant has paid, then the next."""
        if account.timer is not None:
            account.timer.cancel()
            account.timer = None
        while account.waiting and account.waiting[0].done():
            account.waiting.popleft()
        if not account.waiting:
            return
        loop = asyncio.get_running_loop()
        if self._must_wait(account):
            seconds = (self._debt(account) - ALLOWANCE_SECONDS) / self._share
            account.timer = loop.call_later(seconds + 0.001, self._wake, account)
            return
        account.waiting.popleft().set_result(None)
        account.timer = loop.call_later(0.001, self._wake, account)


async def charged(work: Awaitable[Result]) -> Result:
    """Await a part of a request in a task of its own, and charge its tenant for this thread's time."""
    return await _timed(work, lambda: False, PAYER.get())


@coroutine
def _timed(
    work: Awaitable[Result], is_free: Callable[[], bool], charge: Callable[[float], None]
) -> Generator[Any, Any, Result]:
    """Await `work`, and charge the processor time of this thread for each of its steps until they are
    free."""
    steps = work.__await__()
    step: Callable[[], Any] = partial(next, steps)
    while True:
        free = is_free()
        began = 0.0 if free else time.thread_time()
        try:
            yielded = step()
        except StopIteration as ended:
            result: Result = ended.value
            return result
        finally:
            if not free:
                charge(time.thread_time() - began)
        try:
            sent = yield yielded
        except BaseException as error:
            step = partial(steps.throw, error)
        else:
            step = partial(steps.send, sent)
