"""Client of verifier processes: from a version's two files to its report, and its packed adapter in the
store.

A verifier process proves versions, one after the other, on the base of the engine that runs now. Where many
wait and the machine has cores and memory for it, a second process helps until they are done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from onebase_adapters.store.blobs import AdapterFiles, Blob
from onebase_adapters.store.store import Store
from onebase_edge.background import Backoff, FairSemaphore, Threads
from onebase_engine.engine.messages import EngineConfig, Fatal, Shutdown, encode
from onebase_engine.environment import behind_serving
from onebase_engine.machine import PROVING, free_host_memory
from onebase_protocol.adapters import MergeMethod, MergeSign
from onebase_server.processes.link import AskedProcess
from onebase_server.processes.verifier_protocol import (
    Alive,
    Attach,
    Attached,
    FromVerifier,
    Merge,
    Merged,
    MergeSource,
    Prove,
    Proved,
    Rejected,
    VersionStage,
    from_verifier_decoder,
    scratch_folder,
)

VERIFIER_COMMAND = (sys.executable, "-m", "onebase_server.processes", "verifier")
PROBES = ("The capital of France is", "def add(a, b):\n")
"""Prompts whose greedy texts are compared with PEFT's."""
PROBE_TOKENS = 8
ATTEMPTS = 2
"""Number of tries of a job whose process dies: it may have died of something else."""
ATTACH_SECONDS = 180.0
"""Time, in seconds, after which a process that has not attached the base hangs."""
SILENT_SECONDS = 60.0
"""Time, in seconds without a sign of life, after which a process that proves is killed as stopped or
stuck."""
_LAST_WORDS_SECONDS = 5.0
BACKLOG = 4
"""Number of waiting jobs beyond which a second process is started: that takes as long as some of their
proofs."""
_MOST_HELD = 4 * BACKLOG
"""Largest number of jobs whose files are held, of which one tenant's are half at most."""
HELP_BYTES = 2 << 30
"""Free memory, in bytes besides the base's size, that a second process is started with. On a small base it
takes a third of that."""
HELP_SECONDS = 30.0
"""Time, in seconds without a job, after which a second process is ended."""
BACKOFF = Backoff(0.5, 30.0)

OnProgress = Callable[[VersionStage], None]
Answer = TypeVar("Answer", Proved, Merged)

_log = logging.getLogger(__name__)


class RejectedError(Exception):
    """The version is not served. `code` is stable, the message is for the one who uploaded it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class VerifierGoneError(Exception):
    """There is no verifier: there is no engine, its engine ended, or it cannot attach the base.

    The version is neither proven nor rejected; the next verifier can be asked.
    """


class _HelperDiedError(Exception):
    """The second process is gone, and is not replaced: another process takes the job."""


@dataclass(frozen=True)
class Proof:
    """A version that may be served: the report as JSON has it, and the packed adapter."""

    report: dict[str, Any]
    packed: Blob


@dataclass(frozen=True, eq=False)
class _Base:
    """The base of one engine. `fd`: of the memory that it was published into, of `size` bytes."""

    attach: Attach
    fd: int | None
    size: int


@dataclass(frozen=True)
class _Shared:
    """A proof that runs, and whoever waits for it."""

    task: asyncio.Task[Proof]
    listeners: list[OnProgress]


@dataclass(eq=False)
class _Place:
    """Place for one process, which is asked one job at a time."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Lock that is held by whoever talks to the process."""
    process: AskedProcess[FromVerifier] | None = None
    on_progress: OnProgress | None = None
    end: asyncio.TimerHandle | None = None
    """Timer that ends a helper without a job."""

    @property
    def is_ready(self) -> bool:
        """Whether the process can be asked."""
        return self.process is not None and self.process.idle


class VerifierClient:
    """Has versions proved. Everything is called from one event loop.

    Args:
        store: holds the versions' files, and gets their packed adapters.
        base_id: goes into the packed adapters.
        probes: prompts as tokens.
        command: starts a verifier; gets `--fd N`, `--base-fd N` and `--busy-fd N` appended.
        busy_fd: of the byte that says whether sequences run.
        proof_timeout: seconds for one version, once the base is attached.
        silence: seconds without a sign of life, while it proves, after which a process is killed.
        backoff: between two tries of those that wait for a verifier.
        help_seconds: without a job, after which a second process is ended.
    """

    def __init__(
        self,
        store: Store,
        disk: Threads,
        *,
        base_id: str,
        probes: Sequence[list[int]],
        busy_fd: int | None = None,
        command: Sequence[str] = VERIFIER_COMMAND,
        proof_timeout: float = 600.0,
        silence: float = SILENT_SECONDS,
        backoff: Backoff = BACKOFF,
        help_seconds: float = HELP_SECONDS,
    ) -> None:
        self.deaths = 0
        """Processes that died by themselves."""
        self._store = store
        self._disk = disk
        self._held_folder = store.scratch() / "proofs"
        """Folder of held files, since the store's sweep deletes old files in its scratch folder itself."""
        shutil.rmtree(self._held_folder, ignore_errors=True)  # left by a process that was killed
        self._base_id = base_id
        self._probes = list(probes)
        self._busy_fd = busy_fd
        self._command = tuple(command)
        self._proof_timeout = proof_timeout
        self._silence = silence
        self._backoff = backoff
        self._base: _Base | None = None
        self._base_here = asyncio.Event()
        self._attaching: asyncio.Task[None] | None = None
        self._first = _Place()
        self._helper: _Place | None = None
        self._free = [self._first]
        """Free places, as many as `_permits` has permits."""
        self._permits = FairSemaphore(1)
        self._holds = FairSemaphore(_MOST_HELD, _MOST_HELD // 2)
        self._waiting = 0
        """Number of jobs that wait for a place, their files held."""
        self._threads = 0
        """Number of threads of a verifier that computes on the CPU; 0 on an accelerator."""
        self._alone: _Base | None = None
        """Base on which a second process could not be kept: no other one is tried."""
        self._help_seconds = help_seconds
        self._tasks: set[asyncio.Task[None]] = set()
        self._shared: dict[tuple[str, str, bool], _Shared] = {}

    @property
    def pid(self) -> int | None:
        """Process id of the first process that runs now, if one does."""
        return next(iter(self.pids), None)

    @property
    def pids(self) -> list[int]:
        """Process ids of all that run now, the helper's last."""
        processes = [place.process for place in self._places]
        return [process.pid for process in processes if process is not None and not process.lost]

    @property
    def _places(self) -> list[_Place]:
        return [self._first] if self._helper is None else [self._first, self._helper]

    @property
    def has_base(self) -> bool:
        """Whether there is an engine whose base can be attached."""
        return self._base_here.is_set()

    async def base_here(self) -> None:
        """Wait until there is an engine whose base can be attached."""
        await self._base_here.wait()

    # ---- the engine's life -------------------------------------------------------------------

    def base_ready(self, config: EngineConfig, manifest: bytes, base_fd: int | None) -> None:
        """Attach the base that an engine has published, in the background."""
        attaching = self._attach_or_log(config, manifest, base_fd)
        self._attaching = asyncio.get_running_loop().create_task(attaching)

    async def _attach_or_log(self, config: EngineConfig, manifest: bytes, base_fd: int | None) -> None:
        try:
            await self.attach(config, manifest, base_fd)
        except VerifierGoneError as error:
            if self._base is not None:
                _log.error("adapters cannot be proved: %s", error)
        except Exception:
            _log.exception("the verifier cannot be started")

    async def attach(self, config: EngineConfig, manifest: bytes, base_fd: int | None) -> None:
        """Start a process on an engine's base. Proofs may be asked for meanwhile, and wait their turn.

        Args:
            manifest: from the engine's `Ready`.
            base_fd: of the memfd that holds the base; stays the caller's, and open until `engine_gone`.

        Raises VerifierGoneError: the base cannot be attached, or the engine ended meanwhile.
        """
        size = 0 if base_fd is None else os.fstat(base_fd).st_size
        attach = Attach(config=config, manifest=manifest, base_id=self._base_id)
        self._base = base = _Base(attach, base_fd, size)
        self._base_here.set()
        async with self._place("") as place:
            await self._attached(place, base)

    async def engine_gone(self) -> None:
        """End the processes, and all proofs by VerifierGoneError: nobody holds on to the base after that."""
        self._base = None
        self._base_here.clear()
        places = self._places
        for place in places:
            if place.process is not None:
                place.process.kill()
        for place in places:
            async with place.turn:
                await self._end_process(place)
        if self._helper is not None:
            await self._end_idle_help(self._helper)
        if self._attaching is not None:
            await self._attaching

    # ---- proofs ------------------------------------------------------------------------------

    async def prove(
        self,
        files: AdapterFiles,
        *,
        tenant: str,
        allow_noop: bool,
        wait_for_verifier: bool,
        on_progress: OnProgress,
    ) -> Proof:
        """Prove one version, and put its packed adapter into the store. Waits until there is an engine.

        The same content is proved once for all who ask for the tenant meanwhile. Another tenant's proof of
        it may have its turn much later.

        Args:
            tenant: the tenant in whose turn it is proved.
            wait_for_verifier: if the verifier is lost or cannot be had, wait for the next one.

        Raises:
            RejectedError: the version is not served: it is not sound, differs from PEFT's, killed the process
                twice (`proof_crashed`) or took too long (`proof_timeout`).
            VerifierGoneError: there is no verifier, unless `wait_for_verifier`.
            StoreError: the files cannot be read, or the packed adapter not be kept.
        """
        pauses = self._backoff.pauses()
        while True:
            await self._base_here.wait()
            try:
                return await self._prove_once(tenant, files, allow_noop, on_progress)
            except VerifierGoneError as error:
                if not wait_for_verifier:
                    raise
                _log.warning("version %s waits for a verifier: %s", files.digest[:12], error)
            await asyncio.sleep(next(pauses))

    async def _prove_once(
        self, tenant: str, files: AdapterFiles, allow_noop: bool, on_progress: OnProgress
    ) -> Proof:
        """Join the tenant's proof of this content that runs, or begin it."""
        key = (tenant, files.digest, allow_noop)
        shared = self._shared.get(key)
        if shared is None:
            listeners: list[OnProgress] = []

            def report(progress: VersionStage) -> None:
                for listener in list(listeners):
                    listener(progress)

            task = asyncio.get_running_loop().create_task(self._prove(tenant, files, allow_noop, report))
            shared = self._shared[key] = _Shared(task, listeners)
            task.add_done_callback(lambda done: self._shared.pop(key))
        shared.listeners.append(on_progress)
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.listeners.remove(on_progress)

    async def _prove(
        self, tenant: str, files: AdapterFiles, allow_noop: bool, on_progress: OnProgress
    ) -> Proof:
        packed = self._store.scratch() / f"{files.digest[:16]}-{secrets.token_hex(8)}.packed"
        async with self._held(tenant, [files.config, files.weights]) as (config, weights):
            job = Prove(
                digest=files.digest,
                config_path=str(config),
                weights_path=str(weights),
                packed_path=str(packed),
                probes=self._probes,
                probe_tokens=PROBE_TOKENS,
                allow_noop=allow_noop,
            )
            try:
                proved = await self.ask(job, on_progress, tenant)
                blob = await self._disk.run_for(tenant, self._keep, packed, proved.sha256)
            finally:
                packed.unlink(missing_ok=True)
        return Proof(msgspec.to_builtins(proved.report), blob)

    @contextlib.asynccontextmanager
    async def _held(self, tenant: str, blobs: Sequence[Blob]) -> AsyncIterator[list[Path]]:
        """Hold local files with the blobs' content for the block, however long that waits for its turn.

        Those of few jobs are held at once, since they count on disk beyond the limit of a remote store's
        cache: the others wait for a turn before. Raises StoreError.
        """
        targets = [self._held_folder / f"{blob.sha256[:16]}-{secrets.token_hex(8)}" for blob in blobs]

        def hold() -> list[Path]:
            return [
                self._store.hold(blob.sha256, target) for blob, target in zip(blobs, targets, strict=True)
            ]

        def unlink(done: object) -> None:
            for target in targets:
                target.unlink(missing_ok=True)

        await self._holds.acquire(tenant)
        try:
            holding = asyncio.ensure_future(self._disk.run_for(tenant, hold))
            try:
                yield await asyncio.shield(holding)
            finally:
                holding.add_done_callback(unlink)  # a thread continues where this is cancelled
        finally:
            self._holds.release(tenant)

    async def merge(
        self,
        parents: Sequence[tuple[str, AdapterFiles, float]],
        *,
        tenant: str,
        method: MergeMethod,
        density: float | None,
        sign: MergeSign,
        seed: int,
    ) -> AdapterFiles:
        """Merge several adapters into one, in the store; it is not proved yet.

        Args:
            parents: what each is called, its files and its weight.
            tenant: the tenant in whose turn they are merged.
            method, density, sign, seed: as in `proof.merging.MergeRecipe`.

        Raises:
            RejectedError: they cannot be merged so, or it killed the process twice or took too long.
            VerifierGoneError: there is no verifier now.
            StoreError: the files cannot be read, or the result not be kept.
        """
        result = self._store.scratch() / f"merge-{secrets.token_hex(8)}"
        config, weights = result.with_suffix(".json"), result.with_suffix(".safetensors")
        blobs = [blob for _, files, _ in parents for blob in (files.config, files.weights)]
        async with self._held(tenant, blobs) as paths:
            job = Merge(
                digest=result.name,
                parents=[
                    MergeSource(label, str(paths[2 * number]), str(paths[2 * number + 1]), weight)
                    for number, (label, _, weight) in enumerate(parents)
                ],
                method=method,
                density=density,
                sign=sign,
                seed=seed,
                config_path=str(config),
                weights_path=str(weights),
            )
            try:
                await self._ask(job, Merged, lambda progress: None, tenant)
                merged = [
                    await self._disk.run_for(tenant, self._store.add_file, path, move=True)
                    for path in (config, weights)
                ]
            finally:
                config.unlink(missing_ok=True)
                weights.unlink(missing_ok=True)
        return AdapterFiles(*merged)

    def _keep(self, packed: Path, sha256: str) -> Blob:
        blob = self._store.add_file(packed, move=True)
        if blob.sha256 != sha256:
            raise RejectedError("prepared_damaged", "the packed adapter is not what was proved; try again")
        return blob

    # ---- the process -------------------------------------------------------------------------

    async def ask(self, job: Prove, on_progress: OnProgress, tenant: str = "") -> Proved:
        """Have one version proved in the tenant's turn, after those that it asked for earlier.

        A process that died or was stopped is replaced. Cancelling a job that runs ends its process. Raises
        RejectedError and VerifierGoneError as `prove` does.
        """
        try:
            return await self._ask(job, Proved, on_progress, tenant)
        except BaseException:
            Path(job.packed_path).unlink(missing_ok=True)
            raise

    async def _ask(
        self, job: Prove | Merge, kind: type[Answer], on_progress: OnProgress, tenant: str = ""
    ) -> Answer:
        """Have any job answered, as `ask` does for a proof. `kind`: the type of its answer."""
        while True:
            async with self._place(tenant) as place:
                base = self._base
                if base is None:
                    raise VerifierGoneError("there is no verifier: the engine is not ready")
                try:
                    place.on_progress = on_progress
                    return await self._answer(place, base, job, kind)
                except _HelperDiedError:
                    continue
                except BaseException:
                    if place.process is not None and not place.process.idle:
                        # Cancelled, or the process is lost anyway: nobody waits for what it would say.
                        place.process.kill()
                    raise
                finally:
                    place.on_progress = None

    @contextlib.asynccontextmanager
    async def _place(self, tenant: str) -> AsyncIterator[_Place]:
        """Acquire a place for the block; tenants take turns."""
        self._waiting += 1
        try:
            self._call_for_help()
            await self._permits.acquire(tenant)
        finally:
            self._waiting -= 1
        place = self._first if self._first in self._free else self._free[0]
        self._free.remove(place)
        if place.end is not None:
            place.end.cancel()
        try:
            async with place.turn:
                yield place
        finally:
            self._give_back(place)
            self._permits.release(tenant)

    def _give_back(self, place: _Place) -> None:
        """Make the place free, unless it is one to be ended. The caller releases its permit."""
        if place is self._helper and not (self._base is not None and self._alone is None and place.is_ready):
            self._permits.resize(-1)
            self._begin(self._end_help(place))
            return
        self._free.append(place)
        self._call_for_help()
        if place is self._helper:
            loop = asyncio.get_running_loop()
            place.end = loop.call_later(self._help_seconds, lambda: self._begin(self._end_idle_help(place)))

    # ---- a second process --------------------------------------------------------------------

    def _call_for_help(self) -> None:
        """Start a second process, if many wait and cores and memory are there for it."""
        base = self._base
        if self._waiting <= BACKLOG or self._helper is not None or base is None or self._alone is base:
            return
        roomy = free_host_memory() >= HELP_BYTES + base.size
        if roomy and 0 < 2 * self._threads <= len(os.sched_getaffinity(0)):
            self._alone, self._helper = None, _Place()
            self._begin(self._help(self._helper, base))

    async def _help(self, place: _Place, base: _Base) -> None:
        try:
            async with place.turn:
                await self._attached(place, base)
        except Exception as error:
            self._alone, self._helper = base, None
            _log.warning("no second verifier helps: %s", error)
        else:
            self._give_back(place)
            self._permits.resize(1)

    async def _end_idle_help(self, place: _Place) -> None:
        if place in self._free and self._permits.free:  # else it is released later
            self._permits.resize(-1)
            self._free.remove(place)
            await self._end_help(place)

    async def _end_help(self, place: _Place) -> None:
        async with place.turn:
            await self._end_process(place, _LAST_WORDS_SECONDS)
        self._helper = None
        self._call_for_help()

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- the process -------------------------------------------------------------------------

    async def _answer(self, place: _Place, base: _Base, job: Prove | Merge, kind: type[Answer]) -> Answer:
        how, doing = "", "proven" if isinstance(job, Prove) else "merged"
        attempts = ATTEMPTS
        while attempts:
            if place is self._helper and not place.is_ready:
                raise _HelperDiedError
            attempts -= 1
            process = await self._attached(place, base)
            process.ask(encode(job))
            try:
                async with asyncio.timeout(self._proof_timeout):
                    answer = await process.answer(self._silence)
            except TimeoutError:
                await self._end_process(place)
                raise RejectedError(
                    "proof_timeout",
                    f"the version was not {doing} within {self._proof_timeout:g} s; --proof-timeout is the "
                    "limit",
                ) from None
            if isinstance(answer, kind):
                return answer
            if isinstance(answer, Rejected):
                raise RejectedError(answer.code, answer.message)
            if answer is None:
                beside = self._helper
                how = await self._died(place, base)
                _log.error("the verifier died (%s) at version %s", how, job.digest[:12])
                if beside is not None and self._alone is not base:
                    # There may be no memory for two: from now on one proves alone, and this job once more.
                    self._alone, attempts = base, attempts + 1
                    if place is not beside:
                        async with beside.turn:
                            await self._end_process(beside, _LAST_WORDS_SECONDS)
            else:
                how = f"it answered {type(answer).__name__}"
                await self._end_process(place)
        raise RejectedError(
            "proof_crashed",
            f"the process by which this version was to be {doing} ended {ATTEMPTS} times ({how})",
        )

    async def _attached(self, place: _Place, base: _Base) -> AskedProcess[FromVerifier]:
        """Return the running process, or a new one that has attached the base. Raises VerifierGoneError."""
        how = ""
        for _ in range(ATTEMPTS):
            self._check_current(base)
            if place.process is not None and place.process.idle:
                return place.process
            await self._end_process(place)
            process = await self._spawn(place, base)
            process.ask(encode(base.attach))
            answer: FromVerifier | None = None
            try:
                async with asyncio.timeout(ATTACH_SECONDS):
                    answer = await process.answer()
            except TimeoutError:
                process.kill()
            if isinstance(answer, Attached):
                self._threads = answer.threads
                return process
            if answer is not None:
                await self._end_process(place, _LAST_WORDS_SECONDS)
                how = answer.message if isinstance(answer, Fatal) else type(answer).__name__
                break
            how = await self._died(place, base)
            _log.error("the verifier ended (%s) while it attached the base", how)
        raise VerifierGoneError(f"the verifier cannot attach the base: {how}")

    async def _spawn(self, place: _Place, base: _Base) -> AskedProcess[FromVerifier]:
        self._check_current(base)
        given = {"--base-fd": base.fd, "--busy-fd": self._busy_fd}
        fds = {option: fd for option, fd in given.items() if fd is not None}
        news = partial(self._take_news, place)
        try:
            place.process = process = await AskedProcess.spawn(
                self._command, from_verifier_decoder(), news, fds, behind_serving(), PROVING
            )
        except OSError as error:
            raise VerifierGoneError(f"the verifier cannot be started: {error}") from error
        self._check_current(base)
        return process

    def _take_news(self, place: _Place, message: FromVerifier) -> bool:
        if isinstance(message, VersionStage) and place.on_progress is not None:
            place.on_progress(message)
        return isinstance(message, Alive | VersionStage)

    def _check_current(self, base: _Base) -> None:
        if self._base is not base:
            raise VerifierGoneError("the engine ended, and its verifier with it")

    async def _died(self, place: _Place, base: _Base) -> str:
        """Count a death, and return how the process ended. Raises VerifierGoneError if it ended with its
        engine."""
        self._check_current(base)
        self.deaths += 1
        return await self._end_process(place, _LAST_WORDS_SECONDS)

    async def _end_process(self, place: _Place, grace: float = 0.0) -> str:
        """Ask the process to exit, kill it after `grace` seconds, remove what it left; says how it ended."""
        process = place.process
        if process is None:
            return ""
        process.notify(Shutdown())
        how = await process.end(grace)
        await asyncio.to_thread(shutil.rmtree, scratch_folder(process.pid), ignore_errors=True)
        place.process = None
        return how
