"""Sources of versions: folders on this machine, and repositories on the Hub."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from onebase_adapters.format.added_tokens import BaseVocabulary, read_folder, with_tokens
from onebase_adapters.format.config import (
    MAX_CONFIG_BYTES,
    MLX_WEIGHTS_FILE,
    MODEL_CONFIG_FILE,
    AdapterFormatError,
    with_labels,
)
from onebase_adapters.format.conversion import convert, needs_conversion
from onebase_adapters.format.defaults import defaults_in, with_defaults
from onebase_adapters.hub.confinement import landlock_version
from onebase_adapters.hub.pull import (
    HubError,
    HubReference,
    PullCancelledError,
    hub_token_state,
    parse_hub_reference,
    pull,
    resolve,
)
from onebase_adapters.registry import DEFAULT_TENANT, SIGNATURE, VersionRecord
from onebase_adapters.signatures import (
    SIGNABLE_FILES,
    SIGNATURE_FILE,
    Checked,
    SentFiles,
    SignatureError,
)
from onebase_adapters.store.blobs import (
    ADAPTER_FILES,
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFiles,
    version_digest,
)
from onebase_adapters.store.store import Store
from onebase_edge.background import Threads
from onebase_edge.errors import (
    AdapterNotFoundError,
    ApiError,
    BodyTooLargeError,
    ForbiddenError,
    InvalidRequestError,
    QuotaSpentError,
    StateConflictError,
    UnavailableError,
    VersionFailedError,
)
from onebase_protocol.adapters import VersionFailure
from onebase_server.adapters.activation import ActivationService
from onebase_server.adapters.catalog import check_name
from onebase_server.adapters.service import AdapterService, VersionOptions
from onebase_server.processes.supervisor import AdapterStartError
from onebase_server.storage.calls import storage_errors
from onebase_server.tenancy.quotas import Window

STARTUP_ACTOR = "startup"
"""Actor of the activations of adapters given at startup."""
MOST_REMEMBERED = 1000
"""Largest number of pulls of one tenant that are remembered."""
FAILED_SECONDS = 60.0
"""Time, in seconds, for which a repository whose adapter failed is not pulled again for a request."""
MISSING_SECONDS = 30.0
"""Time, in seconds, for which requests do not make the server ask the Hub again for what it lacks or
refuses."""
MOST_FAILED = 1000
"""Largest number of failed first uses that are remembered, of all tenants together."""
MOST_TRANSFERS = 256
"""Largest number of transfers that run or wait."""
MOST_TRANSFERS_EACH = 64
"""Largest number of transfers that run or wait for one tenant."""
MOST_FAILED_A_MINUTE = 12
"""Largest number of one tenant's transfers that fail within 60 seconds before it may begin no more: each
takes a processor for a third of a second, whatever the Hub answers."""
_MISSING = frozenset({"hub_not_found", "hub_gated", "hub_no_adapter", "hub_too_large"})
"""Codes of the Hub's errors that would be the same if it were asked again at once."""
_LONGEST_SECONDS = 3600.0
_RETRY_AFTER = 10.0

Vocabulary = Callable[[], BaseVocabulary | None]
"""Function that returns the tokens of the base's tokenizer; None without one."""

_log = logging.getLogger(__name__)


class FolderError(ValueError):
    """A folder that holds no adapter, or a name that cannot be used; the message says which and why."""


def find_adapters(named: Sequence[tuple[str, str]], parent: str, base_name: str) -> list[tuple[str, Path]]:
    """Return `(name, folder)` of the adapters given by name and of those in subfolders of `parent`.

    Raises FolderError for a name that is not allowed or is given twice, and for a folder that lacks a file.
    """
    found = [(name, Path(folder).expanduser()) for name, folder in named]
    if parent:
        root = Path(parent).expanduser()
        if not root.is_dir():
            raise FolderError(f"--adapters-dir: {root} is not a folder")
        found += [(path.parent.name, path.parent) for path in sorted(root.glob("*/adapter_config.json"))]
    names: set[str] = set()
    for name, folder in found:
        try:
            check_name(name, base_name)
        except InvalidRequestError as error:
            raise FolderError(f"adapter {error.message}") from error
        if name in names:
            raise FolderError(f"adapter name {name!r} is given twice: each name stands for one adapter")
        names.add(name)
        check_folder(name, folder)
    return found


def check_folder(name: str, folder: Path) -> None:
    """Raise FolderError unless the folder has both files."""
    if not folder.is_dir():
        raise FolderError(f"adapter {name!r}: {folder} is not a folder")
    for file in (folder / CONFIG_FILE, weights_of(folder)):
        if not file.is_file():
            raise FolderError(
                f"{folder} has no {file.name}: a PEFT adapter folder holds {' and '.join(ADAPTER_FILES)}"
            )


def weights_of(folder: Path) -> Path:
    """Return the weights of an adapter in a folder, as PEFT or, without such ones, as mlx-lm names them."""
    other = folder / MLX_WEIGHTS_FILE
    return other if other.is_file() and not (folder / WEIGHTS_FILE).is_file() else folder / WEIGHTS_FILE


class Folders:
    """Registers folders as versions. `given`: those to be served before the server is ready."""

    def __init__(
        self,
        adapters: AdapterService,
        activation: ActivationService,
        given: Sequence[tuple[str, Path]],
        max_bytes: int,
    ) -> None:
        self._adapters = adapters
        self._activation = activation
        self._given = list(given)
        self._max_bytes = max_bytes

    async def serve_given(self) -> None:
        """Import, prove and activate the folders given at start. Raises AdapterStartError."""
        added: list[tuple[str, VersionRecord]] = []
        for name, folder in self._given:
            try:
                added.append(
                    (
                        name,
                        await self.add(
                            DEFAULT_TENANT, name, folder, actor=STARTUP_ACTOR, wait_for_verifier=False
                        ),
                    )
                )
            except ApiError as error:
                raise _cannot_serve(name, error.code, error.message) from error
        for name, version in added:
            try:
                await self._serve(await self._adapters.wait(version.tenant, name, version.digest))
            except ApiError as error:
                raise _cannot_serve(name, error.code, error.message) from error

    async def add(
        self,
        tenant: str,
        name: str,
        folder: Path,
        *,
        actor: str,
        wait_for_verifier: bool = True,
        allow_noop: bool = False,
    ) -> VersionRecord:
        """Register a folder's content under a name, unless it is registered and ready.

        allow_noop: accept an adapter that changes nothing, such as one before its first step of training.

        Raises VersionFailedError, BodyTooLargeError, InvalidRequestError, DiskFullError,
        UnavailableError.
        """
        known = await self._known(tenant, name, folder)
        is_checked = self._adapters.signatures.rule(tenant, name).policy != "none"
        if known is not None:
            return await self._signed_later(known, folder, actor) if is_checked else known
        if not is_checked:
            return await self._register(tenant, name, folder, None, actor, wait_for_verifier, allow_noop)
        with _copied(self._adapters.store) as copy:
            with _readable(name, folder):
                await self._adapters.disk.run_blocking(_copy, folder, copy, self._max_bytes)
                sent = await self._adapters.disk.run_blocking(SentFiles.of_folder, copy)
            checked = await self._adapters.check_signature(tenant, name, sent, actor=actor)
            return await self._register(tenant, name, copy, checked, actor, wait_for_verifier, allow_noop)

    async def _known(self, tenant: str, name: str, folder: Path) -> VersionRecord | None:
        """Return the version of a folder's content, if it is registered and ready."""
        record = self._adapters.catalog.of(tenant).own(name)
        if record is None:
            return None
        with _readable(name, folder):
            digest = await self._adapters.disk.run_blocking(folder_digest, folder, self._adapters.vocabulary)
        known = record.version(digest)
        return known if known is not None and known.state == "ready" else None

    async def _signed_later(self, known: VersionRecord, folder: Path, actor: str) -> VersionRecord:
        """Keep the signature of a folder for its version, which stays as it is without a right one."""
        is_verified = (known.source.get(SIGNATURE) or {}).get("status") == "verified"
        if is_verified or not (folder / SIGNATURE_FILE).is_file():
            return known
        adapters, where = self._adapters, (known.tenant, known.name)
        with _copied(adapters.store) as copy:
            try:
                with _readable(known.name, folder):
                    await adapters.disk.run_blocking(_copy, folder, copy, self._max_bytes)
                    sent = await adapters.disk.run_blocking(SentFiles.of_folder, copy)
                    digest = await adapters.disk.run_blocking(folder_digest, copy, adapters.vocabulary)
                checked = await adapters.disk.run_blocking(adapters.signatures.check, *where, sent)
            except SignatureError as error:
                _log.warning("adapter %r of %r is served as before: %s", known.name, known.tenant, error)
                return known
        if checked is None or checked.report.status != "verified" or digest != known.digest:
            return known
        options = VersionOptions(any_base=True)
        return await adapters.add(
            *where, known.files, {"kind": "folder"}, options, checked=checked, actor=actor
        )

    async def _register(
        self,
        tenant: str,
        name: str,
        folder: Path,
        checked: Checked | None,
        actor: str,
        wait_for_verifier: bool,
        allow_noop: bool,
    ) -> VersionRecord:
        with _readable(name, folder):
            config = await self._adapters.disk.run_blocking(
                _read_config, folder, self._max_bytes, self._adapters.vocabulary
            )
        try:
            await self._adapters.check_config(name, config, VersionOptions())
        except StateConflictError as error:
            _log.warning("%s It is served anyway, since its folder was given by name.", error.message)
        with _readable(name, folder), storage_errors(name):
            files = await self._adapters.disk.run_blocking(
                take_folder, self._adapters.store, folder, self._adapters.vocabulary
            )
        return await self._adapters.add(
            tenant,
            name,
            files,
            {"kind": "folder"},
            VersionOptions(any_base=True, allow_noop=allow_noop),
            checked=checked,
            actor=actor,
            wait_for_verifier=wait_for_verifier,
        )

    async def _serve(self, version: VersionRecord) -> None:
        """Activate an adapter given at startup, unless another version of the name was chosen since."""
        if version.error is not None:
            raise _cannot_serve(version.name, version.error.code, version.error.message)
        if version.state != "ready":
            raise _cannot_serve(
                version.name, "not_proved", "there is no verifier to prove it; the log says why"
            )
        record = self._adapters.catalog.of(version.tenant).adapter(version.name)
        if record.active == version.digest:
            return
        history = await self._activation.history(version.tenant, version.name)
        chosen = bool(history) and history[0].actor != STARTUP_ACTOR
        known_before = any(entry.version == version.digest for entry in history)
        if chosen and known_before:
            _log.warning(
                "adapter %s: the version in its folder is %s, but %s was chosen since and stays active",
                version.name,
                version.digest[:12],
                record.active or "none",
            )
            return
        await self._activation.activate(version.tenant, version.name, version.digest, actor=STARTUP_ACTOR)


@contextmanager
def _copied(store: Store) -> Iterator[Path]:
    """Yield an empty folder on the store's disk."""
    with tempfile.TemporaryDirectory(
        prefix="folder-", dir=store.scratch(), ignore_cleanup_errors=True
    ) as made:
        yield Path(made)


def _copy(folder: Path, target: Path, max_bytes: int) -> None:
    """Copy what the server reads of an adapter, and its signature, so that all who look at it see the same.

    Raises BodyTooLargeError, OSError.
    """
    _check_size(folder, max_bytes)
    for name in sorted({*SIGNABLE_FILES, SIGNATURE_FILE}):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def _check_size(folder: Path, max_bytes: int) -> None:
    """Raise BodyTooLargeError for an adapter whose two files are larger. Raises OSError."""
    if (folder / CONFIG_FILE).stat().st_size + weights_of(folder).stat().st_size > max_bytes:
        raise BodyTooLargeError(max_bytes, "--max-upload")


def _no_vocabulary() -> BaseVocabulary | None:
    return None


def take_folder(store: Store, folder: Path, vocabulary: Vocabulary = _no_vocabulary) -> AdapterFiles:
    """Store the files of an adapter, with the names of its labels and the tokens that its tokenizer adds.

    vocabulary: returns the base's tokens; None: a tokenizer in the folder is not read.

    Raises InvalidRequestError, StoreError, OSError.
    """
    config, weights = _config_of(folder, vocabulary), weights_of(folder)
    if not needs_conversion(config, weights):
        return AdapterFiles(store.add_bytes(config), store.add_file(weights))
    with store.writer() as writer:
        config = _converted(config, weights, writer.write)
        return AdapterFiles(store.add_bytes(config), writer.commit())


def folder_digest(folder: Path, vocabulary: Vocabulary = _no_vocabulary) -> str:
    """Return the digest of a folder's content, without storing it."""
    config, weights = _config_of(folder, vocabulary), weights_of(folder)
    if needs_conversion(config, weights):
        total = hashlib.sha256()
        config = _converted(config, weights, total.update)
        return version_digest(hashlib.sha256(config).hexdigest(), total.hexdigest())
    with weights.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    return version_digest(hashlib.sha256(config).hexdigest(), found)


def _converted(config: bytes, weights: Path, write: Callable[[bytes], object]) -> bytes:
    """Convert an adapter to PEFT's own form. Raises InvalidRequestError, OSError."""
    try:
        return convert(config, weights, write)
    except AdapterFormatError as error:
        raise InvalidRequestError(f"{weights.parent}: {error}.") from error


def _read_config(folder: Path, max_bytes: int, vocabulary: Vocabulary) -> bytes:
    _check_size(folder, max_bytes)
    weights = weights_of(folder)
    found = _config_of(folder, vocabulary)
    return _converted(found, weights, lambda piece: None) if needs_conversion(found, weights) else found


def _config_of(folder: Path, vocabulary: Vocabulary) -> bytes:
    """Return the adapter's config, with a classifier's label names and its tokenizer's tokens added.

    Raises InvalidRequestError, OSError.
    """
    model = folder / MODEL_CONFIG_FILE
    try:
        config = with_labels(_bounded(folder / CONFIG_FILE), _bounded(model) if model.is_file() else None)
        config = with_defaults(config, defaults_in(folder))
        return with_tokens(config, weights_of(folder), read_folder(folder), vocabulary)
    except AdapterFormatError as error:
        raise InvalidRequestError(f"{folder}: {error}.") from error


def _bounded(config: Path) -> bytes:
    with config.open("rb") as file:
        found = file.read(MAX_CONFIG_BYTES + 1)
    if len(found) > MAX_CONFIG_BYTES:
        raise InvalidRequestError(f"{config} is over {MAX_CONFIG_BYTES} bytes, which no PEFT config is.")
    return found


@contextmanager
def _readable(name: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidRequestError(f"Adapter {name!r} in {folder} cannot be read: {error}.") from error


def _cannot_serve(name: str, code: str, message: str) -> AdapterStartError:
    return AdapterStartError(f"adapter {name} cannot be served ({code}): {message}")


# ---- the Hub ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fetched:
    """Result of a transfer: the files, in the store, and the commit that they are from."""

    files: AdapterFiles
    commit: str
    sent: SentFiles | None = None
    """The files as they are in the repository; None if no signature is asked for."""


class Transfer:
    """One transfer from the Hub. `fraction` is 0 to 1, of the bytes."""

    def __init__(self, reference: HubReference, *, signed: bool = False) -> None:
        """signed: fetch the adapter's signature too."""
        self.reference = reference
        self._signed = signed
        self._sent: SentFiles | None = None
        self.fraction = 0.0
        self.has_begun = False
        self.refusal: ApiError | None = None
        """Error for a transfer whose tenant had too many that failed while this one waited."""
        self.cancel = threading.Event()

    def fetch_files(self, store: Store, max_bytes: int, vocabulary: Vocabulary = _no_vocabulary) -> Fetched:
        """Block until all files are in the store. Raises HubError, PullCancelledError, StoreError, and the
        refusal."""
        self.has_begun = True
        if self.refusal is not None:
            raise self.refusal
        reference = self.reference
        commit = resolve(reference.repo, reference.revision, cancel=self.cancel)
        files = pull(
            reference,
            commit,
            store,
            max_bytes,
            self._advance,
            cancel=self.cancel,
            vocabulary=vocabulary,
            on_files=self._note_files if self._signed else None,
        )
        return Fetched(files, commit, self._sent)

    def _note_files(self, sent: SentFiles) -> None:
        self._sent = sent

    def _advance(self, done: int, total: int) -> None:
        self.fraction = min(1.0, done / total) if total else 0.0


class Pulls:
    """Transfers from the Hub. Tenants take turns; requests for the same reference share a running transfer.

    allow: patterns of `org/repo` for requests.
    """

    def __init__(
        self,
        store: Store,
        threads: Threads,
        allow: Sequence[str],
        max_bytes: int,
        vocabulary: Vocabulary = _no_vocabulary,
        *,
        signed: bool = False,
    ) -> None:
        """signed: fetch the signatures of adapters too."""
        self._store = store
        self._signed = signed
        self._vocabulary = vocabulary
        self._threads = threads
        self._allow = tuple(allow)
        self._max_bytes = max_bytes
        self._running: dict[tuple[str, HubReference], tuple[Transfer, asyncio.Task[Fetched]]] = {}
        """Running and waiting transfers, by the tenant whose turn they use and by reference."""
        self._failures: dict[str, Window] = {}
        """Failed transfers of the last 60 seconds, by tenant."""
        if not landlock_version():
            _log.warning(
                "this kernel has no Landlock (Linux 5.13; some containers switch it off): the processes that "
                "pull from the Hub run with the rights of this one"
            )

    def check_allowed(self, reference: HubReference, param: str) -> None:
        """Raise ForbiddenError unless requests may make this server pull from the repository."""
        if any(fnmatchcase(reference.repo, pattern) for pattern in self._allow):
            return
        allowed = ", ".join(self._allow) or "none"
        raise ForbiddenError(
            f"{param}: for requests, this server pulls from these Hub repositories only: {allowed}. Its "
            f"operator may add --hub-allow '{reference.repo}'.",
            code="hub_not_allowed",
            param=param,
        )

    def start(self, tenant: str, reference: HubReference) -> tuple[Transfer, asyncio.Task[Fetched]]:
        """Return the transfer of this reference: one that runs for anybody, or the tenant's own, which runs
        when it is the tenant's turn. Raises QuotaSpentError, UnavailableError."""
        for (owner, wanted), found in self._running.items():
            if wanted == reference and (owner == tenant or found[0].has_begun):
                return found
        if (refusal := self._refusal(tenant)) is not None:
            raise refusal
        own = sum(owner == tenant for owner, _ in self._running)
        if own >= MOST_TRANSFERS_EACH or len(self._running) >= MOST_TRANSFERS:
            raise UnavailableError(
                f"Too many pulls from the Hub are running or waiting: at most {MOST_TRANSFERS_EACH} of one "
                f"tenant, {MOST_TRANSFERS} in all. Try again later.",
                code="pulls_busy",
                retry_after=_RETRY_AFTER,
            )
        transfer = Transfer(reference, signed=self._signed)
        task = asyncio.get_running_loop().create_task(self._run(tenant, transfer))
        self._running[tenant, reference] = transfer, task
        task.add_done_callback(lambda done: self._ended((tenant, reference), done))
        return transfer, task

    async def _run(self, tenant: str, transfer: Transfer) -> Fetched:
        limit = asyncio.get_running_loop().call_later(_LONGEST_SECONDS, transfer.cancel.set)
        try:
            return await self._threads.run_for(
                tenant, transfer.fetch_files, self._store, self._max_bytes, self._vocabulary
            )
        except HubError:
            self._count_failure(tenant)
            raise
        except PullCancelledError:
            raise HubError(
                "hub_unreachable", f"{transfer.reference} did not arrive within {_LONGEST_SECONDS:g} s"
            ) from None
        finally:
            limit.cancel()

    def _count_failure(self, tenant: str) -> None:
        """Count a failed transfer, and refuse the tenant's others that wait if it was one too many."""
        now = time.monotonic()
        self._failures = {one: window for one, window in self._failures.items() if window.by_second(now)}
        self._failures.setdefault(tenant, Window()).add(1, now)
        if (refusal := self._refusal(tenant)) is not None:
            for (owner, _), (transfer, _) in self._running.items():
                if owner == tenant:
                    transfer.refusal = refusal.fresh()

    def _refusal(self, tenant: str) -> ApiError | None:
        """Return the error for a tenant whose transfers have failed too often, or None."""
        window, now = self._failures.get(tenant), time.monotonic()
        if window is None:
            return None
        window.forget(now)
        if window.total < MOST_FAILED_A_MINUTE:
            return None
        error = QuotaSpentError(
            f"adapter: {MOST_FAILED_A_MINUTE} pulls of tenant {tenant!r} from the Hub have failed within 60 "
            "seconds, which is the limit. Name a repository that the Hub has and gives, or try again later.",
            {"quota": "failed_pulls", "limit": MOST_FAILED_A_MINUTE, "of": "tenant"},
            retry_after=window.seconds_until(MOST_FAILED_A_MINUTE - 1, now),
        )
        error.param = "adapter"
        return error

    def _ended(self, key: tuple[str, HubReference], task: asyncio.Task[Fetched]) -> None:
        del self._running[key]
        if not task.cancelled():
            task.exception()


def hub_failure(code: str, message: str) -> ApiError:
    """Return the error of a failed transfer, for a caller who waited for it."""
    if code == "hub_not_found":
        return AdapterNotFoundError(message, code=code)
    if code == "hub_gated":
        return ForbiddenError(message, code=code, param="adapter")
    if code == "hub_invalid":
        return InvalidRequestError(message, code=code, param="adapter")
    if code == "hub_no_adapter":
        return VersionFailedError(message, code=code)
    if code == "hub_too_large":
        return _too_large(message)
    return UnavailableError(message, code=code, retry_after=_RETRY_AFTER)


def _too_large(message: str) -> ApiError:
    error = BodyTooLargeError(0, "--max-upload")
    error.message, error.code = message, "hub_too_large"
    return error


@dataclass(eq=False)
class PendingPull:
    """A version that is being pulled; `digest` is known when its files have arrived."""

    tenant: str
    name: str
    reference: HubReference
    options: VersionOptions
    actor: str
    transfer: Transfer
    task: asyncio.Task[VersionRecord] | None = None
    id: str = field(default_factory=lambda: f"pull-{secrets.token_hex(12)}")
    created_at: float = field(default_factory=time.time)
    digest: str | None = None
    failure: ApiError | None = None

    @property
    def adapter(self) -> tuple[str, str]:
        """Tenant and name of the adapter that gets the version."""
        return self.tenant, self.name

    @property
    def error(self) -> VersionFailure | None:
        """Error of the pull, if it failed."""
        return None if self.failure is None else VersionFailure(self.failure.code, self.failure.message)

    async def arrived(self) -> VersionRecord:
        """Wait for the registered version and return it. Raises what the pull ended with."""
        if self.task is None:
            raise RuntimeError("a pull without a task")
        return await asyncio.shield(self.task)


@dataclass(frozen=True)
class _Refusal:
    """Failure of a first use, with the time until which it answers others and the state of the Hub token
    then."""

    error: ApiError
    until: float
    token: object


class HubAdapters:
    """Registers what is pulled from the Hub as versions. Called from one event loop."""

    def __init__(self, adapters: AdapterService, pulls: Pulls) -> None:
        self._adapters = adapters
        self._pulls = pulls
        self._known: OrderedDict[str, PendingPull] = OrderedDict()
        self._first_uses: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._failed: OrderedDict[tuple[str, str], _Refusal] = OrderedDict()

    def check_allowed(self, reference: HubReference, param: str) -> None:
        """Raise ForbiddenError unless requests may make this server pull from the repository."""
        self._pulls.check_allowed(reference, param)

    def get(self, tenant: str, name: str, pull_id: str) -> PendingPull | None:
        """Return a pull that runs, or one of the last MOST_REMEMBERED; None if there is none of this id."""
        pending = self._known.get(pull_id)
        return pending if pending is not None and pending.adapter == (tenant, name) else None

    def of_name(self, tenant: str, name: str) -> list[PendingPull]:
        """Return the pulls of a name that have no digest (yet), newest first."""
        return [
            pending
            for pending in reversed(self._known.values())
            if pending.adapter == (tenant, name) and not pending.digest
        ]

    def running_names(self, tenant: str) -> set[str]:
        """Return the tenant's names for which a pull is running."""
        return {
            pending.name
            for pending in self._known.values()
            if pending.tenant == tenant and pending.digest is None and not pending.failure
        }

    def pull(
        self, tenant: str, name: str, reference: HubReference, options: VersionOptions, actor: str = ""
    ) -> PendingPull:
        """Begin to fetch a version, or join the pull that does so already. Raises QuotaSpentError,
        UnavailableError."""
        for pending in self._known.values():
            running = pending.task is not None and not pending.task.done()
            same = pending.adapter == (tenant, name) and pending.reference == reference
            if running and same and pending.options == options:
                return pending
        transfer, fetched = self._pulls.start(tenant, reference)
        pending = PendingPull(tenant, name, reference, options, actor, transfer)
        pending.task = asyncio.get_running_loop().create_task(self._finish(pending, fetched))
        pending.task.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._known[pending.id] = pending
        own = [one.id for one in self._known.values() if one.tenant == tenant]
        for oldest in own[:-MOST_REMEMBERED]:
            del self._known[oldest]
        return pending

    async def use(self, tenant: str, name: str, *, param: str) -> None:
        """Make the tenant's adapter of this Hub name active: pull and prove it unless it is active already.

        Concurrent first uses wait for the same pull. Raises ApiError saying why it cannot be served.
        """
        reference = hub_reference(name, param)
        record = self._adapters.catalog.of(tenant).get(name)
        if record is not None and record.active is not None:
            return
        self._pulls.check_allowed(reference, param)
        adapter = tenant, name
        refusal = self._failed.get(adapter)
        if refusal and time.monotonic() < refusal.until and refusal.token == hub_token_state(os.environ):
            raise refusal.error.fresh()
        if adapter not in self._first_uses:
            task = asyncio.get_running_loop().create_task(self._first_use(tenant, name, reference))
            self._first_uses[adapter] = task
            task.add_done_callback(lambda done: self._first_use_ended(adapter, done))
        await asyncio.shield(self._first_uses[adapter])

    async def _first_use(self, tenant: str, name: str, reference: HubReference) -> None:
        await self._refuse_if_deactivated(tenant, name)
        options = VersionOptions(activate=True)
        arrived = await self.pull(tenant, name, reference, options, actor="first use").arrived()
        version = await self._adapters.wait(tenant, name, arrived.digest)
        if version.error is not None:
            raise VersionFailedError(
                f"{name} cannot be served: {version.error.message}", code=version.error.code
            )

    async def _refuse_if_deactivated(self, tenant: str, name: str) -> None:
        """Raise AdapterNotFoundError if the adapter was deactivated: a first use does not reactivate it."""
        if self._adapters.catalog.of(tenant).own(name) is None:
            return
        history = await self._adapters.activation.history(tenant, name)
        if history and history[0].action == "deactivate":
            raise AdapterNotFoundError(f"Adapter {name!r} was deactivated: activate one of its versions.")

    def _first_use_ended(self, adapter: tuple[str, str], task: asyncio.Task[None]) -> None:
        del self._first_uses[adapter]
        error = None if task.cancelled() else task.exception()
        if not isinstance(error, ApiError):
            return
        missing = error.code in _MISSING
        if missing or isinstance(error, VersionFailedError):
            seconds = MISSING_SECONDS if missing else FAILED_SECONDS
            until = time.monotonic() + seconds
            self._failed.pop(adapter, None)
            self._failed[adapter] = _Refusal(error.fresh(), until, hub_token_state(os.environ))
            while len(self._failed) > MOST_FAILED:
                self._failed.popitem(last=False)

    async def _finish(self, pending: PendingPull, fetched: asyncio.Task[Fetched]) -> VersionRecord:
        """Wait for the transfer, then register what came. Raises ApiError."""
        try:
            arrived = await self._arrived(fetched)
            version = await self._register(pending, arrived)
        except ApiError as error:
            _log.warning("pulling %s for %s: %s", pending.reference, pending.name, error)
            pending.failure = error
            raise
        pending.digest = version.digest
        return version

    async def _arrived(self, fetched: asyncio.Task[Fetched]) -> Fetched:
        try:
            with storage_errors():
                return await asyncio.shield(fetched)
        except HubError as error:
            raise hub_failure(error.code, str(error)) from error

    async def _register(self, pending: PendingPull, fetched: Fetched) -> VersionRecord:
        adapters, reference = self._adapters, pending.reference
        checked = None
        if fetched.sent is not None:
            checked = await adapters.check_signature(
                pending.tenant, pending.name, fetched.sent, actor=pending.actor
            )
        config = await adapters.read_config(fetched.files)
        await adapters.check_config(pending.name, config, pending.options)
        source = {
            "kind": "hub",
            "repo": reference.repo,
            "revision": reference.revision,
            "commit": fetched.commit,
            "subfolder": reference.subfolder,
        }
        return await adapters.add(
            pending.tenant,
            pending.name,
            fetched.files,
            source,
            pending.options,
            checked=checked,
            actor=pending.actor,
        )


def hub_reference(text: str, param: str) -> HubReference:
    """Parse `hub:org/repo[@revision][:subfolder]`. Raises InvalidRequestError."""
    try:
        return parse_hub_reference(text)
    except HubError as error:
        raise InvalidRequestError(f"{param}: {error}", param=param, code=error.code) from error
