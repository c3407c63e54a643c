"""Live training for clients: sessions, runs, their requests in order, checkpoints and samplers.

A run is one adapter that a client trains step by step. What it accepted, its results and its checkpoints are
files of the trainer (`onebase_training.live_store`); this service says who may ask for them.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import re
import secrets
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, Protocol, TypeVar

import msgspec

from onebase_adapters.registry import (
    LiveRecords,
    LiveSampler,
    LiveSession,
    Origin,
    RegistryError,
    RegistryFullError,
    acting,
)
from onebase_adapters.registry.records import AuditAction
from onebase_adapters.store.atomic_files import replace_synced
from onebase_adapters.store.blobs import ADAPTER_FILES, FULL
from onebase_adapters.store.store import StoreError
from onebase_edge.background import Threads
from onebase_edge.errors import (
    AdapterNotFoundError,
    ApiError,
    DiskFullError,
    ForbiddenError,
    InsufficientScopeError,
    InvalidRequestError,
    LiveNotFoundError,
    QuotaSpentError,
    ResultGoneError,
    StateConflictError,
    UnavailableError,
    VersionFailedError,
    status_of,
)
from onebase_engine.engine.messages import AdapterRef
from onebase_server.adapters.catalog import AdapterChoice, VersionRef, is_checkpoint, same_base
from onebase_server.adapters.residency import PackedAdapterFiles, Residency
from onebase_server.adapters.service import AdapterService, VersionOptions
from onebase_server.adapters.sources import take_folder
from onebase_server.jobs.checkpoints import CheckpointModels
from onebase_server.live.sampling import VERSIONS
from onebase_server.processes.live_client import LiveTrainer
from onebase_server.requests.planner import check_generates
from onebase_server.storage.calls import storage_errors
from onebase_server.tenancy.access import Caller
from onebase_server.tenancy.usage import TenantUsageRecorder
from onebase_training.live_operations import (
    CHECKPOINT_NAME,
    CheckpointFolder,
    Computed,
    Kind,
    Loaded,
    ModelSpec,
    Operation,
    Refused,
    Result,
    Save,
    StartingWeights,
    Stepped,
    WeightsSaved,
)
from onebase_training.live_store import (
    CHECKPOINT,
    EXPIRY,
    MOST_MODELS,
    PACKED,
    RESULTS_KEPT,
    START,
    LiveStore,
    ModelRefusedError,
    OtherBaseError,
    SequenceConflictError,
    UnknownCheckpointError,
    UnknownLiveModelError,
    read_checkpoint,
)

LIVE = "live"
"""Name of live versions in leases, usage and metrics: each step has another one."""
MOST_RUNS = MOST_MODELS
"""Largest number of runs of one tenant that are trained at once."""
IDLE_SECONDS = 900.0
"""Seconds without a sample after which a step's weights are deleted, unless they are its run's newest."""
LOST_SECONDS = 6 * 3600.0
"""Seconds without a sign of a session's client after which its runs end."""
ENDED_SECONDS = 600.0
"""Seconds after the end of a session after which its runs end."""
FORGOTTEN_SECONDS = 7 * 24 * 3600.0
"""Seconds without a sign of a session's client after which the session and its samplers are deleted."""
TIDY_SECONDS = 30.0
LOOK_SECONDS = 3600.0
"""Pause, in seconds, between two looks at a run that has ended, and before a failed proof is tried again."""
_POLICY_CODES = frozenset({"signature_missing", "signer_not_allowed"})
MOST_WAITING = 1024
"""Largest number of operations of a run that wait."""
MOST_WAITING_BYTES = 1 << 30
"""Largest size of the operations of one tenant that wait."""
MOST_CHECKPOINTS = 1000
"""Largest number of named checkpoints of one tenant."""
PROOF_SECONDS = 45.0
"""Longest wait of a request for the proof of a job's checkpoint."""
_COUNTED_SECONDS = 5.0
LINK_SECONDS = 3600
"""Seconds for which the address of a file of external weights is good; clients renew it in the last five
minutes."""
_PROVED, _CHARGED, _LINK_SECRET = "proved.json", "charged.json", ".link"
_SCHEME = "tinker://"
_VERSION = re.compile(rf"{VERSIONS}(?:weights|sampler_weights)/(.+)")
"""Path of a version of an adapter, NAME or NAME@VERSION: the active one, or a certain one."""
_KINDS: Mapping[str, Kind] = {
    "weights": "weights",
    "sampler_weights": "sampler",
    "external_weights": "external",
}
_SEGMENTS: Mapping[Kind, str] = {kind: segment for segment, kind in _KINDS.items()}
_OF_STEP = re.compile(r"live-(\d+)")
"""Name of weights that are kept for one sampling session."""
_RUN = re.compile(r"(.+):train:(\d+)")
P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """A checkpoint as a path names it."""

    run: str
    kind: Kind
    name: str

    @property
    def path(self) -> str:
        return f"{_SCHEME}{self.run}/{_SEGMENTS[self.kind]}/{self.name}"

    @property
    def is_of_step(self) -> bool:
        """Return True for weights that are kept for one sampling session."""
        return self.kind == "sampler" and _OF_STEP.fullmatch(self.name) is not None

    @classmethod
    def of(cls, checkpoint: CheckpointFolder) -> Place:
        return cls(checkpoint.model, checkpoint.kind, checkpoint.name)

    @classmethod
    def read(cls, path: str, param: str) -> Place:
        """Raises InvalidRequestError."""
        parts = path.removeprefix(_SCHEME).split("/")
        if not path.startswith(_SCHEME) or len(parts) != 3 or parts[1] not in _KINDS:
            raise InvalidRequestError(
                f"{param}: {path[:120]!r} names no checkpoint. Write tinker://RUN/weights/NAME, "
                "tinker://RUN/sampler_weights/NAME or tinker://RUN/external_weights/NAME.",
                param=param,
            )
        return cls(parts[0], _KINDS[parts[1]], parts[2])


def _facts(spec: ModelSpec, checkpoint: CheckpointFolder) -> dict[str, Any]:
    """Return what is signed about a checkpoint's training. Its data is known to the client alone."""
    names = ("rank", "alpha", "train_mlp", "train_attn", "train_unembed")
    parent = checkpoint.parent
    return {
        "job": spec.id,
        "checkpoint": checkpoint.name,
        "recipe": {name: getattr(spec, name) for name in names},
        "seed": spec.seed,
        "steps": checkpoint.step,
        "parent": None
        if parent is None
        else {
            "checkpoint": Place(parent.model, parent.kind, parent.name).path,
            "digest": parent.digest,
            "steps": parent.step,
            "optimizer": parent.optimizer,
            "from_base": parent.from_base,
        },
    }


class _SavedOverError(OSError):
    """A checkpoint's folder has another save by now, or is gone."""


@dataclass(frozen=True)
class ExternalFiles:
    """Files of external weights. save: number of the operation that saved them; until: Unix seconds;
    signatures: of each file, by its name."""

    save: int
    until: int
    signatures: Mapping[str, str]


class _Mark(msgspec.Struct, frozen=True):
    """Outcome of a named checkpoint: the digest of its version, or why there is none.

    seq_id: number of the operation that saved it. A name may be saved again at any time.
    by_policy: whether the policy of signatures refused it, which may be another by the next look.
    is_audited: whether the audit log has that refusal.
    """

    digest: str = ""
    refused: str = ""
    seq_id: int = -1
    by_policy: bool = False
    is_audited: bool = True


class LiveTraining:
    """Live training of one server. Called from one event loop.

    All methods for requests raise LiveNotFoundError for what the caller's tenant does not have, and
    UnavailableError while the registry cannot be reached.

    Args:
        trainer: None: this server does not train.
        base_names: names by which clients may ask for the base.
        tokenizer: where clients find its tokenizer: a repository on the Hub, or else a folder here.
        max_rank: highest rank that the engine serves.
        check_room: raises QuotaExceededError if a tenant may not store so many bytes more.
        checkpoints: what jobs have saved, which the policy of signatures may refuse.
    """

    def __init__(
        self,
        trainer: LiveTrainer | None,
        records: LiveRecords,
        threads: Threads,
        server: str,
        *,
        base_names: Collection[str],
        tokenizer: str,
        max_rank: int,
        files: PackedAdapterFiles,
        residency: Residency,
        library: AdapterService,
        usage: TenantUsageRecorder,
        check_room: Callable[[Caller, int], Awaitable[None]],
        checkpoints: CheckpointModels,
    ) -> None:
        self._trainer = trainer
        self._records = records
        self._threads = threads
        self._server = server
        self._base_names = tuple(base_names)
        self.tokenizer = tokenizer
        self._max_rank = max_rank
        self._files = files
        self._residency = residency
        self._library = library
        self._usage = usage
        self._check_room = check_room
        self._checkpoints = checkpoints
        self._specs: Mapping[str, ModelSpec] = {}
        """Specs that were read: they never change."""
        self._held: dict[str, tuple[float, int]] = {}
        """Bytes of a tenant's waiting operations, and when they were counted."""
        self._seen: dict[str, float] = {}
        """Time of the last sign of each session's client, which the registry may have had no room for."""
        self._next_look: dict[str, float] = {}
        """Time of the next look at a run that has ended."""
        self._proving: set[tuple[str, int]] = set()
        """Saves that are being registered, by path and number."""
        self._prove_after: dict[str, tuple[int, float]] = {}
        """Save of a path whose proof failed, and the time from which on it is tried again."""
        self._sampled: dict[str, float] = {}
        """Time of the last sample from each checkpoint's path, unless it is longer ago than IDLE_SECONDS."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._began = time.time()
        self._secret_lock = threading.Lock()
        self._link_secret = b""
        """Key that signs addresses of files, once it was read."""

    # ---- sessions ----------------------------------------------------------------------------

    async def create_session(self, caller: Caller, details: Mapping[str, Any]) -> str:
        session = LiveSession(str(uuid.uuid4()), caller.tenant, caller.key, time.time(), details)
        await self._call(self._records.add_session, session, self._server)
        return session.id

    async def session(self, caller: Caller, session_id: str) -> LiveSession:
        return await self._call(self._records.session, caller.tenant, session_id)

    async def sessions(self, caller: Caller, offset: int, limit: int) -> list[str]:
        """Return the ids of the tenant's sessions, newest first."""
        return await self._call(self._records.sessions, caller.tenant, offset=offset, limit=limit)

    async def session_seen(self, caller: Caller, session_id: str) -> None:
        """Note that a session's client lives, in memory too: a full disk ends no run whose client does."""
        await self.session(caller, session_id)
        self._seen[session_id] = time.time()
        await self._call(self._records.session_seen, caller.tenant, session_id)

    async def finish(self, caller: Caller, session_id: str) -> None:
        """Note that a session's client has finished. Raises InsufficientScopeError: it has runs, which end
        with it."""
        await self.session(caller, session_id)
        if not caller.may("train") and await self._disk(self._has_runs, session_id):
            raise InsufficientScopeError("train", caller.key)
        await self._call(self._records.session_seen, caller.tenant, session_id, finished=True)
        await self._note("session.finished", caller.tenant, session_id, {})

    async def _open_session(self, caller: Caller, session_id: str) -> None:
        """Raise InvalidRequestError if a session has finished."""
        session = await self.session(caller, session_id)
        if session.finished_at is not None:
            raise InvalidRequestError(
                f"session_id: session {session_id} has finished. Begin another one (a new ServiceClient).",
                param="session_id",
                code="session_finished",
            )

    @property
    def trains(self) -> bool:
        """Return True if this server trains."""
        return self._trainer is not None

    @property
    def base_names(self) -> tuple[str, ...]:
        """Return the names by which clients may ask for the base."""
        return tuple(dict.fromkeys(self._base_names))

    def check_base(self, name: str) -> None:
        """Raise InvalidRequestError if a client's name of a base does not mean this one."""
        if not same_base(name.partition(":")[0], *self._base_names):
            raise InvalidRequestError(
                f"base_model: {name[:120]!r} is not served here. The base is {self._base_names[0]!r}.",
                param="base_model",
            )

    # ---- runs --------------------------------------------------------------------------------

    async def create_run(
        self,
        caller: Caller,
        session_id: str,
        number: int,
        *,
        base_model: str,
        rank: int,
        seed: int | None,
        train: Mapping[str, bool],
        metadata: Mapping[str, Any] | None,
        start: StartingWeights | None = None,
        alpha: float = 32.0,
        version: str = "",
        files: Mapping[str, Path] | None = None,
    ) -> str:
        """Create a run of a session, which the trainer then makes. Return its id.

        version, files: the version of an adapter that it begins with, as NAME@DIGEST, and its files.

        Raises InvalidRequestError.
        """
        self.check_base(base_model)
        if rank > self._max_rank:
            raise InvalidRequestError(
                f"lora_config.rank: {rank} is more than this server serves, {self._max_rank} (--max-rank).",
                param="lora_config.rank",
            )
        await self._open_session(caller, session_id)
        run = f"{session_id}:train:{number}"
        await self._check_signatures(caller.tenant, run, version, caller.key)
        if seed is None:  # the same for a request that comes again
            seed = int.from_bytes(hashlib.sha256(run.encode()).digest()[:4])
        mine = await self._disk(self._live_runs, caller.tenant)
        if len(mine) >= MOST_RUNS and run not in mine:
            raise InvalidRequestError(
                f"model_seq_id: {MOST_RUNS} runs of this tenant are trained already. End a session of them "
                "first (ServiceClient.close).",
                param="model_seq_id",
            )
        spec = ModelSpec(
            id=run,
            rank=rank,
            seed=seed % 2**63,
            start=start,
            alpha=alpha,
            version=version,
            owner=caller.tenant,
            key=caller.key,
            base=base_model,
            base_id=self._store().base_id,
            session=session_id,
            metadata=dict(metadata or {}),
            created=time.time(),
            **train,
        )
        try:
            await self._on_disk(self._training().create(spec, files or {}))
        except SequenceConflictError as error:
            raise InvalidRequestError(
                f"model_seq_id: {error}.", param="model_seq_id", code="sequence_conflict"
            ) from error
        except ModelRefusedError as error:
            raise InvalidRequestError(f"lora_config: {error}", param="lora_config") from error
        await self._note("run.created", caller.tenant, run, {"rank": rank, "base_model": base_model})
        return run

    async def _check_signatures(
        self, tenant: str, run: str, version: str, actor: str, *, audited: bool = True
    ) -> None:
        """Refuse a run whose versions the policy of signatures does not let this server make.

        version: the one that the run begins with, as NAME@DIGEST, or "".
        audited: whether a refusal is noted in the audit log.

        Raises VersionFailedError, UnavailableError.
        """
        library, name = self._library, adapter_name(run)
        await library.check_trained(tenant, name, actor=actor, param=None, audited=audited)
        if version:
            adapter, _, digest = version.rpartition("@")
            await library.check_start(tenant, name, tenant, adapter, digest, actor=actor, audited=audited)

    async def continue_from(
        self,
        caller: Caller,
        session_id: str,
        number: int,
        path: str,
        *,
        optimizer: bool,
        base_model: str | None,
        metadata: Mapping[str, Any] | None,
    ) -> str:
        """Create a run that begins with a checkpoint, or with a version of an adapter. Return its id.

        A request that comes again is answered by what it says alone: what it began with may be gone by now,
        or no longer the active version.

        Raises InvalidRequestError, AdapterNotFoundError, StateConflictError: the version is not ready.
        """
        run = f"{session_id}:train:{number}"
        with suppress(LiveNotFoundError):
            begun = await self.run(caller, run)
            same = base_model in (None, begun.base) and begun.metadata == dict(metadata or {})
            if same and self._began_with(begun, path, optimizer):
                return run
        of_path = self._of_version if _VERSION.fullmatch(path) else self._of_checkpoint
        base, arguments = await of_path(caller, path, optimizer)
        return await self.create_run(
            caller, session_id, number, base_model=base_model or base, metadata=metadata, **arguments
        )

    def _began_with(self, begun: ModelSpec, path: str, optimizer: bool) -> bool:
        """Return True if a run began with what a path names. Raises InvalidRequestError: it names nothing."""
        named = _VERSION.fullmatch(path)
        if named is None:
            place = Place.read(path, "path")
            with suppress(UnknownLiveModelError, UnknownCheckpointError):
                folder = self._store().checkpoint_folder(place.run, place.kind, place.name)
                return begun.start == StartingWeights(folder=str(folder), optimizer=optimizer)
            return False
        reference = self._library.catalog.of(begun.owner).ours(named[1])
        name = begun.version.rpartition("@")[0]
        is_version = reference.startswith(f"{name}@") and begun.version.startswith(reference)
        return begun.start is None and not optimizer and bool(name) and (reference == name or is_version)

    async def _of_checkpoint(self, caller: Caller, path: str, optimizer: bool) -> tuple[str, dict[str, Any]]:
        """Return the base and other arguments of `create_run` for a checkpoint. Raises
        InvalidRequestError."""
        found = await self.checkpoint(caller, path, "path")
        if optimizer and not found.optimizer:
            raise InvalidRequestError(
                f"optimizer: {path[:200]!r} was saved without the optimizer's state. Load it without.",
                param="optimizer",
            )
        parent = await self._disk(self._store().spec, found.model)
        folder = self._store().folder(found.model) / START
        return parent.base, {
            "rank": found.rank,
            "seed": parent.seed,
            "train": {name: getattr(found, name) for name in ("train_mlp", "train_attn", "train_unembed")},
            "start": StartingWeights(folder=found.folder, optimizer=optimizer),
            "alpha": parent.alpha,
            "version": parent.version,
            "files": {name: folder / name for name in ADAPTER_FILES} if parent.version else None,
        }

    async def _of_version(self, caller: Caller, path: str, optimizer: bool) -> tuple[str, dict[str, Any]]:
        """Return the base and other arguments of `create_run` for a version of an adapter. Raises
        InvalidRequestError, AdapterNotFoundError, StateConflictError: it is not ready."""
        if optimizer:
            raise InvalidRequestError(
                f"optimizer: {path[:200]!r} is an adapter, which has none. Load it without.",
                param="optimizer",
            )
        chosen = check_generates(await self._version(caller.tenant, path, "path"), "path")
        (use,) = chosen.uses
        self._library.catalog.of(caller.tenant).check_own(use.name, "train it further")
        version = await self._library.version(use.tenant, use.name, use.digest)
        with storage_errors(use.name):
            files = {
                name: await self._disk(self._library.store.local, version.files.of(name).sha256)
                for name in ADAPTER_FILES
            }
        return self._base_names[0], {
            "rank": int(chosen.report["rank"]),
            "seed": 0,
            "train": {},
            "alpha": float(chosen.report["alpha"]),
            "version": f"{use.name}@{use.digest}",
            "files": files,
        }

    async def run(self, caller: Caller, run: str, param: str = "model_id") -> ModelSpec:
        """Return a run of the caller's tenant."""
        try:
            spec = await self._disk(self._store().spec, run)
        except UnknownLiveModelError as error:
            raise LiveNotFoundError("run", run, param) from error
        if spec.owner != caller.tenant:
            raise LiveNotFoundError("run", run, param)
        _check_base(self._store(), spec, param)
        return spec

    async def runs(self, caller: Caller) -> list[ModelSpec]:
        """Return all runs of the caller's tenant, newest first."""
        specs = await self._disk(self._runs)
        return [spec for spec in reversed(specs) if spec.owner == caller.tenant]

    async def submit(self, caller: Caller, run: str, number: int, operation: Operation) -> str:
        """Accept an operation of a run, and return its id: it is done in its turn, once. Raises
        InvalidRequestError; QuotaSpentError: too much waits already."""
        await self.run(caller, run)
        await self._disk(self._check_waiting, caller.tenant, run, number, operation)
        try:
            await self._on_disk(self._training().submit(run, number, operation))
        except UnknownLiveModelError as error:
            raise LiveNotFoundError("run", run, "model_id") from error
        except SequenceConflictError as error:
            raise InvalidRequestError(
                f"seq_id: {error}.", param="seq_id", code="sequence_conflict"
            ) from error
        return f"{run}:{number}"

    async def save(
        self,
        caller: Caller,
        run: str,
        number: int,
        name: str,
        kind: Kind,
        ttl: float | None,
        overwrite: bool,
        metadata: dict[str, str] | None,
        recipients: Sequence[str] = (),
    ) -> str:
        """Accept that a checkpoint is saved under a name; that of a sampler is proved, too.

        recipients: public keys to which the files of an external one are encrypted.

        Raises InvalidRequestError, QuotaExceededError.
        """
        place = Place(run, kind, name)
        if not CHECKPOINT_NAME.fullmatch(name) or place.is_of_step:
            raise InvalidRequestError(
                f"path: {name[:80]!r} cannot be a checkpoint's name. Use letters, digits, '.', '_' and '-', "
                "and not live- with a number.",
                param="path",
            )
        await self._check_checkpoints(caller, run, number)
        operation = Save(
            name=name,
            kind=kind,
            ttl_seconds=ttl,
            overwrite=overwrite,
            metadata=metadata,
            recipients=list(recipients),
        )
        accepted = await self.submit(caller, run, number, operation)
        if kind == "sampler":
            self._begin(self._prove_saved(caller.tenant, run, number))
        return accepted

    async def save_for_session(self, caller: Caller, run: str, number: int, sampler_number: int) -> str:
        """Accept that a step's weights are sampled: they are the sampler's alone, and not proved."""
        spec = await self.run(caller, run)
        place = Place(run, "sampler", f"live-{sampler_number}")
        operation = Save(name=place.name, kind="sampler", overwrite=True, packed_only=True)
        accepted = await self.submit(caller, run, number, operation)
        await self._add_sampler(caller, spec.session, sampler_number, spec.base, place.path)
        return accepted

    async def result(
        self, caller: Caller, request_id: str, seconds: float
    ) -> tuple[ModelSpec, Result | None]:
        """Return a run, and the result of one of its operations within some seconds; None: not yet. Number 0
        is its creation. Raises ResultGoneError."""
        run, _, number = request_id.rpartition(":")
        if not (number.isascii() and number.isdecimal()):
            raise LiveNotFoundError("result", request_id, "request_id")
        spec, trainer, seq_id = await self.run(caller, run, "request_id"), self._training(), int(number)
        if not caller.may("train"):
            raise InsufficientScopeError("train", caller.key)
        is_live = await self._disk(trainer.store.is_live, run)
        seconds = seconds if is_live else 0.0  # what has ended changes no more
        found = await (trainer.wait(run, seq_id, seconds) if seq_id else self._created(spec, seconds))
        if found is None and not await self._disk(trainer.store.is_live, run):
            raise ResultGoneError(request_id, "The run has ended.")
        if found is None and await trainer.expired(run, seq_id):
            raise ResultGoneError(request_id)
        return spec, found

    async def _created(self, spec: ModelSpec, seconds: float) -> Result | None:
        try:
            if not await self._training().created(spec.id, seconds):
                return None
        except ModelRefusedError as error:
            return Refused(message=str(error))
        return Stepped(metrics={}, step=0)

    @property
    def queue_state(self) -> str:
        """State of the trainer's queue, in the client's words."""
        return self._training().queue_state()

    # ---- limits ------------------------------------------------------------------------------

    def _runs(self) -> list[ModelSpec]:
        """Return the base's runs that have a folder, oldest first. Blocks."""
        store, known, found = self._store(), self._specs, {}
        for name in os.listdir(store.root) if store.root.is_dir() else ():
            with suppress(UnknownLiveModelError):
                found[name] = known.get(name) or store.spec(name)
        self._specs = found
        own = [spec for spec in found.values() if spec.base_id == store.base_id]
        return sorted(own, key=lambda spec: (spec.created, spec.id))

    def _live_runs(self, tenant: str) -> set[str]:
        """Return the ids of a tenant's runs that are trained. Blocks."""
        store = self._store()
        return {spec.id for spec in self._runs() if spec.owner == tenant and store.is_live(spec.id)}

    def _has_runs(self, session_id: str) -> bool:
        """Return True if a session has runs, ended ones included. Blocks."""
        return self._trainer is not None and any(spec.session == session_id for spec in self._runs())

    def _check_waiting(self, tenant: str, run: str, number: int, operation: Operation) -> None:
        """Raise QuotaSpentError if too many operations wait, or too large ones. Blocks."""
        following = self._store().next_seq(run)
        if number < following:
            return
        if number >= following + MOST_WAITING:
            raise QuotaSpentError(
                f"seq_id: {number} is too far ahead: operation {following} of run {run} is next, and at most "
                f"{MOST_WAITING} may wait. Send it again once others are done.",
                {"quota": "waiting_operations", "limit": MOST_WAITING, "of": "run"},
                retry_after=1.0,
            )
        counted, held = self._held.get(tenant, (0.0, 0))
        if time.monotonic() - counted > _COUNTED_SECONDS or not counted:
            counted, held = time.monotonic(), sum(map(self._bytes_waiting, self._live_runs(tenant)))
        size = len(msgspec.msgpack.encode(operation))
        if held + size > MOST_WAITING_BYTES:
            raise QuotaSpentError(
                f"The operations of this tenant that wait take {held} bytes, and this one {size}: at most "
                f"{MOST_WAITING_BYTES} may wait. Send it again once others are done.",
                {"quota": "waiting_bytes", "limit": MOST_WAITING_BYTES, "of": "tenant"},
                retry_after=_COUNTED_SECONDS,
            )
        self._held[tenant] = counted, held + size

    def _bytes_waiting(self, run: str) -> int:
        """Return the size of a run's operations that were not done yet. Blocks."""
        store, total = self._store(), 0
        following = store.next_seq(run)
        with suppress(FileNotFoundError), os.scandir(store.folder(run) / "operations") as files:
            for file in files:
                if file.name.isdecimal() and int(file.name) >= following:
                    with suppress(FileNotFoundError):
                        total += file.stat().st_size
        return total

    async def _check_checkpoints(self, caller: Caller, run: str, number: int) -> None:
        """Check that the tenant may save one more. Raises InvalidRequestError, QuotaExceededError."""
        store = self._store()
        await self.run(caller, run)
        if await self._disk(lambda: number < store.next_seq(run) or store.operation(run, number)):
            return  # it was accepted before
        kept = await self._disk(self._named, caller.tenant)
        if len(kept) >= MOST_CHECKPOINTS:
            raise InvalidRequestError(
                f"path: this tenant has {len(kept)} named checkpoints, and may have {MOST_CHECKPOINTS}. "
                "Delete some, or save with ttl_seconds.",
                param="path",
                code="too_many_checkpoints",
            )
        like = [one.bytes for one in kept if one.model == run][-1:]
        await self._check_room(caller, sum(one.bytes for one in kept) + sum(like))

    def _named(self, tenant: str) -> list[CheckpointFolder]:
        """Return a tenant's named checkpoints. Blocks."""
        store = self._store()
        found = [one for spec in self._runs() if spec.owner == tenant for one in store.checkpoints(spec.id)]
        return [one for one in found if not Place.of(one).is_of_step]

    # ---- checkpoints -------------------------------------------------------------------------

    async def checkpoint(self, caller: Caller, path: str, param: str) -> CheckpointFolder:
        """Return a checkpoint by its path. Raises InvalidRequestError."""
        if _VERSION.fullmatch(path):
            raise InvalidRequestError(
                f"{param}: {path[:200]!r} is a version of an adapter. Begin a run with it "
                "(create_training_client_from_state), or sample from it (create_sampling_client).",
                param=param,
            )
        place = Place.read(path, param)
        try:
            spec = await self._disk(self._store().spec, place.run)
            found = await self._disk(self._store().checkpoint, place.run, place.kind, place.name)
        except (UnknownLiveModelError, UnknownCheckpointError) as error:
            raise LiveNotFoundError("checkpoint", path, param) from error
        if spec.owner != caller.tenant or _has_expired(found):
            raise LiveNotFoundError("checkpoint", path, param)
        _check_base(self._store(), found, param)
        return found

    async def checkpoints(self, run: str) -> list[CheckpointFolder]:
        """Return the named checkpoints of a run, oldest first."""
        found = await self._disk(self._store().checkpoints, run)
        return [one for one in found if not Place.of(one).is_of_step and not _has_expired(one)]

    async def delete_checkpoint(self, caller: Caller, path: str) -> None:
        """Delete a checkpoint; the version that it was proved as stays."""
        found = await self.checkpoint(caller, path, "checkpoint_id")
        await self._delete(found)
        await self._note("checkpoint.deleted", caller.tenant, path, {})

    async def set_ttl(self, caller: Caller, path: str, ttl: float | None) -> None:
        """Set after how many seconds from now a checkpoint expires; None: never."""
        found = await self.checkpoint(caller, path, "checkpoint_id")
        expires = None if ttl is None else time.time() + ttl
        write = self._disk(self._store().set_ttl, found.model, found.kind, found.name, expires)
        try:
            await self._on_disk(write)
        except UnknownCheckpointError as error:  # it was deleted meanwhile
            raise LiveNotFoundError("checkpoint", path, "checkpoint_id") from error
        self._next_look.pop(found.model, None)
        await self._note("checkpoint.changed", caller.tenant, path, {"ttl_seconds": ttl})

    async def external_files(self, caller: Caller, run: str, name: str) -> ExternalFiles:
        """Return the files of external weights, with signatures by which anybody may download them for a
        while. Raises InsufficientScopeError: the run began with an adapter that the caller may not read."""
        place = Place(run, "external", name)
        found = await self.checkpoint(caller, place.path, "checkpoint_id")
        if found.version and not caller.may("adapters"):
            raise InsufficientScopeError("adapters", caller.key)
        until = int(time.time() + LINK_SECONDS)
        try:
            names = await self._disk(lambda: sorted(os.listdir(found.folder)))
        except FileNotFoundError as error:  # it was deleted meanwhile
            raise LiveNotFoundError("checkpoint", place.path, "checkpoint_id") from error
        secret = await self._on_disk(self._disk(self._read_link_secret))
        files = [file for file in names if file != CHECKPOINT and not file.startswith((".", EXPIRY))]
        signatures = {file: _signature(secret, place, found.seq_id, file, until) for file in files}
        return ExternalFiles(found.seq_id, until, signatures)

    async def external_file(self, place: Place, save: int, name: str, until: int, signature: str) -> BinaryIO:
        """Open a file of external weights, if the signature is that of `external_files`: nothing is read
        for another one. What is deleted meanwhile can still be read. Raises ForbiddenError,
        InvalidRequestError.

        save: number of the operation that saved it.
        """
        secret = self._link_secret or await self._on_disk(self._disk(self._read_link_secret))
        own = _signature(secret, place, save, name, until)
        if not hmac.compare_digest(own.encode(), signature.encode()):
            raise _link_invalid("signature: it belongs to no file that is here.")
        if until <= time.time():
            raise _link_invalid("expires: the time of this address is over.")
        found = await self._weights(place.path)
        if found is None or found.seq_id != save or _has_expired(found):
            raise _link_invalid("signature: it belongs to no file that is here any more.")
        _check_base(self._store(), found, "run")
        file = await self._disk(_opened, found, name)
        if file is None:  # it was deleted meanwhile
            raise _link_invalid("signature: it belongs to no file that is here any more.")
        return file

    def _read_link_secret(self) -> bytes:
        """Return what signs addresses of files. It is made once, and survives a restart. Blocks."""
        path = self._store().root / _LINK_SECRET
        with self._secret_lock:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                _write(path, secrets.token_bytes(32), mode=0o600)
            self._link_secret = self._link_secret or path.read_bytes()
            return self._link_secret

    async def _delete(self, checkpoint: CheckpointFolder) -> None:
        self._next_look.pop(checkpoint.model, None)
        self._residency.forget(self._files.drop_live(Path(checkpoint.folder)))
        for times in (self._sampled, self._prove_after):
            times.pop(Place.of(checkpoint).path, None)
        with suppress(UnknownCheckpointError):
            await self._disk(
                self._store().delete_checkpoint, checkpoint.model, checkpoint.kind, checkpoint.name
            )

    # ---- samplers ----------------------------------------------------------------------------

    async def create_sampler(
        self, caller: Caller, session_id: str, number: int, base_model: str | None, path: str | None
    ) -> LiveSampler:
        """Create a sampler of a checkpoint, or else of the base. Raises InvalidRequestError."""
        await self.session(caller, session_id)
        if path is None:
            self.check_base(base_model or "")
            return await self._add_sampler(caller, session_id, number, base_model or "", None)
        if _VERSION.fullmatch(path):
            base_model = base_model or self._base_names[0]
            return await self._add_sampler(
                caller, session_id, number, base_model, await self._version_path(caller.tenant, path)
            )
        found = await self.checkpoint(caller, path, "model_path")
        if not found.packed:
            raise InvalidRequestError(
                f"model_path: {path[:200]!r} is for download. Sample from what save_weights_for_sampler "
                "saves.",
                param="model_path",
            )
        spec = await self.run(caller, found.model, "model_path")
        path = Place.of(found).path
        return await self._add_sampler(caller, session_id, number, base_model or spec.base, path)

    async def _version_path(self, tenant: str, path: str) -> str:
        """Return the path with the digest of the version that it means now. Raises AdapterNotFoundError,
        StateConflictError: it is not ready; InvalidRequestError: it generates no text."""
        chosen = check_generates(await self._version(tenant, path, "model_path"), "model_path")
        (use,) = chosen.uses
        return f"{_SCHEME}adapters/sampler_weights/{use.name}@{use.digest}"

    async def _version(self, tenant: str, path: str, param: str, *, proves: bool = True) -> AdapterChoice:
        """Return the version of an adapter that a path names.

        proves: whether a job's checkpoint that nobody has asked for yet is proved first.

        Raises AdapterNotFoundError, StateConflictError, InvalidRequestError, what `CheckpointModels.use`
        does, and UnavailableError once PROOF_SECONDS have passed: the proof goes on.
        """
        named, catalog = _VERSION.fullmatch(path), self._library.catalog
        if named is None:
            raise InvalidRequestError(f"{param}: {path[:120]!r} names no adapter.", param=param)
        if is_checkpoint(name := named[1].partition("@")[0]):
            use = self._checkpoints.use if proves else self._checkpoints.check
            try:
                async with asyncio.timeout(PROOF_SECONDS if proves else None) as limit:
                    await use(tenant, name, param=param)
            except TimeoutError as error:
                if not limit.expired():
                    raise
                raise UnavailableError(
                    f"{param}: {name} is still being proved. Send the request again in a moment.",
                    code="adapter_timeout",
                    retry_after=5.0,
                ) from error
        return await catalog.find_current(lambda: catalog.of(tenant).choose(named[1], param=param))

    async def _add_sampler(
        self, caller: Caller, session_id: str, number: int, base_model: str, path: str | None
    ) -> LiveSampler:
        name = f"{session_id}:sample:{number}"
        sampler = LiveSampler(name, session_id, caller.tenant, base_model, path, time.time())
        return await self._call(self._records.add_sampler, sampler, self._server)

    async def sampler(self, caller: Caller, sampler_id: str) -> LiveSampler:
        return await self._call(self._records.sampler, caller.tenant, sampler_id)

    async def samplers(self, caller: Caller, session_id: str) -> list[LiveSampler]:
        """Return a session's samplers, oldest first."""
        return await self._call(self._records.samplers, caller.tenant, session_id)

    async def join_sampler(self, caller: Caller, sampler_id: str) -> int:
        """Count one more client of a sampler, and return its number."""
        return await self._call(self._records.join_sampler, caller.tenant, sampler_id)

    async def choose(self, sampler: LiveSampler) -> AdapterChoice:
        """Return the weights that a sampler samples from, as a live version, or as the version of an adapter.

        Raises LiveNotFoundError, AdapterNotFoundError; StateConflictError: the version has failed;
        UnavailableError: it is being prepared again.
        """
        if sampler.path is None:
            return AdapterChoice()
        if _VERSION.fullmatch(sampler.path):
            return await self._sampled_version(sampler.tenant, sampler.path)
        self._sampled[sampler.path] = time.time()
        found = await self._weights(sampler.path)
        if found is None:
            raise LiveNotFoundError("checkpoint", sampler.path, "sampling_session_id")
        self._files.add_live(Path(found.folder) / PACKED, found.packed, found.packed_bytes)
        ref = AdapterRef(found.packed)
        return AdapterChoice((ref,), (VersionRef(sampler.tenant, LIVE, ref.digest),), f"live@{ref.digest}")

    async def _sampled_version(self, tenant: str, path: str) -> AdapterChoice:
        """Return the version of a sampler's path, NAME@DIGEST. Raises as `choose` does."""
        try:
            return await self._version(tenant, path, "sampling_session_id", proves=False)
        except StateConflictError as error:
            name, _, digest = path.partition("/sampler_weights/")[2].rpartition("@")
            if self._library.catalog.of(tenant).version(name, digest).state == "failed":
                raise
            raise UnavailableError(error.message, code="adapter_unavailable", retry_after=10.0) from error

    async def live_version(self, sampler: LiveSampler) -> str | None:
        """Return the digest of the weights that a sampler samples from; None for the base, for versions of
        adapters, and before they are saved."""
        if sampler.path is None or _VERSION.fullmatch(sampler.path):
            return None
        found = await self._weights(sampler.path)
        return None if found is None else found.packed

    async def _weights(self, path: str) -> CheckpointFolder | None:
        place = Place.read(path, "sampling_session_id")
        try:
            return await self._disk(self._store().checkpoint, place.run, place.kind, place.name)
        except (UnknownLiveModelError, UnknownCheckpointError):
            return None

    # ---- named checkpoints become versions ---------------------------------------------------

    async def _prove_saved(self, tenant: str, run: str, number: int) -> None:
        """Prove a checkpoint as a version of an adapter once it is saved."""
        trainer = self._training()
        while (result := await trainer.wait(run, number, 600.0)) is None:
            is_live = await self._disk(trainer.store.is_live, run)
            if not is_live or await trainer.expired(run, number):
                return
        if isinstance(result, WeightsSaved):
            await self._prove(tenant, result.checkpoint)

    async def _prove(self, tenant: str, checkpoint: CheckpointFolder) -> None:
        """Register a checkpoint as a version, which is proved then, and mark it with that. One that was saved
        over meanwhile is left to its successor's proof."""
        path, seq_id = Place.of(checkpoint).path, checkpoint.seq_id
        failed, until = self._prove_after.get(path, (seq_id, 0.0))
        if (path, seq_id) in self._proving or (failed == seq_id and until > time.monotonic()):
            return
        self._proving.add((path, seq_id))
        try:
            mark = _Mark(await self._added(tenant, checkpoint), seq_id=seq_id)
        except (ApiError, StoreError, OSError) as error:
            if not await self._disk(_is_current, checkpoint):
                _log.debug("operation %d's checkpoint %s is not there any more: %s", seq_id, path, error)
                return
            _log.error("checkpoint %s is not proved: %s", path, error)
            self._prove_after[path] = seq_id, time.monotonic() + LOOK_SECONDS
            if not isinstance(error, ApiError) or not 400 <= status_of(error)[0] < 429:
                return
            mark = _Mark(
                refused=error.message,
                seq_id=seq_id,
                by_policy=error.code in _POLICY_CODES,
                is_audited=isinstance(error, VersionFailedError) and error.is_audited,
            )
        finally:
            self._proving.discard((path, seq_id))
        with suppress(OSError):  # it was deleted meanwhile
            await self._disk(_write_mark, checkpoint, mark)
        if mark.digest and self._library.signs:
            self._begin(self._sign_once_proved(tenant, checkpoint, mark.digest))

    async def _sign_once_proved(self, tenant: str, checkpoint: CheckpointFolder, digest: str) -> None:
        """Wait for a proof, however long it takes, and sign the version then."""
        try:
            await self._library.wait(tenant, adapter_name(checkpoint.model), digest)
        except ApiError as error:
            _log.debug("version %s is not signed yet: %s", digest[:12], error)
            return
        await self._sign(tenant, checkpoint, digest)

    async def _sign(self, tenant: str, checkpoint: CheckpointFolder, digest: str) -> None:
        """Sign the version that this save of a checkpoint is, unless it is not proved yet, never will be
        signed (`AdapterService.may_sign`), or is from before a policy that refuses its run. What fails is
        tried again by `tidy`."""
        name = adapter_name(checkpoint.model)
        adapter = self._library.catalog.of(tenant).own(name)
        known = None if adapter is None else adapter.version(digest)
        if known is None or known.state != "ready" or not self._library.may_sign(known):
            return
        place = Place.of(checkpoint)
        try:
            spec = await self._disk(self._store().spec, checkpoint.model)
            with acting(Origin(spec.key, actor="live training")):
                await self._check_signatures(tenant, spec.id, spec.version, spec.key, audited=False)
                version = await self._library.version(tenant, name, digest)
                await self._library.sign(version, _facts(spec, checkpoint))
        except (AdapterNotFoundError, VersionFailedError) as error:
            _log.debug("checkpoint %s is not signed: %s", place.path, error)
        except (ApiError, UnknownLiveModelError, OSError) as error:
            _log.error("checkpoint %s is not signed: %s", place.path, error)

    async def _added(self, tenant: str, checkpoint: CheckpointFolder) -> str:
        """Return the digest of the version that a checkpoint is. The policy of signatures is asked before
        anything is copied, and a refusal that the audit log has is not noted there again.

        Raises ApiError, StoreError, OSError; _SavedOverError, an OSError: the files are another save's.
        """
        place = Place.of(checkpoint)
        try:
            spec = await self._disk(self._store().spec, checkpoint.model)
        except UnknownLiveModelError as error:
            raise FileNotFoundError(f"the run {place.run} was deleted") from error
        mark = await self._disk(_read_mark, checkpoint)
        is_first = mark is None or not mark.is_audited
        with acting(Origin(spec.key, actor="live training")):
            try:
                await self._check_signatures(tenant, spec.id, spec.version, spec.key, audited=is_first)
            except VersionFailedError as error:
                error.is_audited = error.is_audited or not is_first
                raise
            with storage_errors():
                files = await self._library.disk.run_blocking(
                    take_folder, self._library.store, Path(checkpoint.folder)
                )
            if not await self._disk(_is_current, checkpoint):
                raise _SavedOverError(
                    f"{place.path} of operation {checkpoint.seq_id} was saved over or deleted"
                )
            source = {"kind": LIVE, "job": place.run, "checkpoint": place.name, "path": place.path}
            version = await self._library.add(
                tenant,
                adapter_name(place.run),
                files,
                source,
                VersionOptions(any_base=True),
                actor=spec.key,
            )
        return version.digest

    async def proved_as(self, tenant: str, checkpoint: CheckpointFolder) -> tuple[str, str] | None:
        """Return the adapter and the version that a checkpoint is, or is to be, proved as."""
        mark = await self._disk(_read_mark, checkpoint)
        name = adapter_name(checkpoint.model)
        adapter = self._library.catalog.of(tenant).own(name)
        if mark is None or not mark.digest or adapter is None or adapter.version(mark.digest) is None:
            return None
        return name, mark.digest

    # ---- upkeep ------------------------------------------------------------------------------

    async def keep_tidy(self, samples: SamplersInUse) -> None:
        """Delete for ever what nobody needs; charge what was trained; prove what is not proved."""
        while True:
            await asyncio.sleep(TIDY_SECONDS)
            try:
                await self.tidy(samples)
            except RegistryError as error:
                _log.warning("live training is not tidied up before the next time: %s", error)
                self._began = time.time()  # signs of clients may have been missed, as before a start

    async def tidy(self, samples: SamplersInUse, now: float | None = None) -> None:
        """Charge passes, end the runs of ended sessions, and delete what nobody needs any more.

        Raises RegistryError.
        """
        now, began = now or time.time(), time.monotonic()
        self._sampled = {path: at for path, at in self._sampled.items() if at >= now - IDLE_SECONDS}
        self._seen = {session: at for session, at in self._seen.items() if at >= now - LOST_SECONDS}
        try:
            await self._threads.run_blocking(
                self._records.forget_sessions, now - FORGOTTEN_SECONDS, list(self._seen)
            )
        except RegistryFullError as error:  # what is deleted below may make room
            _log.error("sessions are not forgotten yet: %s", error)
        if self._trainer is None:
            return
        open_sessions = await self._open_session_ids(now)
        store = self._store()
        for spec in await self._disk(self._runs):
            is_live, is_open = await self._disk(store.is_live, spec.id), spec.session in open_sessions
            if is_live:
                ends = not is_open and not await self._disk(store.has_next, spec.id)
                await self._charge(spec, ends=ends)
            elif self._next_look.get(spec.id, 0.0) > now:
                continue
            self._next_look[spec.id] = 0.0  # taken away where a checkpoint changes meanwhile
            kept = await self._tidy_checkpoints(spec, is_open, samples, now)
            if not is_live and not kept:
                await self._disk(store.remove, spec.id)
            is_same = spec.id in self._next_look
            if is_same and not is_live and not any(Place.of(one).is_of_step for one in kept):
                later = now + time.monotonic() - began + LOOK_SECONDS  # no sooner than its failed proofs
                expirations = (one.expires for one in kept if one.expires is not None)
                self._next_look[spec.id] = min([later, *expirations])
        self._next_look = {run: at for run, at in self._next_look.items() if run in self._specs}

    async def _open_session_ids(self, now: float) -> set[str]:
        """Return the ids of sessions whose clients live. Raises RegistryError."""
        since, finished = now - LOST_SECONDS, now - ENDED_SECONDS
        query, lost_since_start = self._records.open_sessions, self._began > since
        found = await self._threads.run_blocking(query, 0.0 if lost_since_start else since, finished)
        if self._seen.keys() - found:
            found |= self._seen.keys() & await self._threads.run_blocking(query, 0.0, finished)
        return found

    async def _tidy_checkpoints(
        self, spec: ModelSpec, is_open: bool, samples: SamplersInUse, now: float
    ) -> list[CheckpointFolder]:
        """Delete a run's checkpoints whose time is over and its steps' weights that nobody samples from,
        prove and sign the others, and return them."""
        found = await self._disk(self._store().checkpoints, spec.id)
        newest = [one for one in found if Place.of(one).is_of_step][-1:] if is_open else []
        kept = []
        for one in found:
            place, sampler = Place.of(one), sampler_of(one, spec.session)
            last = max(one.created, self._sampled.get(place.path, 0.0), self._began)
            has_expired = one.expires is not None and one.expires <= now
            is_idle = sampler is not None and last < now - IDLE_SECONDS and one not in newest
            if has_expired or is_idle:
                is_unchanged = await self._disk(read_checkpoint, Path(one.folder)) == one
                is_promised = sampler in samples.samplers  # meanwhile, too
                if is_unchanged and (has_expired or not is_promised):
                    await self._delete(one)
                    continue
            kept.append(one)
            is_served = one.kind == "sampler" and sampler is None
            if not is_served:
                continue
            mark = await self._disk(_read_mark, one)
            if mark is None or mark.by_policy:
                await self._prove(spec.owner, one)
            elif mark.digest:
                await self._sign(spec.owner, one, mark.digest)
        return kept

    async def _charge(self, spec: ModelSpec, *, ends: bool) -> None:
        """Record once what a run's passes took that were done since the last time, and end the run if it
        `ends`. While the disk is full, nothing is recorded of a run that goes on."""
        try:
            seconds, tokens = await self._disk(self._uncharged, spec.id, marks=not ends)
        except OSError as error:
            _log.error("what run %s took is not charged yet: %s", spec.id, error)
            return
        if ends:
            await self._training().unload(spec.id)
            await self._note("run.ended", spec.owner, spec.id, {})
        if seconds or tokens:
            self._usage.trained(spec.owner, LIVE, seconds, tokens)

    def _uncharged(self, run: str, *, marks: bool) -> tuple[float, int]:
        """Return the seconds and tokens of passes that were not charged. Blocks.

        marks: whether they are marked as charged.

        Raises OSError: they are not.
        """
        store, seconds, tokens = self._store(), 0.0, 0
        mark, last = store.folder(run) / _CHARGED, store.last_result(run)
        charged = int(mark.read_bytes()) if mark.exists() else 0
        for number in range(max(charged, last - RESULTS_KEPT) + 1, last + 1):
            result = store.result(run, number)
            if isinstance(result, Computed):
                seconds, tokens = seconds + result.seconds, tokens + result.tokens
        if marks and last > charged:
            _write(mark, b"%d" % last)
        return seconds, tokens

    async def stop(self) -> None:
        """End what waits for checkpoints to be saved."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- parts -------------------------------------------------------------------------------

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _training(self) -> LiveTrainer:
        if self._trainer is None:
            raise InvalidRequestError(
                "This server does not train (--train-jobs 0). Its operator allows it.", code="training_off"
            )
        return self._trainer

    def _store(self) -> LiveStore:
        return self._training().store

    async def _note(self, action: AuditAction, tenant: str, target: str, details: Mapping[str, Any]) -> None:
        try:
            await self._threads.run_blocking(self._records.note, action, tenant, target, details)
        except RegistryError as error:
            _log.warning("%s of %s is not in the audit log: %s", action, target, error)

    async def _call(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        with storage_errors():
            return await self._threads.run_blocking(call, *args, **kwargs)

    async def _disk(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._library.disk.run_blocking(call, *args, **kwargs)

    async def _on_disk(self, work: Awaitable[T]) -> T:
        """Wait for files to be written. Raises DiskFullError, UnavailableError."""
        try:
            return await work
        except OSError as error:
            if error.errno in FULL:
                raise DiskFullError from error
            raise UnavailableError(
                f"The folder of live training cannot be written to: {error}.",
                code="store_unavailable",
                retry_after=5,
            ) from error


class SamplersInUse(Protocol):
    """Owner of promised samples."""

    @property
    def samplers(self) -> Collection[str]:
        """Ids of the samplers with unfinished samples."""
        ...


def adapter_name(run: str) -> str:
    """Return the name of the adapter whose versions a run's named checkpoints become."""
    found = _RUN.fullmatch(run)
    session, number = found.groups() if found else (run, "0")
    return f"run-{session[:8]}-{number}"


def sampler_of(checkpoint: CheckpointFolder, session: str) -> str | None:
    """Return the id of the sampling session that a step's weights are for; None for a named checkpoint."""
    found = _OF_STEP.fullmatch(checkpoint.name) if checkpoint.kind == "sampler" else None
    return None if found is None else f"{session}:sample:{found[1]}"


def answer_of(spec: ModelSpec, number: int, result: Result) -> Mapping[str, Any]:
    """Return the client's form of a result that is sent as JSON."""
    if isinstance(result, Refused):
        return {"error": result.message, "category": result.category}
    if number == 0 and (spec.start is not None or spec.version):
        return {"model_id": spec.id, "type": "load_weights"}
    if number == 0:
        return {"model_id": spec.id, "type": "create_model"}
    if isinstance(result, Stepped):
        return {"metrics": result.metrics}
    if isinstance(result, Loaded):
        return {"path": Place.of(result.checkpoint).path, "model_id": spec.id, "type": "load_weights"}
    if not isinstance(result, WeightsSaved):
        raise TypeError(f"{type(result).__name__} is not sent as JSON")
    saved = result.checkpoint
    if saved.kind == "external":
        return {"path": Place.of(saved).path, "size_bytes": saved.bytes, "type": "save_weights_external"}
    if saved.kind == "weights":
        return {"path": Place.of(saved).path, "type": "save_weights"}
    sampler = sampler_of(saved, spec.session)
    where = {"path": Place.of(saved).path} if sampler is None else {"sampling_session_id": sampler}
    return where | {"type": "save_weights_for_sampler"}


def _check_base(store: LiveStore, found: ModelSpec | CheckpointFolder, param: str) -> None:
    """Raise InvalidRequestError for a run or a checkpoint of another base."""
    try:
        store.check_base(found)
    except OtherBaseError as error:
        raise InvalidRequestError(f"{param}: {error}.", param=param, code="other_base") from error


def _signature(secret: bytes, place: Place, save: int, name: str, until: int) -> str:
    """Return what allows to download a file of this save of a checkpoint until then, in Unix seconds."""
    signed = msgspec.json.encode([place.path, save, name, until])
    return hmac.new(secret, signed, hashlib.sha256).hexdigest()


def _link_invalid(why: str) -> ForbiddenError:
    return ForbiddenError(f"{why} Ask for external_weights_urls again.", code="link_invalid")


def _write(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file as a whole. Raises OSError."""
    work = path.with_name(f".{path.name}.part")
    with open(os.open(work, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    replace_synced(work, path)


def _is_current(checkpoint: CheckpointFolder) -> bool:
    """Return True if the checkpoint's folder still has this save. Numbers of saves only grow. Blocks."""
    found = read_checkpoint(Path(checkpoint.folder))
    return found is not None and found.seq_id == checkpoint.seq_id


def _opened(checkpoint: CheckpointFolder, name: str) -> BinaryIO | None:
    """Open a file of this save of a checkpoint; None if it is gone. Blocks."""
    with suppress(FileNotFoundError):
        file = (Path(checkpoint.folder) / name).open("rb")
        if _is_current(checkpoint):
            return file
        file.close()
    return None


def _write_mark(checkpoint: CheckpointFolder, mark: _Mark) -> None:
    """Write a mark beside the save that it is about, if that is still there. Raises OSError."""
    if _is_current(checkpoint):
        _write(Path(checkpoint.folder) / _PROVED, msgspec.json.encode(mark))


def _read_mark(checkpoint: CheckpointFolder) -> _Mark | None:
    """Return the mark of this save of a checkpoint, if there is one."""
    try:
        content = (Path(checkpoint.folder) / _PROVED).read_bytes()
    except FileNotFoundError:
        return None
    mark = msgspec.json.decode(content, type=_Mark)
    return mark if mark.seq_id == checkpoint.seq_id else None


def _has_expired(checkpoint: CheckpointFolder) -> bool:
    return checkpoint.expires is not None and checkpoint.expires <= time.time()
