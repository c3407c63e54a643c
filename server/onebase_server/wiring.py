"""Puts one server's parts together: who is given what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from onebase_engine.base.default_base import ResolvedBase
from onebase_engine.engine.messages import Loading
from onebase_server.adapters.activation import Activation
from onebase_server.adapters.catalog import Catalog
from onebase_server.adapters.residency import PackedAdapterFiles, Residency
from onebase_server.adapters.service import AdapterService
from onebase_server.adapters.sources import Folders, HubAdapters, Pulls
from onebase_server.background import RegistryThreads, Threads
from onebase_server.generation.planner import Limits, Planner
from onebase_server.generation.tokenization import BaseTokenizer
from onebase_server.http.deps import Services
from onebase_server.http.views.adapters import AdapterViews
from onebase_server.jobs.wiring import assemble_training
from onebase_server.processes.link import EngineLink
from onebase_server.processes.share import BusyFlag
from onebase_server.processes.supervisor import EngineListeners, EngineSupervisor, RestartPolicy
from onebase_server.processes.verifier_client import PROBES, VerifierClient
from onebase_server.settings import Settings
from onebase_server.storage import Storage, host_memory

RECORD_THREADS = 4
DISK_THREADS = 8
PULL_THREADS = 4


class Preparation:
    """What happens before an engine gets requests: some of it once, some of it for each new engine."""

    def __init__(self, adapters: AdapterService, folders: Folders, residency: Residency) -> None:
        self._adapters = adapters
        self._folders = folders
        self._residency = residency
        self._served = False

    async def run(self) -> None:
        """Once, serve what was given at start; each time, load what is pinned. Raises AdapterStartError."""
        if not self._served:
            await self._adapters.resume()
            await self._folders.serve_given()
            self._served = True
        await self._residency.load_pinned()


def assemble(
    settings: Settings,
    base: ResolvedBase,
    storage: Storage,
    given: Sequence[tuple[str, Path]],
    *,
    engine_command: Sequence[str],
    engine_restarts: RestartPolicy,
    verifier_command: Sequence[str],
    trainer_command: Sequence[str],
    on_loading: Callable[[Loading], None],
) -> Services:
    """All parts of one server. `given`: the folders to serve before it is ready. Raises DataDirError."""
    registry, store = storage.registry, storage.store
    tokenizer = BaseTokenizer(str(base.folder))
    records, disk = RegistryThreads("records", RECORD_THREADS), Threads("disk", DISK_THREADS)
    catalog = Catalog(base.name, registry, records)
    files = PackedAdapterFiles(catalog, store, disk)
    link = EngineLink()
    residency = Residency(
        host_memory(settings),
        files.find,
        files.fetch,
        link.send,
        settings.queue_limit,
        on_damaged=lambda damaged: adapters.prove_again(damaged),
    )
    verifier = VerifierClient(
        store,
        disk,
        base_id=storage.base_id,
        probes=[tokenizer.encode(probe) for probe in PROBES],
        command=verifier_command,
        proof_timeout=settings.proof_timeout,
    )
    activation = Activation(registry, store, catalog, residency, records, disk)
    adapters = AdapterService(
        registry, store, catalog, activation, verifier, base_names=base.names, records=records, disk=disk
    )
    pulls = Pulls(store, Threads("pull", PULL_THREADS), settings.hub_allow, settings.max_upload)
    hub = HubAdapters(adapters, pulls)
    folders = Folders(adapters, activation, given, settings.max_upload)
    limits = Limits(max_choices=settings.max_choices, max_timeout=settings.max_timeout)
    busy = BusyFlag.make()
    training = assemble_training(
        settings, base, storage, adapters, busy, command=trainer_command, records=records, disk=disk
    )
    listeners = EngineListeners(
        versions=residency,
        base=(training.manager, verifier),
        prepare=Preparation(adapters, folders, residency).run,
        busy=busy.set,
    )
    supervisor = EngineSupervisor(
        settings.engine_config(str(base.folder)),
        link,
        listeners,
        queue_limit=settings.queue_limit,
        stall_timeout=settings.stall_timeout,
        command=engine_command,
        policy=engine_restarts,
        on_loading=on_loading,
    )
    return Services(
        settings=settings,
        catalog=catalog,
        tokenizer=tokenizer,
        supervisor=supervisor,
        planner=Planner(supervisor, tokenizer, catalog, hub, limits),
        residency=residency,
        adapters=adapters,
        hub=hub,
        activation=activation,
        folders=folders,
        views=AdapterViews(adapters, hub, residency),
        verifier=verifier,
        training=training,
    )
