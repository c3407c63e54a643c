"""The life of an adapter and of a training file as a list of operations on a store and a registry, and what
must hold at any moment.

The tests that kill processes and fill disks run it, stop it somewhere, and look at what is left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

from onebase_adapters.registry import FileRecord, Registry
from onebase_adapters.store.blobs import AdapterFiles, Blob, store_errors
from onebase_adapters.store.local import FileSystem
from onebase_adapters.store.store import Store

CONTENTS = {
    name: hashlib.sha256(name.encode()).digest() * 3_000 for name in ("weights1", "weights2", "prepared1")
}
CONFIG = b'{"peft_type": "LORA"}'

Observed = list[Any]


class Life:
    """Operations by index; each may be run again after it failed, from the start of that operation."""

    def __init__(
        self, folder: Path, files: FileSystem | None = None, step: Callable[..., None] | None = None
    ) -> None:
        """`step` is called after each statement of the registry that writes, and around each commit."""
        self.store = Store(str(folder / "store"), folder / "cache", files=files)
        self.registry = Registry(f"sqlite:///{folder / 'registry.db'}", base_id="base", base_name="base")
        if step is not None:
            _call_at_writes(self.registry._database.engine, step)
        self.registry.migrate()
        self.files: dict[int, AdapterFiles] = {}
        self.operations: list[Callable[[], object]] = [
            lambda: self.upload(1),
            lambda: self.register(1),
            lambda: self.prove(1),
            lambda: self.registry.activate("default", "a", self.files[1].digest),
            lambda: self.upload(2),
            lambda: self.register(2),
            lambda: self.prove(2),
            lambda: self.registry.activate("default", "a", self.files[2].digest),
            lambda: self.registry.rollback("default", "a"),
            lambda: self.add_file(self.files[2].weights),
            lambda: self.remove(2),
            lambda: self.remove_file(),
            lambda: self.put(CONTENTS["weights2"]),
            lambda: self.store.sweep(self.registry.referenced_blobs(), 0.0),
        ]

    def put(self, content: bytes) -> Blob:
        with self.store.writer() as writer:
            half = len(content) // 2
            writer.write(content[:half])
            writer.write(content[half:])
            return writer.commit()

    def upload(self, number: int) -> None:
        """Both versions have the same config: one blob."""
        weights = self.put(CONTENTS[f"weights{number}"])
        self.files[number] = AdapterFiles(self.put(CONFIG), weights)

    def register(self, number: int) -> None:
        files = self.files[number]
        self.registry.add_version("a", files.digest, files, {"kind": "upload"})

    def prove(self, number: int) -> None:
        """The second version's prepared file is as large as the first's, and another."""
        path = self.store.scratch() / f"prepared-{number}"
        with store_errors("preparing"):
            path.write_bytes(CONTENTS["prepared1"] + bytes([number]))
        prepared = self.store.add_file(path, move=True)
        digest = self.files[number].digest
        self.registry.set_state("default", "a", digest, "ready", report={"rank": 8}, prepared=prepared)

    def remove(self, number: int) -> None:
        for sha256 in self.registry.delete_version("default", "a", self.files[number].digest):
            self.store.delete(sha256, older_than=0.0)

    def add_file(self, blob: Blob) -> None:
        """Its content is that of the second version's weights: one blob."""
        self.registry.training.add_file(
            FileRecord("file-1", "default", "s1", "fine-tune", "a.jsonl", blob.size, 1.0, blob.sha256)
        )

    def remove_file(self) -> None:
        for sha256 in self.registry.training.delete_file("default", "file-1"):
            self.store.delete(sha256, older_than=0.0)

    def close(self) -> None:
        self.registry.close()


def _call_at_writes(engine: Engine, step: Callable[..., None]) -> None:
    committed = []

    def executed(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if not statement.startswith(("SELECT", "PRAGMA", "BEGIN")):
            step()

    def committing(_connection: object) -> None:
        committed.append(True)
        step()

    def given_back(*_: object) -> None:
        if committed:
            committed.clear()
            step()

    event.listen(engine, "after_cursor_execute", executed)
    event.listen(engine, "commit", committing)
    event.listen(engine, "checkin", given_back)


def observe(registry: Registry) -> Observed:
    """What the registry says, without times, as JSON would hold it."""
    files = [[file.id, file.sha256] for file in registry.training.files("default", limit=9)]
    return files + [
        [
            record.name,
            record.active,
            [
                [version.digest, version.state, version.prepared and version.prepared.sha256]
                for version in record.versions
            ],
            [[entry.action, entry.version, entry.previous] for entry in registry.history("default", "a")],
        ]
        for record in registry.snapshot()
    ]


def states(folder: Path) -> list[Observed]:
    """What is observed before the first operation and after each, when nothing goes wrong."""
    folder.mkdir()
    life = Life(folder)
    seen = [observe(life.registry)]
    for operation in life.operations:
        operation()
        seen.append(observe(life.registry))
    life.close()
    return seen


def check(folder: Path, allowed: list[Observed]) -> None:
    """Open what is there as a new server would. The registry is in one of the allowed states, every blob that
    it names is whole, no half file has a blob's name, and a sweep leaves exactly what is referenced."""
    life = Life(folder)
    found = observe(life.registry)
    assert found in allowed, f"{found} is none of {allowed}"
    referenced = life.registry.referenced_blobs()
    for sha256 in referenced:
        life.store.check_blob(sha256)
    blobs = folder / "store" / "blobs"
    for path in blobs.iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    life.store.sweep(referenced, 0.0)
    assert {path.name for path in blobs.iterdir()} == referenced
    assert not list(life.store.scratch().iterdir())
    life.close()
