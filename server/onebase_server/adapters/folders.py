"""Adapters in folders of this machine: those given at start, and those that vLLM's route names."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from onebase_adapters.registry import VersionRecord
from onebase_adapters.store.content import ADAPTER_FILES, CONFIG_FILE, VersionFiles, version_digest
from onebase_server.adapters.activation import Activation
from onebase_server.adapters.names import check_name
from onebase_server.adapters.service import Library, Wishes
from onebase_server.errors import ConflictError, InvalidRequestError, OneBaseError, PayloadTooLargeError
from onebase_server.http.uploads import MAX_CONFIG_BYTES
from onebase_server.processes.supervisor import AdapterStartError
from onebase_server.storage_errors import storage_errors

STARTUP_ACTOR = "startup"
"""Who activates what was given at start."""

_log = logging.getLogger(__name__)


class FolderError(ValueError):
    """A folder that holds no adapter, or a name that cannot be used; the message says which and why."""


def find_adapters(named: Sequence[tuple[str, str]], parent: str, base_name: str) -> list[tuple[str, Path]]:
    """`(name, folder)` of the adapters given by name and of those in subfolders of `parent`.

    Raises FolderError for a name that is not allowed or is given twice, and for a folder that lacks a file.
    """
    found = [(name, Path(folder).expanduser()) for name, folder in named]
    if parent:
        root = Path(parent).expanduser()
        if not root.is_dir():
            raise FolderError(f"--adapters-dir: {root} is not a folder")
        found += [(path.parent.name, path.parent) for path in sorted(root.glob("*/adapter_config.json"))]
    names: set[str] = set()
    for name, folder in found:
        try:
            check_name(name, base_name)
        except InvalidRequestError as error:
            raise FolderError(f"adapter {error.message}") from error
        if name in names:
            raise FolderError(f"adapter name {name!r} is given twice: each name stands for one adapter")
        names.add(name)
        check_folder(name, folder)
    return found


def check_folder(name: str, folder: Path) -> None:
    """Raises FolderError unless the folder has both files."""
    if not folder.is_dir():
        raise FolderError(f"adapter {name!r}: {folder} is not a folder")
    for file in ADAPTER_FILES:
        if not (folder / file).is_file():
            raise FolderError(
                f"{folder} has no {file}: a PEFT adapter folder holds {' and '.join(ADAPTER_FILES)}"
            )


class Folders:
    """Brings folders into the library. `given`: those to be served before the server is ready."""

    def __init__(
        self, library: Library, activation: Activation, given: Sequence[tuple[str, Path]], max_bytes: int
    ) -> None:
        self._library = library
        self._activation = activation
        self._given = list(given)
        self._max_bytes = max_bytes

    async def serve_given(self) -> None:
        """Import, prove and activate the folders given at start. Raises AdapterStartError."""
        added: list[tuple[str, VersionRecord]] = []
        for name, folder in self._given:
            try:
                added.append(
                    (name, await self.add(name, folder, actor=STARTUP_ACTOR, wait_for_verifier=False))
                )
            except OneBaseError as error:
                raise _cannot_serve(name, error.code, error.message) from error
        for name, version in added:
            try:
                await self._serve(await self._library.wait(name, version.digest))
            except OneBaseError as error:
                raise _cannot_serve(name, error.code, error.message) from error

    async def add(
        self, name: str, folder: Path, *, actor: str, wait_for_verifier: bool = True
    ) -> VersionRecord:
        """Register a folder's content under a name, unless it is known already.

        Raises VersionFailedError, PayloadTooLargeError, InvalidRequestError, StoreFullError,
        UnavailableError.
        """
        record = self._library.catalog.get(name)
        if record is not None:
            with _readable(name, folder):
                digest = await self._library.disk.run(_digest, folder)
            known = record.version(digest)
            if known is not None and known.state == "ready":
                return known
        with _readable(name, folder):
            config = await self._library.disk.run(_read_config, folder, self._max_bytes)
        try:
            await self._library.check_config(name, config, Wishes())
        except ConflictError as error:
            _log.warning("%s It is served all the same, since its folder was given by name.", error.message)
        with _readable(name, folder), storage_errors(name):
            files = await self._library.disk.run(self._take, folder)
        return await self._library.add(
            name,
            files,
            {"kind": "folder"},
            Wishes(any_base=True),
            actor=actor,
            wait_for_verifier=wait_for_verifier,
        )

    def _take(self, folder: Path) -> VersionFiles:
        config, weights = (self._library.store.add_file(folder / file) for file in ADAPTER_FILES)
        return VersionFiles(config, weights)

    async def _serve(self, version: VersionRecord) -> None:
        """Activate what was given at start, unless somebody has chosen another version since."""
        if version.error is not None:
            raise _cannot_serve(version.name, version.error.code, version.error.message)
        if version.state != "ready":
            raise _cannot_serve(
                version.name, "not_proved", "there is no verifier to prove it; the log says why"
            )
        record = self._library.catalog.adapter(version.name)
        if record.active == version.digest:
            return
        history = await self._activation.history(version.name)
        chosen = bool(history) and history[0].actor != STARTUP_ACTOR
        known_before = any(entry.version == version.digest for entry in history)
        if chosen and known_before:
            _log.warning(
                "adapter %s: the version in its folder is %s, but %s was chosen since and stays active",
                version.name,
                version.digest[:12],
                record.active or "none",
            )
            return
        await self._activation.activate(version.name, version.digest, actor=STARTUP_ACTOR)


def _digest(folder: Path) -> str:
    """The digest of a folder's content, without taking it in."""
    sums = []
    for file in ADAPTER_FILES:
        with (folder / file).open("rb") as opened:
            sums.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return version_digest(*sums)


def _read_config(folder: Path, max_bytes: int) -> bytes:
    config = folder / CONFIG_FILE
    if sum((folder / file).stat().st_size for file in ADAPTER_FILES) > max_bytes:
        raise PayloadTooLargeError(max_bytes, "--max-upload")
    if config.stat().st_size > MAX_CONFIG_BYTES:
        raise InvalidRequestError(f"{config} is over {MAX_CONFIG_BYTES} bytes, which no PEFT config is.")
    return config.read_bytes()


@contextmanager
def _readable(name: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidRequestError(f"Adapter {name!r} in {folder} cannot be read: {error}.") from error


def _cannot_serve(name: str, code: str, message: str) -> AdapterStartError:
    return AdapterStartError(f"adapter {name} cannot be served ({code}): {message}")
