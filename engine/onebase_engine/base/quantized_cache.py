"""Cache of quantized bases on disk, so that the next start maps a base instead of quantizing it again.

There are two files in the user's cache for each base and way of quantizing it: the tensors, laid out as
`publish` does in shared memory, and their manifest, written last. Files that do not fit are treated as
absent.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

import msgspec
from torch import nn

from onebase_engine.base.attach import AttachError, attach, describe
from onebase_engine.base.identity import SAMPLE_BYTES, SAMPLE_EVERY, BaseIdentityError, base_id
from onebase_engine.base.load import BaseSettings, check_quantized, config_for, load_base
from onebase_engine.base.manifest import dtype_name
from onebase_engine.base.shared_memory import storage_bytes
from onebase_engine.user_cache import default_cache, written

logger = logging.getLogger(__name__)

LEAST = 64 << 20
"""Smallest base, in bytes, that is cached: a smaller one is quantized in no time."""
KEPT = 4
"""Largest number of cached bases; those used last stay."""
SPARED = 0.1
"""Part of the disk that the cache leaves free."""
_RELEASE = 3
"""Format number of the cache. Earlier ones may lack tensors of the files, have int8 with a threshold, or hold
towers that see or hear."""
_TENSORS, _MANIFEST = ".tensors", ".manifest"


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    manifest: bytes
    size: int
    sample: bytes
    """SHA-256 of a sample of the tensors: a disk may lose what was written, and a file its end."""


def load_kept_base(settings: BaseSettings) -> nn.Module:
    """Load the base like `load_base`, from the user's cache if it was quantized on this machine before.

    Only on the CPU, whose quantizer it is, and only if it is quantized.

    Raises:
        UnsupportedBaseError: as `load_base`.
    """
    if settings.quantization == "none" or settings.device.type != "cpu":
        return load_base(settings)
    file = _file(settings)
    base = None if file is None else _recall(settings, file)
    if base is None:
        base = load_base(settings)
        if file is not None:
            _keep(base, file)
    return base


def quantized_id(settings: BaseSettings) -> str | None:
    """Return the identity of a base as the installed libraries quantize it.

    None where the folder's identity cannot be computed.
    """
    how = {
        "release": _RELEASE,
        "quantization": settings.quantization,
        "blocksize": settings.blocksize,
        "double_quant": settings.double_quant,
        "compute_dtype": dtype_name(settings.compute_dtype),
        "dtype": dtype_name(settings.dtype),
        "libraries": [metadata.version(name) for name in ("bitsandbytes", "torch", "transformers")],
        # A base's identity is that of a sample of its bytes.
        "files": [
            (path.name, path.stat().st_size, path.stat().st_mtime_ns)
            for path in sorted(settings.folder.glob("*.safetensors"))
        ],
    }
    try:
        return base_id(settings.folder, how)
    except (BaseIdentityError, OSError):
        return None


def _file(settings: BaseSettings) -> Path | None:
    """Return the path of the base's cached tensors, without suffix, or None if it has no identity."""
    identity = quantized_id(settings)
    return None if identity is None else default_cache() / "quantized" / identity


def _recall(settings: BaseSettings, file: Path) -> nn.Module | None:
    if not file.with_suffix(_MANIFEST).exists():
        return None
    config_for(settings)
    try:
        kept = msgspec.msgpack.decode(file.with_suffix(_MANIFEST).read_bytes(), type=_Kept)
        with file.with_suffix(_TENSORS).open("rb") as tensors:
            if os.fstat(tensors.fileno()).st_size != kept.size or _sample(tensors, kept.size) != kept.sample:
                raise AttachError("it is not what was written")
            base = attach(settings, kept.manifest, tensors.fileno())
        os.utime(file.with_suffix(_MANIFEST))
    except (OSError, msgspec.MsgspecError, AttachError) as error:
        logger.warning("the quantized base in %s cannot be used and is made anew: %s", file, error)
        return None
    # It may have been kept by a release that knew less.
    check_quantized(base, settings)
    return base


def _keep(base: nn.Module, file: Path) -> None:
    """Write the base's tensors, then their manifest. If that fails, the next start quantizes again."""
    manifest, tensors, size = describe(base)
    if size < LEAST:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(file.parent)
        if disk.free - size < disk.total * SPARED:
            logger.info("the quantized base is not kept on disk, which would leave too little free")
            return
        with written(file.with_suffix(_TENSORS)) as part:
            for start, storage in tensors:
                part.seek(start)
                part.write(storage_bytes(storage).numpy().data)
            part.truncate(size)
            part.flush()
            sample = _sample(part, size)
        with written(file.with_suffix(_MANIFEST)) as part:
            part.write(msgspec.msgpack.encode(_Kept(manifest=manifest, size=size, sample=sample)))
        _forget_old(file.parent)
    except OSError as error:
        logger.warning("the quantized base cannot be kept on disk: %s", error)
        return
    logger.info(
        "the quantized base is kept in %s (%.0f MB): the next start reads it", file.parent, size / 1e6
    )


def _sample(file: BinaryIO, size: int) -> bytes:
    found = hashlib.sha256()
    for offset in [*range(0, size, SAMPLE_EVERY), max(0, size - SAMPLE_BYTES)]:
        file.seek(offset)
        found.update(file.read(SAMPLE_BYTES))
    return found.digest()


def _forget_old(folder: Path) -> None:
    """Delete all but the bases used last. A process that has mapped one can still use it."""
    manifests = sorted(folder.glob(f"*{_MANIFEST}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for manifest in manifests[KEPT:]:
        manifest.unlink(missing_ok=True)
        manifest.with_suffix(_TENSORS).unlink(missing_ok=True)
