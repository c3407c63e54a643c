"""What the actions share: names as they are written, how one runs, how versions are put in words."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from typing import Final

from ..._client import Client
from ...adapter_types import READY, AdapterSource, AdapterVersion
from .. import actions
from .layers import in_order

SHORT: Final = 12
"""Digits of a digest that people get to see."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """`NAME` or `NAME@VERSION`."""

    name: str
    version: str | None = None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


def reference(text: str) -> Reference:
    """What a person wrote. A Hub reference may have an @ of its own: `hub:org/repo@main@3f2a9c41`.

    Raises:
        ValueError: a part is empty.
    """
    name, at, version = text.rpartition("@")
    if not at or (text.startswith("hub:") and "@" not in name):
        name, version = text, ""
    if not name or (at and not text.rpartition("@")[2]):
        raise ValueError(f"write NAME or NAME@VERSION, not {text!r}")
    return Reference(name, version or None)


def parser(action: str, description: str, examples: str = "") -> argparse.ArgumentParser:
    """A parser for one action."""
    return actions.parser(f"adapters {action}", description, examples)


def resolve(client: Client, wanted: Reference) -> AdapterVersion:
    """The version meant: the one given, else the active one, else the newest that is ready.

    Raises:
        NotFoundError: there is none.
        ValueError: none of its versions is ready.
    """
    digest = wanted.version or client.adapters.retrieve(wanted.name).version
    if digest is not None:
        return client.adapters.version(wanted.name, digest)
    ready = [version for version in client.adapters.versions(wanted.name) if version.state == READY]
    if not ready:
        raise ValueError(f"no version of {wanted.name} is ready: see `onebase adapters show {wanted.name}`")
    return ready[0]


def short(digest: str | None) -> str:
    """The first digits of a digest; nothing for none. Ids of pulls stay whole: they have no prefix form."""
    if digest is None:
        return ""
    return digest if digest.startswith("pull-") else digest[:SHORT]


def targets(names: Iterable[str]) -> str:
    """Layers as people say them: `q k v o gate up down`."""
    return " ".join(name.removesuffix("_proj") for name in in_order(set(names)))


def number(value: float) -> str:
    """Few digits: `16`, `0.25`, `1.3e-05`."""
    return f"{value:.4g}"


def origin(source: AdapterSource) -> str:
    """Where a version came from, in words."""
    if source.kind != "hub":
        return source.kind
    place = f"{source.repo or ''}" + (f"/{source.subfolder}" if source.subfolder else "")
    at = source.commit[:7] if source.commit else source.revision
    return f"{place}@{at}" if at else place


def state_style(state: str) -> str:
    """The colour of a state."""
    return {"active": "bold green", "ready": "green", "failed": "red"}.get(state, "yellow")
