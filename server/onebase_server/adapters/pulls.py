"""Adapters from the Hub: one transfer per repository, revision and subfolder, however many ask for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from onebase_adapters.hub.pull import HubError, HubReference, PullCancelledError, pull, resolve
from onebase_adapters.store.content import VersionFiles
from onebase_adapters.store.store import Store
from onebase_server.background import Threads
from onebase_server.errors import (
    ForbiddenError,
    InvalidRequestError,
    OneBaseError,
    PayloadTooLargeError,
    UnavailableError,
    UnknownAdapterError,
    VersionFailedError,
)

MOST_TRANSFERS = 64
"""Transfers that run or wait."""
_LONGEST_SECONDS = 3600.0
_RETRY_AFTER = 10.0


@dataclass(frozen=True)
class Fetched:
    """What a transfer brought: the files, in the store, and the commit that they are from."""

    files: VersionFiles
    commit: str


class Transfer:
    """One transfer from the Hub. `fraction` is 0 to 1, of the bytes."""

    def __init__(self, reference: HubReference) -> None:
        self.reference = reference
        self.fraction = 0.0
        self.cancel = threading.Event()

    def run(self, store: Store, max_bytes: int) -> Fetched:
        """Block until everything is here. Raises HubError, PullCancelledError, StoreError."""
        reference = self.reference
        commit = resolve(reference.repo, reference.revision, cancel=self.cancel)
        return Fetched(pull(reference, commit, store, max_bytes, self._advance, cancel=self.cancel), commit)

    def _advance(self, done: int, total: int) -> None:
        self.fraction = min(1.0, done / total) if total else 0.0


class Pulls:
    """Transfers in threads of their own. `allow` holds patterns of `org/repo` that requests may name."""

    def __init__(self, store: Store, threads: Threads, allow: Sequence[str], max_bytes: int) -> None:
        self._store = store
        self._threads = threads
        self._allow = tuple(allow)
        self._max_bytes = max_bytes
        self._running: dict[HubReference, tuple[Transfer, asyncio.Task[Fetched]]] = {}

    def check_allowed(self, reference: HubReference, param: str) -> None:
        """Raises ForbiddenError unless requests may make this server pull from the repository."""
        if any(fnmatchcase(reference.repo, pattern) for pattern in self._allow):
            return
        allowed = ", ".join(self._allow) or "none"
        raise ForbiddenError(
            f"{param}: for requests, this server pulls from these Hub repositories only: {allowed}. Its "
            f"operator may add --hub-allow '{reference.repo}'.",
            code="hub_not_allowed",
            param=param,
        )

    def start(self, reference: HubReference) -> tuple[Transfer, asyncio.Task[Fetched]]:
        """The transfer of this reference: the one that runs, or a new one. Raises UnavailableError."""
        if reference not in self._running:
            if len(self._running) >= MOST_TRANSFERS:
                raise UnavailableError(
                    f"{MOST_TRANSFERS} pulls from the Hub are running or waiting. Try again later.",
                    code="pulls_busy",
                    retry_after=_RETRY_AFTER,
                )
            transfer = Transfer(reference)
            task = asyncio.get_running_loop().create_task(self._run(transfer))
            self._running[reference] = transfer, task
            task.add_done_callback(lambda done: self._ended(reference, done))
        return self._running[reference]

    async def _run(self, transfer: Transfer) -> Fetched:
        limit = asyncio.get_running_loop().call_later(_LONGEST_SECONDS, transfer.cancel.set)
        try:
            return await self._threads.run(transfer.run, self._store, self._max_bytes)
        except PullCancelledError:
            raise HubError(
                "hub_unreachable", f"{transfer.reference} did not arrive within {_LONGEST_SECONDS:g} s"
            ) from None
        finally:
            limit.cancel()

    def _ended(self, reference: HubReference, task: asyncio.Task[Fetched]) -> None:
        del self._running[reference]
        if not task.cancelled():
            task.exception()


def hub_failure(code: str, message: str) -> OneBaseError:
    """A failed transfer, for a caller who waited for it."""
    if code == "hub_not_found":
        return UnknownAdapterError(message, code=code)
    if code == "hub_gated":
        return ForbiddenError(message, code=code, param="adapter")
    if code == "hub_invalid":
        return InvalidRequestError(message, code=code, param="adapter")
    if code == "hub_no_adapter":
        return VersionFailedError(message, code=code)
    if code == "hub_too_large":
        return _too_large(message)
    return UnavailableError(message, code=code, retry_after=_RETRY_AFTER)


def _too_large(message: str) -> OneBaseError:
    error = PayloadTooLargeError(0, "--max-upload")
    error.message, error.code = message, "hub_too_large"
    return error
