"""The api's way to proofs: from a version's two files to its report, and its packed adapter in the store.

One verifier process at a time proves versions, one after the other, on the base of the engine that runs now.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from onebase_adapters.proof.report import MergeMethod, MergeSign
from onebase_adapters.store.blobs import Blob, VersionFiles
from onebase_adapters.store.store import Store
from onebase_engine.engine.messages import EngineConfig, Fatal, Shutdown, encode
from onebase_engine.environment import behind_serving
from onebase_server.background import Backoff, Threads
from onebase_server.processes.link import AskedProcess
from onebase_server.processes.verifier_protocol import (
    Alive,
    Attach,
    Attached,
    FromVerifier,
    Merge,
    Merged,
    MergeParent,
    Progress,
    Prove,
    Proved,
    Rejected,
    from_verifier_decoder,
    scratch_folder,
)

VERIFIER_COMMAND = (sys.executable, "-m", "onebase_server.processes", "verifier")
PROBES = ("The capital of France is", "def add(a, b):\n")
"""Prompts whose greedy texts are compared with PEFT's."""
PROBE_TOKENS = 8
ATTEMPTS = 2
"""A job whose process dies is tried once more: it may have died of something else."""
ATTACH_SECONDS = 180.0
"""A process that has not attached the base by then hangs."""
SILENT_SECONDS = 60.0
"""A process that proves and gives no sign of life for that long is stopped or stuck: it is killed."""
_LAST_WORDS_SECONDS = 5.0
BACKOFF = Backoff(0.5, 30.0)

OnProgress = Callable[[Progress], None]
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


@dataclass(frozen=True)
class Proof:
    """A version that may be served: the report as JSON has it, and the packed adapter."""

    report: dict[str, Any]
    packed: Blob


@dataclass(frozen=True, eq=False)
class _Base:
    """The base of one engine. `fd`: of the memory that it was published into."""

    attach: Attach
    fd: int | None


@dataclass(frozen=True)
class _Shared:
    """A proof that runs, and whoever waits for it."""

    task: asyncio.Task[Proof]
    listeners: list[OnProgress]


class VerifierClient:
    """Has versions proved. Everything is called from one event loop.

    Args:
        store: holds the versions' files, and gets their packed adapters.
        base_id: goes into the packed adapters.
        probes: prompts as tokens.
        command: starts a verifier; gets `--fd N`, `--base-fd N` and `--busy-fd N` appended.
        busy_fd: of the byte that says whether rows run.
        proof_timeout: seconds for one version, once the base is attached.
        silence: seconds without a sign of life, while it proves, after which a process is killed.
        backoff: between two tries of those that wait for a verifier.
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
    ) -> None:
        self.deaths = 0
        """Processes that died by themselves."""
        self._store = store
        self._disk = disk
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
        self._turn = asyncio.Lock()
        """Held by whoever talks to the process."""
        self._process: AskedProcess[FromVerifier] | None = None
        self._on_progress: OnProgress | None = None
        self._shared: dict[tuple[str, bool], _Shared] = {}

    @property
    def pid(self) -> int | None:
        """Of the process that runs now, if one does."""
        return None if self._process is None or self._process.lost else self._process.pid

    @property
    def has_base(self) -> bool:
        """Whether there is an engine whose base can be attached."""
        return self._base_here.is_set()

    async def base_here(self) -> None:
        """Wait until there is an engine whose base can be attached."""
        await self._base_here.wait()

    # ---- the engine's life -------------------------------------------------------------------

    def base_ready(self, config: EngineConfig, manifest: bytes, base_fd: int | None) -> None:
        """An engine has published its base: attach it, in the background."""
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
        self._base = base = _Base(Attach(config=config, manifest=manifest, base_id=self._base_id), base_fd)
        self._base_here.set()
        async with self._turn:
            await self._attached(base)

    async def engine_gone(self) -> None:
        """End the process, and all proofs by VerifierGoneError: nobody holds on to the base after that."""
        self._base = None
        self._base_here.clear()
        if self._process is not None:
            self._process.kill()
        async with self._turn:
            await self._end_process()
        if self._attaching is not None:
            await self._attaching

    # ---- proofs ------------------------------------------------------------------------------

    async def prove(
        self, files: VersionFiles, *, allow_noop: bool, wait_for_verifier: bool, on_progress: OnProgress
    ) -> Proof:
        """Prove one version, and put its packed adapter into the store. Waits until there is an engine.

        The same content is proved once for all who ask meanwhile.

        Args:
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
                return await self._prove_once(files, allow_noop, on_progress)
            except VerifierGoneError as error:
                if not wait_for_verifier:
                    raise
                _log.warning("version %s waits for a verifier: %s", files.digest[:12], error)
            await asyncio.sleep(next(pauses))

    async def _prove_once(self, files: VersionFiles, allow_noop: bool, on_progress: OnProgress) -> Proof:
        """Join the proof of this content that runs, or begin it."""
        key = (files.digest, allow_noop)
        shared = self._shared.get(key)
        if shared is None:
            listeners: list[OnProgress] = []

            def report(progress: Progress) -> None:
                for listener in list(listeners):
                    listener(progress)

            task = asyncio.get_running_loop().create_task(self._prove(files, allow_noop, report))
            shared = self._shared[key] = _Shared(task, listeners)
            task.add_done_callback(lambda done: self._shared.pop(key))
        shared.listeners.append(on_progress)
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.listeners.remove(on_progress)

    async def _prove(self, files: VersionFiles, allow_noop: bool, on_progress: OnProgress) -> Proof:
        config = await self._disk.run(self._store.local, files.config.sha256)
        weights = await self._disk.run(self._store.local, files.weights.sha256)
        packed = self._store.scratch() / f"{files.digest[:16]}-{secrets.token_hex(8)}.packed"
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
            proved = await self.ask(job, on_progress)
            blob = await self._disk.run(self._keep, packed, proved.sha256)
        finally:
            packed.unlink(missing_ok=True)
        return Proof(msgspec.to_builtins(proved.report), blob)

    async def merge(
        self,
        parents: Sequence[tuple[str, VersionFiles, float]],
        *,
        method: MergeMethod,
        density: float | None,
        sign: MergeSign,
        seed: int,
    ) -> VersionFiles:
        """One adapter made of several, in the store; nobody has proved it yet.

        Args:
            parents: what each is called, its files and its weight.
            method, density, sign, seed: as in `proof.merging.MergeRecipe`.

        Raises:
            RejectedError: they cannot be merged so, or it killed the process twice or took too long.
            VerifierGoneError: there is no verifier now.
            StoreError: the files cannot be read, or the result not be kept.
        """
        result = self._store.scratch() / f"merge-{secrets.token_hex(8)}"
        config, weights = result.with_suffix(".json"), result.with_suffix(".safetensors")
        paths = [
            await self._disk.run(self._store.local, blob.sha256)
            for _, files, _ in parents
            for blob in (files.config, files.weights)
        ]
        job = Merge(
            digest=result.name,
            parents=[
                MergeParent(label, str(paths[2 * number]), str(paths[2 * number + 1]), weight)
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
            await self._ask(job, Merged, lambda progress: None)
            blobs = [
                await self._disk.run(self._store.add_file, path, move=True) for path in (config, weights)
            ]
        finally:
            config.unlink(missing_ok=True)
            weights.unlink(missing_ok=True)
        return VersionFiles(*blobs)

    def _keep(self, packed: Path, sha256: str) -> Blob:
        blob = self._store.add_file(packed, move=True)
        if blob.sha256 != sha256:
            raise RejectedError("prepared_damaged", "the packed adapter is not what was proved; try again")
        return blob

    # ---- the process -------------------------------------------------------------------------

    async def ask(self, job: Prove, on_progress: OnProgress) -> Proved:
        """Have one version proved, after those that were asked for earlier.

        A process that died or was stopped is replaced. Cancelling a job that runs ends its process. Raises
        RejectedError and VerifierGoneError as `prove` does.
        """
        try:
            return await self._ask(job, Proved, on_progress)
        except BaseException:
            Path(job.packed_path).unlink(missing_ok=True)
            raise

    async def _ask(self, job: Prove | Merge, kind: type[Answer], on_progress: OnProgress) -> Answer:
        """As `ask`, for any job; `kind`: what answers it."""
        async with self._turn:
            base = self._base
            if base is None:
                raise VerifierGoneError("there is no verifier: the engine is not ready")
            try:
                self._on_progress = on_progress
                return await self._answer(base, job, kind)
            except BaseException:
                if self._process is not None and not self._process.idle:
                    # Cancelled, or the process is lost anyway: nobody waits for what it would say.
                    self._process.kill()
                raise
            finally:
                self._on_progress = None

    async def _answer(self, base: _Base, job: Prove | Merge, kind: type[Answer]) -> Answer:
        how, doing = "", "proven" if isinstance(job, Prove) else "merged"
        for _ in range(ATTEMPTS):
            process = await self._attached(base)
            process.ask(encode(job))
            try:
                async with asyncio.timeout(self._proof_timeout):
                    answer = await process.answer(self._silence)
            except TimeoutError:
                await self._end_process()
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
                how = await self._died(base)
                _log.error("the verifier died (%s) at version %s", how, job.digest[:12])
            else:
                how = f"it answered {type(answer).__name__}"
                await self._end_process()
        raise RejectedError(
            "proof_crashed",
            f"the process by which this version was to be {doing} ended {ATTEMPTS} times ({how})",
        )

    async def _attached(self, base: _Base) -> AskedProcess[FromVerifier]:
        """The running process, or a new one that has attached the base. Raises VerifierGoneError."""
        how = ""
        for _ in range(ATTEMPTS):
            self._check_current(base)
            if self._process is not None and self._process.idle:
                return self._process
            await self._end_process()
            process = await self._spawn(base)
            process.ask(encode(base.attach))
            answer: FromVerifier | None = None
            try:
                async with asyncio.timeout(ATTACH_SECONDS):
                    answer = await process.answer()
            except TimeoutError:
                process.kill()
            if isinstance(answer, Attached):
                return process
            if answer is not None:
                await self._end_process(_LAST_WORDS_SECONDS)
                how = answer.message if isinstance(answer, Fatal) else type(answer).__name__
                break
            how = await self._died(base)
            _log.error("the verifier ended (%s) while it attached the base", how)
        raise VerifierGoneError(f"the verifier cannot attach the base: {how}")

    async def _spawn(self, base: _Base) -> AskedProcess[FromVerifier]:
        self._check_current(base)
        given = {"--base-fd": base.fd, "--busy-fd": self._busy_fd}
        fds = {option: fd for option, fd in given.items() if fd is not None}
        self._process = process = await AskedProcess.spawn(
            self._command, from_verifier_decoder(), self._take_news, fds, behind_serving()
        )
        self._check_current(base)
        return process

    def _take_news(self, message: FromVerifier) -> bool:
        if isinstance(message, Progress) and self._on_progress is not None:
            self._on_progress(message)
        return isinstance(message, Alive | Progress)

    def _check_current(self, base: _Base) -> None:
        if self._base is not base:
            raise VerifierGoneError("the engine ended, and its verifier with it")

    async def _died(self, base: _Base) -> str:
        """After a death: how the process ended. Raises VerifierGoneError if it was ended with its engine."""
        self._check_current(base)
        self.deaths += 1
        return await self._end_process(_LAST_WORDS_SECONDS)

    async def _end_process(self, grace: float = 0.0) -> str:
        """Ask the process to exit, kill it after `grace` seconds, remove what it left; says how it ended."""
        process = self._process
        if process is None:
            return ""
        process.tell(Shutdown())
        how = await process.end(grace)
        await asyncio.to_thread(shutil.rmtree, scratch_folder(process.pid), ignore_errors=True)
        self._process = None
        return how
