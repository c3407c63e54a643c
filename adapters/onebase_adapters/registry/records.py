"""What the registry hands out: plain values, detached from the database. Times are Unix seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from onebase_adapters.store.content import Blob, VersionFiles

State = Literal["pulling", "validating", "proving", "ready", "failed"]
Action = Literal["activate", "rollback", "deactivate"]

STATES: Final[tuple[State, ...]] = get_args(State)
UNFINISHED: Final[tuple[State, ...]] = ("pulling", "validating", "proving")

MODULES = "modules"
"""The long part of a report, one entry a module. Lists of adapters leave it out."""


class Unset:
    """The type of UNSET: tells "not given" from None, which means "nothing is active"."""

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset()


@dataclass(frozen=True)
class VersionError:
    """Why a version failed: a stable code and a sentence."""

    code: str
    message: str


@dataclass(frozen=True)
class VersionRecord:
    """One version of one adapter.

    `report`: what the proof found. In an AdapterRecord it lacks its `modules`, of which there may be
    hundreds; the registry's `version`, `versions` and `unfinished` give it whole.
    """

    tenant: str
    name: str
    digest: str
    state: State
    files: VersionFiles
    prepared: Blob | None
    report: Mapping[str, Any] | None = field(hash=False)
    source: Mapping[str, Any] = field(hash=False)
    error: VersionError | None
    created_at: float
    created_by: str
    finished_at: float | None

    @property
    def finished(self) -> bool:
        return self.state not in UNFINISHED


@dataclass(frozen=True)
class AdapterRecord:
    """One name. `active`: the digest of the version that requests by name get; `versions`: newest first."""

    tenant: str
    name: str
    active: str | None
    pinned: bool
    created_at: float
    updated_at: float
    versions: tuple[VersionRecord, ...]

    def version(self, digest: str) -> VersionRecord | None:
        """The version of this whole digest."""
        return next((version for version in self.versions if version.digest == digest), None)

    @property
    def active_version(self) -> VersionRecord | None:
        return None if self.active is None else self.version(self.active)


@dataclass(frozen=True)
class HistoryEntry:
    """One change of what is active: `version` from then on, `previous` until then; None: nothing."""

    action: Action
    version: str | None
    previous: str | None
    actor: str
    at: float


@dataclass(frozen=True)
class Changes:
    """What `Registry.changes` saw: the counter then, the adapters changed since, and the names of all
    adapters there are (`(tenant, name)`), so that one who follows can drop the others."""

    counter: int
    changed: tuple[AdapterRecord, ...]
    names: frozenset[tuple[str, str]]
