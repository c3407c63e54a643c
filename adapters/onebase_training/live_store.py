"""Folders of live adapters: operations that are to be done, their results, points to continue from, and
checkpoints.

One file holds one operation or one result, and is whole and on the disk before anybody is told of it. The
server writes specs and operations, the trainer the rest, so that either may be killed at any moment: the
files say what was accepted, and what was done.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, TypeVar

import msgspec

from onebase_adapters.store.atomic_files import atomic_directory, replace_synced, sync
from onebase_training.live_operations import (
    CHECKPOINT_NAME,
    MODEL_ID,
    CheckpointFolder,
    Kind,
    ModelSpec,
    Operation,
    Refuse,
    Result,
)

RESULTS_KEPT = 1024
"""Number of a model's newest results that can be asked for. Older ones stay until a point covers them."""
MOST_MODELS = 64
"""Largest number of models of one owner that are trained at once."""
_BACKUP_TRIES = 5
CHECKPOINT, RESULT = "checkpoint.json", "result"
PACKED = "packed.safetensors"
"""File of a checkpoint that the engine loads."""
EXPIRY = "expiry-"
"""Start of the names of files that hold when a checkpoint expires; the save's number follows."""
ENCRYPTED = ".age"
"""End of the names of files that are encrypted."""
START = "start"
"""Folder of a model with the files of the adapter that it began with."""
_SPEC, _REMOVED, _MADE, _BEGUN = "model.json", "removed.json", "made.json", ".begun"
_KINDS: tuple[Kind, ...] = ("weights", "sampler", "external")
_encode = msgspec.msgpack.Encoder(order="deterministic").encode
_operations: msgspec.msgpack.Decoder[Operation] = msgspec.msgpack.Decoder(Operation)
_results: msgspec.msgpack.Decoder[Result] = msgspec.msgpack.Decoder(Result)
T = TypeVar("T", covariant=True)


class Decoder(Protocol[T]):
    """Decoder of msgspec for one type."""

    def decode(self, content: bytes, /) -> T: ...


class UnknownLiveModelError(KeyError):
    """There is no such live adapter."""

    def __str__(self) -> str:
        return f"There is no training model {self.args[0]!r}, or it was unloaded."


class UnknownCheckpointError(KeyError):
    """There is no such checkpoint, or it has expired."""

    def __str__(self) -> str:
        return f"There is no checkpoint {'/'.join(self.args)}, or it has expired."


class OtherBaseError(ValueError):
    """The live adapter or checkpoint belongs to another base than that of the store."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name!r} was trained on another base than the one that is served: start the server with that "
            "base to use it"
        )


class SequenceConflictError(ValueError):
    """Another operation was accepted under this number."""


class ModelRefusedError(ValueError):
    """The live adapter cannot be made as it was asked for; the message says why."""


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome of a spec. `refused`: reason why the trainer made no model, or "". `parameters`: number of
    trained parameters."""

    refused: str = ""
    targets: list[str] = []
    parameters: int = 0


class _Expiry(msgspec.Struct, frozen=True):
    """Unix time at which a save expires, in place of the one that it was saved with; None: never."""

    expires: float | None


class LiveStore:
    """All live adapters of one server, each in a folder of its name. Methods raise OSError; those that take a
    model's id, UnknownLiveModelError.

    base_id: identity of the base that is trained. Adapters of other bases stay as they are.
    """

    def __init__(self, root: Path, base_id: str = "") -> None:
        self.root = root
        self.base_id = base_id
        self._lock = threading.Lock()
        self._creating = threading.Lock()
        """Lock of `create` alone, which may copy a whole adapter."""

    # ---- models ------------------------------------------------------------------------------

    def folder(self, model_id: str) -> Path:
        """Return the folder of a model, which may not exist."""
        if not MODEL_ID.fullmatch(model_id):
            raise UnknownLiveModelError(model_id)
        return self.root / model_id

    def create(self, spec: ModelSpec, files: Mapping[str, Path] = MappingProxyType({})) -> None:
        """Accept a model. The same spec may come again.

        files: those of the version that the model begins with, by name.

        Raises SequenceConflictError: there is, or was, another one with this id; ModelRefusedError: its owner
        has as many as may be trained at once.
        """
        folder, spec = self.folder(spec.id), msgspec.structs.replace(spec, base_id=self.base_id)
        with self._creating:
            for name in (_SPEC, _REMOVED):
                if (folder / name).exists():
                    if name == _SPEC and _same(self.spec(spec.id), spec):
                        return
                    raise SequenceConflictError(f"there is another training model {spec.id!r}")
            if sum(one.owner == spec.owner for one in self.models()) >= MOST_MODELS:
                raise ModelRefusedError(
                    f"{MOST_MODELS} runs of this tenant are trained already: end a session of them first"
                )
            for part in ("operations", "results", "points", *_KINDS):
                (folder / part).mkdir(parents=True, exist_ok=True)
            if files:
                with atomic_directory(folder / START) as work:
                    for name, path in files.items():
                        _link(path, work / name)
            _write(folder / _SPEC, msgspec.json.encode(spec))
            sync(self.root)

    def models(self) -> list[ModelSpec]:
        """Return the models that are trained, oldest first."""
        return [spec for spec in self.runs() if self.is_live(spec.id)]

    def runs(self) -> list[ModelSpec]:
        """Return the base's models that were ever made, unloaded ones included, oldest first."""
        return [spec for spec in self._specs() if spec.base_id == self.base_id]

    def check_base(self, found: ModelSpec | CheckpointFolder) -> None:
        """Raise OtherBaseError if a model or a checkpoint is not of this base."""
        if found.base_id != self.base_id:
            raise OtherBaseError(found.id if isinstance(found, ModelSpec) else found.name)

    def _specs(self) -> list[ModelSpec]:
        """Return the models of all bases that have a folder, oldest first."""
        names = os.listdir(self.root) if self.root.is_dir() else []
        found = []
        for name in names:
            with suppress(UnknownLiveModelError):
                found.append(self.spec(name))
        return sorted(found, key=lambda spec: (spec.created, spec.id))

    def is_live(self, model_id: str) -> bool:
        """Return True if the model exists and was not unloaded."""
        return (self.folder(model_id) / _SPEC).exists()

    def spec(self, model_id: str) -> ModelSpec:
        """Return the spec of a model, which may be unloaded."""
        for name in (_SPEC, _REMOVED):
            with suppress(FileNotFoundError):
                return msgspec.json.decode((self.folder(model_id) / name).read_bytes(), type=ModelSpec)
        raise UnknownLiveModelError(model_id)

    def made(self, model_id: str) -> Made | None:
        """Return what the trainer made of the spec; None if it did not come to it yet."""
        return _read(self.folder(model_id) / _MADE, msgspec.json.Decoder(Made))

    def write_made(self, model_id: str, made: Made) -> None:
        """Record what was made of the spec."""
        _write(self.folder(model_id) / _MADE, msgspec.json.encode(made))

    def unload(self, model_id: str) -> None:
        """End a model: nothing of it is done any more, and only its checkpoints stay. Of one that was removed
        nothing does."""
        folder = self.folder(model_id)
        with self._lock:
            with suppress(FileNotFoundError):
                replace_synced(folder / _SPEC, folder / _REMOVED)
            for part in ("operations", "results", "points"):
                shutil.rmtree(folder / part, ignore_errors=True)
            with suppress(OSError):  # it has other files
                folder.rmdir()

    def remove(self, model_id: str) -> None:
        """End a model and delete its checkpoints."""
        self.unload(model_id)
        shutil.rmtree(self.folder(model_id), ignore_errors=True)

    def back_up(self, target: Path) -> None:
        """Copy all models to a folder that is not there, while they are trained. Raises OSError."""
        for spec in self._specs():
            for _ in range(_BACKUP_TRIES):
                point = self.last_point(spec.id)
                shutil.rmtree(target / spec.id, ignore_errors=True)
                with suppress(FileNotFoundError, shutil.Error):  # a point was written meanwhile
                    _copy_model(self.folder(spec.id), target / spec.id)
                    if self.last_point(spec.id) == point:
                        break
            else:
                raise OSError(f"training model {spec.id} changes faster than it is copied")

    # ---- operations and results --------------------------------------------------------------

    def submit(self, model_id: str, seq_id: int, operation: Operation) -> None:
        """Accept an operation: it is on the disk when this returns. The same one may come again, and one that
        is refused now, or was before, stays as it was accepted first: what it is refused for may change.

        Raises:
            SequenceConflictError: another operation was accepted under this number. That is not noticed once
                a point covers it.
            OtherBaseError: the model is not of this base.
        """
        if seq_id < 1:
            raise SequenceConflictError(f"seq_id is {seq_id}: a model's operations are numbered from 1")
        path = self._path(model_id, "operations", seq_id)
        with self._lock:
            if not self.is_live(model_id):
                raise UnknownLiveModelError(model_id)
            self.check_base(self.spec(model_id))
            is_done = seq_id < self.next_seq(model_id)
            with suppress(FileNotFoundError):
                before = _operations.decode(path.read_bytes())  # NaN is equal to itself as bytes alone
                is_refused = isinstance(operation, Refuse) or isinstance(before, Refuse)
                if not is_refused and before != operation and _encode(before) != _encode(operation):
                    raise SequenceConflictError(
                        f"seq_id {seq_id} of model {model_id} was accepted as another operation"
                    )
                return
            if not is_done:
                _write(path, _encode(operation))

    def operation(self, model_id: str, seq_id: int) -> Operation | None:
        """Return an operation that was accepted; None if it was not, or a point covers it."""
        return _read(self._path(model_id, "operations", seq_id), _operations)

    def operation_bytes(self, model_id: str, seq_id: int) -> int:
        """Return the size of an operation that was accepted; 0 if it was not, or a point covers it."""
        try:
            return self._path(model_id, "operations", seq_id).stat().st_size
        except FileNotFoundError:
            return 0

    def has_next(self, model_id: str) -> bool:
        """Return True if the next operation was accepted."""
        return self._path(model_id, "operations", self.next_seq(model_id)).exists()

    def result(self, model_id: str, seq_id: int) -> Result | None:
        """Return a kept result, or None."""
        return _read(self._path(model_id, "results", seq_id), _results)

    def write_result(self, model_id: str, seq_id: int, result: Result) -> None:
        """Record a result: the operation is done when this returns."""
        _write(self._path(model_id, "results", seq_id), _encode(result))
        old, point = seq_id - RESULTS_KEPT, self.last_point(model_id)
        if old <= point or point < 0:  # else it says whether the operation is done over; -1: none ever is
            self._path(model_id, "results", old).unlink(missing_ok=True)

    def write_begun(self, model_id: str, seq_id: int) -> None:
        """Record the operation that is being done now, for whoever finds that its process has died.

        Number 0 stands for the model itself, while it is made or continued.
        """
        (self.root / _BEGUN).write_text(f"{model_id} {seq_id}")

    def forget_begun(self) -> None:
        """Record that nothing is being done."""
        (self.root / _BEGUN).unlink(missing_ok=True)

    def died_of(self) -> tuple[str, int] | None:
        """Return the operation that was begun last, if it has no result; number 0: the model itself."""
        with suppress(FileNotFoundError, ValueError, UnknownLiveModelError):
            model_id, seq_id = (self.root / _BEGUN).read_text().split()
            if self.is_live(model_id) and (seq_id == "0" or self.last_result(model_id) < int(seq_id)):
                return model_id, int(seq_id)
        return None

    def next_seq(self, model_id: str) -> int:
        """Return the number of the next operation to be done."""
        return max(self.last_result(model_id), self.last_point(model_id)) + 1

    def last_result(self, model_id: str) -> int:
        """Return the number of the newest result, or 0."""
        return max(_numbers(self.folder(model_id) / "results"), default=0)

    def expired(self, model_id: str, seq_id: int) -> bool:
        """Return True if an operation was done whose result is no longer kept."""
        is_done = 1 <= seq_id <= self.last_result(model_id)
        return is_done and not self._path(model_id, "results", seq_id).exists()

    def _path(self, model_id: str, part: str, seq_id: int) -> Path:
        return self.folder(model_id) / part / f"{seq_id:08d}"

    # ---- points ------------------------------------------------------------------------------

    def point(self, model_id: str, seq_id: int) -> Path:
        """Return the folder of the state after an operation; 0: after the model was made."""
        return self._path(model_id, "points", seq_id)

    def last_point(self, model_id: str) -> int:
        """Return the number of the operation after which the newest point was written, or -1."""
        return max(_numbers(self.folder(model_id) / "points"), default=-1)

    def complete(self, model_id: str) -> None:
        """Write the result that only the newest point has, because its writer was killed meanwhile."""
        seq_id = self.last_point(model_id)
        if seq_id > 0 and not self._path(model_id, "results", seq_id).exists():
            result = _read(self.point(model_id, seq_id) / RESULT, _results)
            if result is not None:
                self.write_result(model_id, seq_id, result)

    def forget_before(self, model_id: str, seq_id: int) -> None:
        """Delete older points than this one, the operations that it covers, and their results but the newest
        RESULTS_KEPT of the model."""
        for number in _numbers(self.folder(model_id) / "points"):
            if number < seq_id:
                shutil.rmtree(self.point(model_id, number), ignore_errors=True)
        for number in _numbers(self.folder(model_id) / "operations"):
            if number <= seq_id:
                self._path(model_id, "operations", number).unlink(missing_ok=True)
        old = max(seq_id, self.last_result(model_id)) - RESULTS_KEPT
        for number in _numbers(self.folder(model_id) / "results"):
            if number <= min(seq_id, old):
                self._path(model_id, "results", number).unlink(missing_ok=True)

    # ---- checkpoints -------------------------------------------------------------------------

    def checkpoint_folder(self, model_id: str, kind: Kind, name: str) -> Path:
        """Return the folder of a checkpoint, which may not exist. Raises UnknownCheckpointError."""
        if kind not in _KINDS or not CHECKPOINT_NAME.fullmatch(name):
            raise UnknownCheckpointError(model_id, kind, name)
        return self.folder(model_id) / kind / name

    def checkpoint(self, model_id: str, kind: Kind, name: str) -> CheckpointFolder:
        """Return a checkpoint. Raises UnknownCheckpointError."""
        found = read_checkpoint(self.checkpoint_folder(model_id, kind, name))
        if found is None:
            raise UnknownCheckpointError(model_id, kind, name)
        return found

    def checkpoints(self, model_id: str) -> list[CheckpointFolder]:
        """Return all checkpoints of a model, oldest first."""
        return sorted(self._checkpoints(model_id), key=lambda one: (one.created, one.seq_id))

    def _checkpoints(self, model_id: str) -> Iterator[CheckpointFolder]:
        for kind in _KINDS:
            place = self.folder(model_id) / kind
            for name in os.listdir(place) if place.is_dir() else ():
                found = None if name.startswith(".") else read_checkpoint(place / name)
                if found is not None:
                    yield found

    def set_ttl(self, model_id: str, kind: Kind, name: str, expires: float | None) -> None:
        """Set when a checkpoint expires, in Unix seconds; None: never. Raises UnknownCheckpointError.

        The time goes into a file that is named after the save. The trainer may replace the folder at any
        moment, and what is written late then changes nothing of the new save.
        """
        with self._lock:
            found = self.checkpoint(model_id, kind, name)
            try:
                path = Path(found.folder) / f"{EXPIRY}{found.seq_id}.json"
                _write(path, msgspec.json.encode(_Expiry(expires)))
            except FileNotFoundError:  # it was saved over, or deleted, for which this raises
                self.checkpoint(model_id, kind, name)

    def delete_checkpoint(self, model_id: str, kind: Kind, name: str) -> None:
        """Delete a checkpoint. Raises UnknownCheckpointError."""
        folder = self.checkpoint_folder(model_id, kind, name)
        with self._lock:  # `set_ttl` writes into no folder without a checkpoint
            self.checkpoint(model_id, kind, name)
            (folder / CHECKPOINT).unlink(missing_ok=True)  # from here on there is none
        shutil.rmtree(folder, ignore_errors=True)


def read_checkpoint(folder: Path) -> CheckpointFolder | None:
    """Return the checkpoint in a folder, which may have moved, or None."""
    found = _read(folder / CHECKPOINT, msgspec.json.Decoder(CheckpointFolder))
    if found is None:
        return None
    changed = _read(folder / f"{EXPIRY}{found.seq_id}.json", msgspec.json.Decoder(_Expiry))
    expires = found.expires if changed is None else changed.expires
    return msgspec.structs.replace(found, folder=str(folder), expires=expires)


def encoded(result: Result) -> bytes:
    """Return a result as its file has it."""
    return _encode(result)


def _copy_model(folder: Path, target: Path) -> None:
    """Copy a model's folder. A result is copied before its operation, which was there before it."""
    target.mkdir(parents=True)
    for part in (folder / name for name in ("results", "operations", "points", START, *_KINDS)):
        if part.is_dir():
            shutil.copytree(part, target / part.name, ignore=shutil.ignore_patterns(".*"))
    for path in folder.glob("*.json"):
        shutil.copyfile(path, target / path.name)


def _link(path: Path, target: Path) -> None:
    """Give a file that nobody changes a second place, by a copy where there are no links. Raises OSError."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def _same(one: ModelSpec, other: ModelSpec) -> bool:
    return msgspec.structs.replace(one, created=0.0, key="") == msgspec.structs.replace(
        other, created=0.0, key=""
    )


def _write(path: Path, content: bytes) -> None:
    work = path.with_name(f".{path.name}.part")
    with work.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    replace_synced(work, path)


def _read(path: Path, decoder: Decoder[T]) -> T | None:
    try:
        return decoder.decode(path.read_bytes())
    except FileNotFoundError:
        return None


def _numbers(folder: Path) -> Iterator[int]:
    """Yield the numbers that are names in a folder; none if it is gone."""
    with suppress(FileNotFoundError):
        for name in os.listdir(folder):
            if name.isdigit():
                yield int(name)
