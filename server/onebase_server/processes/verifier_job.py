"""One version from its two files to a prepared file that is proven."""

from __future__ import annotations

import errno
import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from onebase_adapters.format.canonical import AdapterFormatError
from onebase_adapters.proof.loader import load_adapter
from onebase_adapters.proof.texts import prove_texts
from onebase_adapters.proof.verify import ProofError, prove_modules
from onebase_engine.base.load import BaseChangedError, fingerprint
from onebase_engine.engine.versions import folded
from onebase_engine.lora.packed_adapter import read_prepared, write_prepared
from onebase_server.processes.verifier_channel import ApiGoneError
from onebase_server.processes.verifier_protocol import Prove, Proved, Rejected, Stage
from onebase_server.processes.verifier_report import version_report

logger = logging.getLogger(__name__)

OnProgress = Callable[[Stage, float], None]
_LOADED, _COMPARED = 0.15, 0.6
"""Parts of the work that are done when PEFT has loaded the version, and when its modules are compared."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Prover:
    """Proves versions on an attached base. `max_rank` is the largest that the engine's slots hold."""

    def __init__(self, base: nn.Module, *, max_rank: int, base_id: str) -> None:
        self._base = base
        self._max_rank = max_rank
        self._base_id = base_id
        self._fingerprint = fingerprint(base)

    def answer(self, job: Prove, on_progress: OnProgress) -> Proved | Rejected:
        """Prove a version, or say why it is not served; then nothing is left at `prepared_path`.

        Raises:
            BaseChangedError, torch.AcceleratorError: nothing more can be proved in this process.
            ApiGoneError: from `on_progress`.
        """
        try:
            return self._prove(job, on_progress)
        except BaseException as error:
            Path(job.prepared_path).unlink(missing_ok=True)
            if isinstance(error, BaseChangedError | torch.AcceleratorError | ApiGoneError):
                raise
            if not isinstance(error, Exception):
                raise
            code = _code(error)
            if code == "proof_error":
                logger.exception("the proof of %s failed", job.digest[:12])
            known = isinstance(error, AdapterFormatError | ProofError)
            message = str(error) if known else f"{type(error).__name__}: {error}"
            return Rejected(digest=job.digest, code=code, message=message)

    def check_base(self) -> None:
        """Raise BaseChangedError if anything wrote to the attached base."""
        if fingerprint(self._base) != self._fingerprint:
            raise BaseChangedError("a tensor of the attached base was written to")

    def _prove(self, job: Prove, on_progress: OnProgress) -> Proved:
        started = time.monotonic()
        on_progress("validating", 0.0)
        adapter = load_adapter(
            self._base,
            Path(job.config_path),
            Path(job.weights_path),
            self._max_rank,
            allow_noop=job.allow_noop,
        )
        on_progress("proving", _LOADED)
        path = Path(job.prepared_path)
        write_prepared(path, adapter.weights, base_id=self._base_id)
        sha256 = _sha256(path)
        # What is proved is what the engine will read.
        weights = read_prepared(path, sha256, base_id=self._base_id)
        modules = prove_modules(
            self._base,
            adapter.reference,
            folded(weights),
            lambda part: on_progress("proving", _LOADED + part * (_COMPARED - _LOADED)),
        )
        texts = prove_texts(
            self._base,
            adapter.reference,
            weights,
            job.probes,
            job.probe_tokens,
            lambda part: on_progress("proving", _COMPARED + part * (1 - _COMPARED)),
        )
        self.check_base()
        seconds = time.monotonic() - started
        return Proved(
            digest=job.digest,
            report=version_report(self._base, adapter, weights, modules, texts, seconds),
            sha256=sha256,
            bytes=path.stat().st_size,
        )


def _code(error: Exception) -> str:
    if isinstance(error, AdapterFormatError):
        return error.code
    if isinstance(error, ProofError):
        return "proof_failed"
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return "store_full"
    # PyTorch has no exception of its own for the CPU's memory.
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "no_memory"
    return "proof_error"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
