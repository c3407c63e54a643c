"""From the server's JSON about adapters to typed results: pure functions, shared by both clients."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from ._parse import Json
from .adapter_types import (
    Activation,
    Adapter,
    AdapterSource,
    AdapterVersion,
    ModuleReport,
    Progress,
    ProofReport,
    VersionFailure,
    VersionReport,
)

T = TypeVar("T")


def _flat(kind: type[T], value: Json, **others: Any) -> T:
    """A dataclass from the fields of the same names; `others` are those that are not taken as they are.

    Raises:
        KeyError: a field is missing.
    """
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # T is always a dataclass
    return kind(**{name: others[name] if name in others else value[name] for name in names})


def adapter(value: Json) -> Adapter:
    return _flat(Adapter, value, kinds=tuple(value["kinds"]), targets=tuple(value["targets"]))


def adapters(value: Json) -> tuple[Adapter, ...]:
    return tuple(adapter(item) for item in value["data"])


def version(value: Json) -> AdapterVersion:
    error, progress, report = value["error"], value["progress"], value["report"]
    return _flat(
        AdapterVersion,
        value,
        error=None if error is None else _flat(VersionFailure, error),
        source=source(value["source"]),
        progress=None if progress is None else Progress(progress["stage"], progress["fraction"]),
        report=None if report is None else version_report(report),
    )


def versions(value: Json) -> tuple[AdapterVersion, ...]:
    return tuple(version(item) for item in value["data"])


def source(value: Json) -> AdapterSource:
    return AdapterSource(
        value["kind"],
        value.get("repo"),
        value.get("revision"),
        value.get("commit"),
        value.get("subfolder"),
    )


def version_report(value: Json) -> VersionReport:
    return _flat(
        VersionReport,
        value,
        kinds=tuple(value["kinds"]),
        targets=tuple(value["targets"]),
        dropped=tuple(value["dropped"]),
        modules=tuple(_flat(ModuleReport, module) for module in value["modules"]),
        proof=_flat(ProofReport, value["proof"]),
    )


def history(value: Json) -> tuple[Activation, ...]:
    return tuple(_flat(Activation, item) for item in value["data"])
