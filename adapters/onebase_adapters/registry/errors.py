"""Errors of the registry and of its database.

RegistryError
├── RegistryFullError         no space for the database; what was written before is whole
├── RegistryBusyError         the database cannot be reached, or is locked for long; try again
├── UncertainChangeError      a change was made, or may have been, and cannot be read now
├── ServerIdInUseError        a process with another data folder runs the jobs of this server's id
├── UnknownAdapterError       no adapter of that name
├── UnknownVersionError       the adapter has no such version, or several begin like that
├── NotReadyError             the version has not been proved, or failed
├── StaleActivationError      another version is active than the caller expects
├── NothingToRollBackError    no earlier version is left
├── GateError                 a gate refuses the activation
├── ApprovalError             this key cannot approve the version, or evaluate it
├── UnknownGateError          no rule of that id
├── UnknownKeyError           no API key of that id
├── InvalidKeyError           no API key or tenant can have such a name, scope, quota, priority or end
├── ErasuresError             the tenant's erasures by user are as many as are kept
├── QuotaError                the tenant has as much as its quota allows
├── UnknownFileError          no file of that id
├── FileInUseError            a training job or a batch needs the file
├── UnknownJobError           no training job of that id
│   └── JobElsewhereError     another server runs the job now, or it cannot be taken over
├── JobStateError             the job's state does not allow it
├── UnknownBatchError         no batch of that id
│   └── BatchElsewhereError   another server runs the batch now, or it cannot be taken over
└── BatchStateError           the batch's state does not allow it
"""

from __future__ import annotations

from collections.abc import Sequence

from onebase_protocol.adapters import GateState


class RegistryError(Exception):
    """The registry refused or failed; the message says why, without the database's password."""


class RegistryFullError(RegistryError):
    """No space is left where the database is. What was written before is whole."""


class RegistryBusyError(RegistryError):
    """The database cannot be reached now, or is locked by others. The same call may work later."""


class UncertainChangeError(RegistryError):
    """A change was made, or may have been, and nothing can be read now. The same call might repeat it."""


class ServerIdInUseError(RegistryError):
    """A living process with another data folder has the server's id: one of the folders is a copy.

    renewed_at: time of that process's last renewal, by the database's clock."""

    def __init__(self, server: str, renewed_at: float) -> None:
        super().__init__(f"Another process has this data folder's server id on the registry, {server}.")
        self.renewed_at = renewed_at


class UnknownAdapterError(RegistryError):
    """There is no adapter of this name for this tenant and this base."""


class UnknownVersionError(RegistryError):
    """The adapter has no such version, or several whose digests begin like that."""


class NotReadyError(RegistryError):
    """Only a version in state `ready` can be active. `state`: the version's state."""

    def __init__(self, message: str, state: str) -> None:
        super().__init__(message)
        self.state = state


class ErasuresError(RegistryError):
    """The tenant has too many erasures of single users."""

    def __init__(self, most: int) -> None:
        super().__init__(f"Requests of {most} users were erased already. Erase all of the tenant's.")


class StaleActivationError(RegistryError):
    """Another version is active than the caller expected. `current`: its digest, or None."""

    def __init__(self, message: str, current: str | None) -> None:
        super().__init__(message)
        self.current = current


class NothingToRollBackError(RegistryError):
    """No version was active before this one, or all that were are deleted."""


class GateError(RegistryError):
    """Gates refuse to let a version answer. `closed`: those that do. `digest`: the version's."""

    def __init__(self, message: str, closed: Sequence[GateState], digest: str) -> None:
        super().__init__(message)
        self.closed = tuple(closed)
        self.digest = digest


class ApprovalError(RegistryError):
    """The key cannot approve the version, or evaluate it."""


class UnknownGateError(RegistryError):
    """There is no rule of this id."""


class UnknownRolloutError(RegistryError):
    """The adapter has no rollout."""


class RolloutStateError(RegistryError):
    """A rollout runs already, or none does, or it cannot be made of these versions."""


class UnknownKeyError(RegistryError):
    """There is no API key of this id."""


class InvalidKeyError(RegistryError):
    """An API key or tenant has an invalid field. `field`: the one that must change."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class QuotaError(RegistryError):
    """A tenant would exceed its quota. `quota`: its name; `limit`: its value."""

    def __init__(self, message: str, quota: str, limit: int) -> None:
        super().__init__(message)
        self.quota = quota
        self.limit = limit


class UnknownFileError(RegistryError):
    """There is no file of this id."""


class FileInUseError(RegistryError):
    """A job or a batch that has not ended needs the file. `job`: its id."""

    def __init__(self, message: str, job: str) -> None:
        super().__init__(message)
        self.job = job


class UnknownJobError(RegistryError):
    """There is no training job of this id for this base."""


class JobElsewhereError(UnknownJobError):
    """The job belongs to another server: a server that has lost it cannot change it any more."""


class JobStateError(RegistryError):
    """The job's state does not allow it. `state`: the job's state."""

    def __init__(self, message: str, state: str) -> None:
        super().__init__(message)
        self.state = state


class UnknownBatchError(RegistryError):
    """There is no batch of this id for this base."""


class BatchElsewhereError(UnknownBatchError):
    """The batch belongs to another server: a server that has lost it cannot change it any more."""


class BatchStateError(RegistryError):
    """The batch's state does not allow it. `state`: the batch's state."""

    def __init__(self, message: str, state: str) -> None:
        super().__init__(message)
        self.state = state


class UnknownLiveError(RegistryError):
    """There is no session or sampler of this id for this tenant. `kind`: which of them. `param`: the field
    that names it."""

    def __init__(self, kind: str, name: str, param: str) -> None:
        super().__init__(f"There is no {kind} {name[:120]!r}.")
        self.kind = kind
        self.name = name
        self.param = param
