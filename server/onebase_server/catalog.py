"""Names of adapters, the versions they point at, and what a request may call them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from onebase_server.engine.protocol import AdapterLoaded, AdapterRef, LoadAdapter
from onebase_server.errors import UnavailableError, UnknownAdapterError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
SHORT_DIGEST = 12
_LEAST_PREFIX = 8
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class CatalogError(ValueError):
    """An adapter that cannot be served; the message names it and says why."""


@dataclass(frozen=True)
class AdapterVersion:
    """One adapter's active version: its name, the SHA-256 of its content, and where its files are."""

    name: str
    digest: str
    folder: Path

    @property
    def label(self) -> str:
        return f"{self.name}@{self.digest[:SHORT_DIGEST]}"


@dataclass(frozen=True)
class AdapterChoice:
    """What one request runs with: the engine's terms and the words for the answer."""

    refs: tuple[AdapterRef, ...] = ()
    label: str | list[dict[str, str | float]] | None = None


def version_digest(folder: Path) -> str:
    """SHA-256 (hex) that names an adapter's content, whatever its folder or its name.

    Over both files' names and their own SHA-256 sums, in a fixed order. Raises CatalogError when a
    file is missing.
    """
    total = hashlib.sha256()
    for name in ADAPTER_FILES:
        path = folder / name
        if not path.is_file():
            raise CatalogError(
                f"{folder} has no {name}: a PEFT adapter folder holds {' and '.join(ADAPTER_FILES)}"
            )
        with path.open("rb") as file:
            total.update(name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def find_adapters(named: Sequence[tuple[str, str]], parent: str) -> list[tuple[str, Path]]:
    """`(name, folder)` of the adapters given by name and of those in subfolders of `parent`."""
    found = [(name, Path(folder).expanduser()) for name, folder in named]
    if parent:
        root = Path(parent).expanduser()
        if not root.is_dir():
            raise CatalogError(f"--adapters-dir: {root} is not a folder")
        found += [(path.parent.name, path.parent) for path in sorted(root.glob("*/adapter_config.json"))]
    return found


class Catalog:
    """The adapters that this server knows. In memory; filled at start, read by every request.

    Raises CatalogError for a name that is not allowed, is taken, or has no complete folder.
    """

    def __init__(self, base_name: str, adapters: Iterable[tuple[str, Path]] = ()) -> None:
        self.base_name = base_name
        self._versions: dict[str, AdapterVersion] = {}
        self._loaded: dict[str, AdapterLoaded] = {}
        for name, folder in adapters:
            self._add(name, folder)

    def _add(self, name: str, folder: Path) -> None:
        if _NAME.fullmatch(name) is None:
            raise CatalogError(
                f"adapter name {name!r}: use up to 64 letters, digits, '.', '_', '-', no sign first"
            )
        if name == self.base_name:
            raise CatalogError(f"adapter name {name!r} is the base's own name: choose another")
        if name in self._versions:
            raise CatalogError(f"adapter name {name!r} is given twice: each name stands for one adapter")
        if not folder.is_dir():
            raise CatalogError(f"adapter {name!r}: {folder} is not a folder")
        self._versions[name] = AdapterVersion(name, version_digest(folder), folder.resolve())

    def __iter__(self) -> Iterator[AdapterVersion]:
        return iter(self._versions.values())

    def __len__(self) -> int:
        return len(self._versions)

    def loads(self) -> list[LoadAdapter]:
        """One message for each distinct version, for a new engine."""
        folders = {version.digest: str(version.folder) for version in self}
        return [LoadAdapter(digest, folder) for digest, folder in folders.items()]

    def mark_loaded(self, answer: AdapterLoaded) -> None:
        self._loaded[answer.digest] = answer

    def mark_unloaded(self, digest: str | None = None) -> None:
        """Forget what the engine said about one version, or (None) about all: it is gone."""
        if digest is None:
            self._loaded.clear()
        else:
            self._loaded.pop(digest, None)

    def loaded(self, version: AdapterVersion) -> AdapterLoaded | None:
        """What the engine said when it loaded this version; None while it has not."""
        return self._loaded.get(version.digest)

    def names_of(self, digest: str) -> list[str]:
        return [version.name for version in self if version.digest == digest]

    def find(self, reference: str, *, param: str = "adapter") -> AdapterVersion:
        """The version for `name`, `name@digest` or `name@prefix` (8 hexadecimal digits or more).

        Raises UnknownAdapterError, saying what is known.
        """
        name, separator, wanted = reference.partition("@")
        version = self._versions.get(name)
        if version is None:
            known = ", ".join(sorted(self._versions)[:20]) or "none is loaded"
            raise UnknownAdapterError(f"There is no adapter {name[:80]!r}. Known: {known}.", param=param)
        if separator and (len(wanted) < _LEAST_PREFIX or not version.digest.startswith(wanted)):
            raise UnknownAdapterError(
                f"Adapter {name!r} has no version {wanted[:80]!r}: its active version is {version.digest}. "
                f"Give that, or a beginning of at least {_LEAST_PREFIX} digits.",
                param=param,
            )
        return version

    def require_loaded(self, choice: AdapterChoice) -> None:
        """Raises UnavailableError when a restarted engine could not take one of the versions back."""
        for ref in choice.refs:
            if ref.digest not in self._loaded:
                names = ", ".join(self.names_of(ref.digest))
                raise UnavailableError(
                    f"Adapter {names} could not be loaded again after the engine restarted.",
                    code="adapter_unavailable",
                    retry_after=30.0,
                )

    def choose(self, reference: str, *, param: str = "adapter") -> AdapterChoice:
        version = self.find(reference, param=param)
        return AdapterChoice((AdapterRef(version.digest),), version.label)

    def choose_sum(self, terms: Sequence[tuple[str, float]]) -> AdapterChoice:
        """The weighted sum of several adapters' deltas; the engine adds up duplicates."""
        versions = [
            (self.find(name, param=f"adapter[{index}].name"), weight)
            for index, (name, weight) in enumerate(terms)
        ]
        refs = tuple(AdapterRef(version.digest, weight) for version, weight in versions)
        return AdapterChoice(
            refs, [{"name": version.label, "weight": weight} for version, weight in versions]
        )
