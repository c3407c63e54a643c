"""An adapter's version from its files to being served: registered, proved, packed, activated if asked for.

A restart interrupts nothing for good: the registry holds what is unfinished, and the options it came with.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from msgspec import to_builtins

from onebase_adapters import registry as registry_errors
from onebase_adapters.format.added_tokens import BaseVocabulary, checked_additions
from onebase_adapters.format.config import AdapterFormatError, check_config
from onebase_adapters.format.defaults import checked_defaults
from onebase_adapters.names import label
from onebase_adapters.registry import (
    SIGNATURE,
    UNSET,
    Origin,
    Registry,
    TrainingJob,
    Unset,
    VersionRecord,
    acting,
)
from onebase_adapters.signatures import (
    OWN,
    Checked,
    SentFiles,
    ServerKey,
    SignatureError,
    SignaturePolicy,
)
from onebase_adapters.store.blobs import ADAPTER_FILES, AdapterFiles
from onebase_adapters.store.store import Store, StoreError, StoreFullError
from onebase_edge.background import Backoff, Threads
from onebase_edge.errors import (
    AdapterNotFoundError,
    ApiError,
    EngineRestartedError,
    QueueFullError,
    StateConflictError,
    UnavailableError,
    UnconfirmedChangeError,
    VersionFailedError,
)
from onebase_protocol.adapters import AdapterDefaults, SignatureReport, TokenizerAdditions
from onebase_server.adapters.activation import ActivationService, RefusalLimit
from onebase_server.adapters.catalog import Catalog, VersionRef, same_base
from onebase_server.adapters.residency import PackedAdapterFile
from onebase_server.adapters.shared_proofs import SharedProofs
from onebase_server.processes.verifier_client import Proof, RejectedError, VerifierGoneError
from onebase_server.processes.verifier_protocol import VersionStage
from onebase_server.storage.calls import RegistryThreads, storage_errors

NO_SIGNATURES = SignaturePolicy()
BACKOFF = Backoff(0.5, 30.0)
"""Pauses between tries to record or activate a ready version while the registry is away, the engine restarts
or memory is full."""
ACTIVATION_TRIES = 8
"""Largest number of tries of one activation, over about a minute."""
OPTIONS = "options"
"""Key of a version's source that holds its VersionOptions."""
CHECKPOINT_KIND = "checkpoint"
"""Kind, in its source, of a version that is a job's checkpoint. Each request for one asks for its activation
again."""
_ACTIVATED_SECONDS = 3.0
"""Time, in seconds after its proof, in which another server activates a version, if it does."""

SIGNED_PROOF = (
    "modules_compared",
    "modules_exact",
    "exact",
    "kernels",
    "texts",
    "texts_changed",
    "base_unchanged",
)
"""Fields of a proof that are signed."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VersionOptions:
    """Options of a request that adds a version."""

    activate: bool = False
    allow_noop: bool = False
    any_base: bool = False

    @classmethod
    def of(cls, source: Mapping[str, Any]) -> VersionOptions:
        """Return the options that a version was registered with."""
        return cls(**source.get(OPTIONS, {}))


@dataclass(eq=False)
class _Job:
    """An unfinished version that this server is working on."""

    options: VersionOptions
    task: asyncio.Task[None] | None = None
    progress: VersionStage | None = None
    activate: bool = False
    failure: ApiError | None = None
    """Reason why the ready version was not activated."""
    expected: str | Unset | None = UNSET
    """Digest that must be active before the activation. None: none may be; UNSET: any."""
    if_due: bool = True
    """Whether it is activated only while nobody has chosen the active version since it is ready."""


class AdapterService:
    """Registers versions and makes them ready. Called from one event loop.

    Args:
        base_names: what an adapter's config may call this base, its own name first.
        records, disk: threads for the registry's calls and for the store's.
        vocabulary: returns the tokens of the base's tokenizer, or None without one. It may take a second.
        check_tokens: raises AdapterFormatError for an adapter's tokens that do not fit that tokenizer.
        check_defaults: raises AdapterFormatError for defaults that requests cannot use.
        signatures: says who may sign which adapters.
        key: the key to sign trained versions with, if there is one. base_facts: facts about the base for
            that.
    """

    def __init__(
        self,
        registry: Registry,
        store: Store,
        catalog: Catalog,
        activation: ActivationService,
        proofs: SharedProofs,
        *,
        base_names: tuple[str, ...],
        records: RegistryThreads,
        disk: Threads,
        vocabulary: Callable[[], BaseVocabulary | None] = lambda: None,
        check_tokens: Callable[[TokenizerAdditions], None] = lambda added: None,
        check_defaults: Callable[[AdapterDefaults], None] = lambda defaults: None,
        signatures: SignaturePolicy = NO_SIGNATURES,
        key: ServerKey | None = None,
        base_facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.signatures = signatures
        self._key = key
        self._base_facts = dict(base_facts or {})
        self._refusals = RefusalLimit()
        self.vocabulary = vocabulary
        self._check_tokens = check_tokens
        self._check_defaults = check_defaults
        self.store = store
        self.catalog = catalog
        self.activation = activation
        self.disk = disk
        self._registry = registry
        self._proofs = proofs
        self._base_names = base_names
        self._records = records
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs: dict[VersionRef, _Job] = {}
        self.proofs: Counter[str] = Counter()
        """Versions that became `ready` or `failed` here."""
        self.proof_seconds = proofs.seconds

    @property
    def unfinished(self) -> int:
        """Number of versions that this server is proving, or will."""
        return len(self._jobs)

    # ---- registering --------------------------------------------------------------------------

    async def check_config(self, name: str, config: bytes, options: VersionOptions) -> None:
        """Check an adapter's config, before anything else is done with the adapter.

        Raises VersionFailedError, or StateConflictError when it belongs to another base.
        """
        try:
            facts = await self.disk.run_blocking(check_config, config)
            defaults = checked_defaults(facts.defaults)
            if defaults is not None:
                await self.disk.run_blocking(self._check_defaults, defaults)
            added, _ = checked_additions(facts.tokenizer)
            if added is not None:
                await self.disk.run_blocking(self._check_tokens, added)
        except AdapterFormatError as error:
            raise VersionFailedError(f"adapter_config.json: {error}", code=error.code) from error
        if not options.any_base and not same_base(facts.base_name, *self._base_names):
            raise StateConflictError(
                f"Adapter {name!r} was trained on {facts.base_name!r} and this server's base is "
                f"{self._base_names[0]!r}. Send it to a server of that base, or send any_base if this is the "
                "same model by another name.",
                code="base_mismatch",
                param="files",
            )

    async def check_signature(
        self, tenant: str, name: str, sent: SentFiles, *, actor: str = ""
    ) -> Checked | None:
        """Verify the signature of files that came for a name, before they are registered under it.

        Raises VersionFailedError, which is in the audit log then.
        """
        try:
            return await self.disk.run_blocking(self.signatures.check, tenant, name, sent)
        except SignatureError as error:
            raise await self._refused(tenant, name, error, actor=actor) from error

    async def check_parents(
        self,
        tenant: str,
        name: str,
        parents: Sequence[VersionRecord],
        *,
        actor: str = "",
        act: str = "a merge",
        param: str | None = "adapters",
        audited: bool = True,
    ) -> None:
        """Refuse to make a version under a name that needs a signature, unless all its parents have one of a
        signer of this name.

        Args:
            act: what is refused, for the message. param: the request's field that names the parents, or
                None. audited: whether a refusal is noted in the audit log.

        Raises VersionFailedError.
        """
        rule = self.signatures.rule(tenant, name)
        if rule.policy != "require":
            return
        for version in parents:
            found = version.source.get(SIGNATURE) or {}
            if found.get("status") == "verified" and found.get("signer") in rule.signers:
                continue
            error = SignatureError(
                "signer_not_allowed" if found.get("status") == "verified" else "signature_missing",
                f"{label(version.name, version.digest)} has no verified signature of "
                f"{' or '.join(rule.signers)}, which {act} under this name needs of each.",
            )
            raise await self._refused(tenant, name, error, actor=actor, param=param, audited=audited)

    async def check_trained(
        self,
        tenant: str,
        name: str,
        *,
        actor: str = "",
        param: str | None = "name",
        audited: bool = True,
    ) -> None:
        """Refuse to train under a name that needs a signature, unless this server may sign it and can.

        param: the request's field that names it; None: nobody can choose another.
        audited: whether a refusal is noted in the audit log.

        Raises VersionFailedError.
        """
        rule = self.signatures.rule(tenant, name)
        if rule.policy != "require" or (self._key is not None and OWN in rule.signers):
            return
        signers = " or ".join(rule.signers)
        way = "Have" if param is None else "Train under another name, or have"
        remedy = f"{way} the operator add {OWN} to the signers of {name!r}"
        error = SignatureError(
            "signer_not_allowed",
            f"What is trained here is {OWN}'s, and only {signers} may sign this name. {remedy}.",
        )
        if self._key is None:
            error = SignatureError(
                "signature_missing",
                f"This name needs a signature of {signers}, and what this server trains has none. {remedy}, "
                "and start it with --signing-key.",
            )
        raise await self._refused(tenant, name, error, actor=actor, param=param, audited=audited)

    async def check_job(self, job: TrainingJob, *, actor: str, audited: bool = True) -> None:
        """Refuse what a job trained where today's policy would not let the job begin: it may be from before.

        audited: whether a refusal is noted in the audit log.

        Raises VersionFailedError and UnavailableError.
        """
        await self.check_trained(job.tenant, job.name, actor=actor, param=None, audited=audited)
        if job.parent is not None:
            parent = job.parent.tenant, job.parent.name, job.parent.digest
            await self.check_start(job.tenant, job.name, *parent, actor=actor, audited=audited)

    async def check_start(
        self,
        tenant: str,
        name: str,
        owner: str,
        adapter: str,
        digest: str,
        *,
        actor: str,
        audited: bool = True,
    ) -> None:
        """Refuse to train under a name that needs a signature from a version, `adapter@digest` of the tenant
        `owner`, without one.

        audited: whether a refusal is noted in the audit log.

        Raises VersionFailedError and UnavailableError.
        """
        if self.signatures.rule(tenant, name).policy != "require":
            return
        try:
            parent = await self.version(owner, adapter, digest)
        except AdapterNotFoundError:
            error = SignatureError(
                "signature_missing",
                f"{label(adapter, digest)}, from which training went on, was deleted, and this name "
                "needs a verified signature of it. Upload it again with its signature.",
            )
            raise await self._refused(tenant, name, error, actor=actor, audited=audited) from None
        await self.check_parents(
            tenant, name, [parent], actor=actor, act="training", param=None, audited=audited
        )

    @property
    def signs(self) -> bool:
        """Return True if the server has a key to sign trained versions with."""
        return self._key is not None

    def may_sign(self, version: VersionRecord) -> bool:
        """Return True if the server has a key to sign a trained version with, nobody has signed the version,
        and nothing of its proof was waived: the same files may have come before, with `allow_noop`."""
        is_verified = (version.source.get(SIGNATURE) or {}).get("status") == "verified"
        return self._key is not None and not is_verified and not VersionOptions.of(version.source).allow_noop

    async def sign(self, version: VersionRecord, facts: Mapping[str, Any]) -> None:
        """Sign a version that this server trained, with its base and its proof, if `may_sign`.

        facts: what else is signed about its training.

        Raises AdapterNotFoundError, UnavailableError.
        """
        if self._key is None or not self.may_sign(version):
            return
        proof = (version.report or {}).get("proof") or {}
        proved = {name: proof[name] for name in SIGNED_PROOF if name in proof}
        statement = {"base": self._base_facts, "proof": proved, **facts}
        sums = {file: version.files.of(file).sha256 for file in ADAPTER_FILES}
        bundle = self._key.sign(version.name, sums, statement)
        report = SignatureReport("verified", signer=OWN, statement=statement)
        signature = {**to_builtins(report), "bundle": bundle}
        with storage_errors(version.name):
            await self._records.write(
                self._registry.sign_version, version.tenant, version.name, version.digest, signature
            )

    async def _refused(
        self,
        tenant: str,
        name: str,
        error: SignatureError,
        *,
        actor: str,
        param: str | None = None,
        audited: bool = True,
    ) -> VersionFailedError:
        """Return the caller's error for a refusal, which is in the audit log by then if it is to be and there
        is room."""
        refused = VersionFailedError(str(error), code=error.code, param=param)
        refused.is_audited = audited and await self.note_refusal(tenant, name, error, actor=actor)
        return refused

    async def note_refusal(self, tenant: str, name: str, error: SignatureError, *, actor: str = "") -> bool:
        """Record in the audit log that files were refused; of one tenant at most MOST_REFUSALS a minute.
        Return True if it was recorded."""
        _log.warning("adapter %r of %r was refused (%s): %s", name, tenant, error.code, error)
        if not self._refusals.take(tenant):
            return False
        details = {"code": error.code, "message": str(error)}
        with storage_errors(name):
            await self._records.write(self._registry.note_refusal, tenant, name, details, actor=actor)
        return True

    async def read_config(self, files: AdapterFiles) -> bytes:
        """Return the config of stored files. Raises UnavailableError."""
        with storage_errors():
            path = await self.disk.run_blocking(self.store.local, files.config.sha256)
            return await self.disk.run_blocking(path.read_bytes)

    async def add(
        self,
        tenant: str,
        name: str,
        files: AdapterFiles,
        source: Mapping[str, Any],
        options: VersionOptions,
        *,
        checked: Checked | None = None,
        actor: str = "",
        if_due: bool = False,
        wait_for_verifier: bool = True,
    ) -> VersionRecord:
        """Register stored files under a tenant's name, and start making them ready unless they are.

        checked: the result of `check_signature`.
        if_due: of a version that is there already, as in Registry.add_version and Registry.activate.
        wait_for_verifier: without a verifier, wait for one; else leave the version unfinished.

        Raises StoreFullError, UnavailableError.
        """
        stored = {**source, OPTIONS: asdict(options)}
        if checked is not None:
            stored[SIGNATURE] = {**to_builtins(checked.report), "bundle": checked.bundle}
        with storage_errors(name):
            version, _ = await self._records.write(
                self._registry.add_version,
                name,
                files.digest,
                files,
                stored,
                tenant=tenant,
                actor=actor,
                activates=options.activate,
                if_due=if_due,
            )
        if version.state == "ready":
            if options.activate:
                await self.activation.activate(tenant, name, version.digest, if_due=if_due, actor=actor)
            return version
        self._begin(version, options, wait_for_verifier=wait_for_verifier)
        return version

    async def resume(self) -> None:
        """Resume the versions that a restart interrupted. Raises RegistryError."""
        for version in await self._records.run_blocking(self._registry.unfinished):
            with acting(_origin_of(version)):
                options = VersionOptions.of(version.source)
                self._begin(version, replace(options, activate=version.activates))
        for record in self.catalog:
            # Ready just before the restart. The newest, since its activation settles the others.
            late = next((one for one in record.versions if one.activates and one.state == "ready"), None)
            if late is not None:
                with acting(_origin_of(late)):
                    await self._activate_if_asked(late, _Job(VersionOptions.of(late.source), activate=True))

    def prove_again(self, damaged: PackedAdapterFile) -> None:
        """Replace a lost or damaged packed adapter for the versions that still have it."""
        task = asyncio.get_running_loop().create_task(self._prove_again(damaged))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _prove_again(self, damaged: PackedAdapterFile) -> None:
        reopened: list[VersionRecord] = []

        def reopen() -> None:
            # All of its names before any is proved: none may take another's damaged file for a proof.
            for seen in damaged.versions:
                with suppress(registry_errors.UnknownAdapterError, registry_errors.UnknownVersionError):
                    version = self._registry.reopen(seen.tenant, seen.name, seen.digest, seen=seen)
                    if not version.finished:
                        reopened.append(version)

        try:
            await self._records.write(reopen)
        except registry_errors.RegistryError as error:
            _log.error("file %s cannot be packed again: %s", damaged.blob.sha256[:12], error)
        for version in reopened:
            self._begin(version, replace(VersionOptions.of(version.source), activate=False))

    async def wait(self, tenant: str, name: str, digest: str) -> VersionRecord:
        """Return the version once it is finished, and activated if that was requested.

        Raises what the activation raised, and AdapterNotFoundError when the version was deleted meanwhile.
        """
        job = self._jobs.get(VersionRef(tenant, name, digest))
        if job is not None and job.task is not None:
            await asyncio.shield(job.task)
            if job.failure is not None:
                raise job.failure.fresh()
        return await self.version(tenant, name, digest)

    async def settle(self, version: VersionRecord, seconds: float) -> bool:
        """Wait at most `seconds` until this server has finished with a version, or another one has proved and
        activated it. Return False if there was nothing to wait for."""
        until = time.monotonic() + seconds
        waited = False
        while (left := until - time.monotonic()) > 0:
            job = self._jobs.get(VersionRef.of(version))
            if job is not None and job.task is not None:
                await asyncio.wait({job.task}, timeout=left)
                return True
            changed = self.catalog.changed
            if self._is_settled(version):
                break
            waited = True
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, _ACTIVATED_SECONDS)):
                    await changed.wait()
        return waited

    def _is_settled(self, version: VersionRecord) -> bool:
        """Return True if nothing more will happen to the version, as the catalog has it or else as it was
        read."""
        adapter = self.catalog.of(version.tenant).own(version.name)
        found = (adapter and adapter.version(version.digest)) or version
        if adapter is None or found.state != "ready" or adapter.active == found.digest:
            return found.finished
        late = time.time() - (found.finished_at or 0.0) > _ACTIVATED_SECONDS
        return late or not found.activates

    async def version(self, tenant: str, name: str, digest: str) -> VersionRecord:
        """Return one version with its whole report, by digest or a prefix of it. Raises
        AdapterNotFoundError."""
        with storage_errors(name):
            return await self._records.run_blocking(self._registry.version, tenant, name, digest)

    async def versions(self, tenant: str, name: str) -> list[VersionRecord]:
        """Return all versions with their whole reports, newest first. Raises AdapterNotFoundError."""
        with storage_errors(name):
            return await self._records.run_blocking(self._registry.versions, tenant, name)

    def progress(self, version: VersionRecord) -> VersionStage | None:
        """Return this server's progress with an unfinished version, or None if it does not work on it."""
        job = self._jobs.get(VersionRef.of(version))
        return None if job is None else job.progress

    # ---- making ready ------------------------------------------------------------------------

    def _begin(
        self, version: VersionRecord, options: VersionOptions, *, wait_for_verifier: bool = True
    ) -> None:
        key = VersionRef.of(version)
        job = self._jobs.get(key)
        if job is None:
            job = self._jobs[key] = _Job(options)
            job.task = asyncio.get_running_loop().create_task(self._run(version, job, wait_for_verifier))
            job.task.add_done_callback(lambda done: self._jobs.pop(key, None))
        job.activate = job.activate or options.activate

    async def _run(self, version: VersionRecord, job: _Job, wait_for_verifier: bool) -> None:
        """Prove and activate one version; the registry holds the outcome afterwards."""
        where = version.tenant, version.name, version.digest
        try:
            async with self._proofs.claimed(version) as ours:
                if ours:
                    ready = await self._make_ready(version, job, wait_for_verifier)
                else:
                    ready = (
                        await self._records.run_blocking(self._registry.version, *where)
                    ).state == "ready"
        except VerifierGoneError as error:
            _log.error("version %s of %s was not proved: %s", version.digest[:12], version.name, error)
        except (registry_errors.UnknownAdapterError, registry_errors.UnknownVersionError):
            _log.info("version %s of %s was deleted while it was proved", version.digest[:12], version.name)
        except registry_errors.RegistryError as error:
            _log.error("version %s of %s: %s", version.digest[:12], version.name, error)
        else:
            if ready:
                await self._activate_if_asked(version, job)

    async def _make_ready(self, version: VersionRecord, job: _Job, wait_for_verifier: bool) -> bool:
        """Prove the version and record the outcome. Return True if it is ready.

        Raises VerifierGoneError, and AdapterNotFoundError or UnknownVersionError if the version was deleted.
        """
        try:
            proof = await self._proof(version, job, wait_for_verifier)
            finished = await self._finish(version, "ready", report=proof.report, prepared=proof.packed)
            if self._proofs.has_none(finished):
                await self._proofs.keep(version, proof)
            return True
        except RejectedError as error:
            await self._failed(version, error.code, error.message)
        except StoreFullError:
            await self._failed(version, "store_full", "the store had no space for the packed adapter")
        except StoreError as error:
            await self._failed(version, "store_unavailable", str(error))
        except (VerifierGoneError, registry_errors.UnknownAdapterError, registry_errors.UnknownVersionError):
            raise
        except Exception:
            _log.exception("version %s of %s failed", version.digest[:12], version.name)
            await self._failed(
                version, "internal_error", "the server failed on this version; its log says why"
            )
        return False

    async def activate_with_retries(
        self, version: VersionRecord, *, expected: str | Unset | None = UNSET
    ) -> ApiError | None:
        """Activate a ready version, with several tries. Returns why the last one failed, or None.

        expected: the digest that must be active until then, None for none; not given: whatever is.
        """
        job = _Job(VersionOptions(activate=True), activate=True, expected=expected, if_due=False)
        await self._activate_if_asked(version, job)
        return job.failure

    async def _activate_if_asked(self, version: VersionRecord, job: _Job) -> None:
        if not job.activate:
            return
        for pause in BACKOFF.tries(ACTIVATION_TRIES):
            try:
                await self.activation.activate(
                    version.tenant,
                    version.name,
                    version.digest,
                    expected=job.expected,
                    if_due=job.if_due,
                    actor=version.created_by,
                )
                return
            except ApiError as error:
                passing = isinstance(error, EngineRestartedError | UnavailableError | QueueFullError)
                if isinstance(error, UnconfirmedChangeError):
                    passing = job.if_due  # else it could undo what somebody has decided since
                if pause is None or not passing:
                    _log.error("version %s of %s is not active: %s", version.digest[:12], version.name, error)
                    job.failure = error
                    is_asked_again = version.source.get("kind") == CHECKPOINT_KIND
                    if not passing and job.if_due and not is_asked_again:
                        await self._cancel_activation(version)
                    return
            await asyncio.sleep(pause)

    async def _cancel_activation(self, version: VersionRecord) -> None:
        """Keep a version whose activation was refused from becoming active at a later start."""
        where = version.tenant, version.name, version.digest
        try:
            await self._records.write(self._registry.cancel_activation, *where)
        except (registry_errors.UnknownAdapterError, registry_errors.UnknownVersionError):
            pass
        except registry_errors.RegistryError as error:
            _log.error("version %s of %s: %s", version.digest[:12], version.name, error)

    async def _failed(self, version: VersionRecord, code: str, message: str) -> None:
        try:
            await self._finish(version, "failed", error=(code, message))
        except registry_errors.RegistryError as error:
            _log.error("version %s of %s: %s", version.digest[:12], version.name, error)

    async def _finish(self, version: VersionRecord, state: Any, **facts: Any) -> VersionRecord:
        """Call `_set_state` until the registry accepts it: nobody else would record this server's proof.

        Returns the version as it is then; a server with other kernels may have been faster. Raises
        AdapterNotFoundError, UnknownVersionError.
        """
        pauses = BACKOFF.pauses()
        while True:
            try:
                finished = await self._set_state(version, state, **facts)
                self.proofs[state] += 1
                return finished
            except (registry_errors.UnknownAdapterError, registry_errors.UnknownVersionError):
                raise
            except registry_errors.RegistryError as error:
                _log.warning("version %s of %s waits: %s", version.digest[:12], version.name, error)
            await asyncio.sleep(next(pauses))

    async def _set_state(self, version: VersionRecord, state: Any, **facts: Any) -> VersionRecord:
        return await self._records.write(
            self._registry.set_state, version.tenant, version.name, version.digest, state, **facts
        )

    async def _proof(self, version: VersionRecord, job: _Job, wait_for_verifier: bool) -> Proof:
        marked: list[asyncio.Task[None]] = []

        def follow(progress: VersionStage) -> None:
            if progress.stage == "proving" and not marked:
                marked.append(asyncio.get_running_loop().create_task(self._mark_proving(version)))
            job.progress = progress

        try:
            return await self._proofs.prove(
                version,
                allow_noop=job.options.allow_noop,
                wait_for_verifier=wait_for_verifier,
                on_progress=follow,
            )
        finally:
            await asyncio.gather(*marked)

    async def _mark_proving(self, version: VersionRecord) -> None:
        try:
            await self._set_state(version, "proving")
        except registry_errors.RegistryError as error:
            _log.warning("version %s of %s: %s", version.digest[:12], version.name, error)


def _origin_of(version: VersionRecord) -> Origin:
    """Return the origin on whose behalf a restart resumes a version: whoever added it."""
    key = version.created_by if version.created_by.startswith("ob-") else ""
    return Origin(key, actor="a restart")
