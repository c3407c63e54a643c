"""Adapters that come from the Hub: explicit pulls, and those that a request causes by naming a repository."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from onebase_adapters.hub.pull import HubError, HubReference, parse_hub_reference
from onebase_adapters.registry import VersionError, VersionRecord
from onebase_server.adapters.pulls import Fetched, Pulls, Transfer, hub_failure
from onebase_server.adapters.service import Library, Wishes
from onebase_server.errors import (
    InvalidRequestError,
    OneBaseError,
    UnknownAdapterError,
    VersionFailedError,
)
from onebase_server.storage_errors import storage_errors

MOST_REMEMBERED = 1000
"""Pulls that have ended and can still be asked about."""
FAILED_SECONDS = 60.0
"""A repository whose adapter was not served is not pulled again for a request within this time."""

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class PendingPull:
    """A version whose content is not known yet; `digest` is, once the files are here."""

    name: str
    reference: HubReference
    wishes: Wishes
    actor: str
    transfer: Transfer
    task: asyncio.Task[VersionRecord] | None = None
    id: str = field(default_factory=lambda: f"pull-{secrets.token_hex(12)}")
    created_at: float = field(default_factory=time.time)
    digest: str | None = None
    failure: OneBaseError | None = None

    @property
    def error(self) -> VersionError | None:
        """Why nothing came of it."""
        return None if self.failure is None else VersionError(self.failure.code, self.failure.message)

    async def arrived(self) -> VersionRecord:
        """The registered version. Raises what the pull ended with."""
        if self.task is None:
            raise RuntimeError("a pull without a task")
        return await asyncio.shield(self.task)


class HubAdapters:
    """Turns pulls into versions. Called from one event loop."""

    def __init__(self, library: Library, pulls: Pulls) -> None:
        self._library = library
        self._pulls = pulls
        self._known: OrderedDict[str, PendingPull] = OrderedDict()
        self._first_uses: dict[str, asyncio.Task[None]] = {}
        self._failed: dict[str, tuple[float, OneBaseError]] = {}

    def check_allowed(self, reference: HubReference, param: str) -> None:
        """Raises ForbiddenError unless requests may make this server pull from the repository."""
        self._pulls.check_allowed(reference, param)

    def get(self, name: str, pull_id: str) -> PendingPull | None:
        """A pull that runs, or ended not long ago."""
        pending = self._known.get(pull_id)
        return pending if pending is not None and pending.name == name else None

    def of_name(self, name: str) -> list[PendingPull]:
        """Pulls of a name that have no digest (yet), newest first."""
        return [
            pending
            for pending in reversed(self._known.values())
            if pending.name == name and not pending.digest
        ]

    def running_names(self) -> set[str]:
        """Names that something is being pulled for."""
        return {
            pending.name for pending in self._known.values() if pending.digest is None and not pending.failure
        }

    def pull(self, name: str, reference: HubReference, wishes: Wishes, actor: str = "") -> PendingPull:
        """Begin to fetch a version, or join the pull that does so already. Raises UnavailableError."""
        for pending in self._known.values():
            running = pending.task is not None and not pending.task.done()
            if running and (pending.name, pending.reference, pending.wishes) == (name, reference, wishes):
                return pending
        transfer, fetched = self._pulls.start(reference)
        pending = PendingPull(name, reference, wishes, actor, transfer)
        pending.task = asyncio.get_running_loop().create_task(self._finish(pending, fetched))
        pending.task.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._known[pending.id] = pending
        while len(self._known) > MOST_REMEMBERED:
            self._known.popitem(last=False)
        return pending

    async def use(self, name: str, *, param: str) -> None:
        """Make sure that the adapter of this Hub name is active: pulled and proved if it is not known yet.

        Concurrent first uses wait for the same pull. Raises OneBaseError saying what is in the way.
        """
        reference = hub_reference(name, param)
        record = self._library.catalog.get(name)
        if record is not None and record.active is not None:
            return
        self._pulls.check_allowed(reference, param)
        since, failure = self._failed.get(name, (0.0, None))
        if failure is not None and time.monotonic() - since < FAILED_SECONDS:
            raise failure
        if name not in self._first_uses:
            task = asyncio.get_running_loop().create_task(self._first_use(name, reference))
            self._first_uses[name] = task
            task.add_done_callback(lambda done: self._first_use_ended(name, done))
        await asyncio.shield(self._first_uses[name])

    async def _first_use(self, name: str, reference: HubReference) -> None:
        await self._refuse_if_deactivated(name)
        arrived = await self.pull(name, reference, Wishes(activate=True), actor="first use").arrived()
        version = await self._library.wait(name, arrived.digest)
        if version.error is not None:
            raise VersionFailedError(
                f"{name} cannot be served: {version.error.message}", code=version.error.code
            )

    async def _refuse_if_deactivated(self, name: str) -> None:
        """What somebody has deactivated stays so until somebody activates it."""
        if self._library.catalog.get(name) is None:
            return
        history = await self._library.activation.history(name)
        if history and history[0].action == "deactivate":
            raise UnknownAdapterError(f"Adapter {name!r} was deactivated: activate one of its versions.")

    def _first_use_ended(self, name: str, task: asyncio.Task[None]) -> None:
        del self._first_uses[name]
        error = None if task.cancelled() else task.exception()
        if isinstance(error, VersionFailedError):
            now = time.monotonic()
            fresh = {key: (at, old) for key, (at, old) in self._failed.items() if now - at < FAILED_SECONDS}
            self._failed = {**fresh, name: (now, error)}

    async def _finish(self, pending: PendingPull, fetched: asyncio.Task[Fetched]) -> VersionRecord:
        """Wait for the transfer, then register what came. Raises OneBaseError."""
        try:
            arrived = await self._arrived(fetched)
            version = await self._register(pending, arrived)
        except OneBaseError as error:
            _log.warning("pulling %s for %s: %s", pending.reference, pending.name, error)
            pending.failure = error
            raise
        pending.digest = version.digest
        return version

    async def _arrived(self, fetched: asyncio.Task[Fetched]) -> Fetched:
        try:
            with storage_errors():
                return await asyncio.shield(fetched)
        except HubError as error:
            raise hub_failure(error.code, str(error)) from error

    async def _register(self, pending: PendingPull, fetched: Fetched) -> VersionRecord:
        library, reference = self._library, pending.reference
        config = await library.read_config(fetched.files)
        await library.check_config(pending.name, config, pending.wishes)
        source = {
            "kind": "hub",
            "repo": reference.repo,
            "revision": reference.revision,
            "commit": fetched.commit,
            "subfolder": reference.subfolder,
        }
        return await library.add(pending.name, fetched.files, source, pending.wishes, actor=pending.actor)


def hub_reference(text: str, param: str) -> HubReference:
    """`hub:org/repo[@revision][:subfolder]` taken apart. Raises InvalidRequestError."""
    try:
        return parse_hub_reference(text)
    except HubError as error:
        raise InvalidRequestError(f"{param}: {error}", param=param, code=error.code) from error
