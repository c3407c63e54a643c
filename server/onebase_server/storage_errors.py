"""What the store and the registry raise, as errors that a caller understands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onebase_adapters import registry
from onebase_adapters.store import store
from onebase_server.errors import (
    ConflictError,
    StaleActivationError,
    StoreFullError,
    UnavailableError,
    UnknownAdapterError,
    UnknownFileError,
    UnknownJobError,
)


@contextmanager
def storage_errors(name: str = "") -> Iterator[None]:
    """RegistryError and StoreError as OneBaseError; `name`: the adapter that it is about."""
    try:
        yield
    except (store.StoreFullError, registry.RegistryFullError) as error:
        raise StoreFullError from error
    except registry.UnknownAdapterError as error:
        raise UnknownAdapterError(str(error), param="name") from error
    except registry.UnknownVersionError as error:
        raise UnknownAdapterError(str(error), param="version", code="version_not_found") from error
    except registry.NotReadyError as error:
        raise ConflictError(str(error), code="version_not_ready", param="version") from error
    except registry.StaleActivationError as error:
        raise StaleActivationError(name, error.current) from error
    except registry.NothingToRollBackError as error:
        raise ConflictError(str(error), code="nothing_to_roll_back") from error
    except registry.UnknownFileError as error:
        raise UnknownFileError(str(error)) from error
    except registry.UnknownJobError as error:
        raise UnknownJobError(str(error)) from error
    except registry.FileInUseError as error:
        raise ConflictError(
            f"{error} Wait for its end or cancel it.", code="file_in_use", param="file_id"
        ) from error
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
