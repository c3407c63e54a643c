"""The verifier process: attaches the base that an engine published, and proves versions on it.

The api runs it as `python -m onebase_server.processes verifier --fd N [--base-fd M] [--busy-fd K]`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from onebase_adapters.format.canonical import AdapterFormatError
from onebase_adapters.proof.merging import MergeInput, MergeRecipe
from onebase_adapters.proof.report import ProofError, Stage
from onebase_adapters.proof.verifier import OnProgress, Verifier
from onebase_adapters.store.blobs import FULL
from onebase_engine.base.attach import AttachError, attach
from onebase_engine.base.load import BaseChangedError, BaseSettings
from onebase_engine.engine.messages import EngineConfig, Fatal, Shutdown
from onebase_engine.machine import freeze_loaded, is_out_of_memory
from onebase_server.processes.child import GOODBYE_SECONDS, ApiGoneError, Channel, begin
from onebase_server.processes.time_share import BusyFlag, SharedGate, device_gate
from onebase_server.processes.verifier_protocol import (
    Alive,
    Attach,
    Attached,
    Merge,
    Merged,
    Prove,
    Proved,
    Rejected,
    ToVerifier,
    VersionStage,
    make_scratch,
    to_verifier_decoder,
)

logger = logging.getLogger(__name__)

VerifierChannel = Channel[ToVerifier]

ALIVE_SECONDS = 1.0
"""Time, in seconds, between two signs of life of a job."""
PROGRESS_SECONDS = 0.1
"""Time, in seconds, between two progress messages of one stage."""
SHARE = 0.5
"""Part of a GPU's time in which a proof computes while sequences run: somebody waits for it, so it has more
than a job does. On a CPU its niceness spares them."""


def main() -> int:
    inherited = begin("verifier")
    scratch = make_scratch()
    # All temporary files of this process, so that the api finds them when it had to be killed.
    tempfile.tempdir = str(scratch)
    try:
        return run_verifier(inherited.sock, inherited.base_fd, inherited.busy_fd, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def run_verifier(sock: socket.socket, base_fd: int | None, busy_fd: int | None, scratch: Path) -> int:
    """Serve one api until it closes the socket; returns the process's exit status.

    `scratch`: a folder that is removed if the process has to end in the middle of a computation.
    """

    def remove_scratch() -> None:
        shutil.rmtree(scratch, ignore_errors=True)

    channel = VerifierChannel(
        sock, to_verifier_decoder().decode, leave_within=GOODBYE_SECONDS, on_leave=remove_scratch
    )
    try:
        message = channel.receive()
        if not isinstance(message, Attach):
            logger.error("expected Attach, got %s", type(message).__name__)
            return 0
        try:
            verifier = _attach(message, base_fd, channel)
        except Exception as error:
            logger.exception("the base cannot be attached")
            explained = isinstance(error, AttachError)
            channel.send(Fatal(message=str(error) if explained else f"{type(error).__name__}: {error}"))
            return 2
        return _serve(verifier, channel, None if busy_fd is None else BusyFlag(busy_fd))
    except ApiGoneError:
        return 0
    finally:
        channel.close()


def _attach(message: Attach, base_fd: int | None, channel: VerifierChannel) -> Verifier:
    started = time.monotonic()
    config = message.config
    threads = _threads(config)
    torch.set_num_threads(threads)
    settings = BaseSettings(folder=Path(config.base_folder), dtype=getattr(torch, config.dtype))
    base = attach(settings, message.manifest, base_fd)
    importlib.import_module("peft")  # so that the first version does not wait for it
    verifier = Verifier(base, max_rank=config.max_rank, base_id=message.base_id)
    freeze_loaded()
    on_cpu = verifier.device.type == "cpu"
    channel.send(Attached(seconds=time.monotonic() - started, threads=threads if on_cpu else 0))
    return verifier


def _threads(config: EngineConfig) -> int:
    """Return half of the engine's threads, so that a second process finds cores of its own."""
    return max(1, (config.threads or len(os.sched_getaffinity(0))) // 2)


def _serve(verifier: Verifier, channel: VerifierChannel, busy: BusyFlag | None) -> int:
    while not isinstance(message := channel.receive(), Shutdown):
        if not isinstance(message, Prove | Merge):
            logger.error("unexpected message %s", type(message).__name__)
            continue
        try:
            with _signs_of_life(channel):
                reporter = _Reporter(message.digest, channel, device_gate(verifier.device, busy, SHARE))
                reply = answer(verifier, message, reporter.report)
            _send(channel, reply)
            gc.collect()  # PEFT's model, while nobody waits
        except BaseChangedError as error:
            logger.critical("%s; the process ends", error)
            channel.send(Rejected(digest=message.digest, code="base_changed", message=str(error)))
            return 3
        except torch.AcceleratorError as error:
            logger.critical("%s; the process ends", error)
            channel.send(Rejected(digest=message.digest, code="device_error", message=str(error)))
            return 3
    return 0


def _send(channel: VerifierChannel, reply: Proved | Merged | Rejected) -> None:
    """Send a job's result, or that it cannot be sent: a version's own texts are a part of it."""
    try:
        channel.send(reply)
    except Exception as error:
        logger.exception("the result of %s cannot be sent", reply.digest[:12])
        message = f"the result cannot be sent: {type(error).__name__}"
        channel.send(Rejected(digest=reply.digest, code="proof_error", message=message))


@contextlib.contextmanager
def _signs_of_life(channel: VerifierChannel) -> Iterator[None]:
    """Send from a thread of its own that the process lives, however long one product takes."""
    over = threading.Event()

    def say() -> None:
        while not over.wait(ALIVE_SECONDS):
            channel.send(Alive())

    thread = threading.Thread(target=say, name="verifier-alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def answer(verifier: Verifier, job: Prove | Merge, on_progress: OnProgress) -> Proved | Merged | Rejected:
    """Prove a version or merge some, or say why not; then none of the job's files is left.

    Raises:
        BaseChangedError, torch.AcceleratorError: nothing more can be proved in this process.
        ApiGoneError: from `on_progress`.
    """
    try:
        return _merge(verifier, job) if isinstance(job, Merge) else _prove(verifier, job, on_progress)
    except (BaseChangedError, torch.AcceleratorError, ApiGoneError):
        raise
    except Exception as error:
        code = _code(error)
        if code == "proof_error":
            logger.exception("the job of %s failed", job.digest[:12])
        known = isinstance(error, AdapterFormatError | ProofError)
        message = str(error) if known else f"{type(error).__name__}: {error}"
        return Rejected(digest=job.digest, code=code, message=message)


def _prove(verifier: Verifier, job: Prove, on_progress: OnProgress) -> Proved:
    proven = verifier.prove(
        Path(job.config_path),
        Path(job.weights_path),
        Path(job.packed_path),
        probes=job.probes,
        probe_tokens=job.probe_tokens,
        allow_noop=job.allow_noop,
        on_progress=on_progress,
    )
    return Proved(digest=job.digest, report=proven.report, sha256=proven.sha256, bytes=proven.bytes)


def _merge(verifier: Verifier, job: Merge) -> Merged:
    parents = [
        MergeInput(parent.label, Path(parent.config_path), Path(parent.weights_path), parent.weight)
        for parent in job.parents
    ]
    recipe = MergeRecipe(job.method, job.density, job.sign, job.seed)
    verifier.merge(parents, recipe, Path(job.config_path), Path(job.weights_path))
    return Merged(job.digest)


def _code(error: Exception) -> str:
    if isinstance(error, AdapterFormatError):
        return error.code
    if isinstance(error, ProofError):
        return "proof_failed"
    if isinstance(error, OSError) and error.errno in FULL:
        return "store_full"
    if is_out_of_memory(error):
        return "no_memory"
    return "proof_error"


class _Reporter:
    """Sends a job's progress, not too often, lets sequences go first, and ends the job when the api has
    gone."""

    def __init__(self, digest: str, channel: VerifierChannel, gate: SharedGate) -> None:
        self._digest = digest
        self._channel = channel
        self._gate = gate
        self._stage: Stage | None = None
        self._sent_at = 0.0

    def report(self, stage: Stage, fraction: float) -> None:
        self._channel.check_alive()
        now = time.monotonic()
        if stage != self._stage or now - self._sent_at >= PROGRESS_SECONDS:
            self._stage, self._sent_at = stage, now
            self._channel.send(VersionStage(digest=self._digest, stage=stage, fraction=fraction))
        self._gate.wait()
