"""From a version's two files to the proven one: the verifier's report, and the packed adapter, stored."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from onebase_adapters.store.content import Blob, VersionFiles
from onebase_adapters.store.store import Store
from onebase_engine.engine.messages import EngineConfig
from onebase_server.background import Threads
from onebase_server.processes.verifier_link import RejectedError, VerifierGoneError, VerifierLink
from onebase_server.processes.verifier_protocol import Progress, Prove

PROBES = ("The capital of France is", "def add(a, b):\n")
"""Prompts whose greedy texts are compared with PEFT's."""
PROBE_TOKENS = 8
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Proof:
    """A version that may be served: the report as JSON has it, and the packed adapter."""

    report: dict[str, Any]
    prepared: Blob


class Prover:
    """Gives versions to the verifier, which lives and dies with the engine.

    `base_id` goes into the packed adapters; `probes` are prompts as tokens.
    """

    def __init__(
        self, verifier: VerifierLink, store: Store, disk: Threads, base_id: str, probes: Sequence[list[int]]
    ) -> None:
        self._verifier = verifier
        self._store = store
        self._disk = disk
        self._base_id = base_id
        self._probes = list(probes)
        self._started = asyncio.Event()
        self._starting: asyncio.Task[None] | None = None

    # ---- the verifier's life -----------------------------------------------------------------

    def base_ready(self, config: EngineConfig, manifest: bytes, base_fd: int) -> None:
        """An engine has published its base: attach a verifier, in the background."""
        self._starting = asyncio.get_running_loop().create_task(self._start(config, manifest, base_fd))

    async def _start(self, config: EngineConfig, manifest: bytes, base_fd: int) -> None:
        attached = asyncio.get_running_loop().create_task(
            self._verifier.start(config, manifest, base_fd, base_id=self._base_id)
        )
        # A job may be given to a verifier that is still attaching: it waits its turn.
        await asyncio.sleep(0)
        self._started.set()
        try:
            await attached
        except VerifierGoneError as error:
            _log.error("adapters cannot be proved: %s", error)
        except asyncio.CancelledError:
            attached.cancel()
            raise

    async def engine_gone(self) -> None:
        """End the verifier; jobs that run wait for the next one."""
        self._started.clear()
        if self._starting is not None:
            self._starting.cancel()
            with suppress(asyncio.CancelledError):
                await self._starting
        await self._verifier.stop()

    @property
    def pid(self) -> int | None:
        """The verifier's process id while one runs."""
        return self._verifier.pid

    # ---- proofs ------------------------------------------------------------------------------

    async def prove(
        self,
        files: VersionFiles,
        *,
        allow_noop: bool,
        patient: bool,
        on_progress: Callable[[Progress], None],
    ) -> Proof:
        """Prove one version, and put its packed adapter into the store.

        Args:
            patient: go on when the verifier cannot be had, until one can.

        Raises:
            RejectedError: the version is not served.
            VerifierGoneError: not patient, and there is no verifier.
            StoreError: the files cannot be read, or the packed adapter not be kept.
        """
        pause = _FIRST_PAUSE
        while True:
            await self._started.wait()
            try:
                return await self._prove(files, allow_noop, on_progress)
            except VerifierGoneError as error:
                if not patient:
                    raise
                _log.warning("version %s waits for a verifier: %s", files.digest[:12], error)
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE, 2 * pause)

    async def _prove(
        self, files: VersionFiles, allow_noop: bool, on_progress: Callable[[Progress], None]
    ) -> Proof:
        config = await self._disk.run(self._store.local, files.config.sha256)
        weights = await self._disk.run(self._store.local, files.weights.sha256)
        scratch = self._store.scratch() / f"{files.digest[:16]}-{secrets.token_hex(8)}.packed"
        job = Prove(
            digest=files.digest,
            config_path=str(config),
            weights_path=str(weights),
            packed_path=str(scratch),
            probes=self._probes,
            probe_tokens=PROBE_TOKENS,
            allow_noop=allow_noop,
        )
        try:
            proved = await self._verifier.prove(job, on_progress)
            prepared = await self._disk.run(self._keep, scratch, proved.sha256)
        finally:
            scratch.unlink(missing_ok=True)
        report: dict[str, Any] = msgspec.to_builtins(proved.report)
        return Proof(report, prepared)

    def _keep(self, scratch: Path, sha256: str) -> Blob:
        blob = self._store.add_file(scratch, move=True)
        if blob.sha256 != sha256:
            raise RejectedError("prepared_damaged", "the packed adapter is not what was proved; try again")
        return blob
