"""A request's hold on the versions that it runs with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from onebase_server.adapters.memory_use import PackedAdapterFile
from onebase_server.errors import OneBaseError


class Use(NamedTuple):
    """A version by the name that a request has called it."""

    name: str
    digest: str


@dataclass(eq=False)
class Held:
    """One version in the engine's memory, or on its way there. `bytes` are reserved from the beginning.

    `prepared`: the file that it is loaded from, whatever becomes of the version meanwhile.
    """

    digest: str
    prepared: PackedAdapterFile
    bytes: int
    loaded: asyncio.Future[None]
    leases: int = 0
    last_used: int = 0
    unloaded: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_loaded(self) -> bool:
        return self.loaded.done() and not self.loaded.cancelled() and self.loaded.exception() is None


class Keeper(Protocol):
    """What a lease asks of the one who gave it."""

    async def obtain(self, lease: Lease) -> None: ...

    def release(self, lease: Lease) -> None: ...


class Lease:
    """A request's hold on its versions: they stay in memory until `release`.

    A context manager: entering waits until everything is loaded.
    """

    def __init__(self, keeper: Keeper, uses: Sequence[Use]) -> None:
        self.uses = frozenset(uses)
        self.on_revoked: Callable[[OneBaseError], None] | None = None
        """Called when a version is deleted by force while the lease is held."""
        self.held: list[Held] = []
        self._keeper = keeper
        self._waiting: asyncio.Task[object] | None = None
        self._revoked: OneBaseError | None = None
        self._released = False

    @property
    def digests(self) -> list[str]:
        return sorted({use.digest for use in self.uses})

    async def ready(self) -> None:
        """Wait until every version is loaded. On any error the lease is released.

        Raises:
            InvalidRequestError: they can never be in memory together.
            QueueFullError: too many requests wait already.
            UnavailableError, EngineRestartedError: one cannot be loaded now.
            AdapterDeletedError: one was deleted meanwhile.
        """
        self._waiting = asyncio.current_task()
        try:
            await self._keeper.obtain(self)
        except asyncio.CancelledError:
            self.release()
            if self._revoked is not None:
                task = asyncio.current_task()
                if task is not None and task.uncancel() == 0:
                    raise self._revoked from None
            raise
        except BaseException:
            self.release()
            raise
        finally:
            self._waiting = None

    def release(self) -> None:
        """May be called more than once."""
        if not self._released:
            self._released = True
            self._keeper.release(self)

    def hold(self, held: Held) -> None:
        held.leases += 1
        self.held.append(held)

    def revoke(self, error: OneBaseError) -> None:
        """End what uses the lease, or waits for it, with an error."""
        self._revoked = error
        if self._waiting is not None:
            self._waiting.cancel()
        elif self.on_revoked is not None:
            self.on_revoked(error)

    async def __aenter__(self) -> Self:
        await self.ready()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
