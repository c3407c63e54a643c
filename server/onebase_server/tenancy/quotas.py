"""Quotas of a key and of a tenant, at once and in a minute, on all servers of a registry together.

A minute is any 60 seconds, not one that begins with the clock's: an admitted request counts for 60 seconds
from then on. A request is charged its prompt and the most that it may generate; when it ends, its charge
becomes what was computed, as if that had been known from the beginning.

Each server counts what it admits, and adds what the others last reported (`peers.QuotaSharing`): a request
waits for no database.

Rows of batches are counted like requests, and admitted only while less than half of a quota is used: the
rest is left to requests that somebody waits for.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args
from weakref import WeakValueDictionary

from onebase_adapters.registry import Quotas, QuotaUse
from onebase_edge.errors import ApiError, QuotaExceededError, QuotaSpentError
from onebase_server.tenancy.access import Caller

WINDOW_SECONDS = 60.0
SEQUENCES_RETRY_SECONDS = 1.0
"""Suggested wait, in seconds, for free sequences; the real time depends on others' requests."""
Rate = Literal["requests", "tokens"]
_RATES: tuple[Rate, ...] = get_args(Rate)
_LEAST_KEPT = 64
"""Accounts among which none is looked for that is idle."""
_SEQUENCES_AGAIN_SECONDS = 20.0
"""Time, in seconds, between two reports of running sequences, which count on other servers for a minute."""


@dataclass
class Charge:
    """Charge of one request, and its time. counted: whether its window still has it."""

    at: float
    amount: int
    counted: bool = True


class Window:
    """Charges of the last 60 seconds. Times are seconds of one clock, and never go back."""

    def __init__(self) -> None:
        self.total = 0
        self._charges: deque[Charge] = deque()

    def forget(self, now: float) -> None:
        """Drop charges that are 60 seconds old."""
        while self._charges and self._charges[0].at <= now - WINDOW_SECONDS:
            charge = self._charges.popleft()
            charge.counted = False
            self.total -= charge.amount

    def add(self, amount: int, now: float) -> Charge:
        self.forget(now)
        charge = Charge(now, amount)
        self._charges.append(charge)
        self.total += amount
        return charge

    def correct(self, charge: Charge, amount: int, now: float) -> None:
        """Correct a charge to `amount`. A decrease counts as never charged; an increase counts from now."""
        more = amount - charge.amount
        if more > 0:
            self.add(more, now)
        elif charge.counted:
            charge.amount = amount
            self.total += more

    def seconds_until(self, most: int, now: float) -> float:
        """Return the seconds until the total is at most that, if nothing else is admitted or refunded."""
        return _seconds_until((self,), most, now)

    def by_second(self, now: float) -> tuple[tuple[float, int], ...]:
        """Return (age, amount) of the charges, oldest first; those within a second have the youngest one's
        age."""
        self.forget(now)
        found: dict[int, tuple[float, int]] = {}
        for charge in self._charges:
            if charge.amount:
                second = int(charge.at)
                found[second] = now - charge.at, found.get(second, (0.0, 0))[1] + charge.amount
        return tuple(found.values())


def _seconds_until(windows: Sequence[Window], most: int, now: float) -> float:
    """Return `Window.seconds_until` for the sum of several windows."""
    left = sum(window.total for window in windows)
    if 2 * most < left:  # as for the headers of each answer: the newest decides
        kept = 0
        for charge in heapq.merge(*(reversed(window._charges) for window in windows), key=_newest_first):
            kept += charge.amount
            if kept > most:
                return max(0.0, charge.at + WINDOW_SECONDS - now)
        return 0.0
    ends = now
    for charge in heapq.merge(*(window._charges for window in windows), key=_oldest_first):
        if left <= most:
            break
        left, ends = left - charge.amount, charge.at + WINDOW_SECONDS
    return max(0.0, ends - now)


def _oldest_first(charge: Charge) -> float:
    return charge.at


def _newest_first(charge: Charge) -> float:
    return -charge.at


@dataclass
class _Elsewhere:
    """Charges that another server reported. until: time at which its sequences stop counting."""

    windows: dict[Rate, Window]
    sequences: int
    until: float


@dataclass
class QuotaAccount:
    """Current use of one key or one tenant: here, and on other servers as far as they have reported."""

    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)
    sequences: int = 0
    changed: bool = False
    """Whether a change has not been reported to other servers yet."""
    reported_at: float = -math.inf
    _elsewhere: dict[str, _Elsewhere] = field(default_factory=dict)

    def window(self, rate: Rate) -> Window:
        return self.requests if rate == "requests" else self.tokens

    def add(self, rate: Rate, amount: int, now: float) -> Charge:
        self.changed = True
        return self.window(rate).add(amount, now)

    def correct(self, rate: Rate, charge: Charge, amount: int, now: float) -> None:
        self.changed = True
        self.window(rate).correct(charge, amount, now)

    def add_sequences(self, sequences: int) -> None:
        self.changed = True
        self.sequences += sequences

    def is_idle(self, now: float) -> bool:
        """Return True if nothing counts in it, here or elsewhere, and no other server counts what it has."""
        empty = not self.sequences and not any(self.window(rate).by_second(now) for rate in _RATES)
        silent = all(one.until <= now for one in self._elsewhere.values())
        return empty and silent and (not self.changed or now - self.reported_at >= WINDOW_SECONDS)

    # ---- with what others let in -------------------------------------------------------------

    def total(self, rate: Rate, now: float) -> int:
        """Return the total of the last 60 seconds."""
        total = 0
        for window in self._windows(rate):
            window.forget(now)
            total += window.total
        return total

    def seconds_until(self, rate: Rate, most: int, now: float) -> float:
        return _seconds_until(self._windows(rate), most, now)

    def sequences_running(self, now: float) -> int:
        others = self._elsewhere.values()
        return (
            self.sequences + sum(one.sequences for one in others if one.until > now)
            if others
            else self.sequences
        )

    def _windows(self, rate: Rate) -> Sequence[Window]:
        own = self.window(rate)
        return [own, *(one.windows[rate] for one in self._elsewhere.values())] if self._elsewhere else (own,)

    def report_use(self, kind: str, name: str, now: float) -> QuotaUse:
        """Return what this server has admitted, for other servers."""
        self.changed, self.reported_at = False, now
        return QuotaUse(kind, name, self.requests.by_second(now), self.tokens.by_second(now), self.sequences)

    def hear(self, process: str, use: QuotaUse, now: float) -> None:
        """Replace what another process of a server reported before."""
        for silent in [one for one, report in self._elsewhere.items() if report.until <= now]:
            del self._elsewhere[silent]
        until = now - use.age + WINDOW_SECONDS
        windows: dict[Rate, Window] = {}
        for rate, report in zip(_RATES, (use.requests, use.tokens), strict=True):
            windows[rate] = window = Window()
            for age, amount in sorted(report, reverse=True):
                window.add(amount, now - age)
        if use.sequences or any(window.total for window in windows.values()):
            self._elsewhere[process] = _Elsewhere(windows, use.sequences, until)
        else:
            self._elsewhere.pop(process, None)


@dataclass(frozen=True)
class _Owner:
    """Owner of quotas. kind: `key` or `tenant`; name: the key's id or the tenant's name."""

    kind: str
    name: str
    quotas: Quotas
    account: QuotaAccount
    background: bool = False

    def limit(self, quota: str) -> int | None:
        limit: int | None = getattr(self.quotas, quota)
        return limit

    def has_room(self, limit: int, used: int, wanted: int) -> bool:
        """Return True if so much more is within the limit: in the background, within half of it."""
        return used + wanted <= limit and (used == 0 or not self.background or used + wanted <= limit // 2)

    @property
    def words(self) -> str:
        return f"API key {self.name}" if self.kind == "key" else f"tenant {self.name!r}"


class Limiter:
    """Lets requests for text in. For one event loop.

    quotas_of: the quotas of a caller's key and of its tenant, as they are now. clock: seconds.
    """

    def __init__(
        self,
        quotas_of: Callable[[Caller], tuple[Quotas, Quotas]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quotas_of = quotas_of
        self._clock = clock
        self._accounts: dict[tuple[str, str], QuotaAccount] = {}
        self._in_use: WeakValueDictionary[tuple[str, str], QuotaAccount] = WeakValueDictionary()
        """Accounts with charges, and those of open reservations."""
        self._look_at = _LEAST_KEPT
        """Number of accounts from which on idle ones are looked for."""

    def enter(self, caller: Caller, *, resumed: bool = False) -> QuotaReservation:
        """Admit a request before anything of it is read. It counts as one request until its reservation says
        otherwise.

        resumed: another server has let it in, and counted it, before that server died.

        Raises QuotaSpentError, QuotaExceededError.
        """
        ticket = QuotaReservation(self._owners(caller), self._clock, resumed=resumed)
        ticket.enter()
        return ticket

    def used(self, kind: Literal["key", "tenant"], name: str, quotas: Quotas) -> dict[str, int]:
        """Return what counts now against those of an owner's quotas that are counted here: of this server,
        and of others as far as they have reported."""
        now, owner = self._clock(), (kind, name)
        account = self._accounts.get(owner) or self._in_use.get(owner) or QuotaAccount()
        counts: dict[str, int] = {rate: account.total(rate, now) for rate in _RATES}
        return {
            quota: used
            for quota, used in {**counts, "sequences": account.sequences_running(now)}.items()
            if getattr(quotas, quota) is not None
        }

    # ---- several servers ---------------------------------------------------------------------

    def report_uses(self) -> list[QuotaUse]:
        """Return the uses that have changed here since the last report, for other servers."""
        now = self._clock()
        return [
            account.report_use(kind, name, now)
            for (kind, name), account in self._accounts.items()
            if account.changed
            or (account.sequences and now - account.reported_at >= _SEQUENCES_AGAIN_SECONDS)
        ]

    def report_again(self, uses: Iterable[QuotaUse]) -> None:
        """Mark uses whose report did not reach the others, so that they are reported again."""
        for use in uses:
            self._account(use.kind, use.name).changed = True

    def hear(self, uses: Iterable[tuple[str, QuotaUse]]) -> None:
        """Add the uses that other servers' processes reported, each by the process's id."""
        now = self._clock()
        for process, use in uses:
            self._account(use.kind, use.name).hear(process, use, now)

    def _owners(self, caller: Caller) -> list[_Owner]:
        """Return the owners that have a quota that is counted here."""
        of_key, of_tenant = self._quotas_of(caller)
        owners = []
        for kind, name, quotas in (("key", caller.key, of_key), ("tenant", caller.tenant, of_tenant)):
            if not (quotas.requests is quotas.tokens is quotas.sequences is None):
                account = self._account(kind, name)
                owners.append(_Owner(kind, name, quotas, account, caller.background))
        return owners

    def _account(self, kind: str, name: str) -> QuotaAccount:
        """Return the account of a key or a tenant, also one that was idle while a reservation had it."""
        key = kind, name
        account = self._accounts.get(key)
        if account is None:
            if len(self._accounts) >= self._look_at:
                self._drop_idle()
            account = self._in_use.get(key) or QuotaAccount()
            self._accounts[key] = self._in_use[key] = account
        return account

    def _drop_idle(self) -> None:
        now = self._clock()
        self._accounts = {key: one for key, one in self._accounts.items() if not one.is_idle(now)}
        self._look_at = max(_LEAST_KEPT, 2 * len(self._accounts))


class QuotaReservation:
    """Reservation of one request in the accounts of its key and its tenant, from its admission to its end.

    resumed: nothing is refused, since the request was let in before; what it computes is charged.
    """

    def __init__(
        self, owners: Sequence[_Owner], clock: Callable[[], float], *, resumed: bool = False
    ) -> None:
        self.leave: Callable[[], None] | None = None
        """Function that `close` is to call instead, set once the request runs."""
        self.brings_others = False
        """Whether it is over once the requests that it brings are, each of which has a reservation."""
        self._owners = owners
        self._clock = clock
        self._resumed = resumed
        self._requests: list[Charge] = []
        self._tokens: list[Charge] = []
        self._sequences = 0

    @property
    def runs(self) -> bool:
        """Whether the engine has the request, or those that it brings."""
        return self.leave is not None or self.brings_others

    @property
    def max_sequences(self) -> int | None:
        """Return the largest number of sequences that may run at once; None is any number."""
        limits = [limit for owner in self._owners if (limit := owner.limit("sequences")) is not None]
        return min(limits, default=None)

    def enter(self) -> None:
        """Raises QuotaSpentError, QuotaExceededError: nothing is charged then."""
        if self._resumed:
            return
        now = self._clock()
        for owner in self._owners:
            self._check_rate(owner, "requests", 1, now)
            self._check_rate(owner, "tokens", 1, now)
            self._check_sequences(owner, 1, now)
        self._requests = [owner.account.add("requests", 1, now) for owner in self._owners]

    def admit(self, tokens: int, sequences: int) -> None:
        """Reserve what the request may need, or nothing. Raises QuotaSpentError, QuotaExceededError."""
        now = self._clock()
        for owner in [] if self._resumed else self._owners:
            self._check_rate(owner, "tokens", tokens, now)
            self._check_sequences(owner, sequences, now)
        self._tokens = [owner.account.add("tokens", tokens, now) for owner in self._owners]
        self._sequences = sequences
        for owner in self._owners:
            owner.account.add_sequences(sequences)

    def sequences_ended(self) -> None:
        """Free the reserved sequences after the last of them has ended in the engine."""
        if self._sequences:
            for owner in self._owners:
                owner.account.add_sequences(-self._sequences)
        self._sequences = 0

    def settle(self, tokens: int) -> None:
        """Record that the request is over, and how many tokens it took. Only the first call counts."""
        now = self._clock()
        for owner, charge in zip(self._owners, self._tokens, strict=False):
            owner.account.correct("tokens", charge, tokens, now)
        self._tokens = []

    def refund_request(self) -> None:
        """Record that it was refused for a reason that is not its own, and counts as no request."""
        now = self._clock()
        for owner, charge in zip(self._owners, self._requests, strict=False):
            owner.account.correct("requests", charge, 0, now)
        self._requests = []

    def close(self) -> None:
        """Settle the charges after the connection has ended. A request that never ran is refunded all that it
        had."""
        if self.leave is not None:
            self.leave()
        else:
            self.sequences_ended()
            self.settle(0)

    # ---- headers -----------------------------------------------------------------------------

    def headers(self) -> dict[str, str]:
        """Return OpenAI's headers, of the key's or the tenant's quota: whichever has less left."""
        now, headers = self._clock(), {}
        for rate in _RATES:
            rooms = []
            for owner in self._owners:
                limit = owner.limit(rate)
                if limit is not None:
                    rooms.append((max(0, limit - owner.account.total(rate, now)), limit, owner.account))
            if rooms:
                left, limit, account = min(rooms, key=lambda room: room[:2])
                headers[f"x-ratelimit-limit-{rate}"] = str(limit)
                headers[f"x-ratelimit-remaining-{rate}"] = str(left)
                headers[f"x-ratelimit-reset-{rate}"] = duration(account.seconds_until(rate, 0, now))
        return headers

    def _check_rate(self, owner: _Owner, rate: Rate, wanted: int, now: float) -> None:
        limit = owner.limit(rate)
        if limit is None:
            return
        if wanted > limit:
            hint = "Lower max_tokens or n, shorten the prompt" if limit and rate == "tokens" else ""
            raise self._refusal(owner, rate, limit, f"this request alone counts {wanted}", hint)
        total = owner.account.total(rate, now)
        if not owner.has_room(limit, total, wanted):
            used = f"{total} are used, and this request counts {wanted}"
            most = limit // 2 if owner.background else limit
            wait = owner.account.seconds_until(rate, max(0, most - wanted), now)
            raise self._refusal(owner, rate, limit, used, "", wait)

    def _check_sequences(self, owner: _Owner, wanted: int, now: float) -> None:
        limit = owner.limit("sequences")
        if limit is None:
            return
        if wanted > limit:
            raise self._refusal(
                owner, "sequences", limit, f"this request alone asks for {wanted}", "Lower n" if limit else ""
            )
        running = owner.account.sequences_running(now)
        if not owner.has_room(limit, running, wanted):
            used = f"{running} are running, and this request asks for {wanted}"
            raise self._refusal(owner, "sequences", limit, used, "", SEQUENCES_RETRY_SECONDS)

    def _refusal(
        self, owner: _Owner, quota: str, limit: int, why: str, hint: str, wait: float | None = None
    ) -> ApiError:
        period = "sequences (completions) at once" if quota == "sequences" else f"{quota} in any 60 seconds"
        message = f"{quota}: {owner.words} may have {limit} {period}: {why}."
        more = f"this server's operator for more (onebase {owner.kind}s set)"
        of = {"quota": quota, "limit": limit, "of": owner.kind}
        error: ApiError
        if wait is None:
            remedy = f"{hint}, or ask" if hint else "Ask"
            error = QuotaExceededError(f"{message} {remedy} {more}.", of)
        else:
            said = f"{message} Try again in {duration(wait)}, or ask {more}."
            error = QuotaSpentError(said, of, retry_after=wait)
        error.headers = {**error.headers, **self.headers()}
        return error


@dataclass(frozen=True)
class InnerAnswer:
    """Answer of a route to a request without a connection. headers: by their names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class InnerPost(Protocol):
    """Function that has a route answer a request without a connection, whose caller is known and whose quota
    is reserved already."""

    async def __call__(
        self, path: str, body: bytes, request_id: str, caller: Caller, reservation: QuotaReservation
    ) -> InnerAnswer: ...


def duration(seconds: float) -> str:
    """Return a duration as OpenAI writes it: `120ms`, `8.5s`, `1m0s`. Rounded up, so that waiting is
    enough."""
    milliseconds = max(0, -int(-seconds * 1000 // 1))
    if milliseconds == 0:
        return "0s"
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{text}s" if minutes else f"{text}s"
