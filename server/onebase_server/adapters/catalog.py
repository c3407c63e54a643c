"""In-memory view of the registry for requests: adapters, their versions and which one is active.

Own writes are seen at once, those of other servers within `--sync-seconds`, and when a request names what is
not known yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

from onebase_adapters.format.config import Task
from onebase_adapters.names import NAME_RULE, is_adapter_name, label
from onebase_adapters.registry import (
    LEAST_PREFIX,
    AdapterRecord,
    ForcedDeletion,
    Registry,
    RegistryError,
    RolloutRecord,
    RolloutSide,
    VersionRecord,
)
from onebase_edge.errors import (
    AdapterNotFoundError,
    ForbiddenError,
    InvalidRequestError,
    StateConflictError,
    UnavailableError,
)
from onebase_engine.engine.messages import AdapterRef
from onebase_server.adapters.rollout_rules import RequestUnit, chooses_candidate
from onebase_server.storage.calls import RegistryThreads

HUB_PREFIX = "hub:"
"""Names of adapters that a request named by their Hub repository."""
CHECKPOINT = re.compile(r"([^:@]+):(ftjob-[0-9a-f]{1,40}):step-([1-9][0-9]{0,8})")
"""Name of a checkpoint of a training job: the adapter, the job, the step."""
LOOK_SECONDS = 0.05
"""Least time, in seconds, between two looks at the registry on behalf of requests."""
_SHOWN = 20
_OPENAI, _OPENAI_PARTS = "ft", 5
Found = TypeVar("Found")

_log = logging.getLogger(__name__)


class VersionRef(NamedTuple):
    """A version, with the tenant and the name by which a request refers to it."""

    tenant: str
    name: str
    digest: str

    @classmethod
    def of(cls, version: VersionRecord) -> VersionRef:
        return cls(version.tenant, version.name, version.digest)


class RolloutPart(NamedTuple):
    """Rollout that a request is a part of, and the side that answers it."""

    rollout: RolloutRecord
    side: RolloutSide


@dataclass(frozen=True)
class AdapterChoice:
    """Adapters that one request runs with: references for the engine, versions for leases, a label for
    answers."""

    refs: tuple[AdapterRef, ...] = ()
    uses: tuple[VersionRef, ...] = ()
    label: str | list[dict[str, str | float]] | None = None
    task: Task = "CAUSAL_LM"
    """Task of the first adapter that generates no text, else CAUSAL_LM."""
    labels: int = 0
    """Number of labels of the classifier; 0 without one."""
    label_names: tuple[str, ...] = ()
    """Names of all labels of the classifier, or none at all."""
    report: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Report of the version, if it is one alone."""
    part: RolloutPart | None = field(default=None, compare=False)
    """Rollout that chose the version; None unless one runs and the request names the adapter alone."""

    @property
    def named(self) -> str | None:
        """Name of the choice in messages; None for the base."""
        return self.label if self.label is None or isinstance(self.label, str) else "a sum of adapters"

    @property
    def version_label(self) -> str | None:
        """Versions in one line, as `a@5d0c2f7a9b31*0.7+b@9f3a21c07d55*0.3`, with exact weights; None for
        the base."""
        if self.label is None or isinstance(self.label, str):
            return self.label
        return "+".join(f"{term['name']}*{term['weight']!r}".removesuffix(".0") for term in self.label)

    @property
    def weighted(self) -> bool:
        """Whether the choice is anything but one adapter of weight 1."""
        return len(self.refs) != 1 or self.refs[0].weight != 1.0


OTHER_NAMES_OF_THE_BASE = frozenset({"dummy", "tgi"})
"""Names that Hugging Face's clients give a model if they are told none."""


class Catalog:
    """The adapters of all tenants as they were at the last look. Read from the event loop only.

    It looks after each write through `records`, so that what this server has written it also sees.
    """

    def __init__(self, base_name: str, registry: Registry, records: RegistryThreads) -> None:
        self.base_name = base_name
        self._registry = registry
        self._calls = records
        self._tenants: dict[str, dict[str, AdapterRecord]] = {}
        self._shared: dict[str, AdapterRecord] = {}
        self._by_digest: dict[str, list[VersionRecord]] = {}
        self.counter = -1
        """Change counter of the registry at the last refresh; -1 before the first."""
        self._audited: int | None = None
        self.forced: Sequence[ForcedDeletion] = ()
        """Deletions by force, on whichever server, that the last look found."""
        self._looked_at = -LOOK_SECONDS
        self._looking: asyncio.Task[bool] | None = None
        self._turn = asyncio.Lock()
        self._subscribers: list[Callable[[], None]] = []
        self.changed = asyncio.Event()
        """Event set by the next refresh that finds a change; another event then takes its place."""
        records.subscribe(self.refresh)

    def of(self, tenant: str) -> VisibleAdapters:
        """Return the names this tenant may use: its own adapters and those shared with all."""
        return VisibleAdapters(tenant, self._tenants.get(tenant, {}), self._shared)

    def means_base(self, tenant: str, model: str) -> bool:
        """Return True if a request's model is the base."""
        if model in OTHER_NAMES_OF_THE_BASE:
            return self.of(tenant).own(model) is None and model not in self._shared
        return model == self.base_name

    # ---- keeping up --------------------------------------------------------------------------

    async def is_behind(self) -> bool:
        """Return True if the registry has changed since the last refresh; a cheap call. Raises
        RegistryError."""
        return await self._calls.run_blocking(self._registry.change_counter) != self.counter

    async def refresh(self) -> None:
        """Load what has changed in the registry. Raises RegistryError."""
        async with self._turn:
            changes = await self._calls.run_blocking(self._registry.changes, self.counter, self._audited)
            if changes.counter == self.counter:
                return
            self._audited, self.forced = changes.audited, changes.forced
            kept = {(one.tenant, one.name): one for one in self if (one.tenant, one.name) in changes.names}
            new = {(one.tenant, one.name): one for one in changes.changed}
            self._sort((kept | new).values())
            self.counter = changes.counter
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()
        for subscriber in self._subscribers:
            subscriber()

    def _sort(self, records: Iterable[AdapterRecord]) -> None:
        self._tenants, self._shared, self._by_digest = {}, {}, {}
        for record in sorted(records, key=lambda one: (one.name, one.created_at)):
            self._tenants.setdefault(record.tenant, {})[record.name] = record
            if record.shared:
                self._shared.setdefault(record.name, record)
            for version in record.versions:
                self._by_digest.setdefault(version.digest, []).append(version)

    def subscribe(self, subscriber: Callable[[], None]) -> None:
        """Call it after each look that found something new."""
        self._subscribers.append(subscriber)

    async def watch(self, seconds: float) -> None:
        """Refresh when the registry notifies of a change and every `seconds` seconds, forever, also while the
        registry cannot be reached."""
        notified, loop = asyncio.Event(), asyncio.get_running_loop()

        def changed() -> None:
            loop.call_soon_threadsafe(notified.set)

        with self._registry.notify_changes(changed):
            await self._watch(seconds, notified)

    async def _watch(self, seconds: float, notified: asyncio.Event) -> None:
        away = False
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await notified.wait()
            notified.clear()
            try:
                if await self.is_behind():
                    await self.refresh()
            except RegistryError as error:
                if not away:
                    _log.error("the registry cannot be read; names stay as they are: %s", error)
                away = True
            except Exception:
                _log.exception("following the registry failed; names stay as they are")
            else:
                away = False

    async def look_again(self) -> bool:
        """Look for a name that is unknown or not ready here. Returns whether there was anything new.

        Looks at most every LOOK_SECONDS, so that made-up names do not burden the registry. Calls during a
        look share it.
        """
        if self._looking is None or self._looking.done():
            if time.monotonic() - self._looked_at < LOOK_SECONDS:
                return False
            self._looked_at = time.monotonic()
            self._looking = asyncio.get_running_loop().create_task(self.look())
        return await asyncio.shield(self._looking)

    async def find_current(self, find: Callable[[], Found]) -> Found:
        """Return what `find` returns, now or after a look at the registry: another server may have just added
        it.

        Raises what `find` does.
        """
        try:
            return find()
        except (AdapterNotFoundError, StateConflictError):
            if not await self.look_again():
                raise
        return find()

    async def look(self) -> bool:
        """Refresh if the registry has changed. Return True if it had; False also while it cannot be read."""
        counter = self.counter
        try:
            if await self.is_behind():
                await self.refresh()
        except RegistryError as error:
            _log.warning("the registry cannot be read: %s", error)
        return self.counter != counter

    # ---- reading, for the server itself ----------------------------------------------------------

    def __iter__(self) -> Iterator[AdapterRecord]:
        """Iterate over the adapters of all tenants."""
        return iter([record for records in self._tenants.values() for record in records.values()])

    def __len__(self) -> int:
        return sum(map(len, self._tenants.values()))

    def knows(self, use: VersionRef) -> bool:
        """Return True if the version is there, by this name."""
        return any(VersionRef.of(version) == use for version in self.of_digest(use.digest))

    def of_digest(self, digest: str) -> Sequence[VersionRecord]:
        """Return the versions with this content, whatever their names."""
        return self._by_digest.get(digest, ())


class VisibleAdapters:
    """The adapters that one tenant may name, at this moment. Its own come before shared ones of that name.

    An adapter of another tenant that is not shared is as unknown as one that does not exist.
    """

    def __init__(
        self, tenant: str, own: Mapping[str, AdapterRecord], shared: Mapping[str, AdapterRecord]
    ) -> None:
        self.tenant = tenant
        self._own = own
        self._shared = shared

    def __iter__(self) -> Iterator[AdapterRecord]:
        """Iterate in order of names; both maps are sorted by name."""
        shared = (record for name, record in self._shared.items() if name not in self._own)
        return heapq.merge(self._own.values(), shared, key=attrgetter("name"))

    def get(self, name: str) -> AdapterRecord | None:
        return self._own.get(name) or self._shared.get(name)

    def own(self, name: str) -> AdapterRecord | None:
        """Return the tenant's own adapter of this name."""
        return self._own.get(name)

    def owner(self, name: str) -> str:
        """Return the tenant that owns the adapter of this name; the tenant itself if the name is unknown."""
        record = self.get(name)
        return self.tenant if record is None else record.tenant

    def sees(self, version: VersionRecord) -> bool:
        """Return True if the version is the tenant's own, or shared."""
        shared = self._shared.get(version.name)
        return version.tenant == self.tenant or (shared is not None and shared.tenant == version.tenant)

    def check_own(self, name: str, to: str = "change it") -> None:
        """Raise ForbiddenError if the adapter is another tenant's, shared for use only. Unknown names pass.

        to: what only its owner may do.
        """
        if name not in self._own and name in self._shared:
            raise ForbiddenError(
                f"Adapter {name!r} is shared with all tenants, and only its owner may {to}. "
                "Upload one of your own under this name, or under another.",
                code="adapter_read_only",
            )

    def adapter(self, name: str, *, param: str | None = "adapter") -> AdapterRecord:
        """Return the adapter of this name. Raises AdapterNotFoundError, which lists known names."""
        record = self.get(name)
        if record is None:
            names = [one.name for one in islice(self, _SHOWN + 1)]
            known = ", ".join(names[:_SHOWN]) or "none"
            more = ", ..." if len(names) > _SHOWN else ""
            raise AdapterNotFoundError(
                f"There is no adapter {name[:80]!r}. Known: {known}{more}.", param=param
            )
        return record

    def version(self, name: str, wanted: str, *, param: str | None = "adapter") -> VersionRecord:
        """Return one version by its digest, or by a prefix of at least 8 digits. Raises
        AdapterNotFoundError."""
        record = self.adapter(name, param=param)
        found = [version for version in record.versions if version.digest.startswith(wanted)]
        if len(wanted) < LEAST_PREFIX or not found:
            active = f"its active version is {record.active}" if record.active else "none is active"
            raise AdapterNotFoundError(
                f"Adapter {name!r} has no version {wanted[:80]!r}: {active}. Give a version's digest, or a "
                f"beginning of at least {LEAST_PREFIX} digits.",
                param=param,
                code="version_not_found",
            )
        if len(found) > 1:
            raise AdapterNotFoundError(
                f"Several versions of {name!r} begin with {wanted!r}. Give more digits.",
                param=param,
                code="version_not_found",
            )
        return found[0]

    def find(self, reference: str, *, param: str = "adapter") -> VersionRecord:
        """Return the version that a request means by `name`, `name@digest` or `name@prefix`.

        `name@digest` may be spelled as OpenAI does, `ft:base:organization:name:digest`.

        Raises AdapterNotFoundError, StateConflictError when it is not ready.
        """
        reference = self.ours(reference)
        if self.names_version(reference):
            name, _, wanted = reference.rpartition("@")
            version = self.version(name, wanted, param=param)
        else:
            record = self.adapter(reference, param=param)
            if record.active is None:
                raise AdapterNotFoundError(
                    f"Adapter {reference!r} has no active version: activate one, or ask for one as "
                    f"{reference}@digest.",
                    param=param,
                )
            version = self.version(reference, record.active, param=param)
        if version.state == "ready":
            return version
        if self.adapter(version.name).active == version.digest and not version.finished:
            raise UnavailableError(
                f"The active version of {version.name!r} is being prepared again. Try again in a moment.",
                code="adapter_unavailable",
                retry_after=10.0,
            )
        raise not_ready(version, param)

    def names_version(self, reference: str) -> bool:
        """Return True if it is a known name with a version, `name@digest`. A Hub adapter's name holds an `@`
        too."""
        reference = self.ours(reference)
        name, separator, _ = reference.rpartition("@")
        return bool(separator) and self.get(name) is not None and self.get(reference) is None

    def ours(self, reference: str) -> str:
        """Return `name@digest` for a version spelled as OpenAI does. The `suffix` of a job is a name with
        ft-."""
        parts = reference.split(":")
        if len(parts) != _OPENAI_PARTS or parts[0] != _OPENAI:
            return reference
        name, digest = parts[-2:]
        known = next((one for one in (name, f"ft-{name}") if self.get(one) is not None), name)
        return f"{known}@{digest}"

    # ---- for requests ------------------------------------------------------------------------

    def choose(
        self, reference: str, *, param: str = "adapter", unit: RequestUnit | None = None
    ) -> AdapterChoice:
        """Return the version that answers a request.

        unit: what the request is to a rollout of the tenant's own adapter; None: whatever rollout runs, the
            active version answers.

        Raises what `find` does.
        """
        part = None if unit is None else self._part(reference, unit)
        if part is None or part.side == "active":
            return _chosen(self.find(reference, param=param), part)
        version = self.version(part.rollout.name, part.rollout.candidate, param=param)
        return _chosen(version, part)

    def _part(self, reference: str, unit: RequestUnit) -> RolloutPart | None:
        """Return the part of a request in a rollout, if it names an adapter with one, and no version."""
        record = self.own(self.ours(reference))
        rollout = None if record is None else record.rollout
        if record is None or rollout is None or record.active != rollout.baseline:
            return None
        candidate = record.version(rollout.candidate)
        ready = candidate is not None and candidate.state == "ready"
        if ready and chooses_candidate(rollout, unit):
            return RolloutPart(rollout, "candidate")
        return RolloutPart(rollout, "active")

    def choose_sum(self, terms: Sequence[tuple[str, float]]) -> AdapterChoice:
        """Return the weighted sum of several adapters' deltas; the engine adds up duplicates."""
        found = [
            (self.find(name, param=f"adapter[{index}].name"), weight)
            for index, (name, weight) in enumerate(terms)
        ]
        alone = len(found) == 1 and found[0][1] == 1.0
        return AdapterChoice(
            tuple(AdapterRef(version.digest, weight) for version, weight in found),
            tuple(VersionRef.of(version) for version, _ in found),
            [{"name": label(version.name, version.digest), "weight": weight} for version, weight in found],
            *_task_of([version for version, _ in found]),
            (found[0][0].report or {}) if alone else {},
        )


def _chosen(version: VersionRecord, part: RolloutPart | None = None) -> AdapterChoice:
    refs, chosen = (AdapterRef(version.digest),), label(version.name, version.digest)
    task, report = _task_of([version]), version.report or {}
    return AdapterChoice(refs, (VersionRef.of(version),), chosen, *task, report, part)


def _task_of(versions: Sequence[VersionRecord]) -> tuple[Task, int, tuple[str, ...]]:
    """Return task, number of labels and label names of the first version that generates no text."""
    for version in versions:
        report = version.report or {}
        if report.get("task", "CAUSAL_LM") != "CAUSAL_LM":
            return report["task"], report["labels"], tuple(report.get("label_names", ()))
    return "CAUSAL_LM", 0, ()


def not_ready(version: VersionRecord, param: str | None) -> StateConflictError:
    """Return the error that says why a version cannot be used and what to do about it."""
    if version.error is not None:
        reason = f"it failed ({version.error.code}: {version.error.message}). Choose another version."
    else:
        reason = "it is not proved yet. Wait until its state is ready."
    return StateConflictError(
        f"Version {version.digest} of adapter {version.name!r} is {version.state}: {reason}",
        code="version_not_ready",
        param=param,
    )


def check_name(name: str, base_name: str) -> str:
    """Return the name, if an adapter may have it. Raises InvalidRequestError."""
    if not is_adapter_name(name):
        raise InvalidRequestError(
            f"name: {name[:80]!r} cannot be an adapter's name. Use {NAME_RULE}.", param="name"
        )
    if name == base_name:
        raise InvalidRequestError(f"name: {name!r} is the base's own name. Choose another.", param="name")
    return name


def is_checkpoint(name: str) -> bool:
    """Return True if it is the name of a checkpoint, of any job."""
    return CHECKPOINT.fullmatch(name) is not None


def same_base(wanted: str | None, *own: str | None) -> bool:
    """Return True if a config's `base_model_name_or_path` may mean the base known by the names in `own`.

    Only the last part of each path counts, in any case: the same base lies in many places. None and "" mean
    any base.
    """
    return not wanted or _last_part(wanted) in {_last_part(name) for name in own if name}


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
