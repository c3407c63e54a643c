"""Calls of the registry and the store: their threads, and their errors as the server's."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from msgspec import to_builtins

from onebase_adapters import registry
from onebase_adapters.registry import RegistryError
from onebase_adapters.store import store
from onebase_adapters.store.store import Store, StoreError
from onebase_edge.background import Threads
from onebase_edge.errors import (
    ActivationConflictError,
    AdapterNotFoundError,
    BatchNotFoundError,
    DiskFullError,
    ForbiddenError,
    GateClosedError,
    GateNotFoundError,
    InvalidRequestError,
    JobNotFoundError,
    KeyNotFoundError,
    LiveNotFoundError,
    QuotaExceededError,
    StateConflictError,
    TrainingFileNotFoundError,
    UnavailableError,
    UnconfirmedChangeError,
)

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)


class RegistryThreads(Threads):
    """Threads for the registry's calls. A write ends when every subscriber has seen it."""

    def __init__(self, name: str, most: int) -> None:
        super().__init__(name, most)
        self._subscribers: list[Callable[[], Awaitable[None]]] = []

    def subscribe(self, subscriber: Callable[[], Awaitable[None]]) -> None:
        """Call it after each write."""
        self._subscribers.append(subscriber)

    async def write(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call that changes the registry, as `run` does. An error of a subscriber is raised with a
        message that says that the change was made."""
        result = await self.run_blocking(call, *args, **kwargs)
        try:
            for subscriber in self._subscribers:
                await subscriber()
        except RegistryError as error:
            raise registry.UncertainChangeError(
                f"the change was made, but what it changed cannot be read: {error}"
            ) from error
        return result


async def delete_blobs(store: Store, disk: Threads, blobs: Iterable[str]) -> None:
    """Delete what nothing references any more; a blob that cannot be deleted now is left to the sweep."""
    for sha256 in blobs:
        try:
            await disk.run_blocking(store.delete, sha256)
        except StoreError as error:
            _log.warning("blob %s stays until the next sweep: %s", sha256[:12], error)


@contextmanager
def storage_errors(name: str = "") -> Iterator[None]:
    """RegistryError and StoreError as ApiError; `name`: the adapter that it is about."""
    try:
        yield
    except (store.StoreFullError, registry.RegistryFullError) as error:
        raise DiskFullError from error
    except registry.UnknownAdapterError as error:
        raise AdapterNotFoundError(str(error), param="name") from error
    except registry.UnknownVersionError as error:
        raise AdapterNotFoundError(str(error), param="version", code="version_not_found") from error
    except registry.NotReadyError as error:
        raise StateConflictError(str(error), code="version_not_ready", param="version") from error
    except registry.StaleActivationError as error:
        raise ActivationConflictError(name, error.current) from error
    except registry.GateError as error:
        raise GateClosedError(str(error), [to_builtins(one) for one in error.closed]) from error
    except registry.ApprovalError as error:
        raise ForbiddenError(str(error), code="approval_refused", param="version") from error
    except registry.UnknownGateError as error:
        raise GateNotFoundError(str(error)) from error
    except registry.NothingToRollBackError as error:
        raise StateConflictError(str(error), code="nothing_to_roll_back") from error
    except registry.RolloutStateError as error:
        raise StateConflictError(str(error), code="rollout_state") from error
    except registry.UnknownRolloutError as error:
        raise AdapterNotFoundError(str(error), param="name", code="rollout_not_found") from error
    except registry.InvalidKeyError as error:
        raise InvalidRequestError(str(error), param=error.field) from error
    except registry.QuotaError as error:
        of = {"quota": error.quota, "limit": error.limit, "of": "tenant"}
        raise QuotaExceededError(str(error), of) from error
    except registry.UnknownKeyError as error:
        raise KeyNotFoundError(str(error)) from error
    except registry.UnknownFileError as error:
        raise TrainingFileNotFoundError(str(error)) from error
    except registry.UnknownJobError as error:
        raise JobNotFoundError(str(error)) from error
    except registry.UnknownLiveError as error:
        raise LiveNotFoundError(error.kind, error.name, error.param) from error
    except registry.UnknownBatchError as error:
        raise BatchNotFoundError(str(error)) from error
    except registry.JobStateError as error:
        raise StateConflictError(str(error), code=f"job_{error.state}") from error
    except registry.BatchStateError:
        raise
    except registry.FileInUseError as error:
        raise StateConflictError(
            f"{error} Wait for its end or cancel it.", code="file_in_use", param="file_id"
        ) from error
    except registry.UncertainChangeError as error:
        raise UnconfirmedChangeError(str(error)) from error
    except registry.RegistryError as error:
        raise UnavailableError(
            f"The registry of adapters cannot be used now: {error}",
            code="registry_unavailable",
            retry_after=5,
        ) from error
    except store.StoreError as error:
        raise UnavailableError(
            f"The store of adapters cannot be used now: {error}", code="store_unavailable", retry_after=5
        ) from error
