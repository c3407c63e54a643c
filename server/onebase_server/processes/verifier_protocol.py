"""Messages between the api and the verifier, in the frames of `engine.messages`.

`Attach` → `Attached` or `Fatal`; then `Prove` → `VersionStage` and `Alive`… → `Proved` or `Rejected`, and
`Merge` → `Alive`… → `Merged` or `Rejected`, one job at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

import msgspec

from onebase_adapters.proof.report import Stage
from onebase_engine.engine.messages import EngineConfig, Fatal, Shutdown
from onebase_protocol.adapters import MergeMethod, MergeSign, VersionReport

# ---- api -> verifier -------------------------------------------------------------------------


class Attach(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The first message: attach the base that an engine has published."""

    config: EngineConfig
    manifest: bytes
    """Manifest from the engine's `Ready`."""
    base_id: str = ""
    """Written into packed adapters, so that no other base ever loads them."""


class Prove(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Validate, load and prove one version; write its packed adapter."""

    digest: str
    config_path: str
    weights_path: str
    packed_path: str
    """Path of the packed adapter to write; nothing is left there when the job fails."""
    probes: list[list[int]]
    """Prompts, as tokens, whose greedy texts are compared."""
    probe_tokens: int
    """Tokens of each of those texts."""
    allow_noop: bool = False


class MergeSource(msgspec.Struct, frozen=True):
    """One adapter that is merged."""

    label: str
    """Name of the adapter in messages."""
    config_path: str
    weights_path: str
    weight: float


class Merge(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Make one adapter of several, and write its two files; they are proved like any other's."""

    digest: str
    """Stand-in, in answers and in the log, for the result's digest, which nobody knows yet."""
    parents: list[MergeSource]
    method: MergeMethod
    density: float | None
    sign: MergeSign
    seed: int
    config_path: str
    """Path of the config to write; nothing is left there, or at `weights_path`, when the job fails."""
    weights_path: str


ToVerifier = Attach | Prove | Merge | Shutdown


# ---- verifier -> api -------------------------------------------------------------------------


class Attached(msgspec.Struct, frozen=True, tag=True):
    seconds: float
    threads: int = 0
    """Number of threads that compute; 0 on an accelerator."""


class VersionStage(msgspec.Struct, frozen=True, tag=True):
    digest: str
    stage: Stage
    fraction: float
    """Part of the whole job that is done, 0 to 1."""


class Alive(msgspec.Struct, frozen=True, tag=True):
    """Sent every second while a version is being proved: the process has neither died nor been stopped."""


class Proved(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    digest: str
    report: VersionReport
    sha256: str
    """SHA-256 of the packed adapter."""
    bytes: int
    """Size of the packed adapter."""


class Merged(msgspec.Struct, frozen=True, tag=True):
    digest: str


class Rejected(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The version is not served, or not made. `code` is stable, `message` is for the one who asked for it."""

    digest: str
    code: str
    message: str


FromVerifier = Attached | Alive | VersionStage | Proved | Merged | Rejected | Fatal


def to_verifier_decoder() -> msgspec.msgpack.Decoder[ToVerifier]:
    return msgspec.msgpack.Decoder(ToVerifier)


def from_verifier_decoder() -> msgspec.msgpack.Decoder[FromVerifier]:
    return msgspec.msgpack.Decoder(FromVerifier)


# ---- the verifier's folder of temporary files, which goes with the process however that ends --------

_PREFIX = "onebase-verifier-"


def scratch_folder(pid: int) -> Path:
    """Return the folder of temporary files of the verifier with this process id; the api removes it after a
    kill."""
    return Path(tempfile.gettempdir()) / f"{_PREFIX}{pid}"


def make_scratch() -> Path:
    """Make this process's own folder, empty; remove those of processes that were killed together with their
    api.

    Locked until the process ends: others may not see its process id, from another container.
    """
    sweep()
    folder = scratch_folder(os.getpid())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    fcntl.flock(_opened(folder), fcntl.LOCK_EX)
    return folder


def sweep() -> None:
    """Remove the folders of processes that are gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if Path("/proc", folder.name.removeprefix(_PREFIX)).exists():
            continue
        try:
            fd = _opened(folder)
        except OSError:  # somebody else's, or gone by now
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # its process lives
            continue
        finally:
            os.close(fd)


def _opened(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
