"""Delivery of a finished run as a version of its adapter: added, proved, and activated if that was asked
for."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from msgspec import convert

from onebase_adapters.names import label
from onebase_adapters.registry import (
    UNSET,
    Origin,
    RegistryError,
    TrainingJob,
    Unset,
    VersionRecord,
    acting,
)
from onebase_adapters.store.blobs import ADAPTER_FILES, AdapterFiles
from onebase_adapters.store.store import StoreError
from onebase_edge.background import Backoff
from onebase_edge.errors import (
    ActivationConflictError,
    ApiError,
    DiskFullError,
    TrainingFileNotFoundError,
    UnavailableError,
    VersionFailedError,
)
from onebase_protocol.adapters import SliceScore
from onebase_server.adapters.service import AdapterService, VersionOptions
from onebase_server.adapters.sources import take_folder
from onebase_server.jobs.files import TrainingFiles
from onebase_server.jobs.folders import JobFolders
from onebase_server.jobs.handover_files import ADAPTER, KeptFiles
from onebase_server.jobs.job_record import JobRecord
from onebase_server.storage.calls import storage_errors
from onebase_training.slices import ACTIVE

ACTOR = "training"
BACKOFF = Backoff(4.0, 60.0)
"""Pauses between tries, in seconds, while the store or the registry cannot be reached."""
TRIES = 6
"""Tries of one delivery, over about two minutes."""
PROOFS_WAITED = 6
"""The wait for a version's proof lasts as long as this many proofs may take: others may be ahead of it."""
LOST = "adapter_lost"
"""The trained files are gone: the job has to be trained again."""
_SHOWN = 5
SIGNED_SETTINGS = (
    "method",
    "epochs",
    "max_steps",
    "learning_rate",
    "r",
    "alpha",
    "batch_size",
    "max_length",
    "train_on",
    "best_by",
    "seed",
)
"""Settings of a recipe that are signed and named in a bill of materials, where they are numbers or texts."""
_SUBJECTS = ("base", "parent", ACTIVE)
_IS_ACTIVE = ", which is active"
_CODES = {"store_full": "disk_full"}
"""A job's error code, by that of its version."""

_log = logging.getLogger(__name__)


class DeliveryError(Exception):
    """A trained adapter cannot be served. `code` is stable, the message says why and what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class Delivered:
    """Result of a job's delivery. `as_asked`: False if its version should be active and is not, or if that
    could not be decided. `replaced`: the version that was active until then."""

    version: str
    activated: bool
    result_file: str
    message: str
    as_asked: bool
    replaced: str | None = None


@dataclass(frozen=True)
class ActivationDecision:
    """Whether a job's version is to be activated, by what its training measured.

    reason: why it is not, as the end of a sentence; why it is, where that was measured. expected: what must
    still be active then, since the decision depends on it. undecided: what was asked for could not be
    decided.
    """

    activate: bool
    reason: str = ""
    expected: str | Unset | None = UNSET
    undecided: bool = False


class Delivery:
    """Adds what jobs trained to the adapter service, as an upload would be.

    The library is never asked to activate: after a restart it would, even if the job was cancelled since.

    proof_seconds: limit for a version's proof, the wait for others included.
    """

    def __init__(
        self,
        library: AdapterService,
        folders: JobFolders,
        files: TrainingFiles,
        kept: KeptFiles,
        proof_seconds: float,
    ) -> None:
        self._library = library
        self._files = files
        self._folders = folders
        self._kept = kept
        self._proof_seconds = proof_seconds

    async def deliver(self, job: TrainingJob, record: JobRecord) -> Delivered:
        """Deliver a job's adapter. It is safe to repeat after a crash: the same content is the same version.

        Args:
            record: tells whether the job still runs; only then is its version activated.

        Raises DeliveryError.
        """
        for pause in BACKOFF.tries(TRIES):
            try:
                with acting(Origin(job.key, actor=f"job {job.id}", owned=(job.id, job.server))):
                    return await self._deliver(job, record)
            except DiskFullError as error:
                raise DeliveryError("disk_full", error.message) from error
            except (UnavailableError, RegistryError, StoreError, OSError) as error:
                if pause is None:
                    raise DeliveryError("delivery_failed", f"{error} Resume the job later.") from error
                _log.warning("job %s waits: %s", job.id, error)
            except ApiError as error:
                raise DeliveryError(error.code, error.message) from error
            await asyncio.sleep(pause)
        raise AssertionError("the last try returns or raises")

    async def _deliver(self, job: TrainingJob, record: JobRecord) -> Delivered:
        report, decision = job.report or {}, decide(job)
        await self._kept.restore(job)
        folder = self._folders.job(job.id) / ADAPTER
        if not all((folder / file).is_file() for file in ADAPTER_FILES):
            raise DeliveryError(
                LOST,
                "The trained adapter is gone from --data-dir. Resume the job: it trains on from its last "
                "checkpoint, or from its beginning if that is gone as well.",
            )
        result_file = await self._files.store_curve(job.tenant, job.id, report)
        with storage_errors(job.name):
            files = await self._library.disk.run_blocking(take_folder, self._library.store, folder)
        try:
            await self._library.check_job(job, actor=ACTOR)
        except VersionFailedError as error:
            message = f"{error.message} Resume the job once the policy allows it."
            raise DeliveryError(error.code, message) from error
        version = await self._proved(job, files)
        if version.error is not None:
            code = _CODES.get(version.error.code, version.error.code)
            raise DeliveryError(code, f"The adapter is not served: {version.error.message}")
        if version.state != "ready":
            raise DeliveryError("delivery_failed", "The adapter was not proved. Resume the job.")
        await self._evaluated(job, version)
        if self._library.signs:
            await self._library.sign(version, await self._facts(job, decision))
        problem = await self._activate(version, record, decision) if decision.activate else ""
        adapter = self._library.catalog.of(job.tenant).own(job.name)
        active = adapter is not None and adapter.active == version.digest
        replaced = await self._replaced(job, version) if active else None
        return Delivered(
            version=version.digest,
            activated=active,
            result_file=result_file,
            message=_message(
                job, version.digest, decision, active=active, replaced=replaced, problem=problem
            ),
            as_asked=active or not (decision.activate or decision.undecided),
            replaced=replaced,
        )

    async def _evaluated(self, job: TrainingJob, version: VersionRecord) -> None:
        """Record how the version's scores differ from those of the base and of the active version, for gates
        of activations."""
        report = job.report or {}
        if not report.get("paired"):
            return
        held_out = (await training_facts(job, self._files))["data"].get("validation") or {}
        chosen = (job.settings.get("best_by"), "exact_match")
        against = {"base": None, ACTIVE: report.get("active") or None}
        for subject, by_metric in report["paired"].items():
            metric = next((name for name in (*chosen, *by_metric) if name in by_metric), None)
            if metric is None or against.get(subject) == version.digest:
                continue
            slices = convert(by_metric[metric], list[SliceScore])
            await self._library.activation.evaluate(
                job.tenant,
                job.name,
                version.digest,
                against.get(subject),
                metric,
                slices,
                job=job.id,
                data=held_out.get("sha256"),
            )

    async def _facts(self, job: TrainingJob, decision: ActivationDecision) -> dict[str, Any]:
        """Return what is signed about the training of a version, before it is activated."""
        parent = None if job.parent is None else {"name": job.parent.name, "version": job.parent.digest}
        return {
            "job": job.id,
            **await training_facts(job, self._files),
            "steps": (job.report or {}).get("steps"),
            "parent": parent,
            "activation_decision": {
                "rule": job.activate,
                "activate": decision.activate,
                "reason": decision.reason,
            },
        }

    async def active_version(self, job: TrainingJob) -> VersionRecord | None:
        """Return the version that requests for the job's adapter get now."""
        await self._library.catalog.look()
        adapter = self._library.catalog.of(job.tenant).own(job.name)
        return None if adapter is None else adapter.active_version

    async def _replaced(self, job: TrainingJob, version: VersionRecord) -> str | None:
        """Return the digest of the version that the job's took the place of, if there was one."""
        if (job.report or {}).get("active") == version.digest:
            return None  # what came out is the active version, bit for bit
        history = await self._library.activation.history(version.tenant, version.name)
        return next((entry.previous for entry in history if entry.version == version.digest), None)

    async def _proved(self, job: TrainingJob, files: AdapterFiles) -> VersionRecord:
        """Return the version after its proof has ended. Raises DeliveryError if that takes too long."""
        source: dict[str, Any] = {"kind": "training", "job": job.id}
        if job.parent is not None:
            source["parent"] = {"name": job.parent.name, "version": job.parent.digest}
        options = VersionOptions(any_base=True)
        added = await self._library.add(job.tenant, job.name, files, source, options, actor=ACTOR)
        try:
            async with asyncio.timeout(self._proof_seconds):
                await self._library.wait(added.tenant, added.name, added.digest)
        except TimeoutError as error:
            raise DeliveryError(
                "delivery_failed",
                f"The adapter was not proved within {self._proof_seconds:g} s: others are ahead of it, or no "
                "verifier runs; the server's log may say why. Resume the job to wait again.",
            ) from error
        except ApiError as error:  # an upload of the same content asked to activate it, and that failed
            _log.info("version %s of %s: %s", added.digest[:12], added.name, error)
        return await self._library.version(added.tenant, added.name, added.digest)

    async def _activate(self, version: VersionRecord, record: JobRecord, decision: ActivationDecision) -> str:
        """Activate the version, unless the job was stopped. Returns why that failed, or ""."""
        if (await record.current()).state != "running":
            return ""
        failure = await self._library.activate_with_retries(version, expected=decision.expected)
        if isinstance(failure, ActivationConflictError):
            current, expected = failure.details["current"], decision.expected
            now = f"{label(version.name, current)} is active" if current else "no version is active"
            then = label(version.name, expected) if isinstance(expected, str) else "the base alone"
            return f"it was compared with {then}, and now {now}. Activate it yourself if it is the better one"
        return failure.message if failure else ""


async def training_facts(job: TrainingJob, files: TrainingFiles) -> dict[str, Any]:
    """Return what a job trained on: `data` (of the files that are still there), `recipe` and `seed`.

    Of the recipe these are SIGNED_SETTINGS and the SHA-256 of the whole as JSON with sorted keys: prompts and
    graders are for those who may read the job, and would make a signature too large. Raises UnavailableError.
    """
    data = {}
    for role, file_id in (("training", job.training_file), ("validation", job.validation_file)):
        if file_id is not None:
            with suppress(TrainingFileNotFoundError):
                file = await files.get(job.tenant, file_id)
                data[role] = {"sha256": file.sha256, "bytes": file.bytes}
    recipe = dict((job.report or {}).get("recipe") or job.settings)
    whole = json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    shown = {
        name: recipe[name] for name in SIGNED_SETTINGS if isinstance(recipe.get(name), int | float | str)
    }
    shown["sha256"] = hashlib.sha256(whole.encode()).hexdigest()
    return {"data": data, "recipe": shown, "seed": recipe.get("seed")}


def decide(job: TrainingJob) -> ActivationDecision:
    """Return whether a job's version is to be activated, by the job's rule and its report."""
    report = job.report or {}
    if job.activate == "never":
        return ActivationDecision(False, "the job asked not to")
    gate = _gate(job, report)
    if gate is not None and not gate.activate:
        return gate
    if job.activate == "always":
        return gate or ActivationDecision(True)
    compared: dict[str, bool | None] = dict(report.get("better_than") or {"base": report.get("better")})
    expected: str | Unset | None = UNSET if gate is None else gate.expected
    if job.activate == "if_better_than_base":
        compared.pop(ACTIVE, None)
    else:
        expected = report.get("active") or None
    names = {name: _subject(job, report, name) for name in compared}
    if compared.get("base") is None:
        return ActivationDecision(False, "nothing was held out to compare it on", undecided=True)
    if lost := [name for name, better in compared.items() if better is False]:
        return ActivationDecision(
            False, f"on held-out rows it is no better than {_listed(names[n] for n in lost)}"
        )
    if compared.get(ACTIVE, True) is None:
        why = report.get("not_compared") or "it was not measured"
        return ActivationDecision(
            False, f"it could not be compared with {names[ACTIVE]}: {why}", undecided=True
        )
    alone = "; no version was active to compare it with" if expected is None else ""
    better = _listed(name.removesuffix(_IS_ACTIVE) for name in names.values())
    return ActivationDecision(True, f"on held-out rows it is better than {better}{alone}", expected)


def _gate(job: TrainingJob, report: Mapping[str, Any]) -> ActivationDecision | None:
    """Return the decision by the limit for slices, or None if there is no limit or no slice that it is
    for."""
    slices, limit = report.get("slices"), job.settings.get("max_regression", "auto")
    if not slices or limit == "auto":
        return None
    if regressed := slices["regressed"]:
        named = ", ".join(regressed[:_SHOWN]) + (", ..." if len(regressed) > _SHOWN else "")
        against = {one for slice in slices["slices"] for one in slice.get("regressed_against", ())}
        than = _listed(_subject(job, report, name) for name in _SUBJECTS if name in against)
        than = f" than {than}" if than else ""
        return ActivationDecision(False, f"on {named} it is worse by more than {limit:g}{than}")
    if why := report.get("not_compared"):
        active = _subject(job, report, ACTIVE)
        return ActivationDecision(
            False, f"its slices could not be compared with those of {active}: {why}", undecided=True
        )
    return ActivationDecision(True, expected=report.get("active") or None)


def _subject(job: TrainingJob, report: Mapping[str, Any], name: str) -> str:
    """Return what a message calls something that the adapter was compared with."""
    if name == ACTIVE:
        return label(job.name, report["active"]) + _IS_ACTIVE
    if name == "parent" and job.parent is not None:
        if (job.parent.name, job.parent.digest) == (job.name, report.get("active")):
            return _subject(job, report, ACTIVE)
        return f"{label(job.parent.name, job.parent.digest)}, from which training went on"
    return "the base"


def _listed(names: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(names))


def _message(
    job: TrainingJob,
    digest: str,
    decision: ActivationDecision,
    *,
    active: bool,
    replaced: str | None,
    problem: str,
) -> str:
    model = label(job.name, digest)
    if active and (job.report or {}).get("active") == digest:
        return f"{model} is proved: that version is active already, and requests for {job.name} get it."
    if active:
        why = decision.reason if decision.activate else ""
        parts = [f"{model} is proved and active: requests for {job.name} get it"]
        parts += [why[:1].upper() + why[1:]] if why else []
        parts += [f"It replaced {label(job.name, replaced)}"] if replaced else []
        return ". ".join(parts) + "."
    if decision.activate:
        return f"{model} is proved, but could not be activated: {problem or 'another version was chosen'}."
    return f"{model} is proved. It is not activated: {decision.reason}."
