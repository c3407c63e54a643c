"""The data folder, the registry and the store: how they are opened and swept, and their errors."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebase_adapters.registry import ApiKeys, Registry, RegistryError, Tenants
from onebase_adapters.registry.database import SQLITE_ENDINGS, Database, sqlite_file
from onebase_adapters.store.store import GRACE, Store, StoreError, local_folder
from onebase_edge.background import Threads
from onebase_edge.folder_lock import LOCK_FILE
from onebase_edge.settings import PREFIX_PART, Device, Settings
from onebase_engine.base.identity import BaseIdentityError, base_id
from onebase_engine.environment import computing_environment
from onebase_engine.machine import NO_LIMIT, total_memory
from onebase_engine.redaction import redacted
from onebase_training.live_store import LiveStore

SWEEP_SECONDS = 3600.0
_IDENTITY = ("quantization", "blocksize", "double_quant", "compute_dtype", "dtype")
"""Settings that make another base of the same files."""

_GPUS = ("nvidia*", "nvhost*", "dxg", "kfd")
"""Names of GPU devices in /dev: NVIDIA's drivers, Windows' for Linux, AMD's."""

_OTHERS = 0o077
_NO_MODES = (errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOTSUP)
_DATA_NAMES = ("store", "cache", "training", "batches", LOCK_FILE)
_STORE_NAMES = ("blobs", "tmp", "registries", "lock")

_log = logging.getLogger(__name__)


class StorageError(RuntimeError):
    """Adapters cannot be kept where the settings say; the message says why and what to do."""


@dataclass(frozen=True)
class Storage:
    """Storage of adapters and training files.

    base_id: the identity of the base that adapters are bound to. registry_id: that of the registry.
    """

    registry: Registry
    store: Store
    base_id: str
    registry_id: str

    def sweep(self) -> int:
        """Delete blobs that nothing references, and left-over temporary files. Returns how many.

        Blocks. Raises RegistryError, StoreError.
        """
        if self.store.is_shared():
            _log.warning(
                "%s was used with several registries (--registry): what this one does not need is kept, as "
                "another may. Once only this one is in use, delete all but %s in its folder registries.",
                self.store.place,
                self.registry_id,
            )
        return self.store.sweep(self.registry.referenced_blobs(), GRACE)

    async def keep_tidy(self, disk: Threads) -> None:
        """Sweep now and once an hour, for ever."""
        while True:
            started = time.monotonic()
            try:
                removed = await disk.run_blocking(self.sweep)
            except (RegistryError, StoreError) as error:
                _log.warning("the store was not swept: %s", error)
            except Exception:
                _log.exception("the store was not swept")
            else:
                if removed:
                    seconds = time.monotonic() - started
                    _log.info("swept %d files from the store in %.1f s", removed, seconds)
            await asyncio.sleep(SWEEP_SECONDS)


def keep_private() -> None:
    """Let only this process's owner read what it and its children write from now on: 0600, folders 0700."""
    os.umask(_OTHERS)


def close_to_others(settings: Settings) -> None:
    """Take the rights of group and others from what another umask has left. Blocks.

    Only files of this process's own user, under names that are a server's own: a data folder may hold other
    things too, and stays as open as it is then. What is in a folder that is closed is left as it is, since
    nobody else gets there. A file system without modes (CIFS, vfat) is warned of. Raises OSError, StoreError.
    """
    data = Path(settings.data_dir).expanduser().resolve()
    still_open = _close_folder(data, [*_DATA_NAMES, *(f"registry.db{ending}" for ending in SQLITE_ENDINGS)])
    if settings.registry and (file := sqlite_file(settings.registry)):
        still_open += _close(file.with_name(f"{file.name}{ending}") for ending in SQLITE_ENDINGS)
    if settings.store and (store_folder := local_folder(settings.store)):
        still_open += _close_folder(store_folder.resolve(), _STORE_NAMES)
    if still_open:
        more = f" and {len(still_open) - 1} more" if len(still_open) > 1 else ""
        _log.warning(
            "Others may read %s%s: its file system changes no modes. Keep them out of a folder around it.",
            still_open[0],
            more,
        )


def _close_folder(folder: Path, names: Collection[str]) -> list[Path]:
    """Make these names in a folder private; the folder too, if it holds nothing else."""
    if not folder.is_dir():
        return []
    found = set(os.listdir(folder))
    still_open = []
    for place in [folder / name for name in found.intersection(names)]:
        if place.is_dir() and not _is_open(place.stat()):
            continue
        for inside, folders, files in os.walk(place, topdown=False):
            still_open += _close(Path(inside, each) for each in (*files, *folders))
        still_open += _close([place])
    return still_open + _close([folder] if found.issubset(names) else [])


def _close(paths: Iterable[Path]) -> list[Path]:
    """Make paths private, and return those whose mode cannot be changed."""
    still_open = []
    for path in paths:
        try:
            found = path.lstat()
            if _is_open(found):
                path.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS)
        except FileNotFoundError:
            pass  # another server on the folder has just deleted it
        except OSError as error:
            if error.errno not in _NO_MODES:
                raise
            still_open.append(path)
    return still_open


def _is_open(found: os.stat_result) -> bool:
    is_ours = found.st_uid == os.geteuid() and not stat.S_ISLNK(found.st_mode)
    return is_ours and bool(found.st_mode & _OTHERS)


@contextmanager
def open_keys(settings: Settings) -> Iterator[tuple[ApiKeys, Tenants]]:
    """Yield the API keys and tenants of the registry alone, for a command. Blocks. Raises StorageError."""
    try:
        close_to_others(settings)
        database = Database(_registry_url(settings))
        try:
            database.migrate()
            yield ApiKeys(database), Tenants(database)
        finally:
            database.close()
    except OSError as error:
        raise StorageError(f"the registry cannot be opened ({error}): choose another --data-dir") from error
    except StoreError as error:
        raise StorageError(f"{error} (--store, --data-dir)") from error


def _registry_url(settings: Settings) -> str:
    """Return the registry's URL; a SQLite file's folder is created. Raises OSError."""
    data = Path(settings.data_dir).expanduser().absolute()
    if not settings.registry:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
    return settings.registry or f"sqlite:///{data / 'registry.db'}"


BACKUP_MARK = ".onebase-backup"
"""Name of the file that marks a folder whose files a backup may replace."""


def back_up(settings: Settings, target: Path) -> list[str]:
    """Copy the registry, the store and the files of jobs, batches and live adapters to a folder, while
    servers use them.

    `target` is then a data folder of its own: it may be served, or take the place of the old one. A second
    time only new blobs are copied. The registry comes first: the store has a version's files before the
    registry names them, and blobs never change, so that the copy has all files that its registry names but
    those that are deleted meanwhile. Blocks. Returns what is not on a disk here, and was left out. Raises
    StorageError.
    """
    data, target = (Path(path).expanduser().absolute() for path in (settings.data_dir, target))
    left_out = []
    try:
        registry, blobs = (
            sqlite_file(_registry_url(settings)),
            local_folder(settings.store or str(data / "store")),
        )
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        if target.resolve().is_relative_to(data.resolve()):
            raise StorageError(f"{target} lies in the data folder {data}: choose another folder.")
        if any((target / f"registry.db{ending}").exists() for ending in ("-wal", "-shm", "-journal")):
            raise StorageError(f"A server uses {target}, or was killed there: choose another folder.")
        if any(target.iterdir()) and not (target / BACKUP_MARK).exists():
            raise StorageError(f"{target} holds other files: choose an empty folder, or that of a backup.")
        if registry is not None and not registry.exists():
            raise StorageError(f"{registry} is not there: name the server's --data-dir and --registry.")
        (target / BACKUP_MARK).touch()
        if registry is None:
            left_out.append(f"the registry {redacted(settings.registry)}")
        else:
            _copy_registry(registry, target / "registry.db")
        if blobs is None:
            left_out.append(f"the store {redacted(settings.store)}")
        else:
            _copy_files(blobs / "blobs", target / "store/blobs", skip=True)
            _copy_files(blobs / "registries", target / "store/registries")
        for name in ("training", "batches"):
            shutil.rmtree(target / name, ignore_errors=True)
            _copy_files(data / name, target / name)
        shutil.rmtree(target / "live", ignore_errors=True)
        LiveStore(data / "live").back_up(target / "live")
        os.sync()
    except (OSError, StoreError, sqlite3.Error) as error:
        raise StorageError(
            f"The backup is not whole ({error}): try again, or choose another folder."
        ) from error
    return left_out


def _copy_registry(file: Path, target: Path) -> None:
    """Copy the registry as one transaction sees it, with all leases ended. Raises sqlite3.Error, OSError."""
    work = target.with_name(f"{target.name}.part")
    work.unlink(missing_ok=True)
    with (
        closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as live,
        closing(sqlite3.connect(work)) as copy,
    ):
        live.backup(copy)
        copy.execute("UPDATE servers SET until = at")  # a server of the copy would wait for their end
        copy.commit()
    work.replace(target)


def _copy_files(folder: Path, target: Path, *, skip: bool = False) -> None:
    """Copy all files but those that vanish meanwhile, and with `skip` those that exist. Raises OSError."""
    for inside, _, names in os.walk(folder):
        into = target / Path(inside).relative_to(folder)
        into.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in names:
            if not (skip and (into / name).exists()):
                work = into / f"{name}.part"
                with suppress(FileNotFoundError):
                    shutil.copyfile(Path(inside, name), work)
                    work.replace(into / name)


def open_storage(settings: Settings, base_name: str, base_folder: Path) -> Storage:
    """Create what is missing and bring the registry's tables up to date. Blocks. Raises StorageError."""
    data = Path(settings.data_dir).expanduser().absolute()
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        close_to_others(settings)
        identity = base_id(base_folder, _identity(settings))
        registry = Registry(_registry_url(settings), base_id=identity, base_name=base_name)
        registry.migrate()
        known_as = registry.training.registry_id()
        store = Store(settings.store or str(data / "store"), data / "cache", registry=known_as)
        return Storage(registry, store, identity, known_as)
    except OSError as error:
        raise StorageError(
            f"the data folder {data} cannot be used ({error}): choose another --data-dir"
        ) from error
    except BaseIdentityError as error:
        raise StorageError(str(error)) from error
    except RegistryError as error:
        raise StorageError(f"{error} (--registry, --data-dir)") from error
    except StoreError as error:
        raise StorageError(f"{error} (--store, --data-dir)") from error


def _identity(settings: Settings) -> dict[str, object]:
    """Return the settings that make another base of the same files; the device too: each has its own
    kernels."""
    identity = {name: getattr(settings, name) for name in _IDENTITY}
    return {**identity, "device": chosen_device(settings.device)}


def chosen_device(asked: Device, devices: Path = Path("/dev")) -> Device:
    """`cuda` or `cpu`, for `auto` too. Blocks for seconds on a machine with a GPU.

    Another process asks torch, which the api does not load.
    """
    if asked != "auto":
        return asked
    if not any(True for pattern in _GPUS for _ in devices.glob(pattern)):
        return "cpu"
    asking = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    silent: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    found = subprocess.run(asking, env=computing_environment(), **silent).returncode == 0
    return "cuda" if found else "cpu"


def host_memory(settings: Settings) -> int:
    """Return the bytes that versions may use in host memory, besides prefixes.

    Raises StorageError where the system says no size.
    """
    return _host_memory(settings) - prefix_memory(settings)


def prefix_memory(settings: Settings) -> int:
    """Return the bytes that prefixes may use in host memory once they leave a GPU's KV cache. A CPU's cache
    is in host memory itself.

    Raises StorageError where the system says no size.
    """
    return _host_memory(settings) // PREFIX_PART if settings.device == "cuda" else 0


def _host_memory(settings: Settings) -> int:
    if settings.host_memory:
        return settings.host_memory
    total = total_memory()
    if total == NO_LIMIT:
        raise StorageError("/proc/meminfo does not say how much memory there is; set --host-memory")
    return total // 4
