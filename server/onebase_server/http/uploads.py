"""An adapter's two files and some fields as multipart/form-data, straight into the store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onebase_adapters.store.content import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE, VersionFiles
from onebase_adapters.store.store import BlobWriter, Store
from onebase_server.errors import InvalidRequestError
from onebase_server.http.multipart import FormReader, Write
from onebase_server.settings import SettingsError, parse_bool

MAX_CONFIG_BYTES = 1 << 20
FLAGS = ("activate", "allow_noop", "any_base")
_FILES_FIELD = "files"
HOW = f"Send a field name and two parts called {_FILES_FIELD}, with file names {' and '.join(ADAPTER_FILES)}."


@dataclass(frozen=True)
class Upload:
    """What one upload brought: the fields, the config as it was sent, and the blobs once committed."""

    name: str
    flags: dict[str, bool]
    config: bytes
    commit: Callable[[], VersionFiles]
    """Makes the files part of the store; call it in a thread. Raises StoreFullError, StoreError."""


class Form(FormReader[Upload]):
    """Writes both files as they come. What was not committed is gone after `close`.

    Raises also StoreFullError, StoreError.
    """

    def __init__(self, store: Store, boundary: bytes, limit: int) -> None:
        self._store = store
        self._config = bytearray()
        self._writers: dict[str, BlobWriter] = {}
        super().__init__(boundary, limit=limit, option="--max-upload", how=HOW)

    def begin_part(self, field: str, filename: str | None) -> Write | None:
        if field == _FILES_FIELD:
            return self._begin_file(filename or "")
        return self.plain_field(field) if field == "name" or field in FLAGS else None

    def result(self) -> Upload:
        missing = [name for name in ADAPTER_FILES if name not in self._writers]
        if missing:
            raise InvalidRequestError(f"files: {missing[0]} is missing. {HOW}", param=_FILES_FIELD)
        name = self.text("name")
        flags = {flag: self._flag(flag) for flag in FLAGS if flag in self.fields}
        return Upload(name, flags, bytes(self._config), self._commit)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.abort()

    def _commit(self) -> VersionFiles:
        config, weights = (self._writers[name].commit() for name in ADAPTER_FILES)
        return VersionFiles(config, weights)

    def _begin_file(self, name: str) -> Write:
        if name not in ADAPTER_FILES:
            raise InvalidRequestError(
                f"files: {name[:80]!r} is not one of the two files of an adapter. {HOW}", param=_FILES_FIELD
            )
        if name in self._writers:
            raise InvalidRequestError(f"files: {name} is there twice. Send it once.", param=_FILES_FIELD)
        writer = self._writers[name] = self._store.writer()
        return writer.write if name == WEIGHTS_FILE else self._write_config

    def _write_config(self, data: memoryview) -> None:
        if len(self._config) + len(data) > MAX_CONFIG_BYTES:
            raise InvalidRequestError(
                f"files: {CONFIG_FILE} is over {MAX_CONFIG_BYTES} bytes, which no PEFT config is.",
                param=_FILES_FIELD,
            )
        self._config += data
        self._writers[CONFIG_FILE].write(data)

    def _flag(self, field: str) -> bool:
        try:
            return parse_bool(self.text(field))
        except SettingsError as error:
            raise InvalidRequestError(f"{field}: {error}.", param=field) from error
