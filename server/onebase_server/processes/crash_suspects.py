"""Detection of requests that kill every engine, by which requests were running when engines died.

A client sends a request again when the engine has died under it. If that request is the cause, the next
engine dies too, and at the sixth death the server gives up. So a request is recognised by its content:

- It is refused when it was running at two deaths or more, and at more of them than any other request of the
  last death. A request that is sent alone is refused at the second death.
- Others may have been running with it both times, and are as suspect. From then on the requests of two deaths
  run one at a time, among all others: the third death has one cause.
- A request that runs to its end is cleared. So is every request after FORGIVEN_AFTER seconds without a death.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b

import msgspec

from onebase_edge.errors import CrashesEngineError, UnavailableError
from onebase_server.processes.inflight import Inflight

FORGIVEN_AFTER = 600.0
"""Time, in seconds after a request's last death, until it is forgiven."""
MAX_SUSPECTS = 4096
"""Largest number of suspects; beyond it the oldest are forgotten."""
_DEATHS = 2
"""Number of deaths from which on a request is refused, or runs only while no other such request does."""
_RETRY_AFTER = 5.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Record:
    deaths: int
    last: float
    refused: bool = False


def fingerprint(request: Inflight) -> bytes:
    """Return a digest of a request's versions, prompts and sampling settings.

    It leaves out the seed, which the api draws for each retry, and the state that the request resumes from.
    """
    content = []
    for submit in request.submits:
        bias = dict(sorted(submit.sampling.logit_bias.items()))
        sampling = msgspec.structs.replace(submit.sampling, seed=0, logit_bias=bias)
        content.append(msgspec.structs.replace(submit, id="", sampling=sampling, resume_tokens=None))
    return blake2b(msgspec.msgpack.encode(content), digest_size=16).digest()


class Suspects:
    """The requests that were running at the engine's latest deaths. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._records: OrderedDict[bytes, _Record] = OrderedDict()
        """Records by fingerprint, the latest death last."""
        self._alone: Inflight | None = None
        """Running request that has been running at _DEATHS deaths or more."""

    def admit(self, request: Inflight) -> None:
        """Raise CrashesEngineError for a request that is refused, UnavailableError while another suspect
        runs."""
        self._forgive()
        record = self._records.get(fingerprint(request)) if self._records else None
        if record is None or record.deaths < _DEATHS:
            return
        if record.refused:
            raise CrashesEngineError(record.deaths, record.last + FORGIVEN_AFTER - self._clock())
        if self._alone is not None:
            raise UnavailableError(
                f"This request was running when the engine died {record.deaths} times. Such requests run one "
                "at a time, and another one is running. Try again in a moment.",
                code="crash_suspect",
                retry_after=_RETRY_AFTER,
            )
        self._alone = request

    def ended(self, request: Inflight) -> None:
        """Clear a request whose sequences have all ended while the engine lives."""
        if request is self._alone:
            self._alone = None
        if self._records and not request.given_up:
            self._records.pop(fingerprint(request), None)

    def engine_died(self, running: Iterable[Inflight]) -> None:
        """Count a death for each of the requests. Those that are refused from now on fail."""
        self._forgive()
        self._alone = None
        now = self._clock()
        died: dict[bytes, list[Inflight]] = {}
        for request in running:
            died.setdefault(fingerprint(request), []).append(request)
        for key in died:
            before = self._records.pop(key, None)
            self._records[key] = _Record(before.deaths + 1 if before else 1, now)
        most = max((self._records[key].deaths for key in died), default=0)
        worst = [key for key in died if self._records[key].deaths == most]
        if most >= _DEATHS and len(worst) == 1:
            self._refuse(worst[0], died[worst[0]])
        while len(self._records) > MAX_SUSPECTS:
            self._records.popitem(last=False)

    def _refuse(self, key: bytes, requests: list[Inflight]) -> None:
        record = self._records[key]
        self._records[key] = _Record(record.deaths, record.last, refused=True)
        _log.error(
            "request %s was running at %d deaths of the engine; it is refused for %.0f s",
            requests[0].submits[0].id,
            record.deaths,
            FORGIVEN_AFTER,
        )
        for request in requests:
            request.fail(CrashesEngineError(record.deaths, FORGIVEN_AFTER))

    def _forgive(self) -> None:
        horizon = self._clock() - FORGIVEN_AFTER
        while self._records and next(iter(self._records.values())).last <= horizon:
            self._records.popitem(last=False)
