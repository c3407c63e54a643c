"""The api's side of the verifier: one process at a time, which proves versions one after the other."""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from onebase_engine.engine.messages import EngineConfig, Fatal, Shutdown
from onebase_server.processes.link import ChildProcess
from onebase_server.processes.scratch import scratch_folder
from onebase_server.processes.verifier_protocol import (
    Alive,
    Attach,
    Attached,
    FromVerifier,
    Progress,
    Prove,
    Proved,
    Rejected,
    from_verifier_decoder,
)

VERIFIER_COMMAND = (sys.executable, "-m", "onebase_server.processes.verifier")
ATTEMPTS = 2
"""A job whose process dies is tried once more: it may have died of something else."""
ATTACH_SECONDS = 180.0
"""A process that has not attached the base by then hangs."""
SILENT_SECONDS = 60.0
"""A process that proves and gives no sign of life for so long is stopped or stuck: it is killed."""
_LAST_WORDS_SECONDS = 5.0

_log = logging.getLogger(__name__)


class RejectedError(Exception):
    """The version is not served. `code` is stable, the message is for the one who uploaded it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class VerifierGoneError(Exception):
    """There is no verifier: none was started, it was stopped, or it cannot attach the base.

    The version is neither proven nor rejected; its job can be given to the next verifier.
    """


class _DiedError(Exception):
    """The process closed its socket, or gave no sign of life, before it answered."""


class _Process:
    """One verifier process, and the answer that is awaited from it."""

    def __init__(self) -> None:
        self.idle = False
        """It has answered all that it was asked: the next question can be put."""
        self._child: ChildProcess | None = None
        self._lost = False
        self._heard_at = 0.0
        self._answer: asyncio.Future[FromVerifier] | None = None
        self._on_progress: Callable[[Progress], None] | None = None

    @classmethod
    async def spawn(cls, command: Sequence[str], base_fd: int | None) -> _Process:
        process = cls()
        fds = {} if base_fd is None else {"--base-fd": base_fd}
        process._child = await ChildProcess.spawn(
            command, from_verifier_decoder(), process._receive, process._closed, fds
        )
        return process

    @property
    def pid(self) -> int | None:
        return None if self._child is None or self._lost else self._child.pid

    async def ask(
        self,
        message: Attach | Prove,
        on_progress: Callable[[Progress], None] | None = None,
        silence: float = math.inf,
    ) -> FromVerifier:
        """Send a message and wait for what answers it.

        Raises _DiedError, also when nothing is heard for `silence` seconds: the process is killed then.
        """
        if self._child is None or self._lost:
            raise _DiedError
        loop = asyncio.get_running_loop()
        self._answer, self._on_progress = loop.create_future(), on_progress
        self.idle = False
        self._heard_at = loop.time()
        self._child.send(message)
        while not self._answer.done():
            left = self._heard_at + silence - loop.time()
            if left <= 0:
                _log.error("the verifier has given no sign of life for %g s and is killed", silence)
                self.kill()
                raise _DiedError
            await asyncio.wait((self._answer,), timeout=None if left == math.inf else left)
        answer = self._answer.result()
        self.idle = True
        return answer

    def kill(self) -> None:
        """End it now; `end` is still needed."""
        self.idle = False
        if self._child is not None:
            self._child.signal_group(signal.SIGKILL)

    async def end(self, grace: float) -> str:
        """Ask it to exit, kill it after `grace` seconds, and remove what it left. Says how it ended."""
        if self._child is None:
            return "never started"
        self._child.send(Shutdown())
        how = await self._child.end(grace)
        await asyncio.to_thread(shutil.rmtree, scratch_folder(self._child.pid), ignore_errors=True)
        return how

    def _receive(self, message: FromVerifier) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        if isinstance(message, Alive):
            return
        if isinstance(message, Progress):
            if self._on_progress is not None:
                self._on_progress(message)
        elif self._answer is not None and not self._answer.done():
            self._answer.set_result(message)

    def _closed(self) -> None:
        self._lost, self.idle = True, False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(_DiedError())


class _Session:
    """The verifier of one engine: its processes, one after the other, all attach the same base."""

    def __init__(
        self, command: Sequence[str], attach: Attach, base_fd: int | None, timeout: float, silence: float
    ) -> None:
        self.process: _Process | None = None
        self.deaths = 0
        self._command = command
        self._attach = attach
        self._base_fd = base_fd
        self._timeout = timeout
        self._silence = silence
        self._turn = asyncio.Lock()
        self._closed = False

    async def open(self) -> None:
        async with self._turn:
            await self._attached()

    async def prove(self, job: Prove, on_progress: Callable[[Progress], None]) -> Proved:
        async with self._turn:
            try:
                return await self._prove(job, on_progress)
            except BaseException:
                if self.process is not None and not self.process.idle:
                    # Cancelled, or the process is lost anyway: nobody waits for what it would say.
                    self.process.kill()
                Path(job.packed_path).unlink(missing_ok=True)
                raise

    async def close(self) -> None:
        self._closed = True
        await self._end_process()

    async def _prove(self, job: Prove, on_progress: Callable[[Progress], None]) -> Proved:
        how = ""
        for _ in range(ATTEMPTS):
            process = await self._attached()
            try:
                async with asyncio.timeout(self._timeout):
                    answer = await process.ask(job, on_progress, self._silence)
            except TimeoutError:
                await self._end_process()
                raise RejectedError(
                    "proof_timeout",
                    f"the version was not proven within {self._timeout:g} s; --proof-timeout is the limit",
                ) from None
            except _DiedError:
                how = await self._lost()
                _log.error("the verifier died (%s) at version %s", how, job.digest[:12])
                continue
            if isinstance(answer, Proved):
                return answer
            if isinstance(answer, Rejected):
                raise RejectedError(answer.code, answer.message)
            how = f"it answered {type(answer).__name__}"
            await self._end_process()
        raise RejectedError(
            "proof_crashed", f"the process that was proving this version ended {ATTEMPTS} times ({how})"
        )

    async def _attached(self) -> _Process:
        """The running process, or a new one that has attached the base."""
        how = ""
        for _ in range(ATTEMPTS):
            self._raise_if_closed()
            if self.process is not None and self.process.idle:
                return self.process
            await self._end_process()
            self.process = process = await _Process.spawn(self._command, self._base_fd)
            self._raise_if_closed()
            try:
                async with asyncio.timeout(ATTACH_SECONDS):
                    answer = await process.ask(self._attach)
            except (_DiedError, TimeoutError):
                how = await self._lost()
                _log.error("the verifier ended (%s) while it attached the base", how)
                continue
            if isinstance(answer, Attached):
                return process
            await self._end_process(_LAST_WORDS_SECONDS)
            how = answer.message if isinstance(answer, Fatal) else type(answer).__name__
            break
        raise VerifierGoneError(f"the verifier cannot attach the base: {how}")

    def _raise_if_closed(self) -> None:
        if self._closed:
            if self.process is not None:
                self.process.kill()
            raise VerifierGoneError("the verifier was stopped")

    async def _lost(self) -> str:
        """After a death: how the process ended. Raises VerifierGoneError if it was stopped."""
        self._raise_if_closed()
        self.deaths += 1
        return await self._end_process(_LAST_WORDS_SECONDS)

    async def _end_process(self, grace: float = 0.0) -> str:
        process, self.process = self.process, None
        return "" if process is None else await process.end(grace)


class VerifierLink:
    """Keeps one verifier process for the engine that runs now.

    All methods are called from one event loop. `command` starts a verifier and gets `--fd N` and
    `--base-fd N` appended. `proof_timeout` is in seconds, of one job once the base is attached; `silence`:
    seconds without a sign of life in a job after which its process is killed.
    """

    def __init__(
        self,
        command: Sequence[str] = VERIFIER_COMMAND,
        *,
        proof_timeout: float = 600.0,
        silence: float = SILENT_SECONDS,
    ) -> None:
        self._command = tuple(command)
        self._proof_timeout = proof_timeout
        self._silence = silence
        self._session: _Session | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that runs now, if one does."""
        process = None if self._session is None else self._session.process
        return None if process is None else process.pid

    @property
    def deaths(self) -> int:
        """How often a process of this engine's verifier died by itself."""
        return 0 if self._session is None else self._session.deaths

    async def start(
        self, config: EngineConfig, manifest: bytes, base_fd: int | None, *, base_id: str = ""
    ) -> None:
        """Attach the base of an engine that has become ready; the verifier of an earlier one is stopped.

        Args:
            manifest: from the engine's `Ready`.
            base_fd: of the memfd that the engine published the base into; stays the caller's, and open.
            base_id: goes into the packed adapters.

        Raises:
            VerifierGoneError: the base cannot be attached, or `stop` was called meanwhile.
        """
        await self.stop()
        attach = Attach(config=config, manifest=manifest, base_id=base_id)
        self._session = session = _Session(self._command, attach, base_fd, self._proof_timeout, self._silence)
        await session.open()

    async def prove(self, job: Prove, on_progress: Callable[[Progress], None]) -> Proved:
        """Prove one version, after those that were asked for earlier.

        A process that died or was stopped is replaced. Cancelling a job that runs ends its process.

        Raises:
            RejectedError: the version is not served: it is not sound, differs from PEFT's, killed the process
                twice (`proof_crashed`) or took too long (`proof_timeout`).
            VerifierGoneError: the verifier was stopped, or is not started.
        """
        if self._session is None:
            raise VerifierGoneError("no verifier is started")
        return await self._session.prove(job, on_progress)

    async def stop(self) -> None:
        """End the process now; jobs that wait or run raise VerifierGoneError. Called when the engine ends."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()
