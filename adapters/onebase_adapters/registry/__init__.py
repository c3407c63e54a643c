"""Which adapters there are, their versions, and which version is active."""

from onebase_adapters.content import Blob, VersionFiles
from onebase_adapters.registry.errors import (
    NothingToRollBackError,
    NotReadyError,
    RegistryBusyError,
    RegistryError,
    RegistryFullError,
    StaleActivationError,
    UnknownAdapterError,
    UnknownVersionError,
)
from onebase_adapters.registry.queries import LEAST_PREFIX
from onebase_adapters.registry.records import (
    UNSET,
    AdapterRecord,
    Changes,
    HistoryEntry,
    State,
    Unset,
    VersionError,
    VersionRecord,
)
from onebase_adapters.registry.registry import DEFAULT_TENANT, Registry

__all__ = [
    "DEFAULT_TENANT",
    "LEAST_PREFIX",
    "UNSET",
    "AdapterRecord",
    "Blob",
    "Changes",
    "HistoryEntry",
    "NotReadyError",
    "NothingToRollBackError",
    "Registry",
    "RegistryBusyError",
    "RegistryError",
    "RegistryFullError",
    "StaleActivationError",
    "State",
    "UnknownAdapterError",
    "UnknownVersionError",
    "Unset",
    "VersionError",
    "VersionFiles",
    "VersionRecord",
]
